"""The type a model runs in: measured, the same for all who ask, of no weight for the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darkmatter import cache, decomposition, plan, presets, survey
from darkmatter.book import execution, keys, records
from darkmatter.book.remaining import Line
from darkmatter.errors import DarkmatterError
from darkmatter.models import activations, model, precision
from tests import tiny

HOME = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.any_processor


@pytest.fixture(autouse=True)
def _own(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precision.ratio.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """A processor that takes so many times as long in bfloat16 as in float32."""
    monkeypatch.setattr(precision, "_measured", lambda: ratio)
    precision.ratio.cache_clear()


@pytest.mark.parametrize(("ratio", "fast"), [(0.3, "bfloat16"),
                                             (0.8, "bfloat16"), (0.81, "float32"), (6, "float32")])
def test_bfloat16_only_where_it_is_clearly_faster(ratio: float, fast: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, ratio)
    assert precision.fast("cpu") == getattr(torch, fast)
    assert model.dtype_of(tiny.preset(dtype="auto", device="cpu")) == fast
    assert model.dtype_of(tiny.preset(dtype="auto", device="cuda")) == "bfloat16"  # a GPU keeps it
    assert model.dtype_of(tiny.preset(dtype="float16")) == "float16"


def test_it_is_measured_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(precision, "_measured", lambda: counts.append(1) or 0.5)
    for _ in range(2):
        precision.ratio.cache_clear()  # as a second process would find it
        assert precision.ratio() == 0.5
    assert len(counts) == 1
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # another kind of machine
    precision.ratio.cache_clear()
    precision.ratio()
    assert len(counts) == 2


@pytest.mark.slow
def test_the_measurement_takes_well_under_a_second_and_finds_the_kernel(tmp_path: Path) -> None:
    """With AVX2 alone bfloat16 has no kernel, and takes longer than float32."""
    code = """
import json, sys, time
from darkmatter.models import precision
import torch
torch.ones(2, 2) @ torch.ones(2, 2)
begun = time.process_time()
ratio = precision._measured()
print(json.dumps([ratio, time.process_time() - begun, str(precision.fast("cpu"))]))
"""
    found: dict[str, Any] = {}
    for name, settings in {"here": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2",
                                                "ONEDNN_MAX_CPU_ISA": "AVX2"}}.items():
        inside = os.environ | settings | {"DARKMATTER_CACHE": str(tmp_path / name),
                                          "PYTHONPATH": str(HOME)}
        done = subprocess.run([sys.executable, "-c", code], env=inside,
                              capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    ratio, seconds, fast = found["avx2"]
    assert ratio > 1 and fast == "torch.float32"
    assert max(seconds, found["here"][1]) < 2, "seconds of all threads together"


def test_the_type_is_in_the_keys_and_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    text, preset = tiny.acts().text, tiny.preset(dtype="auto")
    source = HOME / "notebooks" / "02_norm.py"
    found = []
    for ratio in (0.3, 6):
        measured(monkeypatch, ratio)
        cache_key = activations.key(preset, tiny.SITE, text, 16)
        record = records.Record("02_norm", presets.load("smoke"), {}).finish()
        found.append((cache_key, keys.run_key(source, presets.load("smoke"), {}),
                      record["dtype"]))
        (cache.root() / "processor").rename(cache.root() / f"processor-{ratio}")
    assert all(one != other for one, other in zip(*found, strict=True))
    assert [dtype for *_, dtype in found] == ["bfloat16", "float32"]


def test_every_preset_that_ships_lets_the_machine_choose() -> None:
    """But GPT-2, whose weights and SAEs are float32."""
    types = {name: presets.load(name).dtype for name in presets.names()}
    assert types.pop("gpt2-small") == "float32"
    assert set(types.values()) == {"auto"}


def test_bfloat16_by_name_on_a_slow_processor_says_what_it_costs(
        monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 6.54)
    with pytest.warns(UserWarning,
                      match="needs 6.5 times as long as in float32; dtype: auto takes the faster"):
        model._warn_if_slow(tiny.preset(dtype="bfloat16"))


def test_a_device_that_is_not_there_gets_one_sentence() -> None:
    missing = "cuda:99"
    with pytest.raises(DarkmatterError,
                       match=f"asks for the device '{missing}', which this machine does not have"):
        model.load(presets.load("smoke", device=missing))
    with pytest.raises(DarkmatterError, match="device is 'tpu', but"):
        presets.load("smoke", device="tpu")


def test_a_plan_for_a_gpu_counts_on_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 6)
    preset = presets.load("smollm2")
    asked = list(plan.lines(presets.load("smollm2", dtype="bfloat16"), "h100"))
    assert list(plan.lines(preset, "h100")) == asked


@pytest.mark.slow
def test_a_survey_in_either_type_lies_inside_the_others_intervals() -> None:
    """A real model and a shipped SAE: what types round differently is small beside intervals."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        preset = decomposition.settings("smollm2", "blocks.15.hook_resid_post",
                                        "artifact:smollm2-l15-w1024-k32", "smollm2", 16, 256)
        with_type = presets.load("smollm2",
                                 **(preset.fields() | {"dtype": dtype, "batch_contexts": 4}))
        found[dtype] = tiny.metrics(survey.run(with_type), "smollm2-l15-w1024-k32")
    one, other = found["float32"], found["bfloat16"]
    assert not np.allclose(one.value.to_numpy(float), other.value.to_numpy(float),
                           rtol=1e-7), "they were two runs"
    for a, b in ((one, other), (other, one)):
        inside = (a.low <= b.value) & (b.value <= a.high) | a.low.isna()
        assert inside.all(), outside(a, b, inside)


def outside(a: Any, b: Any, inside: Any) -> str:
    """The metrics that lie outside."""
    return "\n".join(f"{name}: {b.value[name]} not in [{a.low[name]}, {a.high[name]}]"
                     for name in a.index[~inside])


@pytest.mark.slow
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in os.environ,
                    reason="the whole book is run by other tests")
def test_a_chapter_runs_on_any_processor(tmp_path: Path) -> None:
    """From the forward pass over training text to the record, SAEs trained on the way."""
    source, folder = HOME / "notebooks" / "02_norm.py", tmp_path / "run"
    line = Line("smoke", [(["02_norm"], 1)])
    execution.execute(source, folder, {"preset": "smoke"}, HOME, tmp_path / "records", line)
    record = json.loads((folder / "record.json").read_text())
    assert record["dtype"] == model.dtype_of(presets.load("smoke")) and len(record["metrics"]) > 10
