"""Norms token by token: against numpy and scipy, on planted answers, and with bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from darkmatter import pertoken, regression, survey
from darkmatter.errors import DarkmatterError
from darkmatter.pertoken import Rows
from tests import tiny

CONTEXTS, EACH = 60, 40
N = CONTEXTS * EACH


def rows(bootstrap: int = 200) -> Rows:
    """Sixty contexts of twenty sources; every third source is held out."""
    context = torch.arange(N) // EACH
    clusters = np.arange(CONTEXTS) // 3
    return Rows(torch.from_numpy(clusters % 3 != 0)[context], context, clusters, bootstrap, 0)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 3] and targets [N, 2]: the first linear in them with noise, the second noise alone."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(4, 5, (N, 3))
    first = x @ [0.5, -0.2, 0.1] + 3 + rng.normal(0, 2, N)
    return x, np.stack([first, rng.gamma(2, 1, N)], 1)


def by_numpy(x: np.ndarray, y: np.ndarray, fit: np.ndarray) -> np.ndarray:
    table = np.column_stack([x, np.ones(len(x))])
    return table @ np.linalg.lstsq(table[fit], y[fit])[0]


def test_predictions_are_those_of_lstsq() -> None:
    x, y = planted()
    found = pertoken.predict(torch.from_numpy(x).__getitem__, torch.from_numpy(y), rows())
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), by_numpy(x, y, rows().fit.numpy()), rtol=1e-9)


def test_float32_features_come_close_to_lstsq() -> None:
    x, y = planted()
    found = pertoken.predict(torch.from_numpy(x).float().__getitem__, torch.from_numpy(y), rows())
    np.testing.assert_allclose(found.numpy(), by_numpy(x, y, rows().fit.numpy()), rtol=1e-4)


def test_nothing_of_the_held_out_rows_enters_the_fit() -> None:
    x, y = planted()
    held = ~rows().fit
    spoiled = torch.from_numpy(y)
    before = pertoken.fit(torch.from_numpy(x).__getitem__, spoiled, rows())
    spoiled = torch.where(held[:, None], 1e9, spoiled)
    after = pertoken.fit(torch.from_numpy(x).__getitem__, spoiled, rows())
    torch.testing.assert_close(before.weight, after.weight)
    torch.testing.assert_close(before.bias, after.bias)


def test_r2_is_that_of_the_held_out_rows_and_its_draws_are_those_of_the_sources() -> None:
    x, y = planted()
    held, target = ~rows().fit.numpy(), torch.from_numpy(y)
    predicted = pertoken.predict(torch.from_numpy(x).__getitem__, target, rows())
    draws = pertoken.r2(target, predicted, rows())
    left, actual = (target - predicted).numpy()[held], y[held]
    expected = 1 - np.square(left).sum(0) / np.square(actual - actual.mean(0)).sum(0)
    assert draws.shape == (201, 2)
    np.testing.assert_allclose(draws[0], expected, rtol=1e-9)
    value, low, high = rows().estimate(draws[:, 0])
    assert low is not None and high is not None
    assert low < value < high
    assert value > 0.5 > abs(draws[0, 1])  # what was planted, and what was not
    one = pertoken.r2(target[:, :1], predicted[:, :1], rows())
    np.testing.assert_allclose(one[:, 0], draws[:, 0], rtol=1e-12)  # the same sources, whatever else is scored


def test_r2_of_a_target_that_does_not_vary_is_nan() -> None:
    flat = torch.ones(N, 1, dtype=torch.float64)
    assert np.isnan(pertoken.r2(flat, 0.5 * flat, rows())).all()


def test_means_are_those_of_the_held_out_rows() -> None:
    _, y = planted()
    draws = pertoken.means(torch.from_numpy(y), rows())
    np.testing.assert_allclose(draws[0], y[~rows().fit.numpy()].mean(0))
    standard_error = np.std([y[(rows().clusters[rows().context] == c), 0].mean() for c in range(0, 20, 3)]) / np.sqrt(6)
    assert np.std(draws[1:, 0]) == pytest.approx(standard_error, rel=0.3)


def test_effective_is_what_the_bootstrap_says() -> None:
    some = rows()
    sums = regression.Sums(CONTEXTS)
    held = ~some.fit
    sums.add_error(some.context[held], torch.ones(int(held.sum())), torch.ones(int(held.sum())))
    assert some.effective == pytest.approx(float(regression.resample(sums, some.clusters, 20, 0)["effective"][0]))
    assert some.effective == pytest.approx(7)  # seven held-out sources of equal size
    unequal = Rows(some.fit, some.context, np.where(np.arange(CONTEXTS) < 30, 0, some.clusters), 20, 0)
    assert unequal.effective != pytest.approx(7)


def test_removed_is_the_share_of_what_was_left() -> None:
    np.testing.assert_allclose(pertoken.removed(np.array([0.5, 0.8, 0.8]), np.array([0.75, 0.8, 0.7])), [0.5, 0, -0.5])


def test_fewer_rows_than_features_is_an_error() -> None:
    wide = torch.randn(N, int(rows().fit.sum()) + 1)
    with pytest.raises(DarkmatterError, match="tokens to fit"):
        pertoken.predict(wide.__getitem__, torch.ones(N, 1, dtype=torch.float64), rows())


def test_thin_keeps_every_second_row() -> None:
    thin = rows().thin(2)
    assert len(thin.fit) == len(thin.context) == N // 2
    torch.testing.assert_close(thin.context, torch.arange(0, N, 2) // EACH)
    assert thin.seed == rows().seed and thin.bootstrap == rows().bootstrap


def test_rows_are_split_as_the_survey_splits_them() -> None:
    of, preset = tiny.acts(), tiny.preset()
    found = Rows.of(preset, of)
    np.testing.assert_array_equal(found.fit.numpy(), survey.fitted_rows(preset, of, survey.PROTOCOLS["strict"]))
    np.testing.assert_array_equal(found.context.numpy(), of.context)
    owner = torch.from_numpy(found.clusters)[found.context]
    assert all(len(found.fit[owner == each].unique()) == 1 for each in owner.unique())  # a source lies on one side


# ---- the text under the curves

WORDS = {1: ("ĠThe", " The"), 2: ("Ġt", " t"), 3: ("ailor", "ailor"), 4: (",", ","), 5: ("Ċ", "\n"), 6: ("Ġ", " "),
         7: ("<b>", "<b>"), 8: ("$$", "$$"), 9: ("ĠOr", " Or"), 10: ("Ġ" + 30 * "-", " " + 30 * "-")}


class Tokenizer(SimpleNamespace):
    """As much of a tokenizer as labels read."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[each][0] for each in ids]

    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[each][1] for each in ids)


