"""The survey: every SAE's error taken apart by the three passes, over stored activations.

What was surveyed before is read back. Each SAE has a folder in the cache: ``rows.json``, its
metrics; ``draws.npy``, their bootstrap draws; ``tokens.npy``, a table of all tokens; and
``is_eval.npy``, which of them were held out.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from . import cache, progress
from .errors import DarkmatterError
from .models import activations, model
from .regression import MIN_SOURCES, PROTOCOLS, Draws, clusters, require_rows, split, token_split
from .regression.passes import COLUMNS, Block, Choice, Passes, Reconstruction
from .regression.scores import VECTOR_METRICS, VECTORS
from .saes import codes, references

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .models.activations import Activations
    from .presets import Preset
    from .regression import Protocol
    from .regression.passes import Reconstruct
    from .saes.loaded import LoadedSAE

BLOCK_ROWS = {"cpu": 1024, "cuda": 8192}  # in memory at once, about: a GPU idles on small blocks
COUNTED = "a count over all kept tokens, not a sample"


@dataclass(frozen=True)
class SurveyResult:
    """What the survey measured: aggregate rows, and one table of tokens for each SAE."""

    rows: pd.DataFrame
    """One row a (SAE, metric, protocol): sae, width, k, metric, protocol, value, low, high, n_fit,
    n_eval, sources, note, effective, origin (the last two as in ``Draws``)."""
    folders: dict[str, Path]
    """Where each SAE's tables lie, by name, of the last protocol asked for."""
    acts: Activations
    names: dict[str, str]
    """The SAEs' names by what they were asked for with: 'artifact:NAME', 'train:WIDTHxL0', …"""

    @property
    def unit(self) -> str:
        """What intervals are over: 'sources', or 'blocks of contexts' where sources are few."""
        many = len(set(self.acts.text.source)) >= MIN_SOURCES
        return "sources" if many else "blocks of contexts"

    def table(self, protocol: str = "strict") -> pd.DataFrame:
        """One row an SAE, its metrics as columns; intervals in NAME_low and NAME_high."""
        rows = self.rows[self.rows.protocol == protocol]
        wide = rows.pivot(index=["sae", "width", "k"], columns="metric",
                          values=["value", "low", "high"])
        wide.columns = [name if kind == "value" else f"{name}_{kind}"
                        for kind, name in wide.columns]
        return wide.reset_index().sort_values(["width", "k"], ignore_index=True)

    def draws(self, sae: str, metric: str) -> Draws:
        """A metric of the last protocol asked for; its draws are the same for every SAE."""
        rows = json.loads((self.folders[sae] / "rows.json").read_text())
        place = [row["metric"] for row in rows].index(metric)
        values = np.load(self.folders[sae] / "draws.npy", mmap_mode="r")[place].copy()
        row = rows[place]
        return Draws(values, row["effective"], row["n_eval"], row["sources"], row["note"],
                     row["origin"])

    def tokens(self, sae: str) -> pd.DataFrame:
        """Every kept token: the five squared norms, l0, the norm's prediction, its place."""
        values = np.load(self.folders[sae] / "tokens.npy", mmap_mode="r")
        text, acts = self.acts.text, self.acts
        source = text.source[acts.context]
        domains = np.array([name.split("/", 1)[0] for name in text.sources])
        place = {"context": acts.context, "position": acts.position, "source": source,
                 "domain": domains[source], "token_id": text.tokens[acts.context, acts.position],
                 "is_eval": np.load(self.folders[sae] / "is_eval.npy")}
        return pd.DataFrame(place | dict(zip(COLUMNS, values.T, strict=True)))


