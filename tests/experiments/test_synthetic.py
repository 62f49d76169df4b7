"""The synthetic check: errors put together by hand come apart as numpy and theory say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from darkmatter.errors import DarkmatterError
from darkmatter.experiments import synthetic
from darkmatter.experiments.synthetic import Known, Setting
from darkmatter.regression import Draws
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
    acts = tiny.acts(tiny.features(24_000))
    return synthetic.prepare(PRESET, tiny.loaded("exact", sae), acts, 24_000)


def one(known: Known, setting: Setting, in_sample: bool = False) -> tuple[float, float]:
    split = synthetic.measure(known, [setting], PRESET, in_sample=in_sample)[setting]
    return float(split.fvu), float(split.nonlinear)


@pytest.mark.parametrize("in_sample", [False, True])
@pytest.mark.parametrize("setting", [
    Setting(), Setting(0.25, 1, 0.6), Setting(0.5, 0, 2), Setting(0, 3, 0.5)])
def test_a_setting_is_what_numpy_finds(setting: Setting, in_sample: bool) -> None:
    toy = known()
    on_x, on_sae = (toy.unit * noise.double() for noise in toy.noise("gaussian", PRESET.seed))
    noisy = toy.x.double() + setting.on_x * on_x
    error = noisy - toy.without(setting.removed, slice(0, len(noisy))) - setting.on_sae * on_sae
    z, target = noisy.numpy(), error.numpy()
    design = np.concatenate([z, np.ones((len(z), 1))], 1)
    fit = np.full(len(z), True) if in_sample else toy.fitted.numpy()
    rows = fit if in_sample else ~fit
    left = target - design @ np.linalg.lstsq(design[fit], target[fit], rcond=None)[0]
    spread = np.square(z[rows] - z[rows].mean(0)).sum()
    fvu, nonlinear = one(toy, setting, in_sample=in_sample)
    assert fvu == pytest.approx(float(np.square(target[rows]).sum() / spread), rel=1e-5)
    assert nonlinear == pytest.approx(float(np.square(left[rows]).sum() / spread), rel=1e-4)


def test_settings_measured_together_are_those_measured_alone() -> None:
    settings = [Setting(0, 1, 0), Setting(0.5, 1, 2), Setting(0, 0, 1), Setting(0.5, 0, 0),
                Setting(0.0, 1, 3)]
    toy = known()
    together = synthetic.measure(toy, [*settings, settings[0]], PRESET)
    assert list(together) == settings
    for setting, split in together.items():
        alone = one(toy, setting)
        assert [split.fvu.value, split.nonlinear.value] == pytest.approx(alone, rel=1e-5)
        assert float(split.linear) == pytest.approx(float(split.fvu) - float(split.nonlinear))
        assert split.fvu.n == int((~toy.fitted).sum())
        assert len(split.fvu.values) == PRESET.bootstrap + 1


def test_without_noise_an_exact_code_has_no_error() -> None:
    assert one(exact(), Setting()) == pytest.approx((0, 0), abs=1e-9)


def test_noise_on_the_reconstruction_is_wholly_nonlinear() -> None:
    toy, setting = exact(), Setting(0, 0, 1)
    split = synthetic.measure(toy, [setting], PRESET)[setting]
    size = toy.unit ** 2 * toy.x.shape[1] / float(split.spread)
    assert split.fvu.value == pytest.approx(size, rel=0.02)
    assert split.nonlinear.value == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("noise", ["gaussian", "errors"])
def test_noise_on_the_activation_splits_as_theory_says(noise: synthetic.Noise) -> None:
    toy, settings = exact(), [Setting(0, level, 0.5) for level in (0.3, 1.0, 3.0)]
    splits = synthetic.measure(toy, settings, PRESET, noise).values()
    fvu, nonlinear = synthetic.expected(toy, settings, noise)
    assert [split.fvu.value for split in splits] == pytest.approx(fvu, rel=0.03)
    assert [split.nonlinear.value for split in splits] == pytest.approx(nonlinear, rel=0.03)
    assert (nonlinear < fvu).all()


def test_white_noise_stays_where_the_activation_varies_more() -> None:
    """The docstring's s/(s + σ²), from the eigenvalues alone."""
    toy, level = exact(), 0.7
    variance = level ** 2 * toy.unit ** 2
    s = np.linalg.eigvalsh(np.cov(toy.x.double().numpy().T, bias=True))
    left = float((variance * s / (s + variance)).sum() / (s + variance).sum())
    _, nonlinear = synthetic.expected(toy, [Setting(0, level, 0)])
    assert nonlinear[0] == pytest.approx(left, rel=1e-4)


