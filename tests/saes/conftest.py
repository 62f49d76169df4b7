"""A toy SAE for the tests of formats and of loading."""

from __future__ import annotations

import numpy as np
import pytest

from tests import formats
from tests.saes.test_formats import WIDTH, D


@pytest.fixture
def made() -> formats.Weights:
    weights = formats.random(D, WIDTH, scale=4.0, l0=0.2)
    weights.b_enc[:] = 0.1 * np.random.default_rng(1).standard_normal(WIDTH)
    # large: taking it off x or not is seen
    weights.b_dec[:] = np.random.default_rng(2).standard_normal(D)
    return weights
