"""The survey end to end: known answers, agreement with numpy, protocols, caching, and a sentence for each bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from darkmatter import survey
from darkmatter.activations import Activations
from darkmatter.errors import DarkmatterError
from darkmatter.regression import PROTOCOLS, Protocol, clusters
from darkmatter.saes import LoadedSAE
from tests import tiny
from tests.tiny import D, acts, formula, loaded, metrics, surveyed, topk

HOME = Path(__file__).resolve().parents[1]
VECTORS = ("x", "sae", "error", "linear", "nonlinear")
METRICS = {"l0", "dead_share", "fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm",
           *(f"norm_test_{name}" for name in VECTORS)}


@pytest.fixture(autouse=True)
def _quiet(own_cache: Path) -> None:
    torch.set_num_threads(1)


def run_alone(monkeypatch: pytest.MonkeyPatch, of: Activations, each: LoadedSAE, **fields: object) -> pd.DataFrame:
    """The metrics of one SAE under the strict protocol."""
    refs = surveyed(monkeypatch, of, each)
    return metrics(survey.run(tiny.preset(saes=refs, **fields)), each.name)


def ladder() -> list[LoadedSAE]:
    return [loaded(f"w{width}-k{k}", topk(width, k)) for width, k in ((32, 4), (64, 4), (32, 8))]


# ---- SAEs whose error is known ----

def test_identity_sae_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_alone(monkeypatch, acts(), formula("identity", lambda x: x.clone()))
    assert found.value["fvu"] == found.value["fvu_nonlinear"] == 0
    assert found.value["norm_test_x"] == found.value["norm_test_sae"]
    for metric in ("r2_vector", "r2_vector_weighted", "r2_norm", "norm_test_error"):
        assert np.isnan([found.value[metric], found.low[metric], found.high[metric]]).all()
        assert "no variance" in found.note[metric]


@pytest.mark.filterwarnings("ignore:THE SAE 'dead' EXPLAINS LESS")  # FVU 1.0004, about another mean
def test_dead_sae_error_is_wholly_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    of = acts()
    mean = of.x.float().mean(0)
    found = run_alone(monkeypatch, of, formula("dead", mean.expand_as))
    assert found.value["fvu"] == pytest.approx(1, abs=0.02)  # the scored rows' own mean is a little elsewhere
    assert found.value["fvu"] >= 1
    assert found.value["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert found.value["r2_vector"] == pytest.approx(1, abs=1e-8)
    assert found.value["r2_vector_weighted"] == pytest.approx(1, abs=1e-8)
    assert np.isnan(found.value["norm_test_sae"])  # a constant has no norm to predict
    assert found.value["norm_test_error"] == pytest.approx(found.value["norm_test_linear"], abs=1e-4)


def test_shrinking_sae_error_is_wholly_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    of = acts()
    x = of.x.float()
    found = run_alone(monkeypatch, of, formula("shrinking", lambda x: 0.9 * x))
    rows = x[~torch.from_numpy(survey.fitted_rows(tiny.preset(), of, PROTOCOLS["strict"]))]
    share = float(rows.square().sum() / (rows - rows.mean(0)).square().sum())
    assert found.value["fvu"] == pytest.approx(0.01 * share, rel=1e-4)
    assert found.value["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert found.value["r2_vector"] == pytest.approx(1, abs=1e-8)
    for name in ("sae", "error", "linear"):
        assert found.value[f"norm_test_{name}"] == pytest.approx(found.value["norm_test_x"], abs=1e-4)


def test_planted_linear_error_and_noise_are_recovered_within_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaussian x with covariance S and SaeError = M(x − μ) + noise: every score follows from S, M and the noise."""
    g = torch.Generator().manual_seed(6)
    mix, plant, hash_, phase = (torch.randn(shape, generator=g) for shape in ((D, D), (D, D), (D, D), (D,)))
    mix, plant, mean, size = mix / 4, plant * 0.05, torch.linspace(-1, 3, D), 0.1

    def noise(x: Tensor) -> Tensor:  # independent of x for all that a regression can see, and the same at every pass
        return size * 2**0.5 * torch.sin(1000 * (x @ hash_) + 10 * phase)

    def reconstruct(x: Tensor) -> Tensor:
        return x - (x - mean) @ plant - noise(x)

    of = acts(torch.randn(20_000, D, generator=g) @ mix + mean, contexts=100, sources=50)
    found = run_alone(monkeypatch, of, formula("planted", reconstruct), bootstrap=500)
    covariance = mix.T @ mix
    signal = (plant.T @ covariance @ plant).diagonal()
    truth = {
        "fvu": float((signal.sum() + D * size**2) / covariance.trace()),
        "fvu_nonlinear": float(D * size**2 / covariance.trace()),
        "r2_vector": float((signal / (signal + size**2)).mean()),
        "r2_vector_weighted": float(signal.sum() / (signal.sum() + D * size**2)),
    }
    for metric, value in truth.items():
        row = found.loc[metric]
        assert row.low < value < row.high, (metric, value, row)
        assert row.high - row.low < 0.06 * row.value
    assert found.value["norm_test_nonlinear"] == pytest.approx(0, abs=0.02)  # noise does not know x


