"""The built-in text: which of each domain's sources are measured on, and which are trained on."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DarkmatterError
from .builtin import EXTRA, MIX, installed
from .contexts import Picked, count, cut, first
from .overlap import Runs

if TYPE_CHECKING:
    from ..presets import Preset

HELD_OUT = 300  # contexts of the mix that are measured on and never trained on
# Of the evaluation text: many sources, so that intervals over sources mean something.
MAX_CONTEXTS_A_SOURCE = 3
RUN = 32  # tokens: a training context with a run of this length out of evaluation text is dropped
# The kinds of domain that a large training text is filled up from, in this order.
ORDER = (("prose",), ("drama", "reference prose"), ("code",))


def evaluation(preset: Preset, tokenizer: Any) -> list[Picked]:
    """Each domain's share of the contexts, from its first sources.

    Raises DarkmatterError where more is asked for than there is.
    """
    picked: list[Picked] = []
    for domain, wanted in shares(preset.contexts).items():
        held = held_out(domain, sources(domain, preset, tokenizer))
        picked += exactly(domain, held, wanted, "fewer contexts")
    return picked


def training(preset: Preset, tokenizer: Any, contexts: int) -> tuple[list[Picked], dict[str, int]]:
    """Training contexts by source, and how many of each domain repeat evaluation text.

    Each domain gives its share of the mix where it has that much; what is missing comes from the
    domains with text left, English prose first and code last, ``builtin.EXTRA`` among them (see
    ``filled``). No context has a run of ``RUN`` tokens in common with the evaluation text.
    Raises DarkmatterError where there is not enough, with how much there is.
    """
    stocks = {domain: _Stock(domain, preset, tokenizer) for domain in MIX}
    known = Runs(np.concatenate([rows for stock in stocks.values() for rows in stock.held]), RUN)
    most, wanted = _most(contexts), shares(contexts)
    for domain, stock in stocks.items():
        stock.fill(known, most, wanted[domain])
    # Where a domain falls short everything is read, and the others make up for it.
    if any(stock.have(most) < wanted[domain] for domain, stock in stocks.items()):
        stocks |= {domain: _Stock(domain, preset, tokenizer) for domain in EXTRA}
        for stock in stocks.values():
            stock.fill(known, most)
        wanted = _wanted(stocks, contexts)
    if sum(wanted.values()) < contexts:
        raise DarkmatterError(
            f"The built-in text fills at most {_maximum(stocks, contexts):,} training contexts of "
            f"{preset.context_length:,} tokens with no domain above a third, and {contexts:,} were "
            "asked for; ask for fewer distinct_tokens.")
    picked = [part for domain, stock in stocks.items()
              for part in first(stock.spread(most), wanted.get(domain, 0))]
    return picked, {domain: stock.dropped for domain, stock in stocks.items()}


def identity(preset: Preset) -> dict[str, Any]:
    """The packages of the mix and their versions: what the evaluation text is known by."""
    packages = [domain.package for domain in MIX.values() if installed(domain.package)]
    return {package: importlib.metadata.version(package) for package in packages}


def training_identity(preset: Preset) -> dict[str, Any]:
    """The same with those extra packages that are installed: a small text needs none of them."""
    versions = {str(dist.name).lower(): dist.version for dist in importlib.metadata.distributions()}
    extra = sorted({domain.package for domain in EXTRA.values()} & versions.keys())
    return identity(preset) | {"extra": [f"{package} {versions[package]}" for package in extra]}


# ---- the sources of a domain ----------------------------------------------------------------

def sources(domain: str, preset: Preset, tokenizer: Any) -> Iterator[Picked]:
    """All contexts of a domain by source, in the order of the hashes of the sources' names.

    The order is the same for every preset and seed. Of each source every paragraph of 80 characters
    or more that an earlier one had, word for word, is left out.
    """
    if preset.contexts > HELD_OUT or preset.context_length > 1024:
        raise DarkmatterError(
            f"The built-in text sets {HELD_OUT} contexts of 1,024 tokens apart to measure on; SAEs "
            f"were trained on the rest: {preset.contexts} contexts of {preset.context_length} are "
            "too much. Ask for less, or give a file.")
    named = [(f"{domain}/{name}", text) for name, text in (MIX | EXTRA)[domain].sources()]
    seen: set[bytes] = set()
    for source, text in sorted(named, key=lambda one: hashlib.sha256(one[0].encode()).hexdigest()):
        fresh = []
        for paragraph in text.split("\n\n"):
            mark = hashlib.sha256(" ".join(paragraph.lower().split()).encode()).digest()[:12]
            if len(paragraph) < 80 or mark not in seen:
                fresh.append(paragraph)
            seen.add(mark)
        yield source, cut("\n\n".join(fresh), tokenizer, preset)


def held_out(domain: str, sources: Iterator[Picked]) -> Iterator[Picked]:
    """The first of a domain's sources, which are for evaluation; after them come those to train on.

    Where they end does not depend on how much a preset asks for: no SAE sees evaluation text.
    """
    few = ((source, spread(rows, MAX_CONTEXTS_A_SOURCE)) for source, rows in sources)
    return first(few, shares(HELD_OUT).get(domain, 0))


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of a source's contexts, evenly spaced over it."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]


def exactly(domain: str, sources: Iterator[Picked], wanted: int, remedy: str) -> list[Picked]:
    """So many contexts. Raises DarkmatterError, with the ``remedy``, where there are fewer."""
    picked = list(first(sources, wanted))
    if count(picked) < wanted:
        raise DarkmatterError(f"The '{domain}' part of the built-in text fills {count(picked)} of "
                              f"the {wanted} contexts asked of it; ask for {remedy}.")
    return picked


# ---- how many contexts of each domain --------------------------------------------------------

def shares(contexts: int) -> dict[str, int]:
    """Each domain's share of so many contexts."""
    return quotas({domain: about.share for domain, about in MIX.items()}, contexts)


