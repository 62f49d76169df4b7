"""Sparse codes on disk: which latents of an SAE fire on each kept token, and how strongly.

The encoder is most of the work, so it runs once for each SAE and text; every later pass decodes from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import cache, progress
from .activations import Activations
from .saes import LoadedSAE
from .topk import weighted_sums

ROWS = 4096  # tokens encoded at once, at most
DENSE = {"cpu": 2**22, "cuda": 2**27}  # dense latents in memory at once, at most: small blocks would leave a GPU idle


@dataclass(frozen=True)
class Codes:
    """The active latents of every kept token, one after another, read from disk as they are asked for."""

    folder: Path
    """Holds index.i32, the latent, and value.f32, its activation: one number an active latent of a token."""
    starts: np.ndarray
    """int64 [token + 1]: where each token's begin."""

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """index int32, value float32 and starts (int32, from 0) of some tokens, as ``embedding_bag`` takes them."""
        begin, end = int(self.starts[rows.start]), int(self.starts[rows.stop])
        index, value = (torch.from_numpy(np.fromfile(self.folder / name, kind, end - begin, offset=4 * begin))
                        for name, kind in (("index.i32", np.int32), ("value.f32", np.float32)))
        return index, value, torch.from_numpy(self.starts[rows.start:rows.stop] - begin).int()

    def through(self, each: LoadedSAE, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the SAE itself gives for some tokens: Sae(x) float32 [rows, d_in], L0 [rows], which latents fired."""
        index, value, starts = (part.to(each.sae.W_dec.device) for part in self.part(rows))
        fired = torch.zeros(each.width, dtype=torch.bool, device=index.device)
        fired[index.long()] = True
        l0 = torch.from_numpy(np.diff(self.starts[rows.start:rows.stop + 1]))
        return weighted_sums(index, each.sae.W_dec.data, value, starts) + each.sae.b_dec.data, l0, fired

    def decode(self, each: LoadedSAE, rows: slice) -> Tensor:
        """Sae(x) of some tokens, float32 [rows, d_in], on the SAE's device."""
        return self.through(each, rows)[0]


def of(each: LoadedSAE, acts: Activations) -> Codes | None:
    """The SAE's codes of the kept tokens, made once; None for an SAE whose output is not Σ value · W_dec + b_dec."""
    linear = _is_linear(each, acts.x[:64])
    return _stored(each, acts) if linear else None


def _stored(each: LoadedSAE, acts: Activations) -> Codes:
    key = cache.key(acts=acts.key, sae=each.digest, version=1)
    folder = cache.root() / "codes" / key
    with cache.lock(key):
        if not cache.intact(folder):
            with cache.atomic(folder) as temporary:
                _write(each, acts, temporary)
                cache.seal(temporary)
    return Codes(folder, np.load(folder / "starts.npy"))


@torch.no_grad()
def _is_linear(each: LoadedSAE, x: Tensor) -> bool:
    """Whether decoding is linear in the latents, tried on a few tokens (some SAEs rescale each token's output)."""
    if not hasattr(each.sae, "W_dec"):
        return False
    x = x.to(each.sae.W_dec.device).float()
    index, value, starts = _encode(each, x)
    plain = weighted_sums(index, each.sae.W_dec.data, value, starts) + each.sae.b_dec.data
    return torch.allclose(plain, each(x)[0], rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@torch.no_grad()
def _write(each: LoadedSAE, acts: Activations, folder: Path) -> None:
    folder.mkdir()
    device = each.sae.W_dec.device
    counts, step = [], max(1, min(ROWS, DENSE.get(device.type, DENSE["cpu"]) // each.width))
    with (folder / "index.i32").open("wb") as indices, (folder / "value.f32").open("wb") as values:
        for begin in progress.bar(range(0, len(acts.x), step), f"codes of {each.name}", "blocks"):
            index, value, starts = _encode(each, acts.read(slice(begin, begin + step), device))
            indices.write(index.cpu().numpy().tobytes())
            values.write(value.cpu().numpy().tobytes())
            counts.append(np.diff(starts.cpu().numpy(), append=len(index)))
    np.save(folder / "starts.npy", np.concatenate([[0], *counts]).cumsum())


def _encode(each: LoadedSAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """index int32 [active], value [active] and starts int32 [n] of x [n, d_in]."""
    if each.k is None:  # any number of latents may fire: take them from the dense ones
        value = each.sae.encode(x)
        index = torch.arange(value.shape[1], device=x.device).expand_as(value)
    else:
        index, value = each.encode(x)
    active = value != 0
    counts = active.sum(1)
    return index[active].int(), value[active], (counts.cumsum(0) - counts).int()