def test_norm_of_a_binary_sparse_sum_is_linear_and_of_a_gaussian_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """‖x‖² = Σ w_i for orthonormal y_i and w_i ∈ {0, 1}; a centred symmetric x has no covariance with ‖x‖²."""
    g = torch.Generator().manual_seed(0)
    sparse = (torch.rand(4000, D, generator=g) < 0.2).float()
    binary = run_alone(monkeypatch, acts(sparse, contexts=50, sources=25), formula("half", lambda x: x / 2))
    assert binary.value["norm_test_x"] == binary.value["r2_norm"] == pytest.approx(1, abs=1e-9)
    gaussian = acts(torch.randn(4000, D, generator=g), contexts=50, sources=25)
    found = run_alone(monkeypatch, gaussian, formula("half", lambda x: x / 2))
    assert found.value["norm_test_x"] == pytest.approx(0, abs=0.03)


def test_l0_and_dead_latents_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, of = topk(32, 4), acts()
    with torch.no_grad():
        sae.b_enc[:6] = -1e6
        sae.b_enc[6:] -= 1
    found = run_alone(monkeypatch, of, loaded("toy", sae))
    latents = sae.encode(of.x.float())
    held_out = ~survey.fitted_rows(tiny.preset(), of, PROTOCOLS["strict"])
    l0 = (latents > 0).sum(1).double().numpy()
    assert l0.min() < 4
    assert found.value["l0"] == pytest.approx(l0[held_out].mean())
    assert found.low["l0"] < found.value["l0"] < found.high["l0"]
    dead = 1 - float((latents > 0).any(0).double().mean())
    assert 6 / 32 <= dead < 1 and found.value["dead_share"] == pytest.approx(dead)
    assert "not a sample" in found.note["dead_share"] and found.n_eval["dead_share"] == len(of.x)


# ---- agreement with numpy ----

