"""The survey again, with one thing changed: how long an SAE was trained, or a choice of the book.

*Convergence* surveys the checkpoints of SAEs. One that was trained too little has an error that
looks linear, so R² must be read with its training in mind (the paper did not look at this).

*Sensitivity* surveys one SAE under other choices. An interval over sources says what other text
of the same kind would change. It does not say what another number of contexts, other positions,
a beginning-of-text token, another seed or another precision would.

Both take hours, so their results are records: files in artifacts/ that the chapters read back.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import cache, survey
from ..errors import DarkmatterError
from ..models import model
from ..regression import PROTOCOLS, STRICT
from ..saes import artifacts, references, training

if TYPE_CHECKING:
    from ..presets import Preset

SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the training tokens; the finished SAE is surveyed anyway
TRAINED = ("fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm", "dead_share")
CHOSEN = ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm", "norm_test_linear",
          "norm_test_nonlinear")
CONVERGENCE = artifacts.FOLDER / "convergence.json"
SENSITIVITY = artifacts.FOLDER / "sensitivity.json"


def metrics(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """One SAE's survey as one row: each metric's value, NAME_low and NAME_high (95%), NAME_n."""
    wide = {}
    for row in rows.to_dict("records"):
        if (name := str(row["metric"])) in names:
            wide |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"],
                     f"{name}_n": row["n_eval"]}
    return wide


def finished(preset: Preset, ref: str) -> str:
    """An SAE for a preset with other fields: the directory of one that this preset trains."""
    if not ref.startswith("train:"):
        return ref
    (folder,) = training.run(preset, only=_size(ref)).values()
    return str(folder)


def _size(ref: str) -> tuple[int, int]:
    return references.size_of(ref.removeprefix("train:"))


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


def _committed(path: Path) -> str:
    """The day of the last commit of a file, 'YYYY-MM-DD'; '' where git does not know it."""
    command = ["git", "-C", str(path.parent), "log", "-1", "--format=%as", "--", path.name]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# Convergence: other lengths of training


def convergence(preset: Preset, grid: Sequence[tuple[int, int]] | None = None) -> pd.DataFrame:
    """One row for each SAE of the grid (width, L0) and share of its training.

    Columns: preset, sae, width, k, seed, share, tokens, distinct (different tokens), and each of
    TRAINED as ``metrics`` has it. SAEs with other seeds are measured with the whole grid, at their
    end. Surveys what was not surveyed yet. Raises DarkmatterError for an SAE that was not trained
    on this machine.
    """
    rows = []
    sizes = [(preset, *size) for size in grid] if grid else training.ladder(preset)
    for seeded, width, k in sizes:
        recipe, name = seeded.training, training.name(seeded, width, k)
        shipped = next((ref for ref in preset.saes if artifacts.name_of(ref) == name), None)
        # The finished SAE is the one that ships, where it does; earlier ones are checkpoints.
        end = finished(seeded, shipped or f"train:{width}x{k}")
        shares = SHARES if recipe.seed == preset.training.seed else ()
        refs = {share: str(training.early(seeded, width, k, share)) for share in shares} | {1: end}
        result = survey.run(preset, list(refs.values()))
        for share, ref in refs.items():
            of_one = result.rows.loc[result.rows.sae == result.names[ref]]
            rows.append({"preset": preset.name,
                         "sae": shipped.removeprefix("artifact:") if shipped else name,
                         "width": width, "k": k, "seed": recipe.seed, "share": float(share),
                         "tokens": round(share * recipe.tokens),
                         "distinct": recipe.distinct_tokens, **metrics(of_one, TRAINED)})
    return pd.DataFrame(rows)


def collect_convergence(preset: Preset) -> Path:
    """Write ``convergence`` of the whole grid to artifacts/, beside other presets' rows."""
    others = [row for row in known_convergence() if row["preset"] != preset.name]
    rows = convergence(preset).assign(recorded=_today()).to_dict("records")
    cache.write_json(CONVERGENCE, {"rows": others + rows}, indent=1)
    return CONVERGENCE


def known_convergence() -> list[dict[str, Any]]:
    """The rows on record, of all presets; ``recorded`` is the day, or '' where it is not known."""
    if not CONVERGENCE.exists():
        return []
    day = {"recorded": _committed(CONVERGENCE)}
    return [day | row for row in json.loads(CONVERGENCE.read_text())["rows"]]


