"""What SAEs elsewhere in the model know of an SAE's error (section 6.2, Figure 10b).

Affine maps from the reconstructions of other SAEs, alone and together, to SaeError, LinearError
and NonlinearError at the preset's site. The predictors stand side by side in one row, and their
moments are taken once: those of a set of predictors are a part of the joint XᵀX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import progress, regression, survey
from ..models import activations, model
from ..regression import Columns, Draws, Moments, Sums
from ..saes import codes, references
from . import error_parts

if TYPE_CHECKING:
    from ..models.activations import Activations
    from ..presets import Preset
    from ..saes.loaded import LoadedSAE

BLOCK = 4096  # rows read at once
TARGETS = ("SaeError", "LinearError", "NonlinearError")
FITTED = TARGETS[:2]  # least squares is linear in its target: the third map is their difference
METRICS = ("r2_vector", "r2_vector_weighted")
KINDS = {"hook_resid_post": "residual stream", "hook_mlp_out": "MLP output",
         "attn.hook_z": "attention z"}

Reader = Callable[[slice], Tensor]
"""Rows to float32 [rows, d]."""
Scores = dict[tuple[str, str, str], Draws]
"""Held-out R² by set of predictors, target and metric."""


def load_elsewhere(preset: Preset) -> dict[str, LoadedSAE]:
    """The SAEs at the preset's other sites, {site: SAE}; to train some takes one pass of text."""
    if any(ref.startswith("train:") for ref in preset.elsewhere.values()):
        activations.trainings(preset.beside, list(preset.elsewhere))
    return {site: references.load_sae(ref, preset.at(site))
            for site, ref in preset.elsewhere.items()}


def nearby(preset: Preset) -> dict[str, str]:
    """Sites of ``elsewhere`` near the preset's own, {label: site}.

    Those of its layer, and of its kind in the layer before.
    """
    layer, kind = model.layer_of(preset.site), preset.site.split(".", 2)[2]
    near = {}
    for site in preset.elsewhere:
        its_layer, its_kind = model.layer_of(site), site.split(".", 2)[2]
        if its_layer == layer or (its_layer == layer - 1 and its_kind == kind):
            near[f"{KINDS.get(its_kind, its_kind)}, layer {its_layer}"] = site
    return near


def decoded(sae: LoadedSAE, acts: Activations) -> Reader:
    """Sae(x), from stored codes where there are such."""
    stored = codes.of(sae, acts)
    if stored:
        return lambda rows: stored.decode(sae, rows).cpu()
    return lambda rows: sae(acts.read(rows))[0].cpu()


def shuffled(read: Reader, n: int, seed: int) -> Reader:
    """The same n rows, each given to another token at random. Holds them all, in bfloat16."""
    blocks = (slice(begin, min(begin + BLOCK, n)) for begin in range(0, n, BLOCK))
    kept = torch.cat([read(rows).bfloat16() for rows in blocks])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return lambda rows: kept[order[rows]].float()


class Errors:
    """SaeError and its two parts at the preset's site; b* as in the strict protocol."""

    def __init__(self, preset: Preset, sae: LoadedSAE, acts: Activations) -> None:
        self.preset, self.acts, self.reconstruction = preset, acts, decoded(sae, acts)
        self.fitted = survey.fitted_rows(preset, acts, regression.STRICT)
        self.map = error_parts.error_map(sae, acts, self.fitted).to(torch.float32)

    def contexts(self, fitted: bool) -> Iterator[slice]:
        """The rows of each context that is fitted, or of each held out: contexts are not split."""
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
def predict(errors: Errors, readers: Mapping[str, Reader],
            sets: Mapping[str, Sequence[str]]) -> Scores:
    """Held-out R² of affine maps from each of the ``sets`` of readers to the three targets.

    Raises DarkmatterError where a set has more dimensions than there are rows to fit.
    """
    # Side by side, the readers' dimensions are columns of one x; a set is some of the columns.
    ends = np.cumsum([0, *(read(slice(0, 1)).shape[1] for read in readers.values())]).tolist()
    span = {name: torch.arange(*ends) for name, ends in zip(readers, pairwise(ends), strict=True)}
    columns = {label: torch.cat([span[name] for name in names]) for label, names in sets.items()}
    regression.require_rows(int(errors.fitted.sum()), max(map(len, columns.values())))

    def joined(rows: slice) -> Tensor:
        return torch.cat([read(rows) for read in readers.values()], 1)

    # One pass over the fitted rows takes the moments of all columns with both fitted targets.
    moments = Moments()
    for rows in errors.contexts(fitted=True):
        targets = errors(rows)
        moments.update(joined(rows), [(target, targets[target]) for target in FITTED])
    maps = {label: {target: solved.to(torch.float32)
                    for target, solved in regression.solve(part(moments, chosen)).items()}
            for label, chosen in columns.items()}

    # A second pass scores every set's maps on the rows held out.
    sums = {(label, target): Sums(len(errors.acts.text.tokens))
            for label in sets for target in TARGETS}
    for rows in errors.contexts(fitted=False):
        x, targets = joined(rows), errors(rows)
        context = torch.from_numpy(errors.acts.context[rows]).long()
        for label, chosen in columns.items():
            left = {target: targets[target] - maps[label][target](x[:, chosen])
                    for target in FITTED}
            left["NonlinearError"] = left["SaeError"] - left["LinearError"]
            for target, residual in left.items():
                sums[label, target].add_error(context, targets[target], residual)

    clusters, preset = regression.clusters(errors.acts.text.source), errors.preset
    scores: Scores = {}
    for (label, target), of_one in sums.items():
        totals = regression.resample(of_one, clusters, preset.bootstrap, preset.seed)
        scores |= {(label, target, metric): regression.score(totals, metric) for metric in METRICS}
    return scores


def part(moments: Moments, columns: Tensor) -> Moments:
    """The moments of some of the dimensions of x with every target."""
    smaller = Moments(moments.products)
    for name, whole in moments.columns.items():
        shift, total, cross = whole.shift, whole.total, whole.cross
        if not name:  # x itself
            shift, total = shift[columns], total[columns]
            cross = regression.mirrored(cross)[:, columns]
        smaller.columns[name] = Columns(shift, total, cross[columns], whole.n)
    return smaller


def table(scores: Scores) -> pd.DataFrame:
    """One row a (set, target, metric): value, low, high, n (held-out tokens)."""
    return pd.DataFrame([dict(zip(("set", "target", "metric"), key, strict=True)) | draws.row
                         for key, draws in scores.items()])