class Numpy:
    """Every number of the survey by ``numpy.linalg.lstsq`` on the whole matrix, in float64."""

    def __init__(self, x: Tensor, each: LoadedSAE, fit: np.ndarray, protocol: Protocol) -> None:
        self.protocol = protocol
        self.x = x.double().numpy()
        self.sae = each(x)[0].double().numpy()
        self.l0 = each(x)[1].double().numpy()
        self.error = self.x - self.sae
        self.fit, self.held_out, self.all = fit, ~fit, np.ones_like(fit)
        self.linear = self.predicted(fit, self.error)

    def predicted(self, fit: np.ndarray, y: np.ndarray) -> np.ndarray:
        design = np.c_[self.x, np.ones(len(self.x))] if self.protocol.intercept else self.x
        return design @ np.linalg.lstsq(design[fit], y[fit], rcond=None)[0]

    @staticmethod
    def r2(y: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        return 1 - ((y - prediction) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)

    def vectors(self, linear: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": self.x, "sae": self.sae, "error": self.error, "linear": linear, "nonlinear": self.error - linear}

    def norms(self, linear: np.ndarray) -> dict[str, np.ndarray]:
        return {name: (vector**2).sum(1) for name, vector in self.vectors(linear).items()}

    def metrics(self) -> dict[str, float]:
        s, error = self.held_out, self.error
        v = self.held_out if self.protocol.fvu_rows == "eval" else self.all
        spread = ((self.x[v] - self.x[v].mean(0)) ** 2).sum()
        residual = error[s] - self.linear[s]
        size = (error**2).sum(1)
        found = {
            "l0": self.l0[s].mean(), "fvu": (error[v] ** 2).sum() / spread,
            "fvu_nonlinear": ((error[v] - self.linear[v]) ** 2).sum() / spread,
            "r2_vector": self.r2(error[s], self.linear[s]).mean(),
            "r2_vector_weighted": 1 - (residual**2).sum() / ((error[s] - error[s].mean(0)) ** 2).sum(),
            "r2_norm": self.r2(size[s], self.predicted(self.fit, size)[s]),
        }
        in_sample = self.protocol.norm_test_rows == "all"
        rows, scored = (self.all, self.all) if in_sample else (self.fit, self.held_out)
        for name, norm in self.norms(self.predicted(rows, error)).items():
            found[f"norm_test_{name}"] = self.r2(norm[scored], self.predicted(rows, norm)[scored])
        return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_number_agrees_with_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, each, preset = acts(), ladder()[0], tiny.preset()
    surveyed(monkeypatch, of, each)
    result = survey.run(preset, [each.ref], protocols=[name])
    found, fit = metrics(result, each.name, name), survey.fitted_rows(preset, of, PROTOCOLS[name])
    expected = Numpy(of.x.float(), each, fit, PROTOCOLS[name]).metrics()
    assert set(found.index) == METRICS == set(expected) | {"dead_share"}
    for metric, value in expected.items():
        assert found.value[metric] == pytest.approx(value, abs=1e-4), metric
    assert (found.n_fit == fit.sum()).all()
    assert found.n_eval["r2_vector"] == found.n_eval["r2_norm"] == (~fit).sum()
    assert found.n_eval["fvu"] == (len(fit) if PROTOCOLS[name].fvu_rows == "all" else (~fit).sum())


def test_the_three_vectors_add_up_to_x_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    of, each, preset = acts(), ladder()[0], tiny.preset()
    refs = surveyed(monkeypatch, of, each)
    table = survey.run(preset, refs).tokens(each.name)
    truth = Numpy(of.x.float(), each, ~table.is_eval.to_numpy(), PROTOCOLS["strict"])
    vectors = truth.vectors(truth.linear)
    np.testing.assert_allclose(vectors["sae"] + vectors["linear"] + vectors["nonlinear"], vectors["x"])
    for name, norm in truth.norms(truth.linear).items():
        np.testing.assert_allclose(table[f"{name}_norm2"], norm, rtol=1e-3, atol=1e-3, err_msg=name)
    size = (truth.error**2).sum(1)
    np.testing.assert_allclose(table.error_norm2_hat, truth.predicted(truth.fit, size), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(table.l0, truth.l0)


def test_the_table_of_tokens_says_where_each_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    of, each = acts(lengths=[30, 0, 50, 41] * 15), ladder()[0]
    refs = surveyed(monkeypatch, of, each)
    table = survey.run(tiny.preset(), refs).tokens(each.name)
    assert len(table) == len(of.x)
    np.testing.assert_array_equal(table.token_id, of.text.tokens[of.context, of.position])
    np.testing.assert_array_equal(table.source, of.text.source[of.context])
    assert list(table.domain[:3]) == ["news"] * 3 and set(table.domain) == {"news", "plays"}
    assert set(table.loc[table.is_eval, "source"]).isdisjoint(table.loc[~table.is_eval, "source"])
    assert not set(table.context) & set(range(1, 60, 4))  # contexts without a kept token


# ---- splits and protocols ----

def fitted(of: Activations, protocol: str, **fields: object) -> np.ndarray:
    return survey.fitted_rows(tiny.preset(**fields), of, PROTOCOLS[protocol])


def test_strict_never_fits_and_scores_one_source() -> None:
    of = acts()
    fit, source = fitted(of, "strict"), of.text.source[of.context]
    assert set(source[fit]).isdisjoint(source[~fit])
    assert fit.mean() == pytest.approx(0.61, abs=0.03)


def test_few_sources_are_split_by_blocks_of_contexts() -> None:
    of = acts(contexts=80, sources=5)
    fit, block = fitted(of, "strict"), clusters(of.text.source)[of.context]
    assert len(set(block)) == 40 and set(block[fit]).isdisjoint(block[~fit])
    assert (np.diff(clusters(of.text.source)) >= 0).all()  # contiguous


@pytest.mark.parametrize("protocol", ["paper", "authors-code"])
def test_the_paper_splits_tokens_at_random(protocol: str) -> None:
    of = acts()
    fit = fitted(of, protocol)
    shares = [fit[of.context == c].mean() for c in range(60)]
    assert min(shares) > 0.3 and max(shares) < 0.9 and fit.mean() == pytest.approx(0.61, abs=0.03)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_split_follows_seed_and_share(protocol: str) -> None:
    of = acts()
    assert np.array_equal(fitted(of, protocol), fitted(of, protocol))
    assert not np.array_equal(fitted(of, protocol), fitted(of, protocol, seed=1))
    assert fitted(of, protocol, fit_share=0.3).mean() == pytest.approx(0.3, abs=0.04)


def test_a_change_of_seed_changes_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    of, each = acts(), ladder()[0]
    one, other = (run_alone(monkeypatch, of, each, seed=seed) for seed in (0, 1))
    for metric in METRICS - {"dead_share", "l0"}:
        assert one.value[metric] != other.value[metric] and one.low[metric] != other.low[metric]


def test_protocols_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), *ladder()[:2])
    result = survey.run(tiny.preset(), refs, protocols=tuple(PROTOCOLS))
    assert len(result.rows) == 2 * 3 * len(METRICS)
    alone = survey.run(tiny.preset(), refs, protocols=("paper",)).rows
    together = result.rows.query("protocol == 'paper'").reset_index(drop=True)
    pd.testing.assert_frame_equal(together, alone)
    wide = result.table("authors-code")
    assert list(wide.sae) == ["w32-k4", "w64-k4"] and {"fvu", "fvu_low", "fvu_high", "r2_norm"} <= set(wide)
    row = result.rows.query("sae == 'w64-k4' and metric == 'fvu' and protocol == 'authors-code'").iloc[0]
    assert wide.fvu[1] == row.value and wide.fvu_low[1] == row.low


def test_the_wide_table_has_saes_of_any_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), formula("shrinking", lambda x: 0.9 * x), ladder()[0])
    wide = survey.run(tiny.preset(), refs).table()
    assert list(wide.sae) == ["shrinking", "w32-k4"]  # by width; the first has no k


