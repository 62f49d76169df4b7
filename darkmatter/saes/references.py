"""Every SAE that a preset can name: opened, or trained where the reference asks for that."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

from .. import cache, outputs
from ..errors import DarkmatterError
from ..presets import Preset
from . import artifacts
from .loaded import LoadedSAE, plain_topk
from .loading import directory, open_sae


def load_sae(ref: str, preset: Preset) -> LoadedSAE:
    """Open an SAE as ``open_sae`` does; 'train:WIDTHxL0' is trained on the preset's stream first.

    Raises DarkmatterError as ``open_sae`` does, and where WIDTHxL0 is not a size.
    """
    kind, _, size = ref.partition(":")
    if kind != "train":
        sae = open_sae(ref)
        _warn_of_another_place(sae, preset)
        return sae
    from . import training  # above this file: only who asks for it trains

    (name, folder), = training.run(preset, only=size_of(size)).items()
    return replace(open_sae(str(folder)), ref=ref, name=name)


def _warn_of_another_place(sae: LoadedSAE, preset: Preset) -> None:
    """Warn where an SAE says that it was trained on another site or model than it is used on."""
    metadata = sae.sae.cfg.metadata
    if metadata.hook_name and _place(metadata.hook_name) != _place(preset.site):
        warnings.warn(f"The SAE '{sae.ref}' was trained at {metadata.hook_name}, "
                      f"and reads {preset.site} here.", stacklevel=3)
    if metadata.model_name and _model(metadata.model_name) != _model(preset.model):
        warnings.warn(f"The SAE '{sae.ref}' was trained on the model {metadata.model_name}, "
                      f"and reads {preset.model} here.", stacklevel=3)


def _place(site: str) -> str:
    """One name a place: what enters a layer is what leaves the layer before it."""
    entered = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", site)
    return f"blocks.{int(entered[1]) - 1}.hook_resid_post" if entered else site


def _model(name: str) -> str:
    """One name a model: without its owner, and GPT-2 as the hub has it."""
    bare = Path(name).name.lower()
    return "gpt2" if bare == "gpt2-small" else bare


def size_of(size: str) -> tuple[int, int]:
    """Width and L0 of 'WIDTHxL0'. Raises DarkmatterError where it is not that."""
    width, _, k = size.partition("x")
    if not (width.isdigit() and k.isdigit() and 0 < int(k) <= int(width)):
        raise DarkmatterError(f"'train:{size}' is not an SAE to train; "
                              "write it as 'train:4096x32'.")
    return int(width), int(k)


def ship(folder: Path, path: Path) -> None:
    """Pack a trained SAE's directory, with its record, into one .safetensors file."""
    sae, record, _ = directory(folder)
    artifacts.write(sae, record, path)


def export(preset: Preset, out: Path) -> list[Path]:
    """Write the preset's SAEs under ``out``, as directories that sae-lens's load_from_disk reads.

    Raises DarkmatterError, before it writes any, where a directory of that name is there already.
    """
    opened = [load_sae(ref, preset) for ref in preset.saes]
    paths = [outputs.new_folder(out / one.name) for one in opened]
    for one, path in zip(opened, paths, strict=True):
        if plain_topk(one.sae):
            one.sae.W_enc.data = one.sae.W_enc.data.contiguous()  # safetensors takes no other order
        with cache.atomic(path) as temporary:
            one.sae.save_model(temporary)
            (temporary / "record.json").write_text(json.dumps(one.record, indent=1))
    return paths
