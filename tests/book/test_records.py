"""Records, and what papermill sees of a first cell that is given nonsense."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from darkmatter import presets
from darkmatter.book import pairs, records
from darkmatter.errors import DarkmatterError
from darkmatter.regression import Draws
from tests.conftest import write_notebook

START = """\
from darkmatter.book import records

run = records.start("01_one", preset, contexts=contexts, sae=sae)
run.add("twice", 2.0 * run.preset.contexts, n=3)
run.finish()"""
PARAMETERS = """\
preset: str = "smoke"  # a preset's name or YAML file
contexts: int = -1  # contexts; -1: the preset's own
sae: str = ""  # one SAE; empty: the preset's own"""


def test_a_record_holds_rows_settings_and_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKMATTER_RECORD", str(tmp_path / "deep" / "record.json"))
    run = records.start("01_one", "smoke", contexts=30, colour="red")
    run.add("fvu", math.nan, low=np.float64(0.5), high=None, n=7)
    run.add_rows(pd.DataFrame([{
        "sae": "a", "metric": "l0", "protocol": "paper", "value": 32.0, "low": np.nan, "high": 33.0,
        "n_eval": 10, "unit": "latents"}]))
    record = run.finish()
    assert record == json.loads((tmp_path / "deep" / "record.json").read_text())
    first, second = record["metrics"]
    assert (first["value"], first["low"], first["n"]) == (None, 0.5, 7)
    assert first["protocol"] == "strict"
    assert second == {"name": "l0", "sae": "a", "value": 32.0, "low": None, "high": 33.0, "n": 10,
                      "unit": "latents", "protocol": "paper"}
    assert record["parameters"] == {"preset": "smoke", "contexts": 30, "colour": "red"}
    assert record["settings"]["contexts"] == 30
    assert record["versions"]["torch"].startswith("2.")
    assert record["hardware"]["cores"] >= 1
    assert set(record) >= {"commit", "dirty", "device", "data_hashes", "started", "seconds",
                           "peak_memory_gib"}


def test_draws_bring_value_interval_and_tokens() -> None:
    draws = Draws(np.array([0.5, 0.4, 0.6]), 30.0, 7, 30)
    full = records.Record("x", presets.load("smollm2"), {})
    full.add_draws("fvu", draws, sae="a")
    assert full.metrics[0] == {"name": "fvu", "sae": "a", **draws.row, "unit": "tokens",
                               "protocol": "strict"}
    assert draws.row["n"] == 7
    assert full.claim("a claim", "FVU", draws, (-math.inf, math.inf)) == "agree"
    assert full.claims[0]["found"] == (draws.value, draws.low, draws.high)
    assert full.claims[0]["n"] == 7


def test_input_hashes_follow_the_files(tmp_path: Path) -> None:
    text, sae = tmp_path / "text.txt", tmp_path / "sae"
    text.write_text("one")
    sae.mkdir()
    (sae / "cfg.json").write_text("{}")
    (sae / "weights").write_text("w")
    chosen = records.presets.load("smoke", corpus=str(text), sae=str(sae))
    first = records.inputs(chosen)
    assert {str(text), str(sae)} <= set(first)
    (sae / "weights").write_text("v")
    changed = {name for name, digest in records.inputs(chosen).items() if digest != first[name]}
    assert changed == {str(sae)}


def test_load_all_reads_the_records_of_this_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("02_b", "01_a"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"notebook": name, "preset": "smoke"}))
    monkeypatch.setenv("DARKMATTER_RECORDS", str(tmp_path))
    assert [each["notebook"] for each in records.load_all()] == ["01_a", "02_b"]
    assert records.load_all(tmp_path / "nowhere") == []


@pytest.mark.parametrize("override", [{"layer": 99}, {"site": "blocks.30.hook_resid_post"}])
def test_a_layer_outside_the_model_stops_at_once(override: dict[str, object]) -> None:
    with pytest.raises(DarkmatterError, match=r"layers 0 to 29"):
        records.start("01_one", "smoke", **override)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papermill")
    pairs.sync(write_notebook(folder, "01_one", START, parameters=PARAMETERS).parent)
    return folder / "01_one.ipynb"


def papermill(notebook: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), "out.ipynb",
               *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=notebook.parent, check=False)


@pytest.mark.slow
def test_papermill_runs_with_parameters_of_its_own(notebook: Path) -> None:
    done = papermill(notebook, "-p", "contexts", "30")
    assert done.returncode == 0, done.stderr
    assert "'value': 60.0" in (notebook.parent / "out.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("-p", "contxts", "30"),
         "Unknown parameter 'contxts'; this notebook takes preset, contexts, sae."),
        (("-p", "preset", "smolm2"), "There is no preset 'smolm2' (did you mean 'smollm2'?)"),
    ],
)
def test_papermill_is_told_of_a_mistake_in_one_sentence(
    notebook: Path, words: tuple[str, ...], sentence: str
) -> None:
    done = papermill(notebook, *words)
    assert done.returncode != 0
    shown = done.stderr.split("Exception encountered at")[1]
    assert f"DarkmatterError: {sentence}" in shown
    assert "Traceback" not in shown


