"""Splicing against a full forward pass for every variant; choice of text, noise, percentages."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from darkmatter.errors import DarkmatterError
from darkmatter.experiments import downstream
from darkmatter.models import model
from darkmatter.regression import Draws, Moments, solve
from tests import tiny
from tests.models.test_model import VOCABULARY, D, folder, loaded, original, tokens  # noqa: F401 — fixtures

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
KEPT = np.array([5, 6, 8, 9, 14])  # with gaps, as special tokens leave them
VARIANTS = 4


def vectors(seed: int = 0) -> Tensor:
    return torch.randn(VARIANTS, len(KEPT), D, generator=torch.Generator().manual_seed(seed))


def whole_forward(original: Any, context: np.ndarray, put: Tensor, site: str) -> Tensor:  # noqa: F811
    """Losses of transformers' own model, one pass a variant, with a hook on its own module."""
    layer = original.model.layers[int(site.split(".")[1])]
    module = {"hook_resid_post": layer, "hook_mlp_out": layer.mlp,
              "hook_z": layer.self_attn.o_proj}[site.rsplit(".", 1)[1]]
    losses, before = [], site.endswith("hook_z")
    for variant in put:
        def replace(module: Any, given: Any, output: Any = None, variant: Tensor = variant) -> Any:
            value = (given[0] if output is None else output).clone()
            value[0, KEPT] = variant
            return (value,) if output is None else value

        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hook = register(replace)
        ids = torch.as_tensor(context).long()
        with torch.no_grad():
            logits = original(ids[None]).logits[0]
        hook.remove()
        losses.append(cross_entropy(logits[KEPT], ids[KEPT + 1], reduction="none"))
    return torch.stack(losses)


@pytest.mark.parametrize("at_once", [1, 3, VARIANTS])
@pytest.mark.parametrize("site", [
    "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post",
    "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_splicing_is_a_full_forward_pass_for_every_variant(
    loaded: model.LoadedModel, original: Any, tokens: np.ndarray,  # noqa: F811
    site: str, at_once: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downstream, "LOGITS", at_once * len(KEPT) * VOCABULARY)
    losses = downstream.losses(loaded, site, tokens[0], KEPT, vectors())
    assert (losses.dtype, losses.shape) == (torch.float32, (VARIANTS, len(KEPT)))
    close(losses, whole_forward(original, tokens[0], vectors(), site))


def test_putting_the_activations_back_changes_nothing(
    loaded: model.LoadedModel, tokens: np.ndarray  # noqa: F811
) -> None:
    site = "blocks.1.hook_resid_post"
    captured = model.capture(loaded, tokens, [site])[site]
    for context, x, plain in zip(tokens, captured, model.losses(loaded, tokens), strict=True):
        losses = downstream.losses(loaded, site, context, KEPT, x[None, KEPT])
        close(losses[0], torch.from_numpy(plain[KEPT]))


@pytest.mark.parametrize("layer", [1, 2])
def test_a_site_before_a_layer_is_the_one_after_the_layer_below(
    loaded: model.LoadedModel, tokens: np.ndarray, layer: int  # noqa: F811
) -> None:
    sites = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer - 1}.hook_resid_post"
    close(*(downstream.losses(loaded, site, tokens[0], KEPT, vectors()) for site in sites))


