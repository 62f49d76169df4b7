"""What ``decompose`` answers, and how it is shown: in words, as tables, as a bar, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ..outputs import write_json
from .scores import VECTOR_METRICS, VECTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from plotly.graph_objects import Figure
    from torch import Tensor

    from .draws import Draws
    from .moments import LinearMap

METRICS = ("l0", "dead_share", *VECTOR_METRICS, "r2_norm")  # of the JSON, beside the norm test
LABELS = {"fvu": "FVU", "fvu_nonlinear": "FVU_nonlinear", "r2_vector": "R² of the error vector",
          "r2_vector_weighted": "  weighted by variance", "r2_norm": "R² of the squared error norm"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Decomposition:
    """The error of one SAE, taken apart; numbers are held out, with value, low and high (95%)."""

    fvu: Draws
    """FVU = Σ‖y − Sae(x)‖² / Σ‖y − ȳ‖²; y is x, or a transcoder's target."""
    fvu_nonlinear: Draws
    """FVU_nonlinear = Σ‖NonlinearError‖² / Σ‖y − ȳ‖²."""
    r2_vector: Draws
    """R² of the error predicted linearly from x: the mean over dimensions, as in the paper."""
    r2_vector_weighted: Draws
    """The same with each dimension counted by its variance."""
    r2_norm: Draws
    """R² of ‖error‖² predicted linearly from x."""
    norm_test: dict[str, Draws]
    """R² of the squared norm of x, sae, error, linear and nonlinear, each predicted linearly from x
    (section 5)."""
    map: LinearMap
    """b*, with ``weight`` [d, k] and ``bias`` [k]: LinearError = x weight + bias."""
    reconstruct: Callable[[Tensor], Tensor] = field(repr=False)
    """Sae(x), as it was given."""
    n_fit: int
    """Rows that maps were fitted on."""
    n_eval: int
    """Rows held out and scored."""
    l0: Draws | None = None
    """Mean number of active latents a row, where the SAE has ``encode``."""
    dead_share: float | None = None
    """Share of the latents that fire on no row."""
    notes: dict[str, str] = field(default_factory=dict)
    """What to know about the numbers, by name; 'rows' is about the rows as a whole."""
    settings: dict[str, Any] = field(default_factory=dict)

    def linear_error(self, x: Tensor) -> Tensor:
        """b*x for x [n, d]: the part of the error that is a linear function of x, [n, k]."""
        return self.map(x)

    @torch.no_grad()
    def nonlinear_error(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """What is left of the error without its linear part, [n, k], for x [n, d].

        Of a transcoder, give its ``target`` [n, k].
        """
        return (x if target is None else target) - self.reconstruct(x) - self.map(x)

    @property
    def metrics(self) -> dict[str, Draws]:
        """Every number by name; those of the norm test as 'norm_test_x' and so on."""
        metrics = {"l0": self.l0} if self.l0 else {}
        metrics |= {name: getattr(self, name) for name in (*VECTOR_METRICS, "r2_norm")}
        return metrics | {f"norm_test_{vector}": draws for vector, draws in self.norm_test.items()}

    @property
    def table(self) -> pd.DataFrame:
        """One row a metric: value, low, high, note."""
        rows = {name: (draws.value, draws.low, draws.high, draws.note)
                for name, draws in self.metrics.items()}
        return pd.DataFrame.from_dict(rows, orient="index",
                                      columns=["value", "low", "high", "note"])

    def plot(self, name: str = "") -> Figure:
        """A bar of FVU, split into the share that is linear in x and the share that is not."""
        return _bars({name: self})

    def to_json(self, path: str | Path) -> None:
        """Write the numbers in the form of the command ``decompose --json``.

        Raises DarkmatterError where the place is a directory or cannot be written.
        """
        write_json(path, self.plain())

    def plain(self) -> dict[str, Any]:
        """The numbers as JSON can hold them; None where there is none."""
        result = as_json(self.metrics, self.n_fit, self.n_eval, self.settings)
        result["notes"] |= self.notes
        return result | {"dead_share": self.dead_share}

    def __str__(self) -> str:
        width = max(map(len, LABELS.values()))
        lines = [f"{label:<{width}}  {number}" for label, number in self._labelled()]
        lines.append(f"fitted on {self.n_fit:,} rows, scored on {self.n_eval:,} others")
        lines += [f"{name}: {note}" for name, note in self.plain()["notes"].items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = pd.DataFrame(self._labelled(), columns=["", "value [95% interval]"])
        return _scrolled(table) + _bar_html(self)

    def _labelled(self) -> list[tuple[str, str]]:
        """What is shown: labels, and numbers with their intervals."""
        pairs = [(label, f"{getattr(self, name)}") for name, label in LABELS.items()]
        pairs += [(f"norm test of {name}", f"{draws}") for name, draws in self.norm_test.items()]
        return pairs + ([("L0", f"{self.l0:.1f}")] if self.l0 else [])


class Decompositions(dict[str, Decomposition]):
    """Several SAEs on the same rows, by name: their numbers may be compared draw by draw."""

    @property
    def table(self) -> pd.DataFrame:
        """One row an SAE and metric: sae, metric, value, low, high, note."""
        parts = [result.table.rename_axis("metric").reset_index().assign(sae=name)
                 for name, result in self.items()]
        columns = ["sae", "metric", "value", "low", "high", "note"]
        return pd.concat(parts, ignore_index=True).reindex(columns=columns)

    def plot(self) -> Figure:
        """A bar of FVU for each SAE, split into its linear and its nonlinear share."""
        return _bars(self)

    def to_json(self, path: str | Path) -> None:
        """Write all of them, by name."""
        write_json(path, {name: result.plain() for name, result in self.items()})

    def _repr_html_(self) -> str:
        names = ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm")
        rows = [(sae, *(f"{getattr(result, name)}" for name in names))
                for sae, result in self.items()]
        table = pd.DataFrame(rows, columns=["SAE", *(LABELS[name] for name in names)])
        return _scrolled(table)


def _scrolled(table: pd.DataFrame) -> str:
    """A table that scrolls in a narrow window; the class is that of the book's other tables."""
    return ('<div class="pst-scrollable-table-container" style="overflow-x: auto">'
            f"{table.to_html(index=False, border=0)}</div>")


def as_json(metrics: Mapping[str, Draws], n_fit: int, n_eval: int, settings: dict[str, Any]
            ) -> dict[str, Any]:
    """The JSON of ``decompose``: the METRICS, then the norm test and the intervals by metric.

    A value or an interval ([low, high]) that there is none of is None, with a reason in ``notes``.
    """
    def by_metric(pick: Callable[[Draws], Any]) -> dict[str, Any]:
        picked = {name: pick(draws) for name, draws in metrics.items()}
        return {**{name: picked.get(name) for name in METRICS},
                "norm_test": {vector: picked[f"norm_test_{vector}"] for vector in VECTORS}}

    return {**by_metric(lambda draws: draws.value), "n_fit": n_fit, "n_eval": n_eval,
            "intervals": by_metric(
                lambda draws: None if draws.low is None else [draws.low, draws.high]),
            "notes": {name: draws.note for name, draws in metrics.items() if draws.note},
            "settings": settings}


def _bars(results: Mapping[str, Decomposition]) -> Figure:
    """FVU of each SAE, split in two, narrow to read: a horizontal bar an SAE."""
    import plotly.graph_objects as go

    fig, names = go.Figure(), list(results)
    whole = np.array([float(result.fvu) for result in results.values()])
    part = np.array([float(result.fvu_nonlinear) for result in results.values()])
    for label, values in (("linear in x", whole - part), ("not linear in x", part)):
        fig.add_bar(y=names, x=values, name=label, orientation="h")
    fig.update_layout(barmode="stack", template="plotly_white", height=160 + 40 * len(names))
    return fig.update_xaxes(title_text="share of the variance left unexplained (FVU)")


def _bar_html(result: Decomposition) -> str:
    """The split as two coloured boxes, for where no figure is drawn."""
    whole, part = float(result.fvu), float(result.fvu_nonlinear)
    if not (whole > 0 and np.isfinite(part)):
        return ""
    share = min(max(part / whole, 0), 1)
    style = "display:inline-block;height:1em"
    boxes = "".join(
        f'<span style="{style};width:{100 * width:.1f}%;background:{colour}"></span>'
        for width, colour in ((1 - share, "#0072b2"), (share, "#d55e00")))
    return (f'<div style="width:24em;max-width:100%">{boxes}</div><small>{1 - share:.0%} of the '
            f"unexplained variance is linear in x, {share:.0%} is not</small>")
