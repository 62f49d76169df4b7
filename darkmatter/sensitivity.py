"""How much the results move when a choice of the experiment is made otherwise: one SAE, surveyed again for each.

An interval over sources says what other text of the same kind would change. It does not say what another number of
contexts, other positions, a beginning-of-text token, another seed or another precision would.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd

from . import cache, convergence, model, saes, survey
from .preset import Preset
from .regression import PROTOCOLS, STRICT

METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm", "norm_test_linear", "norm_test_nonlinear")
RECORDS = saes.ARTIFACTS / "sensitivity.json"


def variants(preset: Preset) -> dict[str, dict[str, Any]]:
    """The fields of the preset that each variant changes, by the variant's name; the first changes none."""
    other = "float32" if model.dtype_of(preset) != "float32" else "bfloat16"
    return {
        "as in the book": {},
        "a quarter of the contexts": {"contexts": preset.contexts // 4},
        "half of the contexts": {"contexts": preset.contexts // 2},
        "all positions, the first too": {"first_position": 0},
        "the second half of each context": {"first_position": preset.context_length // 2},
        "with a beginning-of-text token" if not preset.prepend_bos else "without a beginning-of-text token":
            {"prepend_bos": not preset.prepend_bos},
        "another seed: order of the text and split": {"seed": preset.seed + 1},
        f"the model in {other}": {"dtype": other},
    }


def measure(preset: Preset, names: tuple[str, ...] = ()) -> pd.DataFrame:
    """One row for each variant (those of ``names``, or all) and protocol, of the preset's default SAE.

    Columns: variant, protocol, and for each of METRICS its value, NAME_low and NAME_high (95%) and NAME_n, tokens.
    Each variant is a survey of its own: other activations, other codes, fitted and held out anew.
    """
    ref = convergence.finished(preset, preset.default_sae)
    every = variants(preset)
    rows = []
    for name in names or every:
        changed = dataclasses.replace(preset, **every[name], saes=(ref,), default_sae="", elsewhere={}, on_error={})
        protocols = tuple(PROTOCOLS) if not every[name] else (STRICT.name,)
        found = survey.run(changed, protocols=protocols).rows
        rows += [{"variant": name, "protocol": protocol,
                  **convergence.metrics(found.loc[found.protocol == protocol], METRICS)} for protocol in protocols]
    return pd.DataFrame(rows)


def collect(preset: Preset) -> Path:
    """Write ``measure`` of the preset to artifacts/sensitivity.json."""
    found = {"preset": preset.name, "sae": preset.default_sae, "rows": measure(preset).to_dict("records")}
    cache.write_json(RECORDS, found, indent=1)
    return RECORDS


def recorded(preset: Preset) -> pd.DataFrame:
    """``measure``: from the committed file for the SAE that it was made of; else of the protocols alone.

    For SAEs trained on the spot, which small presets have, also of other positions.
    """
    known = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    if (known.get("preset"), known.get("sae")) == (preset.name, preset.default_sae):
        return pd.DataFrame(known["rows"])
    quick = {"first_position"} if preset.default_sae.startswith("train:") else set()
    return measure(preset, tuple(name for name, fields in variants(preset).items() if fields.keys() <= quick))
