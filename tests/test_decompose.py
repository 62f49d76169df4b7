"""``decompose``: which preset it runs, the keys it promises, and the command on the real model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from darkmatter import __main__ as cli
from darkmatter import decomposition as room
from darkmatter import presets
from darkmatter.errors import DarkmatterError
from tests import tiny

VECTORS = ["x", "sae", "error", "linear", "nonlinear"]
METRICS = ["l0", "dead_share", "fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm"]
SITE = "blocks.2.hook_resid_post"


def settings(model: str = "smoke", corpus: str = "smoke", **fields: Any) -> presets.Preset:
    return room.settings(model, SITE, "release:id", corpus, **fields)


# ---- settings ----

def test_a_named_preset_gives_its_model_and_its_text() -> None:
    preset, smoke = settings(), presets.load("smoke")
    changed = {"name", "site", "saes", "default_sae", "elsewhere", "on_error"}
    kept = {name: value for name, value in smoke.fields().items() if name not in changed}
    assert kept == {name: preset.fields()[name] for name in kept}
    assert (preset.site, preset.saes, preset.default_sae) == (SITE, ("release:id",), "release:id")


def test_contexts_and_their_length_may_be_given() -> None:
    preset = settings(contexts=60, context_length=128)
    assert (preset.contexts, preset.context_length, preset.first_kept) == (60, 128, 32)


def test_another_model_starts_each_context_with_its_token() -> None:
    preset = settings(model="google/gemma-2-2b")
    assert preset.model == "google/gemma-2-2b" and preset.prepend_bos
    assert preset.contexts == presets.load("smoke").contexts  # the text is still smoke's
    assert preset.corpus == "mix"
    assert not settings().prepend_bos


def test_a_file_or_the_pile_is_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    assert settings(corpus=str(text)).corpus == str(text)
    assert settings(corpus="pile").corpus == "pile"
    neither = settings(model=str(tmp_path), corpus="pile")
    assert (neither.model, neither.corpus) == (str(tmp_path), "pile")
    assert (neither.contexts, neither.context_length) == (300, 1024)  # as in the paper


def test_a_model_directory_that_is_not_there() -> None:
    with pytest.raises(DarkmatterError, match="There is no model directory /no/such/model"):
        settings(model="/no/such/model")


@pytest.mark.parametrize("fields", [{"contexts": 1}, {"context_length": 3}])
def test_settings_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(DarkmatterError, match=next(iter(fields))):
        settings(**fields)


# ---- the result ----

@pytest.fixture
def tiny_world(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    tiny.surveyed(monkeypatch, tiny.acts(), tiny.loaded("toy", tiny.topk()),
                  tiny.formula("identity", lambda x: x.clone()))


def check(result: dict[str, Any]) -> None:
    """The keys are the design's, every number is finite, and every interval holds its value."""
    assert list(result) == [*METRICS, "norm_test", "n_fit", "n_eval", "intervals", "notes",
                            "settings", "provenance"]
    assert list(result["norm_test"]) == VECTORS
    ends = result["intervals"]
    assert set(ends) == {*METRICS, "norm_test"} and list(ends["norm_test"]) == VECTORS
    assert ends["dead_share"] is None, "a count has no interval"
    pairs = [(result[name], ends[name]) for name in METRICS if name != "dead_share"]
    pairs += [(result["norm_test"][name], ends["norm_test"][name]) for name in VECTORS]
    for value, (low, high) in pairs:
        assert all(map(math.isfinite, (value, low, high))) and low <= value <= high
    assert 0 <= result["dead_share"] <= 1 and "dead_share" in result["notes"]
    assert result["n_fit"] > result["n_eval"] > 0


def test_json_keys(tiny_world: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "smoke", "--site", SITE, "--sae", "toy", "--corpus", "smoke"]
    assert cli.main(["decompose", *words, "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    check(result)
    assert result["n_fit"] + result["n_eval"] == 2400
    assert result["settings"]["saes"] == ["toy"] and result["provenance"]["versions"]
    shown = " ".join(capsys.readouterr().out.split())
    assert f"FVU {result['fvu']:.3f} [{result['intervals']['fvu'][0]:.3f}, " in shown
    assert all(f"norm test of {name}" in shown for name in VECTORS)


def test_what_is_undefined_is_null_with_its_reason(
    tiny_world: None, capsys: pytest.CaptureFixture[str]
) -> None:
    result = room.decompose("smoke", SITE, "identity", "smoke")
    assert result["fvu"] == 0
    undefined = ("r2_vector", "r2_vector_weighted", "r2_norm")
    for name in undefined:
        assert result[name] is None and result["intervals"][name] is None
        assert "no variance" in result["notes"][name]
    assert result["norm_test"]["error"] is None
    assert result["intervals"]["norm_test"]["error"] is None
    assert result["norm_test"]["x"] is not None
    json.dumps(result, allow_nan=False)
    assert "R² of the squared error norm – –" in " ".join(cli.table(result).split())


@pytest.mark.slow
def test_decompose_on_the_real_model(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--model", "smoke", "--site", SITE, "--sae", "train:128x8", "--corpus", "smoke",
             "--json", str(out)]
    assert cli.main(["decompose", *words]) == 0
    result = json.loads(out.read_text())
    check(result)
    assert 0 < result["fvu_nonlinear"] < result["fvu"] < 1 and result["l0"] <= 8
    smoke = presets.load("smoke")
    most = smoke.contexts * len(smoke.kept)
    assert 0.9 * most < result["n_fit"] + result["n_eval"] <= most
