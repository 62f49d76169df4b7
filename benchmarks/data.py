"""Inputs that every machine can make from a seed: structured activations, their errors, SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkmatter.saes.kernels import sampled_dot, weighted_rows

BLOCK = 4096  # rows drawn at once
MEANS = -3.0, 5.0  # of the first dimension and of the last
Codes = tuple[Tensor, Tensor]


def generator(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def block(n: int, d: int, seed: int, device: str = "cpu") -> Tensor:
    """Activations float32 [n, d]: a large mean, variances that fall by a thousand, correlations."""
    g = generator(seed, device)
    x = torch.randn(n, d, generator=g, device=device) * torch.logspace(0, -1.5, d, device=device)
    for turn in range(3):  # reflections mix the dimensions at little cost
        axis = torch.randn(d, generator=generator(turn, device), device=device)
        x.addr_(x @ (axis / axis.norm()), axis / axis.norm(), alpha=-2)
    return x + torch.linspace(*MEANS, d, device=device)


def blocks(n: int, d: int, device: str = "cpu", begin: int = 0) -> Iterator[Tensor]:
    """Rows ``begin`` to ``n``, block by block; ``begin`` is a multiple of BLOCK."""
    for at in range(begin, n, BLOCK):
        yield block(min(BLOCK, n - at), d, at, device)


def rows(n: int, d: int, device: str = "cpu") -> Tensor:
    """All of them: [n, d]."""
    whole = torch.empty(n, d, device=device)
    for at, part in zip(range(0, n, BLOCK), blocks(n, d, device), strict=True):
        whole[at:at + BLOCK] = part
    return whole


def atoms(width: int, d: int, device: str = "cpu", seed: int = 7) -> Tensor:
    """Unit rows [width, d]."""
    rows = torch.randn(width, d, generator=generator(seed, device), device=device)
    return torch.nn.functional.normalize(rows, dim=1)


class RandomSAE:
    """A decoder, and codes that take no encoder: latents are drawn, values are products.

    Low latents are drawn more often than high ones. The scale makes about half of the error linear
    in x.
    """

    def __init__(self, d: int, sae: Sequence[int], seed: int, device: str = "cpu") -> None:
        """``sae``: its width and k."""
        (width, k), self.seed = sae, seed
        self.k = k
        self.decoder = atoms(width, d, device, seed)
        self.bias = torch.linspace(*MEANS, d, device=device)
        noise = (2 * d / k) ** 0.5
        self.scale = 2 * d / k / (1 + noise)

    def codes(self, x: Tensor, begin: int) -> Codes:
        """Index int32 [n, k] and value [n, k] of a block of rows x [n, d], from row ``begin``."""
        g = generator(begin + self.seed + 1, str(x.device))
        index = torch.rand(len(x), self.k, generator=g,
                           device=x.device).square_().mul_(len(self.decoder)).int()
        return index, sampled_dot(x - self.bias, self.decoder, index).relu_() * self.scale

    def error(self, x: Tensor, codes: Codes) -> Tensor:
        """SaeError [n, d]."""
        return x - self.bias - weighted_rows(codes[0], self.decoder, codes[1])


def sparse_rows(n: int, dictionary: Tensor, active: int) -> Tensor:
    """Sums of ``active`` atoms each, with exponential weights, and a little noise: [n, d]."""
    device = str(dictionary.device)
    g = generator(8, device)
    index = torch.randint(len(dictionary), (n, active), generator=g, device=device)
    weight = torch.empty(n, active, device=device).exponential_(generator=g)
    x = torch.nn.functional.embedding_bag(index, dictionary, per_sample_weights=weight, mode="sum")
    return x + 0.02 * torch.randn(x.shape, generator=g, device=device)


def sae(kind: str, width: int, k: int, d: int, device: str = "cpu",
        seed: int = 0, sample: Tensor | None = None) -> Any:
    """A random, tied SAE of sae-lens, 'topk' or 'jumprelu', with about ``k`` latents active on a
    sample of x [n, d]; left out, on ``block``'s rows."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

    common: dict[str, Any] = {"d_in": d, "d_sae": width, "device": device}
    made: Any = (TopKSAE(TopKSAEConfig(k=k, **common)) if kind == "topk"
                 else JumpReLUSAE(JumpReLUSAEConfig(**common)))
    with torch.no_grad():
        rows = torch.randn(width, d, generator=generator(seed, device), device=device)
        made.W_dec.copy_(rows * d**-0.5)
        made.W_enc.copy_(made.W_dec.T)
        made.b_enc.zero_()
        sample = block(512, d, 0, device) if sample is None else sample
        made.b_dec.copy_(sample.mean(0))
        made.cfg.apply_b_dec_to_input = True
        if kind == "jumprelu":
            before = (sample - made.b_dec) @ made.W_enc
            made.threshold.fill_(float(before.flatten().topk(k * len(sample)).values[-1]))
    return made.eval()


def loaded(name: str, made: Any) -> Any:
    """The same as the package holds an opened SAE."""
    from darkmatter.saes.loaded import LoadedSAE

    return LoadedSAE(name, name, made, {}, digest=f"{name} of the benchmarks")


def activations(contexts: int, kept: int, d: int, folder: Path, device: str = "cpu") -> Any:
    """Kept activations as the package reads them: bfloat16 in a file, never whole in memory."""
    from darkmatter.models.activations import Activations
    from darkmatter.text.corpus import Corpus

    n, path = contexts * kept, folder / f"x-{contexts}-{kept}-{d}.bf16"
    if not path.exists():
        with path.open("wb") as file:
            for part in blocks(n, d, device):
                file.write(part.bfloat16().cpu().view(torch.uint8).numpy().tobytes())
    mapped = np.memmap(path, np.uint16, "c", shape=(n, d))
    context, position = np.divmod(np.arange(n, dtype=np.int32), np.int32(kept))
    owner = np.arange(contexts, dtype=np.int32) // 3
    text = Corpus(np.zeros((contexts, kept + 1), np.int32), owner,
                  tuple(f"news/{i}" for i in range(owner[-1] + 1)))
    return Activations(torch.from_numpy(mapped).view(torch.bfloat16),
                       context, position, text, path.stem, mapped)


@contextmanager
def instead(module: Any, name: str, value: Any) -> Iterator[None]:
    """``module.name`` is ``value`` inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
