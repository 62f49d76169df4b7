"""Each published formula of explained variance, against numpy and the libraries' own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator

from darkmatter.errors import DarkmatterError
from darkmatter.regression.explained import explained_variances

N, D = 500, 6


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """x with a large mean, and a reconstruction whose error has a mean of its own."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, D)) * [1, 2, 3, 1, 1, 1] + 5
    return x, x * 0.9 + 0.3 * rng.standard_normal((N, D)) + 0.2


def test_every_formula_in_numpy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, rebuilt = pair
    missing, about = x - rebuilt, x - x.mean(0)
    expected = {
        "paper": 1 - (missing**2).sum() / (about**2).sum(),
        "legacy": 1 - ((missing**2).sum(1) / (about**2).sum(1)).mean(),
        "saebench": 1 - (missing**2).sum(1).mean() / ((x**2).sum(1).mean() - (x**2).mean() ** 2),
        "dictionary_learning": 1 - missing.var(0, ddof=1).sum() / x.var(0, ddof=1).sum(),
        "about zero": 1 - (missing**2).sum() / (x**2).sum(),
    }
    table = explained_variances(torch.from_numpy(x), torch.from_numpy(rebuilt))
    assert dict(zip(table.name, table.value, strict=True)) == pytest.approx(expected, rel=1e-12)
    assert len({round(value, 3) for value in expected.values()}) == len(expected)  # all differ here


def test_the_papers_is_sae_lens_own(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, rebuilt = map(torch.from_numpy, pair)
    own = ExplainedVarianceCalculator()
    for rows in torch.arange(N).split(130):
        own.add_batch(sae_output=rebuilt[rows], hidden_acts=x[rows])
    value = explained_variances(x, rebuilt).set_index("name").value["paper"]
    assert value == pytest.approx(own.compute(), rel=1e-9)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(DarkmatterError, match=r"x is \(5, 3\) and its reconstruction \(5, 4\)"):
        explained_variances(torch.zeros(5, 3), torch.zeros(5, 4))
