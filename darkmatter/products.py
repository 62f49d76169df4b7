"""Moments of an SAE's error from its sparse codes, where the dense product with x would take longer.

SaeError = x − z W_dec − b_dec, z the codes of x, of whose ``width`` values only L0 a row are not zero. With
u = x − shift,

    Uᵀ(SaeError − (shift − b_dec)) = UᵀU − (ZᵀU)ᵀ W_dec.

ZᵀU takes L0 · d multiplications a row in place of d², and Sae(x) need not be decoded; the one dense product, of ZᵀU
with the decoder, does not depend on the number of rows. ZᵀU is summed in float32 over ``GROUP`` blocks and in float64
over those groups; the product is float64: parts of a text that are cut between groups add up to the whole.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .regression import ROWS, WIDE, Columns, add_narrow, mirrored

GROUP = 16  # blocks that are summed in float32: float64 sums of all latents after each take longer than ZᵀU (TRIED.md)
SLOW = 20  # a sparse multiplication takes as long as so many of a dense product, on two cores
WIDER = 2.5  # and one of a dense product in float64 as long as so many
GAIN = 1.75  # times as fast as the dense product at least: the sums below take memory


def cheaper(rows: int, d: int, width: int, active: float) -> bool:
    """Whether the codes, ``active`` a row, give the moments of ``rows`` rows clearly sooner, on a processor.

    Counted in multiplications of a dense product. Dense: decode, then XᵀSaeError. Here: ZᵀX and its product with W_dec.
    """
    if not torch.backends.mkl.is_available():  # torch has no other product of a sparse matrix in place
        return False
    gathered = SLOW * active * d
    return GAIN * (rows * gathered + WIDER * width * d**2) < rows * (gathered + d**2)


class CodedError:
    """Streaming ZᵀU [width, d] and Σz [width] of one SAE, float64. Memory: 12 · width · d bytes for any n."""

    def __init__(self, decoder: Tensor, bias: Tensor) -> None:
        """W_dec [width, d] and b_dec [d], float32 on the processor."""
        self.decoder, self.bias = decoder, bias
        self.products, self.group = torch.zeros(decoder.shape, dtype=WIDE), torch.zeros(decoder.shape)
        self.total = torch.zeros(len(decoder), dtype=WIDE)

    @torch.no_grad()
    def update(self, u: Tensor, z: sparse.csr_array) -> None:
        """Add rows u = x − shift, float32 [n, d], and their codes z [n, width]."""
        self.total += torch.from_numpy(np.bincount(z.indices, z.data, len(self.total)))
        turned = z.T.tocsr()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            of_latents = torch.sparse_csr_tensor(torch.from_numpy(turned.indptr), torch.from_numpy(turned.indices),
                                                 torch.from_numpy(turned.data), turned.shape, check_invariants=False)
        self.group.addmm_(of_latents, u)

    def begin(self, block: int) -> None:
        """Say which block of the text comes next, from 0: with the first of a group, the group before is added."""
        if block and block % GROUP == 0:
            self._close()

    def _close(self) -> None:
        add_narrow(self.products, self.group)
        self.group.zero_()

    @torch.no_grad()
    def columns(self, of_x: Columns) -> Columns:
        """What ``Moments`` holds of SaeError, from what it holds of x itself over the same rows.

        ``of_x.shift`` is the shift that was taken off the rows.
        """
        self._close()
        cross = mirrored(of_x.cross)
        for products, rows in zip(self.products.split(ROWS), self.decoder.split(ROWS), strict=True):
            cross.addmm_(products.T, rows.to(WIDE), alpha=-1)
        total = of_x.total - self.total @ self.decoder.to(WIDE)
        return Columns(of_x.shift - self.bias.to(WIDE), total, cross, of_x.n)
