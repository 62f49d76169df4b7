"""What the tokens of a text depend on, and how files of any name and shape are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.text import contexts, corpus, files
from tests.text.test_corpus import tiny_tokenizer


def preset(path: Path, **fields: Any) -> presets.Preset:
    return presets.load("smoke", corpus=str(path), context_length=20, contexts=100, **fields)


def lines(*documents: dict[str, str]) -> str:
    return "\n".join(map(json.dumps, documents)) + "\n"


WORDS = " ".join(["alpha beta gamma"] * 40)


def names(path: Path) -> list[str]:
    return [name for name, _ in files.evaluation(preset(path), tiny_tokenizer())]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.json"])
def test_a_document_a_line_by_its_name_in_any_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(lines({"text": WORDS}, {"text": WORDS}))
    assert [source.split("/")[1] for source in names(path)] == ["line-1", "line-2"]


def test_the_same_bytes_under_another_name_are_another_text(tmp_path: Path) -> None:
    keys = []
    for name in ("a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_text(lines({"text": WORDS}))
        keys.append(files.identity(preset(path)))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("field", ["text", "content"])
def test_a_mark_at_the_beginning_and_a_content_field(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines({field: WORDS}, {field: WORDS}).encode())
    assert len(names(path)) == 2


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "alpha \\ud800 beta"}\n')
    ((_, text),) = files._documents(path)
    assert text == "alpha \ufffd beta"


def test_a_tokenizer_is_known_by_its_rules_and_special_tokens() -> None:
    plain, other = tiny_tokenizer(), tiny_tokenizer()
    assert corpus.identity_of(plain) == corpus.identity_of(other)
    other.add_special_tokens({"pad_token": next(iter(other.get_vocab()))})
    assert corpus.identity_of(plain) != corpus.identity_of(other)


def test_a_tokenizer_without_a_beginning_token_says_so(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    with pytest.warns(UserWarning, match="has no beginning-of-text token, so none is put"):
        rows = contexts.cut(WORDS, tokenizer, preset(path, prepend_bos=True))
    assert rows.shape[1] == 20 and (rows == contexts.cut(WORDS, tokenizer, preset(path))).all()


def pack(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def test_packed_files_tables_arrays_and_folders(tmp_path: Path) -> None:
    documents = [{"text": WORDS}, {"text": WORDS}]
    table = pd.DataFrame(documents)
    pack(tmp_path / "a.jsonl.gz", lines(*documents).encode())
    pack(tmp_path / "a.txt.gz", WORDS.encode())
    (tmp_path / "a.json").write_text(json.dumps(documents))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    counts = {path.name: len(names(path)) for path in sorted(tmp_path.iterdir())}
    assert counts == {"a.csv": 2, "a.json": 2, "a.jsonl.gz": 2, "a.parquet": 2, "a.txt.gz": 1}
    assert len(names(tmp_path)) == sum(counts.values())  # the folder is all of its files


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.csv", b"words\nalpha\n", "has no column 'text' or 'content'; it has words"),
    ("a.json", b'[{"text": "alpha"}, ', "holds no whole JSON array"),
    ("a.json", b'[{"text": "alpha"}, 3]', "Entry 2 of .* is not JSON with a"),
    ("a.txt.gz", gzip.compress(b"alpha " * 1000)[:40], "cannot be read as gzip"),
])
def test_what_cannot_be_read_is_told(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DarkmatterError, match=sentence):
        files.evaluation(preset(path), tiny_tokenizer())


def test_a_folder_is_known_by_all_of_its_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(WORDS)
    before = files.identity(preset(tmp_path))
    (tmp_path / "b.txt").write_text(WORDS + "!")
    assert files.identity(preset(tmp_path)) != before


def test_no_more_is_tokenised_than_is_asked_for(tmp_path: Path) -> None:
    """And it is what the whole text gives."""
    text = " ".join(f"{word} gamma" for word in ["alpha", "beta"] * 50_000)
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer, read = tiny_tokenizer(), list[int]()

    class Counting:
        bos_token_id = None

        def __call__(self, given: str, **options: Any) -> Any:
            read.append(len(given))
            return tokenizer(given, **options)

    asked = presets.load("smoke", corpus=str(path), context_length=20, contexts=7)
    ((_, rows),) = files.evaluation(asked, Counting())
    whole = contexts.cut(text, tokenizer, asked)
    assert (rows == whole[:7]).all() and len(whole) > 1000
    assert sum(read) < len(text) / 20
