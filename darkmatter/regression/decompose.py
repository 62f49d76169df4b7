"""``decompose``: what is the error of an SAE made of, for an SAE and activations that you hold in your hands."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import DarkmatterError
from ..outputs import write_json
from .draws import Draws
from .moments import LinearMap, require_rows
from .passes import VECTOR_METRICS, VECTORS, Block, Choice, Passes, Rebuilt
from .splits import FIT_SHARE, MIN_SOURCES, clusters, split

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ALONE = "sae"  # the name of an SAE that is not one of a dict
BATCH = 4096  # rows of a tensor or an array handled at once
LABELS = {"fvu": "FVU", "fvu_nonlinear": "FVU_nonlinear", "r2_vector": "R² of the error vector",
          "r2_vector_weighted": "  weighted by variance", "r2_norm": "R² of the squared error norm"}

Rows = Tensor | np.ndarray | Iterable[Any]
Sources = Sequence[Any] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The error of one SAE, taken apart. Every number is held out and a ``Draws``: value, low, high (95%)."""

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
    """R² of the squared norm of x, sae, error, linear and nonlinear, each predicted linearly from x (section 5)."""
    map: LinearMap
    """b*, with ``weight`` [d, k] and ``bias`` [k]: LinearError = x weight + bias."""
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
    rebuild: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """Sae(x), as it was given."""

    def linear_error(self, x: Tensor) -> Tensor:
        """b*x for x [n, d]: the part of the error that is a linear function of x, [n, k]."""
        return self.map(x)

    @torch.no_grad()
    def nonlinear_error(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """What is left of the error without its linear part, [n, k], for x [n, d] (and a transcoder's target)."""
        assert self.rebuild is not None
        return (x if target is None else target) - self.rebuild(x) - self.map(x)

    @property
    def metrics(self) -> dict[str, Draws]:
        """Every number by name; those of the norm test as 'norm_test_x' and so on."""
        own = {"l0": self.l0} if self.l0 else {}
        own |= {name: getattr(self, name) for name in (*VECTOR_METRICS, "r2_norm")}
        return own | {f"norm_test_{name}": each for name, each in self.norm_test.items()}

    @property
    def table(self) -> pd.DataFrame:
        """One row a metric: value, low, high, note."""
        rows = {name: (each.value, each.low, each.high, each.note) for name, each in self.metrics.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "note"])

    def plot(self, name: str = "") -> "Figure":
        """A bar of FVU, split into the share that is linear in x and the share that is not."""
        return _bars({name: self})

    def to_json(self, path: str | Path) -> None:
        """Write the numbers in the form of the command ``decompose --json``.

        Raises DarkmatterError where the place is a directory or cannot be written.
        """
        write_json(path, self.plain())

    def plain(self) -> dict[str, Any]:
        """The numbers as JSON can hold them; None where there is none."""
        ends = {name: None if each.low is None else [each.low, each.high] for name, each in self.metrics.items()}
        values = {name: each.value for name, each in self.metrics.items()}
        tests = {name: f"norm_test_{name}" for name in VECTORS}
        plain = [name for name in values if name not in tests.values()]
        notes = {name: each.note for name, each in self.metrics.items() if each.note}
        return {"l0": None, "dead_share": self.dead_share, **{name: values[name] for name in plain},
                "norm_test": {name: values[key] for name, key in tests.items()},
                "n_fit": self.n_fit, "n_eval": self.n_eval,
                "intervals": {**{name: ends[name] for name in plain},
                              "norm_test": {name: ends[key] for name, key in tests.items()}},
                "notes": notes | self.notes, "settings": self.settings}

    def __str__(self) -> str:
        width = max(map(len, LABELS.values()))
        lines = [f"{label:<{width}}  {getattr(self, name)}" for name, label in LABELS.items()]
        lines += [f"norm test of {name:<{width - 13}}  {each}" for name, each in self.norm_test.items()]
        lines += [f"L0{'':<{width - 2}}  {self.l0:.1f}"] if self.l0 else []
        said = [f"{name}: {note}" for name, note in self.plain()["notes"].items()]
        return "\n".join([*lines, f"fitted on {self.n_fit:,} rows, scored on {self.n_eval:,} others", *said])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = [(label, f"{getattr(self, name)}") for name, label in LABELS.items()]
        shown += [(f"norm test of {name}", f"{each}") for name, each in self.norm_test.items()]
        return pd.DataFrame(shown, columns=["", "value [95% interval]"]).to_html(index=False) + _bar_html(self)