# ---- many together, in any batches ----

def test_a_ladder_measured_together_equals_each_measured_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of, saes = acts(), ladder()
    together = survey.run(tiny.preset(), surveyed(monkeypatch, of, *saes))
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "elsewhere"))
    for each in saes:
        alone = survey.run(tiny.preset(), [each.ref])
        mine = together.rows.query(f"sae == '{each.name}'").reset_index(drop=True)
        pd.testing.assert_frame_equal(alone.rows, mine, rtol=1e-9, check_dtype=False)
        pd.testing.assert_frame_equal(alone.tokens(each.name), together.tokens(each.name), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 100, 10**6])
def test_batch_boundaries_do_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of, each = acts(lengths=[30, 0, 50, 1] * 15), ladder()[0]
    expected = run_alone(monkeypatch, of, each)
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(survey, "ROWS", rows)
    found = run_alone(monkeypatch, of, each)
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(found[column].astype(float), expected[column].astype(float), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_contexts(tmp_path: Path) -> None:
    """Held in memory, the further activations would take 27 MB in bfloat16 and 55 MB in float32.

    What may grow: 28 bytes a token (the table), 8 more for its place, sums of 8 KB a context and the bootstrap's
    copies of them: 8 MB here.
    """
    peaks = {contexts: peak(contexts, tmp_path) for contexts in (75, 300)}
    print(f"peak memory and size of the activations, MB, by contexts: {peaks}")
    assert peaks[300]["x"] - peaks[75]["x"] > 27
    assert peaks[300]["peak"] - peaks[75]["peak"] < 14


def peak(contexts: int, folder: Path) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DARKMATTER_CACHE": str(folder / f"cache-{contexts}"),
                                "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed, at once
    done = subprocess.run([sys.executable, "-m", "tests.peak", str(contexts), str(folder / f"{contexts}.bf16")],
                          cwd=HOME, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- read back, made again ----

def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    original, measured = survey.measure, []

    def counting(preset: object, opened: list[LoadedSAE], *rest: object) -> object:
        measured.append([each.name for each in opened])
        return original(preset, opened, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(survey, "measure", counting)
    return measured


def test_results_are_read_back_and_only_missing_ones_made(monkeypatch: pytest.MonkeyPatch) -> None:
    saes, measured = ladder(), count_measured(monkeypatch)
    refs = surveyed(monkeypatch, acts(), *saes)
    first = survey.run(tiny.preset(), refs[:2])
    again = survey.run(tiny.preset(), refs[:2])
    pd.testing.assert_frame_equal(first.rows, again.rows)
    pd.testing.assert_frame_equal(first.tokens("w32-k4"), again.tokens("w32-k4"))
    assert list(survey.run(tiny.preset(), refs).rows.sae.unique()) == list(refs)
    assert measured == [list(refs[:2]), [refs[2]]]


@pytest.mark.parametrize("fields", [{"seed": 1}, {"fit_share": 0.5}, {"bootstrap": 50}], ids=lambda f: next(iter(f)))
def test_what_the_result_depends_on_makes_it_again(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = count_measured(monkeypatch)
    of, each = acts(), ladder()[0]
    run_alone(monkeypatch, of, each)
    run_alone(monkeypatch, of, each, **fields)
    run_alone(monkeypatch, acts(seed=1), each)
    assert len(measured) == 3


@pytest.mark.parametrize("name", ["rows.json", "tokens.npy", "is_eval.npy", "sha256.json"])
def test_a_damaged_result_is_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), ladder()[0])
    first = survey.run(tiny.preset(), refs)
    path = first.folders["w32-k4"] / name
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"is damaged; it was removed and is made again"):
        again = survey.run(tiny.preset(), refs)
    pd.testing.assert_frame_equal(first.rows, again.rows)


# ---- bad input ----

def test_an_unknown_protocol() -> None:
    with pytest.raises(DarkmatterError, match=r"There is no protocol 'lax'; give one of strict, paper, authors-code\."):
        survey.run(tiny.preset(), protocols=("strict", "lax"))


def test_an_sae_of_another_width(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), loaded("other", topk(d=24)))
    sentence = rf"^The SAE 'other' reads 24 dimensions and {re.escape(tiny.SITE)} has 16; give an SAE trained at"
    with pytest.raises(DarkmatterError, match=sentence):
        survey.run(tiny.preset(), refs)


