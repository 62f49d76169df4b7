"""The reference: a run agrees with itself, and differs where a number moved by its tolerance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from IPython.display import Markdown

from darkmatter import __main__ as cli
from darkmatter.book import records, reference
from darkmatter.errors import DarkmatterError


def row(name: str, value: float | None, low: float | None = None, high: float | None = None,
        **more: Any) -> dict[str, Any]:
    return {"name": name, "sae": "a", "value": value, "low": low, "high": high,
            "protocol": "strict"} | more


def record(*metrics: dict[str, Any], notebook: str = "02_norm", **more: Any) -> dict[str, Any]:
    return {"notebook": notebook, "preset": "toy", "parameters": {"preset": "toy", "sae": ""},
            "settings": {"site": "blocks.1", "contexts": 4}, "metrics": list(metrics),
            "claims": []} | more


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    monkeypatch.setenv("DARKMATTER_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def verdicts(found: dict[str, Any], known: dict[str, Any]) -> dict[str, str]:
    rows = reference.compare([found], [known])
    return dict(zip(rows["name"], rows["verdict"], strict=True))


KNOWN = record(row("r2", 0.5, 0.4, 0.6), row("share", 10.0), row("zero", 0.0))


def test_a_run_agrees_with_itself() -> None:
    assert verdicts(KNOWN, KNOWN) == {"r2": "agree", "share": "agree", "zero": "agree"}


@pytest.mark.parametrize(("value", "said"), [
    (0.599, "agree"), (0.401, "agree"), (0.601, "differ"), (0.39, "differ")])
def test_the_tolerance_is_half_the_interval(value: float, said: str) -> None:
    assert verdicts(record(row("r2", value, 0.0, 1.0)), KNOWN) == {"r2": said}


@pytest.mark.parametrize(("value", "said"), [
    (10.19, "agree"), (9.81, "agree"), (10.21, "differ")])
def test_without_an_interval_it_is_a_share_of_the_value(value: float, said: str) -> None:
    assert verdicts(record(row("share", value)), KNOWN) == {"share": said}


def test_timings_missing_values_and_names_used_twice_are_not_compared() -> None:
    also = [row("none", None), row("twice", 1.0), row("twice", 2.0)]
    found = record(row("seconds", 3.0, timing=True), row("r2", 0.5), *also)
    known = record(row("seconds", 9.0, timing=True), *KNOWN["metrics"], *also)
    assert verdicts(found, known) == {"r2": "agree"}


def test_rows_of_another_sae_protocol_or_chapter_are_not_the_same() -> None:
    for other in (record(row("r2", 0.9, sae="b")), record(row("r2", 0.9, protocol="paper")),
                  record(row("r2", 0.9), notebook="03_vector")):
        assert verdicts(other, KNOWN) == {}


def test_what_differs_in_the_settings_is_named() -> None:
    other = record(settings={"site": "blocks.2", "contexts": 4},
                   parameters={"preset": "toy", "sae": ""})
    assert reference.differences(other, KNOWN) == ["site: blocks.2, not blocks.1"]
    assert reference.differences(KNOWN, KNOWN) == []


def test_kept_records_are_read_back() -> None:
    reference.keep([KNOWN, record(row("x", 1.0), notebook="01_data")])
    assert [each["notebook"] for each in reference.load("toy")] == ["01_data", "02_norm"]
    assert reference.load("toy")[1] == KNOWN
    assert reference.load("another") == []


def test_check_of_a_last_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DarkmatterError, match=r"There is no reference for the preset 'toy'"):
        reference.check("toy")
    reference.keep([KNOWN])
    sentence = "No chapter has run on the preset 'toy' here; run 'make book"
    with pytest.raises(DarkmatterError, match=sentence):
        reference.check("toy")
    folder.mkdir(parents=True)
    run = record(row("r2", 0.55, 0.5, 0.6), row("share", 12.0))
    (folder / "02_norm.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit) as left:
        cli.main(["check", "--preset", "toy"])
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 1
    assert [line.split()[0] for line in lines[:-1]] == ["agree", "differ"]
    assert lines[-1].startswith("1 of 2 agree")
    assert cli.main(["check", "--preset", "toy", "--keep"]) == 0
    assert cli.main(["check", "--preset", "toy"]) == 0


def test_beside_says_what_is_outside() -> None:
    assert "no reference for the preset `toy`" in words(reference.beside(KNOWN)[0])
    reference.keep([KNOWN])
    shown: list[Any] = reference.beside(record(row("r2", 0.9, 0.8, 1.0), row("share", 10.1),
                                               settings={"site": "blocks.2", "contexts": 4}))
    told, drawn = shown
    assert "Of 2 numbers of this chapter 1 agree" in words(told)
    assert "Outside it: r2, 0.900 (reference 0.500)." in words(told)
    assert "site: blocks.2, not blocks.1" in words(told)
    assert isinstance(drawn, go.Figure)
    traces: Any = drawn.data
    points = {trace.name: list(trace.x) for trace in traces}
    assert points["differ"] == [pytest.approx(4.0)] and points["agree"] == [pytest.approx(0.5)]


def words(shown: object) -> str:
    assert isinstance(shown, Markdown)
    return str(shown.data)


def test_the_committed_reference_is_small_and_whole() -> None:
    folder = records.HOME / "artifacts" / "reference"
    files = sorted(folder.rglob("*.json"))
    assert sum(path.stat().st_size for path in files) < 5_000_000
    for path in files:
        known = json.loads(path.read_text())
        assert known["commit"] and known["versions"] and known["hardware"] and known["data_hashes"]
        assert (path.parent.name, path.stem) == (known["preset"], known["notebook"])
