"""Which explained variance? One SAE's reconstruction under each formula that libraries publish.

The same x and x̂ give different numbers: some take the variance about the mean and some about
zero, some a ratio of sums and some a mean of ratios, and some leave out the error's own mean.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from torch import Tensor

from ..errors import DarkmatterError

Formula = Callable[[Tensor, Tensor], float]


def _paper(x: Tensor, rebuilt: Tensor) -> float:
    return 1 - float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())


def _about_zero(x: Tensor, rebuilt: Tensor) -> float:
    return 1 - float((x - rebuilt).square().sum() / x.square().sum())


def _mean_of_ratios(x: Tensor, rebuilt: Tensor) -> float:
    missing = (x - rebuilt).square().sum(-1)
    return 1 - float((missing / (x - x.mean(0)).square().sum(-1)).mean())


def _mean_of_squares(x: Tensor, rebuilt: Tensor) -> float:
    """As SAEBench 0.6 has it: (mean of x²)² stands where the square of the mean of x would."""
    variance = x.square().sum(-1).mean() - x.square().mean() ** 2
    return 1 - float((x - rebuilt).square().sum(-1).mean() / variance)


def _without_the_errors_mean(x: Tensor, rebuilt: Tensor) -> float:
    return 1 - float((x - rebuilt).var(0).sum() / x.var(0).sum())


FORMULAS: dict[str, tuple[str, str, Formula]] = {
    "paper": ("1 − FVU of the paper; sae-lens's explained_variance; 1 − sparsify's fvu",
              "1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²", _paper),
    "legacy": ("explained_variance_legacy of sae-lens and of SAEBench",
               "1 − mean over tokens of ‖x − x̂‖² / ‖x − x̄‖²", _mean_of_ratios),
    "saebench": ("explained_variance of SAEBench 0.6",
                 "1 − E‖x − x̂‖² / (E‖x‖² − (mean of x²)²)", _mean_of_squares),
    "dictionary_learning": ("frac_variance_explained of dictionary_learning",
                            "1 − Σ Var(x − x̂) / Σ Var(x)", _without_the_errors_mean),
    "about zero": ("1 − the share of the squared norm that is missing",
                   "1 − Σ‖x − x̂‖² / Σ‖x‖²", _about_zero),
}


def explained_variances(x: Tensor, rebuilt: Tensor) -> pd.DataFrame:
    """Each formula's explained variance of the reconstructions of x, both [n, d]: a row a formula.

    Columns: name, where (who publishes it), formula, value; computed in float64 over all rows as
    one batch. Raises DarkmatterError where the shapes differ or there are fewer than two rows.
    """
    if x.ndim != 2 or x.shape != rebuilt.shape or len(x) < 2:
        raise DarkmatterError(f"x is {tuple(x.shape)} and its reconstruction "
                              f"{tuple(rebuilt.shape)}; both must be [n, d], with n at least 2.")
    wide = x.double(), rebuilt.double()
    return pd.DataFrame([
        {"name": name, "where": where, "formula": formula, "value": compute(*wide)}
        for name, (where, formula, compute) in FORMULAS.items()])
