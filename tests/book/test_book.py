"""The runner, on small notebooks that need no model: what runs again, what a cut-off leaves."""

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

from darkmatter import cache
from darkmatter.book import execution, keys, pages, pairs, runner
from darkmatter.book.remaining import Line
from darkmatter.errors import DarkmatterError
from darkmatter.presets import preset
from tests.conftest import write_notebook

SMOKE = preset.load("smoke")


def key(source: Path, chosen: preset.Preset = SMOKE, **parameters: object) -> str:
    return keys.run_key(source, chosen, parameters)


def done(home: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in home.glob("_build/runs/smoke/*/*/done.json"))


def test_a_run_is_keyed_by_code_settings_and_parameters_but_not_by_prose(home: Path) -> None:
    source = write_notebook(home / "notebooks", "01_one", "x = 1")
    first = key(source)
    assert key(source, preset="a/path.yaml") == first  # what it resolves to counts, not its name
    assert first != key(source, preset.load("smoke", seed=1))
    assert first != key(source, colour="red")
    write_notebook(home / "notebooks", "01_one", "x = 1", prose="Other words")
    assert key(source) == first
    write_notebook(home / "notebooks", "01_one", "x = 2")
    assert key(source) != first


def test_a_notebook_that_reads_records_is_keyed_by_the_runs_before_it(home: Path) -> None:
    reader = write_notebook(home / "notebooks", "90_all", "records.load_all()")
    other = write_notebook(home / "notebooks", "02_two", "1")
    assert keys.run_key(reader, SMOKE, {}, ["a"]) != keys.run_key(reader, SMOKE, {}, ["b"])
    assert keys.run_key(other, SMOKE, {}, ["a"]) == keys.run_key(other, SMOKE, {}, ["b"])


def test_notebooks_that_read_records_run_last(home: Path) -> None:
    for name, code in (("00_first", "records.load_all()"), ("01_one", "1"), ("02_two", "2")):
        write_notebook(home / "notebooks", name, code)
    assert [path.stem for path in keys.sources_of(home)] == ["01_one", "02_two", "00_first"]


