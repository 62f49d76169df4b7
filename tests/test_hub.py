"""The paper's models, SAEs and text in the hub's layout, at toy sizes, through the real loaders.

The hub is a server on this machine (tests/hub.py): huggingface_hub downloads from it into a cache
of its own, datasets streams from it, and the second time nothing is asked of it at all. sae-lens
takes a Gemma Scope SAE's width from its id, so those files are full size, with random arrays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml
import zstandard
from sae_lens.loading.pretrained_saes_directory import (
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
)
from transformers import AutoModelForCausalLM

from darkmatter import cache, presets
from darkmatter.models import model
from tests import formats, systems
from tests.hub import Hub
from tests.models.test_architectures import SYSTEMS, inside

pytestmark = pytest.mark.slow
HOME = Path(__file__).resolve().parents[1]
LENGTH, NORM = 128, 6.0
LADDER = "gpt2-small-res-jb-feature-splitting"
COMMANDS = """
import json, os, resource, sys, warnings
from darkmatter.__main__ import main
for cache, words in json.loads(sys.argv[1]):
    os.environ["DARKMATTER_CACHE"] = cache
    assert main(["decompose", *words]) == 0, words
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@dataclass(frozen=True)
class Case:
    """One command, and what is to come out."""

    preset: str
    site: str
    sae: str
    made: formats.Weights
    reconstruct: Callable[[formats.Weights, np.ndarray], np.ndarray]
    contexts: int = 30

    def words(self, out: Path) -> list[str]:
        return ["--model", self.preset, "--corpus", self.preset,
                "--site", self.site, "--sae", self.sae, "--contexts",
                str(self.contexts), "--context-length", str(LENGTH), "--json", str(out)]

    @property
    def layer(self) -> int:
        return int(self.site.split(".")[1])


def listed(release: str, sae_id: str) -> tuple[str, str]:
    """Repository and folder of an SAE, as sae-lens's directory has them."""
    found = get_pretrained_saes_directory()[release]
    return found.repo_id, found.saes_map[sae_id]


LLAMA_SCALE = get_norm_scaling_factor("llama_scope_lxr_8x", "l1r_8x") or 1.0


def llama_scope_sae(made: formats.Weights, x: np.ndarray) -> np.ndarray:
    """On x times the release's factor; the threshold takes the factor too (sae-lens)."""
    w = {name: torch.from_numpy(values).bfloat16().double().numpy()
         for name, values in vars(made).items()}
    before = LLAMA_SCALE * x @ w["W_enc"] + w["b_enc"]
    kept = np.where(before > LLAMA_SCALE * made.threshold[0], np.maximum(before, 0), 0)
    return (kept @ w["W_dec"] + w["b_dec"]) / LLAMA_SCALE


WIDE = formats.random(2304, 16_384, scale=60.0, l0=0.004)  # Gemma Scope's files are full size
CASES = {
    "gemma-2-2b residual": Case("gemma-2-2b", "blocks.1.hook_resid_post",
                                "gemma-scope-2b-pt-res:layer_1/width_16k/average_l0_40",
                                WIDE, formats.gemma_scope_sae, contexts=64),
    "gemma-2-2b mlp": Case("gemma-2-2b", "blocks.1.hook_mlp_out",
                           "gemma-scope-2b-pt-mlp:layer_1/width_16k/average_l0_50",
                           WIDE, formats.gemma_scope_sae, contexts=64),
    "gemma-2-2b attention": Case("gemma-2-2b", "blocks.1.attn.hook_z",
                                 "gemma-scope-2b-pt-att:layer_1/width_16k/average_l0_79",
                                 formats.random(2048, 16_384, scale=20.0, l0=0.004),
                                 formats.gemma_scope_sae, contexts=64),
    "llama-3.1-8b residual": Case("llama-3.1-8b", "blocks.1.hook_resid_post",
                                  "llama_scope_lxr_8x:l1r_8x",
                                  formats.random(32, 256, scale=NORM, l0=0.1), llama_scope_sae),
    "llama-3.1-8b, error linear in x": Case("llama-3.1-8b", "blocks.2.hook_resid_post",
                                            "llama_scope_lxr_8x:l2r_8x",
                                            formats.scaled(32, 256, 0.75),
                                            lambda made, x: 0.75 * x),
    "gemma-3-270m residual": Case("gemma-3-270m", "blocks.5.hook_resid_post",
                                  "gemma-scope-2-270m-pt-res:layer_5_width_16k_l0_medium",
                                  formats.random(32, 512, scale=8.0, l0=0.1),
                                  formats.gemma_scope_sae),
    "gpt2-small residual": Case("gpt2-small", "blocks.8.hook_resid_pre",
                                f"{LADDER}:blocks.8.hook_resid_pre_768",
                                formats.random(32, 64, scale=NORM, l0=0.1, seed=64),
                                formats.relu_sae),
}


