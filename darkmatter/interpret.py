"""Are latents interpretable? Detection scores (Figure 8 of the paper).

A latent is explained from windows of the fitted sources and tested on windows of held-out ones: can a scorer tell those
in which it fires, by decile of its activation, from those in which it does not?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats

from . import progress
from .errors import DarkmatterError
from .regression import interval, resample
from .windows import Windows

DECILES = tuple(f"Q{i}" for i in range(1, 11))  # Q1: the weakest tenth of a latent's windows, Q10: the strongest
SILENT, NEARBY = "not", "not, same domains"
BALANCED = {"balanced": SILENT, "balanced, same domains": NEARBY}
QUIET = 500  # windows without a latent, of the fitted sources, at most


@dataclass(frozen=True)
class Settings:
    """How many latents and examples: 1,000 latents, 200 to 2,000 examples and 50 negatives are the paper's."""

    latents: int = 1000
    """Latents drawn at random among those with enough examples."""
    least: int = 200
    """A latent that fires in fewer windows is not scored."""
    most: int = 2000
    """Of a latent that fires in more, this many are drawn."""
    negatives: int = 50
    """Windows without the latent that it is tested on, and at most as many again from the domains it fires in."""
    per_decile: int = 5
    """Windows of each decile that it is tested on."""
    shown: int = 20
    """Strongest windows that it is explained from."""
    seed: int = 0


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
    """str [tested]: 'Q1' to 'Q10' where it fires, 'not' or 'not, same domains' where it does not."""


Scorer = Callable[[Task, Windows, sparse.csr_array], np.ndarray]
"""How sure a scorer is that the latent fires in each tested window, float [tested]: above 0 yes, NaN no answer.

It is given the windows and the activations [token, latent]; it must look at no activation of a tested window.
"""


def task(peaks: np.ndarray, latent: int, cut: Windows, how: Settings) -> Task:
    """What a latent is explained from and tested on, from ``windows.peaks`` [latent, window].

    Raises DarkmatterError when there is no such latent, it never fires, or its examples are too few.
    """
    if not 0 <= latent < len(peaks):
        raise DarkmatterError(f"There is no latent {latent}; this SAE has latents 0 to {len(peaks) - 1}.")
    peak = peaks[latent]
    fires = np.flatnonzero(peak > 0)
    if not len(fires):
        raise DarkmatterError(f"Latent {latent} fires in none of the {len(peak):,} windows of this text; choose "
                              "another one.")
    rng = np.random.default_rng([how.seed, latent])
    fires = np.sort(rng.permutation(fires)[:how.most])
    known, new = fires[~cut.held_out[fires]], fires[cut.held_out[fires]]
    known = known[np.argsort(-peak[known], kind="stable")]
    quiet, unseen = (np.flatnonzero((peak == 0) & side) for side in (~cut.held_out, cut.held_out))
    for there, least, what in ((fires, how.least, "in which it fires"), (known, 2 * how.shown, "to explain it from"),
                               (new, 10 * how.per_decile, "to test it on"), (quiet, 1, "without it to compare with"),
                               (unseen, how.negatives, "without it to test on")):
        if len(there) < least:
            raise DarkmatterError(f"Latent {latent} has {len(there)} windows {what}, and {least} are asked for; ask "
                                  "for fewer examples, or give more text.")
    tenths = np.array_split(new[np.argsort(peak[new], kind="stable")], 10)
    tested = [rng.choice(tenth, how.per_decile, replace=False) for tenth in tenths]
    nearby = _nearby(unseen, cut.domain, np.concatenate(tested), how.negatives, rng)
    tested += [rng.choice(unseen, how.negatives, replace=False), nearby]
    names = np.repeat([*DECILES, SILENT, NEARBY], [len(group) for group in tested])
    return Task(latent, known[:how.shown], known[how.shown:], rng.permutation(quiet)[:QUIET], np.concatenate(tested),
                names)


