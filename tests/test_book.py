"""The runner, on small notebooks that need no model: what runs again when, and what a cut-off leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from darkmatter import book, pages, pairs, preset
from darkmatter.errors import DarkmatterError
from tests.conftest import write_notebook

SMOKE = preset.load("smoke")


def key(source: Path, chosen: preset.Preset = SMOKE, **parameters: object) -> str:
    return book.run_key(source, chosen, parameters, [])


def done(home: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in home.glob("_build/runs/smoke/*/*/done.json"))


def test_a_run_is_keyed_by_code_settings_and_parameters_but_not_by_prose(home: Path) -> None:
    source = write_notebook(home / "notebooks", "01_one", "x = 1")
    first = key(source)
    assert key(source, preset="a/path.yaml") == first  # what it resolves to counts, not how it was named
    assert first != key(source, preset.load("smoke", seed=1))
    assert first != key(source, colour="red")
    write_notebook(home / "notebooks", "01_one", "x = 1", prose="Other words")
    assert key(source) == first
    write_notebook(home / "notebooks", "01_one", "x = 2")
    assert key(source) != first


def test_a_notebook_that_reads_records_is_keyed_by_the_runs_before_it(home: Path) -> None:
    reader = write_notebook(home / "notebooks", "90_all", "records.load_all()")
    other = write_notebook(home / "notebooks", "02_two", "1")
    before = [book.Done("01_one", Path("runs", name), 1, kept=False) for name in ("a", "b")]
    assert book.run_key(reader, SMOKE, {}, before[:1]) != book.run_key(reader, SMOKE, {}, before[1:])
    assert book.run_key(other, SMOKE, {}, before[:1]) == book.run_key(other, SMOKE, {}, before[1:])


def test_notebooks_that_read_records_run_last(home: Path) -> None:
    for name, code in (("00_first", "records.load_all()"), ("01_one", "1"), ("02_two", "2")):
        write_notebook(home / "notebooks", name, code)
    assert [path.stem for path in book.sources_of(home, ())] == ["01_one", "02_two", "00_first"]


def test_a_notebook_that_shows_other_presets_is_keyed_by_their_records(home: Path, tmp_path: Path) -> None:
    reader = write_notebook(home / "notebooks", "14_all", "records.load_all(every_preset=True)")
    mine, other = (tmp_path / name / "01_one.json" for name in (SMOKE.name, "other"))
    keys = []
    for path, text in ((mine, "1"), (mine, "2"), (other, "1"), (other, "2")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        keys.append(book.run_key(reader, SMOKE, {}, [], tmp_path))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_modules_are_found_through_one_another(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    for name, code in {
        "__init__": "",
        "a": "from . import b",
        "b": "def f():\n    from .c import x",
        "c": "import pack.d",
        "d": "import os",
        "unused": "",
    }.items():
        (package / f"{name}.py").write_text(code)
    found = book.modules_used("%time 1\n!ls\nfrom pack.a import thing\nimport numpy", package)
    assert [path.stem for path in found] == ["__init__", "a", "b", "c", "d"]


def test_todays_prose_meets_the_outputs_of_the_run(home: Path) -> None:
    source = write_notebook(home / "notebooks", "01_one", "x = 1", prose="Today")
    current, executed = pairs.read(source), pairs.read(source)
    executed.cells[0].source = "Yesterday"
    executed.cells.insert(
        2,
        nbformat.v4.new_code_cell(
            "# Parameters", metadata={"tags": ["injected-parameters"], "papermill": {"duration": 1}}
        ),
    )
    executed.cells[3].outputs = [nbformat.v4.new_output("stream", text="seen")]
    merged = pages.merge(current, executed)
    assert [cell.source for cell in merged.cells] == [
        "Today",
        'preset: str = "smoke"  # a preset',
        "# Parameters",
        "x = 1",
    ]
    assert merged.cells[2].metadata == {"tags": ["injected-parameters"]}
    assert merged.cells[3].outputs[0].text == "seen"


def test_the_life_of_a_book(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build; build again; change prose; change code: only what changed runs, on this very Python."""
    log = home / "ran.txt"
    code = f"import sys\nprint(sys.executable, file=open({str(log)!r}, 'a'))"
    write_notebook(home / "notebooks", "01_one", code, prose="# First words")
    write_notebook(home / "notebooks", "02_two", code)
    (home / "_toc.yml").write_text(
        "format: jb-book\nroot: notebooks/01_one\nchapters:\n- file: notebooks/02_two\n"
    )

    def build() -> tuple[int, str]:
        page = book.build("smoke", home=home)
        assert page is not None
        return len(log.read_text().splitlines()), (page.parent / "notebooks" / "01_one.html").read_text()

    assert build()[0] == 2
    assert set(log.read_text().splitlines()) == {sys.executable}
    built = home / "_build" / "built-smoke.json"
    assert json.loads(built.read_text())["kept"] == []
    assert (home / "_build" / "html" / "index.html").as_uri() in capsys.readouterr().out
    assert build()[0] == 2
    assert json.loads(built.read_text())["kept"] == ["01_one", "02_two"]
    assert "nothing changed" in capsys.readouterr().out
    write_notebook(home / "notebooks", "01_one", code, prose="# Second words")
    runs, page = build()
    assert runs == 2
    assert "Second words" in page
    monkeypatch.setattr(pages, "build", lambda *_: home)  # the pages are not the point of what follows
    write_notebook(home / "notebooks", "02_two", code + "\nprint(1)")
    book.build("smoke", home=home)
    assert len(log.read_text().splitlines()) == 3
    assert "01_one: finished earlier, kept\n02_two: running\n" in capsys.readouterr().out


