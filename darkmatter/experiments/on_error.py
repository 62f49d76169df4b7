"""SAEs trained on parts of another SAE's error (section 5 of the paper; the SAEs of Figure 8).

The base SAE is the preset's ``default_sae``. b* is fitted on the training text, without the slice
that FVU is watched on; the recipe is the ladder's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import cache
from ..errors import DarkmatterError
from ..models import activations
from ..regression import Draws, Sums, clusters, resample, score
from ..saes import artifacts, references, training
from . import error_parts

if TYPE_CHECKING:
    from ..models.activations import Activations
    from ..presets import Preset
    from ..saes.loaded import LoadedSAE

SEEDS = (0, 1, 2)
LONGER = (("linear", 4), ("nonlinear", 4))  # on that many times the tokens: has it converged?
SHIPPED = ("linear", "nonlinear", "x")  # what the chapters score SAEs of
RECORDS = artifacts.FOLDER / "on-error.json"
KEPT = ("target", "seed", "base", "width", "k", "tokens", "distinct_tokens", "fvu", "dead_share",
        "variance", "effective_dimension", "seconds", "seconds_cover_tokens", "stream", "curve",
        "model", "site", "versions")


def target(preset: Preset, which: str) -> Activations:
    """One of ``error_parts.NAMES`` over the training text: x bfloat16 [token, d]; written once."""
    stream = activations.training(preset.beside)
    fit = np.arange(len(stream.x)) < training.trained_rows(len(stream.x))
    base = references.load_sae(preset.default_sae, preset)
    base.sae.to(training.device_of(preset))
    return error_parts.part(base, stream, fit, which)


def train(preset: Preset, which: str, seed: int = 0, times: int = 1,
          size: tuple[int, int] | None = None) -> Path:
    """Directory of the SAE trained on one of ``error_parts.NAMES``; resumable.

    ``times``: of the recipe's tokens. ``size``: width and L0, by default those of the preset's
    ``training.on_error``.
    """
    return _trained(preset, target(preset, which), which, seed, times, size)


def run(preset: Preset, seeds: Sequence[int] = SEEDS, targets: Sequence[str] = error_parts.NAMES,
        longer: bool = False, jobs: int = 1) -> dict[str, Path]:
    """Train what is not trained yet: {name: directory}, seed by seed, ``jobs`` at a time.

    With ``longer`` also the runs of LONGER, with the first seed.
    """
    for which in targets:
        target(preset, which)  # written once, before the processes that read it start
    runs = [(which, seed, 1) for seed in seeds for which in targets]
    runs = [(which, seeds[0], times) for which, times in LONGER if longer] + runs
    return training.side_by_side([(one, (preset, *words)) for words in runs], jobs)


def one(preset: Preset, which: str, seed: int, times: int) -> dict[str, Path]:
    """Train one: {name: directory}."""
    folder = train(preset, which, seed, times)
    return {_name(folder): folder}


def load(preset: Preset, which: str) -> LoadedSAE:
    """The preset's SAE on 'linear', 'nonlinear' or 'x', of one size: shipped, or trained now.

    Raises DarkmatterError when it was made for the error of another SAE than the preset's
    ``default_sae``.
    """
    named: dict[str, str] = {str(name): ref for name, ref in preset.on_error.items()}
    ref = _on_x(preset) if which == "x" else named.get(which, "train:")
    kind, _, size = ref.partition(":")
    if kind == "train":
        folder = train(preset, which, size=_size(ref, size) if size else None)
        return replace(references.load_sae(str(folder), preset), ref=ref, name=_name(folder))
    sae, base = references.load_sae(ref, preset), references.load_sae(preset.default_sae, preset)
    made_for, suite = sae.record.get("base", base.name), ref.rpartition("/")[0]
    # An SAE of a suite is known by its name in it.
    if made_for != base.name and f"{suite}/{made_for}" != base.ref:
        raise DarkmatterError(
            f"The SAE '{ref}' was trained on the error of {made_for}, not of {base.name}; leave "
            "the parameter sae empty, or give a preset whose on_error fits.")
    return sae


def collect(preset: Preset) -> Path:
    """Write the records of all runs, every target, seed and length, to artifacts/on-error.json.

    Trains what is not trained yet.
    """
    folders = run(preset, SEEDS, longer=True).values()
    cache.write_json(RECORDS, [_brief(folder) for folder in folders], indent=1)
    return RECORDS


def recorded(preset: Preset, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Records of the runs that the preset's SAEs are of, one row a run.

    Where its SAEs are 'train:WIDTHxL0', of runs made here. Else the rows of
    artifacts/on-error.json, if those are of the same training data; otherwise what the SAEs' own
    files say of their training.
    """
    if all(ref.startswith("train:") for ref in preset.on_error.values()):
        return [_brief(folder) for folder in run(preset, seeds).values()]
    if not RECORDS.exists():
        raise DarkmatterError(
            f"{RECORDS} is missing; fetch the repository's files again, or make it with 'python -m "
            f"darkmatter train --preset {preset.name} --part on_error'.")
    rows = json.loads(RECORDS.read_text())
    saes = [load(preset, which) for which in SHIPPED]
    if {sae.record.get("stream") for sae in saes} <= {row["stream"] for row in rows}:
        return rows
    return [_row(sae.name, sae.record) for sae in saes if "curve" in sae.record]


