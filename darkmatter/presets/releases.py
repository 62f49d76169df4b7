"""SAEs that others have released, chosen by rule from sae-lens's own directory of them."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from ..errors import DarkmatterError

LAYER = re.compile(r"(?:layer_|blocks\.|^l)(\d+)")
WIDTH = re.compile(r"width_(\d+[km]?)|_(\d+x)$|_(\d+)$")
L0 = re.compile(r"average_l0_(\d+)")


def pick(release: str, layer: int, width: str = "", l0: float = 0) -> tuple[str, ...]:
    """The SAEs of a release at a layer, as 'release:sae_id', by width and L0, narrow to wide.

    ``width``: as the ids write it, '16k', '8x' or '768'; left out, every width. ``l0``: of each
    width, the one whose L0 is nearest; left out, all. An id that ends in a seed or another variant
    ('…-seed1') counts as a width of its own.
    Raises DarkmatterError when there is no such release or nothing fits.
    """
    listed = _listed(release)
    known = [(sae_id, *read_id(sae_id, listed.expected_l0)) for sae_id in listed.saes_map]
    here = [(sae_id, wide, sparse) for sae_id, at, wide, sparse in known
            if at == layer and width in ("", wide)]
    if not here:
        layers = sorted({at for _, at, _, _ in known if at is not None})
        widths = sorted({wide for _, at, wide, _ in known if at == layer}, key=size)
        there = (f"layer {layer} has the widths {', '.join(widths)}" if widths
                 else f"it has layers {layers}")
        wanted = f"layer {layer}" + (f" of width {width}" if width else "")
        raise DarkmatterError(f"The release '{release}' has no SAE at {wanted}; {there}.")
    if l0:
        widths = dict.fromkeys(wide for _, wide, _ in here)
        here = [min((sae for sae in here if sae[1] == wide), key=lambda sae: abs(sae[2] - l0))
                for wide in widths]
    ordered = sorted(here, key=lambda sae: (size(sae[1]), sae[2]))
    return tuple(f"{release}:{sae_id}" for sae_id, _, _ in ordered)


def size(width: str) -> int:
    """The latents that a width stands for: '65k' is 65,536, '1m' 1,048,576; '8x' counts as 8."""
    name = width.split("-", maxsplit=1)[0]
    number = int(re.sub(r"\D", "", name) or 0)
    rounded = number * {"m": 10**6, "k": 10**3}.get(name[-1:], 0)
    return 2 ** round(math.log2(rounded)) if rounded else number


def model_of(release: str) -> str:
    """The model that a release's SAEs read, as the hub calls it."""
    return str(_listed(release).model)


def _listed(release: str) -> Any:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        near = difflib.get_close_matches(release, directory, n=3)
        hint = f"; there are {', '.join(near)}" if near else ""
        raise DarkmatterError(f"sae-lens knows no release '{release}'{hint}.")
    return directory[release]


def read_id(sae_id: str, expected_l0: dict[str, float]) -> tuple[int | None, str, float]:
    """Layer, width and L0 of an SAE, as far as its id and the directory tell."""
    at, wide, sparse = LAYER.search(sae_id), WIDTH.search(sae_id), L0.search(sae_id)
    name = next((group for group in wide.groups() if group), "") if wide else ""
    seed = re.search(r"seed_?\d+", sae_id)
    return (int(at[1]) if at else None, name + (f"-{seed[0]}" if seed else ""),
            float(expected_l0.get(sae_id) or (sparse[1] if sparse else 0)))
