"""SAEs in the formats of other libraries: sparsify's and dictionary_learning's directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DarkmatterError
from ..inputs import json_of


def opened(kind: str, place: str) -> tuple[SAE[Any], dict[str, Any], str]:
    """The SAE, an empty record and its name, from a directory or 'owner/name/folder' on the hub.

    ``kind``: one of ``FORMATS``. Raises DarkmatterError where the library's loader cannot read it.
    """
    folder, converter = Path(place).expanduser(), FORMATS[kind]
    try:
        if folder.is_dir():
            with _on_disk(folder):
                sae = SAE.from_pretrained("local/local", folder.name, converter=converter)
        else:
            owner, name, inside = place.split("/", 2)
            sae = SAE.from_pretrained(f"{owner}/{name}", inside, converter=converter)
    except Exception as error:  # the loaders raise many kinds
        said = " ".join(str(error).split())[:200]
        raise DarkmatterError(
            f"The SAE '{kind}:{place}' cannot be opened; give a directory that {kind} wrote, or "
            f"'owner/name/folder' on the hub. The loader said: {said}") from error
    return sae, {}, f"{kind}:{folder.name if folder.is_dir() else place}"


@contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    """sae-lens's loaders ask the hub for each file by name; here the files are in ``folder``."""
    def found(repo_id: str, filename: str, **_: Any) -> str:
        return str(folder / filename.removeprefix(f"{folder.name}/"))

    before, loaders.hf_hub_download = loaders.hf_hub_download, found  # type: ignore[assignment]
    try:
        yield
    finally:
        loaders.hf_hub_download = before


def _file(repo_id: str, folder: str, name: str) -> Path:
    return Path(loaders.hf_hub_download(repo_id=repo_id, filename=f"{folder}/{name}"))


def _sparsify(repo_id: str, folder_name: str, device: str, force_download: bool,
              cfg_overrides: Mapping[str, Any] | None
              ) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """sparsify's cfg.json and sae.safetensors: W_enc is ``encoder.weight``, b_dec is taken off x.

    sae-lens's own loader transposes ``W_dec``, keeps b_dec on x, and takes the default
    ``num_latents`` of 0 as a width. ``signed`` SAEs keep the k latents that are largest in size.
    """
    how = json_of(_file(repo_id, folder_name, "cfg.json"))
    state = load_file(_file(repo_id, folder_name, "sae.safetensors"))
    if how.get("transcode") or how.get("skip_connection"):
        raise DarkmatterError("it is a transcoder; measure it in Python: "
                              "dm.decompose(transcoder, x, target=y)")
    if (activation := how.get("activation", "topk")) != "topk":
        raise DarkmatterError(f"its activation is {activation}, and only topk is read")
    if lacking := {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} - state.keys():
        raise DarkmatterError(f"sae.safetensors lacks {', '.join(sorted(lacking))}")
    width, d_in = state["encoder.weight"].shape
    cfg = {"architecture": "abstopk" if how.get("signed") else "topk", "d_in": d_in,
           "d_sae": width, "k": how["k"], "apply_b_dec_to_input": True,
           "rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": "6.0.0"}}
    return cfg | dict(cfg_overrides or {}), {
        "W_enc": state["encoder.weight"].T.contiguous().float(),
        "b_enc": state["encoder.bias"].float(),
        "W_dec": state["W_dec"].float(), "b_dec": state["b_dec"].float()}, None


# Each class of dictionary_learning: the architecture it is, and whether b_dec comes off x first.
DICTIONARIES = {
    "AutoEncoder": ("standard", True), "AutoEncoderNew": ("standard", False),
    "AutoEncoderTopK": ("topk", True), "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True), "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False)}
# What sae-lens calls a weight, and what dictionary_learning does, in one class or another.
NAMES = {"b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"),
         "b_enc": ("b_enc", "encoder.bias"), "b_mag": ("mag_bias",), "b_gate": ("gate_bias",),
         "r_mag": ("r_mag",)}


def _dictionary_learning(repo_id: str, folder_name: str, device: str, force_download: bool,
                         cfg_overrides: Mapping[str, Any] | None
                         ) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """dictionary_learning's config.json and ae.pt; only class, k and weights are needed."""
    config = _file(repo_id, folder_name, "config.json")
    trainer = json_of(config).get("trainer", {})
    kind = trainer.get("dict_class")
    if kind not in DICTIONARIES:
        raise DarkmatterError(f"its class is {kind}; those read are {', '.join(DICTIONARIES)}")
    saved = torch.load(_file(repo_id, folder_name, "ae.pt"), map_location="cpu", weights_only=True)
    # A module that torch.compile has wrapped saves its weights under this prefix.
    saved = {name.removeprefix("_orig_mod."): values for name, values in saved.items()}
    state = {ours: saved[name] for ours, names in NAMES.items() for name in names if name in saved}
    state["W_enc"] = saved["W_enc"] if "W_enc" in saved else saved["encoder.weight"].T
    state["W_dec"] = saved["W_dec"] if "W_dec" in saved else saved["decoder.weight"].T
    d_in, width = state["W_enc"].shape
    architecture, centred = DICTIONARIES[kind]
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": width,
           "apply_b_dec_to_input": centred, "metadata": {"sae_lens_version": "6.0.0"}}
    if architecture == "topk":
        cfg |= {"k": int(trainer["k"]), "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":  # one threshold a latent, or one for all
        state["threshold"] = saved["threshold"].expand(width).clone()
    return cfg | dict(cfg_overrides or {}), {
        name: values.float().contiguous() for name, values in state.items()}, None


FORMATS: Mapping[str, Callable[..., Any]] = {
    "sparsify": _sparsify, "dictionary_learning": _dictionary_learning}
