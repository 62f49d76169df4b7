"""What a part of the error does to the model: cross entropy with other vectors in the place of x.

Section 5, Figure 9. What is the same for all variants of a context runs once: the positions before
the first replaced one, whose keys and values later positions read from transformers' cache, and
every layer before the site, where a hook hands the rest of the model a batch of variants for one
context.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from .. import progress
from ..errors import DarkmatterError
from ..models import model
from ..regression import clusters, drawn, resample
from ..regression.moments import WIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ..models.activations import Activations
    from ..presets import Preset
    from ..regression import Draws, LinearMap
    from ..saes.loaded import LoadedSAE

LOGITS = 2**27  # numbers in memory at once: a variant has one a kept position and word
ROWS = 64  # positions whose logits are widened at once: they stay in the processor's cache


class Stretch(NamedTuple):
    """Kept tokens of one context, one after another."""

    context: int
    rows: slice
    """Their rows in the activations."""


def stretches(acts: Activations, held: np.ndarray, contexts: int, positions: int = 0, seed: int = 0
              ) -> list[Stretch]:
    """The first ``positions`` (0: all) kept tokens of contexts drawn without replacement, in order.

    ``held`` bool [token]: which rows may be used. Raises DarkmatterError where no context is wholly
    among them.
    """
    if contexts < 1 or positions < 0:
        raise DarkmatterError(f"Cross entropy takes at least 1 context and no negative number of "
                              f"positions; they are {contexts} and {positions}.")
    starts = acts.starts
    whole = [context for context, (begin, end) in enumerate(pairwise(starts))
             if begin < end and held[begin:end].all()]
    if not whole:
        raise DarkmatterError("There is no held-out context to measure cross entropy on: give more "
                              "text.")
    some = np.sort(np.random.default_rng(seed).permutation(whole)[:contexts])
    begins, ends = starts[some], starts[some + 1]
    if positions:
        ends = np.minimum(begins + positions, ends)
    return [Stretch(int(context), slice(int(begin), int(end)))
            for context, begin, end in zip(some, begins, ends, strict=True)]


class Parts(NamedTuple):
    """x = sae + linear + nonlinear (section 3), float32 [n, d] each."""

    sae: Tensor
    linear: Tensor
    nonlinear: Tensor


def divided(sae: LoadedSAE, b: LinearMap, x: Tensor) -> Parts:
    """The three parts of x [n, d_in], for an SAE and the b* fitted to its error."""
    rebuilt, linear = sae(x)[0], b(x)
    return Parts(rebuilt, linear, x - rebuilt - linear)


def noise(like: Tensor, seed: int) -> Tensor:
    """Vectors of random direction, each as long as that row of ``like`` [n, d]."""
    normal = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
    return normal * (like.norm(dim=1) / normal.norm(dim=1))[:, None]


@torch.inference_mode()
def losses(loaded: model.LoadedModel, site: str, tokens: np.ndarray, kept: np.ndarray,
           vectors: Tensor) -> Tensor:
    """Next-token cross entropy in nats, float32 [variant, n], of one context with vectors put in.

    tokens int [position]. At the positions kept int [n] each variant of ``vectors`` [variant, n, d]
    takes the place of the activation at ``site``, and is scored. Raises DarkmatterError for a site
    that the model does not have, or where the shapes do not fit.
    """
    model.check_site(loaded, site)
    last = int(kept.max(initial=0))
    if vectors.ndim != 3 or vectors.shape[1] != len(kept) or last >= len(tokens) - 1:
        raise DarkmatterError(f"Vectors of shape {list(vectors.shape)} cannot replace the "
                              f"activations at {len(kept)} positions of a context of "
                              f"{len(tokens)} tokens, each with a token after it.")
    ids, where = (model.token_ids(loaded, values) for values in (tokens, kept))
    at_once = max(1, LOGITS // (len(kept) * loaded.bridge.cfg.d_vocab))
    return torch.cat([spliced(loaded.bridge, site, ids, where, some.to(ids.device))
                      for some in vectors.split(at_once)])


def spliced(bridge: Any, site: str, ids: Tensor, kept: Tensor, vectors: Tensor) -> Tensor:
    """``losses`` [variant, n] of variants that are in memory together; ids [position], kept [n]."""
    first, until = int(kept[0]), int(kept[-1]) + 1  # no token looks at a later one
    inside = kept - first

    def splice(value: Tensor, hook: Any) -> Tensor:
        # Below the site there was one context. From here on there is a batch, one a variant, which
        # differ from the context at the kept positions alone.
        batch = value.expand(len(vectors), *value.shape[1:]).clone()
        batch[:, inside] = vectors.to(value.dtype).reshape(batch[:, inside].shape)
        return batch

    # The positions before the first kept one are read from a cache.
    logits = bridge.run_with_hooks(ids[None, first:until], fwd_hooks=[(site, splice)],
                                   return_type="logits", logits_to_keep=inside,
                                   **_before(bridge, site, ids[:first], len(vectors)))
    # A few positions at a time: cross entropy takes their logits in float32.
    following = ids[kept + 1].split(ROWS)
    return torch.stack([
        torch.cat([cross_entropy(part.float(), token, reduction="none")
                   for part, token in zip(variant.split(ROWS), following, strict=True)])
        for variant in logits]).cpu()


def bound(loaded: model.LoadedModel, site: str, tokens: np.ndarray, kept: np.ndarray,
          vectors: Tensor, seconds: Callable[[Callable[[], Any]], float]) -> float:
    """Seconds of ``losses`` if what variants share ran once, and the rest as fast as for one alone.

    Shared: the positions before the first kept one, and what lies below the site at the others.
    ``seconds`` times a call.
    """
    first, until = int(kept[0]), tokens[None, :int(kept[-1]) + 1]
    shared = seconds(lambda: model.capture(loaded, until, [site]))
    if first:
        ids = model.token_ids(loaded, tokens[:first])
        shared += seconds(lambda: torch.inference_mode()(_before)(loaded.bridge, site, ids, 1))
        shared -= seconds(lambda: model.capture(loaded, until[:, :first], [site]))
    alone = seconds(lambda: losses(loaded, site, tokens, kept, vectors[:1]))
    return shared + len(vectors) * max(alone - shared, 0)


def _before(bridge: Any, site: str, ids: Tensor, variants: int) -> dict[str, Any]:
    """Options that let a forward pass go on after ``ids`` [position].

    Their keys and values are there once below the site, and once a variant above it.
    """
    if not len(ids):
        return {}
    cache = DynamicCache(config=bridge.original_model.config)
    bridge(ids[None], return_type=None, past_key_values=cache, use_cache=True, logits_to_keep=1)
    # The first layer whose attention sees the variants.
    upper = model.layer_of(site) + (not site.endswith("hook_resid_pre"))
    above: Any = cache.layers[upper:]
    for layer in above:
        layer.batch_repeat_interleave(variants)
    return {"past_key_values": cache, "use_cache": True}


def measure(loaded: model.LoadedModel, site: str, acts: Activations, chosen: Sequence[Stretch],
            variants: Callable[[Stretch], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums of cross entropy over each context, float64 [contexts] a variant; ``n`` counts tokens.

    ``variants`` gives the vectors [n, d] of each variant for a stretch. ``totals`` takes the
    result.
    """
    sums: dict[str, Tensor] = {}
    for stretch in progress.bar(chosen, "cross entropy", "contexts"):
        named = variants(stretch)
        loss = losses(loaded, site, acts.text.tokens[stretch.context], acts.position[stretch.rows],
                      torch.stack(list(named.values())))
        rows = {"n": torch.ones(loss.shape[1]), **dict(zip(named, loss, strict=True))}
        for name, values in rows.items():
            sums.setdefault(name, torch.zeros(len(acts.text.tokens), dtype=WIDE))
            sums[name][stretch.context] = values.sum(dtype=WIDE)
    return sums


def totals(preset: Preset, acts: Activations, sums: Mapping[str, Tensor]) -> dict[str, Draws]:
    """Each of some sums [contexts] in all contexts, with its draws of the held-out sources.

    One of them is ``n``, the tokens behind it: ``totals["x"] / totals["n"]`` is a mean.
    """
    resampled = resample(sums, clusters(acts.text.source), preset.bootstrap, preset.seed)
    return {name: drawn(resampled, resampled[name]) for name in sums}


def recovered(total: Mapping[str, Draws], sae: str, repaired: str, original: str = "x") -> Draws:
    """100 (CE_sae − CE_repaired) / (CE_sae − CE_original): percent of the loss gap."""
    return 100 * (total[sae] - total[repaired]) / (total[sae] - total[original])
