"""How an SAE's error changes with its training: the survey of its checkpoints (what the paper did not look at).

An SAE that has been trained too little has an error that looks linear, so R² must be read with its training in mind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import cache, saes, survey, training
from .errors import DarkmatterError
from .preset import Preset

SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the training tokens; the finished SAE is surveyed anyway
METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm", "dead_share")
RECORDS = saes.ARTIFACTS / "convergence.json"


def measure(preset: Preset, grid: Sequence[tuple[int, int]] | None = None) -> pd.DataFrame:
    """One row for each SAE of the grid and share of its training: preset, sae, width, k, seed, share, tokens, distinct
    tokens, and each of METRICS.

    With NAME_low and NAME_high, its 95% interval, and NAME_n, the tokens it was scored on. SAEs with other seeds are
    measured with the whole grid, at their end. Surveys what was not surveyed yet. Raises DarkmatterError for an SAE
    that was not trained on this machine.
    """
    rows = []
    for one, width, k in [(preset, *pair) for pair in grid] if grid else training.ladder(preset):
        recipe, name = one.training, training.name(one, width, k)
        shipped = next((ref for ref in preset.saes if saes.artifact_name(ref) == name), None)
        end = finished(one, shipped or f"train:{width}x{k}")
        shares = SHARES if recipe.seed == preset.training.seed else ()
        refs = {share: str(training.early(one, width, k, share)) for share in shares} | {1.0: end}
        result = survey.run(preset, list(refs.values()))
        for share, ref in refs.items():
            rows.append({"preset": preset.name, "sae": shipped.removeprefix("artifact:") if shipped else name,
                         "width": width, "k": k, "seed": recipe.seed, "share": share,
                         "tokens": round(share * recipe.tokens), "distinct": recipe.distinct_tokens,
                         **metrics(result.rows.loc[result.rows.sae == result.names[ref]])})
    return pd.DataFrame(rows)


def collect(preset: Preset) -> Path:
    """Write ``measure`` of the preset's whole grid to artifacts/convergence.json, beside other presets' rows."""
    others = [row for row in _known() if row["preset"] != preset.name]
    cache.write_json(RECORDS, {"rows": others + measure(preset).to_dict("records")}, indent=1)
    return RECORDS


def _known() -> list[dict[str, Any]]:
    return json.loads(RECORDS.read_text())["rows"] if RECORDS.exists() else []


def recorded(preset: Preset) -> pd.DataFrame:
    """``measure``: from the committed file for the preset that it was made of; else of the SAEs trained here."""
    if all(ref.startswith("artifact:") for ref in preset.saes):
        names = {ref.removeprefix("artifact:") for ref in preset.saes}
        return pd.DataFrame([row for row in _known() if row["sae"] in names])
    sizes = [tuple(map(int, ref.removeprefix("train:").split("x"))) for ref in preset.saes if ref.startswith("train:")]
    if not sizes:
        raise DarkmatterError(f"The SAEs of the preset '{preset.name}' come without their checkpoints, so there is no "
                              "training to look back on.")
    return measure(preset, [(width, k) for width, k in sizes])


def suites(rows: pd.DataFrame) -> pd.DataFrame:
    """The SAEs of ``recorded``'s rows at their end, and those on record of other suites, or with other seeds, of the
    same model, site, width and L0. Empty where no other suite has any."""
    own = rows.loc[rows.share == 1].to_dict("records") if len(rows) else []
    names = _names(own)
    known = [row for row in _known() if row["share"] == 1
             and Path(row["sae"]).name.removesuffix(f"-s{row['seed']}") in names]
    found = {(row["preset"], row["sae"]): row for row in known + own}
    return pd.DataFrame(list(found.values()) if len({suite for suite, _ in found}) > 1 else [])


def widest(rows: pd.DataFrame) -> pd.DataFrame:
    """All rows, of the first seed, of the suite on record with most sizes among those with SAEs of the names in
    ``recorded``'s rows. Empty where none has more sizes than these rows."""
    own, by_suite = _names(rows.to_dict("records")), {}
    for row in _known():
        if row["seed"] == 0:
            by_suite.setdefault(row["preset"], []).append(row)
    alike = [suite for suite in by_suite.values() if own & _names(suite)]
    most = max(alike, key=lambda suite: len(_names(suite)), default=[])
    return pd.DataFrame(most if len(_names(most)) > len(own) else [])


def _names(rows: Sequence[dict[Any, Any]]) -> set[str]:
    """The names that the SAEs of these rows were trained under."""
    return {Path(row["sae"]).name for row in rows}


def finished(preset: Preset, ref: str) -> str:
    """The SAE for a preset with other fields: the directory of one that this preset trains, any other as it is."""
    if not ref.startswith("train:"):
        return ref
    width, k = map(int, ref.removeprefix("train:").split("x"))
    (folder,) = training.run(preset, only=(width, k)).values()
    return str(folder)


def metrics(rows: pd.DataFrame, names: Sequence[str] = METRICS) -> dict[str, Any]:
    """Of the rows of one SAE's survey: each metric's value, NAME_low, NAME_high and NAME_n, as one row of a table."""
    found = {}
    for row in rows.to_dict("records"):
        if (name := str(row["metric"])) in names:
            found |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"],
                      f"{name}_n": row["n_eval"]}
    return found
