"""Presets: what they resolve to, and the sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.presets import preset


def test_every_preset_of_the_package_is_valid() -> None:
    assert {"smollm2", "smoke"} <= set(preset.names())
    for name in preset.names():
        assert preset.load(name).name == name


def test_the_default_is_the_papers_size() -> None:
    default = preset.load("smollm2")
    assert (default.contexts, default.context_length) == (300, 1024)
    assert (default.kept[0], default.kept[-1]) == (200, 1022)
    assert default.contexts * len(default.kept) == 246_900
    assert default.default_sae in default.saes


@pytest.mark.parametrize(("length", "first"), [(1024, 200), (2048, 200),
                                               (512, 128), (256, 64), (40, 16)])
def test_first_kept_position(length: int, first: int) -> None:
    assert preset.load("smoke", context_length=length).first_kept == first


def test_overrides() -> None:
    changed = preset.load("smoke", layer=7, sae="train:64x4",
                          contexts=-1, corpus="", seed=3, bootstrap=None)
    assert changed.site == "blocks.7.hook_resid_post"
    assert changed.saes == ("train:64x4",)
    assert changed.default_sae == "train:64x4"
    assert (changed.contexts, changed.corpus, changed.seed) == (24, "mix", 3)


def test_a_yaml_file_is_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: some/dir\nsite: blocks.0.hook_mlp_out\nsaes: one\ntraining: {lr: 3e-4, grid: [[64, "
        "4]]}\n"
    )
    mine = preset.load(path)
    assert (mine.name, mine.saes, mine.default_sae) == ("mine", ("one",), "one")
    assert (mine.training.lr, mine.training.grid) == (3e-4, ((64, 4),))
    assert mine.fields()["training"]["grid"] == ((64, 4),)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"contxts": 3}, "unknown field 'contxts' (did you mean 'contexts'?)"),
        ({"training": {"gird": []}}, "unknown field 'training.gird' (did you mean 'grid'?)"),
        ({"contexts": 1.5}, "contexts is 1.5"),
        ({"contexts": 1}, "contexts is 1, but it should be greater than or equal to 2"),
        ({"contexts": "many"}, "contexts is 'many'"),
        ({"layer": -2}, "The layer is -2"),
        ({"layer": "last"}, "The layer is 'last'"),
        ({"saes": []}, "saes is []"),
        ({"default_sae": "other"}, "default_sae 'other' should be one of train:128x8"),
        ({"first_position": 255}, "leaves no position to keep"),
        ({"dtype": "int8"},
         "dtype is 'int8', but it should be 'auto', 'bfloat16', 'float16' or 'float32'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"site": "?"}, "site is '?'"),
        ({"fit_share": 1}, "fit_share is 1"),
        ({"training": {"lr": float("nan")}}, "training.lr is nan"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DarkmatterError) as told:
        preset.load("smoke", **overrides)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("model: [", "cannot be read"),
        ("- a", "field: value"),
        ("model: x\nsaes: y\n", "the field 'site' is missing"),
        (b"\xff\xfe\xfa", "cannot be read"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path: Path, text: str | bytes | None,
                                            sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DarkmatterError) as told:
        preset.load(path)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DarkmatterError,
                       match=r"no preset 'smolm2' \(did you mean 'smollm2'\?\).*smoke"):
        preset.load("smolm2")


def test_a_name_may_have_dots_and_a_file_spaces(tmp_path: Path) -> None:
    assert not presets.is_file("llama-3.1-8b") and presets.is_file("mine.yml")
    file = tmp_path / "my preset (2).yaml"
    file.write_text("model: smollm2\nsite: blocks.3.hook_resid_post\nsaes: ['train:64x4']\n")
    assert presets.load(file).name == "my-preset-2"


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text("model: ~/model\ncorpus: ~/text.txt\nsite: blocks.3.hook_resid_post\n"
                    "saes: ['train:64x4']\n")
    mine = presets.load("~/mine.yaml")
    assert (mine.model, mine.corpus) == (f"{tmp_path}/model", f"{tmp_path}/text.txt")
