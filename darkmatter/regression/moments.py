"""Least squares on streams of rows: moments summed block by block, and b* and a* solved from them.

x is an activation and SaeError = x − Sae(x). Section 3 of the paper fits two linear maps on x:
b* to the vector SaeError, and a* to its squared norm ‖SaeError‖². Both are ``solve``, of a
``Moments`` that was updated with those targets batch by batch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..errors import DarkmatterError

ROWS = 4096  # summed in float32: longer sums lose digits
CHUNK = 1024  # rows shifted and multiplied at once: they stay in the processor's cache
WIDENED = 64  # rows turned to float64 at once: they stay in the processor's cache
STRIPS = 6  # of a symmetric product, of which only what lies below the diagonal is computed
# Of the rank: the least pivot of a Gram matrix of unit diagonal, by the type of the products.
TOLERANCE = {"float32": 3e-6, "float64": 1e-12}
WIDE = torch.float64


def home(values: Tensor) -> torch.device:
    """Where float64 sums live: beside the values, except that MPS has no float64."""
    return torch.device("cpu") if values.device.type == "mps" else values.device


def check_finite(values: Tensor, what: str) -> None:
    """Raise DarkmatterError where values are NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise DarkmatterError(f"{what} holds NaN or infinite values: check the weights and the "
                              "data type.")


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
    """Σ of rows [n, ...] or of their squares, float64, in parts that fit a processor's cache."""
    total = torch.zeros(rows.shape[1:], dtype=WIDE, device=rows.device)
    for part in rows.split(CHUNK // 2 if rows.device.type == "cpu" else len(rows)):
        total += (part if power == 1 else part.square()).sum(0, dtype=WIDE)
    return total


def squared_norm(v: Tensor) -> Tensor:
    """‖v‖² of each row of v [n, d], float64 [n]: the target of the norm regressions (section 4)."""
    return torch.linalg.vector_norm(v.to(home(v)), dim=1, dtype=WIDE).square()


@dataclass
class Columns:
    """Float64 sums over n rows of y [n, k] less ``shift`` [k]: total = Σy [k], cross = Xᵀy [d, k].

    Of x with itself only the lower half of cross counts, but for what ``Moments.centred`` returns.
    """

    shift: Tensor
    total: Tensor
    cross: Tensor
    n: int = 0


class Moments:
    """Streaming moments of x [n, d] and of named targets [n, k], XᵀX shared by all of them.

    All is shifted by the mean of the first batch: raw activations have a large mean (their Gram
    matrix has condition 3e7, shifted 1e4). Blocks are multiplied in float32, or in float64 with
    ``products="float64"`` and for every target given in float64 (squared norms); sums are float64.
    Memory: 8·d·(d + Σk) bytes for any n.
    """

    def __init__(self, products: Literal["float32", "float64"] = "float32") -> None:
        self.products: Literal["float32", "float64"] = products
        self.columns: dict[str, Columns] = {}  # of the targets, and under "" of x itself

    @property
    def n(self) -> int:
        """Rows added so far."""
        return self.columns[""].n if self.columns else 0

    def update(self, x: Tensor, targets: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Add rows x [n, d] and pairs (name, target [n, k] or [n]), from a generator one at a time.

        Raises DarkmatterError where rows differ in number or are not finite.
        """
        if not len(x):
            return
        with exact(x.device):
            self._add("", x, x)
            for name, y in targets:
                self._add(name, x, y.reshape(len(y), -1))

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add n, Σy and Xᵀy of one batch to a target's sums; the name of x itself is ""."""
        if len(x) != len(y):
            raise DarkmatterError(f"{name} has {len(y)} rows and x {len(x)}: give both for the "
                                  "same tokens.")
        total = column_sums(y.to(home(y))).to(home(x))
        check_finite(total, name or "x")
        # The first batch sets the shift, rounded so that shifting float32 rows rounds only once.
        if name not in self.columns:
            shift = (total / len(y)).float().to(WIDE)
            zeros = shift.new_zeros(x.shape[1], y.shape[1])
            self.columns[name] = Columns(shift, torch.zeros_like(shift), zeros)
        sums, shift_x = self.columns[name], self.columns[""].shift
        # A block's product is summed in the narrow type, and the blocks' products in float64.
        wide = self.products == "float64" or (name != "" and y.dtype == WIDE)
        dtype, device = (WIDE, home(x)) if wide else (torch.float32, x.device)
        chunk = CHUNK if x.device.type == "cpu" else ROWS
        for x_block, y_block in zip(x.split(ROWS), y.split(ROWS), strict=True):
            product = torch.zeros(x.shape[1], y.shape[1], dtype=dtype, device=device)
            for x_rows, y_rows in zip(x_block.split(chunk), y_block.split(chunk), strict=True):
                u = shifted(x_rows, shift_x, wide)
                _add_product(product, u, shifted(y_rows, sums.shift, wide) if name else None)
            add_narrow(sums.cross, product.to(home(x)))
        sums.total += total - len(y) * sums.shift
        sums.n += len(y)

    def centred(self, name: str = "") -> Columns:
        """Moments of a target (default: of x itself) with x and the target about their means."""
        if not self.n:
            raise DarkmatterError("There are no rows to fit: give more text.")
        x, y = self.columns[""], self.columns[name]
        if y.n != x.n:
            raise DarkmatterError(f"Target {name} saw {y.n} of {x.n} rows: give it with every "
                                  "batch.")
        check_finite(y.cross, f"The products of {name or 'x'}")
        # Σ(x − x̄)(y − ȳ) = Σxy − Σx·Σy/n
        cross = torch.addr(y.cross, x.total, -y.total / x.n)
        return Columns(y.shift + y.total / x.n, torch.zeros_like(y.total),
                       cross if name else mirrored(cross), y.n)


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix [d, d] of which only the lower half is known."""
    return lower.tril().add_(lower.tril(-1).T)


def _add_product(total: Tensor, u: Tensor, v: Tensor | None) -> None:
    """total += uᵀv. Without v, uᵀu on and below the diagonal; above it total stays undefined."""
    if v is not None:
        total.addmm_(u.T, v)
        return
    for begin, end in pairwise(torch.linspace(0, u.shape[1], STRIPS + 1).long().tolist()):
        total[begin:, begin:end].addmm_(u[:, begin:].T, u[:, begin:end])


def add_narrow(total: Tensor, part: Tensor) -> None:
    """total += part, float64 and float32 [n, k], a few rows at a time.

    Given all rows at once, torch would widen the whole of ``part`` in a copy first.
    """
    rows = WIDENED if total.device.type == "cpu" else len(total)
    for total_rows, part_rows in zip(total.split(rows), part.split(rows), strict=True):
        total_rows.add_(part_rows)


def shifted(values: Tensor, shift: Tensor, wide: bool) -> Tensor:
    """values − shift in float64 where ``wide``, else in float32."""
    values = values.to(home(values)) if wide else values
    dtype = torch.promote_types(values.dtype, WIDE if wide else torch.float32)
    difference = values.to(dtype) - shift.to(dtype).to(values.device)
    return difference.to(WIDE if wide else torch.float32)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x ↦ x weight + bias: weight [d, k], bias [k], float64 as solved.

    ``rank`` counts the independent dimensions of the x it was fitted on; ``note`` says so where it
    is not full.
    """

    weight: Tensor
    bias: Tensor
    rank: int
    note: str = ""

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "LinearMap":
        """The same map in another type, and on another device where one is given."""
        return replace(self, weight=self.weight.to(dtype).to(device),
                       bias=self.bias.to(dtype).to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [n, k] for x [n, d], in the dtype of x and at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        like_x = self.to(dtype, x.device)
        with exact(x.device):
            return torch.addmm(like_x.bias, x.to(dtype), like_x.weight)


def solve(moments: Moments, intercept: bool = True) -> dict[str, LinearMap]:
    """argmin Σ‖x weight + bias − y‖² for every target y, from one factor of the Gram matrix XᵀX.

    Of SaeError this is b*, of ‖SaeError‖² it is a* (section 3). Rank-deficient x gives the
    minimum-norm solution, with a note. Without intercept, as in the authors' code, bias = 0: a
    rank-one update of the centred solution (Sherman and Morrison), so that the ill-conditioned raw
    Gram matrix is never formed.
    """
    # The Gram matrix of x about its mean is factored once for all targets.
    x, maps = moments.centred(), {}
    raw_size = moments.columns[""].cross.diagonal()
    inverse, null = _pseudo_inverse(x, raw_size, TOLERANCE[moments.products])
    rank, dims = len(null) - null.shape[1], len(null)
    note = f"x has rank {rank} of {dims}: minimum-norm solution" if rank < dims else ""
    for name in filter(None, moments.columns):
        # weight = (XᵀX)⁻¹ Xᵀy about the means, and the bias makes the means meet.
        y = moments.centred(name)
        weight = inverse(y.cross)
        bias = y.shift - x.shift @ weight
        if not intercept:
            weight = weight + torch.outer(_through_origin(x, inverse, null), bias)
            bias = torch.zeros_like(bias)
        maps[name] = LinearMap(weight, bias, rank, note)
    return maps


def _pseudo_inverse(x: Columns, size: Tensor, tolerance: float
                    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """b ↦ G⁺b, and an orthonormal basis [d, ·] of the null space, for the Gram matrix G = x.cross.

    A diagonal of the centred G below the rounding of ``size`` [d], the one before centring, counts
    as zero.
    """
    # G is scaled to unit diagonal, since some dimensions of a residual stream vary a thousand times
    # more than others.
    alive = x.cross.diagonal() > tolerance * size
    scale = torch.where(alive, x.cross.diagonal(), 1.0).rsqrt() * alive
    gram = (x.cross * scale).mul_(scale[:, None])
    # Of full rank it has a Cholesky factor, and nothing is in its null space.
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed and x.n > len(gram) and factor.diagonal().min() ** 2 > tolerance:
        empty = gram[:, :0]
        return lambda b: scale[:, None] * torch.cholesky_solve(scale[:, None] * b, factor), empty
    # Otherwise its eigenvectors say which directions x spans; n centred rows span at most n − 1.
    values, vectors = torch.linalg.eigh(gram)
    keep = values > tolerance * values[-1].clamp(min=1)
    keep[: max(len(gram) - x.n + 1, 0)] = False
    null = torch.linalg.qr(torch.where(alive, scale, 1.0)[:, None] * vectors[:, ~keep]).Q
    span = scale[:, None] * vectors[:, keep]

    def least_norm(b: Tensor) -> Tensor:
        w = span @ ((span.T @ b) / values[keep, None])
        return w - null @ (null.T @ w)

    return least_norm, null


def _through_origin(x: Columns, inverse: Callable[[Tensor], Tensor], null: Tensor) -> Tensor:
    """The direction v [d] such that weight + vβᵀ is the fit without β, the intercept given up."""
    outside = null @ (null.T @ x.shift)
    if outside.norm() > 1e-3 * x.shift.norm():  # x·outside is constant: nothing need be given up
        return outside / outside.square().sum()
    g = inverse(x.shift[:, None])[:, 0]
    return x.n * g / (1 + x.n * x.shift @ g)
