"""The results that a later run is compared with: ``artifacts/reference/PRESET/NOTEBOOK.json``.

A row agrees when it lies within the tolerance of the reference's: half the width of its 95% interval, because a
difference smaller than that changes no statement of the book; 2% of the value where there is no interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from IPython.display import Markdown

from . import cache, figures, records
from .errors import DarkmatterError

FOLDER = records.HOME / "artifacts" / "reference"
SHARE = 0.02  # of a value without an interval
KEY = ["notebook", "name", "sae", "protocol"]
INTERVAL, NO_INTERVAL = "half the width of its 95% interval", f"{SHARE:.0%} of the value: it has no interval"


def load(preset: str) -> list[dict[str, Any]]:
    """The reference's records of a preset, in the order of their notebooks; none where it has no reference."""
    return [json.loads(path.read_text()) for path in sorted((FOLDER / preset).glob("*.json"))]


def keep(found: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Make these records the reference of their presets."""
    paths = [FOLDER / record["preset"] / f"{record['notebook']}.json" for record in found]
    for path, record in zip(paths, found, strict=True):
        with cache.atomic(path) as temporary:
            temporary.write_text(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
    return paths


def compare(found: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for every metric that both have: value, reference, low, high, tolerance, why, verdict.

    ``low`` and ``high`` are the reference's interval; ``verdict`` is 'agree' or 'differ'. Timings are left out.
    """
    both = _rows(found).merge(_rows(known), on=KEY, suffixes=("", "_reference"))
    low, high = both.low_reference.astype(float), both.high_reference.astype(float)
    measured, reference = both.value.astype(float), both.value_reference.astype(float)
    half, has = (high - low) / 2, (high - low) > 0
    tolerance = half.where(has, SHARE * reference.abs())
    close = (measured - reference).abs() <= tolerance
    return both[KEY].assign(
        value=measured, reference=reference, low=low, high=high, tolerance=tolerance,
        why=has.map({True: INTERVAL, False: NO_INTERVAL}), verdict=close.map({True: "agree", False: "differ"}))


def check(preset: str) -> pd.DataFrame:
    """``compare`` for the last run of a preset; raises DarkmatterError without a run, or without a reference."""
    known, found = load(preset), [each for each in records.load_all() if each["preset"] == preset]
    if not known:
        others = ", ".join(sorted(path.name for path in FOLDER.glob("*")))
        only = f", only for {others}" if others else ""
        raise DarkmatterError(f"There is no reference for the preset '{preset}'{only}; "
                              f"'python -m darkmatter check --preset {preset} --keep' makes the last run one.")
    if not found:
        raise DarkmatterError(f"No chapter has run on the preset '{preset}' here; run 'make book PRESET={preset}' "
                              "first.")
    return compare(found, known)


def beside(record: Mapping[str, Any]) -> list[Markdown | go.Figure]:
    """A chapter's numbers beside the reference's, to display: a sentence, and a figure with a point for each."""
    known = [each for each in load(record["preset"]) if each["notebook"] == record["notebook"]]
    if not known:
        return [figures.prose(f"There is no reference for the preset `{record['preset']}` to compare this run with.")]
    rows, other = compare([record], known), differences(record, known[0])
    out = rows[rows.verdict == "differ"]
    lines = [f"Of {len(rows)} numbers of this chapter {len(rows) - len(out)} agree with the reference run to within "
             f"the tolerance (half the width of the reference's 95% interval, or {SHARE:.0%} where there is none)."]
    named = "; ".join(_named(row) for row in out.head(5).T.to_dict().values())
    lines += [f"Outside it: {named}{'; and others' if len(out) > 5 else ''}."] if named else []
    lines += [f"The settings are not the reference's ({'; '.join(other)})."] if other else []
    return [figures.prose(" ".join(lines)), _figure(rows, record["notebook"])]


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, {figures.number(row['value'])} (reference {figures.number(row['reference'])})"


def _figure(rows: pd.DataFrame, notebook: str) -> go.Figure:
    """Each number's distance from the reference's, in tolerances."""
    fig = go.Figure()
    fig.add_vrect(-1, 1, fillcolor=figures.colour("grey", 0.2), line_width=0)
    off = ((rows.value - rows.reference) / rows.tolerance.where(rows.tolerance > 0, 1)).clip(-4, 4)
    for said, shade in (("agree", "blue"), ("differ", "orange")):
        some = rows.verdict == said
        fig.add_scatter(x=off[some], y=rows.index[some], mode="markers", name=said, marker_color=figures.colour(shade),
                        text=rows[some].apply(lambda row: f"{row['name']} {row['sae']}", axis=1), hoverinfo="text")
    fig.update_xaxes(title_text="this run − reference, in tolerances", range=[-4.3, 4.3])
    fig.update_yaxes(visible=False)
    return figures.finish(
        fig, f"fig-reference-{notebook[:2]}", f"The {len(rows)} numbers of this chapter beside the reference run's: a "
        "point a number, one above the other. Grey: within the tolerance. Distances beyond 4 are drawn at 4.",
        "Points in a row for each number, most of them inside a grey band around zero.", height=240)


def differences(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Settings and parameters that two records of one chapter do not share, as 'name: here, there'."""
    pairs = [(name, found["settings"].get(name), value) for name, value in known["settings"].items()]
    pairs += [(name, found["parameters"].get(name), value) for name, value in known["parameters"].items()]
    return list(dict.fromkeys(f"{name}: {here}, not {there}" for name, here, there in pairs if here != there))


def _rows(found: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The metrics of some records that do not depend on the machine and have a value, one row each."""
    rows = [{"notebook": record["notebook"], **row} for record in found for row in record["metrics"]
            if row["value"] is not None and not row.get("timing")]
    table = pd.DataFrame(rows, columns=[*KEY, "value", "low", "high"])
    return table.drop_duplicates(KEY, keep=False)  # a name used twice names neither
