"""Linear regression on streams of activations: moments, maps, definitions, intervals, protocols.

x is an activation, SaeError = x − Sae(x), b* the linear map fitted from x to SaeError, LinearError = b*x and
NonlinearError = SaeError − b*x (section 3). Rows are tokens. Usable by itself on plain tensors: `update` a
`Moments` batch by batch, `solve` it, add what the maps leave to `Sums`, `score` those.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .errors import DarkmatterError

FIT_SHARE = 0.61  # the paper fits on 150k of 247k tokens
MIN_SOURCES, BLOCKS = 20, 40  # with fewer source documents, blocks of contexts take their place
ROWS = 4096  # summed in float32: longer sums lose digits
CHUNK = 1024  # rows shifted and multiplied at once: they stay in the processor's cache
WIDENED = 64  # rows turned to float64 at once: they stay in the processor's cache
STRIPS = 6  # of a symmetric product, of which only what lies below the diagonal is computed
TOLERANCE = {"float32": 3e-6, "float64": 1e-12}  # of the rank: least pivot of a Gram matrix of unit diagonal
WIDE = torch.float64


def _home(values: Tensor) -> torch.device:
    """Where float64 sums live: beside the values, except that MPS has no float64."""
    return torch.device("cpu") if values.device.type == "mps" else values.device


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise DarkmatterError(f"{what} holds NaN or infinite values: check the weights and the data type.")


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No TF32, no autocast, no gradients: a float32 product is a float32 product."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _column_sums(rows: Tensor, power: int = 1) -> Tensor:
    """Σ of rows [n, ...], or of their squares, float64, a few at a time: they stay in the processor's cache."""
    total = torch.zeros(rows.shape[1:], dtype=WIDE, device=rows.device)
    for some in rows.split(CHUNK // 2 if rows.device.type == "cpu" else len(rows)):
        total += (some if power == 1 else some.square()).sum(0, dtype=WIDE)
    return total


def squared_norm(v: Tensor) -> Tensor:
    """‖v‖² of each row of v [n, d], float64 [n]: the target of the norm regressions (section 4)."""
    return torch.linalg.vector_norm(v.to(_home(v)), dim=1, dtype=WIDE).square()


@dataclass
class Columns:
    """Float64 sums over n rows of y [n, k] less `shift` [k]: total = Σy [k], cross = Xᵀy [d, k].

    Of x with itself only the lower half of cross counts, but for what `Moments.centred` returns.
    """

    shift: Tensor
    total: Tensor
    cross: Tensor
    n: int = 0

    def moved(self, dx: Tensor, dy: Tensor, total_x: Tensor) -> "Columns":
        """The sums after adding dx [d] to every row of x (whose sum was `total_x`) and dy [k] to every y."""
        total = self.total + self.n * dy
        cross = torch.addr(self.cross, dx, total).addr_(total_x, dy)
        return Columns(self.shift - dy, total, cross, self.n)


class Moments:
    """Streaming moments of x [n, d] and of named targets [n, k], XᵀX shared by all of them.

    All is shifted by the mean of the first batch: raw activations have a large mean (their Gram matrix has
    condition 3e7, shifted 1e4). Blocks are multiplied in float32, or in float64 with `products="float64"` and
    for every target given in float64 (squared norms); sums are float64. Memory: 8·d·(d + Σk) bytes for any n.
    """

    def __init__(self, products: Literal["float32", "float64"] = "float32") -> None:
        self.products: Literal["float32", "float64"] = products
        self.columns: dict[str, Columns] = {}  # of the targets, and under "" of x itself

    @property
    def n(self) -> int:
        return self.columns[""].n if self.columns else 0

    def update(self, x: Tensor, targets: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Add rows x [n, d] and (name, target [n, k] or [n]) pairs, from a generator to hold one at a time.

        Raises DarkmatterError where rows differ in number or are not finite.
        """
        if not len(x):
            return
        with _exact(x.device):
            self._add("", x, x)
            for name, y in targets:
                self._add(name, x, y.reshape(len(y), -1))

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise DarkmatterError(f"{name} has {len(y)} rows and x {len(x)}: give both for the same tokens.")
        total = _column_sums(y.to(_home(y))).to(_home(x))
        _check_finite(total, name or "x")
        if name not in self.columns:  # rounded, so that shifting float32 rows rounds only once
            shift = (total / len(y)).float().to(WIDE)
            zeros = shift.new_zeros(x.shape[1], y.shape[1])
            self.columns[name] = Columns(shift, torch.zeros_like(shift), zeros)
        to, shift_x = self.columns[name], self.columns[""].shift
        wide = self.products == "float64" or (name != "" and y.dtype == WIDE)
        chunk = CHUNK if x.device.type == "cpu" else ROWS
        for rows, targets in zip(x.split(ROWS), y.split(ROWS), strict=True):
            product = torch.zeros(x.shape[1], y.shape[1], dtype=WIDE if wide else torch.float32,
                                  device=_home(x) if wide else x.device)
            for a, b in zip(rows.split(chunk), targets.split(chunk), strict=True):
                u = shifted(a, shift_x, wide)
                _add_product(product, u, None if name == "" else shifted(b, to.shift, wide))
            add_narrow(to.cross, product.to(_home(x)))
        to.total += total - len(y) * to.shift
        to.n += len(y)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments over the rows of both, whatever their shifts."""
        if not self.n or not other.n:
            return deepcopy(self if self.n else other)
        a, b = self.columns, other.columns
        if {k: c.cross.shape for k, c in a.items()} != {k: c.cross.shape for k, c in b.items()}:
            raise DarkmatterError("Moments of different targets cannot be added: fit them apart.")
        result = Moments("float64" if self.products == other.products == "float64" else "float32")
        for k, mine in a.items():
            moved = b[k].moved(b[""].shift - a[""].shift, b[k].shift - mine.shift, b[""].total)
            total, cross = mine.total + moved.total, mine.cross + moved.cross
            result.columns[k] = Columns(mine.shift, total, cross, mine.n + moved.n)
        return result

    def centred(self, name: str = "") -> Columns:
        """Moments of a target (default: of x itself) with x and the target about their means."""
        if not self.n:
            raise DarkmatterError("There are no rows to fit: give more text.")
        x, y = self.columns[""], self.columns[name]
        if y.n != x.n:
            raise DarkmatterError(f"Target {name} saw {y.n} of {x.n} rows: give it with every batch.")
        _check_finite(y.cross, f"The products of {name or 'x'}")
        moved = y.moved(-x.total / x.n, -y.total / x.n, x.total)
        return moved if name else replace(moved, cross=mirrored(moved.cross))


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix [d, d] of which only the lower half is known."""
    return lower.tril().add_(lower.tril(-1).T)


def _add_product(total: Tensor, u: Tensor, v: Tensor | None) -> None:
    """total += uᵀv; for v left out, uᵀu below the diagonal and on it, where the rest of total stays undefined."""
    if v is not None:
        total.addmm_(u.T, v)
        return
    for begin, end in pairwise(torch.linspace(0, u.shape[1], STRIPS + 1).long().tolist()):
        total[begin:, begin:end].addmm_(u[:, begin:].T, u[:, begin:end])


def add_narrow(total: Tensor, part: Tensor) -> None:
    """total += part, float64 and float32 [n, k], a few rows at a time: torch widens all of `part` in a copy first."""
    rows = WIDENED if total.device.type == "cpu" else len(total)
    for some, more in zip(total.split(rows), part.split(rows), strict=True):
        some.add_(more)


def shifted(values: Tensor, shift: Tensor, wide: bool) -> Tensor:
    """values − shift in float64 where `wide`, else in float32."""
    values = values.to(_home(values)) if wide else values
    dtype = torch.promote_types(values.dtype, WIDE if wide else torch.float32)
    return (values.to(dtype) - shift.to(dtype).to(values.device)).to(WIDE if wide else torch.float32)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x ↦ x weight + bias: weight [d, k], bias [k], float64 as solved.

    `rank` counts the independent dimensions of the x it was fitted on; `note` says so where it is not full.
    """

    weight: Tensor
    bias: Tensor
    rank: int
    note: str = ""

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "LinearMap":
        return replace(self, weight=self.weight.to(dtype).to(device), bias=self.bias.to(dtype).to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [n, k] for x [n, d], in the dtype of x and at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        own = self.to(dtype, x.device)
        with _exact(x.device):
            return torch.addmm(own.bias, x.to(dtype), own.weight)


def solve(moments: Moments, intercept: bool = True) -> dict[str, LinearMap]:
    """argmin Σ‖x weight + bias − y‖² for every target y, from one factor of the Gram matrix XᵀX.

    Of SaeError this is b*, of ‖SaeError‖² it is a* (section 3). Rank-deficient x gives the minimum-norm
    solution, with a note. Without intercept, as in the authors' code, bias = 0: a rank-one update of the
    centred solution (Sherman and Morrison), so that the ill-conditioned raw Gram matrix is never formed.
    """
    x, maps = moments.centred(), {}
    inverse, null = _pseudo_inverse(x, moments.columns[""].cross.diagonal(), TOLERANCE[moments.products])
    rank, dims = len(null) - null.shape[1], len(null)
    note = f"x has rank {rank} of {dims}: minimum-norm solution" if rank < dims else ""
    for name in [k for k in moments.columns if k]:
        y = moments.centred(name)
        weight = inverse(y.cross)
        bias = y.shift - x.shift @ weight
        if not intercept:
            weight = weight + torch.outer(_through_origin(x, inverse, null), bias)
            bias = torch.zeros_like(bias)
        maps[name] = LinearMap(weight, bias, rank, note)
    return maps


def _pseudo_inverse(x: Columns, size: Tensor, tolerance: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """b ↦ G⁺b, and an orthonormal basis [d, ·] of the null space, for the centred Gram matrix G = x.cross.

    G is scaled to unit diagonal, since some dimensions of a residual stream vary a thousand times more than
    others; a diagonal below the rounding of `size` [d], the one before centring, counts as zero.
    """
    alive = x.cross.diagonal() > tolerance * size
    scale = torch.where(alive, x.cross.diagonal(), 1.0).rsqrt() * alive
    gram = (x.cross * scale).mul_(scale[:, None])
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed and x.n > len(gram) and factor.diagonal().min() ** 2 > tolerance:
        return lambda b: scale[:, None] * torch.cholesky_solve(scale[:, None] * b, factor), gram[:, :0]
    values, vectors = torch.linalg.eigh(gram)
    keep = values > tolerance * values[-1].clamp(min=1)
    keep[: max(len(gram) - x.n + 1, 0)] = False  # n centred rows span at most n − 1 dimensions
    null = torch.linalg.qr(torch.where(alive, scale, 1.0)[:, None] * vectors[:, ~keep]).Q
    span = scale[:, None] * vectors[:, keep]

    def least_norm(b: Tensor) -> Tensor:
        w = span @ ((span.T @ b) / values[keep, None])
        return w - null @ (null.T @ w)

    return least_norm, null


def _through_origin(x: Columns, inverse: Callable[[Tensor], Tensor], null: Tensor) -> Tensor:
    """The direction v [d] such that weight + vβᵀ is the fit without intercept, β the intercept given up."""
    outside = null @ (null.T @ x.shift)
    if outside.norm() > 1e-3 * x.shift.norm():  # x·outside is constant, so nothing need be given up
        return outside / outside.square().sum()
    g = inverse(x.shift[:, None])[:, 0]
    return x.n * g / (1 + x.n * x.shift @ g)


def require_rows(rows: int, dims: int, tokens_per_context: float = 0, share: float = FIT_SHARE) -> None:
    """Raise DarkmatterError unless more rows than dimensions are fitted; say how much text it would take."""
    if rows <= dims:
        message = f"Regressing on {dims} dimensions takes at least {dims + 1} tokens to fit; there are {rows}"
        if tokens_per_context:
            contexts = math.ceil((dims + 1) / (tokens_per_context * share))
            message += f": give about {contexts} contexts of {tokens_per_context:.0f} kept tokens"
        raise DarkmatterError(f"{message}.")


class Sums(dict[str, Tensor]):
    """Float64 sums of the scored rows by group (a context), enough for every score and interval.

    Keys: n [groups]; of x [n, d]: x = Σx, xx = Σ‖x‖² [groups]; of a target e [n, k] and the residual r its
    prediction left: e = Σe, ee = Σe², rr = Σr² [groups, k]. Shared x has Sums of its own: `of_x | of_sae`.
    """

    def __init__(self, groups: int) -> None:
        super().__init__(n=torch.zeros(groups, dtype=WIDE))

    def add_x(self, ids: Tensor, x: Tensor) -> None:
        """Add rows x [n, d] of the groups `ids` [n] (integers; fastest where equal ones adjoin)."""
        self._add(ids, {"x": (x, 1), "xx": (squared_norm(x), 1)})

    def add_error(self, ids: Tensor, e: Tensor, r: Tensor) -> None:
        """Add targets e (SaeError, or squared norms) and their residuals r, [n, k] or [n]."""
        e, r = (v.to(torch.promote_types(v.dtype, torch.float32)).reshape(len(v), -1) for v in (e, r))
        self._add(ids, {"e": (e, 1), "ee": (e, 2), "rr": (r, 2)})

    @torch.no_grad()
    def _add(self, ids: Tensor, columns: dict[str, tuple[Tensor, int]]) -> None:
        """Add up powers, 1 or 2, of rows by group."""
        columns["n"] = torch.ones(len(ids)), 1
        if self.keys() - columns.keys():
            raise DarkmatterError("Give x and each target Sums of their own, and join them with |.")
        groups, counts = torch.unique_consecutive(ids.cpu(), return_counts=True)
        for name, (rows, power) in columns.items():
            if name not in self:
                self[name] = torch.zeros(len(self["n"]), *rows.shape[1:], dtype=WIDE, device=_home(rows))
            for group, part in zip(groups.tolist(), rows.to(_home(rows)).split(counts.tolist()), strict=True):
                self[name][group] += _column_sums(part, power)
            _check_finite(self[name], f"{name} of the scored rows")


def _spread(s: Mapping[str, Tensor], key: str) -> Tensor:
    """Σ(v − v̄)² of x (over all dimensions) or e (of each); NaN where it is only the rounding of float32."""
    if key == "x":
        size, spread = s["xx"], s["xx"] - s["x"].square().sum(-1) / s["n"]
    else:
        size = s["ee"] + (s["xx"][..., None] / s["x"].shape[-1] if "xx" in s else 0)
        spread = s["ee"] - s["e"].square() / s["n"][..., None]
    return torch.where(spread > 1e-12 * size, spread, math.nan)


def fvu(s: Mapping[str, Tensor]) -> Tensor:
    """FVU = Σ‖x − Sae(x)‖² / Σ‖x − x̄‖², x̄ the mean of each dimension over the scored rows (section 3)."""
    return s["ee"].sum(-1) / _spread(s, "x")


def fvu_nonlinear(s: Mapping[str, Tensor]) -> Tensor:
    """FVU_nonlinear = Σ‖NonlinearError‖² / Σ‖x − x̄‖² = 1 − R²(x, Sae(x) + b*x) (section 4)."""
    return s["rr"].sum(-1) / _spread(s, "x")


def r2_vector(s: Mapping[str, Tensor]) -> Tensor:
    """The paper's R²: 1 − Σr²/Σ(e − ē)² of each dimension, then the mean over dimensions that vary."""
    return (1 - s["rr"] / _spread(s, "e")).nanmean(-1)


def r2_vector_weighted(s: Mapping[str, Tensor]) -> Tensor:
    """1 − ΣSSE/ΣSST over the dimensions that vary: each counts by its variance."""
    spread = _spread(s, "e")
    return 1 - (s["rr"] * spread.isfinite()).sum(-1) / spread.nansum(-1)  # 0/0 where none varies


Statistic = Callable[[Mapping[str, Tensor]], Tensor]
STATISTICS: dict[str, Statistic] = {
    f.__name__: f for f in (fvu, fvu_nonlinear, r2_vector, r2_vector_weighted)
}
STATISTICS["r2_norm"] = r2_vector  # of one column


@dataclass(frozen=True)
class Score:
    """A value, and its 95% interval from n rows of `sources` held-out sources; None where `note` says why."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    sources: int
    note: str = ""


def resample(sums: Mapping[str, Tensor], ids: np.ndarray, n: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Totals of sums [groups, ...], then of n bootstrap draws of whole sources: each key [1 + n, ...].

    `ids` [groups] names the source of each group; those without rows are left out. One seed draws the same
    sources for every SAE, so that SAEs can be compared draw by draw. Two keys are added: `sources`, how many
    were drawn, and `effective`, (Σn)²/Σn² over them, fewer where sizes differ.
    """
    scored = sums["n"].cpu() > 0
    if not scored.any():
        raise DarkmatterError("There are no held-out rows to score: give more text.")
    names, index = np.unique(np.asarray(ids)[scored.numpy()], return_inverse=True)
    m, index = len(names), torch.from_numpy(index)
    data = {
        k: v.cpu().new_zeros(m, *v.shape[1:]).index_add_(0, index, v.cpu()[scored]) for k, v in sums.items()
    }
    draws = np.random.default_rng(seed).multinomial(m, [1 / m] * m, size=n)
    counts = torch.cat([torch.ones(1, m, dtype=WIDE), torch.from_numpy(draws).to(WIDE)])
    totals = {k: torch.tensordot(counts, v, 1) for k, v in data.items()}
    effective = totals["n"].square() / (counts @ data["n"].square())
    return totals | {"sources": counts.sum(1), "effective": effective}


def interval(draws: Tensor, effective: float) -> tuple[float, float] | tuple[None, None]:
    """95% interval from bootstrap draws [n]: percentiles, widened for few sources; None for fewer than two.

    Plain percentiles cover 84 to 94% with 8 to 100 sources of unequal size. Hesterberg's expanded ones,
    Φ(±√(m/(m−1)) t₀.₉₇₅,ₘ₋₁) with m the effective number of sources, cover 92 to 96%.
    """
    draws = draws[draws.isfinite()]
    if effective < 1.5 or not len(draws):
        return None, None
    tail = float(stats.norm.cdf(math.sqrt(effective / (effective - 1)) * stats.t.ppf(0.025, effective - 1)))
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def score(totals: Mapping[str, Tensor], metric: str) -> Score:
    """A metric of `STATISTICS`, with its interval, from the totals of `resample`; the maps are held fixed."""
    values, of_x = STATISTICS[metric](totals), metric.startswith("fvu")
    point = {k: v[0] for k, v in totals.items()}
    n, sources, effective = int(point["n"]), int(point["sources"]), float(point["effective"])
    if not values[0].isfinite():
        what = "x" if of_x else "the target"
        return Score(None, None, None, n, sources, f"undefined: {what} has no variance on the scored rows")
    flat = 0 if of_x else int(_spread(point, "e").isnan().sum())
    notes = [f"{flat} of {len(point['e'])} dimensions without variance left out"] if flat else []
    low, high = interval(values[1:], effective)
    if effective < 10:
        notes.append(f"{'no' if low is None else 'rough'} interval: worth {effective:.1f} equal sources")
    return Score(float(values[0]), low, high, n, sources, "; ".join(notes))


@dataclass(frozen=True)
class Protocol:
    """How rows are split, whether maps have an intercept, and which rows are scored (R²s: always held out).

    `fvu_rows` is for FVU and FVU_nonlinear. With `norm_test_rows` "all" the maps of the norm test, and the
    b* that splits its errors, are fitted and scored on all rows.
    """

    name: str
    split: Literal["source", "token"] = "source"
    intercept: bool = True
    fvu_rows: Literal["eval", "all"] = "eval"
    norm_test_rows: Literal["eval", "all"] = "eval"


STRICT, PAPER = Protocol("strict"), Protocol("paper", split="token")
AUTHORS = Protocol("authors-code", split="token", intercept=False, fvu_rows="all", norm_test_rows="all")
PROTOCOLS = {p.name: p for p in (STRICT, PAPER, AUTHORS)}


def clusters(sources: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    """The unit of splits and intervals for each context, in the order of the text: its source document.

    With fewer than 20 documents, one of at most 40 contiguous blocks of contexts.
    """
    names, ids = np.unique(np.asarray(sources), return_inverse=True)
    contexts = len(ids)
    return ids if len(names) >= MIN_SOURCES else np.arange(contexts) * min(contexts, BLOCKS) // contexts


def split(ids: np.ndarray, share: float = FIT_SHARE, seed: int = 0) -> np.ndarray:
    """True for each context that fits: whole `clusters` at random, each taken if the share comes nearer."""
    share_of = np.bincount(ids) / max(len(ids), 1)
    fit = np.zeros(len(share_of), dtype=bool)
    for i in np.random.default_rng(seed).permutation(len(share_of)):
        taken = share_of[fit].sum()
        fit[i] = abs(taken + share_of[i] - share) < abs(taken - share)
    if fit.all() or not fit.any():
        raise DarkmatterError(f"{len(ids)} contexts leave nothing to fit or to hold out: give more text.")
    return fit[ids]


def token_split(context: int, tokens: int, share: float = FIT_SHARE, seed: int = 0) -> np.ndarray:
    """True for each token of one context [tokens] that fits, at random: the same in any batch and order."""
    return np.random.default_rng([seed, context]).random(tokens) < share


def best_scale(x2: float, sae2: float, error2: float) -> float:
    """Shrinkage control: argmin_s Σ‖x − s·Sae(x)‖², from Σ‖x‖², Σ‖Sae(x)‖² and Σ‖SaeError‖².

    The error left is (1 − s)x + s·SaeError, so its NonlinearError is s times the old one.
    """
    return (x2 + sae2 - error2) / (2 * sae2) if sae2 > 0 else 1.0
