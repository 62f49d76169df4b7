"""An SAE that is open: its reconstruction, its codes, and a digest of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import TopKSAE
from torch import Tensor

from .. import cache
from .kernels import weighted_rows


@dataclass(frozen=True)
class LoadedSAE:
    """An SAE with its name and how it was made."""

    ref: str
    name: str
    sae: Any
    """``sae_lens.SAE``, float32, in evaluation mode."""
    record: dict[str, Any]
    """How it was trained, as far as it is known."""
    digest: str
    """Changes with the weights."""

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    @property
    def k(self) -> int | None:
        """The L0 that a TopK SAE is built for; None for others."""
        return getattr(self.sae.cfg, "k", None)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and their activations, index and value [n, ·], of x [n, d_in] float32.

        A value of 0 is an inactive latent.
        """
        if plain_topk(self.sae):
            centred = x - self.sae.b_dec if self.sae.cfg.apply_b_dec_to_input else x
            scores = torch.addmm(self.sae.b_enc, centred, self.sae.W_enc)
            value, index = scores.topk(self.sae.cfg.k)
            return index, value.relu()
        latents = self.sae.encode(x)
        most = int((latents != 0).sum(1).max())
        index = latents.abs().topk(most, dim=1).indices
        return index, latents.gather(1, index)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sae(x) [n, d_in], L0 [n] and which latents fired [d_sae], for x [n, d_in]."""
        x = x.float()
        if not plain_topk(self.sae):
            latents = self.sae.encode(x)
            return self.sae.decode(latents), (latents != 0).sum(1), (latents != 0).any(0)
        index, value = self.encode(x)
        fired = torch.zeros(self.width, dtype=torch.bool, device=x.device)
        fired[index[value > 0]] = True
        rebuilt = weighted_rows(index, self.sae.W_dec, value) + self.sae.b_dec
        return rebuilt, (value > 0).sum(1), fired


def plain_topk(sae: Any) -> bool:
    """Whether an SAE is TopK and no more, so that its k active latents are all it needs."""
    cfg = sae.cfg
    return (type(sae) is TopKSAE and cfg.normalize_activations == "none"
            and not sae.hook_z_reshaping_mode and not cfg.rescale_acts_by_decoder_norm)


def digest(sae: Any) -> str:
    """16 hex digits over an SAE's configuration and weights."""
    def of_bytes(values: Tensor) -> str:
        plain = values.detach().cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.sha256(plain.tobytes()).hexdigest()

    state = {name: of_bytes(values) for name, values in sae.state_dict().items()}
    return cache.key(config=sae.cfg.to_dict(), **state)
