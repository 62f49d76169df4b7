"""Known answers for the moments, maps, scores, splits and protocols of `darkmatter.regression`."""

import numpy as np
import pytest
import torch
from torch import Tensor

from darkmatter import regression as reg
from darkmatter.errors import DarkmatterError
from darkmatter.regression.moments import add_narrow

D = 24
METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def activations(n: int = 6000, d: int = D, seed: int = 0) -> Tensor:
    """Correlated float32 rows, their mean far from zero, one dimension massive, as in real ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) @ (torch.randn(d, d, generator=g) / d**0.5) + 3
    x[:, 2] = 40 * x[:, 2] + 500
    return x


def moments(x: Tensor, y: Tensor, products: str = "float64", batch: int = 1000) -> reg.Moments:
    result = reg.Moments(products)  # type: ignore[arg-type]
    for rows in torch.arange(len(x)).split(batch):
        result.update(x[rows], [("y", y[rows])])
    return result


def sums_of(x: Tensor, e: Tensor, r: Tensor, groups: int = 30) -> dict[str, Tensor]:
    ids = torch.arange(len(x)) * groups // len(x)
    of_x, of_error = reg.Sums(groups), reg.Sums(groups)
    of_x.add_x(ids, x)
    of_error.add_error(ids, e, r)
    return of_x | of_error


def decompose(x: Tensor, reconstruction: Tensor, products: str = "float32") -> dict[str, reg.Draws]:
    """Fit b* on the first 60% of the rows, score the rest."""
    error, fit = x - reconstruction, len(x) * 6 // 10
    b = reg.solve(moments(x[:fit], error[:fit], products))["y"]
    left = error[fit:] - b(x[fit:])
    totals = reg.resample(sums_of(x[fit:], error[fit:], left), np.arange(30), n=300)
    return {metric: reg.score(totals, metric) for metric in METRICS}


def lstsq(x: Tensor, y: Tensor, intercept: bool = True) -> tuple[np.ndarray, np.ndarray]:
    a, b = x.double().numpy(), y.double().numpy()
    design = np.c_[a, np.ones(len(a))] if intercept else a
    solution = np.linalg.lstsq(design, b, rcond=None)[0]
    return (solution[:-1], solution[-1]) if intercept else (solution, np.zeros(b.shape[1]))


def r2(y: np.ndarray, prediction: np.ndarray) -> float:
    return float((1 - ((y - prediction) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean())


# --- SAEs whose error is known ---


def test_identity_sae_has_no_error() -> None:
    x = activations()
    scores = decompose(x, x.clone())
    assert scores["fvu"].value == scores["fvu_nonlinear"].value == 0
    for metric in ("r2_vector", "r2_vector_weighted"):
        assert scores[metric].value is scores[metric].low is scores[metric].high is None
        assert "no variance" in scores[metric].note


def test_dead_sae_error_is_wholly_linear() -> None:
    x = activations()
    scores = decompose(x, x.mean(0).expand_as(x))
    # x̄ of the scored rows is not that of all.
    assert scores["fvu"].value == pytest.approx(1, abs=2e-3)
    assert scores["fvu_nonlinear"].value == pytest.approx(0, abs=1e-10)
    assert scores["r2_vector"].value == pytest.approx(1, abs=1e-8)


def test_shrinking_sae_error_is_wholly_linear_and_best_scale_undoes_it() -> None:
    x = activations()
    scores = decompose(x, 0.9 * x)
    assert scores["fvu_nonlinear"].value == pytest.approx(0, abs=1e-10)
    assert scores["r2_vector"].value == pytest.approx(1, abs=1e-8)
    x2, sae2, error2 = (float(reg.squared_norm(v).sum()) for v in (x, 0.9 * x, x - 0.9 * x))
    assert reg.best_scale(x2, sae2, error2) == pytest.approx(1 / 0.9, rel=1e-5)
    assert reg.best_scale(x2, 0.0, x2) == 1


def test_planted_linear_error_and_noise_are_recovered_within_their_intervals() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(40_000, D, generator=g) + 2
    w = torch.randn(D, D, generator=g) * 0.05
    signal, noise = (w**2).sum(0).double(), 0.3**2
    scores = decompose(x, x - x @ w - 0.3 * torch.randn(len(x), D, generator=g))
    planted = {
        "fvu_nonlinear": noise,  # Var(x) = 1 in each dimension
        "r2_vector": float((signal / (signal + noise)).mean()),
        "r2_vector_weighted": float(signal.sum() / (signal + noise).sum()),
    }
    for metric, truth in planted.items():
        score = scores[metric]
        assert score.low is not None and score.high is not None
        assert score.low <= truth <= score.high
        assert score.high - score.low < 0.02


def test_reconstruction_and_both_errors_add_up_to_x() -> None:
    x = activations()
    reconstruction = torch.relu(x - 1)
    error = x - reconstruction
    linear = reg.solve(moments(x, error))["y"](x)
    torch.testing.assert_close(reconstruction + linear + (error - linear), x)


def test_norm_regression_matches_lstsq_with_many_scalar_targets_at_once() -> None:
    x = activations()
    norms = torch.stack([reg.squared_norm(v) for v in (x, x * 0.3, torch.relu(x))], 1)
    maps = reg.solve(moments(x, norms, "float32"))
    weight, bias = lstsq(x, norms)
    expected = r2(norms.numpy(), x.double().numpy() @ weight + bias)
    prediction = maps["y"](x)
    assert r2(norms.numpy(), prediction.double().numpy()) == pytest.approx(expected, abs=1e-6)
    totals = reg.resample(sums_of(x, norms[:, 0], norms[:, 0] - prediction[:, 0]), np.arange(30))
    assert reg.score(totals, "r2_norm").value == pytest.approx(
        r2(norms[:, :1].numpy(), prediction[:, :1].double().numpy()), abs=1e-9
    )


# --- Agreement with numpy ---


def ill_conditioned(n: int = 6000, d: int = 48) -> tuple[Tensor, Tensor]:
    x = activations(n, d, seed=1)
    gram = x.double().T @ x.double()
    assert torch.linalg.cond(gram) > 1e7
    mix = torch.randn(d, 5, generator=torch.Generator().manual_seed(2))
    return x, torch.tanh(x @ mix / d) + 0.1 * x[:, :5]


@pytest.mark.parametrize("intercept", [True, False])
def test_float64_products_agree_with_lstsq(intercept: bool) -> None:
    x, y = ill_conditioned()
    solved = reg.solve(moments(x, y), intercept)["y"]
    weight, bias = lstsq(x, y, intercept)
    np.testing.assert_allclose(solved.weight.numpy(), weight, atol=1e-6 * np.abs(weight).max())
    np.testing.assert_allclose(solved.bias.numpy(), bias, atol=1e-6)
    assert solved.rank == x.shape[1] and not solved.note


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_products_agree_with_lstsq_in_r2(intercept: bool, dtype: torch.dtype) -> None:
    x, y = ill_conditioned()
    x = x.to(dtype)
    solved = reg.solve(moments(x, y, "float32"), intercept)["y"]
    weight, bias = lstsq(x, y, intercept)
    truth = y.double().numpy()
    expected = r2(truth, x.double().numpy() @ weight + bias)
    assert r2(truth, solved(x).double().numpy()) == pytest.approx(expected, abs=1e-4)


def test_tf32_and_autocast_do_not_reach_the_products() -> None:
    x, y = ill_conditioned()
    expected = reg.solve(moments(x, y, "float32"))["y"]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solved = reg.solve(moments(x, y, "float32"))["y"]
            assert solved(x).dtype == torch.float32
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.testing.assert_close(solved.weight, expected.weight, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_adding_float32_sums_in_strips_changes_no_bit(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    total = torch.randn(rows, D, generator=g, dtype=torch.float64)
    part = torch.randn(rows, D, generator=g)
    expected = total + part.double()
    add_narrow(total, part)
    assert torch.equal(total, expected)


def test_a_generator_of_targets_and_a_shared_gram_matrix() -> None:
    x, y = ill_conditioned()
    many = reg.Moments("float64")
    for a, b in zip(x.split(700), y.split(700), strict=True):
        many.update(a, ((f"sae{i}", b * 2**i) for i in range(3)))
    many.update(x[:0], [("sae0", y[:0])])
    maps = reg.solve(many)
    assert list(maps) == ["sae0", "sae1", "sae2"]
    torch.testing.assert_close(maps["sae2"].weight, 4 * maps["sae0"].weight)


# --- Degenerate input ---


def deficient(kind: str) -> Tensor:
    x = torch.randn(3000, D, generator=torch.Generator().manual_seed(5)) + 4
    if kind == "repeated":
        x[:, 5] = x[:, 4]
    elif kind == "constant":
        x[:, 5] = 0.3
    elif kind == "low rank":
        x = x[:, :6] @ torch.randn(6, D, generator=torch.Generator().manual_seed(6))
    return x[:15] if kind == "few rows" else x


@pytest.mark.parametrize("products", ["float32", "float64"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(
    ("kind", "rank"), [("repeated", D - 1), ("constant", D - 1), ("low rank", 6), ("few rows", 14)]
)
def test_rank_deficiency_gives_the_minimum_norm_solution(
    kind: str, rank: int, intercept: bool, products: str
) -> None:
    x = deficient(kind)
    y = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(7))
    solved = reg.solve(moments(x, y, products), intercept)["y"]
    assert solved.rank == rank and "minimum-norm" in solved.note and str(rank) in solved.note
    a, b = x.double().numpy(), y.double().numpy()
    if intercept:
        a, b = a - a.mean(0), b - b.mean(0)
    expected = np.linalg.lstsq(a, b, rcond=1e-5)[0]
    size = max(1, np.abs(expected).max())
    np.testing.assert_allclose(solved.weight.numpy(), expected, atol=1e-4 * size)


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_rows_are_fitted_without_nan(n: int) -> None:
    x = activations(n)
    for intercept in (True, False):
        solved = reg.solve(moments(x, x), intercept)["y"]
        torch.testing.assert_close(solved(x.double()), x.double(), rtol=1e-6, atol=1e-4)


def test_dimensions_without_variance_are_left_out_and_counted() -> None:
    x = activations()
    error = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    error[:, [3, 7]] = 0.25
    residual = error * 0.5
    totals = reg.resample(sums_of(x, error, residual), np.arange(30))
    scores = {metric: reg.score(totals, metric) for metric in METRICS}
    alive = np.delete(error.double().numpy(), [3, 7], 1)
    expected = 1 - 0.25 * (alive**2).sum(0) / ((alive - alive.mean(0)) ** 2).sum(0)
    assert scores["r2_vector"].value == pytest.approx(expected.mean(), rel=1e-6)
    assert scores["r2_vector_weighted"].value == pytest.approx(0.75, abs=1e-3)
    assert scores["r2_vector"].note == scores["r2_vector_weighted"].note
    assert scores["r2_vector"].note.startswith(f"2 of {D} dimensions without variance")


def test_scores_match_their_definitions() -> None:
    x, error = activations(), activations(seed=8) / 50
    residual = error - error.mean(0) * 0.3
    totals = reg.resample(sums_of(x, error, residual), np.arange(30))
    a, e, r = (v.double().numpy() for v in (x, error, residual))
    spread, sst = ((a - a.mean(0)) ** 2).sum(), ((e - e.mean(0)) ** 2).sum(0)
    expected = {
        "fvu": (e**2).sum() / spread,
        "fvu_nonlinear": (r**2).sum() / spread,
        "r2_vector": (1 - (r**2).sum(0) / sst).mean(),
        "r2_vector_weighted": 1 - (r**2).sum() / sst.sum(),
    }
    for metric, value in expected.items():
        assert reg.score(totals, metric).value == pytest.approx(value, rel=1e-6)
    assert reg.score(totals, "fvu").n == len(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    x, y = activations(50), activations(50)
    broken = y.clone()
    broken[7, 3] = bad
    with pytest.raises(DarkmatterError, match=r"sae\.a holds NaN or infinite"):
        reg.Moments().update(x, [("sae.a", broken)])
    with pytest.raises(DarkmatterError, match=r"^x holds"):
        reg.Moments().update(broken)
    with pytest.raises(DarkmatterError, match="scored rows"):
        reg.Sums(1).add_error(torch.zeros(50, dtype=torch.long), x, broken)


def test_mistakes_are_explained() -> None:
    x = activations(50)
    summed = moments(x, x)
    with pytest.raises(DarkmatterError, match="49 rows and x 50"):
        summed.update(x, [("y", x[1:])])
    with pytest.raises(DarkmatterError, match="saw 50 of 100 rows"):
        reg.solve(summed)
    with pytest.raises(DarkmatterError, match="no rows to fit"):
        reg.solve(reg.Moments())
    with pytest.raises(DarkmatterError, match="no held-out rows"):
        reg.resample(reg.Sums(4), np.arange(4))
    shared = reg.Sums(1)
    shared.add_x(torch.zeros(50, dtype=torch.long), x)
    with pytest.raises(DarkmatterError, match="Sums of their own"):
        shared.add_error(torch.zeros(50, dtype=torch.long), x, x)


def test_too_few_rows_says_how_much_text_it_takes() -> None:
    reg.require_rows(577, 576)
    with pytest.raises(DarkmatterError, match=r"576 dimensions .* 577 tokens .* there are 300"):
        reg.require_rows(300, 576)
    with pytest.raises(DarkmatterError, match="about 10 contexts of 100 kept tokens"):
        reg.require_rows(300, 576, tokens_per_context=100)


# --- Splits and protocols ---


def test_split_by_source_keeps_documents_whole_and_comes_near_the_share() -> None:
    lengths = np.random.default_rng(0).integers(1, 12, 60)
    sources = np.repeat([f"doc{i}" for i in range(60)], lengths)
    ids = reg.clusters(sources)
    fit = reg.split(ids, seed=1)
    assert len(np.unique(ids)) == 60
    assert not set(sources[fit]) & set(sources[~fit])
    assert fit.mean() == pytest.approx(reg.FIT_SHARE, abs=0.01)
    np.testing.assert_array_equal(fit, reg.split(ids, seed=1))
    assert (fit != reg.split(ids, seed=2)).any()


def test_split_of_few_sources_takes_contiguous_blocks() -> None:
    ids = reg.clusters(np.repeat(np.arange(3), 100))
    assert len(np.unique(ids)) == 40
    assert (np.diff(ids) >= 0).all() and np.bincount(ids).max() == 8
    assert reg.split(ids).mean() == pytest.approx(reg.FIT_SHARE, abs=0.02)
    np.testing.assert_array_equal(reg.clusters(["a"] * 5), np.arange(5))


def test_one_context_cannot_be_split() -> None:
    with pytest.raises(DarkmatterError, match="1 contexts leave nothing"):
        reg.split(reg.clusters(["a"]))


def test_token_split_depends_on_context_and_seed_alone() -> None:
    fit = np.stack([reg.token_split(c, 823) for c in range(300)])
    assert fit.mean() == pytest.approx(reg.FIT_SHARE, abs=0.005)
    np.testing.assert_array_equal(fit[17], reg.token_split(17, 823))
    assert (fit[17] != fit[18]).any() and (fit[17] != reg.token_split(17, 823, seed=1)).any()


def test_protocols_differ_as_the_book_says() -> None:
    assert list(reg.PROTOCOLS) == ["strict", "paper", "authors-code"]
    strict, paper, authors = reg.PROTOCOLS.values()
    assert (strict.split, strict.intercept) == ("source", True)
    assert (strict.fvu_rows, strict.norm_test_rows) == ("eval", "eval")
    assert (paper.split, paper.intercept, paper.fvu_rows) == ("token", True, "eval")
    assert (authors.split, authors.intercept, authors.fvu_rows) == ("token", False, "all")
    assert authors.norm_test_rows == "all"
