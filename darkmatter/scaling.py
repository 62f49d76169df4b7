"""Scaling with width (section 4): the power law of Figure 1, and slopes a doubling.

The authors fit FVU(W) = c + a W^(−m) by gradient descent to seven points. Here it is least squares, exact in c
and a for each m of a grid (variable projection). Its intervals hold other text (the survey's bootstrap draws, the
same sources for every SAE) and other SAEs (their scatter about the curve, as far as the residuals tell).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from . import regression
from .errors import DarkmatterError
from .preset import Preset
from .survey import SurveyResult

STEEPNESS = (0.01, 5.0)  # m is looked for between these


class Draws(NamedTuple):
    """FVU and FVU_nonlinear, float64 [1 + n, SAEs]: as measured, then on n draws of the held-out sources."""

    fvu: np.ndarray
    fvu_nonlinear: np.ndarray
    effective: float  # what the held-out sources are worth in sources of equal size


def estimate(draws: np.ndarray, effective: float) -> tuple[float, float | None, float | None]:
    """A value and its 95% interval, from draws [1 + n] as in `Draws`."""
    low, high = regression.interval(torch.from_numpy(draws[1:].copy()), effective)
    return float(draws[0]), low, high


def ladder(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a survey's table at the L0 with most widths, one SAE a width, narrow to wide.

    L0 is what a TopK SAE is built for, else as measured; up to 20% off counts, as in the paper.
    """
    l0 = table["k"].astype(float).fillna(table["l0"])
    near = {centre: (l0 - centre).abs() <= 0.2 * centre for centre in l0}
    best = max(near, key=lambda centre: table.loc[near[centre], "width"].nunique())
    nearest = (l0[near[best]] - best).abs().sort_values(kind="stable").index
    return table.loc[nearest].drop_duplicates("width").sort_values("width")


def draws(preset: Preset, result: SurveyResult, saes: Sequence[str]) -> Draws:
    """FVU and FVU_nonlinear of some SAEs of a survey, with their draws.

    Draw i has the same sources for every SAE, so that differences between SAEs can be taken draw by draw.
    """
    found = {metric: [result.draws(sae, metric) for sae in saes] for metric in ("fvu", "fvu_nonlinear")}
    stacked = {metric: np.stack([each.values for each in some], 1) for metric, some in found.items()}
    return Draws(**stacked, effective=found["fvu"][0].effective)


@dataclass(frozen=True)
class PowerLaw:
    """FVU(W) = c + a W^(−m) fitted to SAEs of some widths, and to every draw of them: c, a, m [1 + n]."""

    widths: np.ndarray
    c: np.ndarray
    a: np.ndarray
    m: np.ndarray
    effective: float

    def curve(self, widths: np.ndarray) -> np.ndarray:
        """The fitted FVU at some widths, [1 + n, widths]."""
        return self.c[:, None] + self.a[:, None] * np.asarray(widths, float) ** -self.m[:, None]

    @property
    def doubt(self) -> str:
        """Why the constant c is not determined, as a clause; empty where it is."""
        ends = self.curve(self.widths[[0, -1]])
        (_, low, high), lowest = estimate(self.c, self.effective), ends[0, 1]
        _, fall, _ = estimate(ends[:, 0] - ends[:, 1], self.effective)
        if len(self.widths) <= 3:
            return "there are as many parameters as widths, so nothing is left to check the curve with"
        if low is None or high is None or fall is None:
            return "there are too few held-out sources for an interval"
        if low <= 0.01 * lowest:
            return "its interval reaches zero"
        wide = "its interval is wider than half the lowest FVU" if high - low > lowest / 2 else ""
        return "the fall of FVU with width is not clear of the scatter of the SAEs" if fall <= 1e-6 * lowest else wide


def power_law(widths: np.ndarray, draws: Draws, seed: int = 0) -> PowerLaw:
    """Fit the FVU of SAEs of these widths. Raises DarkmatterError for fewer widths than parameters."""
    if len(set(widths)) < 3:
        raise DarkmatterError("A power law with a constant takes SAEs of 3 or more widths at one L0.")
    c, a, m = fit(widths, draws.fvu[0])
    residuals = draws.fvu[0] - c - a * np.asarray(widths, float) ** -m
    fvu, freedom, n = draws.fvu.copy(), len(widths) - 3, len(draws.fvu) - 1
    if freedom:  # else nothing is known of the scatter; with few residuals its variance is left open (χ²)
        rng = np.random.default_rng(seed)
        size = np.sqrt(np.square(residuals).sum() / rng.chisquare(freedom, (n, 1)))
        fvu[1:] += size * rng.standard_normal((n, len(widths)))
    c, a, m = fit(widths, fvu).T
    return PowerLaw(np.asarray(widths), c, a, m, draws.effective)


def fit(widths: np.ndarray, fvu: np.ndarray) -> np.ndarray:
    """c, a, m [..., 3] of the least squares curve through fvu [..., widths], with c, a ≥ 0 and m in STEEPNESS.

    For one m the best c and a are a regression on W^(−m), so only m is searched, three times ever finer. With
    c + b (W/W₀)^(−m), W₀ the geometric mean: a moves by orders of magnitude with m, b does not.
    """
    u, (low, high), fvu = np.log(widths), np.log(STEEPNESS), fvu[..., None, :]
    log_m, step = np.full(fvu.shape[:-1], (low + high) / 2), (high - low) / 200
    for finer in (1, 50, 2500):
        m = np.exp(np.clip(log_m + step / finer * np.arange(-100, 101), low, high))
        power = np.exp(-m[..., None] * (u - u.mean()))  # [..., m, widths]
        around = power - power.mean(-1, keepdims=True)
        b = (around * fvu).sum(-1).clip(0) / np.square(around).sum(-1)
        c = fvu.mean(-1) - b * power.mean(-1)
        b = np.where(c < 0, (power * fvu).sum(-1).clip(0) / np.square(power).sum(-1), b)
        left = np.square(c.clip(0)[..., None] + b[..., None] * power - fvu).sum(-1)
        best = left.argmin(-1)[..., None]
        c, b, m = (np.take_along_axis(each, best, -1) for each in (c.clip(0), b, m))
        log_m = np.log(m)
    return np.concatenate([c, b * np.exp(m * u.mean()), m], -1)


def slopes(widths: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Change a doubling of the width, by least squares, of values [1 + n, widths]: [1 + n]."""
    x = np.log2(widths) - np.log2(widths).mean()
    return values @ x / (x @ x)


def slope_ratio(widths: np.ndarray, draws: Draws) -> tuple[float, float | None, float | None]:
    """Slope of FVU_nonlinear over that of FVU; the interval also holds what comes out with any one SAE left out."""
    def ratio(kept: np.ndarray) -> np.ndarray:
        return slopes(widths[kept], draws.fvu_nonlinear[:, kept]) / slopes(widths[kept], draws.fvu[:, kept])

    every = np.arange(len(widths))
    value, low, high = estimate(ratio(every), draws.effective)
    if low is None or high is None:
        return value, None, None
    others = [float(ratio(every != i)[0]) for i in every]
    return value, min(low, *others), max(high, *others)
