"""The three passes that take the errors of any number of SAEs apart (sections 3 to 5 of the paper).

pass 1  moments of (x, error) over the fitted rows                   -> b*
pass 2  residuals with b* known, squared norms of every row          -> FVU, FVU_nonlinear, both vector R²
pass 3  the squared norms regressed on x and scored                  -> R² of the norm, norm test

Rows stream block by block and XᵀX is shared by all SAEs, so memory does not grow with the rows but for one table
of seven numbers a row and SAE.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .draws import Draws, drawn, resample, score
from .moments import LinearMap, Moments, home, solve, squared_norm
from .scores import Sums, mean

VECTORS = ("x", "sae", "error", "linear", "nonlinear")
COLUMNS = (*(f"{name}_norm2" for name in VECTORS), "l0", "error_norm2_hat")
VECTOR_METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted")


class Block(NamedTuple):
    """Some rows, as they are read in every pass."""

    rows: slice
    """Where they stand among all rows."""
    x: Tensor
    """[n, d]: what the errors are predicted from."""
    y: Tensor
    """[n, k]: what is reconstructed; x itself, but for a transcoder."""


class Rebuilt(NamedTuple):
    """What an SAE makes of a block."""

    y: Tensor
    """[n, k]: Sae(x)."""
    l0: Tensor | None = None
    """[n]: active latents of each row, where they are known."""
    fired: Tensor | None = None
    """bool [latents]: which of them fired on any row."""


Blocks = Callable[[str], Iterator[Block]]
"""Reads all rows; the word says which pass asks."""
Rebuild = Callable[[Block], Rebuilt]


@dataclass(frozen=True)
class Choice:
    """Which rows are fitted and scored, and in which groups their sums are kept."""

    fit: Tensor
    """bool [rows]"""
    scored: Tensor
    """bool [rows]"""
    group: Tensor
    """int64 [rows]: the group (context, source) of each row; fastest where equal ones adjoin."""
    cluster: np.ndarray
    """int [groups]: the source of each group, of which bootstrap draws are made."""
    intercept: bool = True
    draws: int = 1000
    seed: int = 0
    table: type[np.floating] = np.float64
    """The type of the table of rows, which the third pass reads the squared norms from."""


class Passes:
    """The three passes for one choice of rows; `run` them, then ask for scores by SAE."""

    def __init__(self, blocks: Blocks, saes: Mapping[str, Rebuild], choice: Choice) -> None:
        self.blocks, self.saes, self.choice = blocks, saes, choice
        groups, rows = len(choice.cluster), len(choice.fit)
        self.of_y = Sums(groups)
        self.of_error = {name: Sums(groups) for name in saes}
        self.of_norms = {name: Sums(groups) for name in saes}
        self.of_l0 = {name: Sums(groups) for name in saes}
        self.fired: dict[str, Tensor] = {}
        self.maps: dict[str, LinearMap] = {}
        self._near: dict[str, LinearMap] = {}  # the same in the type and on the device of the rows
        self.tokens = {name: np.zeros((rows, len(COLUMNS)), choice.table) for name in saes}
        self._totals: tuple[str, dict[str, Tensor]] = "", {}

    def run(self) -> "Passes":
        """All three passes."""
        self.maps = solve(self._pass_one(), self.choice.intercept)
        self._pass_three(solve(self._pass_two(), self.choice.intercept))
        return self

    def _pass_one(self) -> Moments:
        """Of x and every error over the fitted rows, for b* (section 3)."""
        moments: Moments | None = None
        for block in self.blocks("first"):
            moments = moments or _moments(block.x)
            fit = self.choice.fit[block.rows].to(block.x.device)
            if fit.any():  # the errors one at a time, so that one is in memory
                errors = ((name, (block.y - rebuild(block).y)[fit]) for name, rebuild in self.saes.items())
                moments.update(block.x[fit], errors)
        return moments or Moments()

    def _pass_two(self) -> Moments:
        """Sums over the scored rows, squared norms of all rows, and the moments for the maps that predict them."""
        moments: Moments | None = None
        for block in self.blocks("second"):
            moments = moments or _moments(block.x)
            if self._scored(block).any():
                self.of_y.add_x(self._groups(block), block.y[self._scored(block)])
            of_x = squared_norm(block.x)
            norms = {name: self._measured(name, rebuild(block), block, of_x) for name, rebuild in self.saes.items()}
            fit = self.choice.fit[block.rows].to(block.x.device)
            if fit.any():
                moments.update(block.x[fit], ((name, norm[fit]) for name, norm in norms.items()))
        return moments or Moments()

    def _measured(self, name: str, rebuilt: Rebuilt, block: Block, of_x: Tensor) -> Tensor:
        """One SAE on one block: adds to its sums, fills its table, returns the five squared norms [n, 5]."""
        error = block.y - rebuilt.y
        if name not in self._near:
            self._near[name] = self.maps[name].to(block.x.dtype, block.x.device)
        linear = self._near[name](block.x)
        residual = error - linear
        scored, table = self._scored(block), self.tokens[name]
        if scored.any():
            self.of_error[name].add_error(self._groups(block), error[scored], residual[scored])
        if rebuilt.l0 is not None:
            if scored.any():
                self.of_l0[name].add_values(self._groups(block), rebuilt.l0.to(scored.device)[scored])
            table[block.rows, VECTORS.index("nonlinear") + 1] = rebuilt.l0.cpu()
        if rebuilt.fired is not None:
            fired = rebuilt.fired.cpu()
            self.fired[name] = self.fired[name] | fired if name in self.fired else fired
        norms = torch.stack([of_x, *map(squared_norm, (rebuilt.y, error, linear, residual))], 1)
        table[block.rows, :len(VECTORS)] = norms.cpu()
        return norms

    def _pass_three(self, maps: dict[str, LinearMap]) -> None:
        """The squared norms' predictions a*x, and what they leave on the scored rows."""
        for block in self.blocks("third"):
            scored = self.choice.scored[block.rows]
            wide = block.x.to(home(block.x)).double()
            for name, table in self.tokens.items():
                predicted = maps[name](wide).cpu()
                norms = torch.from_numpy(table[block.rows, :len(VECTORS)]).double()
                table[block.rows, -1] = predicted[:, VECTORS.index("error")]
                if scored.any():
                    self.of_norms[name].add_error(self._groups(block), norms[scored], (norms - predicted)[scored])

    def _scored(self, block: Block) -> Tensor:
        return self.choice.scored[block.rows].to(block.x.device)

    def _groups(self, block: Block) -> Tensor:
        return self.choice.group[block.rows][self.choice.scored[block.rows]]

    def _drawn(self, *sums: Sums) -> dict[str, Tensor]:
        joined = {key: value for each in sums for key, value in each.items()}
        return resample(joined, self.choice.cluster, self.choice.draws, self.choice.seed)

    # ---- scores ----

    def vector_score(self, name: str, metric: str) -> Draws:
        """One of VECTOR_METRICS."""
        if self._totals[0] != name:  # of one SAE at a time: they are large
            self._totals = name, self._drawn(self.of_y, self.of_error[name])
        return score(self._totals[1], metric)

    def norm_score(self, name: str, vector: str) -> Draws:
        """R² of the squared norm of one of VECTORS, regressed on x (the norm prediction test, section 5)."""
        column = VECTORS.index(vector)
        sums = {key: value[:, column:column + 1] if value.ndim == 2 else value
                for key, value in self.of_norms[name].items()}
        return score(resample(sums, self.choice.cluster, self.choice.draws, self.choice.seed), "r2_norm")

    def mean_l0(self, name: str) -> Draws | None:
        """Mean number of active latents a scored row; None where latents are not known."""
        if "v" not in self.of_l0[name]:
            return None
        totals = self._drawn(self.of_l0[name])
        return drawn(totals, mean(totals)[:, 0])


def _moments(x: Tensor) -> Moments:
    return Moments("float64" if x.dtype == torch.float64 else "float32")
