"""The survey: every SAE's error taken apart in three passes over the kept activations (sections 3 to 5 of the paper).

pass 1  moments of (x, SaeError) over the fitted rows               -> b*
pass 2  residuals with b* known, per-token squared norms            -> FVU, FVU_nonlinear, both vector R²
pass 3  the squared norms regressed on x and scored                 -> R² of the norm, norm test

Activations stream from disk batch by batch and XᵀX is shared by all SAEs, so memory does not grow with the contexts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import activations, cache, codes, model, progress, saes
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .products import CodedError, cheaper
from .regression import (
    MIN_SOURCES,
    PROTOCOLS,
    LinearMap,
    Moments,
    Protocol,
    Score,
    Sums,
    clusters,
    interval,
    require_rows,
    resample,
    score,
    shifted,
    solve,
    split,
    squared_norm,
    token_split,
)
from .saes import LoadedSAE

VECTORS = ("x", "sae", "error", "linear", "nonlinear")
COLUMNS = (*(f"{name}_norm2" for name in VECTORS), "l0", "error_norm2_hat")
ROWS = 1024  # rows in memory at once, about
MORE = {"cuda": 8}  # times as many there: small blocks would leave a GPU idle
COUNTED = "a count over all kept tokens, not a sample"


@dataclass(frozen=True)
class SurveyResult:
    """What the survey measured: aggregate rows, and one table of tokens for each SAE."""

    rows: pd.DataFrame
    """One row a (SAE, metric, protocol): sae, width, k, metric, protocol, value, low, high, n_fit, n_eval, note."""
    folders: dict[str, Path]
    """Where each SAE's tables lie, by name, of the last protocol asked for."""
    acts: Activations
    names: dict[str, str]
    """The SAEs' names by what they were asked for with: 'artifact:NAME', 'train:WIDTHxL0' and so on."""

    @property
    def unit(self) -> str:
        """What intervals are over: 'sources', or 'blocks of contexts' where sources are few."""
        return "sources" if len(set(self.acts.text.source)) >= MIN_SOURCES else "blocks of contexts"

    def table(self, protocol: str = "strict") -> pd.DataFrame:
        """One row an SAE, its metrics as columns; intervals in NAME_low and NAME_high."""
        rows = self.rows[self.rows.protocol == protocol]
        wide = rows.pivot(index=["sae", "width", "k"], columns="metric", values=["value", "low", "high"])
        wide.columns = [name if kind == "value" else f"{name}_{kind}" for kind, name in wide.columns]
        return wide.reset_index().sort_values(["width", "k"], ignore_index=True)

    def tokens(self, sae: str) -> pd.DataFrame:
        """Every kept token: the five squared norms, l0, the norm's prediction, and where it stands in the text."""
        values = np.load(self.folders[sae] / "tokens.npy", mmap_mode="r")
        text, acts = self.acts.text, self.acts
        owner = text.source[acts.context]
        place = {"context": acts.context, "position": acts.position, "source": owner,
                 "domain": np.array([name.split("/", 1)[0] for name in text.sources])[owner],
                 "token_id": text.tokens[acts.context, acts.position],
                 "is_eval": np.load(self.folders[sae] / "is_eval.npy")}
        return pd.DataFrame(place | dict(zip(COLUMNS, values.T, strict=True)))


def run(preset: Preset, refs: Sequence[str] | None = None, protocols: Sequence[str] = ("strict",),
        loaded: model.LoadedModel | None = None) -> SurveyResult:
    """Survey the preset's SAEs (or ``refs``) under each protocol; what was surveyed before is read back.

    Raises DarkmatterError for an unknown protocol, an SAE of another width than the site, or too little text.
    """
    if unknown := set(protocols) - PROTOCOLS.keys():
        raise DarkmatterError(f"There is no protocol '{unknown.pop()}'; give one of {', '.join(PROTOCOLS)}.")
    opened = [saes.load(ref, preset) for ref in (refs or preset.saes)]
    names = [each.name for each in opened]
    if len(set(names)) < len(names):
        raise DarkmatterError(f"Of the SAEs {', '.join(names)} two have the same name; rename the directory of one.")
    acts = activations.evaluation(preset, loaded)
    for each in opened:
        if each.sae.cfg.d_in != acts.x.shape[1]:
            raise DarkmatterError(f"The SAE '{each.ref}' reads {each.sae.cfg.d_in} dimensions and {preset.site} has "
                                  f"{acts.x.shape[1]}; give an SAE trained at this site of this model.")
    rows: list[dict[str, Any]] = []
    for name in protocols:
        folders = _surveyed(preset, opened, acts, PROTOCOLS[name])
        for each, folder in zip(opened, folders.values(), strict=True):
            found = json.loads((folder / "rows.json").read_text())
            _warn_if_absurd(each, found)
            rows += [{"sae": each.name, "width": each.width, "k": each.k} | row for row in found]
    return SurveyResult(pd.DataFrame(rows), folders, acts, {each.ref: each.name for each in opened})


