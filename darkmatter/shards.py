"""One survey by many processes: the text is cut into shards of whole contexts, and what they measure is added up.

Any number of processes, on any machines that see one cache, call ``run`` with the same settings. Each takes the next
shard that nobody works on; after each pass the shards' moments are added and solved by whoever needs the maps. A
process that dies loses the shard it was at, nothing else.

Shards begin where a single run's blocks begin, and their moments are shifted by the same first block, so that adding
them up gives a single run's sums to the rounding of float64. Whether moments come from the codes (``products``) is
decided for the whole text, as a single run decides it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import activations, cache, corpus, model, saes, survey
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .products import GROUP, cheaper
from .regression import PROTOCOLS, Columns, Moments, Sums, clusters, solve
from .saes import LoadedSAE
from .survey import blocks

WAIT = 1.0  # seconds between two looks for a shard that is free
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """Some contexts of a text, and which of its kept tokens they have."""

    contexts: slice
    rows: slice


def run(preset: Preset, shards: int, refs: Sequence[str] | None = None, protocol: str = "strict") -> pd.DataFrame:
    """Survey the preset's SAEs together with the other processes that call this; returns the rows of ``survey.run``.

    Raises DarkmatterError for an unknown protocol or a number of shards that the text cannot be cut into.
    """
    if protocol not in PROTOCOLS:
        raise DarkmatterError(f"There is no protocol '{protocol}'; give one of {', '.join(PROTOCOLS)}.")
    opened = [saes.load(ref, preset) for ref in (refs or preset.saes)]
    whole = _places(preset, opened[0].sae.cfg.d_in)
    device = model.device_of(preset)
    together = _blocks_together(opened, len(whole.position), device)
    sweep = partial(Sharded, cut(whole.starts, shards, together, device.type))
    found = survey.measure(preset, opened, whole, PROTOCOLS[protocol], sweep)
    return pd.DataFrame([{"sae": each.name, "width": each.width, "k": each.k} | row
                         for each in opened for row in found[each.name].rows])


def _places(preset: Preset, width: int) -> Activations:
    """The evaluation text and where its kept tokens are; x has no rows."""
    tokenizer = model.load_tokenizer(preset)
    text = corpus.evaluation(preset, tokenizer)
    keep = model.kept(tokenizer, text.tokens, preset.first_kept)
    context, position = (where.astype(np.int32) for where in np.nonzero(keep))
    key = activations.key(preset, preset.site, text, preset.first_kept)
    return Activations(torch.empty(0, width, dtype=torch.bfloat16), context, position, text, key)


def _blocks_together(opened: Sequence[LoadedSAE], rows: int, device: torch.device) -> int:
    """How many blocks a shard must not cut: a group, where any SAE's moments may come from its codes."""
    through = device.type == "cpu" and any(cheaper(rows, each.sae.cfg.d_in, each.width, each.k or 1)
                                           for each in opened)
    return GROUP if through else 1


def cut(starts: np.ndarray, shards: int, together: int = 1, device: str = "cpu") -> list[Shard]:
    """At most ``shards`` runs of contexts with about as many kept tokens each, cut after each ``together`` blocks."""
    if shards < 1:
        raise DarkmatterError(f"A survey in {shards} shards was asked for; give at least 1.")
    edges = np.array([*blocks(starts, device)[:-1:together], len(starts) - 1])
    goals = np.linspace(0, starts[-1], shards + 1)
    ends = sorted({int(edges[np.abs(starts[edges] - goal).argmin()]) for goal in goals})
    return [Shard(slice(a, b), slice(int(starts[a]), int(starts[b]))) for a, b in itertools.pairwise(ends)]


class _Part(survey.Sweep):
    """A sweep over one shard whose moments begin with shifts that are given."""

    shifts: Moments | None = None
    through_codes: Collection[str] = ()

    def _moments(self) -> Moments:
        begun = Moments()
        for name, each in (self.shifts.columns if self.shifts else {}).items():
            begun.columns[name] = Columns(each.shift, torch.zeros_like(each.total), torch.zeros_like(each.cross))
        return begun


