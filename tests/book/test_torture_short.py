"""Three kills: the short form of ``make torture``. And two surveys at once on one cache."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests import torture
from tests.text.test_corpus import tiny_tokenizer

pytestmark = pytest.mark.slow

# The command line, except that SAEs are trained on the preset's text: the built-in takes minutes.
SURVEY = """\
import dataclasses, sys
from darkmatter import __main__
from darkmatter.text import corpus
def training(preset, tokenizer, n):
    return corpus.evaluation(dataclasses.replace(preset, contexts=n), tokenizer)
corpus.training = training
sys.exit(__main__.main(["survey", *sys.argv[1:]]))"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset with a random Llama, a text of 24 documents and an SAE that it trains."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1003, hidden_size=16, intermediate_size=32,
                         num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
                         bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    rng = random.Random(0)
    documents = [" ".join(f"w{rng.randrange(1000)}" for _ in range(600)) for _ in range(24)]
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "text.jsonl").write_text("".join(lines))
    training = {"tokens": 40_000, "distinct_tokens": 2_000, "batch": 128, "lr": 1e-3}
    fields = {"model": str(folder / "llama"), "dtype": "float32", "device": "cpu",
              "corpus": str(folder / "text.jsonl"), "contexts": 96, "context_length": 48,
              "site": "blocks.0.hook_resid_post", "saes": ["train:64x4"], "bootstrap": 50,
              "training": training}
    (folder / "toy.yaml").write_text(yaml.safe_dump(fields))
    return folder / "toy.yaml"


def test_after_three_kills_a_survey_gives_the_same_bits(toy: Path, tmp_path: Path) -> None:
    words = ["-c", SURVEY, "--preset", str(toy)]
    assert torture.torture(tmp_path, words, kills=3, seed=0, share=0.95) == []


def test_pictures_are_compared_without_the_names_that_are_drawn_at_random() -> None:
    picture = ('<g id="defs-{a}"/><g id="clip{a}xy"/><path class="trace{b}" d="M{d}"/>'
               '<g id="g{a}-cb{b}"/>')
    one = picture.format(a="51e012", b="3c3ffa", d=12)
    two = picture.format(a="0a9bc7", b="51e012", d=12)
    assert torture.drawn(one) == torture.drawn(two)
    assert torture.drawn(one) != torture.drawn(picture.format(a="51e012", b="3c3ffa", d=13))


def test_two_surveys_at_once_do_the_work_once_and_both_right(toy: Path, tmp_path: Path) -> None:
    place = torture.Place(tmp_path / "both")
    place.clear()
    outs = [tmp_path / f"rows{i}.json" for i in range(2)]
    both = [place.start(["-c", SURVEY, "--preset", str(toy), "--json", str(out)]) for out in outs]
    assert [each.wait(600) for each in both] == [0, 0]
    a, b = (json.loads(out.read_text())["rows"] for out in outs)
    assert a == b
    said = (place.folder / "log.txt").read_text()
    trained = [line for line in said.splitlines() if "held-out FVU" in line]
    assert len(trained) == len(set(trained)) > 0, "each checkpoint is written by one of the two"
    assert said.count("activations: 96 contexts at ") == 1