class Decompositions(dict[str, Decomposition]):
    """Several SAEs on the same rows, by name: their numbers may be compared draw by draw."""

    @property
    def table(self) -> pd.DataFrame:
        """One row an SAE and metric: sae, metric, value, low, high, note."""
        parts = [each.table.rename_axis("metric").reset_index().assign(sae=name) for name, each in self.items()]
        return pd.concat(parts, ignore_index=True).reindex(columns=["sae", "metric", "value", "low", "high", "note"])

    def plot(self) -> "Figure":
        """A bar of FVU for each SAE, split into its linear and its nonlinear share."""
        return _bars(self)

    def to_json(self, path: str | Path) -> None:
        """Write all of them, by name."""
        write_json(path, {name: each.plain() for name, each in self.items()})

    def _repr_html_(self) -> str:
        names = ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm")
        rows = [(sae, *(f"{getattr(each, name)}" for name in names)) for sae, each in self.items()]
        return pd.DataFrame(rows, columns=["SAE", *(LABELS[name] for name in names)]).to_html(index=False)


def decompose(sae: Any, x: Rows, *, target: Rows | None = None, source: Sources | None = None,
              fit_share: float = FIT_SHARE, draws: int = 1000, seed: int = 0) -> Any:
    """Take the error of an SAE apart: what of it is a linear function of the activation, and what is not.

    ``sae``: a sae-lens SAE, or any callable that maps x [n, d] to its reconstruction [n, d]; or a dict of several,
    which share every pass over x. ``x``: [n, d] as a tensor, an array or a memory map, or anything that gives batches
    of rows each time it is iterated, such as a list or a DataLoader (memory then does not grow with the rows, but for
    a few numbers each). ``target``: for a transcoder, y [n, k] in the same form; the error is y − sae(x), predicted
    from x. ``source``: for each row the document it is from; whole documents are fitted or held out, and intervals
    are over them. Left out, or with fewer than 20, contiguous blocks of rows take their place.

    A share ``fit_share`` of the rows fits the maps, the others are scored; ``draws`` bootstrap draws with ``seed``.
    Rows are taken as float32, or float64 where they are; sums are float64; devices follow x.

    Returns a Decomposition, or for a dict Decompositions. Raises DarkmatterError, with a sentence that says what to
    do, for shapes that do not fit, values that are not finite, too few rows, and batches that come only once.
    """
    saes = dict(sae) if isinstance(sae, Mapping) else {ALONE: sae}
    if not saes or "" in saes:
        raise DarkmatterError("Give at least one SAE in the dict, each under a name.")
    reader = _Reader(x, target)
    n = reader.count(source)
    ids, note = _clusters(source, n)
    fit = split(ids, fit_share, seed)
    choice = Choice(torch.from_numpy(fit), torch.from_numpy(~fit), torch.from_numpy(ids), np.arange(ids.max() + 1),
                    draws=draws, seed=seed)
    rebuilds = {name: _Rebuild(one, f"The SAE '{name}'") for name, one in saes.items()}
    passes = Passes(lambda which: reader.blocks(n, int(fit.sum())), rebuilds, choice).run()
    settings = {"fit_share": fit_share, "draws": draws, "seed": seed}
    found = {name: _collected(passes, name, rebuilds[name], note, settings) for name in saes}
    return Decompositions(found) if isinstance(sae, Mapping) else found[ALONE]


