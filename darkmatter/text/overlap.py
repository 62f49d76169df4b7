"""Runs of tokens that two texts have in common, which keep training text clear of evaluation's."""

from __future__ import annotations

import numpy as np


class Runs:
    """The runs of ``length`` tokens in some contexts [context, position], as 64-bit hashes.

    The hash of a run is sum_i B^i h(token_i) mod 2^64. Two different runs may share one (in a text
    of 20 million tokens, with a chance below 1 in 10^6); the same run always does: nothing that is
    shared is missed.
    """

    SIEVE = 24  # bits of a hash that are looked up in a table before the hash itself is

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.length = length
        self.known = np.unique(self._hashes(tokens))
        self.table = np.zeros(1 << self.SIEVE, bool)
        self.table[self.known >> np.uint64(64 - self.SIEVE)] = True

    def among(self, tokens: np.ndarray) -> np.ndarray:
        """Which runs of ``tokens`` are known, bool [context, position of the run's first token]."""
        hashes = self._hashes(tokens)
        known = self.table[hashes >> np.uint64(64 - self.SIEVE)]
        # The table lets a few pass that are not known: those are looked up one by one.
        candidates = hashes[known]
        places = np.searchsorted(self.known, candidates).clip(max=max(0, len(self.known) - 1))
        known[known] = self.known[places] == candidates
        return known

    def _hashes(self, tokens: np.ndarray) -> np.ndarray:
        mixed = _mixed(tokens)
        total = np.zeros((len(tokens), max(0, tokens.shape[1] - self.length + 1)), np.uint64)
        for i in range(self.length):
            total = total * np.uint64(0x9E3779B97F4A7C15) + mixed[:, i:i + total.shape[1]]
        return total


def _mixed(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit number for each token, as random as the splitmix64 finalizer makes it."""
    x = tokens.astype(np.uint64) + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
