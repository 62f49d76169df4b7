"""Row 'cross-entropy': other vectors in the place of x, against a full forward pass for each.

The bound is what the variants share once, and the rest once a variant, timed alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkmatter import presets
from darkmatter.experiments import downstream
from darkmatter.models import model
from darkmatter.text import corpus

from . import data, timing

CLOSE = {"float32": 1e-4, "bfloat16": 0.02}  # of the mean loss in nats: the type's rounding
VARIANTS = 4  # x, Sae(x), and Sae(x) with each part of the error given back


@torch.inference_mode()
def full(loaded: model.LoadedModel, site: str, tokens: np.ndarray,
         kept: np.ndarray, vectors: Tensor) -> Tensor:
    """Losses [variant, n] from one forward pass of the whole model a variant, with all logits."""
    device = next(loaded.bridge.original_model.parameters()).device
    ids, where = (torch.as_tensor(numbers, dtype=torch.long, device=device)
                  for numbers in (tokens, kept))
    found = []
    for variant in vectors.to(device):
        def put(value: Tensor, hook: Any, variant: Tensor = variant) -> Tensor:
            value = value.clone()
            value[0, where] = variant.to(value.dtype)
            return value

        logits = loaded.bridge.run_with_hooks(ids[None], fwd_hooks=[(site, put)],
                                              return_type="logits")[0, where]
        found.append(torch.nn.functional.cross_entropy(logits.float(),
                                                       ids[where + 1], reduction="none"))
    return torch.stack(found).cpu()


def run(device: str, source: str, positions: int, pairs: int, limit: float) -> dict[str, Any]:
    """One context of the preset ``source``; its first ``positions`` kept tokens are replaced."""
    preset = presets.load(source, device=device)
    loaded = model.load(preset)
    tokens = corpus.evaluation(preset, loaded.tokenizer).tokens[0]
    kept = np.flatnonzero(model.kept(loaded.tokenizer, tokens[None],
                                     preset.first_kept)[0])[:positions]
    x = model.capture(loaded, tokens[None], [preset.site])[preset.site][0, kept].float()
    noise = torch.randn((VARIANTS, *x.shape), generator=data.generator(0, "cpu")).to(x.device)
    shares = torch.linspace(0, 0.3, VARIANTS, device=x.device)[:, None, None]
    vectors = x + shares * noise * x.std(0)

    def baseline() -> Tensor:
        return full(loaded, preset.site, tokens, kept, vectors)

    def ours(some: Tensor = vectors) -> Tensor:
        return downstream.losses(loaded, preset.site, tokens, kept, some)

    off = float((baseline().mean(1) - ours().mean(1)).abs().max())
    if not off < CLOSE[model.dtype_of(preset)]:
        raise ValueError(f"The two sides differ by {off:.3g} nats in the mean loss.")
    times = timing.pairs(baseline, ours, device, pairs, limit)
    bound = downstream.bound(loaded, preset.site, tokens, kept, vectors,
                             lambda work: sorted(timing.seconds(work, device) for _ in range(3))[1])
    found = times.fields()
    return found | {"difference": off, "bound_seconds": bound,
                    "above_bound": found["ours_seconds"] / bound,
                    "bound_ratio": found["baseline_seconds"] / bound}