def test_labels_are_readable_and_safe() -> None:
    found = pertoken.labels(Tokenizer(), [1, 2, 3, 4, 5, 9, 6, 7, 8, 10])
    assert found[:6] == ["The", "t", "-ailor", ",", "⏎", "Or"]
    assert found[6] == "␣"
    assert found[7] == "&lt;b&gt;"
    assert "$" not in found[8]
    assert len(found[9]) == pertoken.LONGEST and found[9].endswith("…")


def test_labels_of_a_vocabulary_whose_decoder_drops_the_space() -> None:
    """As Llama's, which marks a word's begin with '▁'."""
    pieces = {0: ("▁we", "we"), 1: ("ary", "ary"), 2: ("▁sea", "sea")}
    llama: Any = SimpleNamespace(convert_ids_to_tokens=lambda ids: [pieces[i][0] for i in ids],
                                 decode=lambda ids: pieces[ids[0]][1])
    assert pertoken.labels(llama, [0, 1, 2]) == ["we", "-ary", "sea"]


def tokens(**columns: Any) -> pd.DataFrame:
    """Two contexts each of plays (0, 1), scripture (2, 3) and news (4, 5); odd ones are held out, and 5."""
    context = np.repeat(np.arange(6), 12)
    words = np.where(np.arange(72) % 4 == 0, 1, 4)  # one word in four
    domain = np.array(["plays", "plays", "scripture", "scripture", "news", "news"])[context]
    own = {"context": context, "is_eval": context % 2 == 1, "domain": domain, "token_id": words}
    return pd.DataFrame(own | columns)


def test_stretch_takes_held_out_plays_first() -> None:
    found = pertoken.stretch(tokens(), Tokenizer(), 8)
    assert found == slice(12, 20)
    assert pertoken.stretch(tokens(), Tokenizer(), 8, domain="scripture") == slice(36, 44)
    assert pertoken.stretch(tokens(), Tokenizer(), 8, context=3) == slice(36, 44)


def test_stretch_begins_after_a_line_break_and_prefers_words() -> None:
    broken = tokens()
    broken.loc[14, "token_id"] = 5
    assert pertoken.stretch(broken, Tokenizer(), 8) == slice(15, 23)
    broken.loc[22, "token_id"] = 5  # a later one, after which too little would be left
    assert pertoken.stretch(broken, Tokenizer(), 8) == slice(15, 23)
    more = tokens(is_eval=True)
    more.loc[12:23, "token_id"] = 1
    assert pertoken.stretch(more, Tokenizer(), 8) == slice(12, 20)  # context 1 has more words than context 0


def test_stretch_never_shows_a_hidden_domain() -> None:
    with pytest.raises(DarkmatterError, match=r"'news'.*give one of plays, scripture"):
        pertoken.stretch(tokens(), Tokenizer(), 8, domain="news")
    with pytest.raises(DarkmatterError, match="context 5 may not be shown"):
        pertoken.stretch(tokens(), Tokenizer(), 8, context=5)
    with pytest.raises(DarkmatterError, match="context 2 may not be shown"):  # fitted on
        pertoken.stretch(tokens(), Tokenizer(), 8, context=2)
    only = tokens(domain="news")
    with pytest.raises(DarkmatterError, match="give more text"):
        pertoken.stretch(only, Tokenizer(), 8)
    assert pertoken.stretch(only, Tokenizer(), 8, hidden=()) == slice(12, 20)  # a text of the reader's own


def test_stretch_needs_a_long_enough_context() -> None:
    with pytest.raises(DarkmatterError, match="give more text"):
        pertoken.stretch(tokens(), Tokenizer(), 13)
