"""The three passes that take the errors of any number of SAEs apart (sections 3 to 5 of the paper).

pass 1  moments of (x, error) over the fitted rows          -> b*
pass 2  residuals with b* known, squared norms of every row -> FVU, FVU_nonlinear, both vector R²
pass 3  the squared norms regressed on x and scored         -> R² of the norm, norm test

Rows stream block by block and XᵀX is shared by all SAEs, so memory does not grow with the rows but
for one table of seven numbers a row and SAE.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .draws import Draws, drawn, resample, score
from .moments import LinearMap, Moments, home, solve, squared_norm
from .scores import VECTORS, Sums, mean

NORMS, ERROR, L0, PREDICTED = slice(0, 5), VECTORS.index("error"), 5, 6  # columns of the table
COLUMNS = (*(f"{vector}_norm2" for vector in VECTORS), "l0", "error_norm2_hat")


class Block(NamedTuple):
    """Rows handled at once, as they are read in every pass."""

    rows: slice
    """Where they stand among all rows."""
    x: Tensor
    """[n, d]: what the errors are predicted from."""
    y: Tensor
    """[n, k]: what is reconstructed; x itself, but for a transcoder."""


class Reconstruction(NamedTuple):
    """What an SAE makes of a block."""

    y: Tensor
    """[n, k]: Sae(x)."""
    l0: Tensor | None = None
    """[n]: active latents of each row, where they are known."""
    fired: Tensor | None = None
    """bool [latents]: which of them fired on any row."""


ReadBlocks = Callable[[str], Iterator[Block]]
"""Reads all rows; the word says which pass asks: 'first', 'second' or 'third'."""
Reconstruct = Callable[[Block], Reconstruction]


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
    """The three passes for one choice of rows; ``run`` them, then ask for scores by SAE.

    ``tokens`` is the table by SAE: [rows, 7], its columns are ``COLUMNS``. ``maps`` is b* by SAE,
    and ``fired``, bool [latents], the latents that fired on any row, of SAEs that have latents.
    """

    def __init__(self, blocks: ReadBlocks, saes: Mapping[str, Reconstruct], choice: Choice) -> None:
        self.blocks, self.saes, self.choice = blocks, saes, choice
        groups, rows = len(choice.cluster), len(choice.fit)
        self.of_y = Sums(groups)
        self.of_error = {name: Sums(groups) for name in saes}
        self.of_norms = {name: Sums(groups) for name in saes}
        self.of_l0 = {name: Sums(groups) for name in saes}
        self.fired: dict[str, Tensor] = {}
        self.maps: dict[str, LinearMap] = {}
        self.tokens = {name: np.zeros((rows, len(COLUMNS)), choice.table) for name in saes}
        self._maps_like_x: dict[str, LinearMap] = {}  # in the type and on the device of the rows
        self._totals: tuple[str, dict[str, Tensor]] = "", {}

    def run(self) -> "Passes":
        """All three passes."""
        self.maps = solve(self._moments_of_errors(), self.choice.intercept)
        norm_maps = solve(self._moments_of_norms(), self.choice.intercept)
        self._score_norms(norm_maps)
        return self

    def _moments_of_errors(self) -> Moments:
        """Pass 1: moments of x and of every error over the fitted rows, for b* (section 3)."""
        moments: Moments | None = None
        for block in self.blocks("first"):
            moments = moments or _moments_like(block.x)
            fit = self.choice.fit[block.rows].to(block.x.device)
            # A generator makes the errors one at a time, so that one is in memory.
            if fit.any():
                errors = ((name, (block.y - reconstruct(block).y)[fit])
                          for name, reconstruct in self.saes.items())
                moments.update(block.x[fit], errors)
        return moments or Moments()

    def _moments_of_norms(self) -> Moments:
        """Pass 2: sums over the scored rows, and moments for the maps that predict squared norms.

        Fills the tables with the squared norms of all rows.
        """
        moments: Moments | None = None
        for block in self.blocks("second"):
            moments = moments or _moments_like(block.x)
            scored = self._scored(block)
            # Σ‖y − ȳ‖² is the denominator of FVU, and the same for all SAEs.
            if scored.any():
                self.of_y.add_x(self._groups(block), block.y[scored])
            # Each SAE's error and its two parts are measured, and their squared norms fitted.
            x_norm = squared_norm(block.x)
            norms = {name: self._measure(name, reconstruct(block), block, x_norm)
                     for name, reconstruct in self.saes.items()}
            fit = self.choice.fit[block.rows].to(block.x.device)
            if fit.any():
                moments.update(block.x[fit], ((name, norm[fit]) for name, norm in norms.items()))
        return moments or Moments()

    def _measure(self, name: str, sae: Reconstruction, block: Block, x_norm: Tensor) -> Tensor:
        """One SAE on one block: adds to its sums, fills its table, returns squared norms [n, 5]."""
        # SaeError = y − Sae(x), LinearError = b*x, and what is left is NonlinearError (section 3).
        error = block.y - sae.y
        if name not in self._maps_like_x:
            self._maps_like_x[name] = self.maps[name].to(block.x.dtype, block.x.device)
        linear = self._maps_like_x[name](block.x)
        nonlinear = error - linear
        scored, table = self._scored(block), self.tokens[name]
        if scored.any():
            self.of_error[name].add_error(self._groups(block), error[scored], nonlinear[scored])
        # Latents are counted where the SAE has them.
        if sae.l0 is not None:
            if scored.any():
                l0 = sae.l0.to(scored.device)[scored]
                self.of_l0[name].add_values(self._groups(block), l0)
            table[block.rows, L0] = sae.l0.cpu()
        if sae.fired is not None:
            fired = sae.fired.cpu()
            self.fired[name] = self.fired[name] | fired if name in self.fired else fired
        # Squared norms of x, Sae(x), SaeError, LinearError and NonlinearError, as in VECTORS.
        norms = torch.stack([x_norm, *map(squared_norm, (sae.y, error, linear, nonlinear))], 1)
        table[block.rows, NORMS] = norms.cpu()
        return norms

    def _score_norms(self, maps: dict[str, LinearMap]) -> None:
        """Pass 3: the squared norms' predictions a*x, and what they leave on the scored rows."""
        for block in self.blocks("third"):
            scored = self.choice.scored[block.rows]
            wide = block.x.to(home(block.x)).double()
            for name, table in self.tokens.items():
                predicted = maps[name](wide).cpu()
                norms = torch.from_numpy(table[block.rows, NORMS]).double()
                table[block.rows, PREDICTED] = predicted[:, ERROR]
                if scored.any():
                    self.of_norms[name].add_error(self._groups(block), norms[scored],
                                                  (norms - predicted)[scored])

    def _scored(self, block: Block) -> Tensor:
        """Which rows of a block are scored, bool [n], on its device."""
        return self.choice.scored[block.rows].to(block.x.device)

    def _groups(self, block: Block) -> Tensor:
        """The groups of a block's scored rows."""
        return self.choice.group[block.rows][self.choice.scored[block.rows]]

    def _resampled(self, *sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joined = {key: value for part in sums for key, value in part.items()}
        return resample(joined, self.choice.cluster, self.choice.draws, self.choice.seed)

    # ---- scores ----

    def vector_score(self, name: str, metric: str) -> Draws:
        """One of VECTOR_METRICS."""
        if self._totals[0] != name:  # kept for one SAE at a time: they are large
            self._totals = name, self._resampled(self.of_y, self.of_error[name])
        return score(self._totals[1], metric)

    def norm_score(self, name: str, vector: str) -> Draws:
        """R² of the squared norm of one of VECTORS, regressed on x (the norm test, section 5)."""
        column = VECTORS.index(vector)
        sums = {key: value[:, column:column + 1] if value.ndim == 2 else value
                for key, value in self.of_norms[name].items()}
        return score(self._resampled(sums), "r2_norm")

    def mean_l0(self, name: str) -> Draws | None:
        """Mean number of active latents a scored row; None where latents are not known."""
        if "v" not in self.of_l0[name]:
            return None
        totals = self._resampled(self.of_l0[name])
        return drawn(totals, mean(totals)[:, 0])


def _moments_like(x: Tensor) -> Moments:
    return Moments("float64" if x.dtype == torch.float64 else "float32")
