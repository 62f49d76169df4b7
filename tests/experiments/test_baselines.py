"""The baselines of Figure 13: each held out, on cases whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from darkmatter import survey
from darkmatter.experiments import baselines
from tests import tiny

CONTEXTS, ROWS = 60, 40
PRESET = tiny.preset(bootstrap=100)


def toy_tokens(seed: int = 0) -> pd.DataFrame:
    """A table of tokens as the survey gives it; the error's norm is noise until one plants it."""
    rng = np.random.default_rng(seed)
    n = CONTEXTS * ROWS
    context, position = np.divmod(np.arange(n), ROWS)
    return pd.DataFrame({
        "context": context, "position": 16 + position, "source": context // 2,
        "token_id": rng.integers(0, 20, n), "is_eval": context // 2 % 3 == 0,
        "x_norm2": rng.gamma(9, 10, n),
        "l0": np.full(n, 8.0), "error_norm2": rng.gamma(9, 1, n), "error_norm2_hat": np.zeros(n),
    })


def plain_r2(tokens: pd.DataFrame, predicted: np.ndarray) -> float:
    rows = tokens.is_eval.to_numpy()
    actual = tokens.error_norm2.to_numpy()[rows]
    left, spread = actual - predicted[rows], actual - actual.mean()
    return float(1 - (left**2).sum() / (spread**2).sum())


def test_r2_is_that_of_the_held_out_rows() -> None:
    tokens = toy_tokens()
    predicted = tokens.error_norm2.to_numpy() + np.where(tokens.is_eval, 0.5, 100)
    r2 = baselines.held_out_r2(tokens, predicted, PRESET)
    assert r2.value == pytest.approx(plain_r2(tokens, predicted))
    assert r2.n == tokens.is_eval.sum() and r2.sources == 10
    assert r2.value is not None and r2.low is not None and r2.high is not None
    assert r2.low < r2.value < r2.high


def test_rows_without_a_prediction_are_left_out() -> None:
    tokens = toy_tokens()
    predicted = tokens.error_norm2.to_numpy().copy()
    predicted[tokens.context >= 30] = np.nan
    r2 = baselines.held_out_r2(tokens, predicted, PRESET)
    assert r2.value == 1 and r2.n == (tokens.is_eval & (tokens.context < 30)).sum()


def test_token_mean_is_of_the_fitted_rows_and_an_unseen_type_gets_the_mean() -> None:
    tokens = pd.DataFrame({
        "token_id": [5, 5, 7, 5, 9], "is_eval": [False, False, False, True, True],
        "error_norm2": [1.0, 3.0, 8.0, 1000.0, 1000.0]})
    np.testing.assert_allclose(baselines.token_mean(tokens), [2, 2, 8, 2, 4])


def test_a_type_seen_once_predicts_nothing_of_itself_when_held_out() -> None:
    """In sample, as in the authors' code, every singleton is predicted perfectly."""
    tokens = toy_tokens()
    tokens["token_id"] = np.arange(len(tokens))
    assert (baselines.held_out_r2(tokens, baselines.token_mean(tokens), PRESET).value or 0) <= 0


def test_line_is_fitted_on_the_fitted_rows() -> None:
    tokens, feature = toy_tokens(), np.linspace(0, 5, CONTEXTS * ROWS)
    tokens["error_norm2"] = np.where(tokens.is_eval, 1e6, 3 * feature - 2)
    np.testing.assert_allclose(baselines.line(tokens, feature), 3 * feature - 2, atol=1e-9)


def test_line_keeps_nan_and_is_the_mean_of_a_constant_feature() -> None:
    tokens, feature = toy_tokens(), np.full(CONTEXTS * ROWS, 8.0)
    feature[3] = np.nan
    predicted = baselines.line(tokens, feature)
    fitted = ~tokens.is_eval.to_numpy()
    fitted[3] = False
    np.testing.assert_allclose(np.delete(predicted, 3), tokens.error_norm2[fitted].mean())
    assert np.isnan(predicted[3])
    feature[5] = 9  # no longer constant
    assert np.isnan(baselines.line(tokens, feature)[3])


def test_loss_of_a_row_is_the_loss_of_predicting_the_token_after_it() -> None:
    tokens = pd.DataFrame({"context": [0, 0, 1, 2], "position": [1, 2, 0, 0]})
    losses = np.array([[0.0, 1, 2], [10, 11, 12]])  # at position p, of the token at p + 1
    np.testing.assert_array_equal(baselines.loss_of(tokens, losses), [1, 2, 10, np.nan])


def test_what_was_planted_is_found() -> None:
    tokens, rng = toy_tokens(), np.random.default_rng(1)
    losses = rng.exponential(2, (40, 80))  # the model's loss on the first contexts only
    of_type = rng.gamma(9, 1, 20)[tokens.token_id]
    tokens["error_norm2"] = of_type + 0.1 * tokens.x_norm2
    tokens["error_norm2_hat"] = tokens.error_norm2 + rng.normal(0, 0.1, len(tokens))
    r2 = baselines.compare(tokens, losses, PRESET)
    value = {name: draws.value for name, draws in r2.items()}
    share = np.var(of_type) / np.var(tokens.error_norm2)
    assert float(r2["x, linear (the paper's probe)"]) > 0.99
    assert value["mean of the token's type"] == pytest.approx(share, abs=0.1)
    assert value["‖x‖²"] == pytest.approx(1 - share, abs=0.1)
    assert value["model loss"] == pytest.approx(0, abs=0.02)
    assert value["L0"] == pytest.approx(0, abs=0.02)
    n = {name: draws.n for name, draws in r2.items()}
    assert n.pop("model loss") == (tokens.is_eval & (tokens.context < 40)).sum()
    assert set(n.values()) == {tokens.is_eval.sum()}
    for draws in r2.values():
        assert draws.low is not None and draws.high is not None
        assert draws.low <= float(draws) <= draws.high


def test_a_loss_that_was_planted_is_found() -> None:
    tokens, rng = toy_tokens(), np.random.default_rng(1)
    losses = rng.exponential(2, (CONTEXTS, 80))
    tokens["error_norm2"] = 5 - 2 * losses[tokens.context, tokens.position]
    assert baselines.compare(tokens, losses, PRESET)["model loss"].value == pytest.approx(1)


def test_the_papers_probe_is_the_surveys_r2_of_the_norm(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    torch.set_num_threads(1)
    acts, sae = tiny.acts(lengths=[40, 0, 40] * 20), tiny.loaded("toy", tiny.topk())
    result = survey.run(PRESET, tiny.surveyed(monkeypatch, acts, sae))
    surveyed, tokens = result.draws("toy", "r2_norm"), result.tokens("toy")
    r2 = baselines.held_out_r2(tokens, tokens.error_norm2_hat.to_numpy(float), PRESET)
    np.testing.assert_allclose(r2.values, surveyed.values, atol=1e-5)
    assert r2.low == pytest.approx(surveyed.low, abs=1e-5)
    assert r2.high == pytest.approx(surveyed.high, abs=1e-5)
    assert (r2.n, r2.sources) == (surveyed.n, surveyed.sources)