class Sharded(survey.Sweep):
    """The three passes, each shard of each by whichever process comes to it first; then the sums of all."""

    def __init__(self, shards: Sequence[Shard], preset: Preset, opened: list[LoadedSAE], acts: Activations,
                 fit: np.ndarray, scored: np.ndarray, intercept: bool) -> None:
        self.shards, self.preset, self.opened, self.acts = shards, preset, opened, acts
        self.fit, self.scored, self.intercept = torch.from_numpy(fit), torch.from_numpy(scored), intercept
        self.clusters, self._cached, self.device = clusters(acts.text.source), {}, model.device_of(preset)
        ends = [shard.contexts.stop for shard in shards]
        self.key = cache.key(acts=acts.key, saes=[each.digest for each in opened], fit=_digest(fit), ends=ends,
                             scored=_digest(scored), intercept=intercept, version=2)
        self.loaded: model.LoadedModel | None = None

    def run(self) -> Sharded:
        self.maps = solve(_added(self._pass("one", self._one)), self.intercept)
        self.norm_maps = solve(_added(self._pass("two", self._two)), self.intercept)
        threes = list(self._pass("three", self._three))
        self._add_up([_small(each) for each in self._pass("two", self._two)], threes)
        return self

    # One pass of one shard

    def _one(self, shard: Shard) -> Arrays:
        part, head = self._part(shard), self._head()
        part.shifts, part.through_codes = head._pass_one(), head.sooner(int(self.fit.sum()))
        return _arrays_of(part._pass_one())

    def _two(self, shard: Shard) -> Arrays:
        part = self._part(shard)
        part.shifts = self._head()._pass_two(self.maps)
        found = _arrays_of(part._pass_two(self.maps))
        for title, each in self._sums(part).items():
            found |= {f"{title}|{name}": value.cpu().numpy() for name, value in each.items()}
        for i, each in enumerate(self.opened):
            found |= {f"fired|{i}": part.fired[each.name].numpy(), f"tokens|{i}": part.tokens[each.name][:, :6]}
        return found

    def _three(self, shard: Shard) -> Arrays:
        part, before = self._part(shard), self._certainly("two", shard, self._two)
        for i, each in enumerate(self.opened):
            part.tokens[each.name][:, :6] = before[f"tokens|{i}"]
        part._pass_three(self.norm_maps)
        found = {f"predicted|{i}": part.tokens[each.name][:, 6:] for i, each in enumerate(self.opened)}
        for i, each in enumerate(self.opened):
            found |= {f"norms {i}|{name}": value.cpu().numpy() for name, value in part.of_norms[each.name].items()}
        return found

    def _sums(self, part: survey.Sweep) -> dict[str, Sums]:
        of = {"x": part.of_x}
        for i, each in enumerate(self.opened):
            of |= {f"error {i}": part.of_error[each.name], f"l0 {i}": part.l0[each.name]}
        return of

    def _part(self, shard: Shard) -> _Part:
        return _Part(self.preset, self.opened, self._read(shard), self.fit[shard.rows].numpy(),
                     self.scored[shard.rows].numpy(), self.intercept)

    def _head(self) -> _Part:
        """The first block with fitted rows, by whose means a single run shifts its moments."""
        return self._part(Shard(*self.first_block()))

    def _read(self, shard: Shard) -> Activations:
        """The shard's activations: read back, or from a forward pass over its contexts."""
        text, preset = self.acts.text, self.preset
        own = replace(text, tokens=text.tokens[shard.contexts], source=text.source[shard.contexts])
        key = activations.key(preset, preset.site, own, preset.first_kept)
        if self.loaded is None and not (cache.root() / "activations" / key / "sha256.json").exists():
            self.loaded = model.load(preset)
        tokenizer = self.loaded.tokenizer if self.loaded else model.load_tokenizer(preset)
        return activations._open(preset, [preset.site], self.loaded, tokenizer, own, preset.first_kept)[preset.site]

    # All shards of a pass

    def _pass(self, name: str, measure: Callable[[Shard], Arrays]) -> Iterator[Arrays]:
        """What a pass gives for each shard, in their order: made here, or waited for where another process is at it."""
        while left := [i for i, shard in enumerate(self.shards) if not self._path(name, shard).exists()]:
            mine = [self._made(name, self.shards[i], measure) for i in np.random.default_rng().permutation(left)]
            if all(each is None for each in mine):
                time.sleep(WAIT)
        for shard in self.shards:
            yield self._certainly(name, shard, measure)

    def _certainly(self, name: str, shard: Shard, measure: Callable[[Shard], Arrays]) -> Arrays:
        while (found := self._made(name, shard, measure)) is None:
            time.sleep(WAIT)
        return found

    def _made(self, name: str, shard: Shard, measure: Callable[[Shard], Arrays]) -> Arrays | None:
        """What a pass gives for a shard; None while another process is at it."""
        path = self._path(name, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path.with_suffix(".lock"), timeout=0):
                if (found := cache.load_arrays(path)) is None:
                    found = measure(shard)
                    cache.save_arrays(path, **found)
                return found
        except filelock.Timeout:
            return None

    def _path(self, name: str, shard: Shard) -> Path:
        return cache.root() / "shards" / self.key / f"{name}-{shard.contexts.start}.safetensors"

    def _add_up(self, twos: Sequence[Arrays], threes: Sequence[Arrays]) -> None:
        """Sums are by context and tables by token, so shards are laid end to end."""
        self.of_x, self.of_error, self.of_norms = _joined(twos, "x"), {}, {}
        self.l0, self.fired, self.tokens = {}, {}, {}
        for i, each in enumerate(self.opened):
            self.of_error[each.name], self.l0[each.name] = _joined(twos, f"error {i}"), _joined(twos, f"l0 {i}")
            self.of_norms[each.name] = _joined(threes, f"norms {i}")
            self.fired[each.name] = torch.from_numpy(np.any([part[f"fired|{i}"] for part in twos], axis=0))
            self.tokens[each.name] = np.concatenate([np.hstack([two[f"tokens|{i}"], three[f"predicted|{i}"]])
                                                     for two, three in zip(twos, threes, strict=True)])