# ---- the hub ----

@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The models, their SAEs and a shard of the text, each in its repository."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("hub")
    with Hub(place) as hub:
        gemma2 = systems.gemma2(hidden_size=2304, intermediate_size=2560,
                                num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2)
        models = {"google/gemma-2-2b": (gemma2, systems.gemma_tokenizer, "30MB"),
                  "google/gemma-3-270m": (systems.gemma3(), systems.gemma_tokenizer, "100KB"),
                  "meta-llama/Llama-3.1-8B": (systems.llama31(), systems.llama_tokenizer, "100KB"),
                  "gpt2": (systems.gpt2(), systems.gpt2_tokenizer, "100KB")}
        for repo, (model, tokenizer, most) in models.items():
            systems.save(model, tokenizer(), hub.folder(repo), shard=most)
            shards = list(hub.folder(repo).glob("model-*.safetensors"))
            assert len(shards) > 1, "as the real ones are"
        for case in CASES.values():
            publish(hub, case)
        for i in range(1, 8):  # the rest of the ladder
            folder = hub.folder(listed(LADDER, f"blocks.8.hook_resid_pre_{768 * 2**i}")[0])
            formats.sae_lens_5(folder / f"blocks.8.hook_resid_pre_{768 * 2**i}",
                               formats.random(32, 64 + 16 * i, scale=NORM, l0=0.1, seed=i),
                               "blocks.8.hook_resid_pre")
        shard(hub.folder("monology/pile-uncopyrighted", "datasets") / "train" / "00.jsonl.zst")
        yield hub


def publish(hub: Hub, case: Case) -> None:
    """Put an SAE where its release has it, in its release's format."""
    repo, inside_repo = listed(*case.sae.split(":", 1))
    folder = hub.folder(repo) / inside_repo
    if "scope-2b" in repo:
        formats.gemma_scope(folder, case.made)
    elif "scope-2-" in repo:
        formats.gemma_scope_2(folder, case.made, case.layer)
    elif "Llama" in repo:
        formats.llama_scope(folder, case.made, 32**0.5 / LLAMA_SCALE, case.site)
    else:
        formats.sae_lens_5(folder, case.made, case.site)


def shard(path: Path) -> None:
    """Documents of 20 to 400 words, compressed as the Pile's are."""
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(systems.WORDS, size)) for size in rng.integers(20, 400, 300))
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}) + "\n"
                    for text in texts)
    path.parent.mkdir()
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


# ---- decompose ----

@dataclass(frozen=True)
class Ran:
    """Where each case's caches and results are, and the peak of memory over them all, in bytes."""

    folder: Path
    peak: int

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "out.json").read_text())


def decompose(hub: Hub, folder: Path, names: list[str], offline: bool = False) -> Ran:
    given = [(str(folder / name / "cache"), CASES[name].words(folder / name / "out.json"))
             for name in names]
    environment = hub.environment(folder / "home", offline) | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(given)],
                          env=environment, cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return Ran(folder, int(done.stdout.rsplit("peak ", 1)[1]))