def test_papermill_explains_every_parameter(notebook: Path) -> None:
    shown = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", str(notebook)],
                           capture_output=True, text=True, check=True).stdout
    assert "contexts: int (default -1)" in shown
    assert "one SAE; empty: the preset's own" in shown


class Shell:
    """What a kernel's history looks like after some cells."""

    def __init__(self, *cells: str) -> None:
        self.user_ns = {"In": ["", *cells]}

    def set_custom_exc(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "cells",
    [
        ("preset = 'smoke'", "other = 1"),  # editing by hand
        ("preset: str = 'smoke'\nn = 1", "# Parameters\nn = 2\n"),  # papermill
        ("# Parameters\nn = 2\n",),  # an executed notebook, opened and run from its second cell
        ("%matplotlib inline", "preset = 'smoke'", "# Parameters\npreset = 'smoke'\n", "x = 1",
         "# Parameters\ny = 1\n"),
        ("preset: str = 'smoke'", "# Parameters\npreset = 'two\\nlines = 1'\n"),
    ],
)
def test_editing_by_hand_is_not_taken_for_a_mistake(
    cells: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "get_ipython", lambda: Shell(*cells))
    records.start("01_one", "smoke")


def test_an_unknown_injected_name_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell("preset = 'smoke'\nif preset == 'layr': pass", "# Parameters\nlayr = 2\n")
    monkeypatch.setattr(records, "get_ipython", lambda: shell)
    with pytest.raises(DarkmatterError, match="'layr'"):
        records.start("01_one", "smoke")


CELL = """preset: str = "smoke"  # a preset
loss_contexts: int = 40  # contexts to measure on
loss_positions: int = -1  # tokens of each; 0: all; -1: a quarter
server: str = ""  # an address"""


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("loss_contexts", 0, "is 0, but should be a whole number of at least 1, or 40"),
    ("loss_contexts", 4.5, r"is 4\.5, but should be a whole number of at least 1"),
    ("loss_contexts", "many", "is 'many', but should be a whole number of at least 1"),
    ("loss_contexts", True, "is True, but should be a whole number"),
    ("loss_positions", -2, "is -2, but should be a whole number of at least 0, or -1"),
    ("server", 80, "is 80, but should be a text"),
])
def test_a_chapters_own_parameters_are_checked(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, sentence: str
) -> None:
    monkeypatch.setattr(records, "get_ipython", lambda: Shell(CELL))
    with pytest.raises(DarkmatterError, match=f"The parameter '{name}' {sentence}"):
        records.start("01_one", "smoke", **{name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("loss_contexts", 40), ("loss_contexts", 7), ("loss_positions", 0), ("loss_positions", -1),
    ("loss_positions", None), ("server", "http://127.0.0.1")])
def test_a_chapters_own_parameters_that_fit(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(records, "get_ipython", lambda: Shell(CELL))
    assert records.start("01_one", "smoke", **{name: value}).parameters[name] == value


def test_a_parameters_cell_that_was_edited_and_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    edited = CELL.replace("= 40", "= -1")
    monkeypatch.setattr(records, "get_ipython", lambda: Shell(CELL, edited))
    assert records.start("01_one", "smoke", loss_contexts=-1).parameters["loss_contexts"] == -1


@pytest.mark.parametrize(("low", "high", "said"), [
    (0.2, 0.4, "agree"), (0.0, 1.0, "agree"), (0.9, 1.1, "cannot say"), (-0.1, 1.1, "cannot say"),
    (1.1, 1.2, "differ"), (-0.2, -0.1, "differ"), (None, None, "cannot say"),
    (float("nan"), 0.5, "cannot say"),
])
def test_the_rule_of_the_verdicts(low: float | None, high: float | None, said: str) -> None:
    assert records.verdict(low, high, 0, 1) == said


def test_smoke_never_says_more_than_cannot_say() -> None:
    smoke, full = (records.Record("x", presets.load(name), {}) for name in ("smoke", "smollm2"))
    told = [run.claim("a claim", "a number", (0.5, 0.4, 0.6), (0, 1), 10) for run in (smoke, full)]
    assert told == ["cannot say", "agree"]
    assert full.claim("a claim", "a number", (0.5, 0.4, 0.6), None) == "cannot say"
    assert [claim["verdict"] for claim in full.finish()["claims"]] == ["agree", "cannot say"]


def test_claims_of_several_records_as_one_table() -> None:
    runs = [records.Record(name, presets.load("smollm2"), {}) for name in ("02_b", "03_c")]
    runs[0].claim("one", "a", (0.5, 0.4, 0.6), (0.45, math.inf), 10, paper="half")
    runs[1].claim("two", "b", (None, None, None), None)
    found = records.claims([json.loads(json.dumps(run.finish())) for run in runs])
    assert found[["notebook", "text", "paper", "verdict"]].to_numpy().tolist() == [
        ["02_b", "one", "half", "cannot say"], ["03_c", "two", "–", "cannot say"]]
    assert (found.least[0], found.low[0]) == (0.45, 0.4)
    assert found[["most", "value"]].isna().to_numpy().tolist() == [[True, False], [True, True]]
    assert records.claims([]).empty
