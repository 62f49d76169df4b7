"""What is scored on held-out rows: FVU, FVU_nonlinear, and R² of vectors and norms, each defined.

NonlinearError = SaeError − LinearError, and LinearError = b*x (section 3). Everything is a function
of sums over the rows of a group (a context, or a source), so that a bootstrap draw of groups needs
no second look at the rows.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import DarkmatterError
from .moments import WIDE, check_finite, column_sums, home, squared_norm

VECTORS = ("x", "sae", "error", "linear", "nonlinear")  # whose squared norms are tested (section 5)
VECTOR_METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted")


class Sums(dict[str, Tensor]):
    """Float64 sums of the scored rows by group (a context), enough for every score and interval.

    Keys: n [groups]; of x [n, d]: x = Σx, xx = Σ‖x‖² [groups]; of a target e [n, k] and the
    residual r that its prediction left: e = Σe, ee = Σe², rr = Σr² [groups, k]. An x that several
    targets share has Sums of its own: ``of_x | of_sae``.
    """

    def __init__(self, groups: int) -> None:
        super().__init__(n=torch.zeros(groups, dtype=WIDE))

    def add_x(self, ids: Tensor, x: Tensor) -> None:
        """Add rows x [n, d] of the groups ``ids``, int [n]; fastest where equal ones adjoin."""
        self._add(ids, {"x": (x, 1), "xx": (squared_norm(x), 1)})

    def add_error(self, ids: Tensor, e: Tensor, r: Tensor) -> None:
        """Add targets e (SaeError, or squared norms) and their residuals r, [n, k] or [n]."""
        e, r = (values.to(torch.promote_types(values.dtype, torch.float32)).reshape(len(values), -1)
                for values in (e, r))
        self._add(ids, {"e": (e, 1), "ee": (e, 2), "rr": (r, 2)})

    def add_values(self, ids: Tensor, v: Tensor) -> None:
        """Add numbers v [n, k] or [n] of which the mean is wanted: v = Σv [groups, k]."""
        self._add(ids, {"v": (v.double().reshape(len(v), -1), 1)})

    @torch.no_grad()
    def _add(self, ids: Tensor, columns: dict[str, tuple[Tensor, int]]) -> None:
        """Add up powers, 1 or 2, of rows by group."""
        columns["n"] = torch.ones(len(ids)), 1
        if self.keys() - columns.keys():
            raise DarkmatterError("Give x and each target Sums of their own, and join them with |.")
        groups, counts = torch.unique_consecutive(ids.cpu(), return_counts=True)
        for name, (rows, power) in columns.items():
            if name not in self:
                shape = len(self["n"]), *rows.shape[1:]
                self[name] = torch.zeros(shape, dtype=WIDE, device=home(rows))
            parts = rows.to(home(rows)).split(counts.tolist())
            for group, part in zip(groups.tolist(), parts, strict=True):
                self[name][group] += column_sums(part, power)
            check_finite(self[name], f"{name} of the scored rows")


def spread_of(s: Mapping[str, Tensor], key: str) -> Tensor:
    """Σ(v − v̄)² of x (over all dimensions) or e (of each); NaN if only float32's rounding."""
    if key == "x":
        size, spread = s["xx"], s["xx"] - s["x"].square().sum(-1) / s["n"]
    else:
        size = s["ee"] + (s["xx"][..., None] / s["x"].shape[-1] if "xx" in s else 0)
        spread = s["ee"] - s["e"].square() / s["n"][..., None]
    return torch.where(spread > 1e-12 * size, spread, math.nan)


def mean(s: Mapping[str, Tensor]) -> Tensor:
    """The mean of values over the scored rows, [k]."""
    return s["v"] / s["n"][..., None]


def fvu(s: Mapping[str, Tensor]) -> Tensor:
    """FVU = Σ‖x − Sae(x)‖² / Σ‖x − x̄‖², x̄ the mean over the scored rows (section 3).

    For a transcoder y stands for x: Σ‖y − T(x)‖² / Σ‖y − ȳ‖².
    """
    return s["ee"].sum(-1) / spread_of(s, "x")


def fvu_nonlinear(s: Mapping[str, Tensor]) -> Tensor:
    """FVU_nonlinear = Σ‖NonlinearError‖² / Σ‖x − x̄‖² = 1 − R²(x, Sae(x) + b*x) (section 4)."""
    return s["rr"].sum(-1) / spread_of(s, "x")


def r2_vector(s: Mapping[str, Tensor]) -> Tensor:
    """The paper's R²: 1 − Σr²/Σ(e − ē)² by dimension, then the mean over those that vary."""
    return (1 - s["rr"] / spread_of(s, "e")).nanmean(-1)


def r2_vector_weighted(s: Mapping[str, Tensor]) -> Tensor:
    """1 − ΣSSE/ΣSST over the dimensions that vary: each counts by its variance."""
    spread = spread_of(s, "e")
    return 1 - (s["rr"] * spread.isfinite()).sum(-1) / spread.nansum(-1)  # 0/0 where none varies


Statistic = Callable[[Mapping[str, Tensor]], Tensor]
STATISTICS: dict[str, Statistic] = {
    "fvu": fvu, "fvu_nonlinear": fvu_nonlinear, "r2_vector": r2_vector,
    "r2_vector_weighted": r2_vector_weighted, "r2_norm": r2_vector,  # a norm is one column
}


def best_scale(x2: float, sae2: float, error2: float) -> float:
    """Shrinkage control: argmin_s Σ‖x − s·Sae(x)‖², from Σ‖x‖², Σ‖Sae(x)‖² and Σ‖SaeError‖².

    The error left is (1 − s)x + s·SaeError, so its NonlinearError is s times the old one.
    """
    return (x2 + sae2 - error2) / (2 * sae2) if sae2 > 0 else 1.0
