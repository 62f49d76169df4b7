"""SAEs trained on parts of another SAE's error (section 5 of the paper; the SAEs of Figure 8).

The base SAE is the preset's ``default_sae``. b* is fitted on the training text, without the slice that FVU is watched
on; the recipe is the ladder's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import activations, cache, parts, saes, training
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .regression import Sums, clusters, fvu, resample
from .saes import LoadedSAE

SEEDS = (0, 1, 2)
LONGER = (("linear", 4), ("nonlinear", 4))  # trained on that many times the tokens: has it converged?
RECORDS = saes.ARTIFACTS / "on-error.json"
KEPT = ("target", "seed", "base", "width", "k", "tokens", "distinct_tokens", "fvu", "dead_share", "variance",
        "effective_dimension", "seconds", "seconds_cover_tokens", "stream", "curve", "model", "site", "versions")


def target(preset: Preset, which: str) -> Activations:
    """One of ``parts.NAMES`` over the training text: x bfloat16 [token, d], written on the first call."""
    stream = activations.training(preset.beside)
    fit = np.arange(len(stream.x)) < training.trained_rows(len(stream.x))
    base = saes.load(preset.default_sae, preset)
    base.sae.to(training._device(preset))
    return parts.of(base, stream, fit, which)


def train(preset: Preset, which: str, seed: int = 0, times: int = 1, size: tuple[int, int] | None = None) -> Path:
    """Directory of the SAE trained on one of ``parts.NAMES``, on ``times`` the recipe's tokens; resumable.

    ``size``: width and L0; left out, the preset's ``training.on_error``.
    """
    return _trained(preset, target(preset, which), which, seed, times, size)


def run(preset: Preset, seeds: Sequence[int] = SEEDS, targets: Sequence[str] = parts.NAMES, longer: bool = False,
        jobs: int = 1) -> dict[str, Path]:
    """Train what is not trained yet: {name: directory}, seed by seed, ``jobs`` at a time; the ``longer`` runs too."""
    for which in targets:
        target(preset, which)  # written once, before the processes that read it start
    wanted = [(which, times) for which, times in LONGER if longer] + [(which, 1) for which in targets]
    return training.side_by_side([(one, (preset, which, seed, times)) for seed in seeds for which, times in wanted
                                  if times == 1 or seed == seeds[0]], jobs)


def one(preset: Preset, which: str, seed: int, times: int) -> dict[str, Path]:
    """Train one: {name: directory}."""
    folder = train(preset, which, seed, times)
    return {_name(folder): folder}


def load(preset: Preset, which: str) -> LoadedSAE:
    """The preset's SAE on 'linear', 'nonlinear' or 'x', all of one size: shipped, or trained on the spot.

    Raises DarkmatterError when it was made for the error of another SAE than the preset's ``default_sae``.
    """
    ref = _on_x(preset) if which == "x" else preset.on_error.get(which, "train:")  # type: ignore[call-overload]
    kind, _, size = ref.partition(":")
    if kind == "train":
        folder = train(preset, which, size=_size(ref, size) if size else None)
        return replace(saes.load(str(folder), preset), ref=ref, name=_name(folder))
    opened, base = saes.load(ref, preset), saes.load(preset.default_sae, preset)
    made_for, suite = opened.record.get("base", base.name), ref.rpartition("/")[0]
    if made_for != base.name and f"{suite}/{made_for}" != base.ref:  # an SAE of a suite is known by its name in it
        raise DarkmatterError(f"The SAE '{ref}' was trained on the error of {made_for}, not of {base.name}; leave the "
                              "parameter sae empty, or give a preset whose on_error fits.")
    return opened


def collect(preset: Preset) -> Path:
    """Write the records of all runs, every target, seed and length, to artifacts/on-error.json; trains what lacks."""
    folders = run(preset, SEEDS, longer=True).values()
    cache.write_json(RECORDS, [_brief(folder) for folder in folders], indent=1)
    return RECORDS


def recorded(preset: Preset, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Records of the preset's runs: the committed ones, or of runs made here where its SAEs are 'train:WIDTHxL0'."""
    if all(ref.startswith("train:") for ref in preset.on_error.values()):
        return [_brief(folder) for folder in run(preset, seeds).values()]
    if not RECORDS.exists():
        raise DarkmatterError(f"{RECORDS} is missing; fetch the repository's files again, or make it with "
                              f"'python -m darkmatter train --preset {preset.name} --part on_error'.")
    return json.loads(RECORDS.read_text())


