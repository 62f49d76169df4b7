"""Windows, tasks and detection scores against brute force, oracles and scipy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from darkmatter import interpret, windows
from darkmatter.activations import Activations
from darkmatter.errors import DarkmatterError
from darkmatter.interpret import DECILES, NEARBY, SILENT, Settings, Task
from darkmatter.windows import Windows
from tests import tiny
from tests.test_corpus import tiny_tokenizer

LENGTH = 8
HOW = Settings(latents=100, least=20, negatives=10, per_decile=1, shown=4)


@pytest.fixture
def acts() -> Activations:
    return tiny.acts(contexts=120, sources=60, x=tiny.features(120 * 40))


@pytest.fixture
def cut(acts: Activations) -> Windows:
    return windows.cut(tiny.preset(), acts, tiny_tokenizer(), LENGTH)


def found(acts: Activations, latents: int = 12, rate: float = 0.04, seed: int = 0) -> sparse.csr_array:
    """Made-up activations [token, latent]; latent 0 never fires and latent 1 always."""
    rng = np.random.default_rng(seed)
    dense = rng.exponential(size=(len(acts.x), latents)) * (rng.random((len(acts.x), latents)) < rate)
    dense[:, 0], dense[:, 1] = 0, 1
    return sparse.csr_array(dense.astype(np.float32))


# ---- windows ----

def test_windows_hold_the_texts_own_tokens(acts: Activations, cut: Windows) -> None:
    assert cut.tokens.shape == (120 * 5, LENGTH)  # 40 kept tokens a context
    for window in (0, 7, 311, len(cut.tokens) - 1):
        rows = cut.rows(window)
        context = set(acts.context[rows].tolist())
        assert len(context) == 1
        np.testing.assert_array_equal(acts.text.tokens[context.pop(), acts.position[rows]], cut.tokens[window])
        assert np.array_equal(np.diff(acts.position[rows]), np.ones(LENGTH - 1))


def test_no_window_spans_a_token_that_was_left_out(acts: Activations) -> None:
    keep = np.ones(len(acts.x), bool)
    keep[4] = False  # the fifth token of the first context
    gap = replace(acts, x=acts.x[keep], context=acts.context[keep], position=acts.position[keep])
    cut = windows.cut(tiny.preset(), gap, tiny_tokenizer(), LENGTH)
    assert cut.first_row[:3].tolist() == [4, 12, 20]  # 4 tokens before the gap are too few; 35 after it make 4 windows
    assert len(cut.tokens) == 4 + 119 * 5


def test_too_many_windows_are_thinned_evenly(acts: Activations, cut: Windows) -> None:
    some = windows.cut(tiny.preset(), acts, tiny_tokenizer(), LENGTH, most=100)
    assert len(some.tokens) == 100 and set(some.first_row.tolist()) <= set(cut.first_row.tolist())
    steps = np.diff(np.searchsorted(cut.first_row, some.first_row))
    assert set(steps.tolist()) == {6, 7}  # of 600


def test_a_source_is_held_out_or_not(acts: Activations, cut: Windows) -> None:
    source = acts.text.source[acts.context[cut.first_row]]
    assert not set(source[cut.held_out].tolist()) & set(source[~cut.held_out].tolist())
    assert 0.3 < cut.held_out.mean() < 0.5
    assert cut.domain[0] == acts.text.sources[0].split("/")[0]


def test_windows_longer_than_the_text(acts: Activations) -> None:
    with pytest.raises(DarkmatterError, match="no stretch of 50 kept tokens; ask for shorter windows"):
        windows.cut(tiny.preset(), acts, tiny_tokenizer(), 50)


def test_active_is_what_the_encoder_says(acts: Activations, own_cache: Path) -> None:
    each = tiny.loaded("toy", tiny.topk())
    latents = each.sae.encode(acts.x.float()).detach().numpy()
    np.testing.assert_allclose(windows.active(each, acts).toarray(), latents, atol=1e-5)


def test_an_sae_without_plain_codes(acts: Activations, own_cache: Path) -> None:
    with pytest.raises(DarkmatterError, match="'odd' rescales its output by token"):
        windows.active(tiny.formula("odd", lambda x: x.relu()), acts)


def test_peaks_are_the_largest_activation_in_each_window(acts: Activations, cut: Windows) -> None:
    some = found(acts)
    dense = some.toarray()
    expected = np.stack([dense[cut.rows(window)].max(0) for window in range(len(cut.tokens))]).T
    np.testing.assert_array_equal(windows.peaks(some, cut), expected)


def test_random_directions_fire_as_often_as_they_are_told(acts: Activations) -> None:
    rates = [0.01, 0.05, 0.3]
    found, again, other = (windows.directions(acts, rates, seed).toarray() for seed in (0, 0, 1))
    np.testing.assert_allclose((found > 0).mean(0), rates, atol=1e-3)
    assert np.array_equal(found, again) and not np.array_equal(found, other)


def test_pieces_join_to_the_text_and_mark_what_fires(acts: Activations, cut: Windows) -> None:
    dense = np.zeros((len(acts.x), 1), np.float32)
    dense[cut.first_row[3] + np.array([2, 3, 6])] = 1
    parts = windows.pieces(cut, 3, sparse.csr_array(dense), 0)
    assert [on for _, on in parts] == [False, True, False, True, False]
    words = cut.tokenizer.decode(cut.tokens[3]).split()
    assert [text.split() for text, _ in parts] == [words[:2], words[2:4], words[4:6], words[6:7], words[7:]]


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
    return interpret.task(windows.peaks(found(acts), cut), 5, cut, HOW)


def test_explained_and_tested_on_different_sources(cut: Windows, task: Task) -> None:
    assert not cut.held_out[np.concatenate([task.shown, task.others, task.quiet])].any()
    assert cut.held_out[task.tested].all()
    assert len(task.shown) == 4 and len(set(task.tested[:20].tolist())) == 20


def test_shown_are_the_strongest_and_deciles_are_in_order(acts: Activations, cut: Windows, task: Task) -> None:
    peak = windows.peaks(found(acts), cut)[5]
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
    assert [counts[name] for name in DECILES] == [1] * 10 and counts[SILENT] == 10 and 8 <= counts[NEARBY] <= 11


def test_nearby_windows_have_the_domains_in_which_the_latent_fires(acts: Activations, cut: Windows) -> None:
    dense = found(acts, rate=0.1).toarray()
    dense[cut.first_row[cut.domain == "news"][:, None] + np.arange(LENGTH)] = 0
    task = interpret.task(windows.peaks(sparse.csr_array(dense), cut), 5, cut, HOW)
    assert set(cut.domain[task.tested[task.group == NEARBY]]) == {"plays"}
    assert set(cut.domain[task.tested[task.group == SILENT]]) == {"plays", "news"}


def test_at_most_so_many_examples_are_drawn(acts: Activations, cut: Windows) -> None:
    peaks = windows.peaks(found(acts), cut)
    few = interpret.task(peaks, 5, cut, replace(HOW, most=60))
    assert len(few.shown) + len(few.others) < 60 < (peaks[5] > 0).sum()


@pytest.mark.parametrize(("latent", "how", "said"), [
    (0, HOW, "Latent 0 fires in none of the 600 windows of this text; choose another one"),
    (99, HOW, "There is no latent 99; this SAE has latents 0 to 11"),
    (-1, HOW, "There is no latent -1"),
    (5, replace(HOW, least=500), r"Latent 5 has \d+ windows in which it fires, and 500 are asked for; ask for fewer"),
    (5, replace(HOW, shown=200), r"windows to explain it from, and 400 are asked for"),
    (5, replace(HOW, per_decile=50), r"windows to test it on, and 500 are asked for"),
    (1, HOW, "Latent 1 has 0 windows without it to compare with"),
], ids=["dead", "beyond", "negative", "few", "few shown", "few tested", "always on"])
def test_a_latent_that_cannot_be_judged(acts: Activations, cut: Windows, latent: int, how: Settings, said: str) -> None:
    with pytest.raises(DarkmatterError, match=said):
        interpret.task(windows.peaks(found(acts), cut), latent, cut, how)


def test_latents_are_drawn_among_those_that_can_be_judged(acts: Activations, cut: Windows) -> None:
    peaks = windows.peaks(found(acts), cut)
    drawn, counts = interpret.tasks(peaks, cut, replace(HOW, latents=6))
    assert counts == {"latents": 12, "never fire": 1, "enough examples": 10}
    assert len(drawn) == 6 and not {0, 1} & {task.latent for task in drawn}
    same, _ = interpret.tasks(peaks, cut, replace(HOW, latents=6))
    other, _ = interpret.tasks(peaks, cut, replace(HOW, latents=6, seed=1))
    assert [t.latent for t in drawn] == [t.latent for t in same] != [t.latent for t in other]


def test_no_latent_has_enough_examples(acts: Activations, cut: Windows) -> None:
    with pytest.raises(DarkmatterError, match="None of the 12 latents has the 900 windows asked for"):
        interpret.tasks(windows.peaks(found(acts), cut), cut, replace(HOW, least=900))


# ---- scores ----

@pytest.fixture
def drawn(acts: Activations, cut: Windows) -> list[Task]:
    return interpret.tasks(windows.peaks(found(acts, 40), cut), cut, HOW)[0]


def rows(answers: pd.DataFrame, bootstrap: int = 100) -> dict[str, dict[str, float]]:
    """The table of accuracies, by group."""
    return {str(row.pop("group")): row for row in interpret.accuracy(answers, bootstrap).to_dict("records")}


def score(scorer: interpret.Scorer, drawn: list[Task], acts: Activations, cut: Windows) -> dict[str, float]:
    answers = interpret.detect(scorer, drawn, cut, found(acts, 40))
    return {name: row["value"] for name, row in rows(answers).items()}


def test_an_oracle_is_always_right_and_its_opposite_never(drawn: list[Task], acts: Activations, cut: Windows) -> None:
    def oracle(task: Task, cut: Windows, found: sparse.csr_array) -> np.ndarray:
        return windows.peaks(found, cut)[task.latent, task.tested] - 1e-9

    assert set(score(oracle, drawn[:3], acts, cut).values()) == {1} and len(drawn) > 3
    assert set(score(lambda *given: -oracle(*given), drawn[:3], acts, cut).values()) == {0}
    answers = interpret.detect(oracle, drawn[:3], cut, found(acts, 40))
    assert interpret.separation(answers).tolist() == [1, 1, 1]


def test_saying_yes_to_everything_is_chance(drawn: list[Task], acts: Activations, cut: Windows) -> None:
    values = score(lambda task, *_: np.ones(len(task.tested)), drawn, acts, cut)
    assert {values[name] for name in DECILES} == {1} and values[SILENT] == 0 == values[NEARBY]
    assert values["balanced"] == 0.5 and values["fires"] == 1


def test_no_answer_is_left_out(drawn: list[Task], acts: Activations, cut: Windows) -> None:
    def silent_on_most(task: Task, *_: object) -> np.ndarray:
        margin = np.where(np.isin(task.group, DECILES), 1.0, -1.0)
        margin[::2] = np.nan
        return margin

    answers = interpret.detect(silent_on_most, drawn, cut, found(acts, 40))
    right = answers["right"].to_numpy(float)
    assert np.isnan(right).mean() == pytest.approx(0.5, abs=0.02)
    known = rows(answers)
    both = known["balanced"]["n"] + known["not, same domains"]["n"]
    assert known["Q2"]["value"] == 1 and both == int((~np.isnan(right)).sum())
    assert np.isnan(known["Q1"]["value"]) and known["Q1"]["n"] == 0


def made_up(latents: int = 80, spread: float = 0.15, seed: int = 0) -> pd.DataFrame:
    """Answers whose share of right ones differs from latent to latent, 0.7 on average."""
    rng = np.random.default_rng(seed)
    names = np.repeat([*DECILES, SILENT, NEARBY], [5] * 10 + [50, 50])
    rows = []
    for latent in range(latents):
        right = rng.random(len(names)) < np.clip(rng.normal(0.7, spread), 0, 1)
        fires = np.isin(names, DECILES)
        margin = np.where(right == fires, 1.0, -1.0) * rng.random(len(names))
        rows.append(pd.DataFrame({"latent": latent, "group": names, "margin": margin, "right": right.astype(float)}))
    return pd.concat(rows, ignore_index=True)


def test_intervals_are_over_latents_as_scipys() -> None:
    answers = made_up()
    found = rows(answers, 2000)
    for name, n in (("Q3", 5), (SILENT, 50)):
        shares = answers.loc[answers["group"] == name, "right"].to_numpy(float).reshape(80, n).mean(1)
        expected = stats.ttest_1samp(shares, 0).confidence_interval()
        assert found[name]["value"] == pytest.approx(shares.mean())
        np.testing.assert_allclose([found[name]["low"], found[name]["high"]], [expected.low, expected.high],
                                   atol=0.1 * (expected.high - expected.low))
        assert (found[name]["n"], found[name]["latents"]) == (80 * n, 80)


def test_balanced_is_the_mean_of_both_sides() -> None:
    found = {name: row["value"] for name, row in rows(made_up()).items()}
    assert found["fires"] == pytest.approx(np.mean([found[name] for name in DECILES]))
    assert found["balanced"] == pytest.approx((found["fires"] + found[SILENT]) / 2)
    assert found["balanced, same domains"] == pytest.approx((found["fires"] + found[NEARBY]) / 2)
    assert found["balanced"] == pytest.approx(interpret.by_latent(made_up()).mean())
    assert found["balanced, same domains"] == pytest.approx(interpret.by_latent(made_up(), NEARBY).mean())


def test_a_difference_has_welchs_interval() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.7, 0.1, 90), rng.normal(0.6, 0.3, 60)
    variance = np.array([one.var(ddof=1) / 90, other.var(ddof=1) / 60])
    freedom = variance.sum() ** 2 / (variance**2 / [89, 59]).sum()
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance.sum())
    middle = one.mean() - other.mean()
    np.testing.assert_allclose(interpret.difference(one, other), [middle, middle - half, middle + half])


def test_separation_is_the_share_of_pairs_in_order() -> None:
    answers = made_up(latents=3)
    found = interpret.separation(answers, NEARBY)
    for latent in range(3):
        group, margin = (answers.loc[answers["latent"] == latent, name].to_numpy() for name in ("group", "margin"))
        inside, outside = margin[np.isin(group, DECILES)], margin[group == NEARBY]
        assert found.iloc[latent] == pytest.approx((inside[:, None] > outside).mean())
