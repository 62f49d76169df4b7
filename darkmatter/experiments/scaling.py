"""Scaling with width (section 4): the power law of Figure 1, and slopes a doubling.

The authors fit FVU(W) = c + a W^(−m) by gradient descent to seven points. Here it is least squares,
exact in c and a for each m of a grid (variable projection). Its intervals hold other text (the
survey's bootstrap draws, the same sources for every SAE) and other SAEs (their scatter about the
curve, as far as the residuals tell).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import DarkmatterError
from ..regression import Draws

STEEPNESS = (0.01, 5.0)  # m is looked for between these


def ladder(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a survey's table at the L0 with most widths, one SAE a width, narrow to wide.

    L0 is what a TopK SAE is built for, else as measured; up to 20% off counts, as in the paper.
    """
    l0 = table["k"].astype(float).fillna(table["l0"])
    near = {centre: (l0 - centre).abs() <= 0.2 * centre for centre in l0}
    best = max(near, key=lambda centre: table.loc[near[centre], "width"].nunique())
    nearest = (l0[near[best]] - best).abs().sort_values(kind="stable").index
    return table.loc[nearest].drop_duplicates("width").sort_values("width")


@dataclass(frozen=True)
class PowerLaw:
    """FVU(W) = c + a W^(−m), fitted to SAEs of these widths and again to every draw of them."""

    widths: np.ndarray
    c: Draws
    a: Draws
    m: Draws

    def curve(self, widths: np.ndarray) -> list[Draws]:
        """The fitted FVU at each of some widths."""
        return [self.c + self.a * self.m.map(lambda m, w=float(width): w**-m) for width in widths]

    @property
    def doubt(self) -> str:
        """Why the constant c is not determined, as a clause; empty where it is."""
        first, last = self.curve(self.widths[[0, -1]])
        low, high, fall, lowest = self.c.low, self.c.high, (first - last).low, float(last)
        if len(self.widths) <= 3:
            return ("there are as many parameters as widths, so nothing is left to check the curve "
                    "with")
        if low is None or high is None or fall is None:
            return "there are too few held-out sources for an interval"
        if low <= 0.01 * lowest:
            return "its interval reaches zero"
        if fall <= 1e-6 * lowest:
            return "the fall of FVU with width is not clear of the scatter of the SAEs"
        wide = high - low > lowest / 2
        return "its interval is wider than half the lowest FVU" if wide else ""


def power_law(widths: np.ndarray, fvu: Sequence[Draws], seed: int = 0) -> PowerLaw:
    """Fit the FVU of SAEs of these widths, one Draws each.

    Raises DarkmatterError for fewer widths than parameters.
    """
    if len(set(widths)) < 3:
        raise DarkmatterError("A power law with a constant takes SAEs of 3 or more widths at one "
                              "L0.")
    values = np.stack([draws.values for draws in fvu], 1)  # [1 + n, widths]
    c, a, m = fit(widths, values[0])
    residuals = values[0] - c - a * np.asarray(widths, float) ** -m
    freedom, n = len(widths) - 3, len(values) - 1
    # Every draw is moved by a scatter as large as the residuals. With few of them its variance is
    # left open (χ²); with as many widths as parameters nothing is known of it.
    if freedom:
        rng = np.random.default_rng(seed)
        size = np.sqrt(np.square(residuals).sum() / rng.chisquare(freedom, (n, 1)))
        values[1:] += size * rng.standard_normal((n, len(widths)))
    first, *others = fvu
    fits = fit(widths, values).T
    c, a, m = (first.map(lambda *_, fitted=fitted: fitted, *others) for fitted in fits)
    return PowerLaw(np.asarray(widths), c, a, m)


def fit(widths: np.ndarray, fvu: np.ndarray) -> np.ndarray:
    """c, a, m [..., 3] of the best curve through fvu [..., widths], with c, a ≥ 0, m in STEEPNESS.

    For one m the best c and a are a regression on W^(−m), so only m is searched, three times ever
    finer. With c + b (W/W₀)^(−m), W₀ the geometric mean: a moves by orders of magnitude with m, b
    does not.
    """
    u, (low, high), fvu = np.log(widths), np.log(STEEPNESS), fvu[..., None, :]
    log_m, step = np.full(fvu.shape[:-1], (low + high) / 2), (high - low) / 200
    for finer in (1, 50, 2500):
        m = np.exp(np.clip(log_m + step / finer * np.arange(-100, 101), low, high))
        power = np.exp(-m[..., None] * (u - u.mean()))  # [..., m, widths]
        around = power - power.mean(-1, keepdims=True)
        b = (around * fvu).sum(-1).clip(0) / np.square(around).sum(-1)
        c = fvu.mean(-1) - b * power.mean(-1)
        # Where c would be negative it is 0, and b a regression through the origin.
        b = np.where(c < 0, (power * fvu).sum(-1).clip(0) / np.square(power).sum(-1), b)
        left = np.square(c.clip(0)[..., None] + b[..., None] * power - fvu).sum(-1)
        best = left.argmin(-1)[..., None]
        c, b, m = (np.take_along_axis(grid, best, -1) for grid in (c.clip(0), b, m))
        log_m = np.log(m)
    return np.concatenate([c, b * np.exp(m * u.mean()), m], -1)


def slope(widths: np.ndarray, values: Sequence[Draws]) -> Draws:
    """Change with each doubling of the width, by least squares, of one value a width."""
    x = np.log2(widths) - np.log2(widths).mean()
    return sum((value * float(weight) for value, weight in zip(values, x / (x @ x), strict=True)),
               values[0] * 0)


def slope_ratio(widths: np.ndarray, fvu: Sequence[Draws], fvu_nonlinear: Sequence[Draws]
                ) -> tuple[float | None, float | None, float | None]:
    """Slope of FVU_nonlinear over that of FVU: value, low, high.

    The interval also holds what comes out with any one SAE left out.
    """
    def ratio(left_out: int | None = None) -> Draws:
        kept = [i for i in range(len(widths)) if i != left_out]
        top, bottom = ([values[i] for i in kept] for values in (fvu_nonlinear, fvu))
        return slope(widths[kept], top) / slope(widths[kept], bottom)

    whole = ratio()
    if whole.low is None or whole.high is None:
        return whole.value, None, None
    others = [float(ratio(i)) for i in range(len(widths))]
    return whole.value, min(whole.low, *others), max(whole.high, *others)
