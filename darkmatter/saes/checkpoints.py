"""What makes training resumable exactly: batches by step, and checkpoints.

The batch of a step is a function of (seed, step) alone, and a checkpoint holds weights, optimiser
and counters: a run that was cut off and started again gives the weights of one that was not.
"""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import TRAINER_STATE_FILENAME
from torch import Tensor

from .. import cache, progress
from ..errors import DarkmatterError

if TYPE_CHECKING:
    from ..presets import Preset, Training
    from .trainer import Trainer

VALIDATION = 16_384  # the last tokens of the stream, never trained on: what FVU is watched on
AHEAD = 256  # steps whose rows a GPU is told at once


# ---- batches ----

def trained_rows(rows: int) -> int:
    """How many rows of a stream are trained on; on its last ones FVU is watched."""
    return rows - min(VALIDATION, rows // 8)


def batch_rows(recipe: Training, rows: int, step: int) -> Tensor:
    """The rows [batch] that a step sees: consecutive pieces of a fresh shuffle each epoch.

    Raises DarkmatterError where there are fewer rows than a batch takes.
    """
    per_epoch = rows // recipe.batch
    if not per_epoch:
        raise DarkmatterError(
            f"A batch of {recipe.batch} tokens needs more than the {rows} training tokens there "
            "are; ask for more distinct_tokens or a smaller batch.")
    epoch, place = divmod(step, per_epoch)
    order = _order(rows, recipe.seed * 1_000_003 + epoch)
    return order[place * recipe.batch:(place + 1) * recipe.batch]


@lru_cache(maxsize=1)
def _order(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def batches(x: Tensor, recipe: Training, start: int, device: str = "cpu") -> Iterator[Tensor]:
    """The batches float32 [batch, d] of x [n, d] from step ``start`` on, without end."""
    together = AHEAD if x.is_cuda else 1
    for first in count(start, together):
        steps = [batch_rows(recipe, len(x), step) for step in range(first, first + together)]
        for rows in torch.stack(steps).to(x.device):
            yield x[rows].to(device).float()


_NEAR: dict[tuple[str, int], Tensor] = {}


def near(x: Tensor, stream: str, device: str) -> Tensor:
    """Rows x of a stream on the GPU, where they take at most two thirds of its free memory.

    Else as they are. There they stay for the process's next SAEs on the same stream.
    """
    if torch.device(device).type != "cuda":
        return x
    if (stream, len(x)) not in _NEAR:
        _NEAR.clear()
        gc.collect()  # a trainer and what it holds are a circle
        torch.cuda.empty_cache()
        if x.nbytes > torch.cuda.mem_get_info(device)[0] * 2 / 3:
            return x
        copy = torch.empty_like(x, device=device)
        for there, here in zip(copy.split(VALIDATION), x.split(VALIDATION), strict=True):
            there.copy_(here)
        _NEAR[stream, len(x)] = copy
    return _NEAR[stream, len(x)]


def sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """What is trained on, and the rows, float32, on which FVU is watched."""
    return x[:trained_rows(len(x))], x[trained_rows(len(x)):].float()


# ---- checkpoints ----

def mark(trainer: Trainer, held: Tensor, checkpoint_path: Path | None) -> None:
    """Note FVU, mark a checkpoint complete, and drop the optimiser state of those before it."""
    assert checkpoint_path is not None
    done = {"tokens": trainer.n_training_samples, "fvu": fvu(trainer, held),
            "dead": dead_share(trainer)}
    cache.write_json(checkpoint_path / "complete.json", done)
    for state in checkpoint_path.parent.glob(f"*/{TRAINER_STATE_FILENAME}"):
        if state.parent != checkpoint_path:
            state.unlink()
    progress.say(f"{checkpoint_path.parent.name.removesuffix('.work')}: {done['tokens']:,} tokens, "
                 f"held-out FVU {done['fvu']:.4f}, dead {done['dead']:.1%}")


def complete(work: Path) -> list[Path]:
    """The complete checkpoints, in order; each is named after the tokens it had seen."""
    folders = [path.parent for path in work.glob("*/complete.json")]
    return sorted(folders, key=lambda folder: int(folder.name))


def resume(trainer: Trainer, work: Path) -> None:
    """Take the trainer to its newest complete checkpoint, where there is one."""
    for newest in complete(work)[-1:]:
        trainer.load_trainer_state(newest)
        trainer.sae.load_weights_from_checkpoint(newest)
        done = trainer.n_training_samples
        trainer.n_training_steps = done // trainer.cfg.train_batch_size_samples
        trainer.checkpoint_thresholds = [tokens for tokens in trainer.checkpoint_thresholds
                                         if tokens >= done]


@torch.no_grad()
def fvu(trainer: Trainer, held: Tensor) -> float:
    """FVU = Σ‖x − Sae(x)‖² / Σ‖x − x̄‖² on the rows held out."""
    scaled = trainer.activation_scaler(held.to(trainer.sae.device))
    missing = sum(float((part - trainer.sae(part)).pow(2).sum()) for part in scaled.split(1024))
    return missing / float((scaled - scaled.mean(0)).pow(2).sum())


def dead_share(trainer: Trainer) -> float:
    """Share of the latents that have not fired for as long as ``dead_feature_window`` says."""
    return float(trainer.dead_neurons.float().mean())


def record_of(preset: Preset, x: Tensor, stream: str, trainer: Trainer, work: Path
              ) -> dict[str, Any]:
    """How an SAE was trained, and its FVU at the end, when the scale is folded into the SAE."""
    curve = [json.loads((folder / "complete.json").read_text()) for folder in complete(work)]
    recipe, (train, held), device = preset.training, sides(x), trainer.sae.device
    return {
        "model": preset.model, "site": preset.site,
        "width": trainer.sae.cfg.d_sae, "k": trainer.sae.cfg.k,
        "tokens": trainer.n_training_samples, "distinct_tokens": len(train),
        "epochs": trainer.n_training_samples / len(train), "fvu": fvu(trainer, held),
        "seed": recipe.seed, "recipe": asdict(replace(recipe, grid=())), "lr": trainer.cfg.lr,
        "stream": stream, "curve": curve, "dead_share": dead_share(trainer),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda"
        else f"{platform.machine()} CPU",
        "versions": {package: version(package) for package
                     in ("torch", "sae-lens", "transformer-lens", "transformers")},
        "command": "python -m darkmatter train --preset " + preset.name,
    }