def test_a_failure_is_told_and_the_finished_runs_are_kept(home: Path) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    write_notebook(home / "notebooks", "02_two", "print('so far')\n1 / 0")
    with pytest.raises(DarkmatterError) as told:
        book.build("smoke", home=home)
    text = str(told.value)
    assert text.startswith("Notebook 02_two stopped at In [3]: ZeroDivisionError: division by zero\n")
    so_far = Path(text.split("as far as it got: ")[1].splitlines()[0])
    assert "so far" in so_far.read_text()
    assert done(home) == ["01_one"]


def test_a_kernel_that_dies_is_told(home: Path) -> None:
    write_notebook(home / "notebooks", "01_one", "import os\nos._exit(1)")
    with pytest.raises(DarkmatterError, match="01_one stopped as its kernel died"):
        book.build("smoke", home=home)
    assert done(home) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_cut_off_in_the_middle_it_goes_on_where_it_was(home: Path, how: signal.Signals) -> None:
    sign, log = home / "sign", home / "ran.txt"
    once = f"with open({str(log)!r}, 'a') as file: file.write('one\\n')"
    wait = f"""\
import os, pathlib, time
sign = pathlib.Path({str(sign)!r})
if not sign.exists():
    sign.write_text(str(os.getpid()))
    time.sleep(600)"""
    write_notebook(home / "notebooks", "01_one", once)
    write_notebook(home / "notebooks", "02_two", wait)
    code = f"""\
from pathlib import Path
from darkmatter import book
book.build("smoke", ["01_one", "02_two"], home=Path({str(home)!r}))"""
    runner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, preexec_fn=listen)  # noqa: PLW1509
    wait_for(lambda: sign.exists() and sign.read_text() != "")
    runner.send_signal(how)
    assert runner.wait(60) != 0
    assert done(home) == ["01_one"]
    kernel = int(sign.read_text())
    wait_for(lambda: not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert done(home) == ["01_one", "02_two"]
    assert log.read_text() == "one\n"


def listen() -> None:
    """Undo what a shell does to background jobs, which ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: object, patience: float = 240) -> None:
    assert callable(condition)
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def test_records_are_put_where_later_notebooks_read_them(home: Path) -> None:
    write = """\
import os, pathlib
pathlib.Path(os.environ["DARKMATTER_RECORD"]).write_text('{"notebook": 1}')"""
    read = "import os, pathlib\nprint(sorted(os.listdir(os.environ['DARKMATTER_RECORDS'])))"
    write_notebook(home / "notebooks", "01_one", write)
    write_notebook(home / "notebooks", "02_two", read)
    book.build("smoke", ["01_one", "02_two"], home=home)
    record = json.loads((home / "_build" / "records" / "smoke" / "01_one.json").read_text())
    assert record["wall_seconds"] > 0
    executed = next(home.glob("_build/runs/smoke/02_two/*/executed.ipynb")).read_text()
    assert "['01_one.json']" in executed


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"preset": "smok"}, "no preset 'smok'"),
        ({"only": ["03_three"]}, "no notebook 03_three"),
        ({"parameters": {"colour": "red"}}, "Unknown parameter 'colour'; 01_one takes: preset"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(home: Path, asked: dict[str, object], sentence: str) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    with pytest.raises(DarkmatterError, match=re.escape(sentence)):
        book.build(**{"preset": "smoke", "home": home} | asked)  # type: ignore[arg-type]
    assert not (home / "_build").exists()


def test_a_page_that_does_not_exist_is_told(home: Path) -> None:
    (home / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nparts:\n- chapters:\n  - file: book/gone\n"
    )
    (home / "book").mkdir()
    (home / "book" / "intro.md").write_text("# Hello\n")
    with pytest.raises(DarkmatterError, match=r"_toc\.yml names book/gone"):
        pages.build({}, home)


def test_a_warning_fails_the_book_every_time(home: Path) -> None:
    (home / "_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (home / "book").mkdir()
    (home / "book" / "intro.md").write_text("# Hello\n\n[nowhere](#nowhere)\n")
    for _ in range(2):
        with pytest.raises(DarkmatterError, match=r"(?s)could not be built.*nowhere"):
            pages.build({}, home)
