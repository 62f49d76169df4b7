"""Greedy codes against plain dense ones, least squares, and dictionaries with a known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from darkmatter.errors import DarkmatterError
from darkmatter.experiments import pursuit
from tests import tiny

D, WIDTH = 24, 96


def atoms(width: int = WIDTH, d: int = D, seed: int = 0) -> Tensor:
    """Unit vectors, some of them close to others as in an overcomplete dictionary."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(width, d, generator=g)
    rows[1::2] = rows[::2] + 0.4 * rows[1::2]
    return nn.functional.normalize(rows, dim=1)


def signals(n: int = 200, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, WIDTH, generator=g) * (torch.rand(n, WIDTH, generator=g) < 0.08)
    return 5 * weights @ atoms() + 0.3 * torch.randn(n, D, generator=g)


def dense_gradient(x: Tensor, dictionary: Tensor, steps: int, least: float = 0) -> np.ndarray:
    """The paper's rule with one dense weight an atom, one token at a time, in float64.

    ``least``: what a smaller weight is set to; −inf leaves the clip out.
    """
    rows, codes = dictionary.double().numpy(), []
    for signal in x.double().numpy():
        weight = np.zeros(len(rows))
        for _ in range(steps):
            residual = signal - weight @ rows
            product = rows @ residual
            chosen = weight != 0
            chosen[product.argmax()] = True
            gradient = product * chosen
            move = gradient @ rows
            weight = np.maximum(weight + (move @ residual) / (move @ move) * gradient, least)
        codes.append(weight)
    return np.stack(codes)


def dense_orthogonal(x: Tensor, dictionary: Tensor, steps: int) -> np.ndarray:
    """Orthogonal matching pursuit with numpy's lstsq, one token at a time, in float64."""
    rows, codes = dictionary.double().numpy(), []
    for signal in x.double().numpy():
        weight, support = np.zeros(len(rows)), []
        for _ in range(steps):
            support.append(int(np.abs(rows @ (signal - weight @ rows)).argmax()))
            weight[support] = np.linalg.lstsq(rows[support].T, signal, rcond=None)[0]
        codes.append(weight)
    return np.stack(codes)


def spread(code: pursuit.Code, width: int = WIDTH) -> np.ndarray:
    """The code with one dense weight an atom."""
    return torch.zeros(len(code.index), width).scatter_add(1, code.index, code.weight).numpy()


DENSE = {"gradient": dense_gradient, "orthogonal": dense_orthogonal}


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
@pytest.mark.parametrize("rule", DENSE)
def test_the_atoms_and_weights_are_those_of_the_dense_rule(rule: Any, steps: int) -> None:
    code = pursuit.pursue(signals(), atoms(), steps, rule)
    expected = DENSE[rule](signals(), atoms(), steps)
    same = ((spread(code) != 0) == (expected != 0)).all(1)
    assert same.mean() >= 0.98  # float32 may decide a tie otherwise
    np.testing.assert_allclose(spread(code)[same], expected[same], atol=2e-3)


def test_an_atom_can_be_chosen_again() -> None:
    """Then there are fewer atoms than steps, and both ways agree (the case is not an empty one)."""
    expected = dense_gradient(signals(), atoms(), 16)
    assert ((expected != 0).sum(1) < 16).any()
    code = pursuit.pursue(signals(), atoms(), 16)
    assert (code.on.sum(1).numpy() == (expected != 0).sum(1)).mean() >= 0.98
    for index, on in zip(code.index, code.on, strict=True):
        assert len(set(index[on].tolist())) == int(on.sum()), "an atom holds one place"


@pytest.mark.parametrize(("dictionary", "signal"), [
    ([[0, 3, 3], [-2, 3, 2], [1, -2, 1], [2, -1, 3]], [4, 3, 4]),
    ([[0, -1, -2], [0, -2, 0], [2, 1, 2], [2, -1, -1], [3, 0, -1]], [3, 3, 0]),
], ids=["in the last step", "in the last step but one"])
def test_a_weight_that_a_step_takes_below_zero_is_clipped(
    dictionary: list[list[int]], signal: list[int]
) -> None:
    """An atom is chosen, later ones explain what it did: its weight would fall well below zero."""
    rows = nn.functional.normalize(torch.tensor(dictionary).float(), dim=1)
    x = torch.tensor([signal]).float()
    code = spread(pursuit.pursue(x, rows, len(rows)), len(rows))
    np.testing.assert_allclose(code, dense_gradient(x, rows, len(rows)), atol=1e-4)
    unclipped = dense_gradient(x, rows, len(rows), least=-np.inf)
    assert unclipped.min() < -0.5, "the case is an empty one"
    assert np.abs(code - unclipped).max() > 0.5


