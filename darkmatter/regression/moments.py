"""Least squares on streams of rows: moments summed block by block, and the maps solved from them.

x is an activation, SaeError = x − Sae(x), b* the linear map fitted from x to SaeError (section 3 of the paper).
`update` a `Moments` batch by batch, then `solve` it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..errors import DarkmatterError
from .splits import FIT_SHARE

ROWS = 4096  # summed in float32: longer sums lose digits
CHUNK = 1024  # rows shifted and multiplied at once: they stay in the processor's cache
WIDENED = 64  # rows turned to float64 at once: they stay in the processor's cache
STRIPS = 6  # of a symmetric product, of which only what lies below the diagonal is computed
TOLERANCE = {"float32": 3e-6, "float64": 1e-12}  # of the rank: least pivot of a Gram matrix of unit diagonal
WIDE = torch.float64


def home(values: Tensor) -> torch.device:
    """Where float64 sums live: beside the values, except that MPS has no float64."""
    return torch.device("cpu") if values.device.type == "mps" else values.device


def check_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise DarkmatterError(f"{what} holds NaN or infinite values: check the weights and the data type.")


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
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


def column_sums(rows: Tensor, power: int = 1) -> Tensor:
    """Σ of rows [n, ...], or of their squares, float64, a few at a time: they stay in the processor's cache."""
    total = torch.zeros(rows.shape[1:], dtype=WIDE, device=rows.device)
    for some in rows.split(CHUNK // 2 if rows.device.type == "cpu" else len(rows)):
        total += (some if power == 1 else some.square()).sum(0, dtype=WIDE)
    return total


def squared_norm(v: Tensor) -> Tensor:
    """‖v‖² of each row of v [n, d], float64 [n]: the target of the norm regressions (section 4)."""
    return torch.linalg.vector_norm(v.to(home(v)), dim=1, dtype=WIDE).square()


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
        with exact(x.device):
            self._add("", x, x)
            for name, y in targets:
                self._add(name, x, y.reshape(len(y), -1))

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise DarkmatterError(f"{name} has {len(y)} rows and x {len(x)}: give both for the same tokens.")
        total = column_sums(y.to(home(y))).to(home(x))
        check_finite(total, name or "x")
        if name not in self.columns:  # rounded, so that shifting float32 rows rounds only once
            shift = (total / len(y)).float().to(WIDE)
            zeros = shift.new_zeros(x.shape[1], y.shape[1])
            self.columns[name] = Columns(shift, torch.zeros_like(shift), zeros)
        to, shift_x = self.columns[name], self.columns[""].shift
        wide = self.products == "float64" or (name != "" and y.dtype == WIDE)
        chunk = CHUNK if x.device.type == "cpu" else ROWS
        for rows, targets in zip(x.split(ROWS), y.split(ROWS), strict=True):
            product = torch.zeros(x.shape[1], y.shape[1], dtype=WIDE if wide else torch.float32,
                                  device=home(x) if wide else x.device)
            for a, b in zip(rows.split(chunk), targets.split(chunk), strict=True):
                u = shifted(a, shift_x, wide)
                _add_product(product, u, None if name == "" else shifted(b, to.shift, wide))
            add_narrow(to.cross, product.to(home(x)))
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
        check_finite(y.cross, f"The products of {name or 'x'}")
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
    values = values.to(home(values)) if wide else values
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
        with exact(x.device):
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
