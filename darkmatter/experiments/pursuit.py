"""Greedy codes on an SAE's dictionary: what its atoms could explain if they were chosen better.

Section 6.1. Gradient pursuit (Blumensath and Davies 2008) adds in each step the atom with the
largest signed inner product with the residual. Then it moves all chosen weights once along the
gradient, by the step that is best along it, and sets negative ones to 0. Orthogonal matching
pursuit takes the largest absolute inner product and solves for all weights, of either sign.

The inner products of every atom with every residual bound the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from .. import progress
from ..errors import DarkmatterError
from ..regression import Moments, Sums, clusters, drawn, require_rows, resample, score, solve
from ..regression.scores import mean
from ..saes.kernels import sampled_dot, weighted_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from ..models.activations import Activations
    from ..presets import Preset
    from ..regression import Draws
    from ..saes.loaded import LoadedSAE

ROWS = 512  # tokens handled at once: their inner products stay in the processor's cache
ZERO = 1e-6  # an inner product below this share of the largest that there could be counts as none
Rule = Literal["gradient", "orthogonal"]


@dataclass(frozen=True)
class Code:
    """Atoms of each token: index int64 [n, k] and weight float32 [n, k].

    A place whose weight is 0 holds no atom.
    """

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
    """The atom whose inner product with each row of residual [n, d] is largest, and that product.

    ``signed``: the largest; else the largest in size.
    """
    products = residual @ atoms.T
    atom = (products if signed else products.abs()).argmax(1)
    return atom, products.gather(1, atom[:, None])[:, 0]


def step(gram: Tensor, target: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """One step of gradient pursuit: new weights w [n, k] of the atoms d that a token has chosen.

    The error ‖x − Σᵢ wᵢdᵢ‖², x less the dictionary's bias, falls fastest along minus half its
    gradient, gᵢ = dᵢ·x − Σⱼ (dᵢ·dⱼ) wⱼ, and going along it, is least at w + g ‖g‖² / ‖Σᵢ gᵢdᵢ‖².
    gram [n, k, k] holds dᵢ·dⱼ and target [n, k] holds dᵢ·x; chosen bool [n, k]: which places hold
    an atom.
    """
    # That direction, for the chosen atoms alone.
    gradient = (target - (gram @ weight[:, :, None])[:, :, 0]) * chosen
    # How far to go along it; nowhere, where it is zero.
    curvature = (gradient * (gram @ gradient[:, :, None])[:, :, 0]).sum(1)
    length = gradient.square().sum(1) / torch.where(curvature > 0, curvature, torch.inf)
    # An SAE's activations are not negative: a weight below 0 is clipped, which takes its atom out.
    return (weight + length[:, None] * gradient).relu()


def least_squares(gram: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Weights w [n, k] of the chosen atoms that make ‖x − Σᵢ wᵢdᵢ‖² least; see ``step``."""
    both = chosen[:, :, None] & chosen[:, None, :]
    return torch.linalg.solve(gram * both + torch.diag_embed((~chosen).float()), target * chosen)


def pursue(x: Tensor, atoms: Tensor, steps: Tensor | int, rule: Rule = "gradient") -> Code:
    """Code x [n, d] (float32, the dictionary's bias subtracted) on atoms [m, d].

    ``steps``: how many, of all tokens or [n]. At most one atom a step: gradient pursuit can choose
    an atom again, and clip one away. Atoms are taken as they are, so that a longer one is chosen
    more easily; an SAE's have norm 1. Raises DarkmatterError for more steps than atoms.
    """
    steps = torch.as_tensor(steps, device=x.device).expand(len(x))
    most = max([1, *steps.tolist()])
    if most > len(atoms):
        raise DarkmatterError(f"A code of {most} atoms takes at least as many in the dictionary; "
                              f"it has {len(atoms)}.")
    atoms = atoms.detach().float().contiguous()
    index = torch.zeros(len(x), most, dtype=torch.long, device=x.device)
    weight = torch.zeros(len(x), most, device=x.device)
    # Tokens with many steps come first: those that have made theirs are the last of their block.
    blocks = steps.argsort(descending=True, stable=True).split(ROWS)
    for rows in progress.bar(blocks, f"{rule} pursuit", "blocks"):
        index[rows], weight[rows] = _pursue(x[rows].float(), atoms, steps[rows], most, rule)
    return Code(index, weight)