def _nearby(pool: np.ndarray, domain: np.ndarray, like: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """At most n windows of the pool with the domains of the windows ``like``, as far as the pool has them."""
    names, counts = np.unique(domain[like], return_counts=True)
    found = [rng.permutation(pool[domain[pool] == name])[:round(n * count / len(like))]
             for name, count in zip(names, counts, strict=True)]
    return np.concatenate(found)


def tasks(peaks: np.ndarray, cut: Windows, how: Settings) -> tuple[list[Task], dict[str, int]]:
    """Tasks of latents drawn at random; and how many latents there are, never fire, and have enough examples.

    Raises DarkmatterError when none has.
    """
    able: list[Task] = []
    for latent in np.random.default_rng(how.seed).permutation(len(peaks)).tolist():
        try:
            able.append(task(peaks, latent, cut, how))
        except DarkmatterError:
            continue
    if not able:
        raise DarkmatterError(f"None of the {len(peaks):,} latents has the {how.least} windows asked for; ask for "
                              "fewer examples, or give more text.")
    counts = {"latents": len(peaks), "never fire": int((peaks.max(1) == 0).sum()), "enough examples": len(able)}
    return able[:how.latents], counts


def detect(scorer: Scorer, drawn: Sequence[Task], cut: Windows, found: sparse.csr_array) -> pd.DataFrame:
    """One row a tested window: latent, window, group, margin, right (1 or 0; NaN where the scorer gave no answer)."""
    rows = []
    for each in progress.bar(drawn, "detection", "latents"):
        margin = np.asarray(scorer(each, cut, found), float)
        fires = np.isin(each.group, DECILES)
        right = np.where(np.isnan(margin), np.nan, (margin > 0) == fires)
        rows.append(pd.DataFrame({"latent": each.latent, "window": each.tested, "group": each.group, "margin": margin,
                                  "right": right}))
    return pd.concat(rows, ignore_index=True)


def accuracy(answers: pd.DataFrame, bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of right answers: one row a group, value, low, high (95%, over latents), n (windows), latents.

    'fires' is all deciles together. The 'balanced' rows are the mean of that and of 'not', or of 'not, same domains':
    0.5 is chance.
    """
    known = answers.dropna(subset=["right"])
    names, latent = np.unique(known["latent"], return_inverse=True)

    def by_latent(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.bincount(latent, values, minlength=len(names)).astype(float))

    sums = {"n": by_latent(np.ones(len(known)))}
    inside = {name: (known["group"] == name).to_numpy() for name in (*DECILES, SILENT, NEARBY)}
    inside["fires"] = np.isin(known["group"], DECILES)
    for name, rows in inside.items():
        sums |= {f"{name} n": by_latent(rows), f"{name} right": by_latent(rows * known["right"].to_numpy(float))}
    totals = resample(sums, np.arange(len(names)), bootstrap, seed)
    effective = float(totals["effective"][0])
    shares = {name: totals[f"{name} right"] / totals[f"{name} n"] for name in inside}
    numbers = {name: int(totals[f"{name} n"][0]) for name in inside}
    for name, negatives in BALANCED.items():
        shares[name] = (shares["fires"] + shares[negatives]) / 2
        numbers[name] = numbers["fires"] + numbers[negatives]
    rows = []
    for name, share in shares.items():
        low, high = interval(share[1:], effective)
        rows.append({"group": name, "value": float(share[0]), "low": low, "high": high, "n": numbers[name],
                     "latents": len(names)})
    return pd.DataFrame(rows)


def by_latent(answers: pd.DataFrame, negatives: str = SILENT) -> np.ndarray:
    """Balanced accuracy of each latent with answers of both kinds: float [latents], 0.5 is chance."""
    side = np.where(np.isin(answers["group"], DECILES), "fires", answers["group"])
    table = answers.assign(side=side).pivot_table(index="latent", columns="side", values="right")
    return table[["fires", negatives]].mean(axis=1, skipna=False).dropna().to_numpy()


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``one`` less mean of ``other``, of latents drawn apart, with its 95% interval (Welch)."""
    ends = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    return float(one.mean() - other.mean()), float(ends.low), float(ends.high)


def separation(answers: pd.DataFrame, negatives: str = SILENT) -> pd.Series:
    """By latent: how often a window in which it fires has a larger margin than one in which it does not (AUC).

    Free of the scorer's threshold; 0.5 is chance. NaN for a latent without answers.
    """
    def auc(one: pd.DataFrame) -> float:
        inside, outside = (one.loc[np.isin(one["group"], names), "margin"].dropna() for names in (DECILES, [negatives]))
        pairs = len(inside) * len(outside)
        return float(stats.mannwhitneyu(inside, outside).statistic) / pairs if pairs else float("nan")

    return pd.Series({latent: auc(one) for latent, one in answers.groupby("latent")}, dtype=float)
