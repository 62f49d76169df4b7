"""The paper's text, from a shard laid out as the hub's, read by the real streaming loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from datasets import config
from huggingface_hub import constants

from darkmatter.errors import DarkmatterError
from darkmatter.text import corpus, pile
from tests.text.test_corpus import of_file, tiny_tokenizer, words

LENGTH, DOCUMENTS = 20, 200


@pytest.fixture
def shard(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Documents of 1 to 40 words as train/00.jsonl.zst; a small shuffle buffer; no pauses."""
    texts = [words(1 + i % 40, start=i) for i in range(DOCUMENTS)]
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}) + "\n"
                    for text in texts)
    folder = tmp_path / "hub" / "train"
    folder.mkdir(parents=True)
    (folder / "00.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    monkeypatch.setattr(pile, "DATASET", str(folder.parent))
    monkeypatch.setattr(pile, "BUFFER", 30)
    monkeypatch.setattr(pile, "PAUSE", 0.0)
    return texts


def read(contexts: int) -> corpus.Corpus:
    return corpus.evaluation(of_file(Path("pile"), contexts=contexts, context_length=LENGTH),
                             tiny_tokenizer())


def test_documents_that_fill_a_context_are_cut_to_it(shard: list[str]) -> None:
    found, tokenizer = read(15), tiny_tokenizer()
    beginnings = {tuple(tokenizer(text)["input_ids"][:LENGTH])
                  for text in shard if len(text.split()) >= LENGTH}
    assert found.tokens.shape == (15, LENGTH)
    assert {tuple(row) for row in found.tokens.tolist()} <= beginnings
    assert len(found.sources) == len(set(found.sources)) == 15


def test_the_order_is_that_of_a_shuffled_stream(shard: list[str]) -> None:
    from datasets import load_dataset

    stream = load_dataset(pile.DATASET, split="train", streaming=True)
    shuffled = stream.shuffle(seed=42, buffer_size=30)
    long = [row["text"] for row in shuffled if len(row["text"].split()) >= LENGTH][:15]
    tokenizer = tiny_tokenizer()
    assert read(15).tokens.tolist() == [tokenizer(text)["input_ids"][:LENGTH] for text in long]


@pytest.mark.parametrize("dies", [(7,), (3, 40), (1, 2, 3)])
def test_a_stream_that_dies_is_taken_up_where_it_was(shard: list[str],
                                                     dies: tuple[int, ...], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(25).tokens
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "other"))
    documents, left = pile._documents, list(dies)

    def dying(skip: int) -> Iterator[str]:
        after = left.pop(0) if left else None
        for i, text in enumerate(documents(skip)):
            if i == after:
                raise ConnectionError("the line went dead")
            yield text

    monkeypatch.setattr(pile, "_documents", dying)
    assert np.array_equal(read(25).tokens, whole)


def test_more_contexts_extend_what_is_there(shard: list[str]) -> None:
    first = read(10).tokens
    assert np.array_equal(read(20).tokens[:10], first)


def test_no_hub_and_too_few_documents_get_one_sentence(shard: list[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DarkmatterError,
                       match=r"has 105 documents that fill 20 tokens, and 150 are asked for"):
        read(150)
    monkeypatch.setattr(pile, "DATASET", "nobody/nothing")
    monkeypatch.setattr(pile, "TRIES", 1)
    for switch in (config, constants):
        monkeypatch.setattr(switch, "HF_HUB_OFFLINE", True)
    with pytest.raises(DarkmatterError, match="cannot be streamed from the hub") as told:
        read(5)
    assert "\n" not in str(told.value)
