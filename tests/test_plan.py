"""The plan's formulas against what is: parameter counts, counted operations, files on disk, weights in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from darkmatter import __main__ as cli
from darkmatter import decomposition, model, plan, saes, sizes, survey
from darkmatter import preset as presets
from darkmatter.errors import DarkmatterError
from tests import systems, tiny

PAPER = ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b", "gpt2-small", "gemma-3-270m", "gemma-3-1b")
PUBLISHED = {"google/gemma-2-2b": 2_614_341_888, "google/gemma-2-9b": 9_241_705_984, "gpt2": 124_439_808,
             "meta-llama/Llama-3.1-8B": 8_030_261_248, "google/gemma-3-270m": 268_098_176,
             "google/gemma-3-1b-pt": 999_885_952, "gemma-3-270m-q4": 268_098_176, "smollm2": 134_515_008}


def configured(name: str, shape: sizes.Shape) -> PreTrainedConfig:
    """transformers' configuration of a model with these sizes."""
    if name == "gpt2":
        return GPT2Config(n_layer=shape.layers, n_embd=shape.d, n_head=shape.heads, vocab_size=shape.vocabulary)
    kind = {"gemma-2": Gemma2Config, "gemma-3": Gemma3TextConfig}.get(name.removeprefix("google/")[:7], LlamaConfig)
    return kind(hidden_size=shape.d, intermediate_size=shape.ff, num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.d_head,
                vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied)


# ---- sizes ----

@pytest.mark.parametrize("name", sizes.SHAPES)
def test_parameters_as_published_and_as_transformers_counts_them(name: str) -> None:
    """Biases, positions and the norms of queries and keys are left out: less than 1%."""
    shape = sizes.SHAPES[name]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(configured(name, shape))
    counted = sum(each.numel() for each in made.parameters())
    assert counted == PUBLISHED[name]
    assert shape.parameters == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", sizes.SHAPES)
def test_sizes_are_read_from_a_configuration(name: str, tmp_path: Path) -> None:
    shape = sizes.SHAPES[name]
    configured(name, shape).save_pretrained(tmp_path)
    read = sizes.shape_of(presets.load("smoke", model=str(tmp_path)))
    assert read == dataclasses.replace(shape, bytes=read.bytes)


def test_widths_and_l0_by_name(tmp_path: Path) -> None:
    shape, preset = sizes.SHAPES["google/gemma-2-2b"], tiny.preset(site="blocks.1.hook_resid_post")
    told = {"gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_72": (2304, 65_536, 72, 4),
            "llama_scope_lxr_8x:l15r_8x": (2304, 8 * 2304, sizes.CODED, 2),
            "gpt2-small-res-jb-feature-splitting:blocks.8.hook_resid_pre_3072": (2304, 3072, sizes.CODED, 4),
            "train:4096x32": (2304, 4096, 32, 0), "artifact:smollm2-l15-w8192-k64": (2304, 8192, 64, 0)}
    assert {ref: dataclasses.astuple(sizes.sae_of(ref, preset, shape)) for ref in told} == told
    tiny.topk(48, 3).save_model(tmp_path / "own")
    assert sizes.sae_of(str(tmp_path / "own"), preset, shape).width == 48
    heads = sizes.sae_of("gemma-scope-2b-pt-att:layer_1/width_16k/average_l0_40",
                         tiny.preset(site="blocks.1.attn.hook_z"), shape)
    assert heads.d == 2048


# ---- operations, counted as they run ----

def opened(tmp_path: Path, made: Any, tokenizer: Any) -> tuple[presets.Preset, model.LoadedModel]:
    systems.save(made, tokenizer, tmp_path, torch.float32)
    preset = presets.load("smoke", model=str(tmp_path), dtype="float32", device="cpu", layer=0)
    return preset, model.load(preset)


@pytest.mark.parametrize("system", [systems.llama31, systems.gemma2, systems.gpt2])
@pytest.mark.parametrize("layers", [1, 3])
def test_operations_of_a_forward_pass(system: Any, layers: int, tmp_path: Path) -> None:
    """Counted by torch as the first layers run, with attention written out."""
    preset, loaded = opened(tmp_path, system(), systems.llama_tokenizer())
    loaded.bridge.original_model.set_attn_implementation("eager")
    tokens = np.random.default_rng(0).integers(5, 300, (2, 64)).astype(np.int32)
    with FlopCounterMode(display=False) as counter:
        model.capture(loaded, tokens, [f"blocks.{layers - 1}.hook_resid_post"])
    expected = tokens.size * sizes.shape_of(preset).forward(layers, 64)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("saes_", [1, 3])