def held_out_fvu(preset: Preset, part: Activations, fit: np.ndarray,
                 rebuild: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, float]:
    """FVU of ``rebuild`` (y [n, d] to its reconstruction) on the rows of a part that do not fit.

    On all of them and on each bootstrap draw of their sources, float64 [1 + draws]; and how many sources they count as.
    One preset draws the same sources for every part, so that differences can be taken draw by draw.
    """
    contexts, context = len(part.text.tokens), torch.from_numpy(part.context)
    of_part, of_error = Sums(contexts), Sums(contexts)
    for begin in range(0, len(fit), parts.ROWS):
        rows = slice(begin, min(begin + parts.ROWS, len(fit)))
        held = torch.from_numpy(~fit[rows])
        if held.any():
            y, ids = part.read(rows)[held], context[rows][held].long()
            missing = y - rebuild(y)
            of_part.add_x(ids, y)
            of_error.add_error(ids, missing, missing)
    totals = resample(of_part | of_error, clusters(part.text.source), preset.bootstrap, preset.seed)
    return fvu(totals).numpy(), float(totals["effective"][0])


def short(preset: Preset, acts: Activations, fit: np.ndarray, which: str, tokens: int) -> Path:
    """A short training run on a part of the evaluation text: its fitted rows, watched on held-out ones.

    For showing how it is done where the training text is not at hand; no other SAE of the book sees this text.
    """
    part = parts.of(saes.load(preset.default_sae, preset), acts, fit, which)
    held = min(training.VALIDATION, int(fit.sum()) // 7, int((~fit).sum()))
    chosen = np.concatenate([np.flatnonzero(fit)[:7 * held], np.flatnonzero(~fit)[:held]])
    key = cache.key(acts=part.key, rows=len(chosen), use="short")
    some = replace(part, x=part.x[chosen], key=key, mapped=None)
    small = replace(preset, training=replace(preset.training, tokens=tokens))
    return _trained(small, some, f"short-{which}", about={"base": saes.load(preset.default_sae, preset).name})


def _trained(preset: Preset, own: Activations, which: str, seed: int = 0, times: int = 1,
             size: tuple[int, int] | None = None, about: dict[str, Any] | None = None) -> Path:
    recipe = replace(preset.training, seed=seed, tokens=preset.training.tokens * times)
    on = "-".join(word for word in ("" if which == "x" else f"on-{which}", f"{times}x" if times > 1 else "") if word)
    return training._train(replace(preset, training=recipe), own.x, own.key, *(size or recipe.on_error), on=on,
                           about={"target": which, **(about or parts.about(own))})


def _on_x(preset: Preset) -> str:
    """The preset's SAE of the same size on x, if the ladder has one."""
    width, k = preset.training.on_error
    likely = (f"artifact:{training.name(preset, width, k)}", f"train:{width}x{k}")
    return next((ref for ref in likely if ref in preset.saes), "train:")


def _size(ref: str, size: str) -> tuple[int, int]:
    width, _, k = size.partition("x")
    if not (width.isdigit() and k.isdigit()):
        raise DarkmatterError(f"'{ref}' is not an SAE to train; write it as 'train:2048x32'.")
    return int(width), int(k)


def _name(folder: Path) -> str:
    return folder.name.rsplit("-", 1)[0]


def _brief(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "record.json").read_text())
    return {"name": _name(folder), "target": "x"} | {key: record[key] for key in KEPT if key in record}
