"""SAEs in other libraries' formats, opened by reference, against what each format says they do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from darkmatter.errors import DarkmatterError
from darkmatter.saes import loaded, references
from darkmatter.saes.loaded import LoadedSAE
from tests import formats, tiny

D, WIDTH, K = 16, 64, 5


def x(n: int = 50) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, D)).astype(np.float32)


def check(ref: str, expected: np.ndarray) -> LoadedSAE:
    """The reference opens, gives these reconstructions, and its codes decode to them."""
    found = references.load_sae(ref, tiny.preset())
    given = torch.from_numpy(x())
    with torch.no_grad():
        assert np.allclose(found(given)[0].numpy(), expected, atol=1e-5)
        index, value = found.encode(given)
        dense = torch.zeros(len(given), found.width).scatter(1, index, value)
        assert np.allclose((dense @ found.sae.W_dec + found.sae.b_dec).numpy(), expected, atol=1e-5)
    assert found.width == WIDTH
    return found


def test_sparsify(made: formats.Weights, tmp_path: Path) -> None:
    """b_dec comes off x although the decoder is normalised, and a num_latents of 0 is no width."""
    folder = tmp_path / "layers.3"
    formats.sparsify(folder, made, K)
    found = check(f"sparsify:{folder}", formats.topk_sae(made, x(), K))
    assert (found.name, found.k) == ("sparsify:layers.3", K)
    assert loaded.plain_topk(found.sae)


@pytest.mark.parametrize("kind", formats.DICTIONARIES)
def test_dictionary_learning(made: formats.Weights, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "trainer_0"
    formats.dictionary_learning(folder, made, kind, K)
    found = check(f"dictionary_learning:{folder}", formats.DICTIONARIES[kind](made, x(), K))
    assert found.name == "dictionary_learning:trainer_0"


@pytest.mark.parametrize("site", ["blocks.8.hook_resid_pre", "blocks.8.attn.hook_z"])
def test_sae_lens_before_version_6(made: formats.Weights, tmp_path: Path, site: str) -> None:
    """An attention SAE reads heads already joined, as they are captured."""
    formats.sae_lens_5(tmp_path / "old", made, site)
    check(str(tmp_path / "old"), formats.relu_sae(made, x()))


def test_an_attention_sae_that_ranks_its_latents(made: formats.Weights, tmp_path: Path) -> None:
    sae = tiny.topk(WIDTH, K, reshape_activations="hook_z")
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    sae.save_model(tmp_path / "z")
    found = references.load_sae(str(tmp_path / "z"), tiny.preset())
    given = torch.from_numpy(x())
    with torch.no_grad():
        heads = sae(given.reshape(50, 4, 4))  # sae-lens gives the heads back apart
        torch.testing.assert_close(found(given)[0], heads.reshape(50, D), rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_not_in_the_weights_is_told(tmp_path: Path) -> None:
    tiny.topk(WIDTH, K,
              normalize_activations="expected_average_only_in").save_model(tmp_path / "unfolded")
    with pytest.warns(UserWarning, match="scaled to a mean norm of √d"):
        references.load_sae(str(tmp_path / "unfolded"), tiny.preset())


@pytest.mark.parametrize("ref", ["sparsify:{0}", "dictionary_learning:{0}",
                                 "sparsify:no/such", "sparsify:{0}/none"])
def test_what_cannot_be_read_gets_one_sentence(ref: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DarkmatterError) as told:
        references.load_sae(ref.format(tmp_path), tiny.preset())
    assert "cannot be opened; give a directory that" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_transcoder_is_not_an_sae(made: formats.Weights, tmp_path: Path) -> None:
    formats.sparsify(tmp_path / "layers.1", made, K)
    config = tmp_path / "layers.1" / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transcode": True}))
    with pytest.raises(DarkmatterError, match="it is a transcoder"):
        references.load_sae(f"sparsify:{tmp_path / 'layers.1'}", tiny.preset())


def test_the_hub_is_asked_again_afterwards(made: formats.Weights, tmp_path: Path) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    before = loaders.hf_hub_download
    formats.sparsify(tmp_path / "layers.1", made, K)
    references.load_sae(f"sparsify:{tmp_path / 'layers.1'}", tiny.preset())
    with pytest.raises(DarkmatterError):
        references.load_sae(f"dictionary_learning:{tmp_path / 'layers.1'}", tiny.preset())
    assert loaders.hf_hub_download is before