def run(preset: Preset, refs: Sequence[str] | None = None, protocols: Sequence[str] = ("strict",),
        loaded: model.LoadedModel | None = None) -> SurveyResult:
    """Survey the preset's SAEs (or ``refs``) under each protocol, or read back what was surveyed.

    Raises DarkmatterError for an unknown protocol, an SAE of another width, or too little text.
    """
    if unknown := set(protocols) - PROTOCOLS.keys():
        raise DarkmatterError(f"There is no protocol '{unknown.pop()}'; give one of "
                              f"{', '.join(PROTOCOLS)}.")
    # Open the SAEs, and the activations of the site that all of them have to fit.
    saes = [references.load_sae(ref, preset) for ref in (refs or preset.saes)]
    names = [sae.name for sae in saes]
    if len(set(names)) < len(names):
        raise DarkmatterError(f"Of the SAEs {', '.join(names)} two have the same name; rename the "
                              "directory of one.")
    acts = activations.evaluation(preset, loaded)
    for sae in saes:
        if sae.sae.cfg.d_in != acts.x.shape[1]:
            raise DarkmatterError(f"The SAE '{sae.ref}' reads {sae.sae.cfg.d_in} dimensions and "
                                  f"{preset.site} has {acts.x.shape[1]}; give an SAE trained at "
                                  "this site of this model.")
    # Measure what is missing under each protocol, and read all of it back.
    rows: list[dict[str, Any]] = []
    for protocol in protocols:
        folders = _folders(preset, saes, acts, PROTOCOLS[protocol])
        for sae in saes:
            measured = json.loads((folders[sae.name] / "rows.json").read_text())
            _warn_if_absurd(sae, measured)
            rows += [{"sae": sae.name, "width": sae.width, "k": sae.k} | row for row in measured]
    return SurveyResult(pd.DataFrame(rows), folders, acts, {sae.ref: sae.name for sae in saes})


def _folders(preset: Preset, saes: list[LoadedSAE], acts: Activations, protocol: Protocol
             ) -> dict[str, Path]:
    """Folder of each SAE's results by name; missing or damaged ones are made in shared passes."""
    def folder(sae: LoadedSAE) -> Path:
        key = cache.key(acts=acts.key, sae=sae.digest, protocol=asdict(protocol),
                        share=preset.fit_share, bootstrap=preset.bootstrap, seed=preset.seed,
                        version=2)
        return cache.root() / "surveys" / f"{re.sub(r'[^.a-zA-Z0-9-]', '_', sae.name)}-{key}"

    folders = {sae.name: folder(sae) for sae in saes}
    with cache.lock(" ".join(sorted(path.name for path in folders.values()))):
        missing = [sae for sae in saes if not cache.intact(folders[sae.name])]
        results = measure(preset, missing, acts, protocol) if missing else {}
        for name, (rows, arrays) in results.items():
            with cache.atomic(folders[name]) as temporary:
                temporary.mkdir()
                (temporary / "rows.json").write_text(json.dumps(rows))
                for file, array in arrays.items():
                    np.save(temporary / f"{file}.npy", array)
                cache.seal(temporary)
    return folders


def measure(preset: Preset, saes: list[LoadedSAE], acts: Activations, protocol: Protocol
            ) -> dict[str, tuple[list[dict[str, Any]], dict[str, np.ndarray]]]:
    """All metrics of all SAEs under one protocol, by name: rows, and the arrays of its folder."""
    fit = fitted_rows(preset, acts, protocol)
    every = np.ones_like(fit)
    tokens_per_context = len(fit) / len(acts.text.tokens)
    require_rows(int(fit.sum()), acts.x.shape[1], tokens_per_context, preset.fit_share)
    # Sums are kept by context; bootstrap draws are of sources. All SAEs share every pass.
    context, sources = torch.from_numpy(acts.context).long(), clusters(acts.text.source)
    device = model.device_of(preset)
    reconstruct = {sae.name: _reconstruct(sae, acts, device) for sae in saes}

    def passes(fitted: np.ndarray, scored: np.ndarray) -> Passes:
        choice = Choice(torch.from_numpy(fitted), torch.from_numpy(scored), context, sources,
                        protocol.intercept, preset.bootstrap, preset.seed, np.float32)
        return Passes(lambda which: _blocks(acts, device, which), reconstruct, choice).run()

    # The authors score FVU and the norm test on rows that they fitted on, which takes further runs.
    main = passes(fit, ~fit)
    of_fvu = main if protocol.fvu_rows == "eval" else passes(fit, every)
    of_test = main if protocol.norm_test_rows == "eval" else passes(every, every)
    results = {}
    for sae in saes:
        scores = _scores(sae.name, main, of_fvu, of_test)
        rows = [{"metric": metric, "protocol": protocol.name, "value": draws.value,
                 "low": draws.low, "high": draws.high, "n_fit": int(fit.sum()), "n_eval": draws.n,
                 "sources": draws.sources, "note": draws.note, "effective": draws.effective,
                 "origin": draws.origin} for metric, draws in scores.items()]
        values = np.stack([draws.values for draws in scores.values()])
        results[sae.name] = rows, {"draws": values, "tokens": main.tokens[sae.name],
                                   "is_eval": ~fit}
    return results


