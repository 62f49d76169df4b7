"""The survey end to end: known answers, numpy's, protocols, caching, a sentence for bad input."""

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
from darkmatter.errors import DarkmatterError
from darkmatter.models.activations import Activations
from darkmatter.regression import PROTOCOLS, Protocol, clusters
from darkmatter.saes.loaded import LoadedSAE
from tests import tiny
from tests.tiny import D, acts, formula, loaded, metrics, surveyed, topk

HOME = Path(__file__).resolve().parents[1]
VECTORS = ("x", "sae", "error", "linear", "nonlinear")
METRICS = {"l0", "dead_share", "fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm",
           *(f"norm_test_{name}" for name in VECTORS)}


@pytest.fixture(autouse=True)
def _quiet(own_cache: Path) -> None:
    torch.set_num_threads(1)


def run_alone(monkeypatch: pytest.MonkeyPatch, stored: Activations, sae: LoadedSAE,
              **fields: object) -> pd.DataFrame:
    """The metrics of one SAE under the strict protocol."""
    refs = surveyed(monkeypatch, stored, sae)
    return metrics(survey.run(tiny.preset(saes=refs, **fields)), sae.name)


def ladder() -> list[LoadedSAE]:
    return [loaded(f"w{width}-k{k}", topk(width, k)) for width, k in ((32, 4), (64, 4), (32, 8))]


# ---- SAEs whose error is known ----

def test_identity_sae_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run_alone(monkeypatch, acts(), formula("identity", lambda x: x.clone()))
    assert scores.value["fvu"] == scores.value["fvu_nonlinear"] == 0
    assert scores.value["norm_test_x"] == scores.value["norm_test_sae"]
    for metric in ("r2_vector", "r2_vector_weighted", "r2_norm", "norm_test_error"):
        assert np.isnan([scores.value[metric], scores.low[metric], scores.high[metric]]).all()
        assert "no variance" in scores.note[metric]


