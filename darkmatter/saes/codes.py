"""Sparse codes on disk: which latents of an SAE fire on each kept token, and how strongly.

The encoder is most of the work, so it runs once for each SAE and text; every later pass decodes
from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import cache, progress
from .kernels import weighted_sums

if TYPE_CHECKING:
    from ..models.activations import Activations
    from .loaded import LoadedSAE

BLOCK = 4096  # tokens encoded at once, at most
DENSE = {"cpu": 2**22, "cuda": 2**27}  # dense latents at once, at most; few would leave a GPU idle


@dataclass(frozen=True)
class Codes:
    """The active latents of every kept token, one after another, read from disk when asked for."""

    folder: Path
    """Holds index.i32, the latents, and value.f32, their activations: one number an active latent
    of a token."""
    starts: np.ndarray
    """int64 [token + 1]: where each token's begin."""

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of some tokens as ``embedding_bag`` takes them.

        index int32 and value float32 [active], and starts int32 [rows], which begins at 0.
        """
        begin, end = int(self.starts[rows.start]), int(self.starts[rows.stop])
        index, value = (torch.from_numpy(np.fromfile(self.folder / name, kind, end - begin,
                                                     offset=4 * begin))
                        for name, kind in (("index.i32", np.int32), ("value.f32", np.float32)))
        return index, value, torch.from_numpy(self.starts[rows.start:rows.stop] - begin).int()

    def through(self, sae: LoadedSAE, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the SAE itself gives for some tokens, on its device.

        Sae(x) float32 [rows, d_in], L0 int64 [rows], and which latents fired, bool [width].
        """
        index, value, starts = (part.to(sae.sae.W_dec.device) for part in self.part(rows))
        fired = torch.zeros(sae.width, dtype=torch.bool, device=index.device)
        fired[index.long()] = True
        l0 = torch.from_numpy(np.diff(self.starts[rows.start:rows.stop + 1]))
        return _decoded(sae, index, value, starts), l0, fired

    def decode(self, sae: LoadedSAE, rows: slice) -> Tensor:
        """Sae(x) of some tokens, float32 [rows, d_in], on the SAE's device."""
        return self.through(sae, rows)[0]


def of(sae: LoadedSAE, acts: Activations) -> Codes | None:
    """The SAE's codes of the kept tokens, made once.

    None for an SAE whose output is not Σ value · W_dec + b_dec.
    """
    return _stored(sae, acts) if _is_linear(sae, acts.x[:64]) else None


def _stored(sae: LoadedSAE, acts: Activations) -> Codes:
    key = cache.key(acts=acts.key, sae=sae.digest, version=1)
    folder = cache.root() / "codes" / key
    with cache.lock(key):
        if not cache.intact(folder):
            with cache.atomic(folder) as temporary:
                _write(sae, acts, temporary)
                cache.seal(temporary)
    return Codes(folder, np.load(folder / "starts.npy"))


@torch.no_grad()
def _is_linear(sae: LoadedSAE, x: Tensor) -> bool:
    """Whether decoding is linear in the latents, tried on x [n, d_in]: some SAEs rescale rows."""
    if not hasattr(sae.sae, "W_dec"):
        return False
    x = x.to(sae.sae.W_dec.device).float()
    plain = _decoded(sae, *_encode(sae, x))
    return torch.allclose(plain, sae(x)[0], rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@torch.no_grad()
def _write(sae: LoadedSAE, acts: Activations, folder: Path) -> None:
    folder.mkdir()
    device = sae.sae.W_dec.device
    step = max(1, min(BLOCK, DENSE.get(device.type, DENSE["cpu"]) // sae.width))
    counts = []
    with (folder / "index.i32").open("wb") as indices, (folder / "value.f32").open("wb") as values:
        for begin in progress.bar(range(0, len(acts.x), step), f"codes of {sae.name}", "blocks"):
            index, value, starts = _encode(sae, acts.read(slice(begin, begin + step), device))
            indices.write(index.cpu().numpy().tobytes())
            values.write(value.cpu().numpy().tobytes())
            counts.append(np.diff(starts.cpu().numpy(), append=len(index)))
    np.save(folder / "starts.npy", np.concatenate([[0], *counts]).cumsum())


def _encode(sae: LoadedSAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """index int32 [active], value [active] and starts int32 [n] of x [n, d_in]."""
    if sae.k is None:  # any number of latents may fire: take them from the dense ones
        value = sae.sae.encode(x)
        index = torch.arange(value.shape[1], device=x.device).expand_as(value)
    else:
        index, value = sae.encode(x)
    active = value != 0
    counts = active.sum(1)
    return index[active].int(), value[active], (counts.cumsum(0) - counts).int()


def _decoded(sae: LoadedSAE, index: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """Σ value · W_dec + b_dec of each token: float32 [n, d_in]."""
    return weighted_sums(index, sae.sae.W_dec.data, value, starts) + sae.sae.b_dec.data
