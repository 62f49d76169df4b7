"""Predicting errors from components: planted maps are found, shuffled ones not, numpy agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from darkmatter.errors import DarkmatterError
from darkmatter.experiments import components
from darkmatter.experiments.components import Errors, predict
from darkmatter.models import activations
from darkmatter.presets import Preset
from darkmatter.regression import Moments, solve
from darkmatter.saes import references
from tests import tiny
from tests.tiny import D

PRESET = tiny.preset()
OWN, LAYER = "blocks.2.hook_resid_post", 2


@pytest.fixture(autouse=True)
def _quiet(own_cache: Path) -> None:
    torch.set_num_threads(1)


def toy_errors() -> Errors:
    return Errors(PRESET, tiny.loaded("toy", tiny.topk()), tiny.acts(tiny.features(9600)))


def value(scores: components.Scores, label: str, target: str, metric: str = "r2_vector") -> float:
    return float(scores[label, target, metric])


def test_the_targets_are_the_error_and_its_parts() -> None:
    errors = toy_errors()
    rows = slice(100, 300)
    targets, x = errors(rows), errors.acts.read(rows)
    error = x - tiny.loaded("toy", tiny.topk())(x)[0]
    assert torch.allclose(targets["SaeError"], error, atol=1e-5)
    both = targets["LinearError"] + targets["NonlinearError"]
    assert torch.allclose(both, targets["SaeError"], atol=1e-5)


def test_x_knows_the_linear_part_and_nothing_of_the_rest() -> None:
    errors = toy_errors()
    found = predict(errors, {"x": errors.acts.read}, {"x": ["x"]})
    assert value(found, "x", "LinearError") == pytest.approx(1, abs=1e-6)
    assert value(found, "x", "NonlinearError") == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("metric", components.METRICS)
def test_the_score_is_what_numpy_finds(metric: str) -> None:
    errors = toy_errors()
    everything = slice(0, len(errors.acts.x))
    directions = torch.randn(D, 5, generator=torch.Generator().manual_seed(3))
    other = (errors.acts.read(everything) @ directions).relu()
    found = predict(errors, {"a": errors.reconstruction, "b": lambda rows: other[rows]},
                    {"both": ["a", "b"], "b": ["b"]})
    ones = np.ones((len(other), 1))
    x = np.concatenate([errors.reconstruction(everything), other, ones], 1).astype(float)
    fit = errors.fitted
    for target, y in errors(everything).items():
        truth = y.double().numpy()
        for label, chosen in (("both", slice(0, None)), ("b", slice(D, None))):
            left = truth - x[:, chosen] @ np.linalg.lstsq(x[fit, chosen], truth[fit], rcond=None)[0]
            sse = np.square(left[~fit]).sum(0)
            sst = np.square(truth[~fit] - truth[~fit].mean(0)).sum(0)
            r2 = np.mean(1 - sse / sst) if metric == "r2_vector" else 1 - sse.sum() / sst.sum()
            assert value(found, label, target, metric) == pytest.approx(r2, abs=2e-4)


def test_a_component_that_holds_the_error_predicts_it() -> None:
    errors = toy_errors()

    def leak(rows: slice) -> Tensor:
        return errors(rows)["NonlinearError"] @ torch.eye(D).flip(0)

    found = predict(errors, {"leak": leak, "x": errors.acts.read},
                    {"leak": ["leak"], "both": ["x", "leak"]})
    assert value(found, "leak", "NonlinearError") == pytest.approx(1, abs=1e-5)
    assert value(found, "both", "SaeError") == pytest.approx(1, abs=1e-5)
    assert value(found, "leak", "LinearError") < 0.1


def test_a_shuffled_component_knows_nothing() -> None:
    errors = toy_errors()
    n = len(errors.acts.x)
    mixed = components.shuffled(errors.reconstruction, n, seed=0)
    found = predict(errors, {"mixed": mixed}, {"mixed": ["mixed"]})
    assert np.abs(components.table(found)["value"].to_numpy(float)).max() < 0.02
    rows = slice(0, n)
    before, after = errors.reconstruction(rows).bfloat16().float(), mixed(rows)
    assert torch.equal(before.sort(0).values, after.sort(0).values)
    assert not torch.equal(before, after)
    assert torch.equal(mixed(slice(50, 60)), after[50:60])


def test_a_table_has_a_row_for_each_score_and_results_join() -> None:
    errors = toy_errors()
    readers = {"x": errors.acts.read}
    first, second = (predict(errors, readers, {label: ["x"]}) for label in ("one", "two"))
    table = components.table(first | second)
    assert len(table) == 2 * len(components.TARGETS) * len(components.METRICS)
    assert (table["low"].to_numpy(float) <= table["high"].to_numpy(float)).all()
    assert set(table["n"]) == {int((~errors.fitted).sum())}


def test_part_of_the_moments_are_the_moments_of_a_part() -> None:
    x = tiny.features(500)
    whole, alone, chosen = Moments("float64"), Moments("float64"), torch.tensor([1, 5, 6])
    for rows in x.split(200):
        whole.update(rows, [("y", rows[:, :2].square())])
        alone.update(rows[:, chosen], [("y", rows[:, :2].square())])
    mine, theirs = (solve(each)["y"] for each in (components.part(whole, chosen), alone))
    assert torch.allclose(mine.weight, theirs.weight) and torch.allclose(mine.bias, theirs.bias)


def test_too_many_dimensions_for_the_text() -> None:
    errors = toy_errors()
    with pytest.raises(DarkmatterError, match="takes at least"):
        predict(errors, {"wide": lambda rows: torch.zeros(rows.stop - rows.start, 9000)},
                {"wide": ["wide"]})


def elsewhere(ref: str = "artifact:a") -> Preset:
    sites = ("blocks.2.hook_mlp_out", "blocks.2.attn.hook_z", "blocks.1.hook_resid_post",
             "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post")
    return tiny.preset(site=OWN, elsewhere=dict.fromkeys(sites, ref))


def test_nearby_is_this_layer_and_the_stream_before_it() -> None:
    assert components.nearby(elsewhere()) == {
        "MLP output, layer 2": "blocks.2.hook_mlp_out",
        "attention z, layer 2": "blocks.2.attn.hook_z",
        "residual stream, layer 1": "blocks.1.hook_resid_post"}
    assert components.nearby(PRESET) == {}


@pytest.mark.parametrize(("ref", "passes"), [("train:256x8", 1), ("artifact:a", 0)])
def test_saes_to_train_read_their_text_in_one_pass(
        monkeypatch: pytest.MonkeyPatch, ref: str, passes: int) -> None:
    asked: list[list[str]] = []
    opened = tiny.loaded("toy", tiny.topk())
    monkeypatch.setattr(activations, "trainings", lambda preset, sites: asked.append(sites))
    monkeypatch.setattr(references, "load_sae", lambda ref, preset: (ref, preset.site, opened))
    preset = elsewhere(ref)
    found = components.load_elsewhere(preset)
    assert asked == [list(preset.elsewhere)] * passes
    assert found == {site: (ref, site, opened) for site in preset.elsewhere}
