"""The recorded book: what is kept of a run, and a book built from it that runs nothing."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from darkmatter import __main__
from darkmatter.book import pages, pairs, recorded, records, runner
from darkmatter.errors import DarkmatterError
from tests.browser import WIDE, Browser
from tests.conftest import write_notebook

HOME = Path(__file__).resolve().parents[2]
FIGURE = """\
import sys
import plotly.graph_objects as go
from IPython.display import display
from darkmatter.book import figures
print("not shown", file=sys.stderr)
fig = go.Figure().add_bar(x=["a", "b"], y=[1.25, 2])
display(figures.finish(fig, "fig-bars", "Two bars.", "Bars at 1.25 and 2"))
figures.prose(f"Together they are {1.25 + 2}, see {{numref}}`fig-bars`.")
"""
RECORD = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": "cpu",
    "started": "2026-01-02T03:04:05+00:00",
    "hardware": {"processor": "A processor", "cores": 2},
    "dtype": "bfloat16",
}
SAID = "Recorded 2026-01-02 at commit 0123456 on A processor, 2 cores, bfloat16."

# For every Python that is started: what a reader of the book has not installed.
BLOCK = """\
import sys
GONE = {"torch", "transformers", "sae_lens", "transformer_lens", "papermill", "scipy", "jupyterlab"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in GONE:
            raise ModuleNotFoundError(f"No module named '{name}' for who only reads", name=name)
sys.meta_path.insert(0, Block())
"""


def fake_run(home: Path, name: str, text: str = "42", cell_id: str = "one", **record: Any) -> Path:
    """The directory of a finished run of a notebook, as papermill leaves it."""
    notebook = pairs.read(home / "notebooks" / f"{name}.py")
    given = nbformat.v4.new_code_cell(
        "# Parameters", id=cell_id, metadata={"tags": ["injected-parameters"]}
    )
    data = {"text/markdown": text, "text/html": f"<p>{text}</p>", "text/plain": "<Markdown object>"}
    shown = nbformat.v4.new_output("execute_result", data=data, execution_count=3)
    noise = nbformat.v4.new_output("stream", name="stderr", text="/home/somebody/.venv: a warning")
    notebook.cells.insert(2, given)
    notebook.cells[3].update(outputs=[noise, shown], execution_count=3)
    folder = home / "_build" / "fake" / name
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "executed.ipynb")
    (folder / "record.json").write_text(json.dumps(RECORD | record))
    return folder


@pytest.fixture
def shelf(home: Path) -> Path:
    """Where the outputs of the smoke preset are recorded, in an empty project."""
    return recorded.folder_of(home, "smoke")


def keep(home: Path, *names: str, **given: Any) -> list[str]:
    return recorded.keep(
        {name: fake_run(home, name, **given) for name in names}, recorded.folder_of(home, "smoke")
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_read_is_what_the_page_of_the_run_shows(home: Path, shelf: Path) -> None:
    source = write_notebook(home / "notebooks", "01_one", "6 * 7")
    keep(home, "01_one")
    ran = nbformat.read(home / "_build" / "fake" / "01_one" / "executed.ipynb", as_version=4)
    whole = pages.merge(pairs.read(source), ran)
    again = pages.merge(
        pairs.read(source), nbformat.from_dict(recorded.load(shelf / "01_one.json.gz"))
    )
    assert again.cells[3].outputs[0].data == {
        "text/markdown": "42"
    }  # the form that the page shows, without warnings
    whole.cells[3].outputs = [{**whole.cells[3].outputs[1], "data": {"text/markdown": "42"}}]
    assert again == whole


def test_recorded_again_the_bytes_are_the_same(home: Path, shelf: Path) -> None:
    for name in ("01_one", "02_two"):
        write_notebook(home / "notebooks", name, "6 * 7")
    assert keep(home, "01_one", "02_two") == ["01_one", "02_two"]
    first = contents(shelf)
    again = {"cell_id": "another", "started": "2027-01-01", "commit": "fedcba9876543210"}
    assert keep(home, "01_one", "02_two", **again) == []
    assert contents(shelf) == first
    assert keep(home, "02_two", text="43") == ["02_two"]
    assert contents(shelf)["01_one.json.gz"] == first["01_one.json.gz"]
    for path in shelf.iterdir():
        path.unlink()
    keep(home, "01_one", "02_two")
    assert contents(shelf) == first


def test_notebooks_that_are_gone_are_forgotten(home: Path, shelf: Path) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    keep(home, "01_one")
    (shelf / "07_gone.json.gz").write_bytes(b"")
    recorded.forget(shelf, ["01_one"])
    assert list(contents(shelf)) == ["01_one.json.gz"]


@pytest.mark.parametrize("asked", [{"parameters": {"x": 1}}, {"preset": "mine.yaml"}])
def test_only_a_preset_as_it_is_can_be_recorded(home: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(DarkmatterError, match="give its name, and no parameters"):
        runner.build(**{"preset": "smoke", "home": home, "record": True} | asked)


def test_the_line_names_every_date_commit_and_machine_once() -> None:
    one = {
        "date": "2026-01-02",
        "commit": "0123456789",
        "dirty": False,
        "dtype": "bfloat16",
        "processor": "A processor",
        "cores": 2,
        "device": "cpu",
    }
    two = one | {
        "date": "2026-01-09",
        "dirty": True,
        "processor": "B",
        "cores": 16,
        "device": "cuda",
    }
    none = dict.fromkeys(one) | {"date": ""}
    assert recorded.line([one, one]) == SAID
    assert recorded.line([two, one]) == (
        "Recorded 2026-01-02 to 2026-01-09 at commit 0123456, 0123456 with changes on "
        "A processor, 2 cores, bfloat16; B, 16 cores, cuda, bfloat16."
    )
    assert recorded.line([none]) == "Recorded on an unknown machine."


def test_without_anything_recorded_one_sentence(
    home: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    (shelf.parent / "smollm2").mkdir(parents=True)
    monkeypatch.setattr(records, "HOME", home)
    assert __main__.main(["read", "--preset", "smoke"]) == 2
    assert capsys.readouterr().err == (
        "darkmatter: Nothing is recorded for today's notebooks on the preset 'smoke' "
        "(other presets: smollm2); 'make book PRESET=smoke' runs them and builds the book.\n"
    )
    assert not (home / "_build").exists()


@pytest.mark.slow
def test_what_does_not_fit_is_named_and_the_rest_is_built(
    home: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["01_one", "02_changed", "03_missing", "04_damaged"]
    for name in names:
        write_notebook(
            home / "notebooks", name, "6 * 7", prose=f"# Of {name}, as {{numref}}`fig-nowhere` says"
        )
    keep(home, *names)
    write_notebook(home / "notebooks", "02_changed", "6 * 8", prose="# Changed")
    (shelf / "03_missing.json.gz").unlink()
    (shelf / "04_damaged.json.gz").write_bytes((shelf / "04_damaged.json.gz").read_bytes()[:-20])
    (home / "_toc.yml").write_text(
        "format: jb-book\nroot: notebooks/01_one\nchapters:\n"
        + "".join(f"- file: notebooks/{name}\n" for name in names[1:])
    )
    shutil.copytree(HOME / "book" / "_ext", home / "book" / "_ext")
    (home / "_config.yml").write_text(
        (home / "_config.yml").read_text()
        + "sphinx:\n  local_extensions: {bookfigures: book/_ext}\n"
    )
    monkeypatch.setattr(records, "HOME", home)
    assert __main__.main(["read", "--preset", "smoke"]) == 0
    told = capsys.readouterr()
    assert told.err == (
        "darkmatter: Some pages have prose only, because nothing is recorded for today's code "
        "('make book' runs it). Recorded with other code than today's: 02_changed. "
        "Not recorded: 03_missing. Damaged: 04_damaged.\n"
    )
    html = home / "_build" / "read" / "_build" / "html"
    assert (html / "index.html").as_uri() in told.out
    for name in names:
        page = (html / "notebooks" / f"{name}.html").read_text()
        assert (SAID in page, recorded.MISSING in page) == (name == "01_one", name != "01_one")
        assert ("<p>42</p>" in page) == (name == "01_one")


def test_the_pins_are_those_of_the_book() -> None:
    def pins(name: str) -> set[str]:
        return {line for line in (HOME / name).read_text().splitlines() if "==" in line}

    assert pins("requirements-read.txt") < pins("requirements.txt")


def test_what_is_committed_is_small_and_of_the_notebooks_there_are() -> None:
    files = list((HOME / "artifacts").glob("recorded/*/*"))
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    for path in files:
        assert (HOME / "notebooks" / path.name.replace(".json.gz", ".py")).exists()
        assert '"stderr"' not in gzip.decompress(path.read_bytes()).decode()


# The book as a reader gets it, in a browser


@pytest.fixture(scope="module")
def read_book(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small book run and recorded, then read by a Python without a model; its pages both ways."""
    home = tmp_path_factory.mktemp("read") / "home"
    (home / "notebooks").mkdir(parents=True)
    write_notebook(home / "notebooks", "01_one", FIGURE, prose="# A chapter with $x^2$")
    shutil.copytree(HOME / "book" / "_ext", home / "book" / "_ext")
    shutil.copytree(HOME / "book" / "_static", home / "book" / "_static")
    shutil.copy(HOME / "book" / "references.bib", home / "book")
    shutil.copy(HOME / "_config.yml", home)
    (home / "book" / "words.md").write_text("# Words\n\nSee {numref}`fig-bars`.\n")
    (home / "_toc.yml").write_text(
        "format: jb-book\nroot: notebooks/01_one\nchapters:\n- file: book/words\n"
    )
    ran = runner.build("smoke", home=home, record=True)
    (home / "sitecustomize.py").write_text(BLOCK)
    code = f"""\
import sys, pathlib
from darkmatter import __main__
from darkmatter.book import records
records.HOME = pathlib.Path({str(home)!r})
sys.exit(__main__.main(["read", "--preset", "smoke"]))"""
    inside = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), str(HOME)])}
    subprocess.run([sys.executable, "-c", code], env=inside, check=True)
    assert ran
    return ran.parent, home / "_build" / "read" / "_build" / "html"