def _digest(rows: np.ndarray) -> str:
    return cache.key(rows=np.packbits(rows).tobytes().hex())


def _joined(parts: Sequence[Arrays], title: str) -> Sums:
    found = Sums(0)
    for name in [name for name in parts[0] if name.startswith(f"{title}|")]:
        found[name.split("|")[1]] = torch.from_numpy(np.concatenate([part[name] for part in parts]))
    return found


def _arrays_of(moments: Moments) -> Arrays:
    found: Arrays = {}
    for name, each in moments.columns.items():
        values: dict[str, Tensor] = {"shift": each.shift, "total": each.total, "cross": each.cross}
        found |= {f"moments {name}|{key}": value.cpu().numpy() for key, value in values.items()}
        found[f"moments {name}|n"] = np.array(each.n)
    return found


def _added(parts: Iterable[Arrays]) -> Moments:
    """The moments of all shards, one in memory at a time."""
    total = Moments()
    for part in parts:
        own = Moments()
        for name in [key[8:-2] for key in part if key.startswith("moments ") and key.endswith("|n")]:
            sums = [torch.from_numpy(part[f"moments {name}|{which}"]) for which in ("shift", "total", "cross")]
            own.columns[name] = Columns(*sums, n=int(part[f"moments {name}|n"]))
        total = total + own
    return total


def _small(part: Arrays) -> Arrays:
    return {name: each for name, each in part.items() if not name.startswith("moments ")}
