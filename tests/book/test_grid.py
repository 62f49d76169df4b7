"""Many runs: what a grid expands to, what is refused at once, and what a second call does."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from darkmatter import __main__ as cli
from darkmatter import cache
from darkmatter.book import execution, keys, records, runner
from darkmatter.book.execution import Run
from darkmatter.book.grid import grid, local
from darkmatter.book.grid import runs as worker
from darkmatter.errors import DarkmatterError
from darkmatter.presets import preset
from tests.book.test_book import listen, wait_for
from tests.conftest import write_notebook

PARAMETERS = 'preset: str = "smoke"  # a preset\nn: int = 0  # which\nsae: str = ""  # an SAE'
TELL = """\
import json, os
from pathlib import Path
def tell(what):
    with Path({log!r}).open("a") as file:
        file.write(f"{{what}} {{n}}\\n")
"""


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def sweep(home: Path, tmp_path: Path) -> Path:
    write_notebook(home / "notebooks", "01_one", "1", parameters=PARAMETERS)
    write_notebook(home / "notebooks", "02_two", "2", parameters=PARAMETERS)
    return written(tmp_path, presets=["smoke"], notebooks=["01_one"])


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path


def runs_of(path: Path, home: Path) -> list[Run]:
    return grid.expand(grid.read(path), home)[0]


def table(home: Path) -> dict[int, str]:
    rows = json.loads((home / "_build/grids/sweep/runs.json").read_text())
    return {row["parameters"]["n"]: row["status"] for row in rows}


def test_every_combination_is_a_run_of_its_own(sweep: Path, home: Path, tmp_path: Path) -> None:
    written(tmp_path, presets=["smoke", "smollm2"], notebooks=["01_one", "02_two"], sae=["a", "b"],
            parameters={"n": [1, 2, 3]})
    runs = runs_of(sweep, home)
    assert len(runs) == len({run.folder for run in runs}) == 2 * 2 * 2 * 3
    planned = {(run.preset, run.notebook, run.parameters["sae"], run.parameters["n"])
               for run in runs}
    axes = (("smoke", "smollm2"), ("01_one", "02_two"), ("a", "b"), (1, 2, 3))
    assert planned == set(itertools.product(*axes))


def test_a_combination_named_twice_is_one_run(sweep: Path, home: Path, tmp_path: Path) -> None:
    written(tmp_path, presets=["smoke", "smoke"], notebooks="01_one", parameters={"n": [1, 1, 2]})
    assert len(runs_of(sweep, home)) == 2


def test_a_run_of_the_book_is_a_run_of_the_grid(sweep: Path, home: Path) -> None:
    runner.build("smoke", ["01_one"], {"n": 5}, home)
    written(sweep.parent, presets="smoke", notebooks="01_one", parameters={"n": 5})
    assert [run.status for run in runs_of(sweep, home)] == ["finished"]


def test_what_only_the_preset_has_makes_presets_that_say_so(
    sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(records, "check_layer", lambda chosen: asked.append(chosen.site))
    written(sweep.parent, presets="smoke", notebooks=["01_one", "02_two"], layer=[2, 3],
            sae=["train:64x4"], parameters={"contexts": [12]})
    runs, derived = grid.expand(grid.read(sweep), home)
    sites = ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
    assert sorted(asked) == sites
    assert [(each.name, each.site, each.contexts, each.saes) for each in derived.values()] == [
        (f"smoke-layer{layer}-contexts12", site, 12, preset.load("smoke").saes)
        for layer, site in zip((2, 3), sites, strict=True)]
    for file, each in derived.items():
        grid._write_preset(file, each)
        assert preset.load(file) == each
    for run in runs:
        assert run.parameters == {"preset": run.parameters["preset"], "sae": "train:64x4"}
        chosen = records.preset_of(run.parameters["preset"], run.parameters)
        assert keys.run_key(run.source, chosen, run.parameters) == run.key


def test_a_value_that_no_file_can_be_named_by_still_makes_a_preset(
    sweep: Path, home: Path, tmp_path: Path
) -> None:
    text = tmp_path / "my text, all of it.txt"
    text.write_text("words " * 100)
    written(tmp_path, presets="smoke", notebooks="01_one", parameters={"corpus": [str(text)]})
    assert re.fullmatch(r"smoke-[0-9a-f]{16}", runs_of(sweep, home)[0].preset)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"notebooks": ["01_one", "03_three"]}, "There is no notebook 03_three"),
        ({"presets": ["smoke", "smok"]}, "There is no preset 'smok'"),
        ({"parameters": {"colour": ["red"]}},
         "Unknown parameter 'colour'; 01_one takes: preset, n, sae"),
        ({"parameters": {"n": [1, "two"]}},
         "The parameter 'n' of 01_one is 'two', but should be of type int"),
        ({"parameters": {"n": [True]}},
         "The parameter 'n' of 01_one is True, but should be of type int"),
        ({"parameters": {"contexts": [1]}},
         "contexts is 1, but it should be greater than or equal to 2"),
        ({"layer": ["last"]}, "The layer is 'last'"),
        ({"layers": [1]}, "unknown field 'layers'; the fields are presets, notebooks, layer, sae, "
                          "parameters, slurm"),
        ({"parameters": ["n"]}, "'parameters' must consist of 'name: value' lines"),
        ({"notebooks": []}, "must name presets and notebooks"),
        ({"notebooks": ["90_all"]}, "90_all reads the records of other notebooks"),
    ],
)
def test_a_mistake_anywhere_is_told_before_anything_starts(
    fields: dict[str, Any], sentence: str, sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "run", lambda *_: pytest.fail("something started"))
    write_notebook(home / "notebooks", "90_all", "records.load_all()")
    written(sweep.parent, **{"presets": ["smoke"], "notebooks": ["01_one"]} | fields)
    with pytest.raises(DarkmatterError, match=re.escape(sentence)):
        grid.run(sweep, home=home)
    assert not (home / "_build").exists()


def test_a_layer_that_the_model_does_not_have_is_told(
    sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(chosen: preset.Preset) -> None:
        raise DarkmatterError(f"the model ends before {chosen.site}")

    monkeypatch.setattr(records, "check_layer", refuse)
    written(sweep.parent, presets="smoke", notebooks="01_one", layer=[99])
    with pytest.raises(DarkmatterError, match=r"the model ends before blocks\.99"):
        grid.run(sweep, home=home)


@pytest.mark.parametrize("text", ["presets: [smoke", "- a list", ""])
def test_a_file_that_is_no_grid_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(DarkmatterError, match=r"bad\.yaml"):
        grid.read(path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "did not start"),
        ({"running.ipynb": {"cells": [{"metadata": {"papermill": {"status": "pending"}}}]}},
         "did not start"),
        ({"running.ipynb": {"cells": [{"metadata": {"papermill": {"status": "running"}}}]}},
         "cut off"),
        ({"running.ipynb": None}, "cut off"),
        ({"failed.json": {"again": True}}, "did not start"),
        ({"failed.json": {"again": False}, "running.ipynb": None}, "failed"),
        ({"executed.ipynb": {}, "record.json": {}, "running.ipynb": None}, "cut off"),
        ({"done.json": {}}, "finished"),
    ],
)
def test_what_became_of_a_run_is_read_from_its_folder(
    files: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = Run("01_one", "smoke", {"preset": "smoke"}, "0" * 16, str(tmp_path))
    run.folder.mkdir(parents=True)
    for name, content in files.items():
        (run.folder / name).write_text('{"cells": [' if content is None else json.dumps(content))
    assert run.status == said


@pytest.mark.slow
def test_a_second_call_does_only_what_is_missing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three fails by its own error: it is not tried again at once, nor stops the others."""
    log, mend = tmp_path / "log", tmp_path / "mend"
    code = TELL.format(log=str(log)) + f"""\
tell("begin")
assert n != 2 or Path({str(mend)!r}).exists(), "a mistake"
Path(os.environ["DARKMATTER_RECORD"]).write_text(json.dumps(
    {{"preset": preset, "notebook": "01_one", "parameters": {{"n": n}}}}))
tell("end")"""
    write_notebook(home / "notebooks", "01_one", code, parameters=PARAMETERS)
    path = written(tmp_path, presets="smoke", notebooks="01_one", parameters={"n": [1, 2, 3]})
    with pytest.raises(DarkmatterError, match="1 of 3 runs are not finished"):
        grid.run(path, jobs=2, home=home)
    assert table(home) == {1: "finished", 2: "failed", 3: "finished"}
    assert "AssertionError: a mistake" in capsys.readouterr().out
    assert len(records.load_all(home / "_build/grids/sweep/records")) == 2
    mend.write_text("")
    grid.run(path, jobs=2, home=home)
    assert table(home) == {1: "kept", 2: "finished", 3: "kept"}
    assert "3 runs: 2 finished earlier, 1 to do" in capsys.readouterr().out
    counted = Counter(log.read_text().splitlines())
    assert counted == {"begin 1": 1, "end 1": 1, "begin 2": 2, "end 2": 1, "begin 3": 1, "end 3": 1}
    found = records.load_all(home / "_build/grids/sweep/records")
    assert sorted(each["parameters"]["n"] for each in found) == [1, 2, 3]
    assert all(each["wall_seconds"] > 0 for each in found)