def test_the_quietest_latents_are_removed_first() -> None:
    toy = known()
    latents = toy.sae.sae.encode(toy.x)
    quiet = latents[toy.fitted].mean(0).argsort()[:8]
    latents[:, quiet] = 0
    without = toy.without(0.25, slice(0, len(toy.x)))
    assert torch.allclose(without, toy.sae.sae.decode(latents), atol=1e-5)


def test_the_noise_is_the_seeds_and_of_unit_size() -> None:
    toy = known()
    on_x, on_sae = toy.noise("gaussian", 1)
    again = toy.noise("gaussian", 1)
    assert torch.equal(on_x, again[0]) and torch.equal(on_sae, again[1])
    assert not torch.equal(on_x, toy.noise("gaussian", 2)[0]) and not torch.equal(on_x, on_sae)
    errors = toy.noise("errors", 1)[0]
    for noise in (on_x, on_sae, errors):
        assert float(noise.square().mean()) == pytest.approx(1, rel=0.02)
    centred = toy.error - toy.error.mean(0)
    lengths = (centred / centred.square().mean().sqrt()).norm(dim=1)
    assert torch.allclose(errors.norm(dim=1).sort().values, lengths.sort().values, atol=1e-4)
    assert abs(float(np.corrcoef(errors[:, 0], toy.x[:, 0])[0, 1])) < 0.1


def test_one_mean_for_all_dimensions() -> None:
    toy, setting = known(), Setting(0, 0, 1)
    split = synthetic.measure(toy, [setting], PRESET, in_sample=True)[setting]
    about_one = float((toy.x - toy.x.mean()).square().sum(1).mean())
    assert split.one_mean.value == pytest.approx(about_one, rel=1e-5)
    assert float(split.one_mean) > float(split.spread)


def test_the_tokens_are_shared_out_over_all_contexts() -> None:
    toy = known(600)
    assert len(toy.x) == 600
    assert (torch.bincount(toy.context) == 10).all()


def test_correlation_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    values, draws = rng.random(25), rng.random((25, 7))
    estimates = [Draws(row, 6, 100, 6) for row in draws]
    assert synthetic.correlation(values.tolist(), estimates).values == pytest.approx(
        [np.corrcoef(values, column)[0, 1] for column in draws.T])


@pytest.mark.parametrize("setting", [
    Setting(0, -1, 0), Setting(0, 0, -0.1), Setting(1, 0, 0), Setting(-0.1, 0, 0)])
def test_settings_that_are_none(setting: Setting) -> None:
    with pytest.raises(DarkmatterError, match="is no setting"):
        synthetic.measure(known(), [setting], PRESET)


def test_an_sae_that_is_no_sum_of_latents_is_refused() -> None:
    half = tiny.formula("half", lambda x: x / 2)
    with pytest.raises(DarkmatterError, match="give another SAE"):
        synthetic.prepare(PRESET, half, tiny.acts(), 600)


def test_too_few_tokens_to_regress_on() -> None:
    acts = tiny.acts(tiny.features(60), contexts=20, sources=20)
    with pytest.raises(DarkmatterError, match="takes at least 17 tokens to fit"):
        synthetic.prepare(PRESET, tiny.loaded("toy", tiny.topk()), acts, 10)
