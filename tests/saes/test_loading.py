"""What people bring as an SAE: read exactly, or one sentence that says what to do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from darkmatter.errors import DarkmatterError
from darkmatter.saes import loading, references
from tests import formats, tiny
from tests.saes.test_formats import WIDTH, D, K, x

SITE = "blocks.1.hook_resid_post"


def standard(made: formats.Weights) -> dict[str, torch.Tensor]:
    return {name: values for name, values in made.tensors().items() if name != "threshold"}


def write(folder: Path, state: dict[str, torch.Tensor], **cfg: Any) -> Path:
    """A directory as sae-lens 6 writes it."""
    folder.mkdir(parents=True)
    how = {"architecture": "standard", "d_in": D, "d_sae": WIDTH, "dtype": "float32",
           "device": "cuda", "apply_b_dec_to_input": True, "normalize_activations": "none",
           "metadata": {"sae_lens_version": "6.54.0"}} | cfg
    (folder / "cfg.json").write_text(json.dumps(how))
    save_file({name: values.contiguous() for name, values in state.items()},
              folder / "sae_weights.safetensors")
    return folder


def write_5(folder: Path, state: dict[str, torch.Tensor], **cfg: Any) -> Path:
    """A directory as sae-lens 5 wrote it: no metadata, the activation function by name."""
    how = {"metadata": None, "hook_name": SITE, "hook_layer": 1, "hook_head_index": None,
           "activation_fn_str": "relu", "activation_fn_kwargs": {}, "prepend_bos": True,
           "finetuning_scaling_factor": False, "model_name": "tiny", "context_size": 128}
    write(folder, state, **how | cfg)
    kept = json.loads((folder / "cfg.json").read_text())
    kept.pop("metadata")
    (folder / "cfg.json").write_text(json.dumps(kept))
    return folder


def relu_sae(made: formats.Weights, given: np.ndarray, scale: np.ndarray | float = 1.0
             ) -> np.ndarray:
    w, rows = made.wide(), given.astype(np.float64)
    latents = np.maximum((rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    return (latents * scale) @ w["W_dec"] + w["b_dec"]


def rebuilt(ref: str | Path) -> np.ndarray:
    return loading.open_sae(str(ref))(torch.from_numpy(x()))[0].numpy()


def test_the_factor_of_a_finetuned_sae_is_folded_in(made: formats.Weights, tmp_path: Path) -> None:
    scale = np.random.default_rng(3).uniform(0.7, 1.6, WIDTH).astype(np.float32)
    state = standard(made) | {"scaling_factor": torch.from_numpy(scale)}
    on = write_5(tmp_path / "on", state, finetuning_scaling_factor=True)
    off = write_5(tmp_path / "off", state)
    assert np.allclose(rebuilt(on), relu_sae(made, x(), scale.astype(np.float64)), atol=1e-5)
    assert np.allclose(rebuilt(off), relu_sae(made, x()), atol=1e-5)


def test_a_byte_order_mark_is_read_over(made: formats.Weights, tmp_path: Path) -> None:
    folder = write(tmp_path / "bom", standard(made))
    config = folder / "cfg.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert np.allclose(rebuilt(folder), relu_sae(made, x()), atol=1e-5)


def transcoder(folder: Path, made: formats.Weights) -> None:
    write(folder, standard(made), architecture="transcoder", d_out=D, apply_b_dec_to_input=False)


def one_head(folder: Path, made: formats.Weights) -> None:
    write(folder, standard(made), metadata={"sae_lens_version": "6.54.0", "hook_head_index": 2})


def whitened(folder: Path, made: formats.Weights) -> None:
    write(folder, standard(made), normalize_activations="covariance_whitening")


def checkpoint(folder: Path, made: formats.Weights) -> None:
    write(folder, standard(made), architecture="batchtopk", k=8.0)


def gelu(folder: Path, made: formats.Weights) -> None:
    write_5(folder, standard(made), activation_fn_str="tanh-relu")


def pointer(folder: Path, made: formats.Weights) -> None:
    write(folder, standard(made))
    (folder / "sae_weights.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 25165824\n")


def no_weights(folder: Path, made: formats.Weights) -> None:
    write(folder, standard(made))
    (folder / "sae_weights.safetensors").unlink()


def configured(text: str) -> Callable[[Path, formats.Weights], None]:
    def make(folder: Path, made: formats.Weights) -> None:
        write(folder, standard(made))
        (folder / "cfg.json").write_text(text)
    return make


def sparsifys(folder: Path, made: formats.Weights) -> None:
    formats.sparsify(folder, made, K)


def dictionarys(folder: Path, made: formats.Weights) -> None:
    formats.dictionary_learning(folder, made, "AutoEncoderTopK", K)


@pytest.mark.parametrize(("make", "sentence"), [
    (transcoder, r"is a transcoder: .*dm\.decompose\(transcoder, x, target=y\)"),
    (one_head, "reads head 2 of a site alone"),
    (whitened, "fold it in before saving"),
    (checkpoint, "training checkpoint of a batchtopk SAE.*save_inference_model"),
    (gelu, "activation function of .* is 'tanh-relu'; relu and topk are read"),
    (pointer, "is a git-lfs pointer.*git lfs pull"),
    (no_weights, "There is no sae_weights.safetensors in"),
    (configured(""), "cfg.json holds no whole JSON object; copy it again"),
    (configured('{"d_in": 16, "d_sae": '), "cfg.json holds no whole JSON object"),
    (configured("[1, 2]"), "cfg.json holds no whole JSON object"),
    (configured('{"architecture": "standard", "dtype": "float32"}'), "no whole number 'd_in'"),
    (sparsifys, "was written by sparsify: give it as 'sparsify:"),
    (dictionarys, "was written by dictionary_learning: give it as 'dictionary_learning:"),
], ids=lambda value: getattr(value, "__name__", None))
def test_what_is_not_read_exactly_is_refused(
    made: formats.Weights, tmp_path: Path, make: Callable[[Path, formats.Weights], None],
    sentence: str
) -> None:
    make(tmp_path / "one", made)
    with pytest.raises(DarkmatterError, match=sentence):
        loading.open_sae(str(tmp_path / "one"))


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


@pytest.mark.parametrize("change", [
    lambda config: config.pop("buffer", None),
    lambda config: config["trainer"].update(lm_name=None),
    lambda config: config["trainer"].update(layer=None),
], ids=["no buffer", "no lm_name", "no layer"])
def test_dictionary_learning_needs_no_field_that_nothing_reads(
    made: formats.Weights, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    formats.dictionary_learning(tmp_path / "one", made, "AutoEncoderTopK", K)
    changed(tmp_path / "one", "config.json", change)
    expected = formats.DICTIONARIES["AutoEncoderTopK"](made, x(), K)
    assert np.allclose(rebuilt(f"dictionary_learning:{tmp_path / 'one'}"), expected, atol=1e-5)


def test_a_compiled_dictionary(made: formats.Weights, tmp_path: Path) -> None:
    formats.dictionary_learning(tmp_path / "one", made, "AutoEncoderTopK", K)
    file = tmp_path / "one" / "ae.pt"
    state = torch.load(file, weights_only=True)
    torch.save({f"_orig_mod.{name}": values for name, values in state.items()}, file)
    expected = formats.DICTIONARIES["AutoEncoderTopK"](made, x(), K)
    assert np.allclose(rebuilt(f"dictionary_learning:{tmp_path / 'one'}"), expected, atol=1e-5)


def test_a_dictionary_whose_bias_stays_on_x(made: formats.Weights, tmp_path: Path) -> None:
    """AutoEncoderNew: relu(W x + b), and the decoder has a bias of its own."""
    formats.dictionary_learning(tmp_path / "one", made, "AutoEncoderTopK", K)
    changed(tmp_path / "one", "config.json",
            lambda config: config["trainer"].update(dict_class="AutoEncoderNew"))
    tensors = made.tensors()
    torch.save({"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"],
                "decoder.weight": tensors["W_dec"].T.contiguous(),
                "decoder.bias": tensors["b_dec"]}, tmp_path / "one" / "ae.pt")
    w = made.wide()
    latents = np.maximum(x().astype(np.float64) @ w["W_enc"] + w["b_enc"], 0)
    expected = latents @ w["W_dec"] + w["b_dec"]
    assert np.allclose(rebuilt(f"dictionary_learning:{tmp_path / 'one'}"), expected, atol=1e-5)


def test_an_unknown_dictionary_is_named(made: formats.Weights, tmp_path: Path) -> None:
    formats.dictionary_learning(tmp_path / "one", made, "AutoEncoderTopK", K)
    changed(tmp_path / "one", "config.json",
            lambda config: config["trainer"].update(dict_class="CrossCoder"))
    with pytest.raises(DarkmatterError, match="its class is CrossCoder; those read are AutoEnc"):
        loading.open_sae(f"dictionary_learning:{tmp_path / 'one'}")


def test_a_signed_sparsify_sae_keeps_the_largest_in_size(
    made: formats.Weights, tmp_path: Path
) -> None:
    formats.sparsify(tmp_path / "one", made, K)
    changed(tmp_path / "one", "cfg.json", lambda config: config.update(signed=True))
    w = made.wide()
    before = (x().astype(np.float64) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    kept = np.argsort(-np.abs(before), axis=1)[:, :K]
    latents = np.zeros_like(before)
    np.put_along_axis(latents, kept, np.take_along_axis(before, kept, 1), 1)
    assert (latents < 0).any()  # else the test could not tell
    expected = latents @ w["W_dec"] + w["b_dec"]
    assert np.allclose(rebuilt(f"sparsify:{tmp_path / 'one'}"), expected, atol=1e-4)


def test_a_sparsify_sae_without_a_bias_is_told(made: formats.Weights, tmp_path: Path) -> None:
    formats.sparsify(tmp_path / "one", made, K)
    tensors = made.tensors()
    save_file({"encoder.weight": tensors["W_enc"].T.contiguous(), "W_dec": tensors["W_dec"],
               "b_dec": tensors["b_dec"]}, tmp_path / "one" / "sae.safetensors")
    with pytest.raises(DarkmatterError, match=r"sae.safetensors lacks encoder\.bias"):
        loading.open_sae(f"sparsify:{tmp_path / 'one'}")


def told(folder: Path, **asked: Any) -> list[str]:
    preset = replace(tiny.preset(), **asked)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        references.load_sae(str(folder), preset)
    return [str(one.message) for one in seen]


def test_another_site_or_model_is_told(made: formats.Weights, tmp_path: Path) -> None:
    model = Path(tiny.preset().model).name
    metadata = {"sae_lens_version": "6.54.0", "hook_name": SITE, "model_name": model}
    folder = write(tmp_path / "one", standard(made), metadata=metadata)
    assert told(folder, site=SITE) == []
    assert told(folder, site="blocks.2.hook_resid_pre") == []  # the same place by another name
    (site,) = told(folder, site="blocks.2.hook_resid_post")
    assert SITE in site and "reads blocks.2.hook_resid_post here" in site
    (other,) = told(folder, site=SITE, model="another")
    assert model in other and "reads another here" in other


@pytest.mark.parametrize(("written", "asked"), [
    ("gpt2-small", "gpt2"), ("gemma-2-2b", "google/gemma-2-2b"),
    ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt")])
def test_a_model_by_another_of_its_names_is_the_same(
    made: formats.Weights, tmp_path: Path, written: str, asked: str
) -> None:
    metadata = {"sae_lens_version": "6.54.0", "hook_name": SITE, "model_name": written}
    folder = write(tmp_path / "one", standard(made), metadata=metadata)
    assert told(folder, site=SITE, model=asked) == []
