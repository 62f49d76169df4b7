"""Row 'training': the package's sparse TopK class, against sae-lens's own in its own trainer.

Both see the same batches from the same weights, step by step in turn; each step is a pair. At the
end both have the same FVU on held-out rows to 1%.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from darkmatter.presets import Preset, Training
from darkmatter.saes.checkpoints import trained_rows
from darkmatter.saes.trainer import trainer_of

from . import data, timing

WARM = 2  # steps of each side that are not counted
FVU = 0.01  # relative


def run(device: str, rows: int, d: int, width: int, k: int, batch: int,
        steps: int, limit: float) -> dict[str, Any]:
    """``steps`` steps of each side, or as many as begin within ``limit`` seconds."""
    recipe = Training(grid=((width, k),), tokens=steps * batch,
                      distinct_tokens=rows, batch=batch, lr=3e-3)
    preset = Preset(name="benchmark", model="none", device=device,
                    site="blocks.0.hook_resid_post", saes=("none",), training=recipe)
    dictionary = data.atoms(4 * d, d, device)
    x = torch.cat([data.sparse_rows(min(8192, rows - at), dictionary, 24)
                   for at in range(0, rows, 8192)])
    with tempfile.TemporaryDirectory() as folder:
        ours = trainer_of(preset, x.bfloat16().cpu(), folder, width, k, Path(folder))
    stock = _stock(ours)
    times = _steps(ours, stock, device, steps, limit)
    held = ours.activation_scaler(x[trained_rows(rows):].to(device))
    left = [_fvu(trainer.sae, held) for trainer in (stock, ours)]
    if abs(left[1] / left[0] - 1) > FVU:
        raise ValueError(
            f"FVU is {left[0]:.4f} with the stock trainer and {left[1]:.4f} with ours.")
    found = times.fields()
    return found | {"fvu": {"stock": left[0], "ours": left[1]}, "steps": len(times.ours),
                    "tokens_a_second": batch / found["ours_seconds"]}


def _stock(ours: SAETrainer[Any, Any]) -> SAETrainer[Any, Any]:
    """sae-lens's own trainer of its own class, with the same settings, weights and scale."""
    known = {field.name for field in fields(TopKTrainingSAEConfig)}
    settings = {field.name: getattr(ours.sae.cfg, field.name) for field in fields(ours.sae.cfg)
                if field.name in known}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**settings))
    sae.load_state_dict(ours.sae.state_dict())
    trainer = SAETrainer(cfg=replace(ours.cfg), sae=sae.to(ours.cfg.device), data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = ours.activation_scaler.scaling_factor
    return trainer


def _steps(ours: SAETrainer[Any, Any], stock: SAETrainer[Any, Any], device: str, steps: int,
           limit: float) -> timing.Times:
    times, spent = timing.Times([], []), 0.0
    for step in range(steps):
        batch: Tensor = next(ours.data_provider).to(device)
        sides = [(stock, times.baseline), (ours, times.ours)]
        for trainer, into in sides if step % 2 == 0 else sides[::-1]:
            into.append(timing.seconds(partial(trainer.step, batch), device))
            trainer.n_training_steps += 1
            spent += into[-1]
        if spent > limit:
            break
    return timing.Times(times.baseline[WARM:], times.ours[WARM:])


@torch.no_grad()
def _fvu(sae: Any, held: Tensor) -> float:
    missing = sum(float((part - sae(part)).square().sum()) for part in held.split(1024))
    return missing / float((held - held.mean(0)).square().sum())
