"""The synthetic check: errors put together by hand come apart as numpy and theory say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from darkmatter import synthetic
from darkmatter.errors import DarkmatterError
from darkmatter.synthetic import Cell, Known
from tests import tiny

PRESET = tiny.preset()


@pytest.fixture(autouse=True)
def _quiet(own_cache: Path) -> None:
    torch.set_num_threads(1)


def known(tokens: int = 2400) -> Known:
    return synthetic.prepare(PRESET, tiny.loaded("toy", tiny.topk()), tiny.acts(), tokens)


def exact() -> Known:
    """An SAE whose latents are the coordinates: encoding Sae(x) again gives the same latents."""
    sae = tiny.topk(width=tiny.D)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(tiny.D))
        sae.W_enc.copy_(torch.eye(tiny.D))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return synthetic.prepare(PRESET, tiny.loaded("exact", sae), tiny.acts(tiny.features(24_000)), 24_000)


def one(of: Known, cell: Cell, in_sample: bool = False) -> tuple[float, float]:
    found = synthetic.measure(of, [cell], PRESET, in_sample=in_sample)
    return float(found.fvu[0, 0]), float(found.nonlinear[0, 0])


@pytest.mark.parametrize("in_sample", [False, True])
@pytest.mark.parametrize("cell", [Cell(), Cell(0.25, 1, 0.6), Cell(0.5, 0, 2), Cell(0, 3, 0.5)])
def test_a_cell_is_what_numpy_finds(cell: Cell, in_sample: bool) -> None:
    of = known()
    first, second = (of.unit * each.double() for each in of.noise("gaussian", PRESET.seed))
    z = of.x.double() + cell.on_x * first
    target = z - of.without(cell.removed, slice(0, len(z))) - cell.on_sae * second
    z, target = z.numpy(), target.numpy()
    design = np.concatenate([z, np.ones((len(z), 1))], 1)
    fit = np.full(len(z), True) if in_sample else of.fitted.numpy()
    rows = fit if in_sample else ~fit
    left = target - design @ np.linalg.lstsq(design[fit], target[fit], rcond=None)[0]
    spread = np.square(z[rows] - z[rows].mean(0)).sum()
    fvu, nonlinear = one(of, cell, in_sample=in_sample)
    assert fvu == pytest.approx(float(np.square(target[rows]).sum() / spread), rel=1e-5)
    assert nonlinear == pytest.approx(float(np.square(left[rows]).sum() / spread), rel=1e-4)


def test_cells_measured_together_are_those_measured_alone() -> None:
    of, cells = known(), [Cell(0, 1, 0), Cell(0.5, 1, 2), Cell(0, 0, 1), Cell(0.5, 0, 0), Cell(0.0, 1, 3)]
    together = synthetic.measure(of, cells, PRESET)
    for i, cell in enumerate(cells):
        assert [together.fvu[i, 0], together.nonlinear[i, 0]] == pytest.approx(one(of, cell), rel=1e-5)
        assert together.part([cell]).fvu.tolist() == [together.fvu[i].tolist()]
    assert together.column("on_sae").tolist() == [0, 2, 1, 0, 3]


def test_without_noise_an_exact_code_has_no_error() -> None:
    assert one(exact(), Cell()) == pytest.approx((0, 0), abs=1e-9)


def test_noise_on_the_reconstruction_is_wholly_nonlinear() -> None:
    of = exact()
    found = synthetic.measure(of, [Cell(0, 0, 1)], PRESET)
    size = of.unit ** 2 * of.x.shape[1] / found.spread[0, 0]
    assert found.fvu[0, 0] == pytest.approx(size, rel=0.02)
    assert found.nonlinear[0, 0] == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("noise", ["gaussian", "errors"])
def test_noise_on_the_activation_splits_as_theory_says(noise: synthetic.Noise) -> None:
    of, cells = exact(), [Cell(0, level, 0.5) for level in (0.3, 1.0, 3.0)]
    found, theory = synthetic.measure(of, cells, PRESET, noise), synthetic.expected(of, cells, noise)
    assert found.fvu[:, 0] == pytest.approx(theory[0], rel=0.03)
    assert found.nonlinear[:, 0] == pytest.approx(theory[1], rel=0.03)
    assert (theory[1] < theory[0]).all()


def test_white_noise_stays_where_the_activation_varies_more() -> None:
    """The docstring's s/(s + σ²), from the eigenvalues alone."""
    of, level = exact(), 0.7
    variance = level ** 2 * of.unit ** 2
    s = np.linalg.eigvalsh(np.cov(of.x.double().numpy().T, bias=True))
    left = float((variance * s / (s + variance)).sum() / (s + variance).sum())
    assert synthetic.expected(of, [Cell(0, level, 0)])[1][0] == pytest.approx(left, rel=1e-4)


def test_the_quietest_latents_are_removed_first() -> None:
    of = known()
    latents = of.each.sae.encode(of.x)
    quiet = latents[of.fitted].mean(0).argsort()[:8]
    latents[:, quiet] = 0
    assert torch.allclose(of.without(0.25, slice(0, len(of.x))), of.each.sae.decode(latents), atol=1e-5)


def test_the_noise_is_the_seeds_and_of_unit_size() -> None:
    of = known()
    first, second = of.noise("gaussian", 1)
    again = of.noise("gaussian", 1)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, of.noise("gaussian", 2)[0]) and not torch.equal(first, second)
    errors = of.noise("errors", 1)[0]
    for each in (first, second, errors):
        assert float(each.square().mean()) == pytest.approx(1, rel=0.02)
    centred = of.error - of.error.mean(0)
    assert torch.allclose(errors.norm(dim=1).sort().values,
                          (centred / centred.square().mean().sqrt()).norm(dim=1).sort().values, atol=1e-4)
    assert abs(float(np.corrcoef(errors[:, 0], of.x[:, 0])[0, 1])) < 0.1


def test_one_mean_for_all_dimensions() -> None:
    of = known()
    found = synthetic.measure(of, [Cell(0, 0, 1)], PRESET, in_sample=True)
    assert found.one_mean[0, 0] == pytest.approx(float((of.x - of.x.mean()).square().sum(1).mean()), rel=1e-5)
    assert found.one_mean[0, 0] > found.spread[0, 0]


def test_the_tokens_are_shared_out_over_all_contexts() -> None:
    of = known(600)
    assert len(of.x) == 600
    assert (torch.bincount(of.context) == 10).all()


def test_correlation_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    values, draws = rng.random(25), rng.random((25, 7))
    assert synthetic.correlation(values, draws) == pytest.approx(
        [np.corrcoef(values, column)[0, 1] for column in draws.T])


@pytest.mark.parametrize("cell", [Cell(0, -1, 0), Cell(0, 0, -0.1), Cell(1, 0, 0), Cell(-0.1, 0, 0)])
def test_settings_that_are_none(cell: Cell) -> None:
    with pytest.raises(DarkmatterError, match="is no setting"):
        synthetic.measure(known(), [cell], PRESET)


def test_an_sae_that_is_no_sum_of_latents_is_refused() -> None:
    each = tiny.formula("half", lambda x: x / 2)
    with pytest.raises(DarkmatterError, match="give another SAE"):
        synthetic.prepare(PRESET, each, tiny.acts(), 600)


def test_too_few_tokens_to_regress_on() -> None:
    acts = tiny.acts(tiny.features(60), contexts=20, sources=20)
    with pytest.raises(DarkmatterError, match="takes at least 17 tokens to fit"):
        synthetic.prepare(PRESET, tiny.loaded("toy", tiny.topk()), acts, 10)