def _surveyed(preset: Preset, opened: list[LoadedSAE], acts: Activations, protocol: Protocol) -> dict[str, Path]:
    """Folder of each SAE's results; those that are missing or damaged are made together, sharing every pass."""
    def folder(each: LoadedSAE) -> Path:
        key = cache.key(acts=acts.key, sae=each.digest, protocol=asdict(protocol), share=preset.fit_share,
                        bootstrap=preset.bootstrap, seed=preset.seed, version=1)
        return cache.root() / "surveys" / f"{re.sub(r'[^.a-zA-Z0-9-]', '_', each.name)}-{key}"

    places = {each.name: folder(each) for each in opened}
    with cache.lock(" ".join(sorted(path.name for path in places.values()))):
        missing = [each for each in opened if not cache.intact(places[each.name])]
        if missing:
            for name, measured in measure(preset, missing, acts, protocol).items():
                with cache.atomic(places[name]) as temporary:
                    temporary.mkdir()
                    (temporary / "rows.json").write_text(json.dumps(measured.rows))
                    np.save(temporary / "tokens.npy", measured.tokens)
                    np.save(temporary / "is_eval.npy", measured.is_eval)
                    cache.seal(temporary)
    return places


@dataclass(frozen=True)
class _Measured:
    rows: list[dict[str, Any]]
    tokens: np.ndarray
    is_eval: np.ndarray


def measure(preset: Preset, opened: list[LoadedSAE], acts: Activations, protocol: Protocol,
            sweep: Callable[..., Sweep] | None = None) -> dict[str, _Measured]:
    """All metrics of all SAEs under one protocol, from one or three sweeps (the authors score rows they fitted on).

    ``sweep`` makes a sweep that does its passes elsewhere.
    """
    sweep = sweep or Sweep
    fit = fitted_rows(preset, acts, protocol)
    everything = np.ones_like(fit)
    per_context = len(fit) / len(acts.text.tokens)
    require_rows(int(fit.sum()), acts.x.shape[1], per_context, preset.fit_share)
    main = sweep(preset, opened, acts, fit, ~fit, protocol.intercept).run()
    of_fvu = main if protocol.fvu_rows == "eval" else sweep(preset, opened, acts, fit, everything,
                                                            protocol.intercept).run()
    of_test = main if protocol.norm_test_rows == "eval" else sweep(preset, opened, acts, everything, everything,
                                                                   protocol.intercept).run()
    found = {}
    for each in opened:
        scores = {"l0": main.mean_l0(each), "dead_share": main.dead_share(each)}
        scores |= {name: of_fvu.vector_score(each, name) for name in ("fvu", "fvu_nonlinear")}
        scores |= {name: main.vector_score(each, name) for name in ("r2_vector", "r2_vector_weighted")}
        scores |= {"r2_norm": main.norm_score(each, "error")}
        scores |= {f"norm_test_{name}": of_test.norm_score(each, name) for name in VECTORS}
        rows = [{"metric": name, "protocol": protocol.name, "value": s.value, "low": s.low, "high": s.high,
                 "n_fit": int(fit.sum()), "n_eval": s.n, "sources": s.sources, "note": s.note}
                for name, s in scores.items()]
        found[each.name] = _Measured(rows, main.tokens[each.name], ~fit)
    return found


def _warn_if_absurd(each: LoadedSAE, rows: list[dict[str, Any]]) -> None:
    fvu = next(row["value"] for row in rows if row["metric"] == "fvu")
    if fvu is not None and fvu > 1:
        warnings.warn(f"THE SAE '{each.ref}' EXPLAINS LESS THAN THE MEAN DOES (FVU {fvu:.2f}): it was probably "
                      "trained on another site, another model, or activations scaled otherwise.", stacklevel=3)


def fitted_rows(preset: Preset, acts: Activations, protocol: Protocol) -> np.ndarray:
    """bool [token]: which rows the protocol fits on."""
    if protocol.split == "source":
        by_context = split(clusters(acts.text.source), preset.fit_share, preset.seed)
        return by_context[acts.context]
    counts = np.diff(acts.starts)
    return np.concatenate([token_split(c, int(n), preset.fit_share, preset.seed) for c, n in enumerate(counts)])


