"""Activations on disk: what is kept, written once, gone on with after a cut, mended if damaged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from darkmatter import cache
from darkmatter.models import activations, model
from darkmatter.models.activations import Activations
from darkmatter.text import corpus
from tests import tiny

CONTEXTS, LENGTH, D, SPECIAL = 40, 64, 8, 0
PRESET = tiny.preset(contexts=CONTEXTS, context_length=LENGTH, batch_contexts=3)
SITES = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]


class Cut(BaseException):
    """The power goes."""


def activation(tokens: np.ndarray) -> torch.Tensor:
    """The toy model's site: float32 [context, position, D], a function of token and position."""
    position = tokens.shape[1]
    of_token = torch.as_tensor(tokens, dtype=torch.float32)[..., None] * torch.linspace(0.1, 1, D)
    return of_token + torch.arange(position)[:, None] / 7


@pytest.fixture
def text(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> corpus.Corpus:
    tokens = np.random.default_rng(0).integers(SPECIAL, 50, (CONTEXTS, LENGTH)).astype(np.int32)
    text = corpus.Corpus(tokens, np.arange(CONTEXTS, dtype=np.int32),
                         tuple(f"plays/{i}" for i in range(CONTEXTS)))
    monkeypatch.setattr(corpus, "evaluation", lambda preset, tokenizer: text)
    monkeypatch.setattr(corpus, "training", lambda preset, tokenizer, contexts: text)
    return text


@pytest.fixture
def captured(text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the model; fills with the number of contexts of each forward pass."""
    passes: list[int] = []

    def capture(loaded: object, tokens: np.ndarray, sites: list[str]) -> dict[str, torch.Tensor]:
        passes.append(len(tokens))
        return {sites[0]: activation(tokens)}

    monkeypatch.setattr(model, "capture", capture)
    monkeypatch.setattr(model, "check_limits", lambda *_: None)
    return passes


def evaluation(**fields: Any) -> Activations:
    loaded: Any = SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[SPECIAL]))
    return activations.evaluation(tiny.preset(**(PRESET.fields() | fields)), loaded)


def test_kept_tokens_and_their_places(text: corpus.Corpus, captured: list[int]) -> None:
    acts = evaluation()
    positions = np.arange(LENGTH)
    keep = (positions >= 16) & (positions < LENGTH - 1) & (text.tokens != SPECIAL)
    context, position = np.nonzero(keep)
    np.testing.assert_array_equal(acts.context, context)
    np.testing.assert_array_equal(acts.position, position)
    assert acts.x.dtype == torch.bfloat16 and acts.x.shape == (keep.sum(), D)
    assert torch.equal(acts.x, activation(text.tokens)[torch.from_numpy(keep)].bfloat16())
    assert np.array_equal(np.diff(acts.starts), keep.sum(1)) and acts.starts[-1] == len(acts.x)
    assert sum(captured) == CONTEXTS and max(captured) == PRESET.batch_contexts


def test_a_context_without_a_kept_token(text: corpus.Corpus, captured: list[int]) -> None:
    text.tokens[5] = SPECIAL
    acts = evaluation()
    assert np.diff(acts.starts)[5] == 0 and len(acts.starts) == CONTEXTS + 1
    assert not (acts.context == 5).any()


def test_training_keeps_all_positions_but_the_first(captured: list[int]) -> None:
    loaded: Any = SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[SPECIAL]))
    acts = activations.training(tiny.preset(**(PRESET.fields() | {"first_position": 40})), loaded)
    assert acts.position.min() == activations.TRAIN_FIRST and acts.position.max() == LENGTH - 2


def test_a_second_call_reads_the_file(captured: list[int]) -> None:
    first = evaluation()
    passes = len(captured)
    again = evaluation()
    assert len(captured) == passes and torch.equal(first.x, again.x) and first.key == again.key


@pytest.mark.parametrize("fields", [{"site": "blocks.1.hook_resid_post"},
                                    {"model": "other"}, {"dtype": "float16"},
                                    {"first_position": 20}], ids=lambda fields: next(iter(fields)))
def test_what_the_activations_depend_on_is_in_their_key(fields: dict[str, Any],
                                                        captured: list[int]) -> None:
    assert evaluation().key != evaluation(**fields).key


def test_centred_activations_lie_beside_the_others(captured: list[int]) -> None:
    plain, centred = evaluation(), evaluation(centre=True)
    assert centred.key != plain.key
    x = activation(centred.text.tokens)[centred.context, centred.position]
    torch.testing.assert_close(centred.x.float(), x - x.mean(-1, keepdim=True),
                               rtol=1e-2, atol=1e-2)


def test_reading_does_not_write(captured: list[int]) -> None:
    acts = evaluation()
    acts.x[0] = 7
    assert not (evaluation().x[0] == 7).any()


def test_gone_on_with_after_a_cut(text: corpus.Corpus, captured: list[int],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.capture

    def cut(loaded: Any, tokens: np.ndarray, sites: list[str]) -> dict[str, torch.Tensor]:
        if sum(captured) >= 20:
            raise Cut
        return whole(loaded, tokens, sites)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(model, "capture", cut)
        evaluation()
    (file,) = cache.root().glob("activations/*/x.bf16")
    with file.open("ab") as half_written:
        half_written.write(b"what the block that was cut off had written")
    captured.clear()
    acts = evaluation()
    assert sum(captured) == CONTEXTS - activations.BLOCK  # the first block was finished
    keep = model.kept(SimpleNamespace(all_special_ids=[SPECIAL]), text.tokens, 16)
    assert torch.equal(acts.x, activation(text.tokens)[torch.from_numpy(keep)].bfloat16())


def test_a_damaged_file_is_made_again(captured: list[int]) -> None:
    first = evaluation().x.clone()
    (file,) = cache.root().glob("activations/*/x.bf16")
    content = bytearray(file.read_bytes())
    content[1000] ^= 64
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged; it was removed and is made again"):
        assert torch.equal(evaluation().x, first)


def test_several_sites_from_one_forward_pass(text: corpus.Corpus,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of sites of different widths are those made one site at a time, cut off or not."""
    passes: list[list[str]] = []

    def capture(loaded: object, tokens: np.ndarray, sites: list[str]) -> dict[str, torch.Tensor]:
        passes.append(list(sites))
        if len(passes) == 5:
            raise Cut
        return {site: activation(tokens)[..., :4 + i] * (1 + i)
                for i, site in enumerate(SITES) if site in sites}

    monkeypatch.setattr(model, "capture", capture)
    monkeypatch.setattr(model, "check_limits", lambda *_: None)
    loaded: Any = SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[SPECIAL]))
    with pytest.raises(Cut):
        activations.evaluations(PRESET, SITES[:1], loaded)
    found = activations.evaluations(PRESET, SITES, loaded)
    assert all(sites == SITES for sites in passes[5:])
    keep = text.tokens[:, PRESET.kept.start:-1] != SPECIAL
    rows = activation(text.tokens)[:, PRESET.kept.start:-1][torch.from_numpy(keep)]
    for i, site in enumerate(SITES):
        expected = rows[:, :4 + i] * (1 + i)
        torch.testing.assert_close(found[site].x, expected.bfloat16())
    before = len(passes)
    assert torch.equal(activations.evaluations(PRESET, SITES[1:], loaded)[SITES[1]].x,
                       found[SITES[1]].x)
    assert len(passes) == before
