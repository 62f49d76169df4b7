"""Contexts: rows of exactly so many tokens, each with the document that it is a part of.

A *source* is the unit that never lies on both sides of a split: a play, a book of scripture, a
file, a service's reference, or a run of short pieces (news articles, dictionary entries) that is
long enough to fill contexts.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..presets import Preset

Picked = tuple[str, np.ndarray]  # a source, 'domain/name', and contexts of it, int32 [n, position]


@dataclass(frozen=True)
class Corpus:
    """Contexts ready for the model."""

    tokens: np.ndarray
    """int32 [context, position]."""
    source: np.ndarray
    """int32 [context]: index into ``sources``."""
    sources: tuple[str, ...]
    """Name of each source, 'domain/name'."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Of a training text: contexts of each domain left out because they repeat evaluation text."""

    @property
    def domains(self) -> list[str]:
        """Domain of each context."""
        return [self.sources[i].split("/", 1)[0] for i in self.source]

    @property
    def digest(self) -> str:
        """sha256 of the token matrix: the same on every machine."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes()).hexdigest()

    def first(self, contexts: int | None) -> Corpus:
        """Its first contexts alone; None: all."""
        return replace(self, tokens=self.tokens[:contexts], source=self.source[:contexts])


def cut(text: str, tokenizer: Any, preset: Preset) -> np.ndarray:
    """The contexts of a text, one after another, int32 [n, context_length]; what is left is lost.

    Each begins with the tokenizer's BOS token where the preset asks for it and there is one.
    """
    bos = beginning(tokenizer, preset)
    step = preset.context_length - len(bos)
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
    body = ids[:len(ids) // step * step].reshape(-1, step)
    first = np.broadcast_to(np.array(bos, np.int32), (len(body), len(bos)))
    return np.concatenate([first, body], axis=1)


def beginning(tokenizer: Any, preset: Preset) -> list[int]:
    """What each context begins with: the BOS token, or nothing where none is wanted or known."""
    if not preset.prepend_bos:
        return []
    if tokenizer.bos_token_id is None:
        warnings.warn(f"The tokenizer of {preset.model} has no beginning-of-text token, so none is "
                      "put before the contexts.", stacklevel=2)
        return []
    return [tokenizer.bos_token_id]


def first(sources: Iterable[Picked], wanted: int) -> Iterator[Picked]:
    """The first ``wanted`` contexts; no source is read that they do not take."""
    for source, rows in sources if wanted else ():
        chosen = rows[:wanted]
        wanted -= len(chosen)
        if len(chosen):
            yield source, chosen
        if not wanted:
            return


def count(picked: Iterable[Picked]) -> int:
    """How many contexts they are."""
    return sum(len(rows) for _, rows in picked)
