"""Windows of text, and how strongly each latent fires in each of them: what latents are judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from scipy import sparse

from . import codes
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .regression import clusters, split
from .saes import LoadedSAE

ROWS = 16_384  # rows in memory at once


@dataclass(frozen=True)
class Windows:
    """Stretches of consecutive kept tokens, the same for every latent and every SAE."""

    tokens: np.ndarray
    """int32 [window, length]."""
    first_row: np.ndarray
    """int64 [window]: the row of its first token among the kept tokens."""
    domain: np.ndarray
    """str [window]."""
    held_out: np.ndarray
    """bool [window]: whether its source is one of those held out."""
    ids: np.ndarray
    """int32 [token]: the token at every kept row, in a window or not."""
    context: np.ndarray
    """int32 [token]: the context of every kept row."""
    tokenizer: Any

    @cached_property
    def texts(self) -> list[str]:
        return self.tokenizer.batch_decode(self.tokens, clean_up_tokenization_spaces=False)

    @property
    def digest(self) -> str:
        """Changes with the tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, "<i4").tobytes()).hexdigest()

    def rows(self, window: int, around: int = 0) -> slice:
        """Its rows among the kept tokens, and ``around`` more on each side as far as its context goes."""
        first = int(self.first_row[window])
        here = self.context[first]
        begin = max(first - around, int(np.searchsorted(self.context, here)))
        end = min(first + self.tokens.shape[1] + around, int(np.searchsorted(self.context, here, side="right")))
        return slice(begin, end)


def cut(preset: Preset, acts: Activations, tokenizer: Any, length: int = 32, most: int = 16_000) -> Windows:
    """Cut the kept tokens of every context into windows of ``length``; none spans a token that was left out.

    Where there are more than ``most``, they are thinned evenly. Raises DarkmatterError when no window fits.
    """
    breaks = np.r_[True, (np.diff(acts.context) != 0) | (np.diff(acts.position) != 1)]
    begins = np.flatnonzero(breaks)
    stretch = np.cumsum(breaks) - 1
    place = np.arange(len(stretch)) - begins[stretch]
    left = np.diff(np.r_[begins, len(stretch)])[stretch] - place
    first = np.flatnonzero((place % length == 0) & (left >= length))
    if not len(first):
        raise DarkmatterError(f"This text has no stretch of {length} kept tokens; ask for shorter windows, or give "
                              "longer contexts.")
    first = first[np.linspace(0, len(first) - 1, min(most, len(first))).round().astype(int)]
    domains = np.array([name.split("/", 1)[0] for name in acts.text.sources])
    position = acts.position[first, None] + np.arange(length)
    fit = split(clusters(acts.text.source), preset.fit_share, preset.seed)
    return Windows(acts.text.tokens[acts.context[first, None], position], first,
                   domains[acts.text.source[acts.context[first]]], ~fit[acts.context[first]],
                   acts.text.tokens[acts.context, acts.position], acts.context, tokenizer)


def active(each: LoadedSAE, acts: Activations) -> sparse.csr_array:
    """Activations of all latents on all kept tokens: float32 [token, latent], sparse.

    Raises DarkmatterError for an SAE that has no codes of its own.
    """
    stored = codes.of(each, acts)
    if stored is None:
        raise DarkmatterError(f"The SAE '{each.ref}' rescales its output by token, so its latents are not what adds "
                              "up; give one whose output is a plain sum of decoder rows.")
    index, value, starts = stored.part(slice(0, len(acts.x)))
    ends = np.append(starts.numpy(), len(index))[:len(acts.x) + 1]
    return sparse.csr_array((value.numpy(), index.numpy(), ends), shape=(len(acts.x), each.width))


def directions(acts: Activations, rates: Sequence[float], seed: int = 0) -> sparse.csr_array:
    """Control: random directions in place of latents, each made to fire on a given share of the tokens.

    float32 [token, len(rates)]: how far x · direction exceeds the threshold that gives that share, 0 below it.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.nn.functional.normalize(torch.randn(acts.x.shape[1], len(rates), generator=generator), dim=0)
    parts = [acts.read(slice(at, at + ROWS)) @ drawn for at in range(0, len(acts.x), ROWS)]
    projected = torch.cat(parts).numpy()
    thresholds = np.array([np.quantile(column, 1 - rate) for column, rate in zip(projected.T, rates, strict=True)])
    return sparse.csr_array(np.maximum(projected - thresholds, 0, dtype=np.float32))


def peaks(found: sparse.csr_array, some: Windows) -> np.ndarray:
    """The strongest activation of each latent in each window: float32 [latent, window], 0 where it does not fire."""
    latents = int(found.shape[1])  # pyright: ignore[reportOptionalSubscript]
    top = np.zeros((len(some.tokens), latents), np.float32)
    for window in range(len(some.tokens)):
        inside = found[some.rows(window)]
        np.maximum.at(top[window], inside.indices, inside.data)
    return np.ascontiguousarray(top.T)


def pieces(some: Windows, window: int, found: sparse.csr_array, latent: int,
           around: int = 0) -> list[tuple[str, bool]]:
    """The text of a window, with ``around`` more tokens on each side, in pieces: each with whether the latent fires."""
    rows = some.rows(window, around)
    fires = found[rows, [latent]].toarray().ravel() > 0
    groups = groupby(zip(some.ids[rows].tolist(), fires.tolist(), strict=True), key=lambda pair: pair[1])
    return [(some.tokenizer.decode([token for token, _ in group]), on) for on, group in groups]