def test_a_step_clips() -> None:
    """By hand: one step takes orthonormal atoms to their best weights, x·d, here 2 and −3."""
    gram, target, weight = torch.eye(2)[None], torch.tensor([[2.0, -3]]), torch.tensor([[1.0, 1]])
    chosen = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(pursuit.step(gram, target, weight, chosen), torch.tensor([[2.0, 0]]))


def test_a_signal_that_points_away_from_every_atom_gets_none() -> None:
    rows = nn.functional.normalize(torch.tensor([[3.0, 1, 0], [2, -1, 1]]), dim=1)
    code = pursuit.pursue(torch.tensor([[-2.0, 0, -1]]), rows, 2)
    assert not code.on.any()


@pytest.mark.parametrize("rule", DENSE)
def test_orthonormal_atoms_are_recovered_exactly(rule: Any) -> None:
    """With orthonormal atoms the largest inner products are the weights themselves."""
    dictionary = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3))).Q
    g = torch.Generator().manual_seed(4)
    weight = (1 + torch.rand(50, D, generator=g)) * (torch.rand(50, D, generator=g) < 0.2)
    code = pursuit.pursue(weight @ dictionary, dictionary, int((weight > 0).sum(1).max()), rule)
    np.testing.assert_allclose(spread(code, D), weight, atol=1e-4)


def test_gradient_pursuit_has_no_negative_weight_and_orthogonal_may() -> None:
    assert bool((pursuit.pursue(signals(), atoms(), 8).weight >= 0).all())
    assert bool((pursuit.pursue(signals(), atoms(), 8, "orthogonal").weight < 0).any())


@pytest.mark.parametrize("rule", DENSE)
def test_more_steps_never_fit_worse(rule: Any) -> None:
    codes = [pursuit.pursue(signals(), atoms(), k, rule) for k in (2, 5, 9)]
    left = [(signals() - code.sum(atoms())).square().sum(1) for code in codes]
    assert bool((left[1] <= left[0] + 1e-4).all())
    assert bool((left[2] <= left[1] + 1e-4).all())


def test_each_token_stops_at_its_own_number_of_steps() -> None:
    steps = torch.arange(200) % 6
    code, x = pursuit.pursue(signals(), atoms(), steps), signals()
    for k in range(6):
        alone = pursuit.pursue(x[steps == k], atoms(), k)
        np.testing.assert_allclose(spread(code)[steps == k], spread(alone), atol=1e-5)
    assert not code.on[steps == 0].any()


