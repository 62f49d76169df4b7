"""One choice at a time: a variant is the survey of its preset; a record is of its own preset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from darkmatter import survey
from darkmatter.experiments import variants
from darkmatter.models import activations
from darkmatter.models.activations import Activations
from darkmatter.presets import Preset
from darkmatter.saes import references
from tests import tiny


@pytest.fixture(autouse=True)
def stubs(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that follow the number of contexts, seed and precision; one SAE by its name."""

    def evaluation(preset: Preset, loaded: object = None) -> Activations:
        found = tiny.acts(contexts=preset.contexts, seed=preset.seed)
        if preset.dtype == "float32":
            noise = torch.randn(found.x.shape, generator=torch.Generator().manual_seed(1))
            found = tiny.acts(found.x.float() + 2 * noise, contexts=preset.contexts)
        return found

    monkeypatch.setattr(activations, "evaluation", evaluation)
    monkeypatch.setattr(references, "load_sae", lambda ref, preset: tiny.loaded(ref, tiny.topk()))
    monkeypatch.setattr(variants, "SENSITIVITY", tmp_path / "sensitivity.json")


def test_each_variant_changes_one_choice() -> None:
    base = tiny.preset()
    found = variants.choices(base)
    assert next(iter(found.values())) == {}
    assert all(len(fields) == 1 for fields in list(found.values())[1:])
    for fields in list(found.values())[1:]:
        (name,) = fields
        assert getattr(replace(base, **fields), name) != getattr(base, name)


def test_a_variant_is_the_survey_of_its_preset() -> None:
    base = tiny.preset(dtype="bfloat16")
    rows = variants.sensitivity(base).set_index(["variant", "protocol"])
    assert list(rows.loc["as in the book"].index) == ["strict", "paper", "authors-code"]
    assert set(rows.index.get_level_values("variant")) == set(variants.choices(base))
    for variant, fields in variants.choices(base).items():
        alone = survey.run(replace(base, **fields)).rows.set_index("metric").value
        for metric in variants.CHOSEN:
            measured = rows.loc[(variant, "strict"), metric]
            assert measured == pytest.approx(alone[metric], nan_ok=True)
    first = rows.loc[("as in the book", "strict")]
    assert first.fvu_low < first.fvu < first.fvu_high
    noisy = rows.loc[("the model in float32", "strict"), "fvu"]
    assert noisy > first.fvu_high, "noise was planted there"
    assert rows.loc[("half of the contexts", "strict"), "fvu_n"] < 0.6 * first.fvu_n


def test_the_file_is_read_back_for_its_own_preset_and_sae_alone() -> None:
    base = tiny.preset()
    variants.collect_sensitivity(base)
    stored = variants.recorded_sensitivity(base)
    assert set(stored.variant) == set(variants.choices(base))
    assert stored.recorded.str.fullmatch(r"\d{4}-\d\d-\d\d").all(), "a record is dated"
    other = variants.recorded_sensitivity(replace(base, name="another"))
    assert set(other.variant) == {"as in the book"}
    assert other.protocol.tolist() == ["strict", "paper", "authors-code"]
    assert stored.fvu.iloc[0] == pytest.approx(other.fvu.iloc[0])
