"""The two halves of notebooks in every state that users bring about: mended, or refused whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from darkmatter import presets
from darkmatter.book import keys, pairs
from darkmatter.errors import DarkmatterError
from tests.conftest import write_notebook

HOME = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(home: Path) -> Path:
    """Two pairs that agree."""
    shutil.copy(HOME / "pyproject.toml", home)
    for name in ("01_one", "02_two"):
        write_notebook(home / "notebooks", name, "x = 1", prose="Words")
    pairs.sync(home / "notebooks")
    return home / "notebooks"


def newer(path: Path, seconds: int = 60) -> None:
    moment = time.time() + seconds
    os.utime(path, (moment, moment))


def conflict_in_text(folder: Path) -> Path:
    path = folder / "01_one.py"
    path.write_text(path.read_text() + "<<<<<<< HEAD\n# %%\ny = 1\n=======\n"
                    "# %%\ny = 2\n>>>>>>> b\n")
    return path


def conflict_in_notebook(folder: Path) -> Path:
    path = folder / "01_one.ipynb"
    path.write_text("<<<<<<< HEAD\n" + path.read_text() + "\n>>>>>>> theirs\n")
    return path


def empty_text(folder: Path) -> Path:
    path = folder / "01_one.py"
    path.write_text("")
    return path


def empty_notebook(folder: Path) -> Path:
    path = folder / "01_one.ipynb"
    path.write_text("")
    return path


def cut_off_notebook(folder: Path) -> Path:
    path = folder / "01_one.ipynb"
    path.write_text(path.read_text()[:200])
    return path


@pytest.mark.parametrize(("spoil", "sentence"), [
    (conflict_in_text, r"01_one\.py holds the conflict markers of a merge"),
    (conflict_in_notebook, r"01_one\.ipynb holds the conflict markers of a merge"),
    (empty_text, r"01_one\.py is empty or cut off; delete it to have it made from its other half"),
    (empty_notebook, r"01_one\.ipynb is empty or cut off"),
    (cut_off_notebook, r"01_one\.ipynb is empty or cut off"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_spoilt_half_is_named_and_nothing_is_touched(
    folder: Path, spoil: Callable[[Path], Path], sentence: str
) -> None:
    other = folder / "02_two.py"
    other.write_text(other.read_text().replace("Words", "Better words"))  # would be synced
    newer(spoil(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DarkmatterError, match=sentence):
        pairs.sync(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_byte_order_mark_is_taken_off(folder: Path) -> None:
    text = folder / "01_one.py"
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes() + b"\n# %%\ny = 2\n")
    newer(text)
    pairs.sync(folder)
    cells = pairs.read(text).cells
    assert not text.read_bytes().startswith(b"\xef")
    assert cells[0].cell_type == "markdown" and cells[-1].source == "y = 2"
    assert pairs.out_of_sync(folder) == []


def test_two_halves_that_were_both_edited_are_left_as_they_are(folder: Path) -> None:
    text, notebook = folder / "01_one.py", folder / "01_one.ipynb"
    text.write_text(text.read_text().replace("Words", "My words"))
    content = nbformat.read(notebook, 4)
    content.cells[0].source = "Their words"
    nbformat.write(content, notebook)
    newer(notebook)
    before = text.read_bytes(), notebook.read_bytes()
    with pytest.raises(DarkmatterError, match="were both edited since they last agreed"):
        pairs.sync(folder)
    assert (text.read_bytes(), notebook.read_bytes()) == before
    notebook.unlink()  # as the sentence says
    pairs.sync(folder)
    assert "My words" in text.read_text() and pairs.out_of_sync(folder) == []


def test_one_edited_half_wins_either_way(folder: Path) -> None:
    notebook = folder / "01_one.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[0].source = "Their words"
    nbformat.write(content, notebook)
    newer(notebook)
    pairs.sync(folder)
    assert "# Their words" in (folder / "01_one.py").read_text()


def test_a_plain_module_is_left_alone(folder: Path) -> None:
    helper = folder / "helpers.py"
    helper.write_text('"""Shared."""\n\n\ndef double(x):\n    return 2 * x\n')
    before = helper.read_bytes()
    pairs.sync(folder)
    assert helper.read_bytes() == before and not helper.with_suffix(".ipynb").exists()
    assert pairs.out_of_sync(folder) == []
    assert [path.stem for path in keys.sources_of(folder.parent)] == ["01_one", "02_two"]


@pytest.mark.parametrize("code", [
    "files = !ls", "if True:\n    !echo hello", "%time 1", "%%bash\nls", "import asyncio\nawait "
    "asyncio.sleep(0)", "x = %pwd"])
def test_what_ipython_reads_does_not_stop_a_run(folder: Path, code: str) -> None:
    source = write_notebook(folder, "03_three", code)
    assert len(keys.run_key(source, presets.load("smoke"), {})) == 16


def test_a_cell_that_is_not_python_is_named(folder: Path) -> None:
    source = write_notebook(folder, "03_three", "x = (1,")
    with pytest.raises(DarkmatterError, match=r"Code cell 2 of 03_three is not Python: .*line 1"):
        keys.run_key(source, presets.load("smoke"), {})