@pytest.mark.parametrize("signed", [True, False])
def test_the_strongest_atom_is_the_one_that_float64_finds(signed: bool) -> None:
    """Among pairs of atoms so close that a product in bfloat16 would often take the wrong one."""
    rows = atoms(400, seed=5)
    rows[1::2] = nn.functional.normalize(rows[::2] + 1e-3 * rows[1::2], dim=1)
    x = signals(500, seed=6)
    atom, product = pursuit.strongest(x, rows, signed)
    exact = x.double() @ rows.double().T
    wanted = exact.gather(1, atom[:, None])[:, 0]
    torch.testing.assert_close(product.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (atom == (exact if signed else exact.abs()).argmax(1)).float().mean() > 0.99


def test_zero_signals_get_no_atoms() -> None:
    for rule in ("gradient", "orthogonal"):
        code = pursuit.pursue(torch.cat([torch.zeros(3, D), signals(2)]), atoms(), 4, rule)
        assert code.on.sum(1).tolist() == [0, 0, 0, 4, 4]
        assert bool(code.weight.isfinite().all())


def test_no_tokens_and_no_steps() -> None:
    assert len(pursuit.pursue(signals()[:0], atoms(), 3).index) == 0
    assert pursuit.pursue(signals()[:4], atoms(), 0).sum(atoms()).abs().sum() == 0


def test_too_many_steps_get_one_sentence() -> None:
    sentence = "A code of 97 atoms takes at least as many in the dictionary; it has 96"
    with pytest.raises(DarkmatterError, match=sentence):
        pursuit.pursue(signals(), atoms(), 97)


def test_refit_is_least_squares_on_the_same_atoms() -> None:
    sae, x = tiny.loaded("toy", tiny.topk(32, 4)), tiny.features(60)
    code, dictionary, b = pursuit.encoder(sae, x), sae.sae.W_dec.data, sae.sae.b_dec.data
    torch.testing.assert_close(code.sum(dictionary) + b, sae(x)[0])
    better = pursuit.refit(x - b, dictionary, code)
    rows = dictionary.double().numpy()
    for i in range(len(x)):
        on = code.index[i][code.on[i]].numpy()
        weight = np.linalg.lstsq(rows[on].T, (x[i] - b).double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(better.weight[i][code.on[i]], weight, atol=1e-3)
    assert torch.equal(better.on, code.on)


def test_atoms_in_common_are_those_on_in_both() -> None:
    a = pursuit.Code(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 1, 1], [1, 0, 1]]))
    b = pursuit.Code(torch.tensor([[3, 9, 1, 0], [5, 6, 4, 4]]),
                     torch.tensor([[2.0, 1, -1, 0], [1, 1, 0, 0]]))
    assert pursuit.among(a, b).tolist() == [[True, False, True], [False, False, True]]
    assert pursuit.among(b, a).tolist() == [[True, False, True, False], [False, True, False, False]]


def test_what_is_unexplained_is_that_of_lstsq_fitted_to_each_error() -> None:
    acts, p = tiny.acts(), tiny.preset()
    rows = np.random.default_rng(0).permutation(len(acts.x))[:1500]
    fit = acts.context < 40
    x = acts.x[rows].double().numpy()
    errors = {name: torch.from_numpy(error).float()
              for name, error in (("one", np.tanh(x)), ("two", 0.3 * x + np.sin(x)))}
    left = pursuit.unexplained(p, acts, rows, fit, errors)
    inside, wide = fit[rows], np.column_stack([x, np.ones(len(x))])
    variance = np.square(x[~inside] - x[~inside].mean(0)).sum()
    for name, error in errors.items():
        e = error.double().numpy()
        rest = e - wide @ np.linalg.lstsq(wide[inside], e[inside], rcond=None)[0]
        fvu, nonlinear = (np.square(rows[~inside]).sum() / variance for rows in (e, rest))
        assert left[name].fvu.value == pytest.approx(fvu, rel=1e-4)
        assert left[name].fvu_nonlinear.value == pytest.approx(nonlinear, rel=1e-3)
        assert left[name].linear.value == pytest.approx(fvu - nonlinear, abs=1e-4)
        assert len(left[name].fvu.values) == p.bootstrap + 1
        assert left[name].fvu.n == int((~inside).sum())


def test_too_few_rows_to_fit_get_one_sentence() -> None:
    acts, rows = tiny.acts(), np.arange(10)
    fit, errors = np.ones(len(acts.x), bool), {"one": acts.x[rows].float()}
    with pytest.raises(DarkmatterError, match="takes at least 17 tokens to fit; there are 10"):
        pursuit.unexplained(tiny.preset(), acts, rows, fit, errors)


def test_the_mean_over_tokens_and_its_draws() -> None:
    acts, rows = tiny.acts(), np.arange(0, 2400, 7)
    odd = torch.from_numpy(acts.text.source[acts.context[rows]] % 2)
    values = odd[:, None] * torch.tensor([1.0, 3.0])
    one, three = pursuit.means(tiny.preset(), acts, rows, values)
    assert [one.value, three.value] == pytest.approx(values.double().mean(0).tolist())
    assert len(one.values) == 101 and one.n == len(rows)
    assert one.values[1:].std() > 0.02
    np.testing.assert_allclose(three.values, 3 * one.values)
    assert 25 < one.effective <= 30