def articles(folder: Path, name: str) -> list[str]:
    """The main part of a page, the note at its top apart from the rest."""
    article = re.findall(
        r'(?s)<article class="bd-article">(.*?)</article>', (folder / f"{name}.html").read_text()
    )[0]
    return re.match(
        r'(?s)\s*(?:<p class="dm-note" role="note">(.*?)</p>)?\s*(.*)', article
    ).groups()  # type: ignore


@pytest.mark.slow
def test_a_reader_without_a_model_gets_the_same_pages(read_book: tuple[Path, Path]) -> None:
    for name in ("notebooks/01_one", "book/words"):
        (no_note, ran), (note, read) = (articles(folder, name) for folder in read_book)
        assert no_note is None
        assert note.endswith("ecorded on an unknown machine.")  # this notebook leaves no record
        assert read == ran
    assert "Together they are 3.25" in read_book[1].joinpath("notebooks", "01_one.html").read_text()


@pytest.mark.browser
def test_the_pages_open_with_every_host_unresolvable(
    read_book: tuple[Path, Path], chromium: str
) -> None:
    with Browser(chromium) as browser:
        browser.size(WIDE)
        browser.open(read_book[1] / "notebooks" / "01_one.html")
        assert browser.complaints() == []
        assert [
            url for url in browser.requests() if not url.startswith(("file:", "data:", "blob:"))
        ] == []
        assert browser.ask(
            "document.querySelectorAll('.dm-figure.dm-drawn:not(.dm-failed) .main-svg').length > 0"
        )
        tops = "['.dm-note', 'article h1'].map(e => $(e).getBoundingClientRect().top)"
        note, title = browser.ask(tops.replace("$", "document.querySelector"))
        assert 0 < note < title
