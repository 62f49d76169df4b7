"""Scaling with width (section 4): the power law of Figure 1, slopes a doubling, and what few points leave open.

The authors fit FVU(W) = c + a W^(−m) by gradient descent to seven points. Here it is bounded least squares from
several starts, every SAE counting the same. Intervals hold two things: other text (the survey's bootstrap draws,
the same sources for every SAE) and other SAEs (their scatter about the curve, as far as the residuals tell).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import least_squares

from . import regression
from .errors import DarkmatterError
from .preset import Preset
from .survey import ROWS, SurveyResult

PARAMETERS = ("c", "a", "m")
BOUNDS = ((0, 0, 0.01), (np.inf, np.inf, 5))  # of c, a, m: FVU is not negative and does not rise with width
STARTS = (0.1, 0.4, 1.5)  # of m


class Estimate(NamedTuple):
    """A value and its 95% interval, None where there is none."""

    value: float
    low: float | None
    high: float | None


class Draws(NamedTuple):
    """FVU and FVU_nonlinear, float64 [1 + n, SAEs]: as measured, then on n draws of the held-out sources."""

    fvu: np.ndarray
    fvu_nonlinear: np.ndarray
    effective: float  # what the held-out sources are worth in sources of equal size


def estimate(draws: np.ndarray, effective: float) -> Estimate:
    """From draws [1 + n]: the measured value, then n resamples worth ``effective`` sources each."""
    return Estimate(float(draws[0]), *regression.interval(torch.from_numpy(draws[1:].copy()), effective))


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
    """The draws behind the survey's intervals of FVU, by one more pass over the held-out rows.

    Draw i has the same sources for every SAE, so that differences between SAEs can be taken draw by draw.
    """
    acts, columns = result.acts, ["error_norm2", "nonlinear_norm2", "is_eval"]
    tokens = [result.tokens(sae)[columns] for sae in saes]
    rows = torch.from_numpy(np.flatnonzero(tokens[0]["is_eval"]))
    ids, contexts = torch.from_numpy(acts.context)[rows], len(acts.text.tokens)
    of_x, of_error = regression.Sums(contexts), regression.Sums(contexts)
    for some, owner in zip(rows.split(ROWS), ids.split(ROWS), strict=True):
        of_x.add_x(owner, acts.x[some].float())
    lengths = [torch.from_numpy(np.stack([each[name] for each in tokens], 1))[rows].sqrt() for name in columns[:2]]
    of_error.add_error(ids, *lengths)  # which sums their squares
    totals = regression.resample({**of_error, **of_x}, regression.clusters(acts.text.source), preset.bootstrap,
                                 preset.seed)
    one_over_variance = regression.fvu({**totals, "ee": torch.ones_like(totals["ee"][:, :1])})[:, None]
    fvu, nonlinear = ((totals[key] * one_over_variance).numpy() for key in ("ee", "rr"))
    return Draws(fvu, nonlinear, float(totals["effective"][0]))


@dataclass(frozen=True)
class PowerLaw:
    """FVU(W) = c + a W^(−m) fitted to SAEs of some widths, and to every draw of them."""

    widths: np.ndarray
    parameters: np.ndarray  # float64 [1 + n, 3]: c, a, m of the measured points, then of each draw
    effective: float

    def __getitem__(self, parameter: str) -> Estimate:
        """'c', 'a' or 'm' with its interval."""
        return estimate(self.parameters[:, PARAMETERS.index(parameter)], self.effective)

    def curve(self, widths: np.ndarray) -> np.ndarray:
        """The fitted FVU at some widths, [1 + n, widths]."""
        c, a, m = self.parameters.T[..., None]
        return c + a * np.asarray(widths, float) ** -m

    @property
    def doubt(self) -> str:
        """Why the constant c is not determined, as a clause; empty where it is."""
        c, ends = self["c"], self.curve(self.widths[[0, -1]])
        fall, lowest = estimate(ends[:, 0] - ends[:, 1], self.effective), ends[0, 1]
        if len(self.widths) <= len(PARAMETERS):
            return "there are as many parameters as widths, so nothing is left to check the curve with"
        if c.low is None or c.high is None or fall.low is None:
            return "there are too few held-out sources for an interval"
        if fall.low <= 1e-6 * lowest:
            return "FVU does not clearly fall with width"
        if c.low <= 0.01 * lowest:
            return "its interval reaches zero"
        return "its interval is wider than half the lowest FVU" if c.high - c.low > lowest / 2 else ""


def power_law(widths: np.ndarray, fvu: np.ndarray, effective: float, seed: int = 0) -> PowerLaw:
    """Fit fvu [1 + n, widths], as in `Draws`. Raises DarkmatterError for fewer widths than parameters."""
    widths = np.asarray(widths, float)
    if (found := len(set(widths))) < len(PARAMETERS):
        raise DarkmatterError(f"A power law with a constant takes SAEs of at least 3 widths; there are {found}.")
    law = PowerLaw(widths, fit(widths, fvu[0])[None], effective)
    noisy = _scattered(fvu, fvu[0] - law.curve(widths)[0], len(widths) - len(PARAMETERS), seed)
    return PowerLaw(widths, np.stack([law.parameters[0], *(fit(widths, row) for row in noisy[1:])]), effective)


def fit(widths: np.ndarray, fvu: np.ndarray) -> np.ndarray:
    """c, a, m [3] of the least squares curve through fvu [widths], within BOUNDS.

    Fitted as c + b (W / W₀)^(−m), W₀ the geometric mean width: a moves by orders of magnitude with m, b does not.
    """
    u, size = np.log(widths), max(float(np.mean(fvu)), 1e-9)
    tries = [least_squares(lambda p: p[0] + p[1] * np.exp(-p[2] * (u - u.mean())) - fvu / size, (0.7, 0.3, start),
                           bounds=BOUNDS, ftol=1e-12, xtol=1e-12, gtol=1e-12) for start in STARTS]
    c, b, m = min(tries, key=lambda one: one.cost).x
    return np.array([size * c, size * b * np.exp(m * u.mean()), m])


def subsets(widths: np.ndarray, fvu: np.ndarray) -> pd.DataFrame:
    """The fit to every choice of three or more points: points (how many), left_out (widths), c, a, m."""
    every = range(len(widths))
    return pd.DataFrame([
        {"points": n, "left_out": tuple(widths[i] for i in every if i not in chosen)}
        | dict(zip(PARAMETERS, fit(widths[list(chosen)], fvu[list(chosen)]), strict=True))
        for n in range(len(PARAMETERS), len(widths) + 1) for chosen in combinations(every, n)])


def slopes(widths: np.ndarray, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Change a doubling of the width, by least squares, of values [1 + n, widths]: [1 + n]."""
    x = np.log2(widths) - np.log2(widths).mean()
    residuals = values[0] - values[0].mean() - (values[0] @ x) / (x @ x) * x
    return _scattered(values, residuals, len(x) - 2, seed) @ x / (x @ x)


def _scattered(values: np.ndarray, residuals: np.ndarray, freedom: int, seed: int) -> np.ndarray:
    """Draws [1 + n, SAEs] with the SAEs' own scatter added: normal, of a variance left open (χ²) by few residuals.

    Without a degree of freedom nothing is known of it, and nothing is added.
    """
    if freedom < 1:
        return values
    rng, n = np.random.default_rng(seed), len(values) - 1
    size = np.sqrt(np.square(residuals).sum() / rng.chisquare(freedom, (n, 1)))
    return np.vstack([values[:1], values[1:] + size * rng.standard_normal((n, values.shape[1]))])
