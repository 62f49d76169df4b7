"""Open an SAE by reference: shipped here, a hub release's, or a directory. None is trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TopKSAE
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DarkmatterError
from ..inputs import json_of, present
from . import artifacts, foreign
from .loaded import LoadedSAE, digest, plain_topk

WEIGHTS = "sae_weights.safetensors"
READ = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
TRAINING = ("batchtopk", "matryoshka_batchtopk")  # their threshold is not folded in
OTHERS = {"sparsify": ("cfg.json", "sae.safetensors"),
          "dictionary_learning": ("config.json", "ae.pt")}


def open_sae(ref: str) -> LoadedSAE:
    """Open 'artifact:NAME', 'release:sae_id', or a directory that sae-lens reads.

    A release is one that sae-lens lists, or a hub repository 'owner/name' in its own format. SAEs
    of other libraries are 'sparsify:PLACE' and 'dictionary_learning:PLACE': a directory, or
    'owner/name/folder' on the hub.
    Raises DarkmatterError when there is none, or its weights are not finite.
    """
    sae, record, name = _read(ref)
    check_kind(sae, ref)
    sae = sae.to(torch.float32).eval()  # .float() would leave sae-lens rounding x to the old type
    # Attention's heads are joined when they are captured, so the SAE need not join them.
    sae.turn_off_forward_pass_hook_z_reshaping()
    if sae.cfg.normalize_activations == "expected_average_only_in":
        warnings.warn(
            f"The SAE '{ref}' was trained on activations scaled to a mean norm of √d, and the "
            "scale is not part of its weights; save it with sae-lens's save_inference_model.",
            stacklevel=3)
    if type(sae) is TopKSAE and sae.cfg.rescale_acts_by_decoder_norm:
        # The same function with unit decoder norms: the form that ``LoadedSAE.encode`` reads.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    if plain_topk(sae):
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T  # a latent's weights lie together
    for weight, values in sae.state_dict().items():
        if not values.isfinite().all():
            raise DarkmatterError(f"{weight} of the SAE '{ref}' holds NaN or infinite values; its "
                                  "file is damaged, or its training failed.")
    return LoadedSAE(ref, name, sae, record, digest(sae))


def _read(ref: str) -> tuple[SAE[Any], dict[str, Any], str]:
    """The SAE, its record and its name."""
    kind, _, rest = ref.partition(":")
    if kind == "artifact":
        return artifacts.read(rest)
    if kind in foreign.FORMATS:
        return foreign.opened(kind, rest)
    folder = Path(ref).expanduser()
    return directory(folder) if folder.is_dir() else _released(kind, rest)


def directory(folder: Path) -> tuple[SAE[Any], dict[str, Any], str]:
    """The SAE of a directory that sae-lens reads, the record beside it, and its name.

    Raises DarkmatterError where a file is missing or damaged, or the SAE is of a kind that is not
    read exactly.
    """
    try:
        sae = SAE.load_from_disk(folder, converter=_from_disk)
    except DarkmatterError:
        raise
    except Exception as error:  # sae-lens raises many kinds here
        said = " ".join(str(error).split())[:200]
        raise DarkmatterError(
            f"{folder} is not an SAE directory that sae-lens reads: {said}") from error
    record = folder / "record.json"
    return sae, json.loads(record.read_text()) if record.exists() else {}, folder.name


def _from_disk(path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
               ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """sae-lens's files, as its own loader reads them, in float32 and with the scale folded in."""
    folder = Path(path)
    for kind, names in OTHERS.items():
        if not (folder / WEIGHTS).exists() and all((folder / name).exists() for name in names):
            raise DarkmatterError(f"{folder} was written by {kind}: give it as '{kind}:{folder}'.")
    if not (folder / "cfg.json").exists():
        raise DarkmatterError(f"{folder} is not an SAE directory that sae-lens reads: there is no "
                              "cfg.json in it.")
    cfg = json_of(folder / "cfg.json") | {"device": device, "dtype": "float32"}
    _check_configuration(folder, cfg)
    state = {name: values.float() for name, values in load_file(present(folder / WEIGHTS)).items()}
    scale = state.pop("scaling_factor", None)
    if scale is not None and cfg.get("finetuning_scaling_factor"):
        # Finetuning multiplies a latent's activation, which is to multiply its decoder row.
        state["W_dec"] = state["W_dec"] * scale[:, None]
    return cfg | {"finetuning_scaling_factor": False} | (cfg_overrides or {}), state


def _check_configuration(folder: Path, cfg: dict[str, Any]) -> None:
    """Raise DarkmatterError for a configuration that sae-lens would take for something else."""
    for name in ("d_in", "d_sae"):
        if not isinstance(cfg.get(name), int):
            raise DarkmatterError(f"{folder / 'cfg.json'} has no whole number '{name}'.")
    architecture = cfg.get("architecture", "standard")
    if architecture in TRAINING:
        raise DarkmatterError(
            f"{folder} is a training checkpoint of a {architecture} SAE, whose threshold is not "
            "part of it yet; save it with sae-lens's save_inference_model and give that directory.")
    activation = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if activation not in ("relu", "topk"):
        raise DarkmatterError(f"The activation function of {folder} is '{activation}'; "
                              "relu and topk are read.")


def check_kind(sae: SAE[Any], ref: str) -> None:
    """Raise DarkmatterError for an SAE of a kind that is not read exactly, and say what to do."""
    architecture, metadata = sae.cfg.architecture(), sae.cfg.metadata
    if "transcoder" in architecture:
        raise DarkmatterError(
            f"'{ref}' is a {architecture}: it predicts another site from x. Measure it in Python, "
            "on activations of both sites: dm.decompose(transcoder, x, target=y).")
    if architecture not in READ:
        raise DarkmatterError(f"'{ref}' is a {architecture} SAE; those that are read: "
                              f"{', '.join(READ)}.")
    if sae.cfg.normalize_activations == "covariance_whitening":
        raise DarkmatterError(
            f"The SAE '{ref}' reads whitened activations, and the whitening is not part of its "
            "weights; fold it in before saving: fold_activation_whitening, save_inference_model.")
    if metadata.hook_head_index is not None:
        raise DarkmatterError(f"The SAE '{ref}' reads head {metadata.hook_head_index} of a site "
                              "alone; here a site is read whole, with all its heads.")


def _released(release: str, sae_id: str) -> tuple[SAE[Any], dict[str, Any], str]:
    try:
        return SAE.from_pretrained(release, sae_id), {}, f"{release}:{sae_id}"
    except Exception as error:  # no such release, no network, no such file: as many kinds
        said = " ".join(str(error).split())[:200]
        raise DarkmatterError(
            f"The SAE '{release}:{sae_id}' cannot be opened; give 'release:sae_id' as sae-lens "
            f"lists them, a directory, or 'artifact:NAME'. sae-lens said: {said}") from error