@pytest.fixture(scope="module")
def ran(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return decompose(hub, tmp_path_factory.mktemp("ran"), list(CASES))


def stored(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a run left: activations [token, d], which were scored, tokens [context, position]."""
    rows, = (folder / "activations").glob("*/done.json")
    shape = json.loads(rows.read_text())["shape"]
    raw = np.fromfile(rows.with_name("x.bf16"), np.int16).reshape(shape)
    x = torch.from_numpy(raw).view(torch.bfloat16)
    scored, = (folder / "surveys").glob("*/is_eval.npy")
    text, = (path for path in (folder / "tokens").glob("*.safetensors"))
    return x.double().numpy(), np.load(scored), (cache.load_arrays(text) or {})["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_the_activations_are_transformers_own(hub: Hub, ran: Ran, name: str) -> None:
    """The first two contexts, in one type on both sides."""
    case = CASES[name]
    x, _, tokens = stored(ran.folder / name / "cache")
    assert tokens.shape == (case.contexts, LENGTH)
    preset = presets.load(case.preset, contexts=case.contexts, context_length=LENGTH)
    dtype = getattr(torch, model.dtype_of(preset))
    original = AutoModelForCausalLM.from_pretrained(hub.folder(preset.model), dtype=dtype).eval()
    makes = SYSTEMS[{"gemma3_text": "gemma-3", "gemma2": "gemma-2", "llama": "llama-3.1"}.get(
        original.config.model_type, "gpt2")]
    there = inside(makes, original, tokens[:2])[case.site]
    expected = there[:, preset.first_kept:LENGTH - 1].flatten(0, 1)
    expected = expected - expected.mean(-1, keepdim=True) if preset.centre else expected
    found = torch.from_numpy(x[:len(expected)])
    assert len(x) == case.contexts * (LENGTH - 1 - preset.first_kept), "no special token inside"
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert tokens[0, 0] == original.config.bos_token_id


@pytest.mark.parametrize("name", CASES)
def test_known_answers(ran: Ran, name: str) -> None:
    """The SAE by its format's own formula, and least squares by QR, both in float64."""
    case, result = CASES[name], ran.result(name)
    x, scored, _ = stored(ran.folder / name / "cache")
    error = x - case.reconstruct(case.made, x)
    expected = reference(x, error, scored)
    assert (result["n_fit"], result["n_eval"]) == ((~scored).sum(), scored.sum())
    assert result["fvu"] == pytest.approx(expected["fvu"], rel=2e-3)
    assert result["fvu_nonlinear"] == pytest.approx(expected["fvu_nonlinear"], rel=5e-3, abs=1e-6)
    for metric in ("r2_vector", "r2_norm"):
        assert result[metric] == pytest.approx(expected[metric], abs=5e-3)


def reference(x: np.ndarray, error: np.ndarray, scored: np.ndarray) -> dict[str, float]:
    norms = (error**2).sum(1, keepdims=True)
    a = np.concatenate([x, np.ones((len(x), 1))], 1)
    target = np.concatenate([error, norms], 1)
    q, r = np.linalg.qr(a[~scored])
    solved = np.linalg.solve(r, q.T @ target[~scored])
    left, target, x = (target - a @ solved)[scored], target[scored], x[scored]
    variance = ((x - x.mean(0)) ** 2).sum()
    r2 = 1 - (left**2).sum(0) / ((target - target.mean(0)) ** 2).sum(0)
    return {"fvu": (target[:, :-1] ** 2).sum() / variance,
            "fvu_nonlinear": (left[:, :-1] ** 2).sum() / variance,
            "r2_vector": float(r2[:-1].mean()), "r2_norm": float(r2[-1])}


def test_an_error_that_is_linear_in_x_is_found_to_be(ran: Ran) -> None:
    result = ran.result("llama-3.1-8b, error linear in x")
    assert result["r2_vector"] > 1 - 1e-5
    assert result["fvu_nonlinear"] < 1e-5
    assert result["fvu"] > 0.06


def test_memory_of_a_full_size_survey(ran: Ran) -> None:
    """2,304 dimensions, 16,384 latents: under 3 GB beside the SAE, with model and libraries."""
    made = CASES["gemma-2-2b residual"].made
    assert ran.peak - sum(values.nbytes for values in vars(made).values()) < 3e9


def test_once_downloaded_nothing_is_asked_of_the_hub(hub: Hub, ran: Ran) -> None:
    """Offline, on the cache that the real download left: the same answer."""
    name = "llama-3.1-8b residual"
    before = ran.result(name)
    for part in ("activations", "codes", "surveys"):
        for path in sorted((ran.folder / name / "cache" / part).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    hub.asked.clear()
    after = decompose(hub, ran.folder, [name], offline=True).result(name)
    assert hub.asked == []
    assert {key: after[key] for key in ("fvu", "fvu_nonlinear", "r2_norm")} == {
        key: before[key] for key in ("fvu", "fvu_nonlinear", "r2_norm")}


# ---- the book ----

@pytest.mark.parametrize("chapter", ["02_norm", "04_scaling"])
def test_a_chapter_on_the_published_ladder(hub: Hub, ran: Ran,
                                           chapter: str, tmp_path: Path) -> None:
    """The preset gpt2-small on fewer and shorter contexts: a preset is all that differs."""
    fields = yaml.safe_load((presets.FOLDER / "gpt2-small.yaml").read_text())
    small = tmp_path / "gpt2-toy.yaml"
    small.write_text(yaml.safe_dump(fields | {"contexts": 30,
                                              "context_length": LENGTH, "bootstrap": 50}))
    environment = hub.environment(ran.folder / "home") | {
        "DARKMATTER_RECORD": str(tmp_path / "record.json"),
        "DARKMATTER_CACHE": str(ran.folder / "book")}
    words = [str(HOME / "notebooks" / f"{chapter}.ipynb"), str(tmp_path / "out.ipynb"),
             "-p", "preset", str(small)]
    done = subprocess.run([sys.executable, "-m", "papermill", *words],
                          env=environment, cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    ladder = [f"{LADDER}:blocks.8.hook_resid_pre_{768 * 2**i}" for i in range(8)]
    assert set(ladder) <= {row["sae"] for row in record["metrics"]}
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells
