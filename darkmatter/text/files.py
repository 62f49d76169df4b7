"""A text of the reader's own: a text file, or .jsonl and .jsonl.zst with a document a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import cache
from ..errors import DarkmatterError
from .contexts import Picked, count, cut, first

if TYPE_CHECKING:
    from ..presets import Preset


ZSTD = b"\x28\xb5\x2f\xfd"  # what a file packed by zstd begins with
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold and UTF-8 cannot


def evaluation(preset: Preset, tokenizer: Any) -> list[Picked]:
    """The file's first contexts; none crosses from one document to another.

    Raises DarkmatterError where the file cannot be read, or fills fewer than two contexts.
    """
    path, length = Path(preset.corpus).expanduser(), preset.context_length
    documents = ((f"{path.stem}/{name}", cut(text, tokenizer, preset))
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


def identity(preset: Preset) -> str:
    """Changes with the file's bytes and the rule that they are read by.

    Raises DarkmatterError where there is no such file.
    """
    path = Path(preset.corpus).expanduser()
    rule = "a document a line" if _of_lines(path) else "one document"
    return f"{cache.sha256(path)}, {rule}" if path.is_file() else _decoded(path)


def _of_lines(path: Path) -> bool:
    """Whether a file has a document a line, as its name says."""
    return path.name.lower().removesuffix(".zst").endswith((".jsonl", ".ndjson", ".json"))


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    text = _decoded(path)
    if not text.strip():
        raise DarkmatterError(f"{path} is empty; give a file with text in it.")
    if not _of_lines(path):
        yield "document", text
        return
    # Only a line feed ends a line: splitlines would also cut inside JSON's strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line-{number}", _text_of(line, number, path)


def _text_of(line: str, number: int, path: Path) -> str:
    try:
        document = json.loads(line)
        text = document.get("text", document.get("content"))
    except (ValueError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise DarkmatterError(f"Line {number} of {path} is not JSON with a \"text\" or a "
                              "\"content\" field; every line must be one document.")
    return SURROGATE.sub("\ufffd", text)


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
        packed = raw.startswith(ZSTD) or path.name.lower().endswith(".zst")
        return (_unpacked(raw, path) if packed else raw).decode("utf-8-sig")
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
