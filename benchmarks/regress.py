"""Rows 'regression' and 'ladder': b* and held-out R², against ``torch.linalg.lstsq`` in memory.

The paper's formulation (paper section 3): for each SAE, least squares of SaeError on x with a bias,
float32, then R² on the rows held out. 61% of the rows are fitted, as 150k of 247k. The baseline is
given x and the errors as they are; our side is given x and the SAEs' codes, as the survey is, and
decodes what it needs.
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
from .data import Codes, RandomSAE

BLOCK = data.BLOCK
CLOSE = 1e-4  # in R², float32 against float32
Rows = tuple[Tensor, list[Codes]]  # some rows of x, and every SAE's codes of them


def dense(given: Tensor, x: Tensor, errors: Sequence[Tensor], fit: int) -> list[list[float]]:
    """Both R² of each error [n, d], by least squares on the first ``fit`` rows.

    ``given``: x with a column of ones, [n, d + 1].
    """
    found = []
    for error in errors:
        b = torch.linalg.lstsq(given[:fit], error[:fit], driver="gels").solution
        left = (error[fit:] - given[fit:] @ b).square_().sum(0, dtype=torch.float64)
        held = error[fit:]
        spread = (held - held.mean(0)).square_().sum(0, dtype=torch.float64)
        found.append([float((1 - left / spread).mean()), float(1 - left.sum() / spread.sum())])
    return found


def streamed(fitted: Iterator[Rows], held: Iterator[Rows],
             saes: Sequence[RandomSAE]) -> list[list[float]]:
    """The same from the package's moments, block by block."""
    moments = Moments()
    for x, codes in fitted:
        moments.update(x, ((str(j), sae.error(x, codes[j])) for j, sae in enumerate(saes)))
    maps, sums = solve(moments), [Sums(1) for _ in saes]
    own = [maps[str(j)].to(torch.float32) for j in range(len(saes))]
    for x, codes in held:
        ids = torch.zeros(len(x), dtype=torch.long)
        for j, sae in enumerate(saes):
            e = sae.error(x, codes[j])
            sums[j].add_error(ids, e, own[j](x).sub_(e))  # only the residuals' squares count
    totals = [resample(each, np.zeros(1, np.int64), n=0) for each in sums]
    return [[float(r2_vector(t)[0]), float(r2_vector_weighted(t)[0])] for t in totals]


def _blocks(x: Tensor, codes: Sequence[Codes], begin: int, end: int) -> Iterator[Rows]:
    for at in range(begin, end, BLOCK):
        some = slice(at, min(at + BLOCK, end))
        yield x[some], [(index[some], value[some]) for index, value in codes]


def _whole(n: int, d: int, saes: Sequence[RandomSAE],
           device: str) -> tuple[Tensor, Tensor, list[Codes]]:
    """x [n, d], x with a column of ones [n, d + 1], and every SAE's codes."""
    x = data.rows(n, d, device)
    blocks = list(zip(range(0, n, BLOCK), x.split(BLOCK), strict=True))
    parts = [[sae.codes(block, begin) for begin, block in blocks] for sae in saes]
    codes = [(torch.cat([index for index, _ in sae]), torch.cat([value for _, value in sae]))
             for sae in parts]
    return x, torch.cat([x, x.new_ones(n, 1)], 1), codes


def _apart(a: list[list[float]], b: list[list[float]]) -> float:
    off = float(np.abs(np.subtract(a, b)).max())
    if not off <= CLOSE:
        raise ValueError(f"The two sides differ by {off:.2g} in R²: {a} and {b}.")
    return off


def regression(device: str, rows: int, d: int, sae: Sequence[int],
               pairs: int, limit: float) -> dict[str, Any]:
    """One SAE of [width, k]: seconds with everything in memory, then each side's own memory."""
    found = ladder(device, rows, d, sae, saes=1, of_baseline=1, pairs=pairs, limit=limit)
    sizes: dict[str, Any] = {"rows": rows, "d": d, "sae": sae}
    mib = {side: timing.apart(f"regress:peak_{side}", device, **sizes)[0] if device == "cpu"
           else _peak_here(side, device, **sizes) for side in ("dense", "streamed")}
    return found | {"memory_mib": mib, "memory_ratio": mib["streamed"] / mib["dense"]}


def ladder(device: str, rows: int, d: int, sae: Sequence[int], saes: int, of_baseline: int,
           pairs: int, limit: float
           ) -> dict[str, Any]:
    """Several SAEs of [width, k] at one site.

    The baseline fits ``of_baseline`` of them; its seconds are scaled to all.
    """
    fit, made = round(0.61 * rows), [RandomSAE(d, sae, seed, device) for seed in range(saes)]
    x, given, codes = _whole(rows, d, made, device)
    errors = [torch.cat([each.error(part, some[0]) for part, some in _blocks(x, [own], 0, rows)])
              for each, own in zip(made[:of_baseline], codes, strict=False)]

    def baseline() -> list[list[float]]:
        return dense(given, x, errors, fit)

    def ours() -> list[list[float]]:
        return streamed(_blocks(x, codes, 0, fit), _blocks(x, codes, fit, rows), made)

    off = _apart(baseline(), ours()[:of_baseline])
    times = timing.pairs(baseline, ours, device, pairs, limit)
    return times.fields(scale=saes / of_baseline) | {
        "difference": off, "products_seconds": _products(x, fit, device, saes)}


def _products(x: Tensor, fit: int, device: str, saes: int) -> float:
    """Seconds of the products alone: half of XᵀX; for each SAE XᵀSaeError, held-out predictions."""
    square = x[:fit].T @ x[:fit]
    whole = timing.seconds(lambda: torch.mm(x[:fit].T, x[:fit], out=square), device)
    return whole / 2 + saes * (timing.seconds(lambda: x[fit:] @ square, device) + whole)


def _peak_here(side: str, device: str, **sizes: Any) -> float:
    with (peak_dense if side == "dense" else peak_streamed)(device, **sizes) as work:
        return timing.peak_of(work, device)[0]


@contextmanager
def peak_dense(device: str, rows: int, d: int, sae: Sequence[int]) -> Iterator[Any]:
    """Everything in memory, with no more copies than least squares itself makes."""
    made = RandomSAE(d, sae, 0, device)

    def work() -> list[list[float]]:
        given, errors = torch.ones(rows, d + 1, device=device), torch.empty(rows, d, device=device)
        for begin, part in zip(range(0, rows, BLOCK), data.blocks(rows, d, device), strict=True):
            given[begin:begin + len(part), :d] = part
            errors[begin:begin + len(part)] = made.error(part, made.codes(part, begin))
        return dense(given, given[:, :d], [errors], round(0.61 * rows))

    yield work


@contextmanager
def peak_streamed(device: str, rows: int, d: int, sae: Sequence[int]) -> Iterator[Any]:
    """Block by block; of one that straddles both parts of the rows, each row goes to its part."""
    fit, made = round(0.61 * rows), RandomSAE(d, sae, 0, device)

    def drawn(begin: int, end: int) -> Iterator[Rows]:
        first = begin // BLOCK * BLOCK
        for at, part in zip(range(first, end, BLOCK), data.blocks(rows, d, device, first),
                            strict=False):
            index, value = made.codes(part, at)
            own = slice(max(0, begin - at), end - at)
            yield part[own], [(index[own], value[own])]

    yield lambda: streamed(drawn(0, fit), drawn(fit, rows), [made])
