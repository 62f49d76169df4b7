"""Are latents interpretable? Detection scores (Figure 8 of the paper).

A latent is explained from windows of the fitted sources and tested on windows of held-out ones: can
a scorer tell those in which it fires, by decile of its activation, from those in which it does not?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats

from ... import progress
from ...errors import DarkmatterError
from ...regression import Draws, drawn, resample
from .windows import Task, Windows

DECILES = tuple(f"Q{i}" for i in range(1, 11))  # tenths of a latent's windows, Q10 the strongest
SILENT, NEARBY = "not", "not, same domains"
BALANCED = {"balanced": SILENT, "balanced, same domains": NEARBY}
QUIET = 500  # windows without a latent, of the fitted sources, at most


@dataclass(frozen=True)
class Settings:
    """How many latents and examples. The paper: 1,000; 200 to 2,000 examples, 50 negatives."""

    latents: int = 1000
    """Latents drawn at random among those with enough examples."""
    least: int = 200
    """A latent that fires in fewer windows is not scored."""
    most: int = 2000
    """Of a latent that fires in more, this many are drawn."""
    negatives: int = 50
    """Windows without it that it is tested on, and as many again of the domains it fires in."""
    per_decile: int = 5
    """Windows of each decile that it is tested on."""
    shown: int = 20
    """Strongest windows that it is explained from."""
    seed: int = 0


Scorer = Callable[[Task, Windows, sparse.csr_array], np.ndarray]
"""A scorer's margin for each tested window, float [tested]: above 0 for yes, NaN for no answer.

