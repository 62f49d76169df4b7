"""What else predicts the size of the error? The baselines of the paper's Figure 13, held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..regression import Draws, Sums, clusters, resample, score

if TYPE_CHECKING:
    import pandas as pd

    from ..presets import Preset

TARGET = "error_norm2"


def held_out_r2(tokens: pd.DataFrame, predicted: np.ndarray, preset: Preset) -> Draws:
    """R² of predicted against actual ‖SaeError‖² on the held-out rows of ``tokens``.

    ``predicted`` float [rows of tokens]; rows where it is NaN are left out. Drawn over sources.
    """
    rows = tokens["is_eval"].to_numpy() & np.isfinite(predicted)
    context = tokens["context"].to_numpy(np.int64)
    actual = tokens[TARGET].to_numpy(np.float64)
    sums = Sums(int(context.max()) + 1)
    scored = (torch.from_numpy(column[rows]) for column in (context, actual, actual - predicted))
    sums.add_error(*scored)
    sources = np.full(int(context.max()) + 1, -1)
    sources[context] = tokens["source"].to_numpy()
    return score(resample(sums, clusters(sources), preset.bootstrap, preset.seed), "r2_norm")


def token_mean(tokens: pd.DataFrame) -> np.ndarray:
    """The mean ‖SaeError‖² of each token's type over the fitted rows; unseen types: of all rows."""
    fitted = ~tokens["is_eval"].to_numpy()
    kind, size = tokens["token_id"].to_numpy(), tokens[TARGET].to_numpy(np.float64)
    total = np.bincount(kind[fitted], size[fitted], minlength=kind.max() + 1)
    count = np.bincount(kind[fitted], minlength=kind.max() + 1)
    means = np.where(count > 0, total / np.maximum(count, 1), size[fitted].mean())
    return means[kind]


def line(tokens: pd.DataFrame, feature: np.ndarray) -> np.ndarray:
    """‖SaeError‖² as a line in one feature [rows], fitted on the fitted rows; NaN stays NaN."""
    rows = ~tokens["is_eval"].to_numpy() & np.isfinite(feature)
    size = tokens[TARGET].to_numpy(np.float64)[rows]
    if np.ptp(feature[rows]) == 0:  # as a TopK SAE's L0: the same for every token
        return np.where(np.isfinite(feature), size.mean(), np.nan)
    slope, intercept = np.polyfit(feature[rows], size, 1)
    return slope * feature + intercept


def loss_of(tokens: pd.DataFrame, losses: np.ndarray) -> np.ndarray:
    """The model's next-token loss at each row; NaN past the contexts measured.

    ``losses`` [contexts, positions], nats.
    """
    context, position = tokens["context"].to_numpy(), tokens["position"].to_numpy()
    measured = context < len(losses)
    loss = np.full(len(tokens), np.nan)
    loss[measured] = losses[context[measured], position[measured]]
    return loss


def compare(tokens: pd.DataFrame, losses: np.ndarray, preset: Preset) -> dict[str, Draws]:
    """Held-out R² of ‖SaeError‖² from the paper's probe, then from each simpler predictor."""
    predictions = {
        "x, linear (the paper's probe)": tokens["error_norm2_hat"].to_numpy(np.float64),
        "mean of the token's type": token_mean(tokens),
        "model loss": line(tokens, loss_of(tokens, losses)),
        "L0": line(tokens, tokens["l0"].to_numpy(np.float64)),
        "‖x‖²": line(tokens, tokens["x_norm2"].to_numpy(np.float64)),
    }
    return {name: held_out_r2(tokens, predicted, preset) for name, predicted in predictions.items()}
