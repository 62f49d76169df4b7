"""What a survey will need before it starts: tokens, disk, memory and a rough time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import torch
from transformers import AutoConfig

from . import model
from .preset import Preset

SHARE_OF_PEAK = 0.4
"""How much of this machine's speed at one large product a whole forward pass reaches; a rough figure."""


def lines(preset: Preset) -> Iterator[str]:
    """The plan, a line at a time. Raises DarkmatterError when the model cannot be opened."""
    config = model._opened(preset, AutoConfig.from_pretrained)
    width, layers = config.hidden_size, min(config.num_hidden_layers, model.layer_of(preset.site) + 1)
    read, kept = preset.contexts * preset.context_length, preset.contexts * len(preset.kept)
    latents = sum(_latents(sae) for sae in preset.saes)
    yield f"text      {preset.contexts:,} contexts of {preset.context_length:,}: {read:,} tokens read"
    fit = round(kept * preset.fit_share)
    yield f"kept      {kept:,} tokens at most, about {fit:,} to fit and {kept - fit:,} to score"
    tables = kept * len(preset.saes) * 40
    yield f"cache     {kept * width * 2 / 1e6:,.0f} MB of activations, {tables / 1e6:,.0f} MB of tables"
    weights = 12 * layers * width**2
    gigabytes = (4 * weights + 8 * width * latents + 8 * 12 * width**2 * (1 + len(preset.saes))) / 1e9
    yield f"memory    about {2 + gigabytes:.1f} GB at the peak"
    operations = 2 * weights * read + 2 * width * kept * (latents + 3 * width * (1 + len(preset.saes)))
    minutes = operations / (SHARE_OF_PEAK * _speed(preset)) / 60
    yield f"time      about {minutes:.0f} minutes here to survey {len(preset.saes)} trained SAEs"


def _latents(sae: str) -> int:
    """Width that an SAE's name tells; 16,384 where it does not."""
    told = re.search(r"train:(\d+)|w(?:idth_)?(\d+)(k?)", sae)
    number = int(told[1] or told[2]) if told else 16_384
    return number * 1024 if told and told[3] else number


def _speed(preset: Preset) -> float:
    """Operations a second of one product in the model's type, measured here and now."""
    a = torch.ones(1024, 1024, dtype=getattr(torch, preset.dtype), device=model.device_of(preset))
    float((a @ a)[0, 0])
    begun = time.perf_counter()
    for _ in range(4):
        float((a @ a)[0, 0])
    return 4 * 2 * 1024**3 / (time.perf_counter() - begun)
