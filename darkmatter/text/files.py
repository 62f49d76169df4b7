"""A text of the reader's own: a text, .jsonl, .json, .csv or .parquet file, packed or not."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import cache
from ..errors import DarkmatterError
from .contexts import Picked, count, cut, first

if TYPE_CHECKING:
    from ..presets import Preset


GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"  # what a file packed by each begins with
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".csv": "csv",
         ".parquet": "parquet"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold and UTF-8 cannot


def evaluation(preset: Preset, tokenizer: Any) -> list[Picked]:
    """The file's first contexts; none crosses from one document to another.

    Raises DarkmatterError where the file cannot be read, or fills fewer than two contexts.
    """
    path, length = Path(preset.corpus).expanduser(), preset.context_length
    documents = ((f"{path.stem}/{name}", _enough(text, tokenizer, preset))
                 for name, text in _documents(path))
    picked = list(first(documents, preset.contexts))
    if not picked:
        raise DarkmatterError(f"{path} has no document that fills one context of {length} tokens; "
                              "give a longer text or a smaller context length.")
    if count(picked) < 2:
        raise DarkmatterError(
            f"{path} fills one context of {length} tokens, and at least two are needed (one to fit "
            "on, one to score); give a longer text or a smaller length.")
    return picked


def _enough(text: str, tokenizer: Any, preset: Preset) -> np.ndarray:
    """The contexts of a text, or of as much of it as fills one more than the preset asks for.

    Where a text is cut off its last token may be another; it lies in the context too many.
    """
    characters = 8 * (preset.contexts + 1) * preset.context_length
    while True:
        rows = cut(text[:characters], tokenizer, preset)
        if characters >= len(text) or len(rows) > preset.contexts:
            return rows
        characters *= 2


def identity(preset: Preset) -> str:
    """Changes with the files' bytes and the rule that they are read by.

    Raises DarkmatterError where there is no such file.
    """
    path = Path(preset.corpus).expanduser()
    if not path.exists():
        _decoded(path)  # which says so
    return f"{cache.fingerprint(path)}, {_kind(path)}"


def _kind(path: Path) -> str:
    """How a file is read, by its name without what packs it: one of KINDS, or one document."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return KINDS.get(Path(name).suffix, "one document")


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of the documents of a file, or of all files of a directory, by name."""
    if not path.is_dir():
        yield from _of_file(path)
        return
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        for name, text in _of_file(file):
            yield f"{file.relative_to(path)}/{name}", text


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    kind = _kind(path)
    if kind == "parquet":
        return _of_table(pd.read_parquet(path), path)
    text = _decoded(path)
    if not text.strip():
        raise DarkmatterError(f"{path} is empty; give a file with text in it.")
    if kind == "csv":
        return _of_table(pd.read_csv(io.StringIO(text)), path)
    if kind == "lines":
        array = ".json" in path.suffixes and text.lstrip().startswith("[")
        return _of_array(text, path) if array else _of_lines(text, path)
    return iter([("document", text)])


def _of_lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    # Only a line feed ends a line: splitlines would also cut inside JSON's strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line-{number}", _text_of(line, number, path)


def _of_table(table: pd.DataFrame, path: Path) -> Iterator[tuple[str, str]]:
    column = next((name for name in ("text", "content") if name in table), None)
    if column is None:
        raise DarkmatterError(f"{path} has no column 'text' or 'content'; it has "
                              f"{', '.join(map(str, table.columns[:10]))}.")
    for number, text in enumerate(table[column], 1):
        if isinstance(text, str):
            yield f"row-{number}", SURROGATE.sub("\ufffd", text)


def _of_array(text: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        entries = json.loads(text)
    except ValueError:
        raise DarkmatterError(f"{path} holds no whole JSON array; copy it again.") from None
    for number, entry in enumerate(entries, 1):
        yield f"entry-{number}", _text_in(entry, f"Entry {number} of {path}")


def _text_of(line: str, number: int, path: Path) -> str:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    return _text_in(document, f"Line {number} of {path}")


def _text_in(document: Any, place: str) -> str:
    """The text of one JSON object. Raises DarkmatterError, naming its place, where it has none."""
    text = None
    if isinstance(document, dict):
        text = document.get("text", document.get("content"))
    if not isinstance(text, str):
        raise DarkmatterError(f"{place} is not JSON with a \"text\" or a \"content\" field; every "
                              "line must be one document.")
    return SURROGATE.sub("\ufffd", text)


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw.startswith(GZIP):
            raw = gzip.decompress(raw)
        elif raw.startswith(ZSTD) or path.name.lower().endswith(".zst"):
            raw = _unpacked(raw, path)
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DarkmatterError(f"{path} cannot be read as gzip ({error}); fetch or pack it again."
                              ) from None
    except FileNotFoundError:
        raise DarkmatterError(
            f"There is no text file {path}; give 'mix', 'pile' or the path of a text file, or of a "
            ".jsonl or .jsonl.zst file with a document a line.") from None
    except UnicodeDecodeError as error:
        raise DarkmatterError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 "
                              "first.") from None


def _unpacked(raw: bytes, path: Path) -> bytes:
    """The content of a zstd file, which may be several frames one after another."""
    import zstandard

    text, reason = b"", "it ends too early"
    try:
        while raw:
            frame = zstandard.ZstdDecompressor().decompressobj()
            text += frame.decompress(raw)
            if not frame.eof:
                break
            raw = frame.unused_data
        else:
            return text
    except zstandard.ZstdError as error:
        reason = str(error)
    raise DarkmatterError(f"{path} cannot be read as zstd ({reason}); fetch or pack it again.")
