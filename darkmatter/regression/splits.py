"""Which rows are fitted and which are scored: whole sources on either side, three protocols.

Section 3 of the paper fits on a part of the tokens and scores the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import DarkmatterError

FIT_SHARE = 0.61  # the paper fits on 150k of 247k tokens
MIN_SOURCES = 20  # with fewer source documents, blocks of contexts take their place
MOST_BLOCKS = 40


@dataclass(frozen=True)
class Protocol:
    """How rows are split, whether maps have an intercept, and which rows are scored.

    ``fvu_rows`` is for FVU and FVU_nonlinear; the R²s are always held out. With ``norm_test_rows``
    "all" the maps of the norm test, and the b* that splits its errors, are fitted and scored on all
    rows.
    """

    name: str
    split: Literal["source", "token"] = "source"
    intercept: bool = True
    fvu_rows: Literal["eval", "all"] = "eval"
    norm_test_rows: Literal["eval", "all"] = "eval"


STRICT, PAPER = Protocol("strict"), Protocol("paper", split="token")
AUTHORS = Protocol("authors-code", "token", intercept=False, fvu_rows="all", norm_test_rows="all")
PROTOCOLS = {protocol.name: protocol for protocol in (STRICT, PAPER, AUTHORS)}


def clusters(sources: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    """The unit of splits and intervals for each context, int [contexts]: its source document.

    With fewer than 20 documents, one of at most 40 contiguous blocks of contexts.
    """
    names, ids = np.unique(np.asarray(sources), return_inverse=True)
    contexts = len(ids)
    if len(names) >= MIN_SOURCES:
        return ids
    return np.arange(contexts) * min(contexts, MOST_BLOCKS) // contexts


def split(ids: np.ndarray, share: float = FIT_SHARE, seed: int = 0) -> np.ndarray:
    """True for each context that is fitted, bool [contexts]: whole ``clusters``, taken at random.

    Raises DarkmatterError where one side would be empty.
    """
    share_of = np.bincount(ids) / max(len(ids), 1)
    fit = np.zeros(len(share_of), dtype=bool)
    # Each cluster is taken if that brings the fitted share nearer to what is asked for.
    for i in np.random.default_rng(seed).permutation(len(share_of)):
        taken = share_of[fit].sum()
        fit[i] = abs(taken + share_of[i] - share) < abs(taken - share)
    if fit.all() or not fit.any():
        raise DarkmatterError(f"{len(ids)} contexts leave nothing to fit or to hold out: "
                              "give more text.")
    return fit[ids]


def token_split(context: int, tokens: int, share: float = FIT_SHARE, seed: int = 0) -> np.ndarray:
    """True for each token of one context that is fitted, bool [tokens], at random.

    It is the same in any batch and order.
    """
    return np.random.default_rng([seed, context]).random(tokens) < share


def require_rows(rows: int, dims: int, tokens_per_context: float = 0, share: float = FIT_SHARE
                 ) -> None:
    """Raise DarkmatterError unless more rows than dimensions are fitted, with the text it takes."""
    if rows > dims:
        return
    message = (f"Regressing on {dims} dimensions takes at least {dims + 1} tokens to fit; "
               f"there are {rows}")
    if tokens_per_context:
        contexts = math.ceil((dims + 1) / (tokens_per_context * share))
        message += f": give about {contexts} contexts of {tokens_per_context:.0f} kept tokens"
    raise DarkmatterError(f"{message}.")
