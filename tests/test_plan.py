"""The plan's formulas against what is: weights and operations counted, files on disk, memory."""

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
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from darkmatter import __main__ as cli
from darkmatter import decomposition, plan, presets, survey
from darkmatter.errors import DarkmatterError
from darkmatter.models import model
from darkmatter.saes import references
from tests import systems, tiny

PAPER = ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b", "gpt2-small", "gemma-3-270m", "gemma-3-1b")
PUBLISHED = {  # parameters; d, MLP, layers, heads, key-value heads, size of a head, vocabulary
    "google/gemma-2-2b": (2_614_341_888, 2304, 9216, 26, 8, 4, 256, 256_000),
    "google/gemma-2-9b": (9_241_705_984, 3584, 14_336, 42, 16, 8, 256, 256_000),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, 4096, 14_336, 32, 32, 8, 128, 128_256),
    "gpt2": (124_439_808, 768, 3072, 12, 12, 12, 64, 50_257),
    "google/gemma-3-270m": (268_098_176, 640, 2048, 18, 4, 1, 256, 262_144),
    "google/gemma-3-1b-pt": (999_885_952, 1152, 6912, 26, 4, 1, 256, 262_144),
    "gemma-3-270m-q4": (268_098_176, 640, 2048, 18, 4, 1, 256, 262_144),
    "smollm2": (134_515_008, 576, 1536, 30, 9, 3, 64, 49_152)}


def configured(name: str) -> PreTrainedConfig:
    """transformers' configuration of a model with the published sizes."""
    _, d, ff, layers, heads, kv_heads, d_head, vocabulary = PUBLISHED[name]
    if name == "gpt2":
        return GPT2Config(n_layer=layers, n_embd=d, n_head=heads, vocab_size=vocabulary)
    family = name.removeprefix("google/")[:7]
    kind = {"gemma-2": Gemma2Config, "gemma-3": Gemma3TextConfig}.get(family, LlamaConfig)
    return kind(hidden_size=d, intermediate_size=ff, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=d_head,
                vocab_size=vocabulary, tie_word_embeddings="Llama" not in name)


# ---- sizes ----

@pytest.mark.parametrize("name", plan.SHAPES)
def test_the_table_has_what_transformers_counts(name: str, tmp_path: Path) -> None:
    configured(name).save_pretrained(tmp_path)
    counted = plan.shape_of(presets.load("smoke", model=str(tmp_path)))
    assert plan.SHAPES[name] == counted._replace(bytes=plan.SHAPES[name].bytes)
    assert counted.parameters == PUBLISHED[name][0]


def test_widths_and_l0_by_name(tmp_path: Path) -> None:
    sizes = {"gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_72": (65_536, 72, 4),
             "llama_scope_lxr_8x:l15r_8x": (8 * 2304, plan.CODED, 2),
             "gpt2-small-res-jb-feature-splitting:blocks.8.hook_resid_pre_3072": (
                 3072, plan.CODED, 4),
             "train:4096x32": (4096, 32, 0), "artifact:smollm2-l15-w8192-k64": (8192, 64, 0)}
    assert {ref: plan.sae_of(ref, 2304) for ref in sizes} == sizes
    tiny.topk(48, 3).save_model(tmp_path / "own")
    assert plan.sae_of(str(tmp_path / "own"), 32).width == 48


def test_heads_are_joined_for_an_sae_on_attention() -> None:
    preset = tiny.preset(site="blocks.1.attn.hook_z", saes=("train:4096x40",))
    shape = plan.SHAPES["google/gemma-2-2b"]
    on_stream = plan.needed(dataclasses.replace(preset, site="blocks.1.hook_resid_post"), shape)
    assert plan.needed(preset, shape).survey_memory < on_stream.survey_memory


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
    site, tokens = f"blocks.{layers - 1}.hook_resid_post", np.random.default_rng(0).integers(
        5, 300, (2, 64)).astype(np.int32)
    with FlopCounterMode(display=False) as counter:
        model.capture(loaded, tokens, [site])
    preset = dataclasses.replace(preset, site=site, contexts=2, context_length=64, elsewhere={})
    expected = plan.needed(preset, plan.shape_of(preset)).forward
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("count", [1, 3])
def test_operations_of_a_survey(count: int, own_cache: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    saes = [tiny.loaded(f"train:{64 * 2**i}x4", tiny.topk(64 * 2**i, 4, seed=i))
            for i in range(count)]
    refs = tiny.surveyed(monkeypatch, tiny.acts(), *saes)
    preset = tiny.preset(saes=refs, contexts=60, context_length=57)  # 40 kept, as the toys have
    shape = plan.Shape(2, tiny.D, 16, 8192, 20_000, 4)
    with FlopCounterMode(display=False) as counter:
        survey.run(preset)
    expected = plan.needed(preset, shape).survey
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.3)


# ---- disk and memory, as a run leaves them ----