def test_operations_of_a_survey(saes_: int, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    found = [tiny.loaded(f"train:{64 * 2**i}x4", tiny.topk(64 * 2**i, 4, seed=i)) for i in range(saes_)]
    refs = tiny.surveyed(monkeypatch, tiny.acts(), *found)
    preset = tiny.preset(saes=refs, contexts=60, context_length=57)  # 40 kept, as the toys have
    shape = sizes.Shape(2, tiny.D, 64, 2, 2, 8, 100)
    need = plan.Need(preset, shape, tuple(sizes.sae_of(ref, preset, shape) for ref in refs))
    assert need.kept == 2400
    with FlopCounterMode(display=False) as counter:
        survey.run(preset)
    assert counter.get_total_flops() == pytest.approx(need.survey, rel=0.3)


# ---- disk and memory, as a run leaves them ----

def test_a_real_run_takes_what_was_planned(own_cache: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    preset, loaded = opened(folder, systems.llama31(), systems.llama_tokenizer())
    text.write_text(" ".join(systems.TEXT))
    tiny.topk(96, 6, 32).save_model(tmp_path / "sae")
    preset = dataclasses.replace(preset, corpus=str(text), saes=(str(tmp_path / "sae"),), contexts=20, elsewhere={},
                                 context_length=64, default_sae="", site="blocks.1.hook_resid_post", on_error={})
    need = plan.of(preset)
    survey.run(preset, loaded=loaded)
    sizes = {part: sum(path.stat().st_size for path in (own_cache / part).rglob("*") if path.suffix in kinds)
             for part, kinds in (("activations", {".bf16"}), ("codes", {".i32", ".f32", ".npy"}),
                                 ("surveys", {".npy"}))}
    assert sum(sizes.values()) == pytest.approx(need.kept_on_disk, rel=0.1)
    assert sum(each.nbytes for each in loaded.bridge.original_model.parameters()) == pytest.approx(
        4 * need.shape.parameters, rel=0.01)
    state = saes.load(preset.saes[0], preset).sae.state_dict()
    assert sum(each.nbytes for each in state.values()) == pytest.approx(4 * need.saes[0].weights, rel=0.05)


# ---- what is said ----

@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_are_planned_without_a_hub(name: str, own_cache: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "opened", lambda *_, **__: pytest.fail("it asked for the model"))
    said = " ".join(plan.lines(presets.load(name), "h100"))
    assert all(word in said for word in ("download", "disk", "gpu", "memory", "on one h100"))
    assert "307,200 tokens read" in said


def test_more_work_takes_longer_and_a_faster_gpu_less() -> None:
    need = plan.of(presets.load("gemma-2-9b"))
    more = dataclasses.replace(need, preset=dataclasses.replace(need.preset, contexts=600))
    assert more.seconds(plan.GPUS["h100"]) == pytest.approx(2 * need.seconds(plan.GPUS["h100"]))
    assert need.seconds(plan.GPUS["h100"]) < need.seconds(plan.GPUS["a100"]) < need.seconds(plan.GPUS["t4"])


def test_what_does_not_fit_a_gpu_and_what_would(own_cache: Path) -> None:
    need = plan.of(presets.load("gemma-2-9b"))
    assert list(plan.troubles(need, 1e12, "h200")) == []
    small = " ".join(plan.troubles(need, 24e9, "l4"))
    assert "all SAEs at once do not fit the l4's 24.0 GB" in small and "with -p sae" in small
    given = int(small.split("give the ")[1].split()[0])
    fewer = sorted(need.saes, key=lambda each: each.weights)[:given]
    assert list(plan.troubles(dataclasses.replace(need, saes=tuple(fewer)), 24e9, "l4")) == []
    tiny_gpu = " ".join(plan.troubles(need, 10e9, "t4"))
    assert "the forward pass does not fit" in tiny_gpu and "batch_contexts: 1 (now 2)" in tiny_gpu


def test_a_run_that_will_not_fit_says_so_before_it_starts(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise DarkmatterError("it started")

    monkeypatch.setattr(survey, "run", stop)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**8))
    preset = presets.load("gemma-2-9b", device="cpu")
    with pytest.warns(UserWarning, match="WILL PROBABLY NOT FIT: the forward pass does not fit this machine"), \
            pytest.raises(DarkmatterError, match="it started"):
        decomposition.of(preset)


def test_a_disk_that_is_too_small(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = presets.load("smollm2", device="cpu")
    need = plan.of(preset)
    free = need.download + need.kept_on_disk / 2
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    said = " ".join(plan.troubles(need, 1e12))
    contexts = int(said.split("contexts: ")[1].split()[0])
    assert list(plan.troubles(plan.of(dataclasses.replace(preset, contexts=contexts)), 1e12)) == []


def test_the_command(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--preset", "gemma-2-9b", "--gpu", "a100"]) == 0
    assert "time      about" in capsys.readouterr().out
    assert cli.main(["plan", "--preset", "gemma-2-9b", "--gpu", "h1000"]) == 2
    assert "no datasheet for the GPU 'h1000'; there are h200, h100" in capsys.readouterr().err
    assert cli.main(["plan", "--preset", "smoke"]) == 0
    assert "here to survey 4 SAEs" in capsys.readouterr().out
