"""Linear regression on streams of rows, and what is scored on those held out: only tensors.

``moments`` sums and solves (b*, a*), ``scores`` has the definitions (FVU, R²), ``draws`` the
bootstrap and values with their draws, ``splits`` which rows are fitted, ``passes`` the three passes
that take an error apart, and ``decompose`` runs them on what a user holds.
"""

from .draws import Draws, drawn, interval, resample, score
from .moments import Columns, LinearMap, Moments, mirrored, solve, squared_norm
from .scores import STATISTICS, Sums, best_scale, fvu, fvu_nonlinear, r2_vector, r2_vector_weighted
from .splits import (
    FIT_SHARE,
    MIN_SOURCES,
    PROTOCOLS,
    STRICT,
    Protocol,
    clusters,
    require_rows,
    split,
    token_split,
)

__all__ = [
    "FIT_SHARE", "MIN_SOURCES", "PROTOCOLS", "STATISTICS", "STRICT", "Columns", "Draws",
    "LinearMap", "Moments", "Protocol", "Sums", "best_scale", "clusters", "drawn", "fvu",
    "fvu_nonlinear", "interval", "mirrored", "r2_vector", "r2_vector_weighted", "require_rows",
    "resample", "score", "solve", "split", "squared_norm", "token_split",
]
