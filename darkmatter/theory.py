"""What the norm prediction test should find: sums of sparse weights, dense vectors, and both in simulation (section 5).

For v = Σ wᵢ yᵢ with orthonormal yᵢ and independent weights, ‖v‖² = Σ wᵢ² and the best linear prediction of it is
a*ᵀyᵢ = Cov(wᵢ, wᵢ²) / Var(wᵢ). Where all weights follow one law, R² = corr(w, w²)². This derivation is the book's own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from . import regression
from .errors import DarkmatterError
from .pertoken import Rows, predict, r2

LAWS: dict[str, Any] = {  # of the size of an active weight
    "binary": stats.rv_discrete(values=([1], [1.0])), "uniform": stats.uniform(), "half-normal": stats.halfnorm(),
    "exponential": stats.expon(),
}
BLOCKS = 50  # of simulated rows: the unit of their intervals


def sparse_r2(law: Any, p: float, signed: bool = False) -> float:
    """R² = Cov(w, w²)² / (Var(w) Var(w²)) of a weight that is 0 except with probability ``p``, then drawn from ``law``.

    ``law``: a frozen scipy distribution of non-negative numbers. ``signed``: the weight has a random sign, so that
    Cov(w, w²) = E[w³] = 0. NaN where the weight does not vary. Raises DarkmatterError unless 0 < p ≤ 1.
    """
    if not 0 < p <= 1:
        raise DarkmatterError(f"The probability that a weight is active is {p}; it must lie above 0 and up to 1.")
    one, two, three, four = (p * float(law.moment(k)) for k in (1, 2, 3, 4))
    return moments_r2(*((0.0, two, 0.0, four) if signed else (one, two, three, four)))


def moments_r2(one: float, two: float, three: float, four: float) -> float:
    """corr(w, w²)² from E[w], E[w²], E[w³] and E[w⁴]."""
    spread = (two - one**2) * (four - two**2)
    return (three - one * two) ** 2 / spread if spread > 1e-12 * two * four else math.nan


def gaussian_r2(mean: Tensor, covariance: Tensor) -> float:
    """R² of ‖v‖² regressed on a Gaussian v itself: 4 mᵀCm / (4 mᵀCm + 2 tr C²); 0 without a mean.

    ‖v‖² = ‖m‖² + 2 mᵀ(v − m) + ‖v − m‖²; the second term is linear, the third uncorrelated with v.
    """
    mean, covariance = mean.double(), covariance.double()
    linear = 4 * float(mean @ covariance @ mean)
    return linear / (linear + 2 * float(covariance.square().sum()))


def sparse_sum(law: Any, p: float, directions: Tensor, n: int, seed: int = 0, signed: bool = False) -> Tensor:
    """n draws of Σ wᵢ yᵢ, float32 [n, d]: independent weights as in ``sparse_r2``, yᵢ the rows of ``directions``."""
    rng, shape = np.random.default_rng(seed), (n, len(directions))
    weights = np.where(rng.random(shape) < p, law.rvs(size=shape, random_state=rng), 0)
    if signed:
        weights *= rng.choice([-1, 1], shape)
    return torch.from_numpy(weights).float() @ directions.float()


def orthonormal(d: int, seed: int = 0) -> Tensor:
    """d random orthonormal directions of d dimensions, one a row."""
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def norm_test(v: Tensor, x: Tensor | None = None, seed: int = 0) -> regression.Draws:
    """The test on independent rows: held-out R² of ‖v‖² from x [n, d] (left out: from v itself), with its interval."""
    n, x = len(v), v if x is None else x
    block = torch.arange(n) * BLOCKS // n
    ids = np.arange(BLOCKS)
    rows = Rows(torch.from_numpy(regression.split(ids, seed=seed))[block], block, ids, 200, seed)
    target = regression.squared_norm(v)[:, None]
    draws = r2(target, predict(x.__getitem__, target, rows), rows)
    return regression.Draws(draws[:, 0], rows.effective, int((~rows.fit).sum()), BLOCKS)
