"""SAEs by reference: shipped here, trained on the spot, from a hub release, or a directory that sae-lens reads.

Shipped SAEs keep 8 bits a weight with one scale a latent; ``export`` writes any SAE as a plain sae-lens directory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TopKSAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import cache, outputs, training
from .errors import DarkmatterError
from .preset import Preset
from .topk import weighted_rows

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"


@dataclass(frozen=True)
class LoadedSAE:
    """An SAE with its name and how it was made."""

    ref: str
    name: str
    sae: Any
    """``sae_lens.SAE``, float32, in evaluation mode."""
    record: dict[str, Any]
    """How it was trained, as far as it is known."""
    digest: str
    """Changes with the weights."""

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    @property
    def k(self) -> int | None:
        """The L0 that a TopK SAE is built for; None for others."""
        return getattr(self.sae.cfg, "k", None)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and their activations, index and value [n, ·], of x [n, d_in] float32; a value of 0 is inactive."""
        if _plain_topk(self.sae):
            centred = x - self.sae.b_dec if self.sae.cfg.apply_b_dec_to_input else x
            value, index = torch.addmm(self.sae.b_enc, centred, self.sae.W_enc).topk(self.sae.cfg.k)
            return index, value.relu()
        latents = self.sae.encode(x)
        most = int((latents != 0).sum(1).max())
        index = latents.abs().topk(most, dim=1).indices
        return index, latents.gather(1, index)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sae(x) [n, d_in], L0 [n] and which latents fired [d_sae], for x [n, d_in]."""
        x = x.float()
        if not _plain_topk(self.sae):
            latents = self.sae.encode(x)
            return self.sae.decode(latents), (latents != 0).sum(1), (latents != 0).any(0)
        index, value = self.encode(x)
        fired = torch.zeros(self.width, dtype=torch.bool, device=x.device)
        fired[index[value > 0]] = True
        return weighted_rows(index, self.sae.W_dec, value) + self.sae.b_dec, (value > 0).sum(1), fired


def _plain_topk(sae: Any) -> bool:
    return (type(sae) is TopKSAE and sae.cfg.normalize_activations == "none" and not sae.hook_z_reshaping_mode
            and not sae.cfg.rescale_acts_by_decoder_norm)


def load(ref: str, preset: Preset) -> LoadedSAE:
    """Open an SAE: 'artifact:NAME', 'train:WIDTHxL0' (trained if need be), 'release:sae_id', or a directory.

    A release is one that sae-lens lists, or a hub repository 'owner/name' in its own format. SAEs of other libraries
    are 'sparsify:PLACE' and 'dictionary_learning:PLACE': a directory, or 'owner/name/folder' on the hub.
    Raises DarkmatterError when there is none, or its weights are not finite.
    """
    sae, record, name = _opened(ref, preset)
    sae = sae.to(torch.float32).eval()  # not .float(): sae-lens would go on rounding x to the old type
    sae.turn_off_forward_pass_hook_z_reshaping()  # attention's heads are joined when they are captured
    if sae.cfg.normalize_activations == "expected_average_only_in":
        warnings.warn(f"The SAE '{ref}' was trained on activations scaled to a mean norm of √d, and the scale is not "
                      "part of its weights; save it with sae-lens's save_inference_model.", stacklevel=2)
    if type(sae) is TopKSAE and sae.cfg.rescale_acts_by_decoder_norm:
        sae.fold_W_dec_norm()  # the same function, in the form that ``encode`` reads
        sae.cfg.rescale_acts_by_decoder_norm = False
    if _plain_topk(sae):
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T  # a latent's weights lie together in memory
    for weight, values in sae.state_dict().items():
        if not values.isfinite().all():
            raise DarkmatterError(f"{weight} of the SAE '{ref}' holds NaN or infinite values; its file is damaged, or "
                                  "its training failed.")
    return LoadedSAE(ref, name, sae, record, _digest(sae))


def _opened(ref: str, preset: Preset) -> tuple[SAE[Any], dict[str, Any], str]:
    """The SAE, its record and its name."""
    kind, _, rest = ref.partition(":")
    if kind == "artifact":
        return _artifact(rest)
    if kind == "train":
        return _trained(rest, preset)
    if kind in FOREIGN:
        return _foreign(kind, rest)
    folder = Path(ref).expanduser()
    return _directory(folder) if folder.is_dir() else _released(kind, rest)


def artifact_name(ref: str) -> str:
    """The name that 'artifact:NAME' or 'artifact:SUITE/NAME' was trained under; of any other reference ''."""
    return Path(ref.removeprefix("artifact:")).name if ref.startswith("artifact:") else ""


def _artifact(name: str) -> tuple[SAE[Any], dict[str, Any], str]:
    path = ARTIFACTS / f"{name}.safetensors"
    if not path.exists():
        known = ", ".join(sorted(str(p.relative_to(ARTIFACTS).with_suffix("")) for p in ARTIFACTS.rglob("*.safetensors")
                                 )) or "none"
        raise DarkmatterError(f"No SAE '{name}' ships with this book; there are: {known}.")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 — not a dict
    except SafetensorError as error:
        raise DarkmatterError(f"{path} is damaged ({error}); fetch the repository's files again.") from error
    sae = SAE.from_dict(json.loads(meta["config"]))
    sae.load_state_dict(unpack(packed))
    return sae, json.loads(meta["record"]), name.replace("/", "-")


def pack(sae: SAE[Any]) -> dict[str, Tensor]:
    """Weights of a latent as int8 times one float32 scale, biases as float32."""
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return (rows / scale).round().to(torch.int8), scale[:, 0]

    encoder, encoder_scale = rounded(sae.W_enc.data.T.contiguous())
    decoder, decoder_scale = rounded(sae.W_dec.data)
    return {"encoder": encoder, "encoder_scale": encoder_scale, "decoder": decoder, "decoder_scale": decoder_scale,
            **{name: sae.state_dict()[name] for name in ("b_enc", "b_dec")}}


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that ``pack`` was made of, to within half a step of each latent's scale."""
    return {"W_enc": (packed["encoder"] * packed["encoder_scale"][:, None]).T.contiguous(),
            "W_dec": packed["decoder"] * packed["decoder_scale"][:, None],
            "b_enc": packed["b_enc"], "b_dec": packed["b_dec"]}