def _collected(passes: Passes, name: str, rebuild: "_Rebuild", note: str, settings: dict[str, Any]) -> Decomposition:
    fired, notes = passes.fired.get(name), {"rows": note} if note else {}
    notes |= {"map": passes.maps[name].note} if passes.maps[name].note else {}
    return Decomposition(
        **{metric: passes.vector_score(name, metric) for metric in VECTOR_METRICS},
        r2_norm=passes.norm_score(name, "error"),
        norm_test={vector: passes.norm_score(name, vector) for vector in VECTORS}, map=passes.maps[name],
        n_fit=int(passes.choice.fit.sum()), n_eval=int(passes.choice.scored.sum()), l0=passes.mean_l0(name),
        dead_share=None if fired is None else 1 - float(fired.double().mean()), notes=notes, settings=settings,
        rebuild=rebuild.plain)


def _clusters(source: Sources | None, n: int) -> tuple[np.ndarray, str]:
    """The source of each row as int64 [n], counted from 0, and what to know about it."""
    given = np.zeros(n, int) if source is None else np.asarray(source.cpu() if isinstance(source, Tensor) else source)
    documents = len(np.unique(given))
    ids = np.unique(clusters(given), return_inverse=True)[1].astype(np.int64)
    if documents >= MIN_SOURCES:
        return ids, ""
    said = "no sources were given" if source is None else f"{documents} of the {MIN_SOURCES} sources that it takes"
    return ids, f"{said}: {ids.max() + 1} contiguous blocks of rows take their place, and intervals are over these"


class _Reader:
    """Rows of x (and a target) in batches, as often as asked."""

    def __init__(self, x: Rows, target: Rows | None) -> None:
        self.x, self.target = x, target
        for rows, what in ((x, "x"), (target, "the target")):
            if isinstance(rows, Iterator):
                raise DarkmatterError(f"{what} gives its batches only once, and three passes need them: give a list, "
                                      "a DataLoader, or an object that can be iterated again.")
        if _whole(x) and target is not None and not _whole(target):
            raise DarkmatterError("x is one array and the target comes in batches: give both in the same form.")

    def count(self, source: Any) -> int:
        """The number of rows; where neither x nor ``source`` tells it, they are read once for it."""
        if isinstance(self.x, Tensor | np.ndarray):
            n = len(self.x)
        else:
            n = sum(len(batch) for batch in self._batches(self.x)) if source is None else len(source)
        if source is not None and len(source) != n:
            raise DarkmatterError(f"There are {n} rows of x and {len(source)} sources: give one for each row.")
        if isinstance(self.target, Tensor | np.ndarray) and len(self.target) != n:
            raise DarkmatterError(f"There are {n} rows of x and {len(self.target)} of the target: give both for the "
                                  "same tokens.")
        if n < 2:
            raise DarkmatterError(f"There are {n} rows, and some are fitted on and others scored: give more.")
        return n

    def blocks(self, n: int, fitted: int) -> Iterator[Block]:
        """All rows, checked; raises DarkmatterError where they are not the n that were counted."""
        at, targets = 0, None if self.target is None else self._batches(self.target)
        for batch in self._batches(self.x):
            if batch.ndim != 2:
                raise DarkmatterError(f"x should be rows [n, d], and is {list(batch.shape)}: give one row a token.")
            if not at:
                require_rows(fitted, batch.shape[1])
            target = batch if targets is None else next(targets, None)
            if target is None or len(target) != len(batch):
                raise DarkmatterError("x and the target have batches of different numbers of rows: give both for the "
                                      "same tokens, in the same batches.")
            yield Block(slice(at, at + len(batch)), batch, target)
            at += len(batch)
        if at != n:
            raise DarkmatterError(f"{n} rows were expected and {at} came: an object that gives batches must give the "
                                  "same ones each time it is iterated, one row for each source.")

    def _batches(self, rows: Rows) -> Iterator[Tensor]:
        if isinstance(rows, Tensor | np.ndarray):
            if rows.ndim == 0:
                raise DarkmatterError("x is a single number: give rows [n, d].")
            parts: Iterable[Any] = (rows[at:at + BATCH] for at in range(0, len(rows), BATCH))
        else:
            parts = rows
        for part in parts:
            batch = part[0] if isinstance(part, list | tuple) and len(part) == 1 else part  # as DataLoaders give them
            if not isinstance(batch, Tensor | np.ndarray):
                raise DarkmatterError(f"A batch is a {type(batch).__name__}: give tensors or arrays [n, d].")
            tensor = torch.as_tensor(np.array(batch) if isinstance(batch, np.ndarray) else batch).detach()
            yield tensor if tensor.dtype == torch.float64 else tensor.float()


