"""Numbers of a row predicted and scored: against numpy, on planted answers, and with bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from darkmatter import regression
from darkmatter.errors import DarkmatterError
from darkmatter.regression import probe
from darkmatter.regression.probe import Rows

CONTEXTS, EACH = 60, 40
N = CONTEXTS * EACH


def rows(bootstrap: int = 200) -> Rows:
    """Sixty contexts of twenty sources; every third source is held out."""
    context = torch.arange(N) // EACH
    clusters = np.arange(CONTEXTS) // 3
    return Rows(torch.from_numpy(clusters % 3 != 0)[context], context, clusters, bootstrap, 0)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 3] and targets [N, 2]: the first linear in them with noise, the second noise."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(4, 5, (N, 3))
    first = x @ [0.5, -0.2, 0.1] + 3 + rng.normal(0, 2, N)
    return x, np.stack([first, rng.gamma(2, 1, N)], 1)


def by_numpy(x: np.ndarray, y: np.ndarray, fit: np.ndarray) -> np.ndarray:
    table = np.column_stack([x, np.ones(len(x))])
    return table @ np.linalg.lstsq(table[fit], y[fit])[0]


def test_predictions_are_those_of_lstsq() -> None:
    x, y = planted()
    predicted = probe.predict(torch.from_numpy(x), torch.from_numpy(y), rows())
    assert predicted.dtype == torch.float64
    np.testing.assert_allclose(predicted.numpy(), by_numpy(x, y, rows().fit.numpy()), rtol=1e-9)


def test_float32_features_come_close_to_lstsq() -> None:
    x, y = planted()
    predicted = probe.predict(torch.from_numpy(x).float(), torch.from_numpy(y), rows())
    np.testing.assert_allclose(predicted.numpy(), by_numpy(x, y, rows().fit.numpy()), rtol=1e-4)


def test_features_may_be_read_by_slices() -> None:
    x, y = (torch.from_numpy(each) for each in planted())
    whole, sliced = (probe.predict(features, y, rows()) for features in (x, lambda block: x[block]))
    torch.testing.assert_close(whole, sliced, rtol=0, atol=0)


def test_nothing_of_the_held_out_rows_enters_the_fit() -> None:
    x, y = (torch.from_numpy(each) for each in planted())
    before = probe.fit(x, y, rows())
    after = probe.fit(x, torch.where(rows().held[:, None], 1e9, y), rows())
    torch.testing.assert_close(before.weight, after.weight)
    torch.testing.assert_close(before.bias, after.bias)


def test_r2_is_that_of_the_held_out_rows_and_its_draws_are_those_of_the_sources() -> None:
    x, y = planted()
    held, target = rows().held.numpy(), torch.from_numpy(y)
    predicted = probe.predict(torch.from_numpy(x), target, rows())
    first, second = probe.r2(target, predicted, rows())
    left, actual = (target - predicted).numpy()[held], y[held]
    expected = 1 - np.square(left).sum(0) / np.square(actual - actual.mean(0)).sum(0)
    assert first.values.shape == (201,)
    np.testing.assert_allclose([float(first), float(second)], expected, rtol=1e-9)
    assert first.low is not None and first.high is not None
    assert first.low < float(first) < first.high
    assert float(first) > 0.5 > abs(float(second))  # what was planted, and what was not
    assert first.n == held.sum() and first.sources == 7
    alone, = probe.held_out_r2(torch.from_numpy(x), target[:, :1], rows())
    np.testing.assert_allclose(alone.values, first.values, rtol=1e-9)  # whatever else is scored
    assert np.isfinite((alone - first).values).all()  # the same sources: comparable


def test_r2_of_a_target_that_does_not_vary_has_no_value_and_says_why() -> None:
    flat = torch.ones(N, 1, dtype=torch.float64)
    draws, = probe.r2(flat, 0.5 * flat, rows())
    assert draws.value is None and "no variance" in draws.note


def test_means_are_those_of_the_held_out_rows() -> None:
    _, y = planted()
    first, second = probe.means(torch.from_numpy(y), rows())
    np.testing.assert_allclose([float(first), float(second)], y[rows().held.numpy()].mean(0))
    of_sources = [y[(rows().cluster[rows().group] == c), 0].mean() for c in range(0, 20, 3)]
    standard_error = np.std(of_sources) / np.sqrt(6)
    assert np.std(first.values[1:]) == pytest.approx(standard_error, rel=0.3)


def test_effective_is_what_the_bootstrap_says() -> None:
    def effective(some: Rows) -> float:
        return probe.means(torch.ones(N, 1), some)[0].effective

    sums, held = regression.Sums(CONTEXTS), rows().held
    sums.add_error(rows().group[held], torch.ones(int(held.sum())), torch.ones(int(held.sum())))
    totals = regression.resample(sums, rows().cluster, 20, 0)
    assert effective(rows()) == pytest.approx(float(totals["effective"][0]))
    assert effective(rows()) == pytest.approx(7)  # seven held-out sources of equal size
    joined = np.where(np.arange(CONTEXTS) < 30, 0, rows().cluster)
    assert effective(Rows(rows().fit, rows().group, joined, 20, 0)) != pytest.approx(7)


def test_removed_is_the_share_of_what_was_left() -> None:
    def number(value: float) -> regression.Draws:
        return regression.Draws(np.array([value]), 5, 100, 5)

    removed = [probe.removed(number(without), number(added))
               for without, added in ((0.5, 0.75), (0.8, 0.8), (0.8, 0.7))]
    np.testing.assert_allclose([float(share) for share in removed], [0.5, 0, -0.5], atol=1e-12)


def test_fewer_rows_than_features_is_an_error() -> None:
    wide = torch.randn(N, int(rows().fit.sum()) + 1)
    with pytest.raises(DarkmatterError, match="tokens to fit"):
        probe.predict(wide, torch.ones(N, 1, dtype=torch.float64), rows())


def test_some_of_the_rows() -> None:
    thin = rows().only(slice(None, None, 2))
    assert len(thin.fit) == len(thin.group) == N // 2
    torch.testing.assert_close(thin.group, torch.arange(0, N, 2) // EACH)
    assert thin.seed == rows().seed and thin.bootstrap == rows().bootstrap
    masked = rows().only(torch.arange(N) % 2 == 0)
    torch.testing.assert_close(masked.fit, thin.fit)
