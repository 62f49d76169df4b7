"""Captured activations are transformers' own, at every kind of site, for the features of the
paper's models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from darkmatter import presets
from darkmatter.models import model
from tests import systems

LENGTH, EMBEDDING = 40, "model.embed_tokens.weight"
SITES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z")


@dataclass(frozen=True)
class Makes:
    """How to make a toy, and which modules of a transformers layer give what a site reads."""

    model: Callable[..., PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    attention: str
    """Takes z, gives the attention block's output before any norm."""
    attn_out: str
    mlp_out: str


LLAMA = Makes(systems.llama31, systems.llama_tokenizer, "self_attn.o_proj",
              "self_attn.o_proj", "mlp")
NORMED = ("self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm")
SYSTEMS = {"gemma-2": Makes(systems.gemma2, systems.gemma_tokenizer, *NORMED),
           "gemma-3": Makes(systems.gemma3, systems.gemma_tokenizer, *NORMED),
           "llama-3.1": LLAMA,
           "gpt2": Makes(systems.gpt2, systems.gpt2_tokenizer, "attn.c_proj", "attn.c_proj", "mlp")}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(5, 350, (2, LENGTH)).astype(np.int32)


@dataclass(frozen=True)
class Pair:
    """One toy, opened by the book and by transformers."""

    makes: Makes
    folder: Path
    ours: model.LoadedModel
    theirs: Any


