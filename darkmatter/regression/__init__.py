"""Linear regression on streams of rows, and what is scored on those held out. It knows tensors and nothing else.

`moments` sums and solves (b*, a*), `scores` has the definitions (FVU, R²), `draws` values with their bootstrap draws,
`splits` which rows are fitted, `decompose` the three passes that take an error apart.
"""

from .draws import Draws, drawn, interval, resample, score
from .moments import Columns, LinearMap, Moments, mirrored, require_rows, solve, squared_norm
from .scores import STATISTICS, Sums, best_scale, fvu, fvu_nonlinear, r2_vector, r2_vector_weighted
from .splits import (
    AUTHORS,
    BLOCKS,
    FIT_SHARE,
    MIN_SOURCES,
    PAPER,
    PROTOCOLS,
    STRICT,
    Protocol,
    clusters,
    split,
    token_split,
)

__all__ = [
    "AUTHORS", "BLOCKS", "FIT_SHARE", "MIN_SOURCES", "PAPER", "PROTOCOLS", "STATISTICS", "STRICT", "Columns", "Draws",
    "LinearMap", "Moments", "Protocol", "Sums", "best_scale", "clusters", "drawn", "fvu", "fvu_nonlinear", "interval",
    "mirrored", "r2_vector", "r2_vector_weighted", "require_rows", "resample", "score", "solve", "split",
    "squared_norm", "token_split",
]