def test_nothing_is_before_the_first_position(
    loaded: model.LoadedModel, original: Any, tokens: np.ndarray,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(whole_forward.__globals__, "KEPT", kept := np.array([0, 1, 2, 5, 8]))
    site = "blocks.1.hook_resid_post"
    close(downstream.losses(loaded, site, tokens[0], kept, vectors()),
          whole_forward(original, tokens[0], vectors(), site))


def test_the_positions_before_the_first_run_once(
    loaded: model.LoadedModel, tokens: np.ndarray  # noqa: F811
) -> None:
    lengths: list[tuple[int, ...]] = []
    top = loaded.bridge.original_model.model.layers[2]
    hook = top.register_forward_hook(
        lambda module, given, output: lengths.append(tuple(output.shape[:2])))
    try:
        downstream.losses(loaded, "blocks.1.hook_resid_post", tokens[0], KEPT, vectors())
    finally:
        hook.remove()
    assert lengths == [(1, KEPT[0]), (VARIANTS, KEPT[-1] + 1 - KEPT[0])]


def test_the_part_before_the_site_runs_once(
    loaded: model.LoadedModel, tokens: np.ndarray  # noqa: F811
) -> None:
    batches: list[int] = []
    hooks = [layer.register_forward_hook(lambda module, given, output: batches.append(len(output)))
             for layer in loaded.bridge.original_model.model.layers]
    try:
        downstream.losses(loaded, "blocks.1.hook_resid_post", tokens[0], KEPT, vectors())
    finally:
        for hook in hooks:
            hook.remove()
    # Three layers of the positions before the first, and one of the others.
    assert batches[:4] == [1, 1, 1, 1]
    assert batches[5] == VARIANTS


@pytest.mark.parametrize(
    ("put", "kept"),
    [(vectors()[0], KEPT), (vectors()[:, :-1], KEPT), (vectors(), np.array([5, 6, 8, 9, 19]))],
    ids=["one variant without its dimension", "too few rows", "a last position"],
)
def test_shapes_that_do_not_fit_get_one_sentence(
    loaded: model.LoadedModel, tokens: np.ndarray, put: Tensor, kept: np.ndarray  # noqa: F811
) -> None:
    sentence = "cannot replace the activations at 5 positions of a context of 20"
    with pytest.raises(DarkmatterError, match=sentence):
        downstream.losses(loaded, "blocks.1.hook_resid_post", tokens[0], kept, put)


def test_a_site_that_is_not_there_gets_its_sentence(
    loaded: model.LoadedModel, tokens: np.ndarray  # noqa: F811
) -> None:
    with pytest.raises(DarkmatterError, match="layers 0 to 2"):
        downstream.losses(loaded, "blocks.7.hook_resid_post", tokens[0], KEPT, vectors())


def test_sums_are_those_of_the_losses_of_each_context(
    loaded: model.LoadedModel, tokens: np.ndarray  # noqa: F811
) -> None:
    site = "blocks.1.hook_resid_post"
    acts = tiny.acts(torch.randn(15, D), contexts=3, sources=3)
    acts.position[:] = np.tile(KEPT, 3)
    acts.text.tokens.resize(tokens.shape, refcheck=False)
    acts.text.tokens[:] = tokens
    chosen = [downstream.Stretch(0, slice(0, 5)), downstream.Stretch(2, slice(10, 14))]

    def variants(stretch: downstream.Stretch) -> dict[str, Tensor]:
        x = acts.x[stretch.rows].float()
        return {"x": x, "half": x / 2}

    sums = downstream.measure(loaded, site, acts, chosen, variants)
    assert sums["n"].tolist() == [5, 0, 4]
    for name, factor in (("x", 1.0), ("half", 0.5)):
        for context, rows in chosen:
            put = acts.x[rows].float() * factor
            alone = downstream.losses(loaded, site, tokens[context], acts.position[rows], put[None])
            assert float(sums[name][context]) == pytest.approx(float(alone.sum()), rel=1e-4)
        assert sums[name][1] == 0


def test_stretches_are_whole_held_out_contexts() -> None:
    acts = tiny.acts(contexts=60)
    held = (acts.context % 3 == 0) | (acts.context == 7)
    held[acts.context == 7] = np.arange(40) > 3  # not wholly held out
    chosen = downstream.stretches(acts, held, 8, positions=10, seed=1)
    contexts = [stretch.context for stretch in chosen]
    assert contexts == sorted(set(contexts))
    assert len(contexts) == 8
    assert all(c % 3 == 0 for c in contexts)
    for context, rows in chosen:
        assert set(acts.context[rows]) == {context}
        assert acts.position[rows].tolist() == list(range(tiny.FIRST, tiny.FIRST + 10))
    assert chosen == downstream.stretches(acts, held, 8, positions=10, seed=1)
    assert chosen != downstream.stretches(acts, held, 8, positions=10, seed=2)


def test_stretches_take_what_there_is() -> None:
    acts = tiny.acts(lengths=[0, 5, 7], sources=3)
    every = downstream.stretches(acts, np.ones(12, bool), 20)
    assert every == [(1, slice(0, 5)), (2, slice(5, 12))]
    assert downstream.stretches(acts, np.ones(12, bool), 20, positions=6)[1].rows == slice(5, 11)


@pytest.mark.parametrize(("contexts", "positions", "sentence"),
                         [(0, 0, "at least 1 context"), (3, -1, "no negative")])
def test_numbers_that_make_no_sense_get_one_sentence(
    contexts: int, positions: int, sentence: str
) -> None:
    with pytest.raises(DarkmatterError, match=sentence):
        downstream.stretches(tiny.acts(), np.ones(2400, bool), contexts, positions)


def test_no_held_out_context_gets_one_sentence() -> None:
    with pytest.raises(DarkmatterError, match="no held-out context"):
        downstream.stretches(tiny.acts(), np.zeros(2400, bool), 3)


def test_parts_add_up_and_the_linear_one_is_the_maps() -> None:
    x, sae = tiny.features(500), tiny.loaded("toy", tiny.topk())
    moments = Moments()
    moments.update(x, [("error", x - sae(x)[0])])
    b = solve(moments)["error"]
    rebuilt, linear, nonlinear = downstream.divided(sae, b, x)
    torch.testing.assert_close(rebuilt + linear + nonlinear, x)
    torch.testing.assert_close(rebuilt, sae(x)[0])
    # The rest of a regression is uncorrelated with what it was fitted on.
    products = nonlinear.T @ (x - x.mean(0))
    assert float(products.abs().max()) < 1e-2 * float(x.square().sum(0).max())


def test_noise_has_the_norms_and_no_direction() -> None:
    like = tiny.features(4000)
    drawn = downstream.noise(like, 3)
    torch.testing.assert_close(drawn.norm(dim=1), like.norm(dim=1))
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    assert float(unit.mean(0).norm()) < 0.05
    assert float((unit * like).sum(1).mean().abs()) < 0.05 * float(like.norm(dim=1).mean())
    assert torch.equal(drawn, downstream.noise(like, 3))
    assert not torch.equal(drawn, downstream.noise(like, 4))


def test_percent_of_the_gap_recovered() -> None:
    sums = {"sae": [4.0, 5.0], "x": [2.0, 3.0], "sae + all": [2.0, 3.0], "sae + half": [3.0, 4.5]}
    total = {name: Draws(np.array(values), 2, 10, 2) for name, values in sums.items()}
    assert downstream.recovered(total, "sae", "sae + all").values.tolist() == [100, 100]
    assert downstream.recovered(total, "sae", "sae + half").values.tolist() == [50, 25]
    assert downstream.recovered(total, "sae", "sae").values.tolist() == [0, 0]


def test_totals_are_sums_over_contexts_drawn_by_source() -> None:
    acts, p = tiny.acts(contexts=60, sources=30), tiny.preset()
    sums = {"n": torch.full((60,), 5.0).double(), "x": torch.arange(60.0).double()}
    sums["n"][::2] = 0  # contexts that were not run
    sums["x"][::2] = 0
    total = downstream.totals(p, acts, sums)
    assert total["x"].value == sum(range(1, 60, 2))
    assert total["x"].n == total["n"].value == 150
    mean = total["x"] / total["n"]
    assert mean.value == 6
    assert mean.low is not None and mean.high is not None and mean.low < 6 < mean.high
    assert len(mean.values) == p.bootstrap + 1
