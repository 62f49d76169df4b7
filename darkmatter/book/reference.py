"""The results that a later run is compared with: ``artifacts/reference/PRESET/NOTEBOOK.json``.

A row agrees when it lies within the tolerance of the reference's: half the width of its 95%
interval, because a difference smaller than that changes no statement of the book; 2% of the value
where there is no interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from IPython.display import Markdown

from .. import cache
from ..errors import DarkmatterError
from . import figures, records

FOLDER = records.HOME / "artifacts" / "reference"
SHARE = 0.02  # of a value without an interval
KEY = ["notebook", "name", "sae", "protocol"]
INTERVAL = "half the width of its 95% interval"
NO_INTERVAL = f"{SHARE:.0%} of the value: it has no interval"


def load(preset: str) -> list[dict[str, Any]]:
    """The reference's records of a preset, by notebook; none where it has no reference."""
    return [json.loads(path.read_text()) for path in sorted((FOLDER / preset).glob("*.json"))]


def keep(runs: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Make these records the reference of their presets."""
    paths = [FOLDER / record["preset"] / f"{record['notebook']}.json" for record in runs]
    for path, record in zip(paths, runs, strict=True):
        with cache.atomic(path) as temporary:
            text = json.dumps(record, separators=(",", ":"), allow_nan=False)
            temporary.write_text(text + "\n")
    return paths


def compare(runs: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for every metric that both have: value, reference, low, high, tolerance, why, verdict.

    ``low`` and ``high`` are the reference's interval; ``verdict`` is 'agree' or 'differ'. Timings
    are left out.
    """
    both = _rows(runs).merge(_rows(known), on=KEY, suffixes=("", "_reference"))
    low, high = both.low_reference.astype(float), both.high_reference.astype(float)
    measured, reference = both.value.astype(float), both.value_reference.astype(float)
    interval = high > low
    tolerance = ((high - low) / 2).where(interval, SHARE * reference.abs())
    close = (measured - reference).abs() <= tolerance
    return both[KEY].assign(
        value=measured, reference=reference, low=low, high=high, tolerance=tolerance,
        why=interval.map({True: INTERVAL, False: NO_INTERVAL}),
        verdict=close.map({True: "agree", False: "differ"}))


def last(preset: str) -> list[dict[str, Any]]:
    """The records of the last run of a preset here."""
    return [record for record in records.load_all() if record["preset"] == preset]


def check(preset: str) -> pd.DataFrame:
    """``compare`` for the last run of a preset; DarkmatterError without one, or a reference."""
    known, runs = load(preset), last(preset)
    if not known:
        others = ", ".join(sorted(path.name for path in FOLDER.glob("*")))
        only = f", only for {others}" if others else ""
        raise DarkmatterError(f"There is no reference for the preset '{preset}'{only}; 'python -m "
                              f"darkmatter check --preset {preset} --keep' makes the last run one.")
    if not runs:
        raise DarkmatterError(f"No chapter has run on the preset '{preset}' here; run "
                              f"'make book PRESET={preset}' first.")
    return compare(runs, known)


def beside(record: Mapping[str, Any]) -> list[Markdown | go.Figure]:
    """A chapter's numbers beside the reference's, to display: a sentence, and a point for each."""
    preset, notebook = record["preset"], record["notebook"]
    known = [reference for reference in load(preset) if reference["notebook"] == notebook]
    if not known:
        return [figures.prose(f"There is no reference for the preset `{preset}` to compare this "
                              "run with.")]
    rows, other = compare([record], known), differences(record, known[0])
    out = rows.query("verdict == 'differ'")
    sentences = [f"Of {len(rows)} numbers of this chapter {len(rows) - len(out)} agree with the "
                 "reference run to within the tolerance (half the width of the reference's 95% "
                 f"interval, or {SHARE:.0%} where there is none)."]
    named = [f"{name}, {figures.number(value)} (reference {figures.number(reference)})"
             for name, value, reference in out[["name", "value", "reference"]].head(5).itertuples(
                 index=False)]
    if named:
        more = "; and others" if len(out) > 5 else ""
        sentences.append(f"Outside it: {'; '.join(named)}{more}.")
    if other:
        sentences.append(f"The settings are not the reference's ({'; '.join(other)}).")
    return [figures.prose(" ".join(sentences)), _figure(rows, notebook)]


def _figure(rows: pd.DataFrame, notebook: str) -> go.Figure:
    """Each number's distance from the reference's, in tolerances."""
    fig = go.Figure()
    fig.add_vrect(-1, 1, fillcolor=figures.colour("grey", 0.2), line_width=0)
    off = (rows.value - rows.reference) / rows.tolerance.where(rows.tolerance > 0, 1)
    for verdict, shade in (("agree", "blue"), ("differ", "orange")):
        part = rows.verdict == verdict
        fig.add_scatter(x=off[part].clip(-4, 4), y=rows.index[part], mode="markers", name=verdict,
                        marker_color=figures.colour(shade), hoverinfo="text",
                        text=rows[part].apply(lambda row: f"{row['name']} {row['sae']}", axis=1))
    fig.update_xaxes(title_text="this run − reference, in tolerances", range=[-4.3, 4.3])
    fig.update_yaxes(visible=False)
    return figures.finish(
        fig, f"fig-reference-{notebook.split('_', maxsplit=1)[0]}",
        f"The {len(rows)} numbers of this chapter beside the reference run's: a point a number, "
        "one above the other. Grey: within the tolerance. Distances beyond 4 are drawn at 4.",
        "Points in a row for each number, most of them inside a grey band around zero.", height=240)


def differences(run: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Settings and parameters that two records of one chapter do not share: 'name: here, there'."""
    pairs = [(name, run[part].get(name), value)
             for part in ("settings", "parameters") for name, value in known[part].items()]
    return list(dict.fromkeys(f"{name}: {here}, not {there}"
                              for name, here, there in pairs if here != there))


def _rows(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The metrics of records that do not depend on the machine and have a value, one row each."""
    rows = [{"notebook": record["notebook"], **row} for record in runs for row in record["metrics"]
            if row["value"] is not None and not row.get("timing")]
    table = pd.DataFrame(rows, columns=[*KEY, "value", "low", "high"])
    return table.drop_duplicates(KEY, keep=False)  # a name used twice names neither
