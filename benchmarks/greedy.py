"""Row 'pursuit': gradient pursuit on gathered atoms, against a dense weight for every atom.

The dense rule is the paper's (section 6.1): each step adds the atom of largest inner product with
the residual, moves all chosen weights by one exact step along the gradient, and clips them at zero;
every product runs over the whole dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from darkmatter.experiments import pursuit

from . import data, timing

SAME = 0.98  # of the tokens: float32 sums of another order decide some near ties otherwise


@torch.no_grad()
def dense(x: Tensor, atoms: Tensor, steps: int) -> Tensor:
    """Weights [n, m] of x [n, d] on atoms [m, d]."""
    weight, token = x.new_zeros(len(x), len(atoms)), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        residual = x - weight @ atoms
        product = residual @ atoms.T
        chosen = weight != 0
        chosen[token, product.argmax(1)] = True
        gradient = product * chosen
        move = gradient @ atoms
        step = (move * residual).sum(1) / move.square().sum(1).clamp(min=1e-30)
        weight = (weight + step[:, None] * gradient).relu()
    return weight


def run(device: str, tokens: int, d: int, width: int, k: int,
        pairs: int, limit: float) -> dict[str, Any]:
    """``tokens`` activations coded with ``k`` steps; the baseline takes all tokens at once."""
    atoms = data.atoms(width, d, device)
    x = data.sparse_rows(tokens, atoms, 2 * k)

    def baseline() -> Tensor:
        return dense(x, atoms, k)

    def ours() -> pursuit.Code:
        return pursuit.pursue(x, atoms, k)

    code, plain = ours(), baseline()
    spread = torch.zeros_like(plain).scatter_add_(1, code.index, code.weight)
    same = ((spread != 0) == (plain != 0)).all(1)
    left = [float((x - w @ atoms).square().sum() / x.square().sum()) for w in (spread, plain)]
    if float(same.float().mean()) < SAME or abs(left[0] - left[1]) > 1e-3:
        raise ValueError(f"Only {float(same.float().mean()):.1%} of the tokens have the same "
                         f"atoms; left over: {left}.")
    del spread, plain
    times = timing.pairs(baseline, ours, device, pairs, limit)
    found = times.fields()
    return found | {"same_atoms": float(same.float().mean()), "left_over": left,
                    "tokens_a_second": tokens / found["ours_seconds"],
                    "floor_tokens_a_second": tokens / _floor(x, atoms, k, device)}


def _floor(x: Tensor, atoms: Tensor, k: int, device: str) -> float:
    """Seconds of the inner products alone, k times over."""

    def work() -> None:
        for part in x.split(pursuit.ROWS):
            for _ in range(k):
                torch.matmul(part, atoms.T)

    work()
    return timing.seconds(work, device)
