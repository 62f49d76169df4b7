"""Windows, tasks and detection scores against brute force, oracles and scipy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from darkmatter.errors import DarkmatterError
from darkmatter.experiments.detection import detection, windows
from darkmatter.experiments.detection.detection import DECILES, NEARBY, SILENT, Settings
from darkmatter.experiments.detection.windows import Task, Windows
from darkmatter.models.activations import Activations
from tests import tiny
from tests.text.test_corpus import tiny_tokenizer

LENGTH = 8
HOW = Settings(latents=100, least=20, negatives=10, per_decile=1, shown=4)


@pytest.fixture
def acts() -> Activations:
    return tiny.acts(contexts=120, sources=60, x=tiny.features(120 * 40))


@pytest.fixture
def cut(acts: Activations) -> Windows:
    return windows.cut(tiny.preset(), acts, tiny_tokenizer(), LENGTH)


def activity(acts: Activations, latents: int = 12, rate: float = 0.04,
             seed: int = 0) -> sparse.csr_array:
    """Made-up activations [token, latent]; latent 0 never fires and latent 1 always."""
    rng, shape = np.random.default_rng(seed), (len(acts.x), latents)
    dense = rng.exponential(size=shape) * (rng.random(shape) < rate)
    dense[:, 0], dense[:, 1] = 0, 1
    return sparse.csr_array(dense.astype(np.float32))


# ---- windows ----

def test_windows_hold_the_texts_own_tokens(acts: Activations, cut: Windows) -> None:
    assert cut.tokens.shape == (120 * 5, LENGTH)  # 40 kept tokens a context
    for window in (0, 7, 311, len(cut.tokens) - 1):
        rows = cut.rows(window)
        context = set(acts.context[rows].tolist())
        assert len(context) == 1
        tokens = acts.text.tokens[context.pop(), acts.position[rows]]
        np.testing.assert_array_equal(tokens, cut.tokens[window])
        assert np.array_equal(np.diff(acts.position[rows]), np.ones(LENGTH - 1))


def test_no_window_spans_a_token_that_was_left_out(acts: Activations) -> None:
    keep = np.ones(len(acts.x), bool)
    keep[4] = False  # the fifth token of the first context
    gap = replace(acts, x=acts.x[keep], context=acts.context[keep], position=acts.position[keep])
    cut = windows.cut(tiny.preset(), gap, tiny_tokenizer(), LENGTH)
    # Four tokens before the gap are too few, and 35 after it make four windows.
    assert cut.first_row[:3].tolist() == [4, 12, 20]
    assert len(cut.tokens) == 4 + 119 * 5


def test_too_many_windows_are_thinned_evenly(acts: Activations, cut: Windows) -> None:
    thin = windows.cut(tiny.preset(), acts, tiny_tokenizer(), LENGTH, most=100)
    assert len(thin.tokens) == 100 and set(thin.first_row.tolist()) <= set(cut.first_row.tolist())
    steps = np.diff(np.searchsorted(cut.first_row, thin.first_row))
    assert set(steps.tolist()) == {6, 7}  # of 600


def test_a_source_is_held_out_or_not(acts: Activations, cut: Windows) -> None:
    source = acts.text.source[acts.context[cut.first_row]]
    assert not set(source[cut.held_out].tolist()) & set(source[~cut.held_out].tolist())
    assert 0.3 < cut.held_out.mean() < 0.5
    assert cut.domain[0] == acts.text.sources[0].split("/")[0]


def test_windows_longer_than_the_text(acts: Activations) -> None:
    with pytest.raises(DarkmatterError,
                       match="no stretch of 50 kept tokens; ask for shorter windows"):
        windows.cut(tiny.preset(), acts, tiny_tokenizer(), 50)


def test_active_is_what_the_encoder_says(acts: Activations, own_cache: Path) -> None:
    toy = tiny.loaded("toy", tiny.topk())
    latents = toy.sae.encode(acts.x.float()).detach().numpy()
    np.testing.assert_allclose(windows.active(toy, acts).toarray(), latents, atol=1e-5)


def test_an_sae_without_plain_codes(acts: Activations, own_cache: Path) -> None:
    with pytest.raises(DarkmatterError, match="'odd' rescales its output by token"):
        windows.active(tiny.formula("odd", lambda x: x.relu()), acts)


def test_peaks_are_the_largest_activation_in_each_window(acts: Activations, cut: Windows) -> None:
    dense = activity(acts).toarray()
    expected = np.stack([dense[cut.rows(window)].max(0) for window in range(len(cut.tokens))]).T
    np.testing.assert_array_equal(windows.peaks(activity(acts), cut), expected)


def test_random_directions_fire_as_often_as_they_are_told(acts: Activations) -> None:
    rates = [0.01, 0.05, 0.3]
    one, again, other = (windows.directions(acts, rates, seed).toarray() for seed in (0, 0, 1))
    np.testing.assert_allclose((one > 0).mean(0), rates, atol=1e-3)
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_pieces_join_to_the_text_and_mark_what_fires(acts: Activations, cut: Windows) -> None:
    dense = np.zeros((len(acts.x), 1), np.float32)
    dense[cut.first_row[3] + np.array([2, 3, 6])] = 1
    parts = windows.pieces(cut, 3, sparse.csr_array(dense), 0)
    assert [on for _, on in parts] == [False, True, False, True, False]
    words = cut.tokenizer.decode(cut.tokens[3]).split()
    ends = [0, 2, 4, 6, 7, None]
    assert [text.split() for text, _ in parts] == [words[a:b] for a, b in pairwise(ends)]


def test_pieces_with_more_around_stay_in_the_context(acts: Activations, cut: Windows) -> None:
    nothing = sparse.csr_array(np.zeros((len(acts.x), 1), np.float32))
    whole = cut.tokenizer.decode(acts.text.tokens[0, acts.position[:40]])
    for window in (0, 2, 4):  # the first, a middle and the last window of the first context
        (text, on), = windows.pieces(cut, window, nothing, 0, around=100)
        assert text == whole and not on
    (text, _), = windows.pieces(cut, 2, nothing, 0, around=3)
    assert text.split() == whole.split()[13:27]


# ---- tasks ----

@pytest.fixture
def task(acts: Activations, cut: Windows) -> Task:
    return detection.task(windows.peaks(activity(acts), cut), 5, cut, HOW)


def test_explained_and_tested_on_different_sources(cut: Windows, task: Task) -> None:
    assert not cut.held_out[np.concatenate([task.shown, task.others, task.quiet])].any()
    assert cut.held_out[task.tested].all()
    assert len(task.shown) == 4 and len(set(task.tested[:20].tolist())) == 20


def test_shown_are_the_strongest_and_deciles_are_in_order(acts: Activations, cut: Windows,
                                                          task: Task) -> None:
    peak = windows.peaks(activity(acts), cut)[5]
    assert peak[task.shown].min() >= peak[task.others].max() > 0
    assert (peak[task.quiet] == 0).all()
    fires = np.isin(task.group, DECILES)
    assert (peak[task.tested] > 0).tolist() == fires.tolist()
    strengths = [peak[task.tested[task.group == name]] for name in DECILES]
    assert all(low.max() <= high.min() for low, high in pairwise(strengths))
    everything = np.sort(peak[cut.held_out & (peak > 0)])
    edge = everything[-max(1, len(everything) // 10) - 1]
    assert strengths[9].min() >= edge  # the last decile is of all of the latent's held-out windows


def test_numbers_of_each_group(task: Task) -> None:
    counts = {name: int((task.group == name).sum()) for name in (*DECILES, SILENT, NEARBY)}
    assert [counts[name] for name in DECILES] == [1] * 10
    assert counts[SILENT] == 10 and 8 <= counts[NEARBY] <= 11


def test_nearby_windows_have_the_domains_in_which_the_latent_fires(acts: Activations,
                                                                   cut: Windows) -> None:
    dense = activity(acts, rate=0.1).toarray()
    dense[cut.first_row[cut.domain == "news"][:, None] + np.arange(LENGTH)] = 0
    task = detection.task(windows.peaks(sparse.csr_array(dense), cut), 5, cut, HOW)
    assert set(cut.domain[task.tested[task.group == NEARBY]]) == {"plays"}
    assert set(cut.domain[task.tested[task.group == SILENT]]) == {"plays", "news"}


def test_at_most_so_many_examples_are_drawn(acts: Activations, cut: Windows) -> None:
    peaks = windows.peaks(activity(acts), cut)
    few = detection.task(peaks, 5, cut, replace(HOW, most=60))
    assert len(few.shown) + len(few.others) < 60 < (peaks[5] > 0).sum()


@pytest.mark.parametrize(("latent", "how", "message"), [
    (0, HOW, "Latent 0 fires in none of the 600 windows of this text; choose another one"),
    (99, HOW, "There is no latent 99; this SAE has latents 0 to 11"),
    (-1, HOW, "There is no latent -1"),
    (5, replace(HOW, least=500),
     r"Latent 5 has \d+ windows in which it fires, and 500 are asked for; ask for fewer"),
    (5, replace(HOW, shown=200), r"windows to explain it from, and 400 are asked for"),
    (5, replace(HOW, per_decile=50), r"windows to test it on, and 500 are asked for"),
    (1, HOW, "Latent 1 has 0 windows without it to compare with"),
], ids=["dead", "beyond", "negative", "few", "few shown", "few tested", "always on"])
def test_a_latent_that_cannot_be_judged(acts: Activations, cut: Windows, latent: int, how: Settings,
                                        message: str) -> None:
    with pytest.raises(DarkmatterError, match=message):
        detection.task(windows.peaks(activity(acts), cut), latent, cut, how)


def test_latents_are_drawn_among_those_that_can_be_judged(acts: Activations, cut: Windows) -> None:
    peaks = windows.peaks(activity(acts), cut)
    drawn, counts = detection.tasks(peaks, cut, replace(HOW, latents=6))
    assert counts == {"latents": 12, "never fire": 1, "enough examples": 10}
    assert len(drawn) == 6 and not {0, 1} & {task.latent for task in drawn}
    same, _ = detection.tasks(peaks, cut, replace(HOW, latents=6))
    other, _ = detection.tasks(peaks, cut, replace(HOW, latents=6, seed=1))
    assert [t.latent for t in drawn] == [t.latent for t in same] != [t.latent for t in other]


def test_no_latent_has_enough_examples(acts: Activations, cut: Windows) -> None:
    with pytest.raises(DarkmatterError,
                       match="None of the 12 latents has the 900 windows asked for"):
        detection.tasks(windows.peaks(activity(acts), cut), cut, replace(HOW, least=900))


# ---- scores ----

@pytest.fixture
def drawn(acts: Activations, cut: Windows) -> list[Task]:
    return detection.tasks(windows.peaks(activity(acts, 40), cut), cut, HOW)[0]


def score(scorer: detection.Scorer, drawn: list[Task], acts: Activations,
          cut: Windows) -> dict[str, float | None]:
    answers = detection.detect(scorer, drawn, cut, activity(acts, 40))
    return {name: share.value for name, share in detection.accuracy(answers, 100).items()}


def test_an_oracle_is_always_right_and_its_opposite_never(drawn: list[Task], acts: Activations,
                                                          cut: Windows) -> None:
    def oracle(task: Task, cut: Windows, activity: sparse.csr_array) -> np.ndarray:
        return windows.peaks(activity, cut)[task.latent, task.tested] - 1e-9

    assert set(score(oracle, drawn[:3], acts, cut).values()) == {1} and len(drawn) > 3
    assert set(score(lambda *given: -oracle(*given), drawn[:3], acts, cut).values()) == {0}
    answers = detection.detect(oracle, drawn[:3], cut, activity(acts, 40))
    assert detection.separation(answers).tolist() == [1, 1, 1]


def test_saying_yes_to_everything_is_chance(drawn: list[Task], acts: Activations,
                                            cut: Windows) -> None:
    values = score(lambda task, *_: np.ones(len(task.tested)), drawn, acts, cut)
    assert {values[name] for name in DECILES} == {1} and values[SILENT] == 0 == values[NEARBY]
    assert values["balanced"] == 0.5 and values["fires"] == 1


def test_no_answer_is_left_out(drawn: list[Task], acts: Activations, cut: Windows) -> None:
    def silent_on_most(task: Task, *_: object) -> np.ndarray:
        margin = np.where(np.isin(task.group, DECILES), 1.0, -1.0)
        margin[::2] = np.nan
        return margin

    answers = detection.detect(silent_on_most, drawn, cut, activity(acts, 40))
    right = answers["right"].to_numpy(float)
    assert np.isnan(right).mean() == pytest.approx(0.5, abs=0.02)
    known = detection.accuracy(answers, 100)
    both = known["balanced"].n + known["not, same domains"].n
    assert known["Q2"].value == 1 and both == int((~np.isnan(right)).sum())
    assert known["Q1"].value is None and known["Q1"].n == 0


def made_up(latents: int = 80, spread: float = 0.15, seed: int = 0) -> pd.DataFrame:
    """Answers whose share of right ones differs from latent to latent, 0.7 on average."""
    rng = np.random.default_rng(seed)
    names = np.repeat([*DECILES, SILENT, NEARBY], [5] * 10 + [50, 50])
    rows = []
    for latent in range(latents):
        right = rng.random(len(names)) < np.clip(rng.normal(0.7, spread), 0, 1)
        fires = np.isin(names, DECILES)
        margin = np.where(right == fires, 1.0, -1.0) * rng.random(len(names))
        rows.append(pd.DataFrame({"latent": latent, "group": names, "margin": margin,
                                  "right": right.astype(float)}))
    return pd.concat(rows, ignore_index=True)


def test_intervals_are_over_latents_as_scipys() -> None:
    answers = made_up()
    accuracy = detection.accuracy(answers, 2000)
    for name, n in (("Q3", 5), (SILENT, 50)):
        right = answers.loc[answers["group"] == name, "right"].to_numpy(float)
        shares = right.reshape(80, n).mean(1)
        expected, share = stats.ttest_1samp(shares, 0).confidence_interval(), accuracy[name]
        assert share.value == pytest.approx(shares.mean())
        assert share.low == pytest.approx(expected.low, abs=0.1 * (expected.high - expected.low))
        assert share.high == pytest.approx(expected.high, abs=0.1 * (expected.high - expected.low))
        assert (share.n, share.sources) == (80 * n, 80)


def test_balanced_is_the_mean_of_both_sides() -> None:
    share = {name: float(draws) for name, draws in detection.accuracy(made_up(), 100).items()}
    assert share["fires"] == pytest.approx(np.mean([share[name] for name in DECILES]))
    for name, negatives in detection.BALANCED.items():
        assert share[name] == pytest.approx((share["fires"] + share[negatives]) / 2)
        assert share[name] == pytest.approx(detection.by_latent(made_up(), negatives).mean())


def test_a_difference_has_welchs_interval() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.7, 0.1, 90), rng.normal(0.6, 0.3, 60)
    variance = np.array([one.var(ddof=1) / 90, other.var(ddof=1) / 60])
    freedom = variance.sum() ** 2 / (variance**2 / [89, 59]).sum()
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance.sum())
    middle = one.mean() - other.mean()
    expected = [middle, middle - half, middle + half]
    np.testing.assert_allclose(detection.difference(one, other), expected)


def test_separation_is_the_share_of_pairs_in_order() -> None:
    answers = made_up(latents=3)
    auc = detection.separation(answers, NEARBY)
    for latent in range(3):
        group, margin = (answers.loc[answers["latent"] == latent, name].to_numpy()
                         for name in ("group", "margin"))
        inside, outside = margin[np.isin(group, DECILES)], margin[group == NEARBY]
        assert auc.iloc[latent] == pytest.approx((inside[:, None] > outside).mean())