def ship(folder: Path, path: Path) -> None:
    """Pack a trained SAE's directory, with its record, into one .safetensors file."""
    sae, record, _ = _directory(folder)
    meta = {"config": json.dumps(sae.cfg.to_dict()), "record": json.dumps(record), "format": "int8 a latent, v1"}
    with cache.atomic(path) as temporary:
        save_file(pack(sae), temporary, metadata=meta)


def export(preset: Preset, out: Path) -> list[Path]:
    """Write every SAE of the preset under ``out`` as a directory that ``sae_lens.SAE.load_from_disk`` reads.

    Raises DarkmatterError, before it writes any, where a directory of that name is there already.
    """
    opened = [load(ref, preset) for ref in preset.saes]
    paths = [outputs.new_folder(out / each.name) for each in opened]
    for each, path in zip(opened, paths, strict=True):
        if _plain_topk(each.sae):
            each.sae.W_enc.data = each.sae.W_enc.data.contiguous()  # safetensors takes no other order
        with cache.atomic(path) as temporary:
            each.sae.save_model(temporary)
            (temporary / "record.json").write_text(json.dumps(each.record, indent=1))
    return paths


def _trained(size: str, preset: Preset) -> tuple[SAE[Any], dict[str, Any], str]:
    try:
        width, k = (int(part) for part in size.split("x"))
        if not 0 < k <= width:
            raise ValueError(size)
    except ValueError:
        raise DarkmatterError(f"'train:{size}' is not an SAE to train; write it as 'train:4096x32'.") from None
    (name, folder), = training.run(preset, only=(width, k)).items()
    sae, record, _ = _directory(folder)
    return sae, record, name


