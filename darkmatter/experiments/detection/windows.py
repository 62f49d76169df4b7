"""Windows of text, how strongly each latent fires in them, and which of them judge it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from ...errors import DarkmatterError
from ...regression import clusters, split
from ...saes import codes

if TYPE_CHECKING:
    from ...models.activations import Activations
    from ...presets import Preset
    from ...saes.loaded import LoadedSAE

BLOCK = 16_384  # rows in memory at once


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
        """Its rows among the kept tokens, and ``around`` more on each side within its context."""
        first = int(self.first_row[window])
        context = self.context[first]
        begin = max(first - around, int(np.searchsorted(self.context, context)))
        end = min(first + self.tokens.shape[1] + around,
                  int(np.searchsorted(self.context, context, side="right")))
        return slice(begin, end)


@dataclass(frozen=True)
class Task:
    """One latent's windows, by number: those it is explained from, and those it is tested on."""

    latent: int
    shown: np.ndarray
    """Its strongest windows of the fitted sources, strongest first."""
    others: np.ndarray
    """The other windows of the fitted sources in which it fires."""
    quiet: np.ndarray
    """Windows of the fitted sources in which it does not."""
    tested: np.ndarray
    """Windows of the held-out sources."""
    group: np.ndarray
    """str [tested]: 'Q1' to 'Q10' where it fires, else 'not' or 'not, same domains'."""


def cut(preset: Preset, acts: Activations, tokenizer: Any, length: int = 32,
        most: int = 16_000) -> Windows:
    """Cut every context's kept tokens into windows of ``length``; none spans a token left out.

    Where there are more than ``most``, they are thinned evenly. Raises DarkmatterError when no
    window fits.
    """
    # Where each stretch of consecutive positions begins, and each row's place in its own.
    breaks = np.r_[True, (np.diff(acts.context) != 0) | (np.diff(acts.position) != 1)]
    begins = np.flatnonzero(breaks)
    stretch = np.cumsum(breaks) - 1
    place = np.arange(len(stretch)) - begins[stretch]
    left = np.diff(np.r_[begins, len(stretch)])[stretch] - place
    # A window begins at every ``length``th place that has enough of its stretch left.
    first = np.flatnonzero((place % length == 0) & (left >= length))
    if not len(first):
        raise DarkmatterError(f"This text has no stretch of {length} kept tokens; ask for shorter "
                              "windows, or give longer contexts.")
    first = first[np.linspace(0, len(first) - 1, min(most, len(first))).round().astype(int)]
    domains = np.array([name.split("/", 1)[0] for name in acts.text.sources])
    context, position = acts.context[first], acts.position[first, None] + np.arange(length)
    fit = split(clusters(acts.text.source), preset.fit_share, preset.seed)
    return Windows(acts.text.tokens[context[:, None], position], first,
                   domains[acts.text.source[context]], ~fit[context],
                   acts.text.tokens[acts.context, acts.position], acts.context, tokenizer)


def active(sae: LoadedSAE, acts: Activations) -> sparse.csr_array:
    """Activations of all latents on all kept tokens: float32 [token, latent], sparse.

    Raises DarkmatterError for an SAE that has no codes of its own.
    """
    stored = codes.of(sae, acts)
    if stored is None:
        raise DarkmatterError(
            f"The SAE '{sae.ref}' rescales its output by token, so its latents are not what adds "
            "up; give one whose output is a plain sum of decoder rows.")
    index, value, starts = stored.part(slice(0, len(acts.x)))
    ends = np.append(starts.numpy(), len(index))[:len(acts.x) + 1]
    return sparse.csr_array((value.numpy(), index.numpy(), ends), shape=(len(acts.x), sae.width))


def directions(acts: Activations, rates: Sequence[float], seed: int = 0) -> sparse.csr_array:
    """Control: random directions as latents, each made to fire on a given share of the tokens.

    float32 [token, len(rates)]: how far x · direction exceeds the threshold that gives that share,
    0 below it.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(acts.x.shape[1], len(rates), generator=generator)
    unit = torch.nn.functional.normalize(random, dim=0)
    blocks = [acts.read(slice(at, at + BLOCK)) @ unit for at in range(0, len(acts.x), BLOCK)]
    projected = torch.cat(blocks).numpy()
    thresholds = np.array([np.quantile(column, 1 - rate)
                           for column, rate in zip(projected.T, rates, strict=True)])
    return sparse.csr_array(np.maximum(projected - thresholds, 0, dtype=np.float32))


def peaks(activity: sparse.csr_array, windows: Windows) -> np.ndarray:
    """The strongest activation of each latent in each window, or 0: float32 [latent, window]."""
    latents = int(activity.shape[1])  # pyright: ignore[reportOptionalSubscript]
    strongest = np.zeros((len(windows.tokens), latents), np.float32)
    for window, row in enumerate(strongest):
        inside = activity[windows.rows(window)]
        np.maximum.at(row, inside.indices, inside.data)
    return np.ascontiguousarray(strongest.T)


def pieces(windows: Windows, window: int, activity: sparse.csr_array, latent: int,
           around: int = 0) -> list[tuple[str, bool]]:
    """A window's text, with ``around`` more tokens a side, as (piece, does the latent fire)."""
    rows = windows.rows(window, around)
    fires = activity[rows, [latent]].toarray().ravel() > 0
    tokens = zip(windows.ids[rows].tolist(), fires.tolist(), strict=True)
    return [(windows.tokenizer.decode([token for token, _ in group]), on)
            for on, group in groupby(tokens, key=lambda pair: pair[1])]
