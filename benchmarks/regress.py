"""Rows 'regression' and 'ladder': b* and its held-out R², against ``torch.linalg.lstsq`` on everything in memory.

The paper's formulation (paper section 3): for each SAE, least squares of SaeError on x with a bias, float32, then R² on
the rows held out. 61% of the rows are fitted, as 150k of 247k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkmatter.regression import Moments, Sums, r2_vector, r2_vector_weighted, resample, solve

from . import data, timing

KEPT = 823  # rows of a context
BLOCK = data.BLOCK
CLOSE = 1e-4  # in R², float32 against float32


def dense(given: Tensor, x: Tensor, errors: Sequence[Tensor], fit: int) -> list[list[float]]:
    """Both R² of each error [n, d], by least squares on the first ``fit`` rows of ``given`` [n, d + 1], x and ones."""
    found = []
    for error in errors:
        b = torch.linalg.lstsq(given[:fit], error[:fit], driver="gels").solution
        left = (error[fit:] - given[fit:] @ b).square_().sum(0, dtype=torch.float64)
        held = error[fit:]
        spread = (held - held.mean(0)).square_().sum(0, dtype=torch.float64)
        found.append([float((1 - left / spread).mean()), float(1 - left.sum() / spread.sum())])
    return found


def streamed(x: Iterator[Tensor], held: Iterator[Tensor], saes: int, errors: Sequence[Tensor] = (),
             fit: int = 0) -> list[list[float]]:
    """The same from the package's moments, block by block; the error is a function of x unless it is given."""
    def error(part: Tensor, j: int, begin: int) -> Tensor:
        return errors[j][begin:begin + len(part)] if errors else data.error(part, j)

    moments, at = Moments(), 0
    for part in x:
        moments.update(part, ((str(j), error(part, j, at)) for j in range(saes)))
        at += len(part)
    maps, at, sums = solve(moments), fit, [Sums(1) for _ in range(saes)]
    for part in held:
        ids = torch.zeros(len(part), dtype=torch.long)
        for j in range(saes):
            e = error(part, j, at)
            sums[j].add_error(ids, e, e - maps[str(j)](part))
        at += len(part)
    totals = [resample(each, np.zeros(1, np.int64), n=0) for each in sums]
    return [[float(r2_vector(t)[0]), float(r2_vector_weighted(t)[0])] for t in totals]


def _whole(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """x [n, d], and x with a column of ones: [n, d + 1]."""
    x = data.rows(n, d, device)
    return x, torch.cat([x, x.new_ones(n, 1)], 1)


def _apart(a: list[list[float]], b: list[list[float]]) -> float:
    off = float(np.abs(np.subtract(a, b)).max())
    if not off <= CLOSE:
        raise ValueError(f"The two sides differ by {off:.2g} in R²: {a} and {b}.")
    return off


def regression(device: str, rows: int, d: int, pairs: int, limit: float) -> dict[str, Any]:
    """One SAE: seconds with everything in memory on both sides, then each side's own memory."""
    found = _one(device, rows, d, pairs, limit)
    mib = {side: timing.apart(f"regress:peak_{side}", device, rows=rows, d=d)[0] if device == "cpu"
           else _peak_here(side, device, rows, d) for side in ("dense", "streamed")}
    return found | {"memory_mib": mib, "memory_ratio": mib["streamed"] / mib["dense"]}


def _one(device: str, rows: int, d: int, pairs: int, limit: float) -> dict[str, Any]:
    fit, (x, given) = round(0.61 * rows), _whole(rows, d, device)
    errors = [data.error(x, 0)]

    def baseline() -> list[list[float]]:
        return dense(given, x, errors, fit)

    def ours() -> list[list[float]]:
        return streamed(iter(x[:fit].split(BLOCK)), iter(x[fit:].split(BLOCK)), 1, errors, fit)

    off = _apart(baseline(), ours())
    times = timing.pairs(baseline, ours, device, pairs, limit).fields()
    return times | {"difference": off, "products_seconds": _products(x, fit, device)}


def _products(x: Tensor, fit: int, device: str) -> float:
    """Seconds of the products alone: half of XᵀX, XᵀY, and the predictions of the rows held out."""
    square = x[:fit].T @ x[:fit]
    return (1.5 * timing.seconds(lambda: torch.mm(x[:fit].T, x[:fit], out=square), device)
            + timing.seconds(lambda: x[fit:] @ square, device))


def _peak_here(side: str, device: str, rows: int, d: int) -> float:
    with (peak_dense if side == "dense" else peak_streamed)(device, rows, d) as work:
        return timing.peak_of(work, device)[0]


@contextmanager
def peak_dense(device: str, rows: int, d: int) -> Iterator[Any]:
    """Everything in memory, with no more copies than least squares itself makes."""
    def work() -> list[list[float]]:
        given, errors = torch.ones(rows, d + 1, device=device), torch.empty(rows, d, device=device)
        for begin, part in zip(range(0, rows, BLOCK), data.blocks(rows, d, device), strict=True):
            given[begin:begin + len(part), :d] = part
            errors[begin:begin + len(part)] = data.error(part, 0)
        return dense(given, given[:, :d], [errors], round(0.61 * rows))

    yield work


@contextmanager
def peak_streamed(device: str, rows: int, d: int) -> Iterator[Any]:
    """Block by block; where a block straddles the two parts of the rows, its rows go where they belong."""
    fit = round(0.61 * rows)

    def fitted() -> Iterator[Tensor]:
        for begin, part in zip(range(0, fit, BLOCK), data.blocks(rows, d, device), strict=False):
            yield part[:fit - begin]

    def held() -> Iterator[Tensor]:
        first = fit // BLOCK * BLOCK
        for begin, part in zip(range(first, rows, BLOCK), data.blocks(rows, d, device, first), strict=True):
            yield part[max(0, fit - begin):]

    yield lambda: streamed(fitted(), held(), 1, fit=fit)


def ladder(device: str, rows: int, d: int, saes: int, of_baseline: int, pairs: int, limit: float) -> dict[str, Any]:
    """Several SAEs at one site. The baseline fits ``of_baseline`` of them, and its seconds are scaled to all."""
    fit, (x, given) = round(0.61 * rows), _whole(rows, d, device)

    def baseline() -> list[list[float]]:
        return [dense(given, x, [data.error(x, j)], fit)[0] for j in range(of_baseline)]

    def ours() -> list[list[float]]:
        return streamed(iter(x[:fit].split(BLOCK)), iter(x[fit:].split(BLOCK)), saes)

    off = _apart(baseline(), ours()[:of_baseline])
    times = timing.pairs(baseline, ours, device, pairs, limit)
    return times.fields(scale=saes / of_baseline) | {"difference": off}