def _directory(folder: Path) -> tuple[SAE[Any], dict[str, Any], str]:
    try:
        sae = SAE.load_from_disk(folder)
    except Exception as error:  # sae-lens raises many kinds here
        raise DarkmatterError(f"{folder} is not an SAE directory that sae-lens reads: "
                              f"{' '.join(str(error).split())[:200]}") from error
    record = folder / "record.json"
    return sae, json.loads(record.read_text()) if record.exists() else {}, folder.name


def _released(release: str, sae_id: str) -> tuple[SAE[Any], dict[str, Any], str]:
    try:
        return SAE.from_pretrained(release, sae_id), {}, f"{release}:{sae_id}"
    except Exception as error:  # no such release, no network, no such file: sae-lens raises as many kinds
        raise DarkmatterError(f"The SAE '{release}:{sae_id}' cannot be opened; give 'release:sae_id' as sae-lens lists "
                              f"them, a directory, or 'artifact:NAME'. sae-lens said: "
                              f"{' '.join(str(error).split())[:200]}") from error


# ---- other libraries' formats ----

def _foreign(kind: str, place: str) -> tuple[SAE[Any], dict[str, Any], str]:
    """An SAE that sparsify or dictionary_learning saved, from a directory or from 'owner/name/folder' on the hub."""
    folder, converter = Path(place).expanduser(), FOREIGN[kind]
    try:
        if folder.is_dir():
            with _on_disk(folder):
                sae = SAE.from_pretrained("local/local", folder.name, converter=converter)
        else:
            owner, name, inside = place.split("/", 2)
            sae = SAE.from_pretrained(f"{owner}/{name}", inside, converter=converter)
    except Exception as error:  # the loaders raise many kinds
        raise DarkmatterError(f"The SAE '{kind}:{place}' cannot be opened; give a directory that {kind} wrote, or "
                              f"'owner/name/folder' on the hub. The loader said: "
                              f"{' '.join(str(error).split())[:200]}") from error
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


def _sparsify(repo_id: str, folder_name: str, device: str, force_download: bool,
              cfg_overrides: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """sparsify's cfg.json and sae.safetensors: W_enc is ``encoder.weight``, and b_dec comes off x first.

    sae-lens's own loader transposes ``W_dec``, keeps b_dec on x, and takes the default ``num_latents`` of 0 as a width.
    """
    config, weights = (Path(loaders.hf_hub_download(repo_id=repo_id, filename=f"{folder_name}/{name}"))
                       for name in ("cfg.json", "sae.safetensors"))
    how, state = json.loads(config.read_text()), load_file(weights)
    if how.get("transcode") or how.get("skip_connection") or how.get("activation", "topk") != "topk":
        raise ValueError("it is a transcoder, has a skip connection or is no TopK SAE; only TopK SAEs can be read")
    width, d_in = state["encoder.weight"].shape
    cfg = {"architecture": "topk", "d_in": d_in, "d_sae": width, "k": how["k"], "apply_b_dec_to_input": True,
           "rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": "6.0.0"}}
    return cfg | dict(cfg_overrides or {}), {
        "W_enc": state["encoder.weight"].T.contiguous().float(), "b_enc": state["encoder.bias"].float(),
        "W_dec": state["W_dec"].float(), "b_dec": state["b_dec"].float()}, None


FOREIGN: Mapping[str, Callable[..., Any]] = {
    "sparsify": _sparsify, "dictionary_learning": loaders.dictionary_learning_sae_huggingface_loader_1}


def _digest(sae: Any) -> str:
    state = sae.state_dict()
    return cache.key(config=sae.cfg.to_dict(), **{name: _bytes_digest(values) for name, values in state.items()})


def _bytes_digest(values: Tensor) -> str:
    import hashlib

    return hashlib.sha256(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