@pytest.mark.parametrize(("bad", "said"), [(2, "finished"), (5, "did not start")])
def test_what_does_not_get_to_its_first_cell_is_started_again_twice(
    bad: int, said: str, sweep: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    code = "import sys; from pathlib import Path; Path(sys.argv[1]).write_text('{\"seconds\": 1}')"

    def command(run: Run) -> list[str]:
        with tries.open("a") as file:
            file.write("x")
        if len(tries.read_text()) <= bad:
            return [sys.executable, "-c", "raise SystemExit(1)"]
        run.folder.mkdir(parents=True)
        return [sys.executable, "-c", code, str(run.folder / "done.json")]

    monkeypatch.setattr(Run, "command", property(command))
    [run] = runs_of(sweep, home)
    local.run([run], None, lambda _: None)
    assert run.status == said
    assert tries.read_text() == "xxx"


def test_runs_share_the_gpus_one_each(
    sweep: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs, six runs: never two at once on one, and both are used."""
    log = tmp_path / "log"
    code = f"""\
import os, time
log = open({str(log)!r}, "a", buffering=1)
log.write("begin " + os.environ["CUDA_VISIBLE_DEVICES"] + "\\n"); time.sleep(0.3)
log.write("end " + os.environ["CUDA_VISIBLE_DEVICES"] + "\\n")"""
    written(tmp_path, presets="smoke", notebooks="01_one", parameters={"n": list(range(6))})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    monkeypatch.setattr(Run, "command", property(lambda run: [sys.executable, "-c", code]))
    monkeypatch.setattr(execution, "TRIES", 1)
    local.run(runs_of(sweep, home), None, lambda _: None)
    busy: set[str] = set()
    together = 0
    for line in log.read_text().splitlines():
        what, gpu = line.split()
        assert (gpu in busy) == (what == "end")
        busy ^= {gpu}
        together = max(together, len(busy))
    assert together == 2


def test_interrupted_it_stops_what_runs_and_starts_no_more(home: Path, tmp_path: Path) -> None:
    """Nor does it try again what has not come to its first cell: it has just been stopped."""
    sleep = f"""\
import os, time
with open({str(tmp_path / "pids")!r}, "a") as file: file.write(f"{{os.getpid()}}\\n")
time.sleep(600)"""
    call = f"""\
import sys
from darkmatter.book.execution import Run
from darkmatter.book.grid import local
Run.command = property(lambda run: [sys.executable, "-c", {sleep!r}])
runs = [Run("01_one", "smoke", {{"n": n}}, str(n), {str(home)!r}) for n in range(3)]
local.run(runs, 1, print)"""
    process = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL,
                               preexec_fn=listen)  # noqa: PLW1509
    wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    [pid] = (tmp_path / "pids").read_text().split()
    wait_for(lambda: not psutil.pid_exists(int(pid)), patience=60)


@pytest.mark.slow
def test_two_calls_at_once_do_each_run_once(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = TELL.format(log=str(log)) + "import time\ntell('begin')\ntime.sleep(1)\ntell('end')"
    write_notebook(home / "notebooks", "01_one", code, parameters=PARAMETERS)
    path = written(tmp_path, presets="smoke", notebooks="01_one", parameters={"n": [1, 2]})
    call = f"""\
from pathlib import Path
from darkmatter.book.grid import grid
grid.run(Path({str(path)!r}), home=Path({str(home)!r}))"""
    words = [sys.executable, "-c", call]
    both = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    assert Counter(log.read_text().splitlines()) == {
        "begin 1": 1, "end 1": 1, "begin 2": 1, "end 2": 1}


def test_a_run_whose_code_changed_in_the_queue_is_not_filed_under_the_old_code(
    sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_log_to", lambda _: None)
    [run] = runs_of(sweep, home)
    write_notebook(home / "notebooks", "01_one", "2", parameters=PARAMETERS)
    assert worker.work(run) == 2
    assert run.status == "failed"
    assert "changed after the grid was started" in run.outcome["why"]


def test_a_finished_run_is_not_run_again_by_a_job_that_comes_late(
    sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_log_to", lambda _: None)
    monkeypatch.setattr(execution, "execute", lambda *_: pytest.fail("it ran again"))
    [run] = runs_of(sweep, home)
    cache.write_json(run.folder / "done.json", {"seconds": 1})
    write_notebook(home / "notebooks", "01_one", "2", parameters=PARAMETERS)
    assert worker.work(run) == 0


def test_the_command_line_passes_on_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(grid, "run", lambda *words: asked.extend(words))
    assert cli.main(["run", "grid.yaml", "--backend", "slurm", "--jobs", "3"]) == 0
    assert asked == [Path("grid.yaml"), "slurm", 3]


def test_a_grid_needs_at_least_one_run_at_a_time(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(sweep), "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err


def test_without_slurm_its_backend_says_so(
    sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DarkmatterError, match="Slurm was not found"):
        grid.run(sweep, "slurm", home=home)
    assert not (home / "_build").exists()

