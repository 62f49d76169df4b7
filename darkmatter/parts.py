"""Parts of an SAE's error as activations of their own: written once over a text, then read like any others.

LinearError is b*x, NonlinearError is x − Sae(x) − b*x (section 3 of the paper); b* is fitted on the rows given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cache, codes, progress
from .activations import Activations
from .errors import DarkmatterError
from .regression import LinearMap, Moments, require_rows, solve
from .saes import LoadedSAE

PARTS = ("linear", "nonlinear", "error", "x")
CONTROLS = {"gaussian-nonlinear": "nonlinear", "gaussian-linear": "linear"}  # a Gaussian with that part's covariance
NAMES = (*PARTS, *CONTROLS)
ROWS = 16_384  # rows in memory at once


def of(base: LoadedSAE, acts: Activations, fit: np.ndarray, which: str) -> Activations:
    """One of NAMES for every token of a text: x bfloat16 [token, d], memory-mapped, with a key of its own.

    ``fit`` bool [token]: the rows that b*, and a Gaussian's mean and covariance, are fitted on. 'error' is
    LinearError + NonlinearError, 'x' the activations themselves; 'gaussian-…' draws every token independently.
    Raises DarkmatterError for another name, or when the rows are too few to fit.
    """
    if which not in NAMES:
        raise DarkmatterError(f"An error has no part '{which}'; there are {', '.join(NAMES)}.")
    if which == "x":
        return acts
    key = cache.key(acts=acts.key, sae=base.digest, which=which, fit=_digest(fit), version=1)
    folder = cache.root() / "parts" / key
    with cache.lock(key):
        if not cache.intact(folder):
            blocks = _gaussian(of(base, acts, fit, CONTROLS[which]), fit) if which in CONTROLS \
                else _part(base, acts, fit, which)
            with cache.atomic(folder) as temporary:
                _write(temporary, blocks, {"base": base.name, "base_digest": base.digest})
                cache.seal(temporary)
    file = np.memmap(folder / "x.bf16", np.uint16, "c").reshape(len(acts.x), -1)
    return replace(acts, x=torch.from_numpy(file).view(torch.bfloat16), key=key, mapped=file)


def about(part: Activations) -> dict[str, Any]:
    """What a record says of a part: its base SAE, variance and effective dimension over the text; {} of x itself."""
    path = cache.root() / "parts" / part.key / "about.json"
    return json.loads(path.read_text()) if path.exists() else {}


def error_map(base: LoadedSAE, acts: Activations, fit: np.ndarray) -> LinearMap:
    """b*: weight [d, d] and bias [d], float64, fitted on the rows where ``fit`` bool [token] is true."""
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
            found = solve(moments)["error"]
            arrays = {"weight": found.weight.cpu().numpy(), "bias": found.bias.cpu().numpy(),
                      "rank": np.array(found.rank)}
            cache.save_arrays(path, **arrays)
    return LinearMap(torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"]), int(arrays["rank"]))


def spectrum(blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [d], and eigenvalues [d] (ascending) and vectors [d, d] of the covariance of rows, all float64."""
    moments = Moments()
    for rows in blocks:
        moments.update(rows)
    centred = moments.centred()
    values, vectors = torch.linalg.eigh(centred.cross / moments.n)
    return moments.columns[""].shift + moments.columns[""].total / moments.n, values.clamp(min=0), vectors


def effective_dimension(values: Tensor) -> float:
    """(Σλ)² / Σλ² of a covariance's eigenvalues [d]: d where all are equal, 1 where one is all there is."""
    return float(values.sum().square() / values.square().sum())


def blocks(acts: Activations, where: np.ndarray) -> Iterator[Tensor]:
    """The rows of a text where bool [token] is true, float32, block by block."""
    for begin in range(0, len(acts.x), ROWS):
        rows = slice(begin, begin + ROWS)
        yield acts.read(rows)[torch.from_numpy(where[rows])]


def _digest(fit: np.ndarray) -> str:
    return hashlib.sha256(np.packbits(fit).tobytes()).hexdigest()


def _errors(base: LoadedSAE, acts: Activations) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, x and SaeError(x), both float32 on the SAE's device; the encoder runs once for all parts."""
    stored, device = codes.of(base, acts), base.sae.W_dec.device
    for begin in progress.bar(range(0, len(acts.x), ROWS), f"errors of {base.name}", "blocks"):
        rows = slice(begin, min(begin + ROWS, len(acts.x)))
        x = acts.read(rows, device)
        yield rows, x, x - (stored.decode(base, rows) if stored else base(x)[0])


def _part(base: LoadedSAE, acts: Activations, fit: np.ndarray, which: str) -> Iterator[Tensor]:
    b = error_map(base, acts, fit)
    for _, x, error in _errors(base, acts):
        linear = b(x)
        yield {"linear": linear, "nonlinear": error - linear, "error": error}[which]


def _gaussian(like: Activations, fit: np.ndarray) -> Iterator[Tensor]:
    """Independent Gaussian rows with the mean and covariance of a part; drawn in blocks, the same every time."""
    mean, values, vectors = spectrum(blocks(like, fit))
    factor = (vectors * values.sqrt()).T.float()
    for begin in range(0, len(like.x), ROWS):
        generator = torch.Generator().manual_seed(begin)
        yield mean.float() + torch.randn(min(ROWS, len(like.x) - begin), len(mean), generator=generator) @ factor


def _write(folder: Path, rows: Iterator[Tensor], about: dict[str, Any]) -> None:
    """The rows as bfloat16 in x.bf16, and in about.json what a record says of them."""
    folder.mkdir()

    def written() -> Iterator[Tensor]:
        with (folder / "x.bf16").open("wb") as file:
            for block in rows:
                packed = block.to(torch.bfloat16).contiguous()
                file.write(packed.view(torch.uint16).cpu().numpy().tobytes())
                yield packed.float()

    _, values, _ = spectrum(written())
    about |= {"variance": float(values.sum()), "effective_dimension": effective_dimension(values)}
    (folder / "about.json").write_text(json.dumps(about))
