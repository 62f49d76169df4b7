"""Toys that several tests share: a preset, activations with structure, and SAEs made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Tensor, nn

from darkmatter.models import activations
from darkmatter.models.activations import Activations
from darkmatter.presets import Preset
from darkmatter.saes import references
from darkmatter.saes.loaded import LoadedSAE
from darkmatter.survey import SurveyResult
from darkmatter.text.corpus import Corpus

D = 16
FIRST = 16  # the first kept position
SITE = "blocks.0.hook_resid_post"


def preset(**fields: Any) -> Preset:
    """A preset that no test runs a model of."""
    usual: dict[str, Any] = {"name": "tiny", "model": "toy", "device": "cpu", "site": SITE,
                             "saes": ("toy",), "bootstrap": 100, "contexts": 60,
                             "context_length": 64}
    return Preset(**(usual | fields))


def features(n: int, d: int = D, seed: int = 0) -> Tensor:
    """Rows x = μ + Σ w_i y_i + a little noise: sparse weights w_i ≥ 0 on 3d directions."""
    g = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(3 * d, d, generator=g), dim=1)
    sizes = torch.empty(n, 3 * d).exponential_(generator=g)
    weights = sizes * (torch.rand(n, 3 * d, generator=g) < 0.1)
    noise = 0.1 * torch.randn(n, d, generator=g)
    return 2 * weights @ directions + noise + torch.linspace(-1, 3, d)


def acts(x: Tensor | None = None, contexts: int = 60, sources: int = 30,
         lengths: Sequence[int] | None = None, seed: int = 0) -> Activations:
    """Activations [token, d] in contexts of ``sources``, all of one length or of ``lengths``."""
    rng = np.random.default_rng(seed)
    if x is None:
        x = features(sum(lengths) if lengths is not None else contexts * 40, seed=seed)
    counts = np.asarray(lengths if lengths is not None else [len(x) // contexts] * contexts)
    assert counts.sum() == len(x)
    context = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    position = np.concatenate([FIRST + np.arange(n) for n in counts]).astype(np.int32)
    tokens = rng.integers(1, 50, (len(counts), FIRST + int(counts.max()) + 1)).astype(np.int32)
    owner = np.sort(np.arange(len(counts)) % sources).astype(np.int32)
    names = tuple(f"{'plays' if i % 2 else 'news'}/{i}" for i in range(sources))
    stored = x.to(torch.bfloat16)
    content = stored.view(torch.uint8).numpy().tobytes() + counts.tobytes()
    key = hashlib.sha256(content).hexdigest()[:16]
    return Activations(stored, context, position, Corpus(tokens, owner, names), key)


class Formula(nn.Module):
    """An 'SAE' that reconstructs by any function of x; its latents are x itself."""

    def __init__(self, reconstruct: Callable[[Tensor], Tensor], d: int = D) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(d_in=d, d_sae=d)
        self.decode = reconstruct

    def encode(self, x: Tensor) -> Tensor:
        return x


def formula(name: str, reconstruct: Callable[[Tensor], Tensor], d: int = D) -> LoadedSAE:
    return loaded(name, Formula(reconstruct, d))


def loaded(name: str, sae: Any) -> LoadedSAE:
    return LoadedSAE(name, name, sae, {}, digest=name)


def topk(width: int = 32, k: int = 4, d: int = D, seed: int = 0, **config: Any) -> TopKSAE:
    """sae-lens's own TopK SAE with random weights, tied so that it reconstructs something."""
    g = torch.Generator().manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=width, k=k, **config))
    rows = nn.functional.normalize(torch.randn(width, d, generator=g), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows * (0.5 + torch.rand(width, 1, generator=g)))
        sae.W_enc.copy_(rows.T * 0.8)
        sae.b_enc.copy_(0.1 * torch.randn(width, generator=g))
        sae.b_dec.copy_(torch.linspace(-1, 3, d))
    return sae.eval()


def surveyed(monkeypatch: pytest.MonkeyPatch, stored: Activations, *saes: LoadedSAE
             ) -> tuple[str, ...]:
    """Let the survey find these activations and SAEs; returns the SAEs' references."""
    known = {sae.ref: sae for sae in saes}
    monkeypatch.setattr(activations, "evaluation", lambda preset, loaded=None: stored)
    monkeypatch.setattr(references, "load_sae", lambda ref, preset: known[ref])
    return tuple(known)


def metrics(result: SurveyResult, sae: str, protocol: str = "strict") -> pd.DataFrame:
    """The rows of one SAE under one protocol, by metric."""
    rows = result.rows
    return rows[(rows.sae == sae) & (rows.protocol == protocol)].set_index("metric")