def test_a_notebook_that_shows_other_presets_is_keyed_by_their_records(
    home: Path, tmp_path: Path
) -> None:
    reader = write_notebook(home / "notebooks", "14_all", "records.load_all(every_preset=True)")
    plain = write_notebook(home / "notebooks", "15_own", "records.load_all()")
    mine, other = (tmp_path / name / "01_one.json" for name in (SMOKE.name, "other"))
    all_keys, plain_keys = [], []
    for path, text in ((mine, "1"), (mine, "2"), (other, "1"), (other, "2")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        all_keys.append(keys.run_key(reader, SMOKE, {}, [], tmp_path))
        plain_keys.append(keys.run_key(plain, SMOKE, {}, [], tmp_path))
    assert all_keys[0] == all_keys[1]
    assert len(set(all_keys)) == 3
    assert len(set(plain_keys)) == 1


def test_a_notebook_that_shows_committed_results_is_keyed_by_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = write_notebook(home / "notebooks", "17_speed", "folder = 'bench'")
    other = write_notebook(home / "notebooks", "02_two", "2")
    monkeypatch.setattr(keys.records, "HOME", tmp_path)
    result = tmp_path / "artifacts" / "bench" / "here.json"
    result.parent.mkdir(parents=True)
    found = []
    for text in ("1", "2"):
        result.write_text(text)
        found.append((key(shows), key(other)))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_a_run_is_keyed_by_its_modules_and_its_data(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_notebook(home / "notebooks", "01_one", "from darkmatter import progress")
    text = tmp_path / "text.txt"
    text.write_text("one")
    chosen = preset.load("smoke", corpus=str(text))
    first = key(source, chosen)
    text.write_text("two")
    assert key(source, chosen) != first
    text.write_text("one")
    assert key(source, chosen) == first
    monkeypatch.setattr(keys.records, "inputs", lambda _: {})
    by_edited = {}
    for edited in ("nothing", "progress", "survey"):  # of which the last is not imported
        monkeypatch.setattr(keys.cache, "sha256", lambda path, name=edited: path.stem == name)
        by_edited[edited] = key(source, chosen)
    assert by_edited["progress"] != by_edited["nothing"] == by_edited["survey"]


def test_a_run_is_marked_as_done_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When ``done.json`` appears, all else of the run is there; what failed says so and why."""
    source = write_notebook(home / "notebooks", "01_one", "1 / 1")
    run = execution.Run("01_one", "smoke", {"preset": "smoke"}, key(source), str(home))
    line = Line("smoke", [(["01_one"], 1)])
    seen, write = [], cache.write_json

    def watched(path: Path, value: object) -> None:
        seen.append((path.name, sorted(other.name for other in path.parent.glob("*"))))
        write(path, value)

    monkeypatch.setattr(cache, "write_json", watched)
    first = execution.run_once(run, home, line)
    again = execution.run_once(run, home, line)
    assert (first.kept, again.kept, first.seconds) == (False, True, again.seconds)
    assert seen == [("done.json", ["executed.ipynb", "input.ipynb"])]

    def refuse() -> None:
        raise DarkmatterError("not today")

    other = execution.Run("01_one", "smoke", {"preset": "smoke"}, "0" * 16, str(home))
    with pytest.raises(DarkmatterError, match="not today"):
        execution.run_once(other, home, line, check=refuse)
    assert (other.status, other.outcome["why"]) == ("did not start", "not today")


def test_modules_are_found_through_one_another(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    for name, code in {
        "__init__": "", "a": "from . import b", "b": "def f():\n    from .c import x",
        "c": "import pack.d", "d": "import os", "unused": "",
    }.items():
        (package / f"{name}.py").write_text(code)
    used = keys.modules_used("from pack.a import thing\nimport numpy", package)
    assert [path.stem for path in used] == ["__init__", "a", "b", "c", "d"]


def test_todays_prose_meets_the_outputs_of_the_run(home: Path) -> None:
    source = write_notebook(home / "notebooks", "01_one", "x = 1", prose="Today")
    current, executed = pairs.read(source), pairs.read(source)
    executed.cells[0].source = "Yesterday"
    added = {"tags": ["injected-parameters"], "papermill": {"duration": 1}}
    executed.cells.insert(2, nbformat.v4.new_code_cell("# Parameters", metadata=added))
    executed.cells[3].outputs = [nbformat.v4.new_output("stream", text="seen")]
    merged = pages.merge(current, executed)
    assert [cell.source for cell in merged.cells] == [
        "Today", 'preset: str = "smoke"  # a preset', "# Parameters", "x = 1"]
    assert merged.cells[2].metadata == {"tags": ["injected-parameters"]}
    assert merged.cells[3].outputs[0].text == "seen"


@pytest.mark.slow
def test_the_life_of_a_book(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build; build again; change prose; change code: only what changed runs, on this Python."""
    log = home / "ran.txt"
    code = f"import sys\nprint(sys.executable, file=open({str(log)!r}, 'a'))"
    write_notebook(home / "notebooks", "01_one", code, prose="# First words")
    write_notebook(home / "notebooks", "02_two", code)
    (home / "_toc.yml").write_text(
        "format: jb-book\nroot: notebooks/01_one\nchapters:\n- file: notebooks/02_two\n"
    )

    def build() -> tuple[int, str]:
        page = runner.build("smoke", home=home)
        assert page is not None
        html = (page.parent / "notebooks" / "01_one.html").read_text()
        return len(log.read_text().splitlines()), html

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
    monkeypatch.setattr(pages, "build", lambda *_: home)  # what follows is not about the pages
    write_notebook(home / "notebooks", "02_two", code + "\nprint(1)")
    runner.build("smoke", home=home)
    assert len(log.read_text().splitlines()) == 3
    assert "01_one: finished earlier, kept\n02_two: running\n" in capsys.readouterr().out


def test_a_failure_is_told_and_the_finished_runs_are_kept(home: Path) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    write_notebook(home / "notebooks", "02_two", "print('so far')\n1 / 0")
    with pytest.raises(DarkmatterError) as told:
        runner.build("smoke", home=home)
    text = str(told.value)
    assert text.startswith("Notebook 02_two stopped at In [3]: ZeroDivisionError: division by "
                           "zero\n")
    so_far = Path(text.split("as far as it got: ")[1].splitlines()[0])
    assert "so far" in so_far.read_text()
    assert done(home) == ["01_one"]


def test_a_kernel_that_dies_is_told(home: Path) -> None:
    write_notebook(home / "notebooks", "01_one", "import os\nos._exit(1)")
    with pytest.raises(DarkmatterError, match="01_one stopped as its kernel died"):
        runner.build("smoke", home=home)
    assert done(home) == []


@pytest.mark.slow
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
from darkmatter.book import runner
runner.build("smoke", ["01_one", "02_two"], home=Path({str(home)!r}))"""
    runner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                              preexec_fn=listen)  # noqa: PLW1509
    wait_for(lambda: sign.exists() and sign.read_text() != "")
    runner.send_signal(how)
    assert runner.wait(60) != 0
    assert done(home) == ["01_one"]
    kernel = int(sign.read_text())
    wait_for(lambda: not psutil.pid_exists(kernel)
             or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert done(home) == ["01_one", "02_two"]
    assert log.read_text() == "one\n"


def listen() -> None:
    """Undo what a shell does to background jobs: they and their children ignore Ctrl-C."""
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
    runner.build("smoke", ["01_one", "02_two"], home=home)
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
def test_a_mistake_is_told_before_anything_runs(
    home: Path, asked: dict[str, object], sentence: str
) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    with pytest.raises(DarkmatterError, match=re.escape(sentence)):
        runner.build(**{"preset": "smoke", "home": home} | asked)  # type: ignore[arg-type]
    assert not (home / "_build").exists()


def test_a_page_that_does_not_exist_is_told(home: Path) -> None:
    (home / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nparts:\n- chapters:\n  - file: book/gone\n"
    )
    (home / "book").mkdir()
    (home / "book" / "intro.md").write_text("# Hello\n")
    with pytest.raises(DarkmatterError, match=r"_toc\.yml names book/gone"):
        pages.build({}, home)


@pytest.mark.slow
def test_a_warning_fails_the_book_every_time(home: Path) -> None:
    (home / "_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (home / "book").mkdir()
    (home / "book" / "intro.md").write_text("# Hello\n\n[nowhere](#nowhere)\n")
    for _ in range(2):
        with pytest.raises(DarkmatterError, match=r"(?s)could not be built.*nowhere"):
            pages.build({}, home)