def quotas(parts: Mapping[str, float], contexts: int) -> dict[str, int]:
    """Whole contexts a part, by largest remainder, so that they add up exactly."""
    exact = {name: part * contexts for name, part in parts.items()}
    whole = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[:contexts - sum(whole.values())]:
        whole[name] += 1
    return whole


def filled(wanted: Mapping[str, int], have: Mapping[str, int], groups: Iterable[Collection[str]],
           contexts: int) -> dict[str, int]:
    """Contexts of each domain in a training text: ``wanted``, or all it has where that is less.

    Each context that is then missing comes from the domain that has the fewest so far, of the first
    of the ``groups`` (names of domains) that has any left. Nothing is added to a domain that has a
    third of the text. The numbers add up to less than ``contexts`` where there is not enough.
    """
    counts = {domain: min(wanted.get(domain, 0), most) for domain, most in have.items()}
    full = {domain: max(counts[domain], min(most, contexts // 3)) for domain, most in have.items()}
    for group in groups:
        for _ in range(contexts - sum(counts.values())):
            open_domains = [domain for domain in group if counts[domain] < full[domain]]
            if not open_domains:
                break
            counts[min(open_domains, key=counts.__getitem__)] += 1
    return counts


def _most(contexts: int) -> int:
    """No source gives more than a hundredth of a training text, or 20 contexts."""
    return max(20, -(-contexts // 100))


def _wanted(stocks: Mapping[str, _Stock], contexts: int) -> dict[str, int]:
    have = {domain: stock.have(_most(contexts)) for domain, stock in stocks.items()}
    groups = [[domain for domain, about in (MIX | EXTRA).items() if about.kind in kinds]
              for kinds in ORDER]
    return filled(shares(contexts), have, groups, contexts)


def _maximum(stocks: Mapping[str, _Stock], contexts: int) -> int:
    """The most contexts a text can have; a third of fewer is less, so it is searched for."""
    while (most := sum(_wanted(stocks, contexts).values())) < contexts:
        contexts = most
    return contexts


class _Stock:
    """A domain's evaluation contexts, and those of its training sources that repeat none of them.

    Training sources are read as far as they are asked for.
    """

    def __init__(self, domain: str, preset: Preset, tokenizer: Any) -> None:
        self.unread = sources(domain, preset, tokenizer)
        self.held = [rows for _, rows in held_out(domain, self.unread)]
        self.picked: list[Picked] = []
        self.dropped = 0

    def fill(self, known: Runs, most: int, wanted: int | None = None) -> None:
        """Read on until there are ``wanted`` contexts, ``most`` of a source; None: to the end."""
        while wanted is None or self.have(most) < wanted:
            source, rows = next(self.unread, ("", None))
            if rows is None:
                return
            fresh = rows[~known.among(rows).any(axis=1)]
            self.dropped += len(rows) - len(fresh)
            self.picked.append((source, fresh))

    def spread(self, most: int) -> Iterator[Picked]:
        """What has been read, with at most ``most`` contexts of each source."""
        return ((source, spread(rows, most)) for source, rows in self.picked)

    def have(self, most: int) -> int:
        """How many contexts that is."""
        return sum(min(most, len(rows)) for _, rows in self.picked)