def test_two_saes_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ladder()[:2]
    refs = surveyed(monkeypatch, acts(), one, LoadedSAE("elsewhere/w32-k4", one.name, two.sae, {}, "another"))
    with pytest.raises(DarkmatterError, match="w32-k4 two have the same name"):
        survey.run(tiny.preset(), refs)


def test_fewer_rows_than_dimensions_says_how_many_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    of = acts(contexts=6, lengths=[4] * 6)
    surveyed(monkeypatch, of, ladder()[0])
    with pytest.raises(DarkmatterError, match=r"at least 17 tokens to fit.*give about (\d+) contexts") as error:
        survey.run(tiny.preset(), ["w32-k4"])
    asked = re.search(r"about (\d+) contexts", str(error.value))
    assert asked is not None and int(asked[1]) == np.ceil(17 / (4 * 0.61))


def test_activations_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    of = acts()
    of.x[1000, 3] = float("nan")
    surveyed(monkeypatch, of, ladder()[0])
    with pytest.raises(DarkmatterError, match="NaN or infinite"):
        survey.run(tiny.preset(), ["w32-k4"])


def test_an_absurd_sae_is_told_loudly_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), formula("absurd", lambda x: -x))
    for _ in range(2):  # measured, and read back
        with pytest.warns(UserWarning, match=r"THE SAE 'absurd' EXPLAINS LESS THAN THE MEAN DOES \(FVU \d"):
            found = metrics(survey.run(tiny.preset(), refs), "absurd")
    assert found.value["fvu"] > 1


def test_a_good_sae_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), ladder()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        survey.run(tiny.preset(), refs)
