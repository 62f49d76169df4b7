"""Training: batches follow (seed, step), a run that was cut off ends as an undisturbed one, nothing
is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.constants import TRAINER_STATE_FILENAME
from safetensors.torch import load_file

from darkmatter import cache
from darkmatter.errors import DarkmatterError
from darkmatter.models import activations
from darkmatter.models.activations import Activations
from darkmatter.presets import Preset, Training
from darkmatter.saes import checkpoints, loading, training
from tests import tiny

# the last eighth of the rows is held out
WIDTH, K, ROWS, HELD, BATCH, STEPS = 32, 4, 2400, 300, 100, 60


class Cut(BaseException):
    """The power goes."""


@pytest.fixture(autouse=True)
def stream(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Activations:
    """What would be read out of the model's training text."""
    torch.set_num_threads(1)
    stream = tiny.acts(contexts=60)
    assert stream.x.shape == (ROWS, tiny.D)
    monkeypatch.setattr(activations, "training", lambda preset: stream)
    return stream


def preset(**recipe: Any) -> Preset:
    own = {"grid": ((WIDTH, K), (16, 2)), "tokens": STEPS * BATCH,
           "distinct_tokens": ROWS, "batch": BATCH}
    return tiny.preset(training=Training(**(own | recipe)))


def train(**recipe: Any) -> Path:
    (folder,) = training.run(preset(**recipe), only=(WIDTH, K)).values()
    return folder


def cut(monkeypatch: pytest.MonkeyPatch, function: str, when: Callable[..., bool]) -> None:
    """Train until the call of a function of ``training`` for which ``when(call number, arguments)``
    holds."""
    original, calls = getattr(checkpoints, function), 0

    def cutting(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls, *words):
            raise Cut
        return original(*words)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(checkpoints, function, cutting)
        train()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SAE of a run that nothing interrupted, made in another cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKMATTER_CACHE", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setattr(activations, "training", lambda preset: tiny.acts(contexts=60))
        return train()


# ---- batches ----

def test_an_epoch_sees_each_row_at_most_once_and_the_next_in_another_order() -> None:
    recipe, rows = Training(batch=7, seed=3), 50
    epochs = [torch.cat([checkpoints.batch_rows(recipe, rows, step)
                         for step in range(7 * e, 7 * e + 7)]) for e in (0, 1)]
    for epoch in epochs:
        assert len(epoch) == len(epoch.unique()) == 49 and 0 <= epoch.min() <= epoch.max() < rows
    assert not torch.equal(*epochs)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    recipe = Training(batch=8)
    late = checkpoints.batch_rows(recipe, 100, 1000)
    torch.manual_seed(99)  # whatever else draws random numbers
    assert torch.equal(checkpoints.batch_rows(recipe, 100, 1000), late)
    assert not torch.equal(checkpoints.batch_rows(recipe, 100, 1001), late)
    assert not torch.equal(checkpoints.batch_rows(Training(batch=8, seed=1), 100, 1000), late)


def test_the_stream_starts_at_any_step() -> None:
    recipe, x = Training(batch=8), torch.arange(100.0)[:, None]
    from_start, later = (checkpoints.batches(x, recipe, start) for start in (0, 3))
    batches = [next(from_start) for _ in range(5)]
    assert torch.equal(batches[3], next(later)) and torch.equal(batches[4], next(later))


def test_too_few_tokens_for_a_batch() -> None:
    with pytest.raises(DarkmatterError,
                       match=r"A batch of 4096 tokens needs more than the 2100 training tokens"):
        train(batch=4096, tokens=8192)


# ---- what a run leaves ----

def test_the_record_says_how_it_was_trained() -> None:
    found = record(train())
    assert {"width": WIDTH, "k": K, "model": "toy", "site": tiny.SITE,
            "seed": 0}.items() <= found.items()
    assert found["tokens"] == found["seconds_cover_tokens"] == STEPS * BATCH
    assert found["distinct_tokens"] == ROWS - HELD
    assert found["epochs"] == pytest.approx(found["tokens"] / found["distinct_tokens"])
    assert found["recipe"]["batch"] == BATCH
    assert 0 <= found["dead_share"] <= 1
    assert set(found["versions"]) >= {"torch", "sae-lens"}
    assert found["command"].startswith("python -m darkmatter train --preset")
    tokens, fvu = ([row[name] for row in found["curve"]] for name in ("tokens", "fvu"))
    assert tokens == sorted(tokens) and len(tokens) >= 5
    assert fvu[-1] < 0.9 * fvu[0] < 0.9  # it learned something
    # at the very end
    assert 0 < found["fvu"] < fvu[0] and found["fvu"] == pytest.approx(fvu[-1], rel=0.2)


def test_the_sae_works_on_activations_as_they_are(stream: Activations) -> None:
    """The scale that training divided by is folded into the weights."""
    folder = train()
    sae, _, _ = training_directory(folder)
    held = stream.x[-HELD:].float()
    with torch.no_grad():
        fvu = float((held - sae(held)).pow(2).sum() / (held - held.mean(0)).pow(2).sum())
    assert sae.cfg.normalize_activations == "none"
    assert fvu == pytest.approx(record(folder)["curve"][-1]["fvu"], rel=0.2)


