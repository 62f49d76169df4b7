"""Numbers with their bootstrap draws: a value, its interval, and arithmetic draw by draw.

A draw takes whole held-out sources with replacement, the fitted maps held fixed. One seed draws the
same sources for everything that is measured on the same rows, so that two numbers are compared draw
by draw.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..errors import DarkmatterError
from .moments import WIDE
from .scores import STATISTICS, spread_of

NONE = "–"  # how a number is written that there is none of


@dataclass(frozen=True, eq=False)
class Draws:
    """A number measured on held-out rows, and the same number on bootstrap draws of their sources.

    ``value``, ``low`` and ``high`` (the 95% interval) are None where there is none, and ``note``
    says why. Sums, differences, products and ratios with numbers, or with Draws of the same
    sources, are taken draw by draw; others raise DarkmatterError. ``format(draws, ".2f")`` is
    '0.16 [0.15, 0.17]'.
    """

    values: np.ndarray
    """float64 [1 + draws]: as measured, then on each draw; NaN where undefined."""
    effective: float
    """What the sources are worth in sources of equal size: (Σn)² / Σn² over the rows n of each."""
    n: int
    """Held-out rows behind it."""
    sources: int
    """Held-out sources they belong to."""
    note: str = ""
    origin: str = ""
    """Changes with the rows and the draws of their sources."""

    @property
    def value(self) -> float | None:
        return float(self.values[0]) if np.isfinite(self.values[0]) else None

    @property
    def low(self) -> float | None:
        return self._ends[0]

    @property
    def high(self) -> float | None:
        return self._ends[1]

    @cached_property
    def _ends(self) -> tuple[float, float] | tuple[None, None]:
        if self.value is None:
            return None, None
        return interval(torch.from_numpy(self.values[1:].copy()), self.effective)

    @property
    def row(self) -> dict[str, Any]:
        """value, low, high and n: a row of a table or of a record."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def basis(self, unit: str = "sources") -> str:
        """What the number rests on, in words: '96,291 held-out tokens of 212 sources'."""
        return f"{self.n:,} held-out tokens of {self.sources:,} {unit}"

    def map(self, function: Callable[..., np.ndarray], *others: Any) -> "Draws":
        """``function`` of the values of this and of other Draws or numbers, draw by draw."""
        drawn = [self, *(other for other in others if isinstance(other, Draws))]
        if len({(number.origin, len(number.values)) for number in drawn}) > 1:
            raise DarkmatterError("These numbers were drawn from different sources, so they cannot "
                                  "be compared draw by draw: measure both on the same rows with "
                                  "one seed.")
        with np.errstate(divide="ignore", invalid="ignore"):
            values = function(self.values, *(other.values if isinstance(other, Draws) else other
                                             for other in others))
        note = "; ".join(dict.fromkeys(number.note for number in drawn if number.note))
        return Draws(np.asarray(values, float), self.effective, self.n, self.sources, note,
                     self.origin)

    def __add__(self, other: "Draws | float") -> "Draws":
        return self.map(operator.add, other)

    def __sub__(self, other: "Draws | float") -> "Draws":
        return self.map(operator.sub, other)

    def __mul__(self, other: "Draws | float") -> "Draws":
        return self.map(operator.mul, other)

    def __truediv__(self, other: "Draws | float") -> "Draws":
        return self.map(operator.truediv, other)

    def __rsub__(self, other: float) -> "Draws":
        return self.map(lambda mine, number: number - mine, other)

    def __rtruediv__(self, other: float) -> "Draws":
        return self.map(lambda mine, number: number / mine, other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Draws":
        return self * -1

    def __float__(self) -> float:
        return float(self.values[0])

    def __format__(self, spec: str) -> str:
        def number(value: float | None) -> str:
            return NONE if value is None else format(value, spec or ".3f").replace("-", "−")

        ends = "" if self.low is None else f" [{number(self.low)}, {number(self.high)}]"
        return number(self.value) + ends

    def __str__(self) -> str:
        return format(self, "")

    def __repr__(self) -> str:
        return f"<Draws {self}{f' ({self.note})' if self.note else ''}>"


def resample(sums: Mapping[str, Tensor], ids: np.ndarray, n: int = 1000, seed: int = 0
             ) -> dict[str, Tensor]:
    """The bootstrap: totals of sums [groups, ...], then of n draws of whole sources, [1 + n, ...].

    ``ids`` [groups] names the source of each group; those without rows are left out. One seed draws
    the same sources for every SAE, so that SAEs can be compared draw by draw. Two keys are added:
    ``sources``, how many were drawn, and ``effective``, (Σn)²/Σn² over them, fewer where sizes
    differ.
    """
    scored = sums["n"].cpu() > 0
    if not scored.any():
        raise DarkmatterError("There are no held-out rows to score: give more text.")
    # Groups are added up to the m sources that have scored rows.
    names, index = np.unique(np.asarray(ids)[scored.numpy()], return_inverse=True)
    m, index = len(names), torch.from_numpy(index)
    of_source = {}
    for key, by_group in sums.items():
        total = by_group.cpu().new_zeros(m, *by_group.shape[1:])
        of_source[key] = total.index_add_(0, index, by_group.cpu()[scored])
    # A draw takes m sources with replacement, so it is the count of each source [1 + n, m]; the
    # first row takes each once, which is the number as measured.
    draws = np.random.default_rng(seed).multinomial(m, [1 / m] * m, size=n)
    counts = torch.cat([torch.ones(1, m, dtype=WIDE), torch.from_numpy(draws).to(WIDE)])
    totals = {key: torch.tensordot(counts, total, 1) for key, total in of_source.items()}
    effective = totals["n"].square() / (counts @ of_source["n"].square())
    return totals | {"sources": counts.sum(1), "effective": effective}


def interval(draws: Tensor, effective: float) -> tuple[float, float] | tuple[None, None]:
    """95% interval from bootstrap draws [n], widened for few sources; None for fewer than two.

    Plain percentiles cover 84 to 94% with 8 to 100 sources of unequal size. Hesterberg's expanded
    ones, Φ(±√(m/(m−1)) t₀.₉₇₅,ₘ₋₁) with m the effective number of sources, cover 92 to 96%.
    """
    draws = draws[draws.isfinite()]
    if effective < 1.5 or not len(draws):
        return None, None
    t = stats.t.ppf(0.025, effective - 1)
    tail = float(stats.norm.cdf(math.sqrt(effective / (effective - 1)) * t))
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def drawn(totals: Mapping[str, Tensor], values: Tensor, note: str = "") -> Draws:
    """Values [1 + n] computed from the totals of ``resample``, as Draws."""
    origin = hashlib.sha256(totals["n"].numpy().tobytes()).hexdigest()[:16]
    n, sources, effective = (totals[key][0] for key in ("n", "sources", "effective"))
    return Draws(values.double().numpy(), float(effective), int(n), int(sources), note, origin)


def score(totals: Mapping[str, Tensor], metric: str) -> Draws:
    """A metric of ``STATISTICS`` from the totals of ``resample``; the maps are held fixed."""
    values, of_x = STATISTICS[metric](totals), metric.startswith("fvu")
    if not values[0].isfinite():
        what = "x" if of_x else "the target"
        nothing = torch.full_like(values, math.nan)
        return drawn(totals, nothing, f"undefined: {what} has no variance on the scored rows")
    # What to know about the number: dimensions that were left out, and few sources.
    measured = {key: total[0] for key, total in totals.items()}
    flat = 0 if of_x else int(spread_of(measured, "e").isnan().sum())
    notes = []
    if flat:
        notes.append(f"{flat} of {len(measured['e'])} dimensions without variance left out")
    effective = float(measured["effective"])
    if effective < 10:
        none = interval(values[1:], effective) == (None, None)
        notes.append(f"{'no' if none else 'rough'} interval: worth {effective:.1f} equal sources")
    return drawn(totals, values, "; ".join(notes))
