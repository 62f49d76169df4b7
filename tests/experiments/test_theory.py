"""The norm test in theory: formulas against scipy's moments, known constants, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from darkmatter.errors import DarkmatterError
from darkmatter.experiments import theory
from darkmatter.regression import probe


@pytest.mark.parametrize(("law", "limit"), [
    ("binary", 1), ("uniform", 15 / 16), ("half-normal", 8 / (3 * math.pi)), ("exponential", 0.75)])
def test_rare_weights_have_the_limits_of_the_text(law: str, limit: float) -> None:
    assert theory.sparse_r2(theory.LAWS[law], 1e-9) == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("law", ["uniform", "half-normal", "exponential"])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("signed", [False, True])
def test_the_formula_is_the_squared_correlation_of_w_and_its_square(law: str, p: float,
                                                                    signed: bool) -> None:
    rng = np.random.default_rng(0)
    w = np.where(rng.random(2_000_000) < p, theory.LAWS[law].rvs(2_000_000, random_state=rng), 0)
    w = w * rng.choice([-1, 1], len(w)) if signed else w
    simulated = np.corrcoef(w, w**2)[0, 1] ** 2
    assert theory.sparse_r2(theory.LAWS[law], p, signed) == pytest.approx(simulated, abs=0.01)


def test_dense_exponential_weights_pass_by_hand() -> None:
    """Moments of an exponential: 1, 2, 6, 24. Sparsity is not what lets a sum pass."""
    by_hand = (6 - 2) ** 2 / ((2 - 1) * (24 - 4))
    assert theory.sparse_r2(theory.LAWS["exponential"], 1) == pytest.approx(by_hand)


def test_a_binary_weight_is_its_own_square_and_a_constant_one_has_no_score() -> None:
    assert theory.sparse_r2(theory.LAWS["binary"], 0.3) == pytest.approx(1)
    assert math.isnan(theory.sparse_r2(theory.LAWS["binary"], 1))


@pytest.mark.parametrize("p", [0, -0.1, 1.5, math.nan])
def test_a_probability_is_one(p: float) -> None:
    with pytest.raises(DarkmatterError, match="probability"):
        theory.sparse_r2(theory.LAWS["uniform"], p)


def test_a_gaussian_scores_what_the_formula_says() -> None:
    g = torch.Generator().manual_seed(0)
    mix, mean = torch.randn(12, 12, generator=g), torch.linspace(0, 4, 12)
    v = torch.randn(40_000, 12, generator=g) @ mix + mean
    found = theory.norm_test(v)
    expected = theory.gaussian_r2(mean, mix.T @ mix)
    assert 0.1 < expected < 0.9
    assert found.value == pytest.approx(expected, abs=0.02)
    assert theory.gaussian_r2(0 * mean, mix.T @ mix) == 0
    assert theory.norm_test(v - mean).value == pytest.approx(0, abs=0.01)


def test_a_sparse_sum_is_what_it_says() -> None:
    law, directions = theory.LAWS["exponential"], theory.orthonormal(16, seed=3)
    torch.testing.assert_close(directions @ directions.T, torch.eye(16), atol=1e-5, rtol=0)
    v = theory.sparse_sum(law, 0.2, directions, 20_000, seed=1)
    weights = v @ directions.T
    assert weights.shape == (20_000, 16) and v.dtype == torch.float32
    assert float((weights.abs() > 1e-4).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(weights.min()) > -1e-4
    active = weights[weights > 1e-4]
    assert float(active.mean()) == pytest.approx(1, abs=0.03)
    assert float(active.var()) == pytest.approx(1, abs=0.06)
    signed = theory.sparse_sum(law, 0.2, directions, 20_000, seed=1, signed=True) @ directions.T
    assert float((signed < -1e-4).float().mean()) == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(v, theory.sparse_sum(law, 0.2, directions, 20_000, seed=1))


@pytest.mark.parametrize("law", theory.LAWS)
def test_simulated_sums_score_what_the_formula_says(law: str) -> None:
    chance, directions = theory.LAWS[law], theory.orthonormal(32)
    score = theory.norm_test(theory.sparse_sum(chance, 0.1, directions, 20_000))
    assert score.value == pytest.approx(theory.sparse_r2(chance, 0.1), abs=0.03)
    assert score.value is not None and score.low is not None and score.high is not None
    assert score.low < score.value < score.high or law == "binary"
    assert score.n == pytest.approx(0.39 * 20_000, rel=0.05)


def test_the_test_from_x_sees_only_the_length() -> None:
    """Noise whose length x knows passes from x and fails from itself."""
    g = torch.Generator().manual_seed(0)
    x = theory.sparse_sum(theory.LAWS["exponential"], 0.1, torch.eye(32), 20_000)
    v = torch.randn(20_000, 32, generator=g)
    v = v / v.norm(dim=1, keepdim=True) * (1 + x.sum(1, keepdim=True)).sqrt()
    from_x, from_itself = theory.norm_test(v, x).value, theory.norm_test(v).value
    assert from_x == pytest.approx(1, abs=1e-4)
    assert from_itself == pytest.approx(0, abs=0.02)


def test_a_vector_of_constant_length_has_no_score() -> None:
    v = torch.nn.functional.one_hot(torch.arange(2000) % 8).float()
    assert theory.norm_test(v).value is None


def test_along_independent_latents_the_probe_is_the_formula() -> None:
    """Orthonormal directions, weights of other sizes: a*ᵀy = Cov(w, w²) / Var(w), 3 scales here."""
    rng, n, sizes = np.random.default_rng(0), 60_000, np.linspace(1, 4, 16)
    active = rng.random((n, 16)) < 0.1
    weights = sparse.csr_array(np.where(active, rng.exponential(sizes, (n, 16)), 0))
    group = torch.arange(n) // 1000
    rows = probe.Rows(torch.from_numpy(np.arange(60) % 3 != 0)[group], group, np.arange(60), 100, 0)
    found = theory.along_latents(weights, theory.orthonormal(16), rows, most=12)
    assert found is not None and len(found.probe) == 12
    np.testing.assert_allclose(found.probe, found.expected, rtol=0.15)
    one, two, three = (0.1 * math.factorial(k) for k in (1, 2, 3))
    factor = (three - one * two) / (two - one**2)  # of the scale, which is the mean activity
    np.testing.assert_allclose(found.probe, factor * found.activity, rtol=0.15)
    assert found.correlation.value is not None and found.correlation.value > 0.95
    assert found.correlation.sources == 20 and found.correlation.n == 20_000
    formula = theory.sparse_r2(theory.LAWS["exponential"], 0.1)  # the same for every scale
    assert found.r2.value == pytest.approx(formula, abs=0.05)
    by_hand = weights[rows.held.numpy()].toarray()
    means = by_hand.sum(0) / (by_hand > 0).sum(0)
    assert np.isin(found.activity.round(9), means.round(9)).all()


def test_latents_that_are_hardly_active_say_nothing() -> None:
    weights = np.zeros((3000, 8))
    weights[:, :2] = 1 + np.arange(3000)[:, None] % 3
    group = torch.arange(3000) // 100
    rows = probe.Rows(torch.from_numpy(np.arange(30) % 3 != 0)[group], group, np.arange(30), 20, 0)
    few = theory.along_latents(sparse.csr_array(weights), theory.orthonormal(8), rows)
    assert few is None
