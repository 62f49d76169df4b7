"""Sums over the active latents of each token, without the latents that are off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_dot(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """x[i] · rows[index[i, j]] for x [n, d], rows [m, d], index [n, k]: [n, k].

    It is the derivative of x[i] · ``weighted_rows`` by its weights, which torch computes without
    copying the rows.
    """
    with torch.enable_grad():
        weight = torch.zeros(index.shape, dtype=x.dtype, device=x.device, requires_grad=True)
        sums = weighted_rows(index, rows.detach(), weight)
        return torch.autograd.grad(sums, weight, x.detach())[0]


def weighted_rows(index: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Σ_j weight[i, j] · rows[index[i, j]]: [n, d]."""
    return F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")


def weighted_sums(index: Tensor, rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """``weighted_rows`` for bags of any size: bag i is index[starts[i]:starts[i + 1]], all flat."""
    return F.embedding_bag(index, rows, starts, per_sample_weights=weight, mode="sum")
