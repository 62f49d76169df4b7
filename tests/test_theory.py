"""The norm test in theory: formulas against scipy's moments, known constants and plain simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from darkmatter import theory
from darkmatter.errors import DarkmatterError


@pytest.mark.parametrize(("law", "limit"), [("binary", 1), ("uniform", 15 / 16), ("half-normal", 8 / (3 * math.pi)),
                                            ("exponential", 3 / 4)])
def test_rare_weights_have_the_limits_of_the_text(law: str, limit: float) -> None:
    assert theory.sparse_r2(theory.LAWS[law], 1e-9) == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("law", ["uniform", "half-normal", "exponential"])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("signed", [False, True])
def test_the_formula_is_the_squared_correlation_of_w_and_its_square(law: str, p: float, signed: bool) -> None:
    rng = np.random.default_rng(0)
    w = np.where(rng.random(2_000_000) < p, theory.LAWS[law].rvs(2_000_000, random_state=rng), 0)
    w = w * rng.choice([-1, 1], len(w)) if signed else w
    assert theory.sparse_r2(theory.LAWS[law], p, signed) == pytest.approx(np.corrcoef(w, w**2)[0, 1] ** 2, abs=0.01)


def test_dense_exponential_weights_pass_by_hand() -> None:
    """Moments of an exponential: 1, 2, 6, 24. Sparsity is not what lets a sum pass."""
    assert theory.sparse_r2(theory.LAWS["exponential"], 1) == pytest.approx((6 - 2) ** 2 / ((2 - 1) * (24 - 4)))


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
    directions = theory.orthonormal(16, seed=3)
    torch.testing.assert_close(directions @ directions.T, torch.eye(16), atol=1e-5, rtol=0)
    v = theory.sparse_sum(theory.LAWS["exponential"], 0.2, directions, 20_000, seed=1)
    weights = v @ directions.T
    assert weights.shape == (20_000, 16) and v.dtype == torch.float32
    assert float((weights.abs() > 1e-4).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(weights.min()) > -1e-4
    active = weights[weights > 1e-4]
    assert float(active.mean()) == pytest.approx(1, abs=0.03) and float(active.var()) == pytest.approx(1, abs=0.06)
    signed = theory.sparse_sum(theory.LAWS["exponential"], 0.2, directions, 20_000, seed=1, signed=True) @ directions.T
    assert float((signed < -1e-4).float().mean()) == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(v, theory.sparse_sum(theory.LAWS["exponential"], 0.2, directions, 20_000, seed=1))


@pytest.mark.parametrize("law", theory.LAWS)
def test_simulated_sums_score_what_the_formula_says(law: str) -> None:
    found = theory.norm_test(theory.sparse_sum(theory.LAWS[law], 0.1, theory.orthonormal(32), 20_000))
    assert found.value == pytest.approx(theory.sparse_r2(theory.LAWS[law], 0.1), abs=0.03)
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low < found.value < found.high or law == "binary"
    assert found.n == pytest.approx(0.39 * 20_000, rel=0.05)


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
