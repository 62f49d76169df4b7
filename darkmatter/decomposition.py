"""One SAE, one answer: what is its error made of?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import preset as presets
from . import survey
from .errors import DarkmatterError
from .preset import Preset
from .regression.passes import VECTORS

METRICS = ("l0", "dead_share", "fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm")


def settings(model: str, site: str, sae: str, corpus: str, contexts: int | None = None,
             context_length: int | None = None) -> Preset:
    """The preset that ``decompose`` runs: the model and the text of named presets, or any other.

    A model that is no preset's gets a beginning-of-text token, as Gemma and Llama want it.
    """
    named = presets.names()
    base = presets.load(model if model in named else corpus if corpus in named else "smollm2")
    text = presets.load(corpus).corpus if corpus in named else corpus
    own = {} if model in named else {"model": model, "prepend_bos": True}
    if "/" in model and not Path(model).expanduser().is_dir() and model.count("/") > 1:
        raise DarkmatterError(f"There is no model directory {model}; give one, a preset's name, or a hub id.")
    return presets.load(base.name, name="decompose", site=site, saes=(sae,), default_sae=sae, corpus=text,
                        contexts=contexts, context_length=context_length, elsewhere={}, on_error={}, **own)


def decompose(model: str, site: str, sae: str, corpus: str, contexts: int | None = None,
              context_length: int | None = None) -> dict[str, Any]:
    """Survey one SAE under the strict protocol: ``of`` the preset that ``settings`` makes of these."""
    return of(settings(model, site, sae, corpus, contexts, context_length))


def of(preset: Preset) -> dict[str, Any]:
    """Survey the preset's first SAE under the strict protocol.

    Returns l0, dead_share, fvu, fvu_nonlinear, r2_vector, r2_vector_weighted, r2_norm, norm_test (x, sae, error,
    linear, nonlinear), n_fit and n_eval (tokens), and intervals (the same keys, [low, high]). A value or interval that
    is not defined is None, with its reason in notes.
    """
    from . import plan

    plan.warn(preset)
    found = survey.run(preset, preset.saes[:1]).rows.set_index("metric", drop=False)
    rows = found.astype(object).where(found.notna(), None).to_dict("index")
    ends = {name: None if row["low"] is None else [row["low"], row["high"]] for name, row in rows.items()}
    values = {name: row["value"] for name, row in rows.items()}
    tests = {name: f"norm_test_{name}" for name in VECTORS}
    return {
        **{name: values[name] for name in METRICS},
        "norm_test": {name: values[key] for name, key in tests.items()},
        "n_fit": int(rows["fvu"]["n_fit"]), "n_eval": int(rows["fvu"]["n_eval"]),
        "intervals": {**{name: ends[name] for name in METRICS},
                      "norm_test": {name: ends[key] for name, key in tests.items()}},
        "notes": {name: row["note"] for name, row in rows.items() if row["note"]},
        "settings": preset.fields(),
    }
