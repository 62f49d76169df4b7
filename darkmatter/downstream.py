"""What a part of the error does to the model: cross entropy with other vectors in the place of x (section 5, Figure 9).

What is the same for all variants of a context runs once: the positions before the first replaced one, whose keys and
values later positions read from transformers' cache, and every layer before the site, where a hook hands the rest of
the model a batch of variants for one context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from . import model, progress
from .activations import Activations
from .errors import DarkmatterError
from .regression import LinearMap
from .regression.moments import WIDE
from .saes import LoadedSAE

LOGITS = 2**27  # numbers in memory at once: a variant has one for each kept position and word of the vocabulary
ROWS = 64  # positions whose logits are widened to float32 at once: they stay in the processor's cache


class Stretch(NamedTuple):
    """Kept tokens of one context, one after another."""

    context: int
    rows: slice
    """Their rows in the activations."""


def stretches(acts: Activations, held: np.ndarray, contexts: int, positions: int = 0, seed: int = 0) -> list[Stretch]:
    """The first ``positions`` (0: all) kept tokens of some contexts, drawn without replacement, in order.

    ``held`` bool [token]: which rows may be used. Raises DarkmatterError where no context is wholly among them.
    """
    if contexts < 1 or positions < 0:
        raise DarkmatterError(f"Cross entropy takes at least 1 context and no negative number of positions; they are "
                              f"{contexts} and {positions}.")
    starts = acts.starts
    whole = [c for c in range(len(starts) - 1) if starts[c] < starts[c + 1] and held[starts[c]:starts[c + 1]].all()]
    if not whole:
        raise DarkmatterError("There is no held-out context to measure cross entropy on: give more text.")
    drawn = np.sort(np.random.default_rng(seed).permutation(whole)[:contexts])
    ends = np.minimum(starts[drawn] + positions, starts[drawn + 1]) if positions else starts[drawn + 1]
    return [Stretch(int(c), slice(int(starts[c]), int(end))) for c, end in zip(drawn, ends, strict=True)]


class Parts(NamedTuple):
    """x = sae + linear + nonlinear (section 3), float32 [n, d] each."""

    sae: Tensor
    linear: Tensor
    nonlinear: Tensor


def divided(each: LoadedSAE, b: LinearMap, x: Tensor) -> Parts:
    """The three parts of x [n, d_in], for an SAE and the b* fitted to its error."""
    sae, linear = each(x)[0], b(x)
    return Parts(sae, linear, x - sae - linear)


def noise(like: Tensor, seed: int) -> Tensor:
    """Vectors of random direction, each as long as that row of ``like`` [n, d]."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
    return drawn * (like.norm(dim=1) / drawn.norm(dim=1))[:, None]


@torch.inference_mode()
def losses(loaded: model.LoadedModel, site: str, tokens: np.ndarray, kept: np.ndarray, vectors: Tensor) -> Tensor:
    """Next-token cross entropy in nats, float32 [variant, n], of one context with ``vectors`` [variant, n, d] put in.

    tokens [position] int; kept [n] int: the positions at which they replace the activation at ``site``, and are scored.
    Raises DarkmatterError for a site that the model does not have, or where the shapes do not fit.
    """
    model.check_site(loaded, site)
    if vectors.ndim != 3 or vectors.shape[1] != len(kept) or int(kept.max(initial=0)) >= len(tokens) - 1:
        raise DarkmatterError(f"Vectors of shape {list(vectors.shape)} cannot replace the activations at {len(kept)} "
                              f"positions of a context of {len(tokens)} tokens, each with a token after it.")
    ids, where = (model.token_ids(loaded, each) for each in (tokens, kept))
    at_once = max(1, LOGITS // (len(kept) * loaded.bridge.cfg.d_vocab))
    return torch.cat([_spliced(loaded.bridge, site, ids, where, some.to(ids.device))
                      for some in vectors.split(at_once)])


def _spliced(bridge: Any, site: str, ids: Tensor, where: Tensor, vectors: Tensor) -> Tensor:
    first, until = int(where[0]), int(where[-1]) + 1  # no token looks at a later one
    inside = where - first

    def splice(value: Tensor, hook: Any) -> Tensor:
        batch = value.expand(len(vectors), *value.shape[1:]).clone()
        batch[:, inside] = vectors.to(value.dtype).reshape(batch[:, inside].shape)
        return batch

    logits = bridge.run_with_hooks(ids[None, first:until], fwd_hooks=[(site, splice)], return_type="logits",
                                   logits_to_keep=inside, **_before(bridge, site, ids[:first], len(vectors)))
    following = ids[where + 1].split(ROWS)
    return torch.stack([
        torch.cat([cross_entropy(part.float(), token, reduction="none")
                   for part, token in zip(variant.split(ROWS), following, strict=True)]) for variant in logits]).cpu()


def bound(loaded: model.LoadedModel, site: str, tokens: np.ndarray, kept: np.ndarray, vectors: Tensor,
          seconds: Callable[[Callable[[], Any]], float]) -> float:
    """Seconds of ``losses`` if what the variants share ran once, and the rest once a variant as fast as one alone.

    Shared: the positions before the first kept one, and what lies below the site at the others. ``seconds`` times a
    call.
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
    """Options that let a forward pass go on after ``ids`` [position]: one context below the site, copies above."""
    if not len(ids):
        return {}
    cache = DynamicCache(config=bridge.original_model.config)
    bridge(ids[None], return_type=None, past_key_values=cache, use_cache=True, logits_to_keep=1)
    upper = model.layer_of(site) + (not site.endswith("hook_resid_pre"))  # the first whose attention sees the variants
    above: Any = cache.layers[upper:]
    for layer in above:
        layer.batch_repeat_interleave(variants)
    return {"past_key_values": cache, "use_cache": True}


def measure(loaded: model.LoadedModel, site: str, acts: Activations, chosen: Sequence[Stretch],
            variants: Callable[[Stretch], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums of cross entropy over each context, float64 [contexts] a variant, and their number of tokens n.

    ``variants`` gives the vectors [n, d] of each variant for a stretch. ``regression.resample`` takes the result.
    """
    sums: dict[str, Tensor] = {}
    for stretch in progress.bar(chosen, "cross entropy", "contexts"):
        named = variants(stretch)
        found = losses(loaded, site, acts.text.tokens[stretch.context], acts.position[stretch.rows],
                       torch.stack(list(named.values())))
        for name, each in {"n": torch.ones(found.shape[1]), **dict(zip(named, found, strict=True))}.items():
            total = sums.setdefault(name, torch.zeros(len(acts.text.tokens), dtype=WIDE))
            total[stretch.context] = each.sum(dtype=WIDE)
    return sums


def recovered(totals: Mapping[str, Tensor], sae: str, spliced: str, original: str = "x") -> Tensor:
    """100 (CE_sae − CE_spliced) / (CE_sae − CE_original) percent of the loss gap, for totals as of ``resample``."""
    return 100 * (totals[sae] - totals[spliced]) / (totals[sae] - totals[original])