def test_a_real_run_takes_what_was_planned(own_cache: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    preset, loaded = opened(folder, systems.llama31(), systems.llama_tokenizer())
    text.write_text(" ".join(systems.TEXT))
    tiny.topk(96, 6, 32).save_model(tmp_path / "sae")
    preset = dataclasses.replace(
        preset, corpus=str(text), saes=(str(tmp_path / "sae"),), contexts=20, context_length=64,
        site="blocks.1.hook_resid_post", default_sae="", elsewhere={}, on_error={})
    shape = plan.shape_of(preset)
    need = plan.needed(preset, shape)
    survey.run(preset, loaded=loaded)
    kinds = {"activations": {".bf16"}, "codes": {".i32", ".f32", ".npy"}, "surveys": {".npy"}}
    left = sum(path.stat().st_size for part, suffixes in kinds.items()
               for path in (own_cache / part).rglob("*") if path.suffix in suffixes)
    assert left == pytest.approx(need.disk, rel=0.1)
    weights = loaded.bridge.original_model.parameters()
    assert sum(weight.nbytes for weight in weights) == pytest.approx(
        4 * shape.parameters, rel=0.01)
    state = references.load_sae(preset.saes[0], preset).sae.state_dict()
    moments = 8 * 32**2 * 5
    assert sum(weight.nbytes for weight in state.values()) == pytest.approx(
        need.survey_memory - moments - 12 * plan.DENSE, rel=0.05)


# ---- what is said ----

@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_are_planned_without_a_hub(name: str, own_cache: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "opened", lambda *_, **__: pytest.fail("it asked for the model"))
    plan_lines = " ".join(plan.lines(presets.load(name), "h100"))
    assert all(word in plan_lines for word in ("download", "disk", "memory", "on one h100"))
    assert "307,200 tokens read" in plan_lines


def test_more_work_takes_longer_and_a_faster_gpu_less(own_cache: Path) -> None:
    preset = presets.load("gemma-2-9b")
    shape = plan.shape_of(preset)
    once, twice = (plan.needed(dataclasses.replace(preset, contexts=contexts), shape)
                   for contexts in (300, 600))
    assert (twice.forward, twice.survey) == pytest.approx((2 * once.forward, 2 * once.survey))
    minutes = [next(line for line in plan.lines(preset, gpu) if line.startswith("time"))
               for gpu in ("h100", "a100", "t4")]
    taken = [float(line.split()[2]) * (60 if "hours" in line else 1) for line in minutes]
    assert taken[0] < taken[1] < taken[2]


def test_what_does_not_fit_a_gpu_and_what_would(own_cache: Path) -> None:
    preset = presets.load("gemma-2-9b", dtype="bfloat16")
    assert list(plan.troubles(preset, 1e12, "h200")) == []
    (small,) = plan.troubles(preset, 24e9, "l4")
    assert "all SAEs at once do not fit the l4's 24.0 GB" in small and "with -p sae" in small
    given = int(small.split("give the ")[1].split()[0])
    ordered = sorted(preset.saes, key=lambda ref: plan.sae_of(ref, 3584))
    for count in (given, given + 1):
        fewer = presets.load("gemma-2-9b", dtype="bfloat16", sae=",".join(ordered[:count]))
        assert bool(list(plan.troubles(fewer, 24e9, "l4"))) == (count > given)
    tiny_gpu = " ".join(plan.troubles(preset, 10e9, "t4"))
    assert "the forward pass does not fit" in tiny_gpu and "batch_contexts: 1 (now 2)" in tiny_gpu


def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey says that it started instead of running."""
    def stop(*_: object, **__: object) -> None:
        raise DarkmatterError("it started")

    monkeypatch.setattr(survey, "run", stop)


def test_a_run_that_will_not_fit_says_so_before_it_starts(own_cache: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    not_started(monkeypatch)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**8))
    preset = presets.load("gemma-2-9b", device="cpu")
    with pytest.warns(UserWarning, match="PROBABLY NOT FIT: the forward pass does not fit this "
                                         "machine"), \
            pytest.raises(DarkmatterError, match="it started"):
        decomposition.of_preset(preset)


def test_what_the_plan_cannot_read_ends_no_run(own_cache: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """An SAE's configuration that says nothing, and one that is not JSON."""
    not_started(monkeypatch)
    for text in ("{}", "not JSON"):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(DarkmatterError, match="it started"):
            decomposition.of_preset(presets.load("smollm2", sae=str(tmp_path)))


def test_a_disk_that_is_too_small(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = presets.load("smollm2", device="cpu")
    need = plan.needed(preset, plan.shape_of(preset))
    free = need.download + need.disk / 2
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    (trouble,) = plan.troubles(preset, 1e12)
    contexts = int(trouble.split("contexts: ")[1])
    assert list(plan.troubles(dataclasses.replace(preset, contexts=contexts), 1e12)) == []


def test_the_command(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--preset", "gemma-2-9b", "--gpu", "a100"]) == 0
    assert "time      about" in capsys.readouterr().out
    assert cli.main(["plan", "--preset", "gemma-2-9b", "--gpu", "h1000"]) == 2
    assert "no datasheet for the GPU 'h1000'; there are h200, h100" in capsys.readouterr().err
    assert cli.main(["plan", "--preset", "smoke"]) == 0
    assert "here to survey 4 SAEs" in capsys.readouterr().out
