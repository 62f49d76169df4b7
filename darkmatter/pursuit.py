"""Greedy codes on an SAE's dictionary: what the same atoms could explain if they were chosen better (section 6.1).

Gradient pursuit (Blumensath and Davies 2008) adds, in each step, the atom of largest signed inner product with the
residual, moves all chosen weights once along the gradient, by the step that is best along it, and clips them at 0.
Orthogonal matching pursuit takes the largest absolute inner product and solves for all weights, of either sign.

The inner products of every atom with every residual bound the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import progress
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .regression import Moments, Sums, clusters, fvu, fvu_nonlinear, require_rows, resample, solve
from .saes import LoadedSAE
from .scaling import Draws
from .topk import sampled_dot, weighted_rows

ROWS = 512  # tokens in memory at once: their scores stay in the processor's cache
ZERO = 1e-6  # of the largest inner product there could be: what counts as none
Rule = Literal["gradient", "orthogonal"]


@dataclass(frozen=True)
class Code:
    """Atoms of each token: index int64 [n, k] and weight float32 [n, k]; a place whose weight is 0 holds no atom."""

    index: Tensor
    weight: Tensor

    def sum(self, atoms: Tensor) -> Tensor:
        """Σ weight · atom, float32 [n, d]."""
        return weighted_rows(self.index, atoms, self.weight)

    @property
    def on(self) -> Tensor:
        """Which places hold an atom: bool [n, k]."""
        return self.weight != 0


def strongest(residual: Tensor, atoms: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """The atom of largest (signed or absolute) inner product with each row of residual [n, d], and that product."""
    products = residual @ atoms.T
    atom = (products if signed else products.abs()).argmax(1)
    return atom, products.gather(1, atom[:, None])[:, 0]


def pursue(x: Tensor, atoms: Tensor, steps: Tensor | int, rule: Rule = "gradient") -> Code:
    """Code x [n, d] (float32, the dictionary's bias subtracted) on atoms [m, d], in so many ``steps`` (int, or [n]).

    At most one atom a step: gradient pursuit can choose an atom again, and clip one away. Atoms are taken as they are,
    so that a longer one is chosen more easily; an SAE's have norm 1. Raises DarkmatterError for more steps than atoms.
    """
    steps = torch.as_tensor(steps, device=x.device).expand(len(x))
    most = max([1, *steps.tolist()])
    if most > len(atoms):
        raise DarkmatterError(f"A code of {most} atoms takes at least as many in the dictionary; it has {len(atoms)}.")
    atoms = atoms.detach().float().contiguous()
    index = torch.zeros(len(x), most, dtype=torch.long, device=x.device)
    weight = torch.zeros(len(x), most, device=x.device)
    batches = steps.argsort(descending=True, stable=True).split(ROWS)  # tokens that stop early come last
    for rows in progress.bar(batches, f"{rule} pursuit", "batches"):
        index[rows], weight[rows] = _batch(x[rows].float(), atoms, steps[rows], most, rule)
    return Code(index, weight)


@torch.no_grad()
def _batch(x: Tensor, atoms: Tensor, steps: Tensor, most: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """``pursue`` for tokens with descending numbers of steps; inner products within a support are kept, not redone."""
    n, residual = len(x), x
    index, used = torch.zeros(n, most, dtype=torch.long, device=x.device), torch.zeros(n, most, dtype=torch.bool)
    weight, target, gram = x.new_zeros(n, most), x.new_zeros(n, most), x.new_zeros(n, most, most)
    used, least = used.to(x.device), ZERO * x.norm(dim=1) * atoms.norm(dim=1).max()
    for t in range(most):
        m, s = int((steps > t).sum()), t + 1
        if not m:
            break
        new, product = strongest(residual[:m], atoms, signed=rule == "gradient")
        again = ((index[:m, :t] == new[:, None]) & used[:m, :t]).any(1)
        index[:m, t], used[:m, t] = new, ~again & (product.abs() > least[:m])
        row = atoms[new]
        target[:m, t] = (x[:m] * row).sum(1)
        gram[:m, t, :s] = gram[:m, :s, t] = sampled_dot(row, atoms, index[:m, :s])
        move = _gradient if rule == "gradient" else _orthogonal
        weight[:m, :s] = move(gram[:m, :s, :s], target[:m, :s], weight[:m, :s], used[:m, :s])
        used[:m, :s] &= weight[:m, :s] != 0
        residual = x[:m] - weighted_rows(index[:m, :s], atoms, weight[:m, :s])
    return index, weight


def _gradient(gram: Tensor, target: Tensor, weight: Tensor, used: Tensor) -> Tensor:
    """One move along the gradient of ‖x − Σ w d‖² on the support, by the exact step, clipped at 0."""
    gradient = (target - (gram @ weight[:, :, None])[:, :, 0]) * used
    curvature = (gradient * (gram @ gradient[:, :, None])[:, :, 0]).sum(1)
    step = gradient.square().sum(1) / torch.where(curvature > 0, curvature, torch.inf)
    return (weight + step[:, None] * gradient).relu()


def _orthogonal(gram: Tensor, target: Tensor, weight: Tensor, used: Tensor) -> Tensor:
    """The weights of least squares on the support."""
    both = used[:, :, None] & used[:, None, :]
    return torch.linalg.solve(gram * both + torch.diag_embed((~used).float()), target * used)


def refit(x: Tensor, atoms: Tensor, code: Code) -> Code:
    """The same atoms with the weights of least squares (of either sign), for x [n, d] as ``pursue`` takes it."""
    parts = []
    for some, index, used in zip(x.split(ROWS), code.index.split(ROWS), code.on.split(ROWS), strict=True):
        rows = atoms[index]
        gram, target = rows @ rows.mT, (rows @ some[:, :, None])[:, :, 0]
        parts.append(_orthogonal(gram, target, target, used))
    return Code(code.index, torch.cat(parts))


def encoder(each: LoadedSAE, x: Tensor) -> Code:
    """The SAE's own code of x [n, d_in]."""
    return Code(*each.encode(x))


def among(a: Code, b: Code) -> Tensor:
    """Which places of ``a`` hold an atom that ``b`` has for the same token: bool [n, k]."""
    found = [((i[:, :, None] == j[:, None, :]) & on[:, None, :]).any(2)
             for i, j, on in zip(a.index.split(ROWS), b.index.split(ROWS), b.on.split(ROWS), strict=True)]
    return torch.cat(found) & a.on


def unexplained(preset: Preset, acts: Activations, rows: np.ndarray, fit: np.ndarray,
                errors: Mapping[str, Tensor]) -> Draws:
    """FVU and FVU_nonlinear of some errors [n, d] of the same tokens, a column each, b* fitted to each of them.

    ``rows`` int [n]: the tokens; ``fit`` bool [every token]: which of them b* is fitted on, the others are scored.
    Raises DarkmatterError where too few are fitted.
    """
    inside, x = torch.from_numpy(fit[rows]), acts.x[rows].float()
    require_rows(int(inside.sum()), x.shape[1])
    moments = Moments()
    moments.update(x[inside], ((name, error[inside]) for name, error in errors.items()))
    maps, ids = solve(moments), torch.from_numpy(acts.context[rows]).long()[~inside]
    values = []
    for name, error in errors.items():
        sums = Sums(len(acts.text.tokens))
        sums.add_error(ids, error[~inside], (error - maps[name](x))[~inside])
        of_x = Sums(len(acts.text.tokens))
        of_x.add_x(ids, x[~inside])
        totals = resample(of_x | sums, clusters(acts.text.source), preset.bootstrap, preset.seed)
        values.append((fvu(totals), fvu_nonlinear(totals), float(totals["effective"][0])))
    fvus, nonlinears, effective = zip(*values, strict=True)
    return Draws(torch.stack(fvus, 1).numpy(), torch.stack(nonlinears, 1).numpy(), effective[0])


def mean(preset: Preset, acts: Activations, rows: np.ndarray, values: Tensor) -> tuple[Tensor, float]:
    """The mean of values [n] or [n, k] over tokens, with its draws: float64 [1 + bootstrap, k]; and what the sources
    are worth in sources of equal size."""
    sums = Sums(len(acts.text.tokens))
    sums.add_error(torch.from_numpy(acts.context[rows]).long(), values, values)
    totals = resample(sums, clusters(acts.text.source), preset.bootstrap, preset.seed)
    return totals["e"] / totals["n"][:, None], float(totals["effective"][0])
