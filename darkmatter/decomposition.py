"""One SAE, one answer: what is its error made of? Here models, SAEs and texts go by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import presets, survey
from .errors import DarkmatterError
from .regression.result import as_json

if TYPE_CHECKING:
    from .presets import Preset


def settings(model: str, site: str, sae: str, corpus: str, contexts: int | None = None,
             context_length: int | None = None) -> Preset:
    """The preset that ``decompose`` runs: the model and the text of named presets, or any other.

    A model that is no preset's gets a beginning-of-text token, as Gemma and Llama want it.
    """
    named = presets.names()
    base = presets.load(model if model in named else corpus if corpus in named else "smollm2")
    text = presets.load(corpus).corpus if corpus in named else corpus
    of_model = {} if model in named else {"model": model, "prepend_bos": True}
    if "/" in model and not Path(model).expanduser().is_dir() and model.count("/") > 1:
        raise DarkmatterError(f"There is no model directory {model}; give one, a preset's name, or "
                              "a hub id.")
    return presets.load(base.name, name="decompose", site=site, saes=(sae,), default_sae=sae,
                        corpus=text, contexts=contexts, context_length=context_length,
                        elsewhere={}, on_error={}, **of_model)


def decompose(model: str, site: str, sae: str, corpus: str, contexts: int | None = None,
              context_length: int | None = None) -> dict[str, Any]:
    """Survey one SAE under the strict protocol: ``of_preset`` of what ``settings`` makes of it."""
    return of_preset(settings(model, site, sae, corpus, contexts, context_length))


def of_preset(preset: Preset) -> dict[str, Any]:
    """Survey the preset's first SAE under the strict protocol.

    Returns l0, dead_share, fvu, fvu_nonlinear, r2_vector, r2_vector_weighted, r2_norm, norm_test
    (x, sae, error, linear, nonlinear), n_fit and n_eval (tokens), and intervals (the same keys,
    [low, high]). A value or interval that is not defined is None, with its reason in notes.
    """
    from . import plan

    plan.warn(preset)
    result = survey.run(preset, preset.saes[:1])
    (name,) = result.folders
    metrics = {metric: result.draws(name, metric) for metric in result.rows["metric"]}
    n_fit = int(result.rows["n_fit"].iloc[0])
    return as_json(metrics, n_fit, metrics["fvu"].n, preset.fields())
