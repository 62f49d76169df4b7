"""The survey: every SAE's error taken apart by the three passes of ``regression`` over the stored activations.

What was surveyed before is read back: rows of metrics, their bootstrap draws, and a table of tokens, an SAE each.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from . import activations, cache, codes, model, progress, saes
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .regression import MIN_SOURCES, PROTOCOLS, Draws, Protocol, clusters, require_rows, split, token_split
from .regression.passes import COLUMNS, VECTOR_METRICS, VECTORS, Block, Choice, Passes, Rebuild, Rebuilt
from .saes import LoadedSAE

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

    def draws(self, sae: str, metric: str) -> Draws:
        """A metric of the last protocol asked for, with its bootstrap draws: the same sources for every SAE."""
        found = json.loads((self.folders[sae] / "rows.json").read_text())
        at = next(i for i, row in enumerate(found) if row["metric"] == metric)
        row, values = found[at], np.load(self.folders[sae] / "draws.npy", mmap_mode="r")[at].copy()
        return Draws(values, row["effective"], row["n_eval"], row["sources"], row["note"], row["origin"])

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
                        bootstrap=preset.bootstrap, seed=preset.seed, version=2)
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
                    np.save(temporary / "draws.npy", measured.draws)
                    cache.seal(temporary)
    return places


@dataclass(frozen=True)
class _Measured:
    rows: list[dict[str, Any]]
    tokens: np.ndarray
    is_eval: np.ndarray
    draws: np.ndarray


def measure(preset: Preset, opened: list[LoadedSAE], acts: Activations, protocol: Protocol) -> dict[str, _Measured]:
    """All metrics of all SAEs under one protocol, from one or three runs of the passes.

    Three, because the authors score FVU and the norm test on rows that they fitted on.
    """
    fit = fitted_rows(preset, acts, protocol)
    every = np.ones_like(fit)
    require_rows(int(fit.sum()), acts.x.shape[1], len(fit) / len(acts.text.tokens), preset.fit_share)
    rebuilds = _rebuilds(preset, opened, acts)

    def passes(fitted: np.ndarray, scored: np.ndarray) -> Passes:
        return Passes(lambda which: _blocks(preset, acts, which), rebuilds,
                      _choice(preset, acts, fitted, scored, protocol.intercept)).run()

    main = passes(fit, ~fit)
    of_fvu = main if protocol.fvu_rows == "eval" else passes(fit, every)
    of_test = main if protocol.norm_test_rows == "eval" else passes(every, every)
    return {each.name: _measured(each.name, protocol.name, fit, main, of_fvu, of_test) for each in opened}


def _measured(name: str, protocol: str, fit: np.ndarray, main: Passes, of_fvu: Passes, of_test: Passes
              ) -> _Measured:
    """The rows of one SAE, from the runs of the passes that each metric is scored in."""
    scores: dict[str, Draws] = {"dead_share": _dead_share(main, name, len(fit))}
    if l0 := main.mean_l0(name):
        scores = {"l0": l0} | scores
    scores |= {metric: (of_fvu if metric.startswith("fvu") else main).vector_score(name, metric)
               for metric in VECTOR_METRICS}
    scores |= {"r2_norm": main.norm_score(name, "error")}
    scores |= {f"norm_test_{vector}": of_test.norm_score(name, vector) for vector in VECTORS}
    rows = [{"metric": metric, "protocol": protocol, "value": s.value, "low": s.low, "high": s.high,
             "n_fit": int(fit.sum()), "n_eval": s.n, "sources": s.sources, "note": s.note,
             "effective": s.effective, "origin": s.origin} for metric, s in scores.items()]
    most = max(len(s.values) for s in scores.values())
    draws = np.full((len(scores), most), np.nan)
    for row, s in zip(draws, scores.values(), strict=True):
        row[:len(s.values)] = s.values
    return _Measured(rows, main.tokens[name], ~fit, draws)


def _dead_share(passes: Passes, name: str, tokens: int) -> Draws:
    """Share of the latents that fire on no kept token."""
    share = 1 - float(passes.fired[name].double().mean())
    return Draws(np.array([share]), 0.0, tokens, len(set(passes.choice.cluster)), COUNTED)


def _choice(preset: Preset, acts: Activations, fit: np.ndarray, scored: np.ndarray, intercept: bool) -> Choice:
    """Sums are kept by context; draws are of sources."""
    return Choice(torch.from_numpy(fit), torch.from_numpy(scored), torch.from_numpy(acts.context).long(),
                  clusters(acts.text.source), intercept, preset.bootstrap, preset.seed, np.float32)


def _blocks(preset: Preset, acts: Activations, which: str) -> Iterator[Block]:
    """Whole contexts, about ``ROWS`` rows at a time, float32 on the device."""
    device = model.device_of(preset)
    every = list(pairwise(blocks(acts.starts, device.type)))
    for begin, end in progress.bar(every, f"survey, {which} of three passes", "blocks"):
        rows = slice(int(acts.starts[begin]), int(acts.starts[end]))
        x = acts.read(rows, device)
        yield Block(rows, x, x)


def _rebuilds(preset: Preset, opened: Sequence[LoadedSAE], acts: Activations) -> dict[str, Rebuild]:
    """What the passes call: each SAE decoded from its stored codes, where that is the same as the SAE itself."""
    def rebuild(each: LoadedSAE) -> Rebuild:
        each.sae.to(model.device_of(preset))
        stored = codes.of(each, acts)
        return lambda block: Rebuilt(*(stored.through(each, block.rows) if stored else each(block.x)))

    return {each.name: rebuild(each) for each in opened}


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