@pytest.fixture(scope="module", params=SYSTEMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    makes = SYSTEMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    systems.save(makes.model(), makes.tokenizer(), folder, torch.float32)
    return Pair(makes, folder, opened(folder), theirs(folder))


def opened(folder: Path) -> model.LoadedModel:
    return model.load(presets.load("smoke", model=str(folder),
                                   dtype="float32", device="cpu", layer=0))


def theirs(folder: Path, **config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()


def layers(original: Any) -> Any:
    return original.model.layers if hasattr(original, "model") else original.transformer.h


def inside(makes: Makes, original: Any, tokens: np.ndarray) -> dict[str, Tensor]:
    """What transformers' modules take and give, by the names of the book's sites."""
    found: dict[str, Tensor] = {}

    def keep(name: str, given: bool = False) -> Callable[..., None]:
        def hook(module: Any, taken: Any, output: Any) -> None:
            value = taken if given else output
            found[name] = value[0] if isinstance(value, tuple) else value
        return hook

    hooks = []
    for i, layer in enumerate(layers(original)):
        named = dict(layer.named_modules())
        hooks += [layer.register_forward_hook(keep(f"blocks.{i}.hook_resid_post")),
                  named[makes.attention].register_forward_hook(keep(f"blocks.{i}.attn.hook_z",
                                                                    given=True)),
                  named[makes.attn_out].register_forward_hook(keep(f"blocks.{i}.hook_attn_out")),
                  named[makes.mlp_out].register_forward_hook(keep(f"blocks.{i}.hook_mlp_out"))]
    with torch.no_grad():
        states = original(torch.as_tensor(tokens).long(), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return found | {f"blocks.{i}.hook_resid_pre": states[i] for i in range(len(layers(original)))}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- activations ----

@pytest.mark.parametrize("site", SITES)
def test_captured_is_what_transformers_has_there(pair: Pair, tokens: np.ndarray, site: str) -> None:
    expected = inside(pair.makes, pair.theirs, tokens)
    names = [f"blocks.{i}.{site}" for i in range(len(layers(pair.theirs)))]
    found = model.capture(pair.ours, tokens, names)
    for name in names:
        assert found[name].shape == expected[name].shape
        assert distance(found[name], expected[name]) < 1e-5, name


def test_hidden_states_are_the_residual_stream(pair: Pair, tokens: np.ndarray) -> None:
    """transformers' hidden_states[i] is what enters layer i; the last one has the final norm on
    it."""
    with torch.no_grad():
        states = pair.theirs(torch.as_tensor(tokens).long(),
                             output_hidden_states=True).hidden_states
    for i in range(len(states) - 2):
        name = f"blocks.{i}.hook_resid_post"
        assert distance(model.capture(pair.ours, tokens, [name])[name], states[i + 1]) < 1e-5


def test_losses_are_transformers(pair: Pair, tokens: np.ndarray) -> None:
    """Through the final norm, the head and its soft-cap."""
    ours = model.losses(pair.ours, tokens)
    with torch.no_grad():
        logits = pair.theirs(torch.as_tensor(tokens).long()).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                 torch.as_tensor(tokens)[:, 1:].long().flatten(),
                                                 reduction="none")
    assert np.allclose(ours.ravel(), expected.numpy(), rtol=1e-4, atol=1e-5)


# ---- each feature is there, and matters ----

def test_gemma_scales_its_embedding(tokens: np.ndarray, tmp_path: Path) -> None:
    made = systems.gemma2()
    systems.save(made, systems.gemma_tokenizer(), tmp_path, torch.float32)
    first = model.capture(opened(tmp_path), tokens,
                          ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    embedding = torch.nn.functional.embedding(torch.as_tensor(tokens).long(),
                                              made.state_dict()[EMBEDDING])
    assert distance(first, embedding * 32**0.5) < 1e-5


CHANGES = {"no soft-cap on attention": ("gemma-2", {"attn_logit_softcapping": 3.0},
                                        {"attn_logit_softcapping": 50.0}),
           "another scale of queries": ("gemma-2", {}, {"query_pre_attn_scalar": 16}),
           "no windows": ("gemma-2", {}, {"sliding_window": LENGTH}),
           "no windows in Gemma 3": ("gemma-3", {}, {"sliding_window": LENGTH}),
           "plain rotations": ("llama-3.1", {},
                               {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})}


@pytest.mark.parametrize("change", CHANGES)
def test_a_feature_left_out_is_seen(change: str, tmp_path: Path) -> None:
    """The same weights under a changed configuration give other activations, and again
    transformers' own."""
    name, before, after = CHANGES[change]
    makes, site = SYSTEMS[name], "blocks.2.hook_resid_post"
    tokens = np.random.default_rng(0).integers(5, 350, (1, 4 * LENGTH)).astype(np.int32)
    found = []
    for label, config in (("before", before), ("after", before | after)):
        folder = tmp_path / label
        made = makes.model(**config)
        systems.save(made, makes.tokenizer(), folder, torch.float32)
        found.append(model.capture(opened(folder), tokens, [site])[site])
        assert distance(found[-1], inside(makes, theirs(folder), tokens)[site]) < 1e-5
    assert distance(*found) > 1e-3


@pytest.mark.parametrize(("name", "whole"), [("gemma-2", [1, 3]), ("gemma-3", [5])])
def test_layers_with_a_window_do_not_see_past_it(name: str, whole: list[int],
                                                 tmp_path: Path) -> None:
    """Another first token changes a windowed first layer only within its window, and a whole layer
    to the end."""
    makes = SYSTEMS[name]
    systems.save(makes.model(), makes.tokenizer(), tmp_path, torch.float32)
    original = theirs(tmp_path)
    kinds = original.config.layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == whole
    ours = opened(tmp_path)
    tokens = np.random.default_rng(0).integers(5, 350, (1, LENGTH)).astype(np.int32)
    other = tokens.copy()
    other[0, 0] += 1
    first = [model.capture(ours, each, ["blocks.0.attn.hook_z"])["blocks.0.attn.hook_z"]
             for each in (tokens, other)]
    assert kinds[0] == "sliding_attention"
    assert torch.equal(first[0][0, 8:], first[1][0, 8:]) and not torch.equal(first[0][0, :8],
                                                                             first[1][0, :8])
    deep = f"blocks.{whole[0]}.attn.hook_z"
    ends = [model.capture(ours, each, [deep])[deep][0, -1] for each in (tokens, other)]
    assert distance(*ends) > 1e-5


def test_outputs_are_read_after_gemmas_second_norms(tokens: np.ndarray, tmp_path: Path) -> None:
    """What an MLP or attention SAE of Gemma Scope reads is what is added to the stream: resid_post
    less resid_mid."""
    systems.save(systems.gemma2(), systems.gemma_tokenizer(), tmp_path, torch.float32)
    sites = [f"blocks.1.{site}" for site in ("hook_resid_pre",
                                             "hook_attn_out", "hook_mlp_out", "hook_resid_post")]
    before, attention, mlp, after = model.capture(opened(tmp_path), tokens, sites).values()
    assert distance(before + attention + mlp, after) < 1e-5


def test_llamas_rotations_are_stretched_as_published() -> None:
    """Short waves as they are, long ones 8 times as long, those between 8,192 / 4 and 8,192 / 1 in
    between."""
    rotations = systems.llama31().model.rotary_emb.inv_freq.double().numpy()
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    waves = 2 * np.pi / plain
    stretch = plain / rotations
    assert np.allclose(stretch[waves < 8192 / 4], 1, rtol=1e-4)
    assert np.allclose(stretch[waves > 8192], 8, rtol=1e-4)
    between = stretch[(waves >= 8192 / 4) & (waves <= 8192)]
    assert len(between) and (between > 1).all() and (between < 8).all()
