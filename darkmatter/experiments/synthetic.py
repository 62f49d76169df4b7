"""The synthetic check: errors of which the absent, dense and introduced parts are known.

Appendix C.3, Figure 15, Table 1. x' = Sae(x) is a sum of known latents. Noise on x' makes the
activation, z = x' + σ_x ε₁. Decoding the latents of x' without the quietest of them, and noise on
that, makes its reconstruction, decode(f(x')) + σ_sae ε₂. Their difference is split by a linear map
of z, as SaeError is by one of x (section 3). σ is in units of the real error, ``Known.unit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from .. import progress, regression, survey
from ..errors import DarkmatterError
from ..regression import Moments, Sums, drawn, squared_norm
from ..regression.scores import mean, spread_of
from ..saes import codes
from ..saes.kernels import weighted_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from ..models.activations import Activations
    from ..presets import Preset
    from ..regression import Draws
    from ..saes.loaded import LoadedSAE

ROWS = 4096  # tokens handled at once
Noise = Literal["gaussian", "errors"]


class Setting(NamedTuple):
    """The share of latents removed, and σ of the noise on activation and reconstruction."""

    removed: float = 0.0
    on_x: float = 0.0
    on_sae: float = 0.0


@dataclass(frozen=True)
class Known:
    """Some tokens whose activations are sums of known latents."""

    sae: LoadedSAE
    x: Tensor
    """x' = Sae(x), float32 [n, d]."""
    error: Tensor
    """The SAE's real errors x − Sae(x) on these tokens, float32 [n, d]."""
    index: Tensor
    """Latents f(x') of encoding x' again, int64 [n, k]; ``value`` [n, k]: their activations."""
    value: Tensor
    order: Tensor
    """Latents from the lowest to the highest mean activation on fitted rows, int64 [width]."""
    context: Tensor
    """int64 [n]: the context of each row."""
    clusters: np.ndarray
    """The source of each context."""
    fitted: Tensor
    """bool [n]: the rows that fit; the rest is held out, whole sources."""
    unit: float
    """Root mean square of the real errors, a dimension: noise of σ = 1 is as large as they are."""

    def without(self, removed: float, rows: slice) -> Tensor:
        """decode(f(x')) without the quietest ``removed`` share of latents: float32 [rows, d]."""
        gone = torch.zeros(self.sae.width, dtype=torch.bool)
        gone[self.order[:round(removed * self.sae.width)]] = True
        index, weights = self.index[rows], self.sae.sae
        active = self.value[rows] * ~gone[index]
        return weighted_rows(index, weights.W_dec.data, active) + weights.b_dec.data

    def noise(self, kind: Noise, seed: int) -> tuple[Tensor, Tensor]:
        """ε₁ and ε₂ [n, d], each of mean square 1 over tokens and dimensions.

        Both are Gaussian; with "errors" ε₁ is made of the SAE's real errors, each on another token.
        """
        generator = torch.Generator().manual_seed(seed)
        on_x, on_sae = (torch.randn(self.x.shape, generator=generator) for _ in range(2))
        if kind == "errors":
            # Shuffled, so that a token's error tells nothing of the token that it is put on.
            on_x = self.error[torch.randperm(len(self.error), generator=generator)]
            on_x = on_x - on_x.mean(0)
            on_x /= on_x.square().mean().sqrt()
        return on_x, on_sae


class Split(NamedTuple):
    """What the linear map makes of the error in one setting, over the rows that are scored."""

    fvu: Draws
    nonlinear: Draws
    """FVU with the map's prediction added to the reconstruction: the estimate of this part."""
    spread: Draws
    """Mean squared distance of z from its mean: what FVU divides by."""
    one_mean: Draws
    """The same with one mean for all dimensions, as in the authors' code."""

    @property
    def linear(self) -> Draws:
        """The estimate of the linear part: FVU − FVU with the prediction added."""
        return self.fvu - self.nonlinear