@pytest.mark.filterwarnings("ignore:THE SAE 'dead' EXPLAINS LESS")  # FVU 1.0004, about another mean
def test_dead_sae_error_is_wholly_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = acts()
    mean = stored.x.float().mean(0)
    scores = run_alone(monkeypatch, stored, formula("dead", mean.expand_as))
    # The mean of the scored rows is a little elsewhere.
    assert scores.value["fvu"] == pytest.approx(1, abs=0.02) and scores.value["fvu"] >= 1
    assert scores.value["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert scores.value["r2_vector"] == pytest.approx(1, abs=1e-8)
    assert scores.value["r2_vector_weighted"] == pytest.approx(1, abs=1e-8)
    assert np.isnan(scores.value["norm_test_sae"])  # a constant has no norm to predict
    linear = scores.value["norm_test_linear"]
    assert scores.value["norm_test_error"] == pytest.approx(linear, abs=1e-4)


def test_shrinking_sae_error_is_wholly_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = acts()
    x = stored.x.float()
    scores = run_alone(monkeypatch, stored, formula("shrinking", lambda x: 0.9 * x))
    rows = x[~torch.from_numpy(survey.fitted_rows(tiny.preset(), stored, PROTOCOLS["strict"]))]
    share = float(rows.square().sum() / (rows - rows.mean(0)).square().sum())
    assert scores.value["fvu"] == pytest.approx(0.01 * share, rel=1e-4)
    assert scores.value["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert scores.value["r2_vector"] == pytest.approx(1, abs=1e-8)
    of_x = pytest.approx(scores.value["norm_test_x"], abs=1e-4)
    for name in ("sae", "error", "linear"):
        assert scores.value[f"norm_test_{name}"] == of_x


def test_planted_linear_error_and_noise_are_recovered_within_their_intervals(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaussian x of covariance S, SaeError = M(x − μ) + noise: all scores follow from these."""
    g = torch.Generator().manual_seed(6)
    mix, plant, hash_, phase = (torch.randn(shape, generator=g)
                                for shape in ((D, D), (D, D), (D, D), (D,)))
    mix, plant, mean, size = mix / 4, plant * 0.05, torch.linspace(-1, 3, D), 0.1

    def noise(x: Tensor) -> Tensor:
        """Independent of x for all that a regression can see, and the same at every pass."""
        return size * 2**0.5 * torch.sin(1000 * (x @ hash_) + 10 * phase)

    def reconstruct(x: Tensor) -> Tensor:
        return x - (x - mean) @ plant - noise(x)

    x = torch.randn(20_000, D, generator=g) @ mix + mean
    stored = acts(x, contexts=100, sources=50)
    scores = run_alone(monkeypatch, stored, formula("planted", reconstruct), bootstrap=500)
    covariance = mix.T @ mix
    signal = (plant.T @ covariance @ plant).diagonal()
    truth = {
        "fvu": float((signal.sum() + D * size**2) / covariance.trace()),
        "fvu_nonlinear": float(D * size**2 / covariance.trace()),
        "r2_vector": float((signal / (signal + size**2)).mean()),
        "r2_vector_weighted": float(signal.sum() / (signal.sum() + D * size**2)),
    }
    for metric, value in truth.items():
        row = scores.loc[metric]
        assert row.low < value < row.high, (metric, value, row)
        assert row.high - row.low < 0.06 * row.value
    # The noise does not know x.
    assert scores.value["norm_test_nonlinear"] == pytest.approx(0, abs=0.02)


def test_norm_of_a_binary_sparse_sum_is_linear_and_of_a_gaussian_is_not(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """‖x‖² = Σ w_i for orthonormal y_i, w_i ∈ {0, 1}; symmetric x has no covariance with ‖x‖²."""
    g = torch.Generator().manual_seed(0)
    sparse = acts((torch.rand(4000, D, generator=g) < 0.2).float(), contexts=50, sources=25)
    binary = run_alone(monkeypatch, sparse, formula("half", lambda x: x / 2))
    assert binary.value["norm_test_x"] == binary.value["r2_norm"] == pytest.approx(1, abs=1e-9)
    gaussian = acts(torch.randn(4000, D, generator=g), contexts=50, sources=25)
    scores = run_alone(monkeypatch, gaussian, formula("half", lambda x: x / 2))
    assert scores.value["norm_test_x"] == pytest.approx(0, abs=0.03)


def test_l0_and_dead_latents_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, stored = topk(32, 4), acts()
    with torch.no_grad():
        sae.b_enc[:6] = -1e6
        sae.b_enc[6:] -= 1
    scores = run_alone(monkeypatch, stored, loaded("toy", sae))
    latents = sae.encode(stored.x.float())
    held_out = ~survey.fitted_rows(tiny.preset(), stored, PROTOCOLS["strict"])
    l0 = (latents > 0).sum(1).double().numpy()
    assert l0.min() < 4
    assert scores.value["l0"] == pytest.approx(l0[held_out].mean())
    assert scores.low["l0"] < scores.value["l0"] < scores.high["l0"]
    dead = 1 - float((latents > 0).any(0).double().mean())
    assert 6 / 32 <= dead < 1 and scores.value["dead_share"] == pytest.approx(dead)
    assert "not a sample" in scores.note["dead_share"]
    assert scores.n_eval["dead_share"] == len(stored.x)


# ---- agreement with numpy ----

class Numpy:
    """Every number of the survey by ``numpy.linalg.lstsq`` on the whole matrix, in float64."""

    def __init__(self, x: Tensor, sae: LoadedSAE, fit: np.ndarray, protocol: Protocol) -> None:
        self.protocol = protocol
        self.x = x.double().numpy()
        self.sae, self.l0 = (values.double().numpy() for values in sae(x)[:2])
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
        return {"x": self.x, "sae": self.sae, "error": self.error, "linear": linear,
                "nonlinear": self.error - linear}

    def norms(self, linear: np.ndarray) -> dict[str, np.ndarray]:
        return {name: (vector**2).sum(1) for name, vector in self.vectors(linear).items()}

    def metrics(self) -> dict[str, float]:
        s, error = self.held_out, self.error
        v = self.held_out if self.protocol.fvu_rows == "eval" else self.all
        spread = ((self.x[v] - self.x[v].mean(0)) ** 2).sum()
        residual, error_spread = error[s] - self.linear[s], (error[s] - error[s].mean(0)) ** 2
        size = (error**2).sum(1)
        scores = {
            "l0": self.l0[s].mean(), "fvu": (error[v] ** 2).sum() / spread,
            "fvu_nonlinear": ((error[v] - self.linear[v]) ** 2).sum() / spread,
            "r2_vector": self.r2(error[s], self.linear[s]).mean(),
            "r2_vector_weighted": 1 - (residual**2).sum() / error_spread.sum(),
            "r2_norm": self.r2(size[s], self.predicted(self.fit, size)[s]),
        }
        in_sample = self.protocol.norm_test_rows == "all"
        rows, scored = (self.all, self.all) if in_sample else (self.fit, self.held_out)
        for name, norm in self.norms(self.predicted(rows, error)).items():
            scores[f"norm_test_{name}"] = self.r2(norm[scored], self.predicted(rows, norm)[scored])
        return {name: float(value) for name, value in scores.items()}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_number_agrees_with_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, sae, preset = acts(), ladder()[0], tiny.preset()
    surveyed(monkeypatch, stored, sae)
    result = survey.run(preset, [sae.ref], protocols=[name])
    scores, fit = metrics(result, sae.name, name), fitted(stored, name)
    expected = Numpy(stored.x.float(), sae, fit, PROTOCOLS[name]).metrics()
    assert set(scores.index) == METRICS == set(expected) | {"dead_share"}
    for metric, value in expected.items():
        assert scores.value[metric] == pytest.approx(value, abs=1e-4), metric
    assert (scores.n_fit == fit.sum()).all()
    assert scores.n_eval["r2_vector"] == scores.n_eval["r2_norm"] == (~fit).sum()
    assert scores.n_eval["fvu"] == (len(fit) if PROTOCOLS[name].fvu_rows == "all" else (~fit).sum())


def test_the_three_vectors_add_up_to_x_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, sae, preset = acts(), ladder()[0], tiny.preset()
    refs = surveyed(monkeypatch, stored, sae)
    table = survey.run(preset, refs).tokens(sae.name)
    truth = Numpy(stored.x.float(), sae, ~table.is_eval.to_numpy(), PROTOCOLS["strict"])
    vectors = truth.vectors(truth.linear)
    parts = vectors["sae"] + vectors["linear"] + vectors["nonlinear"]
    np.testing.assert_allclose(parts, vectors["x"])
    for name, norm in truth.norms(truth.linear).items():
        np.testing.assert_allclose(table[f"{name}_norm2"], norm, rtol=1e-3, atol=1e-3, err_msg=name)
    predicted = truth.predicted(truth.fit, (truth.error**2).sum(1))
    np.testing.assert_allclose(table.error_norm2_hat, predicted, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(table.l0, truth.l0)


def test_the_table_of_tokens_says_where_each_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, sae = acts(lengths=[30, 0, 50, 41] * 15), ladder()[0]
    refs = surveyed(monkeypatch, stored, sae)
    table = survey.run(tiny.preset(), refs).tokens(sae.name)
    assert len(table) == len(stored.x)
    token_id = stored.text.tokens[stored.context, stored.position]
    np.testing.assert_array_equal(table.token_id, token_id)
    np.testing.assert_array_equal(table.source, stored.text.source[stored.context])
    assert list(table.domain[:3]) == ["news"] * 3 and set(table.domain) == {"news", "plays"}
    assert set(table.loc[table.is_eval, "source"]).isdisjoint(table.loc[~table.is_eval, "source"])
    assert not set(table.context) & set(range(1, 60, 4))  # contexts without a kept token


# ---- splits and protocols ----

def fitted(stored: Activations, protocol: str, **fields: object) -> np.ndarray:
    return survey.fitted_rows(tiny.preset(**fields), stored, PROTOCOLS[protocol])


def test_strict_never_fits_and_scores_one_source() -> None:
    stored = acts()
    fit, source = fitted(stored, "strict"), stored.text.source[stored.context]
    assert set(source[fit]).isdisjoint(source[~fit])
    assert fit.mean() == pytest.approx(0.61, abs=0.03)


def test_few_sources_are_split_by_blocks_of_contexts() -> None:
    stored = acts(contexts=80, sources=5)
    fit, block = fitted(stored, "strict"), clusters(stored.text.source)[stored.context]
    assert len(set(block)) == 40 and set(block[fit]).isdisjoint(block[~fit])
    assert (np.diff(clusters(stored.text.source)) >= 0).all()  # contiguous


@pytest.mark.parametrize("protocol", ["paper", "authors-code"])
def test_the_paper_splits_tokens_at_random(protocol: str) -> None:
    stored = acts()
    fit = fitted(stored, protocol)
    shares = [fit[stored.context == c].mean() for c in range(60)]
    assert min(shares) > 0.3 and max(shares) < 0.9 and fit.mean() == pytest.approx(0.61, abs=0.03)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_split_follows_seed_and_share(protocol: str) -> None:
    stored = acts()
    assert np.array_equal(fitted(stored, protocol), fitted(stored, protocol))
    assert not np.array_equal(fitted(stored, protocol), fitted(stored, protocol, seed=1))
    assert fitted(stored, protocol, fit_share=0.3).mean() == pytest.approx(0.3, abs=0.04)


def test_a_change_of_seed_changes_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, sae = acts(), ladder()[0]
    one, other = (run_alone(monkeypatch, stored, sae, seed=seed) for seed in (0, 1))
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
    assert list(wide.sae) == ["w32-k4", "w64-k4"]
    assert {"fvu", "fvu_low", "fvu_high", "r2_norm"} <= set(wide)
    row = metrics(result, "w64-k4", "authors-code").loc["fvu"]
    assert wide.fvu[1] == row.value and wide.fvu_low[1] == row.low


def test_the_wide_table_has_saes_of_any_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), formula("shrinking", lambda x: 0.9 * x), ladder()[0])
    wide = survey.run(tiny.preset(), refs).table()
    assert list(wide.sae) == ["shrinking", "w32-k4"]  # by width; the first has no k


# ---- many together, in any batches ----

def test_a_ladder_measured_together_equals_each_measured_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored, saes = acts(), ladder()
    together = survey.run(tiny.preset(), surveyed(monkeypatch, stored, *saes))
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "elsewhere"))
    for sae in saes:
        alone = survey.run(tiny.preset(), [sae.ref])
        mine = together.rows.query(f"sae == '{sae.name}'").reset_index(drop=True)
        pd.testing.assert_frame_equal(alone.rows, mine, rtol=1e-9, check_dtype=False)
        pd.testing.assert_frame_equal(alone.tokens(sae.name), together.tokens(sae.name), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 100, 10**6])
def test_batch_boundaries_do_not_matter(
    rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored, sae = acts(lengths=[30, 0, 50, 1] * 15), ladder()[0]
    expected = run_alone(monkeypatch, stored, sae)
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setitem(survey.BLOCK_ROWS, "cpu", rows)
    scores = run_alone(monkeypatch, stored, sae)
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(scores[column].astype(float), expected[column].astype(float),
                                   rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_contexts(tmp_path: Path) -> None:
    """Held in memory, the further activations would take 27 MB in bfloat16 and 55 MB in float32.

    What may grow: 28 bytes a token (the table), 8 more for its place, sums of 8 KB a context and
    the bootstrap's copies of them: 8 MB here.
    """
    peaks = {contexts: peak(contexts, tmp_path) for contexts in (75, 300)}
    print(f"peak memory and size of the activations, MB, by contexts: {peaks}")
    assert peaks[300]["x"] - peaks[75]["x"] > 27
    assert peaks[300]["peak"] - peaks[75]["peak"] < 14


def peak(contexts: int, folder: Path) -> dict[str, float]:
    # With this threshold glibc gives back at once what is freed.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "DARKMATTER_CACHE": str(folder / f"cache-{contexts}"),
        "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, "-m", "tests.peak", str(contexts), str(folder / f"{contexts}.bf16")]
    done = subprocess.run(words, cwd=HOME, env=environment, capture_output=True, text=True,
                          timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- read back, made again ----

def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    original, measured = survey.measure, []

    def counting(preset: object, opened: list[LoadedSAE], *rest: object) -> object:
        measured.append([sae.name for sae in opened])
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


@pytest.mark.parametrize("fields", [{"seed": 1}, {"fit_share": 0.5}, {"bootstrap": 50}],
                         ids=lambda fields: next(iter(fields)))
def test_what_the_result_depends_on_makes_it_again(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = count_measured(monkeypatch)
    stored, sae = acts(), ladder()[0]
    run_alone(monkeypatch, stored, sae)
    run_alone(monkeypatch, stored, sae, **fields)
    run_alone(monkeypatch, acts(seed=1), sae)
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
    sentence = r"There is no protocol 'lax'; give one of strict, paper, authors-code\."
    with pytest.raises(DarkmatterError, match=sentence):
        survey.run(tiny.preset(), protocols=("strict", "lax"))


def test_an_sae_of_another_width(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), loaded("other", topk(d=24)))
    sentence = (rf"^The SAE 'other' reads 24 dimensions and {re.escape(tiny.SITE)} has 16; "
                "give an SAE trained at")
    with pytest.raises(DarkmatterError, match=sentence):
        survey.run(tiny.preset(), refs)


def test_two_saes_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ladder()[:2]
    namesake = LoadedSAE("elsewhere/w32-k4", one.name, two.sae, {}, "another")
    refs = surveyed(monkeypatch, acts(), one, namesake)
    with pytest.raises(DarkmatterError, match="w32-k4 two have the same name"):
        survey.run(tiny.preset(), refs)


def test_fewer_rows_than_dimensions_says_how_many_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = acts(contexts=6, lengths=[4] * 6)
    surveyed(monkeypatch, stored, ladder()[0])
    sentence = r"at least 17 tokens to fit.*give about (\d+) contexts"
    with pytest.raises(DarkmatterError, match=sentence) as error:
        survey.run(tiny.preset(), ["w32-k4"])
    asked = re.search(r"about (\d+) contexts", str(error.value))
    assert asked is not None and int(asked[1]) == np.ceil(17 / (4 * 0.61))


def test_activations_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = acts()
    stored.x[1000, 3] = float("nan")
    surveyed(monkeypatch, stored, ladder()[0])
    with pytest.raises(DarkmatterError, match="NaN or infinite"):
        survey.run(tiny.preset(), ["w32-k4"])


def test_an_absurd_sae_is_told_loudly_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), formula("absurd", lambda x: -x))
    for _ in range(2):  # measured, and read back
        sentence = r"THE SAE 'absurd' EXPLAINS LESS THAN THE MEAN DOES \(FVU \d"
        with pytest.warns(UserWarning, match=sentence):
            scores = metrics(survey.run(tiny.preset(), refs), "absurd")
    assert scores.value["fvu"] > 1


def test_a_good_sae_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = surveyed(monkeypatch, acts(), ladder()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        survey.run(tiny.preset(), refs)