@torch.no_grad()
def _pursue(x: Tensor, atoms: Tensor, steps: Tensor, most: int, rule: Rule
            ) -> tuple[Tensor, Tensor]:
    """Index and weight [n, most] of one block of tokens, in falling order of their number of steps.

    The inner products of chosen atoms with x and with each other are kept from step to step.
    """
    n, residual = len(x), x
    index = torch.zeros(n, most, dtype=torch.long, device=x.device)
    chosen = torch.zeros(n, most, dtype=torch.bool, device=x.device)
    weight, target, gram = x.new_zeros(n, most), x.new_zeros(n, most), x.new_zeros(n, most, most)
    least = ZERO * x.norm(dim=1) * atoms.norm(dim=1).max()
    for t in range(most):
        # Tokens that have made all their steps stand last, and stay as they are.
        m, s = int((steps > t).sum()), t + 1
        if not m:
            break
        # The strongest atom takes the next place, unless it has one or nothing is left to explain.
        atom, product = strongest(residual[:m], atoms, signed=rule == "gradient")
        again = ((index[:m, :t] == atom[:, None]) & chosen[:m, :t]).any(1)
        index[:m, t], chosen[:m, t] = atom, ~again & (product.abs() > least[:m])
        # Its inner products with x and with the atoms chosen before.
        row = atoms[atom]
        target[:m, t] = (x[:m] * row).sum(1)
        gram[:m, t, :s] = gram[:m, :s, t] = sampled_dot(row, atoms, index[:m, :s])
        # New weights for all chosen atoms. One that is clipped to 0 is free to be chosen again.
        known = gram[:m, :s, :s], target[:m, :s]
        weight[:m, :s] = step(*known, weight[:m, :s], chosen[:m, :s]) if rule == "gradient" \
            else least_squares(*known, chosen[:m, :s])
        chosen[:m, :s] &= weight[:m, :s] != 0
        residual = x[:m] - weighted_rows(index[:m, :s], atoms, weight[:m, :s])
    return index, weight


def refit(x: Tensor, atoms: Tensor, code: Code) -> Code:
    """The same atoms with the weights of least squares, of either sign, for x as in ``pursue``."""
    weights, blocks = [], (rows.split(ROWS) for rows in (x, code.index, code.on))
    for signal, index, on in zip(*blocks, strict=True):
        row = atoms[index]
        weights.append(least_squares(row @ row.mT, (row @ signal[:, :, None])[:, :, 0], on))
    return Code(code.index, torch.cat(weights))


def encoder(sae: LoadedSAE, x: Tensor) -> Code:
    """The SAE's own code of x [n, d_in]."""
    return Code(*sae.encode(x))


def among(a: Code, b: Code) -> Tensor:
    """Which places of ``a`` hold an atom that ``b`` has for the same token: bool [n, k]."""
    blocks = (rows.split(ROWS) for rows in (a.index, b.index, b.on))
    shared = [((i[:, :, None] == j[:, None, :]) & on[:, None, :]).any(2)
              for i, j, on in zip(*blocks, strict=True)]
    return torch.cat(shared) & a.on


class Unexplained(NamedTuple):
    """What a code leaves of x, as shares of the variance of x (sections 3 and 4)."""

    fvu: Draws
    fvu_nonlinear: Draws

    @property
    def linear(self) -> Draws:
        """FVU − FVU_nonlinear: the part that a linear map of x predicts."""
        return self.fvu - self.fvu_nonlinear


def unexplained(preset: Preset, acts: Activations, rows: np.ndarray, fit: np.ndarray,
                errors: Mapping[str, Tensor]) -> dict[str, Unexplained]:
    """FVU and FVU_nonlinear of errors [n, d] of the same tokens, with a b* fitted to each of them.

    ``rows`` int [n]: the tokens; ``fit`` bool [every token]: which of them b* is fitted on, the
    others are scored. Raises DarkmatterError where too few are fitted.
    """
    inside, x = torch.from_numpy(fit[rows]), acts.x[rows].float()
    require_rows(int(inside.sum()), x.shape[1])
    # b* of every error on the fitted tokens; they share XᵀX.
    moments = Moments()
    moments.update(x[inside], ((name, error[inside]) for name, error in errors.items()))
    maps = solve(moments)
    # Sums over the held-out tokens of each context: of x, each error, and what its map leaves.
    x, context = x[~inside], torch.from_numpy(acts.context[rows]).long()[~inside]
    of_x, sources, left = Sums(len(acts.text.tokens)), clusters(acts.text.source), {}
    of_x.add_x(context, x)
    for name, error in errors.items():
        of_error = Sums(len(acts.text.tokens))
        of_error.add_error(context, error[~inside], error[~inside] - maps[name](x))
        totals = resample(of_x | of_error, sources, preset.bootstrap, preset.seed)
        left[name] = Unexplained(score(totals, "fvu"), score(totals, "fvu_nonlinear"))
    return left


def means(preset: Preset, acts: Activations, rows: np.ndarray, values: Tensor) -> list[Draws]:
    """The mean over tokens of each column of values [n, k]; ``rows`` int [n]: the tokens."""
    sums = Sums(len(acts.text.tokens))
    sums.add_values(torch.from_numpy(acts.context[rows]).long(), values)
    totals = resample(sums, clusters(acts.text.source), preset.bootstrap, preset.seed)
    return [drawn(totals, column) for column in mean(totals).T]
