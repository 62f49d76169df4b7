"""What the norm prediction test should find, by formula and in simulation (section 5).

For v = Σ wᵢ yᵢ with orthonormal yᵢ and independent weights, ‖v‖² = Σ wᵢ² and the best linear
prediction of it is a*ᵀyᵢ = Cov(wᵢ, wᵢ²) / Var(wᵢ). Where all weights follow one law,
R² = corr(w, w²)². This derivation is the book's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse, stats
from torch import Tensor

from ..errors import DarkmatterError
from ..regression import Draws, drawn, probe, resample, split, squared_norm

LAWS: dict[str, Any] = {  # of the size of an active weight
    "binary": stats.rv_discrete(values=([1], [1.0])), "uniform": stats.uniform(),
    "half-normal": stats.halfnorm(), "exponential": stats.expon(),
}
SOURCES = 50  # that simulated rows are divided into: the unit of their intervals


def sparse_r2(law: Any, p: float, signed: bool = False) -> float:
    """R² = Cov(w, w²)² / (Var(w) Var(w²)) of a weight: 0, but with probability ``p`` of ``law``.

    ``law``: a frozen scipy distribution of non-negative numbers. ``signed``: the weight has a
    random sign, so that Cov(w, w²) = E[w³] = 0. NaN where the weight does not vary. Raises
    DarkmatterError unless 0 < p ≤ 1.
    """
    if not 0 < p <= 1:
        raise DarkmatterError(f"The probability that a weight is active is {p}; it must lie above "
                              "0 and up to 1.")
    one, two, three, four = (p * float(law.moment(k)) for k in (1, 2, 3, 4))
    if signed:
        one, three = 0.0, 0.0
    spread = (two - one**2) * (four - two**2)
    return (three - one * two) ** 2 / spread if spread > 1e-12 * two * four else math.nan


def gaussian_r2(mean: Tensor, covariance: Tensor) -> float:
    """R² of ‖v‖² regressed on a Gaussian v itself: 4 mᵀCm / (4 mᵀCm + 2 tr C²); 0 without a mean.

    ‖v‖² = ‖m‖² + 2 mᵀ(v − m) + ‖v − m‖²; the second term is linear, the third uncorrelated with v.
    """
    mean, covariance = mean.double(), covariance.double()
    linear = 4 * float(mean @ covariance @ mean)
    return linear / (linear + 2 * float(covariance.square().sum()))


def sparse_sum(law: Any, p: float, directions: Tensor, n: int, seed: int = 0,
               signed: bool = False) -> Tensor:
    """n draws of Σ wᵢ yᵢ, float32 [n, d]: wᵢ as in ``sparse_r2``, yᵢ the rows of ``directions``."""
    rng, shape = np.random.default_rng(seed), (n, len(directions))
    weights = np.where(rng.random(shape) < p, law.rvs(size=shape, random_state=rng), 0)
    if signed:
        weights *= rng.choice([-1, 1], shape)
    return torch.from_numpy(weights).float() @ directions.float()


def orthonormal(d: int, seed: int = 0) -> Tensor:
    """d random orthonormal directions of d dimensions, one a row."""
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def norm_test(v: Tensor, x: Tensor | None = None, seed: int = 0) -> Draws:
    """The test on independent rows: held-out R² of ‖v‖² from x [n, d] (left out: from v itself)."""
    source = torch.arange(len(v)) * SOURCES // len(v)
    sources = np.arange(SOURCES)
    fit = torch.from_numpy(split(sources, seed=seed))[source]
    rows = probe.Rows(fit, source, sources, 200, seed)
    return probe.held_out_r2(v if x is None else x, squared_norm(v)[:, None], rows)[0]


@dataclass(frozen=True, eq=False)
class Along:
    """The probe for ‖v‖² along the directions of latents, and how active they are (Figure 14)."""

    probe: np.ndarray
    """float64 [latent]: a*ᵀy, with a* fitted from v = Σ w y to ‖v‖²."""
    activity: np.ndarray
    """float64 [latent]: the mean of w over the held-out tokens on which it is active."""
    expected: np.ndarray
    """float64 [latent]: Cov(w, w²) / Var(w), what the probe would be for independent latents."""
    correlation: Draws
    """Of ``probe`` with ``activity`` over the latents; a* and the latents are held fixed."""
    r2: Draws
    """How well the probe predicts ‖v‖²."""


def along_latents(weights: sparse.csr_array, directions: Tensor, rows: probe.Rows,
                  most: int = 1000, least: int = 20) -> Along | None:
    """Fit the norm test of v = Σ w y on itself; look along the latents that are active most often.

    ``weights``: activities w [token, latent]; ``directions``: y [latent, d], of length 1. ``most``
    latents, each active on at least ``least`` held-out tokens; None for fewer than three.
    """
    # The norm test of v on itself.
    def v(block: slice) -> Tensor:
        return torch.from_numpy(weights[block] @ directions.numpy())

    norm2 = torch.cat([squared_norm(v(block)) for block in probe.blocks(len(rows.fit))])[:, None]
    fitted = probe.fit(v, norm2, rows)
    predicted = torch.cat([fitted(v(block).double()) for block in probe.blocks(len(norm2))])

    # Which latents, and the moments of their weights.
    held = weights[rows.held.numpy()]
    often = (held > 0).sum(0)
    chosen = np.argsort(-often, kind="stable")[:most]
    chosen = chosen[often[chosen] >= least]
    if len(chosen) < 3:
        return None
    held = held[:, chosen]
    one, two, three = (held.power(k).mean(0) for k in (1, 2, 3))

    # Their mean activity where active, by source, and on every draw of the sources.
    group = rows.group[rows.held].numpy()
    places = (np.ones(len(group)), (group, np.arange(len(group))))
    membership = sparse.csr_array(places, shape=(len(rows.cluster), len(group)))
    sums = {"n": membership.sum(1), "w": (membership @ held).toarray(),
            "active": (membership @ (held > 0)).toarray()}
    counted = {key: torch.from_numpy(np.asarray(total, float)) for key, total in sums.items()}
    totals = resample(counted, rows.cluster, rows.bootstrap, rows.seed)
    activity = (totals["w"] / totals["active"]).numpy()
    along = (directions.double() @ fitted.weight)[chosen, 0].numpy()
    values = torch.tensor([_correlation(along, draw) for draw in activity])
    return Along(along, activity[0], (three - one * two) / (two - one**2), drawn(totals, values),
                 probe.r2(norm2, predicted, rows)[0])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Over the latents that have a value in b: on some draws one may be active nowhere."""
    known = np.isfinite(b)
    return float(np.corrcoef(a[known], b[known])[0, 1]) if known.sum() > 2 else math.nan
