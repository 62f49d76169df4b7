"""The synthetic check (appendix C.3, Figure 15, Table 1): errors whose absent, dense and introduced parts are known.

x' = Sae(x) is a sum of known latents. Noise on x' makes the activation, z = x' + σ_x ε₁. Decoding the latents of x'
without the quietest of them, and noise on that, makes its reconstruction, decode(f(x')) + σ_sae ε₂. Their difference is
split by a linear map of z, as SaeError is by one of x (section 3). σ is in units of the real error, ``Known.unit``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import codes, progress, regression, survey
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .regression import Moments, Sums, squared_norm
from .saes import LoadedSAE
from .topk import weighted_rows

ROWS = 4096
Noise = Literal["gaussian", "errors"]


class Cell(NamedTuple):
    """One setting: the share of latents removed, and the noise on the activation and on the reconstruction."""

    removed: float = 0.0
    on_x: float = 0.0
    on_sae: float = 0.0


@dataclass(frozen=True)
class Known:
    """Some tokens whose activations are sums of known latents."""

    each: LoadedSAE
    x: Tensor
    """x' = Sae(x), float32 [n, d]."""
    error: Tensor
    """The SAE's real errors x − Sae(x) on these tokens, float32 [n, d]."""
    index: Tensor
    """Latents f(x') found by encoding x' again, int64 [n, k], and their activations ``value`` [n, k]."""
    value: Tensor
    order: Tensor
    """Latents from the lowest to the highest mean activation on the fitted rows, int64 [width]."""
    context: Tensor
    """int64 [n]: the context of each row; ``contexts`` of them, in ``clusters`` of sources."""
    clusters: np.ndarray
    fitted: Tensor
    """bool [n]: the rows that fit; the rest is held out, whole sources."""
    unit: float
    """Root mean square of the real errors, per dimension: noise with σ = 1 is as large as they are."""

    def without(self, removed: float, rows: slice) -> Tensor:
        """decode(f(x')) without the ``removed`` share of the latents, the quietest: float32 [rows, d]."""
        gone = torch.zeros(self.each.width, dtype=torch.bool)
        gone[self.order[:round(removed * self.each.width)]] = True
        index, sae = self.index[rows], self.each.sae
        return weighted_rows(index, sae.W_dec.data, self.value[rows] * ~gone[index]) + sae.b_dec.data

    def noise(self, kind: Noise, seed: int) -> tuple[Tensor, Tensor]:
        """ε₁ and ε₂ [n, d] of unit size a dimension: Gaussian, or (ε₁ alone) the real errors in shuffled order."""
        generator = torch.Generator().manual_seed(seed)
        first, second = (torch.randn(self.x.shape, generator=generator) for _ in range(2))
        if kind == "errors":
            first = self.error[torch.randperm(len(self.error), generator=generator)]
            first = first - first.mean(0)
            first /= first.square().mean().sqrt()
        return first, second


@dataclass(frozen=True)
class Splits:
    """What the split found in every cell: as measured, then on n draws of the sources; float64 [cells, 1 + n]."""

    cells: Sequence[Cell]
    fvu: np.ndarray
    nonlinear: np.ndarray
    """FVU with the linear map's prediction added to the reconstruction: the estimate of the nonlinear part."""
    spread: np.ndarray
    """Mean squared distance of z from its mean: what FVU divides by."""
    one_mean: np.ndarray
    """The same with one mean for all dimensions, as in the authors' code."""
    n: int
    effective: float

    @property
    def linear(self) -> np.ndarray:
        """The estimate of the linear part: FVU − FVU with the prediction added."""
        return self.fvu - self.nonlinear

    def column(self, name: str) -> np.ndarray:
        """σ or share (a field of ``Cell``) of every cell [cells]."""
        return np.array([getattr(cell, name) for cell in self.cells])

    def part(self, cells: Sequence[Cell]) -> Splits:
        """Some of the cells, in this order."""
        place = [list(self.cells).index(cell) for cell in cells]
        return Splits(cells, self.fvu[place], self.nonlinear[place], self.spread[place], self.one_mean[place], self.n,
                      self.effective)


