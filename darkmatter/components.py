"""What SAEs elsewhere in the model know of an SAE's error (section 6.2, Figure 10b).

Linear maps from the reconstructions of other SAEs, alone and together, to SaeError, LinearError and NonlinearError at
the preset's site. Several predictors are joined into one row, and their moments are taken once: a set of them is a part
of the joint XᵀX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import activations, codes, model, parts, progress, regression, saes, survey
from .activations import Activations
from .preset import Preset
from .regression import Columns, Moments, Sums
from .saes import LoadedSAE
from .scaling import estimate

ROWS = 4096
TARGETS = ("SaeError", "LinearError", "NonlinearError")
FITTED = TARGETS[:2]  # least squares is linear in its target: the third map is their difference
METRICS = ("r2_vector", "r2_vector_weighted")
Reader = Callable[[slice], Tensor]
"""Rows to float32 [rows, d]."""


def load_elsewhere(preset: Preset) -> dict[str, LoadedSAE]:
    """The SAEs at the preset's other sites, {site: SAE}; those still to be trained read their text in one pass."""
    if any(ref.startswith("train:") for ref in preset.elsewhere.values()):
        activations.trainings(preset.beside, list(preset.elsewhere))
    return {site: saes.load(ref, preset.at(site)) for site, ref in preset.elsewhere.items()}


def nearby(preset: Preset) -> dict[str, str]:
    """Sites of ``elsewhere`` in the preset's layer, and in the one before at the same kind of site: {label: site}."""
    layer, kind = model.layer_of(preset.site), preset.site.split(".", 2)[2]
    names = {"hook_resid_post": "residual stream", "hook_mlp_out": "MLP output", "attn.hook_z": "attention z"}
    found = {}
    for site in preset.elsewhere:
        own = site.split(".", 2)[2]
        if model.layer_of(site) == layer or (model.layer_of(site) == layer - 1 and own == kind):
            found[f"{names.get(own, own)}, layer {model.layer_of(site)}"] = site
    return found


def decoded(each: LoadedSAE, acts: Activations) -> Reader:
    """Sae(x), from stored codes where there are such."""
    stored = codes.of(each, acts)
    return (lambda rows: stored.decode(each, rows).cpu()) if stored else (lambda rows: each(acts.read(rows))[0].cpu())


def shuffled(read: Reader, n: int, seed: int) -> Reader:
    """The same n rows, each given to another token at random. Holds them all, in bfloat16."""
    kept = torch.cat([read(slice(begin, min(begin + ROWS, n))).bfloat16() for begin in range(0, n, ROWS)])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return lambda rows: kept[order[rows]].float()


@dataclass(frozen=True)
class Predicted:
    """Held-out R² of every (set of predictors, target), as measured and on n draws of the sources."""

    draws: Mapping[tuple[str, str, str], np.ndarray]
    """By set, target and metric: float64 [1 + n]; the draws have the same sources in all."""
    n: int
    effective: float

    def table(self) -> pd.DataFrame:
        """One row a (set, target, metric): value, low, high, n."""
        return pd.DataFrame([dict(zip(("set", "target", "metric"), key, strict=True))
                             | dict(zip(("value", "low", "high"), estimate(each, self.effective), strict=True))
                             | {"n": self.n} for key, each in self.draws.items()])

    def __or__(self, other: Predicted) -> Predicted:
        return Predicted({**self.draws, **other.draws}, self.n, self.effective)


class Errors:
    """SaeError and its two parts at the preset's site; b* is fitted on the rows of the strict protocol."""

    def __init__(self, preset: Preset, each: LoadedSAE, acts: Activations) -> None:
        self.preset, self.acts, self.reconstruction = preset, acts, decoded(each, acts)
        self.fitted = survey.fitted_rows(preset, acts, regression.STRICT)
        self.map = parts.error_map(each, acts, self.fitted).to(torch.float32)

    def contexts(self, fitted: bool) -> Iterator[slice]:
        """The rows of each context that is fitted, or of each that is held out: the split is by whole contexts."""
        what = f"errors, {'fitted' if fitted else 'held out'}"
        for begin, end in progress.bar(list(pairwise(self.acts.starts.tolist())), what, "contexts"):
            if end > begin and self.fitted[begin] == fitted:
                yield slice(begin, end)

    def __call__(self, rows: slice) -> dict[str, Tensor]:
        """The three targets of some rows, float32 [rows, d]."""
        x = self.acts.read(rows)
        error = x - self.reconstruction(rows)
        linear = self.map(x)
        return {"SaeError": error, "LinearError": linear, "NonlinearError": error - linear}


@torch.no_grad()
def predict(errors: Errors, readers: Mapping[str, Reader], sets: Mapping[str, Sequence[str]]) -> Predicted:
    """Held-out R² (both kinds) of linear maps with intercept from each of the ``sets`` of readers to the three targets.

    Raises DarkmatterError where a set has more dimensions than there are rows to fit.
    """
    ends = np.cumsum([0, *(read(slice(0, 1)).shape[1] for read in readers.values())]).tolist()
    place = {name: torch.arange(*span) for name, span in zip(readers, pairwise(ends), strict=True)}
    columns = {label: torch.cat([place[name] for name in members]) for label, members in sets.items()}
    regression.require_rows(int(errors.fitted.sum()), max(map(len, columns.values())))
    moments = Moments()
    for rows in errors.contexts(fitted=True):
        moments.update(_joined(readers, rows), ((name, each) for name, each in errors(rows).items() if name in FITTED))
    maps = {label: {name: each.to(torch.float32) for name, each in regression.solve(part(moments, chosen)).items()}
            for label, chosen in columns.items()}
    found = {(label, target): Sums(len(errors.acts.text.tokens)) for label in sets for target in TARGETS}
    for rows in errors.contexts(fitted=False):
        x, targets, ids = _joined(readers, rows), errors(rows), torch.from_numpy(errors.acts.context[rows]).long()
        for label, own in maps.items():
            left = {target: targets[target] - own[target](x[:, columns[label]]) for target in FITTED}
            left["NonlinearError"] = left["SaeError"] - left["LinearError"]
            for target, residual in left.items():
                found[label, target].add_error(ids, targets[target], residual)
    return _scored(errors, found)


def _joined(readers: Mapping[str, Reader], rows: slice) -> Tensor:
    return torch.cat([read(rows) for read in readers.values()], 1)


def _scored(errors: Errors, found: Mapping[tuple[str, str], Sums]) -> Predicted:
    draws, effective, preset = {}, 0.0, errors.preset
    for key, sums in found.items():
        totals = regression.resample(sums, regression.clusters(errors.acts.text.source), preset.bootstrap, preset.seed)
        draws |= {(*key, metric): regression.STATISTICS[metric](totals).numpy() for metric in METRICS}
        effective = float(totals["effective"][0])
    return Predicted(draws, int((~errors.fitted).sum()), effective)


def part(moments: Moments, columns: Tensor) -> Moments:
    """The moments of some of the dimensions of x with every target."""
    smaller = Moments(moments.products)
    for name, each in moments.columns.items():
        shift, total, cross = each.shift, each.total, each.cross
        if not name:  # x itself
            shift, total, cross = shift[columns], total[columns], regression.mirrored(cross)[:, columns]
        smaller.columns[name] = Columns(shift, total, cross[columns], each.n)
    return smaller
