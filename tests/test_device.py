"""The GPU runs the same code: its answers beside the CPU's. Skipped where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from darkmatter import survey
from darkmatter.experiments import pursuit
from darkmatter.models import activations
from darkmatter.presets import Training
from darkmatter.regression import Moments, solve
from darkmatter.saes import codes, training
from darkmatter.saes import trainer as trainers
from tests import tiny

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
              pytest.mark.usefixtures("own_cache")]


def test_regression() -> None:
    x = tiny.features(3000)
    maps = {}
    for device in ("cpu", "cuda"):
        moments = Moments()
        for block in x.to(device).split(500):
            moments.update(block, [("y", block.square())])
        maps[device] = solve(moments)["y"]
    assert maps["cuda"].weight.is_cuda
    torch.testing.assert_close(maps["cuda"].weight.cpu(), maps["cpu"].weight, rtol=1e-4, atol=1e-5)


def test_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    acts, results = tiny.acts(), {}
    for device in ("cpu", "cuda"):
        sae = tiny.loaded(f"toy-{device}", tiny.topk())
        refs = tiny.surveyed(monkeypatch, acts, sae)
        results[device] = survey.run(tiny.preset(device=device), refs, ("strict", "paper"))
    rows = {device: result.rows.select_dtypes("number").to_numpy(float)
            for device, result in results.items()}
    np.testing.assert_allclose(rows["cuda"], rows["cpu"], rtol=2e-4, atol=2e-4)
    tokens = {device: result.tokens(f"toy-{device}")[list(survey.COLUMNS)]
              for device, result in results.items()}
    np.testing.assert_allclose(tokens["cuda"], tokens["cpu"], rtol=1e-3, atol=1e-2)


def test_codes() -> None:
    acts, sae = tiny.acts(), tiny.topk()
    here = codes.of(tiny.loaded("here", sae), acts)
    there = codes.of(tiny.loaded("there", tiny.topk().cuda()), acts)
    assert here is not None and there is not None
    rows = slice(0, 500)
    torch.testing.assert_close(there.decode(tiny.loaded("there", tiny.topk().cuda()), rows).cpu(),
                               here.decode(tiny.loaded("here", sae), rows), rtol=1e-4, atol=1e-4)


def test_training_learns_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tiny.acts(contexts=60)
    recipe = Training(grid=((32, 4),), tokens=20_000, distinct_tokens=2000, batch=200, lr=3e-3)
    records = {}
    for device in ("cpu", "cuda"):
        preset = replace(tiny.preset(device=device), training=recipe)
        # An SAE is known by its stream, whatever trained it.
        renamed = replace(stream, key=f"{stream.key}-{device}")
        monkeypatch.setattr(activations, "training", lambda preset, renamed=renamed: renamed)
        (folder,) = training.run(preset).values()
        records[device] = json.loads((Path(folder) / "record.json").read_text())
    assert records["cuda"]["fvu"] == pytest.approx(records["cpu"]["fvu"], rel=0.05)
    assert records["cuda"]["hardware"] != records["cpu"]["hardware"]


def recording(folder: Path, silent: dict[int, slice], until: int, save_at: int = 0
              ) -> trainers.Trainer:
    """A trainer taken to a step; at some steps, latents are switched off: {step: which}."""
    x = tiny.acts(contexts=60).x
    recipe = Training(grid=((256, 4),), tokens=100 * 200, distinct_tokens=len(x), batch=200)
    preset = replace(tiny.preset(device="cuda"), training=recipe)
    made = trainers.trainer_of(preset, x, str(folder), 256, 4, folder)
    made.cfg.dead_feature_window = 2
    while made.n_training_steps < until:
        with torch.no_grad():
            made.sae.b_enc[silent.get(made.n_training_steps, slice(0))] = -10.0
        made.step(next(made.data_provider))
        if made.n_training_steps + 1 == save_at:
            made.save_checkpoint(str(made.n_training_samples))
        made.n_training_steps += 1
    return made


def same(ours: trainers.Trainer, theirs: trainers.Trainer, rtol: float, atol: float) -> None:
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    for name, weight in theirs.sae.named_parameters():
        torch.testing.assert_close(ours.sae.get_parameter(name), weight, rtol=rtol, atol=atol,
                                   msg=name)


def test_recorded_steps_are_those_taken_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = {2: slice(0, 20), 12: slice(20, 120)}
    monkeypatch.setattr(trainers, "EVERY", 10)
    replayed = recording(tmp_path / "replayed", silent, 35)
    assert len(replayed.recorded) > 1 and replayed.dead_neurons.any()
    monkeypatch.setattr(trainers, "WARM", 1000)
    eager = recording(tmp_path / "eager", silent, 35)
    assert not eager.recorded
    same(replayed, eager, rtol=1e-4, atol=1e-5)


def test_recorded_training_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = {2: slice(0, 20), 12: slice(20, 120)}
    monkeypatch.setattr(trainers, "EVERY", 10)
    whole = recording(tmp_path / "same", silent, 40, save_at=27)
    resumed = recording(tmp_path / "same", silent, 27)
    assert resumed.n_training_steps == 27 and not resumed.warm
    same(recording(tmp_path / "same", silent, 40), whole, rtol=0, atol=0)


def test_pursuit() -> None:
    sae, x = tiny.topk(), tiny.features(200)
    atoms, centred = sae.W_dec.data, x - sae.b_dec.data
    for rule in ("gradient", "orthogonal"):
        here = pursuit.pursue(centred, atoms, 4, rule).sum(atoms)
        there = pursuit.pursue(centred.cuda(), atoms.cuda(), 4, rule).sum(atoms.cuda())
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
