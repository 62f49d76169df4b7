"""``decompose``: what is the error of an SAE made of, for an SAE and activations that you hold.

Here rows are read and checked. The three passes over them are in ``passes``, the definitions in
``scores``, the least squares in ``moments``, and how the answer is shown in ``result``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DarkmatterError
from .moments import check_finite
from .passes import Block, Choice, Passes, Reconstruction
from .result import Decomposition, Decompositions
from .scores import VECTOR_METRICS, VECTORS
from .splits import FIT_SHARE, MIN_SOURCES, clusters, require_rows, split

ALONE = "sae"  # the name of an SAE that is not one of a dict
BATCH = 4096  # rows of a tensor or an array handled at once

Rows = Tensor | np.ndarray | Iterable[Any]
Sources = Sequence[Any] | np.ndarray | Tensor


def decompose(sae: Any, x: Rows, *, target: Rows | None = None, source: Sources | None = None,
              fit_share: float = FIT_SHARE, draws: int = 1000, seed: int = 0) -> Any:
    """Take the error of an SAE apart into a linear function of the activation and what is left.

    ``sae``: a sae-lens SAE, or any callable that maps x [n, d] to its reconstruction [n, d]; or a
    dict of several, which share every pass over x. ``x``: [n, d] as a tensor, an array or a memory
    map, or anything that gives batches of rows each time it is iterated, such as a list or a
    DataLoader (memory then does not grow with the rows, but for a few numbers each). ``target``:
    for a transcoder, y [n, k] in the same form; the error is y − sae(x), predicted from x.
    ``source``: for each row the document it is from; whole documents are fitted or held out, and
    intervals are over them. Left out, or with fewer than 20, contiguous blocks of rows take their
    place.

    A share ``fit_share`` of the rows fits the maps, the others are scored; ``draws`` bootstrap
    draws with ``seed``. Rows are taken as float32, or float64 where they are; sums are float64;
    devices follow x.

    Returns a Decomposition, or for a dict Decompositions. Raises DarkmatterError, with a sentence
    that says what to do, for shapes that do not fit, values that are not finite, too few rows, and
    batches that come only once.
    """
    saes = dict(sae) if isinstance(sae, Mapping) else {ALONE: sae}
    if not saes or "" in saes:
        raise DarkmatterError("Give at least one SAE in the dict, each under a name.")
    # Whole sources are fitted or held out, and intervals are over those held out.
    reader = _Reader(x, target)
    n = reader.count(source)
    ids, note = _clusters(source, n)
    fit = split(ids, fit_share, seed)
    choice = Choice(torch.from_numpy(fit), torch.from_numpy(~fit), torch.from_numpy(ids),
                    np.arange(ids.max() + 1), draws=draws, seed=seed)
    # The three passes read all rows three times, for all SAEs together.
    checked = {name: _CheckedSAE(one, f"The SAE '{name}'") for name, one in saes.items()}
    passes = Passes(lambda which: reader.blocks(n, int(fit.sum())), checked, choice).run()
    # Every number is a score of what the passes summed.
    settings = {"fit_share": fit_share, "draws": draws, "seed": seed}
    results = {name: _result(passes, name, checked[name], note, settings) for name in saes}
    return Decompositions(results) if isinstance(sae, Mapping) else results[ALONE]


def _result(passes: Passes, name: str, sae: "_CheckedSAE", note: str, settings: dict[str, Any]
            ) -> Decomposition:
    fired, notes = passes.fired.get(name), {"rows": note} if note else {}
    if passes.maps[name].note:
        notes["map"] = passes.maps[name].note
    return Decomposition(
        **{metric: passes.vector_score(name, metric) for metric in VECTOR_METRICS},
        r2_norm=passes.norm_score(name, "error"),
        norm_test={vector: passes.norm_score(name, vector) for vector in VECTORS},
        map=passes.maps[name], reconstruct=sae.plain, l0=passes.mean_l0(name),
        dead_share=None if fired is None else 1 - float(fired.double().mean()),
        n_fit=int(passes.choice.fit.sum()), n_eval=int(passes.choice.scored.sum()),
        notes=notes, settings=settings)


def _clusters(source: Sources | None, n: int) -> tuple[np.ndarray, str]:
    """The source of each row as int64 [n], counted from 0, and what to know about it."""
    if source is None:
        given, why = np.zeros(n, int), "no sources were given"
    else:
        given = np.asarray(source.cpu() if isinstance(source, Tensor) else source)
        why = f"{len(np.unique(given))} of the {MIN_SOURCES} sources that it takes"
    ids = np.unique(clusters(given), return_inverse=True)[1].astype(np.int64)
    if len(np.unique(given)) >= MIN_SOURCES:
        return ids, ""
    return ids, (f"{why}: {ids.max() + 1} contiguous blocks of rows take their place, and "
                 "intervals are over these")


class _Reader:
    """Rows of x (and a target) in batches, as often as asked."""

    def __init__(self, x: Rows, target: Rows | None) -> None:
        self.x, self.target = x, target
        for rows, what in ((x, "x"), (target, "the target")):
            if isinstance(rows, Iterator):
                raise DarkmatterError(f"{what} gives its batches only once, and three passes need "
                                      "them: give a list, a DataLoader, or an object that can be "
                                      "iterated again.")
        if _is_array(x) and target is not None and not _is_array(target):
            raise DarkmatterError("x is one array and the target comes in batches: give both in "
                                  "the same form.")

    def count(self, source: Sources | None) -> int:
        """The number of rows; where neither x nor ``source`` tells it, they are read for it."""
        if isinstance(self.x, Tensor | np.ndarray):
            n = len(self.x)
        elif source is None:
            n = sum(len(batch) for batch in _batches(self.x))
        else:
            n = len(source)
        if source is not None and len(source) != n:
            raise DarkmatterError(f"There are {n} rows of x and {len(source)} sources: give one "
                                  "for each row.")
        if isinstance(self.target, Tensor | np.ndarray) and len(self.target) != n:
            raise DarkmatterError(f"There are {n} rows of x and {len(self.target)} of the target: "
                                  "give both for the same tokens.")
        if n < 2:
            raise DarkmatterError(f"There are {n} rows, and some are fitted on and others scored: "
                                  "give more.")
        return n

    def blocks(self, n: int, fitted: int) -> Iterator[Block]:
        """All rows, checked; raises DarkmatterError where they are not the n that were counted."""
        begin, targets = 0, None if self.target is None else _batches(self.target)
        for batch in _batches(self.x):
            if batch.ndim != 2:
                raise DarkmatterError(f"x should be rows [n, d], and is {list(batch.shape)}: give "
                                      "one row a token.")
            if not begin:
                require_rows(fitted, batch.shape[1])
            target = batch if targets is None else next(targets, None)
            if target is None or len(target) != len(batch):
                raise DarkmatterError("x and the target have batches of different numbers of rows: "
                                      "give both for the same tokens, in the same batches.")
            if target is not batch:
                check_finite(target, "The target")
            yield Block(slice(begin, begin + len(batch)), batch, target)
            begin += len(batch)
        if begin != n:
            raise DarkmatterError(f"{n} rows were expected and {begin} came: an object that gives "
                                  "batches must give the same ones each time it is iterated, one "
                                  "row for each source.")


def _is_array(rows: Any) -> bool:
    return isinstance(rows, Tensor | np.ndarray)


def _batches(rows: Rows) -> Iterator[Tensor]:
    """Rows as tensors, float32 or float64; an array is copied a batch at a time."""
    parts: Iterable[Any] = rows
    if isinstance(rows, Tensor | np.ndarray):
        if rows.ndim == 0:
            raise DarkmatterError("x is a single number: give rows [n, d].")
        parts = (rows[begin:begin + BATCH] for begin in range(0, len(rows), BATCH))
    for given in parts:
        # DataLoaders give a batch in a list of one.
        batch = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
        if not isinstance(batch, Tensor | np.ndarray):
            raise DarkmatterError(f"A batch is a {type(batch).__name__}: give tensors or arrays "
                                  "[n, d].")
        values = torch.as_tensor(np.array(batch) if isinstance(batch, np.ndarray) else batch)
        yield values.detach() if values.dtype == torch.float64 else values.detach().float()


class _CheckedSAE:
    """An SAE as the passes call it: reconstructions checked, latents counted if it has any."""

    def __init__(self, sae: Any, what: str) -> None:
        if not callable(sae):
            raise DarkmatterError(f"{what} is a {type(sae).__name__}: give a sae-lens SAE, or a "
                                  "callable that maps x to its reconstruction.")
        self.sae: Any = sae
        self.what = what
        self.has_latents = callable(getattr(sae, "encode", None))

    def plain(self, x: Tensor) -> Tensor:
        """Sae(x), in at least float32."""
        return _widened(self.sae(x))

    @torch.no_grad()
    def __call__(self, block: Block) -> Reconstruction:
        y = self.sae(block.x)
        if not isinstance(y, Tensor):
            raise DarkmatterError(f"{self.what} returns a {type(y).__name__} where a tensor is "
                                  "expected: wrap it so that it returns the reconstruction alone.")
        if y.shape != block.y.shape:
            raise DarkmatterError(f"{self.what} returns {list(y.shape)} for x of "
                                  f"{list(block.x.shape)}, where {list(block.y.shape)} is "
                                  "expected: was it trained at another site?")
        if not bool(y.isfinite().all()):
            check_finite(block.x, "x")  # which may be the reason
            raise DarkmatterError(f"{self.what} returns NaN or infinite values: check its weights "
                                  "and its type.")
        active = self._active(block.x)
        if active is None:
            return Reconstruction(_widened(y))
        return Reconstruction(_widened(y), active.sum(1), active.any(0))

    def _active(self, x: Tensor) -> Tensor | None:
        """Which latents are active, bool [n, latents]; None for an encoder of another kind."""
        if self.has_latents:
            # Somebody else's ``encode`` may want other arguments: L0 is then not known.
            with suppress(Exception):
                latents = self.sae.encode(x)
                latents = latents.to_dense() if latents.is_sparse else latents
                if latents.ndim == 2 and len(latents) == len(x):
                    return latents != 0
            self.has_latents = False
        return None


def _widened(y: Tensor) -> Tensor:
    return y.detach().to(torch.promote_types(y.dtype, torch.float32))
