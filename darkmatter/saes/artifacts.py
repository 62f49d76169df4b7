"""The SAEs that come with the book: 8 bits a weight with one scale a latent, a file each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import cache
from ..errors import DarkmatterError

FOLDER = Path(__file__).resolve().parents[2] / "artifacts"


def name_of(ref: str) -> str:
    """The name that 'artifact:NAME' or 'artifact:SUITE/NAME' was trained under; else ''."""
    return Path(ref.removeprefix("artifact:")).name if ref.startswith("artifact:") else ""


def read(name: str) -> tuple[SAE[Any], dict[str, Any], str]:
    """The SAE of artifacts/NAME.safetensors, its record and its name.

    Raises DarkmatterError where there is none, or its file is damaged.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        files = FOLDER.rglob("*.safetensors")
        known = sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in files)
        raise DarkmatterError(f"No SAE '{name}' ships with this book; there are: "
                              f"{', '.join(known) or 'none'}.")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 — not a dict
    except SafetensorError as error:
        raise DarkmatterError(
            f"{path} is damaged ({error}); fetch the repository's files again.") from error
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
    biases = {name: sae.state_dict()[name] for name in ("b_enc", "b_dec")}
    return {"encoder": encoder, "encoder_scale": encoder_scale,
            "decoder": decoder, "decoder_scale": decoder_scale, **biases}


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that ``pack`` was made of, to within half a step of each latent's scale."""
    return {"W_enc": (packed["encoder"] * packed["encoder_scale"][:, None]).T.contiguous(),
            "W_dec": packed["decoder"] * packed["decoder_scale"][:, None],
            "b_enc": packed["b_enc"], "b_dec": packed["b_dec"]}


def write(sae: SAE[Any], record: dict[str, Any], path: Path) -> None:
    """Pack an SAE, with the record of its training, into one .safetensors file."""
    meta = {"config": json.dumps(sae.cfg.to_dict()), "record": json.dumps(record),
            "format": "int8 a latent, v1"}
    with cache.atomic(path) as temporary:
        save_file(pack(sae), temporary, metadata=meta)