It is given the windows and the activations [token, latent]; it must look at no activation of a
tested window.
"""


def task(peaks: np.ndarray, latent: int, windows: Windows, how: Settings) -> Task:
    """What a latent is explained from and tested on, from ``windows.peaks`` [latent, window].

    Raises DarkmatterError when there is no such latent, it never fires, or its examples are too
    few.
    """
    if not 0 <= latent < len(peaks):
        raise DarkmatterError(f"There is no latent {latent}; this SAE has latents 0 to "
                              f"{len(peaks) - 1}.")
    peak = peaks[latent]
    fires = np.flatnonzero(peak > 0)
    if not len(fires):
        raise DarkmatterError(f"Latent {latent} fires in none of the {len(peak):,} windows of this "
                              "text; choose another one.")
    # Windows of fitted sources explain it, and those of held-out ones test it.
    rng = np.random.default_rng([how.seed, latent])
    fires = np.sort(rng.permutation(fires)[:how.most])
    known, new = fires[~windows.held_out[fires]], fires[windows.held_out[fires]]
    known = known[np.argsort(-peak[known], kind="stable")]
    sides = (~windows.held_out, windows.held_out)
    quiet, unseen = (np.flatnonzero((peak == 0) & side) for side in sides)
    for there, least, what in ((fires, how.least, "in which it fires"),
                               (known, 2 * how.shown, "to explain it from"),
                               (new, 10 * how.per_decile, "to test it on"),
                               (quiet, 1, "without it to compare with"),
                               (unseen, how.negatives, "without it to test on")):
        if len(there) < least:
            raise DarkmatterError(
                f"Latent {latent} has {len(there)} windows {what}, and {least} are asked for; ask "
                "for fewer examples, or give more text.")
    # It is tested on some of each decile of its strength, and on windows in which it does not fire.
    tenths = np.array_split(new[np.argsort(peak[new], kind="stable")], 10)
    tested = [rng.choice(tenth, how.per_decile, replace=False) for tenth in tenths]
    nearby = _nearby(unseen, windows.domain, np.concatenate(tested), how.negatives, rng)
    tested += [rng.choice(unseen, how.negatives, replace=False), nearby]
    names = np.repeat([*DECILES, SILENT, NEARBY], [len(group) for group in tested])
    return Task(latent, known[:how.shown], known[how.shown:], rng.permutation(quiet)[:QUIET],
                np.concatenate(tested), names)


def _nearby(pool: np.ndarray, domain: np.ndarray, like: np.ndarray, n: int,
            rng: np.random.Generator) -> np.ndarray:
    """At most n windows of the pool, with the domains of the windows ``like`` where it has them."""
    names, counts = np.unique(domain[like], return_counts=True)
    shares = [rng.permutation(pool[domain[pool] == name])[:round(n * count / len(like))]
              for name, count in zip(names, counts, strict=True)]
    return np.concatenate(shares)


def tasks(peaks: np.ndarray, windows: Windows, how: Settings) -> tuple[list[Task], dict[str, int]]:
    """Tasks of latents drawn at random; and how many there are, never fire, have enough examples.

    Raises DarkmatterError when none has.
    """
    able: list[Task] = []
    for latent in np.random.default_rng(how.seed).permutation(len(peaks)).tolist():
        try:
            able.append(task(peaks, latent, windows, how))
        except DarkmatterError:
            continue
    if not able:
        raise DarkmatterError(
            f"None of the {len(peaks):,} latents has the {how.least} windows asked for; ask for "
            "fewer examples, or give more text.")
    counts = {"latents": len(peaks), "never fire": int((peaks.max(1) == 0).sum()),
              "enough examples": len(able)}
    return able[:how.latents], counts


def detect(scorer: Scorer, tasks: Sequence[Task], windows: Windows,
           activity: sparse.csr_array) -> pd.DataFrame:
    """One row a tested window: latent, window, group, margin, right (1, 0; NaN: no answer)."""
    rows = []
    for task in progress.bar(tasks, "detection", "latents"):
        margin = np.asarray(scorer(task, windows, activity), float)
        fires = np.isin(task.group, DECILES)
        right = np.where(np.isnan(margin), np.nan, (margin > 0) == fires)
        rows.append(pd.DataFrame({"latent": task.latent, "window": task.tested, "group": task.group,
                                  "margin": margin, "right": right}))
    return pd.concat(rows, ignore_index=True)


def accuracy(answers: pd.DataFrame, bootstrap: int = 1000, seed: int = 0) -> dict[str, Draws]:
    """Share of right answers by group; a draw takes whole latents, and ``n`` counts windows.

    'fires' is all deciles together. The 'balanced' entries are the mean of that and of 'not', or of
    'not, same domains': 0.5 is chance. A group without an answer has no value.
    """
    known = answers.dropna(subset=["right"])
    names, latent = np.unique(known["latent"], return_inverse=True)

    def by_latent(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.bincount(latent, values, minlength=len(names)).astype(float))

    # Windows and right answers of each group, summed by latent.
    groups = {name: (known["group"] == name).to_numpy() for name in (*DECILES, SILENT, NEARBY)}
    groups["fires"] = np.isin(known["group"], DECILES)
    sums = {"n": by_latent(np.ones(len(known)))}
    for name, inside in groups.items():
        right = inside * known["right"].to_numpy(float)
        sums |= {f"{name} n": by_latent(inside), f"{name} right": by_latent(right)}
    # Draws of latents, and the share of right answers on each.
    totals = resample(sums, np.arange(len(names)), bootstrap, seed)
    shares = {name: drawn(totals, totals[f"{name} right"] / totals[f"{name} n"]) for name in groups}
    windows = {name: int(inside.sum()) for name, inside in groups.items()}
    for name, negatives in BALANCED.items():
        shares[name] = (shares["fires"] + shares[negatives]) / 2
        windows[name] = windows["fires"] + windows[negatives]
    return {name: replace(share, n=windows[name]) for name, share in shares.items()}


def by_latent(answers: pd.DataFrame, negatives: str = SILENT) -> np.ndarray:
    """Balanced accuracy of each latent that has answers of both kinds: float [latents]."""
    side = np.where(np.isin(answers["group"], DECILES), "fires", answers["group"])
    table = answers.assign(side=side).pivot_table(index="latent", columns="side", values="right")
    return table[["fires", negatives]].mean(axis=1, skipna=False).dropna().to_numpy()


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``one`` less mean of ``other``, latents drawn apart, and its 95% interval (Welch)."""
    ends = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    return float(one.mean() - other.mean()), float(ends.low), float(ends.high)


def separation(answers: pd.DataFrame, negatives: str = SILENT) -> pd.Series:
    """By latent: how often a window with it has a larger margin than one without it (AUC).

    Free of the scorer's threshold; 0.5 is chance. NaN for a latent without answers.
    """
    def auc(rows: pd.DataFrame) -> float:
        inside, outside = (rows.loc[np.isin(rows["group"], names), "margin"].dropna()
                           for names in (DECILES, [negatives]))
        if not (pairs := len(inside) * len(outside)):
            return float("nan")
        return float(stats.mannwhitneyu(inside, outside).statistic) / pairs

    return pd.Series({latent: auc(rows) for latent, rows in answers.groupby("latent")}, dtype=float)