@torch.no_grad()
def prepare(preset: Preset, sae: LoadedSAE, acts: Activations, tokens: int) -> Known:
    """About ``tokens`` kept tokens, the first of every context; it holds 4 arrays [n, d].

    Raises DarkmatterError for an SAE that does not decode by a sum of latents, or too few tokens.
    """
    stored = codes.of(sae, acts)
    if stored is None:
        raise DarkmatterError(f"The synthetic check takes latents away from a sum, and '{sae.ref}' "
                              "does not decode by a sum of its latents; give another SAE.")
    # As many tokens of every context, as far as it has them.
    share = -(-tokens // len(acts.text.tokens))
    parts = [slice(int(begin), int(min(begin + share, end)))
             for begin, end in zip(acts.starts[:-1], acts.starts[1:], strict=True) if end > begin]
    x = torch.cat([stored.decode(sae, rows).cpu() for rows in parts])
    error = torch.cat([acts.read(rows) for rows in parts]) - x
    place = np.concatenate([np.arange(rows.start, rows.stop) for rows in parts])
    fitted = torch.from_numpy(survey.fitted_rows(preset, acts, regression.STRICT)[place])
    regression.require_rows(int(fitted.sum()), x.shape[1])
    # The latents of x' itself, which need not be those that it was decoded from.
    device = sae.sae.W_dec.device
    encoded = [sae.encode(rows.to(device)) for rows in x.split(ROWS)]
    k = max(index.shape[1] for index, _ in encoded)
    index, value = (torch.cat([pad(rows.cpu(), (0, k - rows.shape[1])) for rows in part])
                    for part in zip(*encoded, strict=True))
    sae.sae.to("cpu")
    total = torch.zeros(sae.width)
    total.index_add_(0, index[fitted].flatten(), value[fitted].flatten())
    return Known(sae, x, error, index.long(), value, total.argsort(stable=True),
                 torch.from_numpy(acts.context[place]).long(),
                 regression.clusters(acts.text.source), fitted,
                 unit=float(error[fitted].square().mean().sqrt()))


@torch.no_grad()
def measure(known: Known, settings: Iterable[Setting], preset: Preset, noise: Noise = "gaussian",
            in_sample: bool = False) -> dict[Setting, Split]:
    """Split the error of every setting by a linear map with intercept, held out or in-sample.

    The authors do the latter. All settings see the same ε₁ and ε₂, which the preset's seed
    determines. Least squares is linear in its target, so the map of a sum is the sum of the maps:
    XᵀX and the maps are made once for each σ_x. Raises DarkmatterError for a σ below 0 or a share
    outside [0, 1).
    """
    settings = list(dict.fromkeys(settings))
    for setting in settings:
        if min(setting) < 0 or setting.removed >= 1:
            raise DarkmatterError(f"{setting} is no setting: σ is at least 0, and the share of "
                                  "latents removed in [0, 1).")
    fit = torch.ones_like(known.fitted) if in_sample else known.fitted
    scored = fit if in_sample else ~fit
    noises, splits = known.noise(noise, preset.seed), {}
    for level in sorted({setting.on_x for setting in settings}):
        group = [Setting(*map(float, setting)) for setting in settings if setting.on_x == level]
        totals = _totals(known, group, noises, fit, scored, preset)
        n, d = totals["n"], totals["x"].shape[1]
        spread = spread_of(totals, "x") / n
        one_mean = totals["xx"] / n - d * (totals["x"].sum(1) / n / d).square()
        error, left = mean(totals).T.split(len(group))
        for i, setting in enumerate(group):
            values = (error[i] / spread, left[i] / spread, spread, one_mean)
            splits[setting] = Split(*(drawn(totals, value) for value in values))
    return {setting: splits[setting] for setting in settings}


def _blocks(known: Known, noises: tuple[Tensor, Tensor], level: float, which: Tensor
            ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Rows, which of them to take, and of those z, ε₁ and ε₂ in the units of x."""
    for begin in progress.bar(range(0, len(known.x), ROWS), f"noise of {level:g}", "blocks"):
        rows = slice(begin, min(begin + ROWS, len(known.x)))
        if (take := which[rows]).any():
            on_x, on_sae = (known.unit * noise[rows][take] for noise in noises)
            yield rows, take, known.x[rows][take] + level * on_x, on_x, on_sae


def _totals(known: Known, group: Sequence[Setting], noises: tuple[Tensor, Tensor], fit: Tensor,
            scored: Tensor, preset: Preset) -> dict[str, Tensor]:
    """Resampled sums over the scored rows for settings of one σ_x.

    x and xx of z; of the values v the first half are the squared errors of each setting, the others
    what the map leaves of them.
    """
    level, contexts = group[0].on_x, len(known.clusters)
    shares = sorted({setting.removed for setting in group})

    def targets(rows: slice, take: Tensor, on_x: Tensor, on_sae: Tensor
                ) -> Iterator[tuple[str, Tensor]]:
        for share in shares:
            yield str(share), (known.x[rows] - known.without(share, rows))[take]
        if level:
            yield "x", on_x
        if any(setting.on_sae for setting in group):
            yield "sae", on_sae

    # A map for each part that errors are made of.
    moments = Moments()
    for rows, take, z, *noise in _blocks(known, noises, level, fit):
        moments.update(z, targets(rows, take, *noise))
    maps = regression.solve(moments)
    # The error of a setting is a sum of these parts, and so is what is left of it.
    of_z, of_error = Sums(contexts), Sums(contexts)
    for rows, take, z, *noise in _blocks(known, noises, level, scored):
        ids = known.context[rows][take]
        of_z.add_x(ids, z)
        parts = {name: torch.stack([target, target - maps[name](z)])
                 for name, target in targets(rows, take, *noise)}
        squares = []
        for setting in group:
            amounts = {str(setting.removed): 1.0, "x": level, "sae": -setting.on_sae}
            terms = [amount * parts[name] for name, amount in amounts.items() if amount]
            pair = torch.stack(terms).sum(0)
            squares.append(torch.stack([squared_norm(vectors) for vectors in pair]))
        of_error.add_values(ids, torch.stack(squares, 1).flatten(0, 1).T)
    return regression.resample(of_error | of_z, known.clusters, preset.bootstrap, preset.seed)


@torch.no_grad()
def expected(known: Known, settings: Sequence[Setting], noise: Noise = "gaussian"
             ) -> tuple[np.ndarray, np.ndarray]:
    """FVU and its nonlinear part [settings] in theory, for noise independent of x'.

    Covariances are all that it takes. With S = Cov(x'), N = Cov(σ_x ε₁), u = x' − decode(f(x')) and
    A = Cov(x', u) + N, the best map leaves Var(u) + tr N + σ_sae² d − tr Aᵀ(S + N)⁻¹A of the error.
    For u = 0 and white noise a direction with variance s keeps s/(s + σ²) of the noise put on it:
    where the activation varies more than the noise, noise looks nonlinear.
    """
    d, one = known.x.shape[1], known.unit ** 2
    shape = known.error.T.double().cov() if noise == "errors" else torch.eye(d, dtype=torch.float64)
    shape *= d / shape.trace()
    absent = {share: _absent(known, share) for share in {setting.removed for setting in settings}}
    shares = []
    for setting in settings:
        s, c, varies, average = absent[setting.removed]
        added = setting.on_x ** 2 * one * shape
        a, white = c + added, setting.on_sae ** 2 * one * d
        predicted = (a * (torch.linalg.pinv(s + added, hermitian=True) @ a)).sum()
        error, spread = varies + added.trace() + white, (s + added).trace()
        shares.append([float((error + average) / spread), float((error - predicted) / spread)])
    fvu, nonlinear = np.array(shares).T
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
    average = of_u.shift.square().sum()  # centred, so the shift is the mean
    return of_x.cross / moments.n, of_u.cross / moments.n, square / moments.n - average, average


def correlation(values: Sequence[float], estimates: Sequence[Draws]) -> Draws:
    """Pearson's correlation of ``values`` with ``estimates``, one of each a setting."""
    def pearson(*columns: np.ndarray) -> np.ndarray:
        a, b = np.asarray(values) - np.mean(values), np.stack(columns) - np.mean(columns, 0)
        return a @ b / np.sqrt((a @ a) * np.square(b).sum(0))

    return estimates[0].map(pearson, *estimates[1:])
