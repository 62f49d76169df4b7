"""Parts of an SAE's error as activations of their own, written once over a text.

LinearError is b*x and NonlinearError is x − Sae(x) − b*x (section 3 of the paper). The map b* is
fitted on the rows that the caller names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import cache, progress
from ..errors import DarkmatterError
from ..regression import LinearMap, Moments, require_rows, solve
from ..saes import codes

if TYPE_CHECKING:
    from ..models.activations import Activations
    from ..saes.loaded import LoadedSAE

PARTS = ("linear", "nonlinear", "error", "x")
CONTROLS = {"gaussian-nonlinear": "nonlinear", "gaussian-linear": "linear"}  # Gaussians like a part
NAMES = (*PARTS, *CONTROLS)
BLOCK = 16_384  # rows in memory at once


def part(base: LoadedSAE, acts: Activations, fit: np.ndarray, which: str) -> Activations:
    """One of NAMES for every token of a text: x bfloat16 [token, d] on disk, with its own key.

    ``fit`` bool [token]: the rows that b*, and a Gaussian's mean and covariance, are fitted on.
    'error' is LinearError + NonlinearError, 'x' the activations themselves; 'gaussian-…' draws
    every token independently. Raises DarkmatterError for another name, or when the rows are too few
    to fit.
    """
    if which not in NAMES:
        raise DarkmatterError(f"An error has no part '{which}'; there are {', '.join(NAMES)}.")
    if which == "x":
        return acts
    key = cache.key(acts=acts.key, sae=base.digest, which=which, fit=_digest(fit), version=1)
    folder = cache.root() / "parts" / key
    with cache.lock(key):
        if not cache.intact(folder):
            if which in CONTROLS:
                rows = gaussian_like(part(base, acts, fit, CONTROLS[which]), fit)
            else:
                rows = (parts[which] for parts in split_error(base, acts, fit))
            with cache.atomic(folder) as temporary:
                _write(temporary, rows, {"base": base.name, "base_digest": base.digest})
                cache.seal(temporary)
    file = np.memmap(folder / "x.bf16", np.uint16, "c").reshape(len(acts.x), -1)
    return replace(acts, x=torch.from_numpy(file).view(torch.bfloat16), key=key, mapped=file)


def about(rows: Activations) -> dict[str, Any]:
    """What a record says of a part: its base SAE, variance, effective dimension; {} of x."""
    path = cache.root() / "parts" / rows.key / "about.json"
    return json.loads(path.read_text()) if path.exists() else {}


def split_error(base: LoadedSAE, acts: Activations, fit: np.ndarray) -> Iterator[dict[str, Tensor]]:
    """The parts of every token's error (section 3), float32 [block, d], block by block."""
    b_star = error_map(base, acts, fit)
    for _, x, error in _errors(base, acts):
        linear = b_star(x)
        yield {"linear": linear, "nonlinear": error - linear, "error": error}


def gaussian_like(rows: Activations, fit: np.ndarray) -> Iterator[Tensor]:
    """Independent Gaussian rows with the mean and covariance of a part, float32 [block, d].

    The same rows come every time: each block is drawn with a seed of its own.
    """
    mean, values, vectors = spectrum(rows_where(rows, fit))
    factor = (vectors * values.sqrt()).T.float()
    for begin in range(0, len(rows.x), BLOCK):
        generator = torch.Generator().manual_seed(begin)
        noise = torch.randn(min(BLOCK, len(rows.x) - begin), len(mean), generator=generator)
        yield mean.float() + noise @ factor


def error_map(base: LoadedSAE, acts: Activations, fit: np.ndarray) -> LinearMap:
    """b*: weight [d, d] and bias [d], float64, fitted where ``fit`` bool [token] is true."""
    require_rows(int(fit.sum()), acts.x.shape[1])
    key = cache.key(acts=acts.key, sae=base.digest, fit=_digest(fit), version=1)
    path = cache.root() / "parts" / f"map-{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            moments = Moments()
            for rows, x, error in _errors(base, acts):
                inside = torch.from_numpy(fit[rows]).to(x.device)
                moments.update(x[inside], [("error", error[inside])])
            solved = solve(moments)["error"]
            arrays = {"weight": solved.weight.cpu().numpy(), "bias": solved.bias.cpu().numpy(),
                      "rank": np.array(solved.rank)}
            cache.save_arrays(path, **arrays)
    weight, bias = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"])
    return LinearMap(weight, bias, int(arrays["rank"]))


def spectrum(rows: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [d], and ascending eigenvalues [d] and vectors [d, d] of the covariance, float64."""
    moments = Moments()
    for block in rows:
        moments.update(block)
    values, vectors = torch.linalg.eigh(moments.centred().cross / moments.n)
    x = moments.columns[""]
    return x.shift + x.total / moments.n, values.clamp(min=0), vectors


def effective_dimension(values: Tensor) -> float:
    """(Σλ)² / Σλ² of a covariance's eigenvalues [d]: d where all are equal, 1 for one alone."""
    return float(values.sum().square() / values.square().sum())


def rows_where(rows: Activations, where: np.ndarray) -> Iterator[Tensor]:
    """The rows of a text where bool [token] is true, float32 [n, d], block by block."""
    for begin in range(0, len(rows.x), BLOCK):
        block = slice(begin, begin + BLOCK)
        yield rows.read(block)[torch.from_numpy(where[block])]


def _digest(fit: np.ndarray) -> str:
    return hashlib.sha256(np.packbits(fit).tobytes()).hexdigest()


def _errors(base: LoadedSAE, acts: Activations) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, x and SaeError(x), float32 on the SAE's device; the encoder runs once for all."""
    stored, device = codes.of(base, acts), base.sae.W_dec.device
    begins = range(0, len(acts.x), BLOCK)
    for begin in progress.bar(begins, f"errors of {base.name}", "blocks"):
        rows = slice(begin, min(begin + BLOCK, len(acts.x)))
        x = acts.read(rows, device)
        yield rows, x, x - (stored.decode(base, rows) if stored else base(x)[0])


def _write(folder: Path, rows: Iterator[Tensor], record: dict[str, Any]) -> None:
    """The rows as bfloat16 in x.bf16, and in about.json what a record says of them."""
    folder.mkdir()

    def written() -> Iterator[Tensor]:
        with (folder / "x.bf16").open("wb") as file:
            for block in rows:
                packed = block.to(torch.bfloat16).contiguous()
                file.write(packed.view(torch.uint16).cpu().numpy().tobytes())
                yield packed.float()

    _, values, _ = spectrum(written())
    record |= {"variance": float(values.sum()), "effective_dimension": effective_dimension(values)}
    (folder / "about.json").write_text(json.dumps(record))
