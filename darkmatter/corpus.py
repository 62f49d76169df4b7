"""Text to contexts: tokens [context, position] of exactly one length, each context with its source document.

A *source* is the unit that never lies on both sides of a split: a play, a book of scripture, a file, a service's
reference, or a run of short pieces (news articles, dictionary entries) long enough to fill contexts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import cache, pile
from .errors import DarkmatterError
from .library import EXTRA, MIX, Domain, installed
from .preset import Preset
from .repeats import Runs

HELD_OUT = 300  # contexts of the built-in mix that are measured on and never trained on
MAX_CONTEXTS_A_SOURCE = 3  # of the evaluation text: many sources, so that intervals over sources mean something
RUN = 32  # tokens: a training context with a run of this length out of the evaluation text is dropped

ORDER = (("prose",), ("drama", "reference prose"), ("code",))  # the kinds that a large training text is filled up from

Picked = list[tuple[str, np.ndarray]]  # (source 'domain/name', its windows int32 [n, position])


@dataclass(frozen=True)
class Corpus:
    """Contexts ready for the model."""

    tokens: np.ndarray
    """int32 [context, position]."""
    source: np.ndarray
    """int32 [context]: index into ``sources``."""
    sources: tuple[str, ...]
    """Name of each source, 'domain/name'."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Of a training text: contexts of each domain left out because they repeat evaluation text (``overlap``)."""

    @property
    def domains(self) -> list[str]:
        """Domain of each context."""
        return [self.sources[i].split("/", 1)[0] for i in self.source]

    @property
    def digest(self) -> str:
        """sha256 of the token matrix: the same on every machine."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes()).hexdigest()

    def first(self, contexts: int | None) -> Corpus:
        """Its first contexts alone; None: all."""
        return replace(self, tokens=self.tokens[:contexts], source=self.source[:contexts])


def evaluation(preset: Preset, tokenizer: Any) -> Corpus:
    """The contexts that the preset evaluates on, cached by everything that determines them."""
    return _cached(preset, tokenizer, "evaluation", preset.contexts)


def training(preset: Preset, tokenizer: Any, contexts: int) -> Corpus:
    """``contexts`` contexts for SAE training, in shuffled order, from sources that ``evaluation`` never uses.

    Each domain gives its share of the mix where it has that much; what is missing comes from the domains with text
    left, English prose first and code last, ``library.EXTRA`` among them (see ``rooms``). No context has a run of
    ``RUN`` tokens in common with the evaluation text, unless the recipe says not ``clear``: then it is the mix's shares
    and nothing else. A DarkmatterError says how much there is when it is not enough,
    which package is missing, and that only the built-in mix has a training side.
    """
    if preset.corpus != "mix":
        raise DarkmatterError("SAEs are trained on the built-in text only: set corpus to 'mix' to train.")
    return _cached(preset, tokenizer, "training" if preset.training.clear else "plain", contexts)


def overlap(train: Corpus, held: Corpus, runs: Collection[int] = (RUN, 13)) -> pd.DataFrame:
    """By domain of the training text: its contexts, those dropped, and for each length of run the share of its runs
    of so many tokens that occur anywhere in ``held`` ('shared 32' is 0 by construction)."""
    domains = np.array(train.domains)
    table = pd.DataFrame(index=pd.Index(dict.fromkeys(sorted(train.domains)), name="domain"))
    table["contexts"] = [int((domains == name).sum()) for name in table.index]
    table["dropped"] = [train.dropped.get(str(name), 0) for name in table.index]
    for run in runs:
        known = Runs(held.tokens, run)
        found = [known.among(train.tokens[domains == name]) for name in table.index]
        table[f"shared {run}"] = [float(each.mean()) if each.size else 0.0 for each in found]
    return table


def _cached(preset: Preset, tokenizer: Any, side: str, contexts: int) -> Corpus:
    key = cache.key(text=_identity(preset.corpus, side), side="training" if side == "plain" else side,
                    contexts=contexts, length=preset.context_length, seed=preset.seed, bos=preset.prepend_bos,
                    vocabulary=sorted(tokenizer.get_vocab().items()), version=2 if side == "training" else 1)
    path = cache.root() / "tokens" / f"{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = _build(preset, tokenizer, side, contexts)
            cache.save_arrays(path, **arrays)
    dropped = json.loads(arrays["dropped"].tobytes()) if "dropped" in arrays else {}
    return Corpus(arrays["tokens"], arrays["source"], tuple(json.loads(arrays["sources"].tobytes())), dropped)


def _build(preset: Preset, tokenizer: Any, side: str, contexts: int) -> dict[str, np.ndarray]:
    if preset.corpus == "mix" and (preset.contexts > HELD_OUT or preset.context_length > 1024):
        raise DarkmatterError(
            f"The built-in text sets {HELD_OUT} contexts of 1,024 tokens apart to measure on; SAEs were trained on the "
            f"rest: {preset.contexts} contexts of {preset.context_length} are too much. Ask for less, or give a file.")
    dropped: dict[str, int] = {}
    if side == "training":
        picked, dropped = _for_training(preset, tokenizer, contexts)
    else:
        mix = partial(_by_share, side == "plain")
        pick = {"mix": mix, "pile": _from_pile}.get(preset.corpus, _from_file)
        picked = list(pick(preset, tokenizer, contexts))
    tokens = np.concatenate([windows for _, windows in picked])
    owner = np.repeat(np.arange(len(picked), dtype=np.int32), [len(windows) for _, windows in picked])
    order = np.random.default_rng(preset.seed).permutation(len(tokens)) if preset.corpus == "mix" else slice(None)
    arrays = {"tokens": tokens[order], "source": owner[order], "sources": _packed([name for name, _ in picked])}
    return arrays | ({"dropped": _packed(dropped)} if side == "training" else {})


def _packed(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


# ---- the built-in text: what is measured on -----------------------------------------------------------------------

def _by_share(train: bool, preset: Preset, tokenizer: Any, contexts: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each domain's share of the contexts, from its first evaluation sources or its first training sources.

    For training from at least 16 sources where they are long enough; runs in common with evaluation text are left in.
    """
    ask = "fewer distinct_tokens, or set clear" if train else "fewer contexts"
    for name, room in quotas(_shares(), contexts).items():
        taken, most = 0, max(20, -(-room // 16))
        for trained, source, windows in _sides(name, preset, tokenizer):
            if taken == room or (trained and not train):
                break
            if train and not trained:
                continue
            chosen = (_spread(windows, most) if train else windows)[:room - taken]
            taken += len(chosen)
            if len(chosen):
                yield f"{name}/{source}", chosen
        if taken < room:
            raise DarkmatterError(f"The '{name}' part of the built-in text fills {taken} of the {room} contexts "
                                  f"asked of it; ask for {ask}.")


def _sides(name: str, preset: Preset, tokenizer: Any) -> Iterator[tuple[bool, str, np.ndarray]]:
    """(is it for training, source, windows) of a domain: evaluation has the first sources, training all others.

    Where the one ends does not depend on how much a preset asks for: no SAE sees evaluation text.
    """
    used, held_out = 0, quotas(_shares(), HELD_OUT).get(name, 0)
    for source, text in _ordered(name, (MIX | EXTRA)[name]):
        windows = _windows(text, tokenizer, preset)
        if trained := used >= held_out:
            yield trained, source, windows
        else:
            windows = _spread(windows, MAX_CONTEXTS_A_SOURCE)[:held_out - used]
            used += len(windows)
            yield trained, source, windows


def _shares() -> dict[str, float]:
    return {name: domain.share for name, domain in MIX.items()}


def quotas(shares: Mapping[str, float], contexts: int) -> dict[str, int]:
    """Whole contexts a domain, by largest remainder, so that they add up exactly."""
    exact = {name: share * contexts for name, share in shares.items()}
    whole = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: whole[n] - exact[n])[:contexts - sum(whole.values())]:
        whole[name] += 1
    return whole


def _spread(windows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the windows, evenly spaced over the source."""
    return windows[np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)]


def _ordered(name: str, domain: Domain) -> Iterator[tuple[str, str]]:
    """A domain's sources in the order of their names' hashes, the same for every preset and seed."""
    def rank(source: tuple[str, str]) -> str:
        return hashlib.sha256(f"{name}/{source[0]}".encode()).hexdigest()

    return _without_repeats(sorted(domain.sources(), key=rank))


def _without_repeats(sources: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
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


# ---- the built-in text: what SAEs are trained on ------------------------------------------------------------------

def _for_training(preset: Preset, tokenizer: Any, contexts: int) -> tuple[Picked, dict[str, int]]:
    """The training contexts by source, and how many of each domain repeat evaluation text and were left out."""
    stock = {name: _Stock(_sides(name, preset, tokenizer)) for name in MIX}
    known = Runs(np.concatenate([windows for each in stock.values() for windows in each.held]), RUN)
    most, wanted = _most_a_source(contexts), quotas(_shares(), contexts)
    for name, each in stock.items():
        each.fill(known, most, wanted[name])
    if any(each.have(most) < wanted[name] for name, each in stock.items()):
        stock |= {name: _Stock(_sides(name, preset, tokenizer)) for name in EXTRA}
        for each in stock.values():
            each.fill(known, most)
        wanted = _filled(stock, contexts)
    if sum(wanted.values()) < contexts:
        raise DarkmatterError(
            f"The built-in text fills at most {_maximum(stock, contexts):,} training contexts of "
            f"{preset.context_length:,} tokens with no domain above a third, and {contexts:,} were asked for; ask for "
            "fewer distinct_tokens.")
    picked = [(f"{name}/{source}", windows) for name, each in stock.items()
              for source, windows in each.take(wanted.get(name, 0), most)]
    return picked, {name: each.dropped for name, each in stock.items()}


def rooms(wanted: Mapping[str, int], have: Mapping[str, int], groups: Iterable[Collection[str]],
          contexts: int) -> dict[str, int]:
    """Contexts of each domain in a training text of ``contexts``: ``wanted``, or all a domain has where that is less.

    Each context that is then missing comes from the domain that has the fewest so far, of the first of the ``groups``
    (names of domains) that has any left. Nothing is added to a domain that has a third of the text. The numbers add up
    to less than ``contexts`` when there is not enough.
    """
    found = {name: min(wanted.get(name, 0), most) for name, most in have.items()}
    full = {name: max(found[name], min(most, contexts // 3)) for name, most in have.items()}
    for group in groups:
        for _ in range(contexts - sum(found.values())):
            fewest = min((name for name in group if found[name] < full[name]), key=found.__getitem__, default=None)
            if fewest is None:
                break
            found[fewest] += 1
    return found


def _most_a_source(contexts: int) -> int:
    """No source gives more than a hundredth of a training text, or 20 contexts."""
    return max(20, -(-contexts // 100))


def _filled(stock: Mapping[str, _Stock], contexts: int) -> dict[str, int]:
    have = {name: each.have(_most_a_source(contexts)) for name, each in stock.items()}
    groups = [[name for name, domain in (MIX | EXTRA).items() if domain.kind in kinds] for kinds in ORDER]
    return rooms(quotas(_shares(), contexts), have, groups, contexts)


def _maximum(stock: Mapping[str, _Stock], contexts: int) -> int:
    """The most contexts that a training text can have: a third of fewer contexts is less, so it is searched for."""
    while (found := sum(_filled(stock, contexts).values())) < contexts:
        contexts = found
    return contexts


class _Stock:
    """A domain's evaluation windows, and of its training sources, as far as they have been read, those windows that
    repeat no evaluation text."""

    def __init__(self, sides: Iterator[tuple[bool, str, np.ndarray]]) -> None:
        self.held: list[np.ndarray] = []
        self.sources: Picked = []
        self.dropped = 0
        self.rest = sides
        for side in sides:
            if side[0]:
                self.rest = itertools.chain([side], sides)
                break
            self.held.append(side[2])

    def fill(self, known: Runs, most: int, room: int | None = None) -> None:
        """Read on until there are ``room`` contexts, with at most ``most`` of each source; or to the end."""
        while room is None or self.have(most) < room:
            _, source, windows = next(self.rest, (True, None, None))
            if source is None or windows is None:
                return
            fresh = windows[~known.among(windows).any(axis=1)]
            self.dropped += len(windows) - len(fresh)
            self.sources.append((source, fresh))

    def have(self, most: int) -> int:
        """Contexts in it, with at most ``most`` of each source."""
        return sum(min(most, len(windows)) for _, windows in self.sources)

    def take(self, room: int, most: int) -> Iterator[tuple[str, np.ndarray]]:
        """The first ``room`` contexts, with at most ``most`` of each source, spread over it."""
        for source, windows in self.sources:
            chosen = _spread(windows, most)[:room]
            room -= len(chosen)
            if len(chosen):
                yield source, chosen


# ---- the paper's text ---------------------------------------------------------------------------------------------

def _from_pile(preset: Preset, tokenizer: Any, contexts: int) -> Iterator[tuple[str, np.ndarray]]:
    """One context a document: its beginning, from documents that fill one."""
    length = preset.context_length

    def tokenize(text: str) -> np.ndarray:
        return next(iter(_windows(text[:length * 40], tokenizer, preset)), np.empty(0, np.int32))

    key = cache.key(**_identity("pile", "evaluation"), length=length, bos=preset.prepend_bos,
                    vocabulary=sorted(tokenizer.get_vocab().items()))
    tokens, numbers = pile.contexts(tokenize, length, contexts, cache.root() / "pile" / key)
    for number, row in zip(numbers, tokens, strict=True):
        yield f"pile/{number}", row[None]


# ---- a text of the reader's own -----------------------------------------------------------------------------------

def _from_file(preset: Preset, tokenizer: Any, contexts: int) -> Iterator[tuple[str, np.ndarray]]:
    """Consecutive contexts of a text file (one document), or of each line's document in .jsonl and .jsonl.zst."""
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
    if not path.name.removesuffix(".zst").endswith((".jsonl", ".json")):
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
        raise DarkmatterError(f"There is no text file {path}; give 'mix', 'pile' or the path of a text file, or of a "
                              ".jsonl or .jsonl.zst file with a document a line.") from None
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


def _identity(corpus: str, side: str) -> Any:
    """What a corpus is known by: the packages' versions for the mix, the bytes of a file."""
    if corpus == "mix":
        needed = {d.package: importlib.metadata.version(d.package) for d in MIX.values() if installed(d.package)}
        return needed if side != "training" else needed | {"extra": _versions(d.package for d in EXTRA.values())}
    if corpus == "pile":
        return {"dataset": pile.DATASET, "seed": pile.SEED, "buffer": pile.BUFFER}
    path = Path(corpus).expanduser()
    if not path.is_file():
        _decoded(path)
    return cache.sha256(path)


def _versions(packages: Iterable[str]) -> list[str]:
    """Of the packages that are installed: a small training text needs none of them."""
    present = {str(found.name).lower(): found.version for found in importlib.metadata.distributions()}
    return [f"{name} {present[name]}" for name in sorted(set(packages)) if name in present]