def held_out_fvu(preset: Preset, rows: Activations, fit: np.ndarray,
                 rebuild: Callable[[Tensor], Tensor]) -> Draws:
    """FVU of ``rebuild`` (y [n, d] to its reconstruction) on the rows where ``fit`` is false.

    One preset draws the same sources for every part, so that differences are taken draw by draw.
    """
    contexts, context = len(rows.text.tokens), torch.from_numpy(rows.context)
    of_part, of_rest = Sums(contexts), Sums(contexts)
    for begin in range(0, len(fit), error_parts.BLOCK):
        block = slice(begin, min(begin + error_parts.BLOCK, len(fit)))
        held = torch.from_numpy(~fit[block])
        if held.any():
            y, ids = rows.read(block)[held], context[block][held].long()
            rest = y - rebuild(y)
            of_part.add_x(ids, y)
            of_rest.add_error(ids, rest, rest)
    sources = clusters(rows.text.source)
    return score(resample(of_part | of_rest, sources, preset.bootstrap, preset.seed), "fvu")


def short(preset: Preset, acts: Activations, fit: np.ndarray, which: str, tokens: int) -> Path:
    """A short training run on a part of the evaluation text: its fitted rows, the rest watched.

    For showing how it is done where the training text is not at hand; no other SAE of the book sees
    this text.
    """
    base = references.load_sae(preset.default_sae, preset)
    part = error_parts.part(base, acts, fit, which)
    # Seven rows to train on for each that is watched, as in a stream: its last eighth is watched.
    held = min(training.VALIDATION, int(fit.sum()) // 7, int((~fit).sum()))
    chosen = np.concatenate([np.flatnonzero(fit)[:7 * held], np.flatnonzero(~fit)[:held]])
    key = cache.key(acts=part.key, rows=len(chosen), use="short")
    stream = replace(part, x=part.x[chosen], key=key, mapped=None)
    brief = replace(preset, training=replace(preset.training, tokens=tokens))
    return _trained(brief, stream, f"short-{which}", about={"base": base.name})


def _trained(preset: Preset, rows: Activations, which: str, seed: int = 0, times: int = 1,
             size: tuple[int, int] | None = None, about: Mapping[str, Any] | None = None) -> Path:
    recipe = replace(preset.training, seed=seed, tokens=preset.training.tokens * times)
    words = ("" if which == "x" else f"on-{which}", f"{times}x" if times > 1 else "")
    about = {"target": which, **(about or error_parts.about(rows))}
    return training.train(replace(preset, training=recipe), rows.x, rows.key,
                          *(size or recipe.on_error), "-".join(filter(None, words)), about)


def _on_x(preset: Preset) -> str:
    """The preset's SAE of the same size on x, if the ladder has one."""
    width, k = preset.training.on_error
    name, on_the_spot = training.name(preset, width, k), f"train:{width}x{k}"
    fitting = (ref for ref in preset.saes if artifacts.name_of(ref) == name or ref == on_the_spot)
    return next(fitting, "train:")


def _size(ref: str, size: str) -> tuple[int, int]:
    width, _, k = size.partition("x")
    if not (width.isdigit() and k.isdigit()):
        raise DarkmatterError(f"'{ref}' is not an SAE to train; write it as 'train:2048x32'.")
    return int(width), int(k)


def _name(folder: Path) -> str:
    return folder.name.rsplit("-", 1)[0]


def _brief(folder: Path) -> dict[str, Any]:
    """The row of a run: its record, and the day on which it ended."""
    path = folder / "record.json"
    day = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
    return _row(_name(folder), json.loads(path.read_text())) | {"date": day}


def _row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "target": "x"} | {key: record[key] for key in KEPT if key in record}