def _whole(rows: Any) -> bool:
    return isinstance(rows, Tensor | np.ndarray)


class _Rebuild:
    """An SAE as the passes call it: reconstructions checked, and latents counted where it has an encoder."""

    def __init__(self, sae: Any, what: str) -> None:
        if not callable(sae):
            raise DarkmatterError(f"{what} is a {type(sae).__name__}: give a sae-lens SAE, or a callable that maps x "
                                  "to its reconstruction.")
        self.sae, self.what = sae, what
        self.latents = callable(getattr(sae, "encode", None))

    def plain(self, x: Tensor) -> Tensor:
        """Sae(x), in at least float32."""
        y: Any = self.sae(x)
        return _wide(y)

    @torch.no_grad()
    def __call__(self, block: Block) -> Rebuilt:
        y = self.sae(block.x)
        if not isinstance(y, Tensor):
            raise DarkmatterError(f"{self.what} returns a {type(y).__name__} where a tensor is expected: wrap it so "
                                  "that it returns the reconstruction alone.")
        if y.shape != block.y.shape:
            raise DarkmatterError(f"{self.what} returns {list(y.shape)} for x of {list(block.x.shape)}, where "
                                  f"{list(block.y.shape)} is expected: was it trained at another site?")
        if not bool(y.isfinite().all()):
            raise DarkmatterError(f"{self.what} returns NaN or infinite values: check its weights and its type.")
        active = self._active(block.x)
        return Rebuilt(_wide(y)) if active is None else Rebuilt(_wide(y), active.sum(1), active.any(0))

    def _active(self, x: Tensor) -> Tensor | None:
        """Which latents are active, bool [n, latents]; None for an encoder of another kind."""
        if self.latents:
            with suppress(Exception):  # somebody else's encode may want other arguments: L0 is then not known
                latents = self.sae.encode(x)
                latents = latents.to_dense() if latents.is_sparse else latents
                if latents.ndim == 2 and len(latents) == len(x):
                    return latents != 0
            self.latents = False
        return None


def _wide(y: Tensor) -> Tensor:
    return y.detach().to(torch.promote_types(y.dtype, torch.float32))


def _bars(found: Mapping[str, Decomposition]) -> "Figure":
    """FVU of each, split in two, narrow to read: a horizontal bar an SAE."""
    import plotly.graph_objects as go

    fig, names = go.Figure(), list(found)
    parts = {"linear in x": [float(each.fvu) - float(each.fvu_nonlinear) for each in found.values()],
             "not linear in x": [float(each.fvu_nonlinear) for each in found.values()]}
    for label, values in parts.items():
        fig.add_bar(y=names, x=values, name=label, orientation="h")
    fig.update_layout(barmode="stack", template="plotly_white", height=160 + 40 * len(names))
    return fig.update_xaxes(title_text="share of the variance left unexplained (FVU)")


def _bar_html(each: Decomposition) -> str:
    """The split as two coloured boxes, for where no figure is drawn."""
    whole, part = float(each.fvu), float(each.fvu_nonlinear)
    if not (whole > 0 and np.isfinite(part)):
        return ""
    share = min(max(part / whole, 0), 1)
    style = "display:inline-block;height:1em"
    boxes = "".join(f'<span style="{style};width:{100 * width:.1f}%;background:{colour}"></span>'
                    for width, colour in ((1 - share, "#0072b2"), (share, "#d55e00")))
    return (f'<div style="width:24em">{boxes}</div><small>{1 - share:.0%} of the unexplained variance is linear in x, '
            f"{share:.0%} is not</small>")
