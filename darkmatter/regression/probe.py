"""Numbers of a row, such as squared norms, predicted from features of that row, scored held out.

The squared norm of an error from x (section 4), of any vector from x (the norm test, section 5), a
wide SAE's error norm from a narrow one's (Figures 11 and 12): all are one least squares with
intercept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .draws import Draws, drawn, resample, score
from .moments import ROWS, LinearMap, Moments, solve
from .scores import Sums, mean
from .splits import require_rows

Features = Tensor | Callable[[slice], Tensor]
"""[row, j], in memory or read by slices; products of float64 features are float64."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows are fitted, the others being scored, and what the intervals are drawn over."""

    fit: Tensor
    """bool [row]"""
    group: Tensor
    """int64 [row]: the group, such as a context, of each row; fastest where equal ones adjoin."""
    cluster: np.ndarray
    """int [group]: the source of each group, which a bootstrap draws as one."""
    bootstrap: int = 1000
    seed: int = 0

    @property
    def held(self) -> Tensor:
        """bool [row]: the rows that are scored."""
        return ~self.fit

    def only(self, kept: Tensor | slice) -> "Rows":
        """Some of the rows: a mask, or a slice such as one row in three."""
        return replace(self, fit=self.fit[kept], group=self.group[kept])


def blocks(rows: int) -> Iterator[slice]:
    """The rows, a few thousand at once."""
    yield from (slice(begin, min(begin + ROWS, rows)) for begin in range(0, rows, ROWS))


def fit(features: Features, targets: Tensor, rows: Rows) -> LinearMap:
    """Least squares with intercept from features [row, j] to `targets` [row, k], on fitted rows.

    The map is float64. Raises DarkmatterError where fewer rows are fitted than there are features.
    """
    read = _reader(features)
    first = read(slice(0, 1))
    require_rows(int(rows.fit.sum()), first.shape[1])
    moments = Moments("float64" if first.dtype == torch.float64 else "float32")
    for block in blocks(len(targets)):
        if (chosen := rows.fit[block]).any():
            moments.update(read(block)[chosen], [("targets", targets[block][chosen])])
    return solve(moments)["targets"]


def predict(features: Features, targets: Tensor, rows: Rows) -> Tensor:
    """What `fit` predicts for every row, float64 [row, k]."""
    fitted, read = fit(features, targets, rows), _reader(features)
    return torch.cat([fitted(read(block).double()) for block in blocks(len(targets))])


def r2(targets: Tensor, predicted: Tensor, rows: Rows) -> list[Draws]:
    """Held-out R² of columns of `predicted` [row, k]; no value where a target does not vary."""
    sums, held = Sums(len(rows.cluster)), rows.held
    sums.add_error(rows.group[held], targets[held], (targets - predicted)[held])
    totals = resample(sums, rows.cluster, rows.bootstrap, rows.seed)
    columns = ({key: total[:, [j]] if total.ndim == 2 else total for key, total in totals.items()}
               for j in range(targets.shape[1]))
    return [score(column, "r2_norm") for column in columns]


def held_out_r2(features: Features, targets: Tensor, rows: Rows) -> list[Draws]:
    """R² on the held-out rows of each of `targets` [row, k], from the map fitted on the others."""
    return r2(targets, predict(features, targets, rows), rows)


def means(values: Tensor, rows: Rows) -> list[Draws]:
    """The mean over the held-out rows of each column of `values` [row, k]."""
    sums = Sums(len(rows.cluster))
    sums.add_values(rows.group[rows.held], values[rows.held])
    totals = resample(sums, rows.cluster, rows.bootstrap, rows.seed)
    return [drawn(totals, column) for column in mean(totals).T]


def removed(without: Draws, added: Draws) -> Draws:
    """Share of the residual variance that one more feature removes (Figure 12), from both R²."""
    return 1 - (1 - added) / (1 - without)


def _reader(features: Features) -> Callable[[slice], Tensor]:
    return features.__getitem__ if isinstance(features, Tensor) else features
