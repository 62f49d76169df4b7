"""Which rows are fitted and which are scored: whole sources on either side, and the three protocols (section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import DarkmatterError

FIT_SHARE = 0.61  # the paper fits on 150k of 247k tokens
MIN_SOURCES, BLOCKS = 20, 40  # with fewer source documents, blocks of contexts take their place


@dataclass(frozen=True)
class Protocol:
    """How rows are split, whether maps have an intercept, and which rows are scored (R²s: always held out).

    `fvu_rows` is for FVU and FVU_nonlinear. With `norm_test_rows` "all" the maps of the norm test, and the
    b* that splits its errors, are fitted and scored on all rows.
    """

    name: str
    split: Literal["source", "token"] = "source"
    intercept: bool = True
    fvu_rows: Literal["eval", "all"] = "eval"
    norm_test_rows: Literal["eval", "all"] = "eval"


STRICT, PAPER = Protocol("strict"), Protocol("paper", split="token")
AUTHORS = Protocol("authors-code", split="token", intercept=False, fvu_rows="all", norm_test_rows="all")
PROTOCOLS = {p.name: p for p in (STRICT, PAPER, AUTHORS)}


def clusters(sources: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    """The unit of splits and intervals for each context, in the order of the text: its source document.

    With fewer than 20 documents, one of at most 40 contiguous blocks of contexts.
    """
    names, ids = np.unique(np.asarray(sources), return_inverse=True)
    contexts = len(ids)
    return ids if len(names) >= MIN_SOURCES else np.arange(contexts) * min(contexts, BLOCKS) // contexts


def split(ids: np.ndarray, share: float = FIT_SHARE, seed: int = 0) -> np.ndarray:
    """True for each context that fits: whole `clusters` at random, each taken if the share comes nearer."""
    share_of = np.bincount(ids) / max(len(ids), 1)
    fit = np.zeros(len(share_of), dtype=bool)
    for i in np.random.default_rng(seed).permutation(len(share_of)):
        taken = share_of[fit].sum()
        fit[i] = abs(taken + share_of[i] - share) < abs(taken - share)
    if fit.all() or not fit.any():
        raise DarkmatterError(f"{len(ids)} contexts leave nothing to fit or to hold out: give more text.")
    return fit[ids]


def token_split(context: int, tokens: int, share: float = FIT_SHARE, seed: int = 0) -> np.ndarray:
    """True for each token of one context [tokens] that fits, at random: the same in any batch and order."""
    return np.random.default_rng([seed, context]).random(tokens) < share
