"""Moments through the sparse codes against numpy in float64, against the dense products, and when they are chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from darkmatter import products, survey
from darkmatter.products import CodedError, cheaper
from darkmatter.regression import Moments, solve
from tests import tiny
from tests.tiny import acts, loaded, surveyed, topk

N, D, WIDTH = 5000, 24, 40


@pytest.fixture(autouse=True)
def _quiet(own_cache: Path) -> None:
    torch.set_num_threads(1)


def codes() -> sparse.csr_array:
    """Float32 codes [N, WIDTH], a tenth of them active; latent 0 always is, and some rows hold nothing else."""
    rng = np.random.default_rng(0)
    dense = rng.exponential(size=(N, WIDTH)) * (rng.random((N, WIDTH)) < 0.1)
    dense[::7] = 0
    dense[:, 0] = 5 + rng.exponential(size=N)
    return sparse.csr_array(dense.astype(np.float32))


def streamed(x: torch.Tensor, z: sparse.csr_array, decoder: torch.Tensor, bias: torch.Tensor) -> Moments:
    moments, coded = Moments(), CodedError(decoder, bias)
    for begin in range(0, N, 700):
        part = x[begin:begin + 700]
        moments.update(part)
        coded.begin(begin // 700 * 8)  # a group ends every second time
        coded.update(part - moments.columns[""].shift.float(), z[begin:begin + 700])
    moments.columns["e"] = coded.columns(moments.columns[""])
    return moments


def test_moments_through_the_codes_are_numpys() -> None:
    x, z, decoder, bias = tiny.features(N, D), codes(), torch.randn(WIDTH, D), torch.randn(D)
    error = x.double().numpy() - (z.astype(np.float64) @ decoder.double().numpy() + bias.double().numpy())
    found = streamed(x, z, decoder, bias).centred("e")
    u = x.double().numpy() - x.double().mean(0).numpy()
    expected = u.T @ (error - error.mean(0))
    np.testing.assert_allclose(found.cross, expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(found.shift + found.total / N, error.mean(0), atol=1e-6)


def test_the_map_through_the_codes_is_least_squares() -> None:
    x, z, decoder, bias = tiny.features(N, D), codes(), torch.randn(WIDTH, D), torch.randn(D)
    error = x.double().numpy() - (z.astype(np.float64) @ decoder.double().numpy() + bias.double().numpy())
    given = np.hstack([x.double().numpy(), np.ones((N, 1))])
    expected = np.linalg.lstsq(given, error)[0]
    found = solve(streamed(x, z, decoder, bias))["e"]
    np.testing.assert_allclose(found.weight, expected[:-1], atol=1e-5)
    np.testing.assert_allclose(found.bias, expected[-1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:THE SAE 'wide' EXPLAINS LESS")  # random weights
@pytest.mark.parametrize("protocol", ["strict", "paper", "authors-code"])
def test_a_survey_through_the_codes_is_the_dense_survey(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), loaded("topk", topk(48, 4)), loaded("wide", topk(96, 8)))
    found = []
    for forced in (False, True):
        monkeypatch.setattr(survey, "cheaper", lambda *sizes, forced=forced: forced)
        preset = tiny.preset(saes=refs, bootstrap=100 + forced)  # another key, so that nothing is read back
        found.append(survey.run(preset, protocols=(protocol,)).rows.set_index(["sae", "metric"]))
    dense, coded = found
    np.testing.assert_allclose(coded.value.astype(float), dense.value.astype(float), atol=1e-6)
    assert (coded.n_fit == dense.n_fit).all()


def test_codes_are_chosen_where_the_site_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.mkl.is_available():
        assert cheaper(150_000, 2304, 16_384, 32)
    assert not cheaper(150_000, 576, 16_384, 32)
    assert not cheaper(20_000, 2304, 16_384, 32), "the product with the decoder does not pay"
    assert not cheaper(150_000, 2304, 16_384, 400), "too many active latents"
    monkeypatch.setattr(products.torch.backends.mkl, "is_available", lambda: False)
    assert not cheaper(150_000, 2304, 16_384, 32)
