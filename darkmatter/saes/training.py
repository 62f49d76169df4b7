"""Train the SAEs that a preset asks for, one recipe for all: each once, several at a time."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler

from .. import cache, progress
from ..errors import DarkmatterError
from ..models import activations
from . import checkpoints
from .checkpoints import VALIDATION, trained_rows
from .topk import SparseTopKTrainingSAE
from .trainer import device_of, trainer_of

if TYPE_CHECKING:
    from ..presets import Preset

__all__ = ["VALIDATION", "device_of", "early", "elsewhere", "ladder", "name", "one", "run",
           "seeded", "side_by_side", "train", "trained_rows"]

# Fields of a recipe that do not determine the weights of one SAE, and so are not in its key: which
# SAEs there are, and what determines the text alone, which the stream's key stands for.
OTHERS = {"grid", "repeats", "elsewhere", "on_error", "distinct_elsewhere", "clear"}

Task = tuple[Callable[..., dict[str, Path]], tuple[Any, ...]]


def run(preset: Preset, only: tuple[int, int] | None = None, jobs: int = 1) -> dict[str, Path]:
    """Train every (width, L0) of the grid that is not trained yet, ``jobs`` at a time.

    Returns {name: directory}. A directory holds what ``sae_lens.SAE.load_from_disk`` reads and
    ``record.json``: how it was trained.
    """
    activations.training(preset)  # read once, before the processes that share it begin
    asked = [(preset, *only)] if only else ladder(preset)
    return side_by_side([(one, words) for words in asked], jobs)


def ladder(preset: Preset) -> list[tuple[Preset, int, int]]:
    """What the grid asks for: preset, width and L0 of each SAE, those with other seeds last."""
    first = [(preset, *size) for size in preset.training.grid]
    return first + [(seeded(preset, seed), *size)
                    for seed in (1, 2) for size in preset.training.repeats]


def elsewhere(preset: Preset, jobs: int = 1) -> dict[str, Path]:
    """Train the SAEs at the preset's other sites, on text read in one forward pass."""
    activations.trainings(preset.beside, list(preset.elsewhere))
    size = preset.training.elsewhere
    return side_by_side([(one, (preset.at(site), *size)) for site in preset.elsewhere], jobs)


def one(preset: Preset, width: int, k: int) -> dict[str, Path]:
    """Train one SAE on the preset's stream: {name: directory}."""
    stream = activations.training(preset)
    return {name(preset, width, k): train(preset, stream.x, stream.key, width, k)}


def seeded(preset: Preset, seed: int) -> Preset:
    """The same with the seed of its training moved on by ``seed``."""
    return replace(preset, training=replace(preset.training, seed=preset.training.seed + seed))


def side_by_side(tasks: Sequence[Task], jobs: int) -> dict[str, Path]:
    """Call each function with its arguments, ``jobs`` at a time; join what they return.

    More than one: each in a process of its own with one thread.
    """
    if jobs == 1 or len(tasks) < 2:
        results = [call(*words) for call, words in progress.bar(tasks, "trained", "SAEs")]
    else:
        spawned = multiprocessing.get_context("spawn")
        progress.in_lines()  # several processes cannot draw on one
        with ProcessPoolExecutor(jobs, spawned, _begin) as pool:
            running = [pool.submit(call, *words) for call, words in tasks]
            for _ in progress.bar(as_completed(running), "trained", "SAEs", total=len(tasks)):
                pass
            results = [task.result() for task in running]
    return {name: folder for result in results for name, folder in result.items()}


def _begin() -> None:
    """In a process beside others."""
    torch.set_num_threads(1)
    progress.in_lines()


def name(preset: Preset, width: int, k: int, on: str = "") -> str:
    """The name an SAE ships under: 'smollm2-l15-w4096-k32', or 'smollm2-l15-mlp_out-w4096-k32'.

    ``on``: what it was trained on instead of the site's activations, as in
    'smollm2-l15-on-linear-w2048-k32'.
    """
    layer, kind = re.sub(r"hook_|attn\.", "", preset.site).split(".")[1:]
    place = ("" if kind == "resid_post" else f"-{kind}") + (on and f"-{on}")
    seed = f"-s{preset.training.seed}" if preset.training.seed else ""
    model = Path(preset.model).name  # the whole of a path would lead out of the cache
    return f"{model}-l{layer}{place}-w{width}-k{k}{seed}"


def _folder(preset: Preset, stream: str, width: int, k: int, on: str = "") -> Path:
    """Where an SAE is put, by all that determines its weights."""
    recipe = asdict(preset.training).items()
    how = {field: value for field, value in recipe if field not in OTHERS}
    key = cache.key(stream=stream, width=width, k=k, version=1, grid=None, **how)
    return cache.root() / "saes" / f"{name(preset, width, k, on)}-{key}"


def train(preset: Preset, x: torch.Tensor, stream: str, width: int, k: int, on: str = "",
          about: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Train one SAE on rows x [n, d], which are known by ``stream``; returns its directory.

    ``about`` goes into its record, ``on`` into its name.
    """
    if k > width:
        raise DarkmatterError(f"An SAE of {width} latents cannot have {k} of them active; give an "
                              "L0 of at most its width.")
    folder = _folder(preset, stream, width, k, on)
    with cache.lock(folder.name):
        if not (folder / "record.json").exists():
            work, began = folder.with_name(folder.name + ".work"), time.time()
            trainer = trainer_of(preset, x, stream, width, k, work)
            start, batches = trainer.n_training_samples, iter(trainer.data_provider)
            with progress.bar(batches, f"training {name(preset, width, k, on)}", "steps",
                              initial=trainer.n_training_steps,
                              total=trainer.cfg.total_training_steps) as bar:
                trainer.data_provider = iter(bar)
                trainer.fit()
            record = checkpoints.record_of(preset, x, stream, trainer, work)
            record |= {**about, "seconds": round(time.time() - began),
                       "seconds_cover_tokens": record["tokens"] - start}
            with cache.atomic(folder) as temporary:
                trainer.sae.save_inference_model(temporary)
                (temporary / "record.json").write_text(json.dumps(record, indent=1))
    return folder


def early(preset: Preset, width: int, k: int, share: float) -> Path:
    """Directory of an SAE of the grid as it was after a share of its training.

    ``share``: an eighth or a multiple of it. The learning rate had not been lowered yet.
    Raises DarkmatterError where the SAE was not trained on this machine.
    """
    folder = _folder(preset, activations.training(preset).key, width, k)
    batch = preset.training.batch
    tokens = share * math.ceil(preset.training.tokens / batch) * batch

    def distance(checkpoint: Path) -> float:
        return abs(int(checkpoint.name) - tokens)

    there = checkpoints.complete(folder.with_name(folder.name + ".work"))
    nearest = min(there, key=distance, default=None)
    if nearest is None or distance(nearest) > tokens / 100 + batch:
        raise DarkmatterError(
            f"There is no checkpoint of {folder.name} after {share:.0%} of its training here; "
            f"train it on this machine: python -m darkmatter train --preset {preset.name}")
    key = folder.name[-16:]
    early = folder.with_name(f"{name(preset, width, k)}-after-{nearest.name}-{key}")
    with cache.lock(early.name):
        if not early.exists():
            # Saved as at the end of training: with the trainer's scale folded into the weights.
            sae, scaler = SparseTopKTrainingSAE.load_from_disk(nearest), ActivationScaler()
            scaler.load(nearest / ACTIVATION_SCALER_CFG_FILENAME)
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor or 1.0)
            with cache.atomic(early) as temporary:
                sae.save_inference_model(temporary)
    return early