def training_directory(folder: Path) -> Any:
    return loading.directory(folder)


def test_a_second_call_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = train()

    def no_training(*_: object) -> None:
        raise AssertionError("it trained again")

    monkeypatch.setattr(training, "trainer_of", no_training)
    assert train() == first


def test_the_whole_grid_is_trained_under_names_that_tell_it_apart() -> None:
    made = training.run(preset(tokens=5 * BATCH))
    assert list(made) == ["toy-l0-w32-k4", "toy-l0-w16-k2"]
    assert all((folder / "record.json").exists() for folder in made.values())
    assert {record(folder)["width"] for folder in made.values()} == {32, 16}


def test_the_recipe_and_not_the_grid_determines_the_sae() -> None:
    few = {"tokens": 5 * BATCH}
    first = train(**few)
    assert train(**few, grid=((WIDTH, K),)) == first
    other = train(**few, seed=1)
    assert other != first and other.name.startswith("toy-l0-w32-k4-s1-")
    assert not torch.equal(weights(other)["W_dec"], weights(first)["W_dec"])
    assert train(**few, lr=1e-3) != first


def test_names() -> None:
    def named(**fields: Any) -> str:
        return training.name(tiny.preset(site="blocks.15.hook_resid_post", **fields), 4096, 32)

    assert named(model="smollm2") == "smollm2-l15-w4096-k32"
    assert named(model="smollm2", training=Training(seed=3)) == "smollm2-l15-w4096-k32-s3"
    assert named(model="/models/llama") == named(model="org/llama") == "llama-l15-w4096-k32"


# ---- cut off and started again ----

def test_resumed_after_a_cut_between_checkpoints(monkeypatch: pytest.MonkeyPatch,
                                                 undisturbed: Path) -> None:
    cut(monkeypatch, "batch_rows", lambda call, recipe, rows, step: step == 41)
    steps = seen_steps(monkeypatch)
    same(train(), undisturbed)
    assert 0 < steps[0] <= 41  # it went on from a checkpoint
    assert steps == list(range(steps[0], STEPS))


def test_resumed_after_a_cut_inside_a_checkpoint(monkeypatch: pytest.MonkeyPatch,
                                                 undisturbed: Path) -> None:
    # the files are there, complete.json is not
    cut(monkeypatch, "fvu", lambda call, *_: call == 4)
    work = next(cache.root().glob("saes/*.work"))
    complete = {int(path.parent.name) for path in work.glob("*/complete.json")}
    newest = max(int(path.name) for path in work.iterdir())
    assert len(complete) == 3 and newest > max(complete)
    steps = seen_steps(monkeypatch)
    same(train(), undisturbed)
    assert steps[0] == max(complete) // BATCH


def test_resumed_after_a_cut_at_the_very_end(monkeypatch: pytest.MonkeyPatch,
                                             undisturbed: Path) -> None:
    cut(monkeypatch, "record_of", lambda *_: True)
    assert not list(cache.root().glob("saes/*/record.json"))
    same(train(), undisturbed)


def test_cut_twice(monkeypatch: pytest.MonkeyPatch, undisturbed: Path) -> None:
    cut(monkeypatch, "batch_rows", lambda call, recipe, rows, step: step == 12)
    cut(monkeypatch, "batch_rows", lambda call, recipe, rows, step: step == 41)
    same(train(), undisturbed)


def test_a_cut_before_the_first_checkpoint_starts_over(monkeypatch: pytest.MonkeyPatch,
                                                       undisturbed: Path) -> None:
    cut(monkeypatch, "batch_rows", lambda call, recipe, rows, step: step == 3)
    same(train(), undisturbed)


def test_only_the_newest_checkpoint_keeps_its_optimiser() -> None:
    folder = train()
    states = list(folder.with_name(folder.name + ".work").glob(f"*/{TRAINER_STATE_FILENAME}"))
    assert len(states) == 1


def seen_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the steps that are trained from here on."""
    original: Callable[..., torch.Tensor] = checkpoints.batch_rows
    steps: list[int] = []

    def noting(recipe: Training, rows: int, step: int) -> torch.Tensor:
        steps.append(step)
        return original(recipe, rows, step)

    monkeypatch.setattr(checkpoints, "batch_rows", noting)
    return steps


def same(folder: Path, undisturbed: Path) -> None:
    """Bit for bit the same weights, and the same story."""
    assert folder != undisturbed and folder.name == undisturbed.name
    found, expected = weights(folder), weights(undisturbed)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    ours, theirs = record(folder), record(undisturbed)
    timing = {"seconds": 0, "seconds_cover_tokens": 0}
    assert ours | timing == theirs | timing
    assert (folder / "cfg.json").read_text() == (undisturbed / "cfg.json").read_text()
