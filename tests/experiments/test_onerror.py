"""Parts of an error against numpy; SAEs trained on them: data, names, records, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darkmatter import cache, presets
from darkmatter.errors import DarkmatterError
from darkmatter.experiments import error_parts, on_error
from darkmatter.models import activations
from darkmatter.models.activations import Activations
from darkmatter.presets import Preset, Training
from darkmatter.saes import artifacts, loading, references, training
from darkmatter.saes.loaded import LoadedSAE
from tests import tiny

WIDTH, K, BATCH = 24, 3, 100
RECIPE: dict[str, Any] = {"on_error": (WIDTH, K), "tokens": 8 * BATCH, "distinct_tokens": 2400,
                          "batch": BATCH}


@pytest.fixture(autouse=True)
def base(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedSAE:
    """The SAE whose error is taken apart, known as 'toy'; training text is a toy too."""
    torch.set_num_threads(1)
    toy, load = tiny.loaded("toy", tiny.topk()), references.load_sae
    monkeypatch.setattr(references, "load_sae",
                        lambda ref, preset: toy if ref == "toy" else load(ref, preset))
    monkeypatch.setattr(activations, "training", lambda preset: tiny.acts())
    monkeypatch.setattr(on_error, "RECORDS", own_cache / "on-error.json")
    return toy


def preset(**recipe: Any) -> Preset:
    on_error = {"linear": f"train:{WIDTH}x{K}", "nonlinear": f"train:{WIDTH}x{K}"}
    return tiny.preset(training=Training(**(RECIPE | recipe)), on_error=on_error)


def fitted(acts: Activations) -> np.ndarray:
    return np.arange(len(acts.x)) % 3 > 0


def by_numpy(base: LoadedSAE, acts: Activations, fit: np.ndarray) -> dict[str, np.ndarray]:
    x = acts.x.double().numpy()
    error = x - base(acts.x.float())[0].double().numpy()
    ones = np.c_[x, np.ones(len(x))]
    linear = ones @ np.linalg.lstsq(ones[fit], error[fit], rcond=None)[0]
    return {"linear": linear, "nonlinear": error - linear, "error": error, "x": x}


@torch.no_grad()
def by_hand(sae: Any, rows: torch.Tensor) -> float:
    """FVU of an SAE on rows."""
    return float((rows - sae(rows)).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum())


# ---- parts ----

@pytest.mark.parametrize("which", error_parts.PARTS)
def test_a_part_is_what_least_squares_says(base: LoadedSAE, which: str) -> None:
    acts = tiny.acts()
    part = error_parts.part(base, acts, fitted(acts), which)
    expected = by_numpy(base, acts, fitted(acts))[which]
    assert part.x.dtype == torch.bfloat16
    np.testing.assert_allclose(part.x.float().numpy(), expected, rtol=2**-7, atol=2e-2)
    assert np.array_equal(part.context, acts.context) and part.text is acts.text


def test_rows_that_do_not_fit_have_no_say_in_the_map(base: LoadedSAE) -> None:
    acts = tiny.acts()
    fit = fitted(acts)
    other = acts.x.clone()
    other[torch.from_numpy(~fit)] *= 5
    first = error_parts.error_map(base, acts, fit)
    second = error_parts.error_map(base, replace(acts, x=other, key="other"), fit)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-6)
    third = error_parts.error_map(base, acts, ~fit)
    assert (first.weight - third.weight).abs().max() > 1e-3


def test_a_part_is_written_once_and_again_when_damaged(base: LoadedSAE) -> None:
    acts = tiny.acts()
    first = error_parts.part(base, acts, fitted(acts), "nonlinear")
    file = cache.root() / "parts" / first.key / "x.bf16"
    before, kept = file.stat().st_mtime_ns, first.x.clone()
    assert torch.equal(error_parts.part(base, acts, fitted(acts), "nonlinear").x, kept)
    assert file.stat().st_mtime_ns == before
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(error_parts.part(base, acts, fitted(acts), "nonlinear").x, kept)


def test_keys_tell_parts_splits_and_saes_apart(base: LoadedSAE) -> None:
    acts = tiny.acts()
    fit = fitted(acts)
    other = tiny.loaded("other", tiny.topk(seed=1))
    keys = [acts.key, *(error_parts.part(*words).key for words in (
        (base, acts, fit, "linear"), (base, acts, fit, "nonlinear"), (base, acts, ~fit, "linear"),
        (other, acts, fit, "linear")))]
    assert len(set(keys)) == len(keys)


def test_a_gaussian_has_the_covariance_of_its_part_and_nothing_else(base: LoadedSAE) -> None:
    acts = tiny.acts(tiny.features(24_000), contexts=60)
    everything = np.ones(len(acts.x), bool)
    like, drawn = (error_parts.part(base, acts, everything, which).x.double().numpy()
                   for which in ("nonlinear", "gaussian-nonlinear"))
    scale = np.sqrt(np.cov(like.T).diagonal())
    np.testing.assert_allclose(drawn.mean(0) / scale, like.mean(0) / scale, atol=0.03)
    relative = [np.cov(rows.T) / np.outer(scale, scale) for rows in (drawn, like)]
    np.testing.assert_allclose(relative[0], relative[1], atol=0.04)
    centred = [(rows - rows.mean(0)) / scale for rows in (like, drawn)]
    kurtosis = [float((rows**4).mean() / (rows**2).mean() ** 2) for rows in centred]
    assert kurtosis[1] == pytest.approx(3, abs=0.1) and kurtosis[0] > 3.2
    assert abs(np.corrcoef(drawn[:, 0], acts.x[:, 0].double().numpy())[0, 1]) < 0.03


def test_the_record_of_a_part_is_its_variance_and_effective_dimension(base: LoadedSAE) -> None:
    acts = tiny.acts()
    part = error_parts.part(base, acts, fitted(acts), "linear")
    covariance = np.cov(part.x.double().numpy().T, bias=True)
    about = error_parts.about(part)
    assert about["base"] == "toy"
    assert about["variance"] == pytest.approx(np.trace(covariance), rel=1e-4)
    dimension = np.trace(covariance) ** 2 / (covariance**2).sum()
    assert about["effective_dimension"] == pytest.approx(dimension, rel=1e-3)
    assert error_parts.about(acts) == {}


@pytest.mark.parametrize(("values", "expected"),
                         [([1, 1, 1, 1], 4), ([7, 0, 0], 1), ([2, 1], 9 / 5)])
def test_effective_dimension(values: list[float], expected: float) -> None:
    dimension = error_parts.effective_dimension(torch.tensor(values, dtype=torch.float64))
    assert dimension == pytest.approx(expected)


def test_there_is_no_such_part(base: LoadedSAE) -> None:
    acts = tiny.acts()
    message = "no part 'cubic'; there are linear, nonlinear, error, x, gaussian-nonl"
    with pytest.raises(DarkmatterError, match=message):
        error_parts.part(base, acts, fitted(acts), "cubic")


def test_too_few_rows_to_fit(base: LoadedSAE) -> None:
    acts = tiny.acts()
    with pytest.raises(DarkmatterError, match="takes at least 17 tokens to fit; there are 10"):
        error_parts.part(base, acts, np.arange(len(acts.x)) < 10, "linear")


def test_fvu_is_of_held_out_rows_and_drawn_together(base: LoadedSAE) -> None:
    acts = tiny.acts()
    fit = acts.text.source[acts.context] % 3 > 0
    part = error_parts.part(base, acts, fit, "linear")
    y = part.x.double().numpy()[~fit]
    whole = on_error.held_out_fvu(preset(), part, fit, lambda rows: 0 * rows)
    quarter = on_error.held_out_fvu(preset(), part, fit, lambda rows: 0.5 * rows)
    assert whole.values.shape == (101,) and whole.effective == pytest.approx(10)
    assert (whole.n, whole.sources) == (len(y), 10)
    assert whole.value == pytest.approx((y**2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-5)
    ratio = quarter / whole  # the same draws of sources: Draws of others cannot be divided
    np.testing.assert_allclose(ratio.values, 0.25, rtol=1e-5)
    assert whole.values[1:].std() > 0


# ---- training ----

def test_targets_are_fitted_without_the_slice_that_is_watched(base: LoadedSAE) -> None:
    stream = tiny.acts()
    fit = np.arange(len(stream.x)) < training.trained_rows(len(stream.x))
    assert fit.sum() == 2100  # of 2,400: the last eighth is watched
    target = on_error.target(preset(), "linear")
    expected = by_numpy(base, stream, fit)["linear"]
    np.testing.assert_allclose(target.x.float().numpy(), expected, rtol=2**-7, atol=2e-2)


def test_a_run_trains_each_target_and_seed_under_its_own_name() -> None:
    folders = on_error.run(preset(), (0, 1), ("linear", "gaussian-linear", "x"))
    names = ["toy-l0-on-linear-w24-k3", "toy-l0-on-gaussian-linear-w24-k3", "toy-l0-w24-k3"]
    assert list(folders) == names + [f"{name}-s1" for name in names]
    records = [json.loads((folder / "record.json").read_text()) for folder in folders.values()]
    assert [(record["target"], record["seed"]) for record in records] == [
        (which, seed) for seed in (0, 1) for which in ("linear", "gaussian-linear", "x")]
    assert {record["base"] for record in records[:2]} == {"toy"} and records[0]["variance"] > 0
    assert len({record["fvu"] for record in records}) == 6


def test_an_sae_on_a_part_rebuilds_that_part_and_not_x(base: LoadedSAE) -> None:
    """FVU in the record is of the part: the saved SAE gives the same on the watched slice."""
    folder = on_error.train(preset(tokens=60 * BATCH), "nonlinear")
    held = on_error.target(preset(), "nonlinear").x[2100:].float()
    sae = loading.directory(folder)[0]
    fvu = by_hand(sae, held)
    record = json.loads((folder / "record.json").read_text())
    assert fvu == pytest.approx(record["fvu"], rel=0.02) and fvu < 0.9


def test_on_x_it_is_the_ladders_own_sae() -> None:
    chosen = preset(grid=((WIDTH, K),))
    (ladder,) = training.run(chosen).values()
    assert on_error.train(chosen, "x") == ladder


def test_longer_runs_have_names_of_their_own() -> None:
    folder = on_error.train(preset(), "linear", times=2)
    assert folder.name.startswith("toy-l0-on-linear-2x-w24-k3-")
    assert json.loads((folder / "record.json").read_text())["tokens"] == 16 * BATCH


def test_an_sae_cannot_have_more_active_latents_than_latents() -> None:
    with pytest.raises(DarkmatterError, match="An SAE of 8 latents cannot have 9 of them active"):
        on_error.train(preset(on_error=(8, 9)), "linear")


def test_a_short_run_is_watched_on_held_out_rows(base: LoadedSAE) -> None:
    acts = tiny.acts()
    fit = fitted(acts)
    folder = on_error.short(preset(), acts, fit, "nonlinear", 20 * BATCH)
    part = error_parts.part(base, acts, fit, "nonlinear").x.float()
    held = int(fit.sum()) // 7
    watched = part[torch.from_numpy(np.flatnonzero(~fit)[:held])]
    sae = loading.directory(folder)[0]
    record = json.loads((folder / "record.json").read_text())
    assert record["fvu"] == pytest.approx(by_hand(sae, watched), rel=0.02)
    assert record["distinct_tokens"] == 7 * held
    assert folder.name.startswith("toy-l0-on-short-nonlinear-")


# ---- opened and recorded ----

def test_load_trains_on_the_spot_or_takes_the_ladders() -> None:
    own = on_error.load(preset(), "linear")
    assert (own.name, own.record["target"]) == ("toy-l0-on-linear-w24-k3", "linear")
    assert (own.width, own.k) == (WIDTH, K)
    assert on_error.load(preset(), "x").name == "toy-l0-w24-k3"


def test_an_sae_of_another_ones_error_is_refused(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path)
    references.ship(on_error.train(preset(), "linear"), tmp_path / "one.safetensors")
    with_it = replace(preset(), on_error={"linear": "artifact:one"})
    assert on_error.load(with_it, "linear").record["base"] == "toy"
    changed = replace(with_it, saes=("toy", f"train:{WIDTH}x{K}"), default_sae=f"train:{WIDTH}x{K}")
    with pytest.raises(DarkmatterError, match="trained on the error of toy, not of toy-l0-w24-k3; "
                                              "leave the parameter"):
        on_error.load(changed, "linear")


def test_a_size_that_is_none() -> None:
    with pytest.raises(DarkmatterError,
                       match="'train:big' is not an SAE to train; write it as 'train:2048x32'"):
        on_error.load(replace(preset(), on_error={"linear": "train:big"}), "linear")


def test_collected_records_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_error, "SEEDS", (0,))
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path)
    shipped = replace(preset(), on_error={"linear": "artifact:one"})
    with pytest.raises(DarkmatterError, match=r"is missing; fetch the repository's files again"):
        on_error.recorded(shipped)
    references.ship(on_error.train(preset(), "linear"), tmp_path / "one.safetensors")
    on_error.collect(preset())
    rows = on_error.recorded(shipped)
    assert {row["target"] for row in rows} == set(error_parts.NAMES)
    assert [row["name"] for row in rows if "4x" in row["name"]] == [
        "toy-l0-on-linear-4x-w24-k3", "toy-l0-on-nonlinear-4x-w24-k3"]
    assert all({"seed", "fvu", "curve", "seconds", "tokens"} <= row.keys() for row in rows)
    today = datetime.now(UTC).date().isoformat()
    assert {row["date"] for row in rows} == {today}
    live = on_error.recorded(preset(), (0,))
    assert live == [row for row in rows if "4x" not in row["name"]]


def test_the_records_of_another_suite_are_not_shown(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the committed records are of SAEs trained on other rows, the SAEs' own files speak."""
    monkeypatch.setattr(on_error, "SEEDS", (0,))
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path)
    references.ship(on_error.train(preset(), "linear"), tmp_path / "one.safetensors")
    shipped = replace(preset(), on_error={"linear": "artifact:one"})
    rows = json.loads(on_error.collect(preset()).read_text())
    on_error.RECORDS.write_text(json.dumps([row | {"stream": "other", "fvu": 9} for row in rows]))
    own = on_error.recorded(shipped)
    assert [(row["target"], row["seed"]) for row in own] == [
        ("linear", 0), ("nonlinear", 0), ("x", 0)]
    assert [row["fvu"] for row in own] == [
        row["fvu"] for target in ("linear", "nonlinear", "x") for row in rows
        if row["target"] == target and "4x" not in row["name"]]
    assert "date" not in own[0]  # nobody noted it


@pytest.mark.parametrize("name", ["smollm2-20m", "gemma-3-270m-q4"])
def test_the_suites_that_ship_open_and_fit_together(name: str) -> None:
    """Each SAE by its reference, at the width of its site; on the error: of the default SAE's."""
    preset = presets.load(name)
    base = references.load_sae(preset.default_sae, preset)
    for ref in preset.saes:
        opened = references.load_sae(ref, preset)
        assert opened.record["site"] == preset.site and opened.sae.cfg.d_in == base.sae.cfg.d_in
        assert opened.record["tokens"] >= 20_000_000 and f"w{opened.width}-k{opened.k}" in ref
    for which in ("linear", "nonlinear"):
        assert on_error.load(preset, which).record["target"] == which
    assert on_error.load(preset, "x").ref in preset.saes  # none is trained on the spot
    for site, ref in preset.elsewhere.items():
        assert references.load_sae(ref, preset.at(site)).record["site"] == site
