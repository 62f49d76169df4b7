"""Checkpoints as SAEs: they compute what the trainer did then; their survey shows error fall."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from darkmatter.errors import DarkmatterError
from darkmatter.experiments import variants
from darkmatter.models import activations
from darkmatter.models.activations import Activations
from darkmatter.presets import Preset, Training
from darkmatter.saes import references, training
from tests import tiny

WIDTH, K = 32, 4


@pytest.fixture(autouse=True)
def stream(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Activations:
    """Activations to train on, and others to measure on."""
    torch.set_num_threads(1)
    stream = tiny.acts(contexts=60)
    monkeypatch.setattr(activations, "training", lambda preset: stream)
    monkeypatch.setattr(activations, "evaluation", lambda preset, loaded=None: tiny.acts(seed=1))
    monkeypatch.setattr(variants, "CONVERGENCE", tmp_path / "convergence.json")
    return stream


def preset(**fields: object) -> Preset:
    recipe = Training(grid=((WIDTH, K),), tokens=16_000, distinct_tokens=2400, batch=100, lr=3e-3)
    return replace(tiny.preset(saes=(f"train:{WIDTH}x{K}",)), **({"training": recipe} | fields))


def test_an_early_sae_is_the_trainer_of_then(stream: Activations) -> None:
    training.run(preset())
    folder = training.early(preset(), WIDTH, K, 1 / 4)
    (checkpoint,) = folder.parent.glob("*.work/4*")
    weights = load_file(checkpoint / "sae_weights.safetensors")
    scale = json.loads((checkpoint / "activation_scaler.json").read_text())["scaling_factor"]
    x = stream.x[:50].float()
    before = (x * scale - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    strength = before.relu() * weights["W_dec"].norm(dim=1)
    chosen = strength.topk(K, dim=1)
    latents = torch.zeros_like(before).scatter(1, chosen.indices, chosen.values)
    latents = latents / weights["W_dec"].norm(dim=1)
    expected = (latents @ weights["W_dec"] + weights["b_dec"]) / scale
    found, _, _ = references.load_sae(str(folder), preset())(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_error_falls_with_training_and_the_file_is_read_back() -> None:
    rows = variants.convergence(preset())
    assert rows.share.tolist() == [1 / 8, 1 / 4, 1 / 2, 1.0]
    assert rows.tokens.tolist() == [2000, 4000, 8000, 16_000]
    assert rows.fvu.iloc[-1] < rows.fvu.iloc[0]
    assert (rows.fvu_low < rows.fvu).all() and (rows.fvu < rows.fvu_high).all()
    assert (rows.fvu_n > 0).all()
    variants.collect_convergence(preset())
    name = training.name(preset(), WIDTH, K)
    shipped = replace(preset(), saes=(f"artifact:{name}",), default_sae="")
    another = replace(preset(), saes=("artifact:another",), default_sae="")
    stored = variants.recorded_convergence(shipped)
    assert stored.fvu.tolist() == pytest.approx(rows.fvu.tolist())
    assert set(stored.recorded) == {f"{datetime.now(UTC):%Y-%m-%d}"}, "a record is dated"
    assert variants.recorded_convergence(another).empty
    measured = variants.recorded_convergence(preset())
    assert measured.fvu.tolist() == pytest.approx(rows.fvu.tolist())
    assert "recorded" not in measured, "what was measured just now is no record"
    assert variants.suites(stored).empty, "no other suite is on record"


def test_a_suite_of_more_tokens_and_another_seed() -> None:
    """Rows of two presets lie in one file: each is found by its SAEs, all suites by SAEs' names."""
    few = preset(name="few", training=replace(preset().training, tokens=4000))
    more = preset(name="more", training=replace(preset().training, repeats=((WIDTH, K),)))
    name = training.name(more, WIDTH, K)
    few = replace(few, saes=(f"artifact:{name}",), default_sae="")
    for suite in (few, more, few):
        variants.collect_convergence(replace(suite, saes=(f"train:{WIDTH}x{K}",), default_sae=""))
    known = variants.known_convergence()
    assert len(known) == 2 * 4 + 2, "what is collected again replaces what was"
    rows = variants.recorded_convergence(few)
    found = variants.suites(rows.query("preset == 'few'"))
    assert sorted(zip(found.preset, found.tokens, found.seed, strict=True)) == [
        ("few", 4000, 0), ("more", 16_000, 0), ("more", 16_000, 1), ("more", 16_000, 2)]
    assert (found.share == 1).all()
    of_another = rows.query("preset == 'few'").assign(sae="another-l0-w32-k4")
    assert variants.suites(of_another).empty, "of the same size, of another model"


def test_the_suite_with_most_sizes() -> None:
    one, other = f"train:{WIDTH}x{K}", f"train:{WIDTH}x{K // 2}"
    small = preset(name="small", training=replace(preset().training, tokens=4000))
    sizes = ((WIDTH, K), (WIDTH, K // 2))
    grid = replace(preset(), name="grid", training=replace(preset().training, grid=sizes))
    variants.collect_convergence(replace(small, saes=(one,), default_sae=""))
    rows = variants.convergence(small)
    assert variants.widest(rows).empty, "no suite has more sizes than these rows"
    variants.collect_convergence(replace(grid, saes=(one, other), default_sae=""))
    found = variants.widest(rows)
    assert sorted(set(zip(found.preset, found.k, strict=True))) == [("grid", K // 2), ("grid", K)]
    assert len(found) == 2 * 4 and (found.seed == 0).all()
    of_another = rows.assign(sae="another-l0-w32-k4")
    assert variants.widest(of_another).empty, "of the same size, of another model"


def test_an_sae_that_was_not_trained_here() -> None:
    sentence = r"no checkpoint of toy-l0-w32-k4-\w+ after 25% of its training here"
    with pytest.raises(DarkmatterError, match=sentence):
        training.early(preset(), WIDTH, K, 1 / 4)
    with pytest.raises(DarkmatterError, match=r"come without their checkpoints"):
        variants.recorded_convergence(replace(preset(), saes=("a-release:an-id",), default_sae=""))