def _scores(name: str, main: Passes, of_fvu: Passes, of_test: Passes) -> dict[str, Draws]:
    """The metrics of one SAE, each from the passes over the rows that it is scored on."""
    l0 = main.mean_l0(name)
    scores = {"l0": l0} if l0 else {}
    # The latents that fire on no token are counted over all of them: there is nothing to draw.
    dead = np.full(1 + main.choice.draws, np.nan)
    dead[0] = 1 - float(main.fired[name].double().mean())
    tokens, sources = len(main.choice.fit), len(set(main.choice.cluster))
    scores["dead_share"] = Draws(dead, 0.0, tokens, sources, COUNTED)
    for metric in VECTOR_METRICS:
        passes = of_fvu if metric.startswith("fvu") else main
        scores[metric] = passes.vector_score(name, metric)
    scores["r2_norm"] = main.norm_score(name, "error")
    return scores | {f"norm_test_{v}": of_test.norm_score(name, v) for v in VECTORS}


def _blocks(acts: Activations, device: torch.device, which: str) -> Iterator[Block]:
    """Whole contexts, about ``BLOCK_ROWS`` at a time, float32 on the device."""
    bounds = list(pairwise(block_bounds(acts.starts, device.type)))
    for begin, end in progress.bar(bounds, f"survey, {which} of three passes", "blocks"):
        rows = slice(int(acts.starts[begin]), int(acts.starts[end]))
        x = acts.read(rows, device)
        yield Block(rows, x, x)


def block_bounds(starts: np.ndarray, device: str = "cpu") -> list[int]:
    """The contexts that blocks begin at, and the number of contexts; ``starts``: their rows."""
    bounds, most = [0], BLOCK_ROWS.get(device, BLOCK_ROWS["cpu"])
    while (begin := bounds[-1]) < len(starts) - 1:
        fitting = int(np.searchsorted(starts, starts[begin] + most, side="right")) - 1
        bounds.append(max(begin + 1, fitting))
    return bounds


def _reconstruct(sae: LoadedSAE, acts: Activations, device: torch.device) -> Reconstruct:
    """Sae(x) from the stored codes, where these give the same as the SAE itself."""
    sae.sae.to(device)
    stored = codes.of(sae, acts)
    return lambda block: Reconstruction(
        *(stored.through(sae, block.rows) if stored else sae(block.x)))


def _warn_if_absurd(sae: LoadedSAE, rows: list[dict[str, Any]]) -> None:
    fvu = next(row["value"] for row in rows if row["metric"] == "fvu")
    if fvu is not None and fvu > 1:
        warnings.warn(f"THE SAE '{sae.ref}' EXPLAINS LESS THAN THE MEAN DOES (FVU {fvu:.2f}): it "
                      "was probably trained on another site, another model, or activations scaled "
                      "otherwise.", stacklevel=3)


def fitted_rows(preset: Preset, acts: Activations, protocol: Protocol) -> np.ndarray:
    """bool [token]: which rows the protocol fits on."""
    if protocol.split == "source":
        return split(clusters(acts.text.source), preset.fit_share, preset.seed)[acts.context]
    counts = np.diff(acts.starts).tolist()
    return np.concatenate([token_split(context, n, preset.fit_share, preset.seed)
                           for context, n in enumerate(counts)])


def losses(preset: Preset, contexts: int, loaded: model.LoadedModel | None = None) -> np.ndarray:
    """Next-token cross entropy in nats of the first contexts, float32 [context, length − 1]."""
    text = activations.evaluation(preset, loaded).text.first(contexts)
    key = cache.key(text=text.digest, dtype=model.dtype_of(preset), version=2,
                    **model.identity(preset))
    path = cache.root() / "losses" / f"{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = {"losses": model.losses(loaded or model.load(preset), text.tokens)}
            cache.save_arrays(path, **arrays)
    return arrays["losses"]