def recorded_convergence(preset: Preset) -> pd.DataFrame:
    """``convergence``: on record for SAEs that ship; else of the SAEs trained here, now.

    Rows on record have a column ``recorded``, the day.
    """
    if all(ref.startswith("artifact:") for ref in preset.saes):
        names = {ref.removeprefix("artifact:") for ref in preset.saes}
        return pd.DataFrame([row for row in known_convergence() if row["sae"] in names])
    sizes = [_size(ref) for ref in preset.saes if ref.startswith("train:")]
    if not sizes:
        raise DarkmatterError(f"The SAEs of the preset '{preset.name}' come without their "
                              "checkpoints, so there is no training to look back on.")
    return convergence(preset, sizes)


def suites(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished SAEs of these rows, and those on record of other suites or with other seeds.

    Of the same model, site, width and L0. Empty where no other suite has any.
    """
    ends = rows.loc[rows.share == 1].to_dict("records") if len(rows) else []
    names = _names(ends)
    known = [row for row in known_convergence() if row["share"] == 1
             and Path(row["sae"]).name.removesuffix(f"-s{row['seed']}") in names]
    by_sae = {(row["preset"], row["sae"]): row for row in known + ends}
    several = len({preset for preset, _ in by_sae}) > 1
    return pd.DataFrame(list(by_sae.values()) if several else [])


def widest(rows: pd.DataFrame) -> pd.DataFrame:
    """All rows, of the first seed, of the suite on record with most sizes and SAEs of these names.

    Empty where none has more sizes than these rows.
    """
    names, by_suite = _names(rows.to_dict("records")), {}
    for row in known_convergence():
        if row["seed"] == 0:
            by_suite.setdefault(row["preset"], []).append(row)
    alike = [suite for suite in by_suite.values() if names & _names(suite)]
    most = max(alike, key=lambda suite: len(_names(suite)), default=[])
    return pd.DataFrame(most if len(_names(most)) > len(names) else [])


def _names(rows: Sequence[dict[Any, Any]]) -> set[str]:
    """The names that the SAEs of these rows were trained under."""
    return {Path(row["sae"]).name for row in rows}


# Sensitivity: other choices of the experiment


def choices(preset: Preset) -> dict[str, dict[str, Any]]:
    """The fields of the preset that each variant changes, by its name; the first changes none."""
    other = "float32" if model.dtype_of(preset) != "float32" else "bfloat16"
    return {
        "as in the book": {},
        "a quarter of the contexts": {"contexts": preset.contexts // 4},
        "half of the contexts": {"contexts": preset.contexts // 2},
        "all positions, the first too": {"first_position": 0},
        "the second half of each context": {"first_position": preset.context_length // 2},
        f"with{'out' if preset.prepend_bos else ''} a beginning-of-text token":
            {"prepend_bos": not preset.prepend_bos},
        "another seed: order of the text and split": {"seed": preset.seed + 1},
        f"the model in {other}": {"dtype": other},
    }


def sensitivity(preset: Preset, names: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each variant (those of ``names``, or all) and protocol, of the default SAE.

    Columns: variant, protocol, and each of CHOSEN as ``metrics`` has it. Each variant is a survey
    of its own: other activations, other codes, fitted and held out anew.
    """
    ref = finished(preset, preset.default_sae)
    alone: dict[str, Any] = {"saes": (ref,), "default_sae": "", "elsewhere": {}, "on_error": {}}
    every, rows = choices(preset), []
    for name in names or every:
        changed = replace(preset, **every[name], **alone)
        protocols = (STRICT.name,) if every[name] else tuple(PROTOCOLS)
        surveyed = survey.run(changed, protocols=protocols).rows
        rows += [{"variant": name, "protocol": protocol,
                  **metrics(surveyed.loc[surveyed.protocol == protocol], CHOSEN)}
                 for protocol in protocols]
    return pd.DataFrame(rows)


def collect_sensitivity(preset: Preset) -> Path:
    """Write ``sensitivity`` of the preset to artifacts/."""
    rows = sensitivity(preset).assign(recorded=_today()).to_dict("records")
    record = {"preset": preset.name, "sae": preset.default_sae, "rows": rows}
    cache.write_json(SENSITIVITY, record, indent=1)
    return SENSITIVITY


def recorded_sensitivity(preset: Preset) -> pd.DataFrame:
    """``sensitivity``: on record for its own preset and SAE; else of the protocols alone.

    For SAEs trained on the spot, which small presets have, also of other positions. Rows on record
    have a column ``recorded``, the day.
    """
    known = json.loads(SENSITIVITY.read_text()) if SENSITIVITY.exists() else {}
    if (known.get("preset"), known.get("sae")) == (preset.name, preset.default_sae):
        day = {"recorded": _committed(SENSITIVITY)}
        return pd.DataFrame([day | row for row in known["rows"]])
    quick = {"first_position"} if preset.default_sae.startswith("train:") else set()
    cheap = [name for name, fields in choices(preset).items() if fields.keys() <= quick]
    return sensitivity(preset, cheap)