def blocks(starts: np.ndarray, device: str = "cpu") -> list[int]:
    """The contexts that blocks of about ``ROWS`` rows begin at, and the number of contexts; ``starts``: their rows."""
    found, most = [0], ROWS * MORE.get(device, 1)
    while found[-1] < len(starts) - 1:
        begin = found[-1]
        found.append(max(begin + 1, int(np.searchsorted(starts, starts[begin] + most, side="right")) - 1))
    return found


class Sweep:
    """The three passes for one choice of fitted and scored rows."""

    through_codes: Collection[str] | None = None  # whose moments come from their codes, where that is decided elsewhere

    def __init__(self, preset: Preset, opened: list[LoadedSAE], acts: Activations, fit: np.ndarray,
                 scored: np.ndarray, intercept: bool) -> None:
        self.preset, self.opened, self.acts, self.intercept = preset, opened, acts, intercept
        self.fit, self.scored = torch.from_numpy(fit), torch.from_numpy(scored)
        self.device = model.device_of(preset)
        self.clusters = clusters(acts.text.source)
        contexts = len(acts.text.tokens)
        self.of_x = Sums(contexts)
        self.of_error = {each.name: Sums(contexts) for each in opened}
        self.of_norms = {each.name: Sums(contexts) for each in opened}
        self.l0 = {each.name: Sums(contexts) for each in opened}
        self.fired = {each.name: torch.zeros(each.width, dtype=torch.bool) for each in opened}
        self.tokens = {each.name: np.zeros((len(fit), len(COLUMNS)), np.float32) for each in opened}
        self._cached: dict[str, dict[str, Tensor]] = {}
        for each in opened:
            each.sae.to(self.device)
        self.codes = {each.name: codes.of(each, acts) for each in opened}

    def run(self) -> Sweep:
        maps = solve(self._pass_one(), self.intercept)
        self._pass_three(solve(self._pass_two(maps), self.intercept))
        return self

    def _moments(self) -> Moments:
        return Moments()

    def _batches(self, which: str) -> Iterator[tuple[slice, Tensor]]:
        """Whole contexts, about ``ROWS`` rows at a time, float32 on the device."""
        starts = self.acts.starts
        every = list(pairwise(blocks(starts, self.device.type)))
        for begin, end in progress.bar(every, f"survey, {which} of three passes", "blocks"):
            rows = slice(int(starts[begin]), int(starts[end]))
            yield rows, self.acts.read(rows, self.device)

    def _through(self, each: LoadedSAE, rows: slice, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sae(x), L0 and which latents fired: decoded from the stored codes where that is the same."""
        stored = self.codes[each.name]
        return stored.through(each, rows) if stored else each(x)

    def _pass_one(self) -> Moments:
        """Of x and every SaeError over the fitted rows, for b* (section 3)."""
        moments = self._moments()
        names = self.sooner(int(self.fit.sum())) if self.through_codes is None else self.through_codes
        coded = {each.name: CodedError(each.sae.W_dec.data, each.sae.b_dec.data)
                 for each in self.opened if each.name in names}
        for i, (rows, x) in enumerate(self._batches("first")):
            for error in coded.values():
                error.begin(i)
            fit = self.fit[rows].to(self.device)
            if not fit.any():
                continue
            fitted = x[fit]
            moments.update(fitted, ((each.name, fitted - self._through(each, rows, x)[0][fit])
                                    for each in self.opened if each.name not in coded))
            u = shifted(fitted, moments.columns[""].shift, wide=False) if coded else fitted
            for each in self.opened:
                if each.name in coded and (stored := self.codes[each.name]):
                    coded[each.name].update(u, stored.matrix(rows, each.width)[fit.numpy()])
        moments.columns |= {name: error.columns(moments.columns[""]) for name, error in coded.items()}
        return moments

    def sooner(self, rows: int) -> set[str]:
        """The SAEs whose moments over so many rows come sooner from their codes than from their errors, on a processor.

        How many latents are active is read off the first block, which every shard of a text can see.
        """
        if self.device.type != "cpu":
            return set()
        _, first = self.first_block()
        return {each.name for each in self.opened if (stored := self.codes[each.name])
                and cheaper(rows, each.sae.cfg.d_in, each.width, stored.mean_l0(first))}

    def first_block(self) -> tuple[slice, slice]:
        """The contexts and the rows of the first block with fitted rows, by whose means moments are shifted."""
        starts = self.acts.starts
        for begin, end in pairwise(blocks(starts, self.device.type)):
            rows = slice(int(starts[begin]), int(starts[end]))
            if self.fit[rows].any():
                return slice(begin, end), rows
        raise DarkmatterError("No row of this text is fitted; give more text, or a larger fit_share.")

    def _pass_two(self, maps: dict[str, LinearMap]) -> Moments:
        """Sums over the scored rows, the squared norms of all rows, and the moments for the maps that predict them."""
        own = {name: each.to(torch.float32, self.device) for name, each in maps.items()}
        moments = self._moments()
        for rows, x in self._batches("second"):
            scored, context = self.scored[rows].to(self.device), torch.from_numpy(self.acts.context[rows])
            ids = context[self.scored[rows]].long()
            if scored.any():
                self.of_x.add_x(ids, x[scored])
            of_x, norms = squared_norm(x), {}
            for each in self.opened:
                sae_x, l0, fired = self._through(each, rows, x)
                error = x - sae_x
                linear = own[each.name](x)
                residual = error - linear
                if scored.any():
                    self.of_error[each.name].add_error(ids, error[scored], residual[scored])
                    active = l0.to(self.device)[scored].double()
                    self.l0[each.name].add_error(ids, active, active)
                self.fired[each.name] |= fired.cpu()
                norms[each.name] = torch.stack([of_x, *map(squared_norm, (sae_x, error, linear, residual))], 1)
                self.tokens[each.name][rows, :5] = norms[each.name].cpu()
                self.tokens[each.name][rows, 5] = l0.cpu()
            fit = self.fit[rows].to(self.device)
            if fit.any():
                moments.update(x[fit], ((name, norm[fit]) for name, norm in norms.items()))
        return moments

    def _pass_three(self, maps: dict[str, LinearMap]) -> None:
        """The squared norms' predictions a*x, and what they leave on the scored rows."""
        for rows, x in self._batches("third"):
            scored = self.scored[rows]
            ids = torch.from_numpy(self.acts.context[rows])[scored].long()
            wide = x.double().cpu() if self.device.type == "mps" else x.double()
            for each in self.opened:
                predicted = maps[each.name](wide).cpu()
                norms = torch.from_numpy(self.tokens[each.name][rows, :5]).double()
                self.tokens[each.name][rows, 6] = predicted[:, VECTORS.index("error")]
                if scored.any():
                    self.of_norms[each.name].add_error(ids, norms[scored], (norms - predicted)[scored])

    def _totals(self, *sums: Sums) -> dict[str, Tensor]:
        joined = {key: value for each in sums for key, value in each.items()}
        return resample(joined, self.clusters, self.preset.bootstrap, self.preset.seed)

    def vector_score(self, each: LoadedSAE, metric: str) -> Score:
        """FVU, FVU_nonlinear or an R² of the error vector."""
        key = f"{each.name} vector"
        if key not in self._cached:
            self._cached = {key: self._totals(self.of_x, self.of_error[each.name])}  # of one SAE at a time
        return score(self._cached[key], metric)

    def norm_score(self, each: LoadedSAE, vector: str) -> Score:
        """R² of the squared norm of one of the five vectors."""
        column = VECTORS.index(vector)
        sums = {key: value[:, column:column + 1] if value.ndim == 2 else value
                for key, value in self.of_norms[each.name].items()}
        return score(resample(sums, self.clusters, self.preset.bootstrap, self.preset.seed), "r2_norm")

    def mean_l0(self, each: LoadedSAE) -> Score:
        """Mean number of active latents a scored token."""
        totals = self._totals(self.l0[each.name])
        means = totals["e"][:, 0] / totals["n"]
        low, high = interval(means[1:], float(totals["effective"][0]))
        return Score(float(means[0]), low, high, int(totals["n"][0]), int(totals["sources"][0]))

    def dead_share(self, each: LoadedSAE) -> Score:
        """Share of the latents that fire on no kept token."""
        share = 1 - float(self.fired[each.name].double().mean())
        return Score(share, None, None, len(self.fit), int(self.clusters.max()) + 1, COUNTED)


def losses(preset: Preset, contexts: int, loaded: model.LoadedModel | None = None) -> np.ndarray:
    """Next-token cross entropy in nats, float32 [contexts, context_length − 1], of the first contexts; cached."""
    text = activations.evaluation(preset, loaded).text.first(contexts)
    key = cache.key(text=text.digest, model=preset.model, dtype=model.dtype_of(preset), version=2)
    path = cache.root() / "losses" / f"{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = {"losses": model.losses(loaded or model.load(preset), text.tokens)}
            cache.save_arrays(path, **arrays)
    return arrays["losses"]