@torch.no_grad()
def prepare(preset: Preset, each: LoadedSAE, acts: Activations, tokens: int) -> Known:
    """About ``tokens`` kept tokens, the first ones of every context, with their known parts. Holds 4 arrays [n, d].

    Raises DarkmatterError for an SAE that does not decode by a sum of latents, or too few tokens.
    """
    stored = codes.of(each, acts)
    if stored is None:
        raise DarkmatterError(f"The synthetic check takes latents away from a sum, and '{each.ref}' does not decode by "
                              "a sum of its latents; give another SAE.")
    contexts = len(acts.text.tokens)
    some = [slice(int(begin), int(min(begin + -(-tokens // contexts), end)))
            for begin, end in zip(acts.starts[:-1], acts.starts[1:], strict=True) if end > begin]
    x = torch.cat([stored.decode(each, rows).cpu() for rows in some])
    error = torch.cat([acts.read(rows) for rows in some]) - x
    place = np.concatenate([np.arange(rows.start, rows.stop) for rows in some])
    fitted = torch.from_numpy(survey.fitted_rows(preset, acts, regression.STRICT)[place])
    regression.require_rows(int(fitted.sum()), x.shape[1])
    device = each.sae.W_dec.device
    parts = [each.encode(part.to(device)) for part in x.split(ROWS)]
    k = max(index.shape[1] for index, _ in parts)
    index, value = (torch.cat([torch.nn.functional.pad(part[i].cpu(), (0, k - part[i].shape[1])) for part in parts])
                    for i in (0, 1))
    each.sae.to("cpu")
    total = torch.zeros(each.width).index_add_(0, index[fitted].flatten(), value[fitted].flatten())
    return Known(each, x, error, index.long(), value, total.argsort(stable=True),
                 torch.from_numpy(acts.context[place]).long(), regression.clusters(acts.text.source), fitted,
                 float(error[fitted].square().mean().sqrt()))


@torch.no_grad()
def measure(known: Known, cells: Sequence[Cell], preset: Preset, noise: Noise = "gaussian",
            in_sample: bool = False) -> Splits:
    """Split the error of every cell by a linear map with intercept, held out or (as the authors do) in-sample.

    All cells see the same ε₁ and ε₂, which the preset's seed determines. Least squares is linear in its target, so
    the map of a sum is the sum of the maps: XᵀX and the maps are made once for each σ_x. Raises DarkmatterError for
    a σ below 0 or a share outside [0, 1).
    """
    for cell in cells:
        if min(cell) < 0 or cell.removed >= 1:
            raise DarkmatterError(f"{cell} is no setting: σ is at least 0, and the share of latents removed in [0, 1).")
    fit = torch.ones_like(known.fitted) if in_sample else known.fitted
    scored = fit if in_sample else ~fit
    noises = known.noise(noise, preset.seed)
    found = {name: np.zeros((len(cells), preset.bootstrap + 1)) for name in ("fvu", "nonlinear", "spread", "one_mean")}
    effective = 0.0
    for level in sorted({cell.on_x for cell in cells}):
        mine = [i for i, cell in enumerate(cells) if cell.on_x == level]
        group = [Cell(*map(float, cells[i])) for i in mine]
        totals = _totals(known, group, noises, fit, scored, preset)
        spread = totals["n"] / regression.fvu({**totals, "ee": totals["n"][:, None]})  # Σ‖z − z̄‖²
        found["fvu"][mine] = (totals["ee"] / spread[:, None]).T
        found["nonlinear"][mine] = (totals["rr"] / spread[:, None]).T
        found["spread"][mine] = spread / totals["n"]
        d = totals["x"].shape[1]
        found["one_mean"][mine] = totals["xx"] / totals["n"] - d * (totals["x"].sum(1) / totals["n"] / d).square()
        effective = float(totals["effective"][0])
    return Splits(cells, **found, n=int(scored.sum()), effective=effective)


def _batches(known: Known, noises: tuple[Tensor, Tensor], level: float, which: Tensor
             ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Rows, which of them to take, and of those z, ε₁ and ε₂ in the units of x."""
    for begin in progress.bar(range(0, len(known.x), ROWS), f"noise of {level:g}", "blocks"):
        rows = slice(begin, min(begin + ROWS, len(known.x)))
        if (take := which[rows]).any():
            first, second = (known.unit * each[rows][take] for each in noises)
            yield rows, take, known.x[rows][take] + level * first, first, second


def _totals(known: Known, group: Sequence[Cell], noises: tuple[Tensor, Tensor], fit: Tensor, scored: Tensor,
            preset: Preset) -> dict[str, Tensor]:
    """Resampled sums over the scored rows of the cells of one σ_x: ee and rr, a column a cell."""
    level, contexts = group[0].on_x, len(known.clusters)
    needed = sorted({cell.removed for cell in group})

    def targets(rows: slice, take: Tensor, first: Tensor, second: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from ((str(share), known.x[rows][take] - known.without(share, rows)[take]) for share in needed)
        yield from (("x", first),) if level else ()
        yield from (("sae", second),) if any(cell.on_sae for cell in group) else ()

    moments = Moments()
    for rows, take, z, *noise in _batches(known, noises, level, fit):
        moments.update(z, targets(rows, take, *noise))
    maps = regression.solve(moments)
    of_x, of_error = Sums(contexts), Sums(contexts)
    for rows, take, z, *noise in _batches(known, noises, level, scored):
        ids = known.context[rows][take]
        of_x.add_x(ids, z)
        parts = {name: torch.stack([target, target - maps[name](z)]) for name, target in targets(rows, take, *noise)}
        both = []
        for cell in group:  # the error, and what the map leaves of it
            amounts = {str(cell.removed): 1.0, "x": level, "sae": -cell.on_sae}
            pair = torch.stack([amount * parts[name] for name, amount in amounts.items() if amount]).sum(0)
            both.append([squared_norm(each).sqrt() for each in pair])
        of_error.add_error(ids, *(torch.stack(each, 1) for each in zip(*both, strict=True)))  # it sums their squares
    return regression.resample({**of_error, **of_x}, known.clusters, preset.bootstrap, preset.seed)


@torch.no_grad()
def expected(known: Known, cells: Sequence[Cell], noise: Noise = "gaussian") -> tuple[np.ndarray, np.ndarray]:
    """FVU and its nonlinear part [cells] that theory gives for noise independent of x', from covariances alone.

    With S = Cov(x'), N = Cov(σ_x ε₁), u = x' − decode(f(x')) and A = Cov(x', u) + N, the best map leaves
    Var(u) + tr N + σ_sae² d − tr Aᵀ(S + N)⁻¹A of the error. For u = 0 and white noise a direction with variance s
    keeps s/(s + σ²) of the noise put on it: where the activation varies more than the noise, noise looks nonlinear.
    """
    d, one = known.x.shape[1], known.unit ** 2
    shape = torch.eye(d, dtype=torch.float64) if noise == "gaussian" else known.error.T.double().cov()
    shape *= d / shape.trace()
    absent, found = {share: _absent(known, share) for share in {cell.removed for cell in cells}}, []
    for cell in cells:
        s, c, varies, mean = absent[cell.removed]
        added = cell.on_x ** 2 * one * shape
        a, white = c + added, cell.on_sae ** 2 * one * d
        predicted = (a * (torch.linalg.pinv(s + added, hermitian=True) @ a)).sum()
        error, spread = varies + added.trace() + white, (s + added).trace()
        found.append([float((error + mean) / spread), float((error - predicted) / spread)])
    fvu, nonlinear = np.array(found).T
    return fvu, nonlinear


def _absent(known: Known, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cov(x') [d, d], Cov(x', u) [d, d], Var(u) and ‖mean of u‖², float64, over all rows."""
    moments, square = Moments(), torch.zeros((), dtype=torch.float64)
    for begin in range(0, len(known.x), ROWS):
        rows = slice(begin, min(begin + ROWS, len(known.x)))
        u = known.x[rows] - known.without(share, rows)
        moments.update(known.x[rows], [("u", u)])
        square += squared_norm(u).sum()
    of_x, of_u = moments.centred(), moments.centred("u")
    mean = of_u.shift.square().sum()  # centred, so the shift is the mean
    return of_x.cross / moments.n, of_u.cross / moments.n, square / moments.n - mean, mean


def correlation(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Pearson's correlation over cells of ``values`` [cells] with every column of ``draws`` [cells, 1 + n]: [1 + n]."""
    a, b = values - values.mean(), draws - draws.mean(0)
    return a @ b / np.sqrt((a @ a) * np.square(b).sum(0))
