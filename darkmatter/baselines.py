"""What else predicts the size of the error? The baselines of the paper's Figure 13, all held out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from .preset import Preset
from .regression import Draws, Sums, clusters, resample, score

TARGET = "error_norm2"


def held_out_r2(tokens: pd.DataFrame, predicted: np.ndarray, preset: Preset) -> Draws:
    """R² of predicted against actual ‖SaeError‖² on the held-out rows of ``tokens``, with its interval over sources.

    ``predicted`` [rows of tokens]; rows where it is NaN are left out.
    """
    rows = tokens["is_eval"].to_numpy() & np.isfinite(predicted)
    context = tokens["context"].to_numpy(np.int64)
    actual = tokens[TARGET].to_numpy(np.float64)
    sums = Sums(int(context.max()) + 1)
    sums.add_error(*(torch.from_numpy(column[rows]) for column in (context, actual, actual - predicted)))
    sources = np.full(int(context.max()) + 1, -1)
    sources[context] = tokens["source"].to_numpy()
    return score(resample(sums, clusters(sources), preset.bootstrap, preset.seed), "r2_norm")


def token_mean(tokens: pd.DataFrame) -> np.ndarray:
    """The mean ‖SaeError‖² of each token's type over the fitted rows; unseen types get the mean of all."""
    fitted = ~tokens["is_eval"].to_numpy()
    kind, size = tokens["token_id"].to_numpy(), tokens[TARGET].to_numpy(np.float64)
    total = np.bincount(kind[fitted], size[fitted], minlength=kind.max() + 1)
    count = np.bincount(kind[fitted], minlength=kind.max() + 1)
    means = np.where(count > 0, total / np.maximum(count, 1), size[fitted].mean())
    return means[kind]


def line(tokens: pd.DataFrame, feature: np.ndarray) -> np.ndarray:
    """‖SaeError‖² from one feature [rows], a straight line with intercept fitted on the fitted rows; NaN stays NaN."""
    rows = ~tokens["is_eval"].to_numpy() & np.isfinite(feature)
    if np.ptp(feature[rows]) == 0:  # a TopK SAE's L0 is the same for every token: the line is the mean
        return np.where(np.isfinite(feature), tokens[TARGET].to_numpy()[rows].mean(), np.nan)
    slope, intercept = np.polyfit(feature[rows], tokens[TARGET].to_numpy()[rows].astype(np.float64), 1)
    return slope * feature + intercept


def loss_of(tokens: pd.DataFrame, losses: np.ndarray) -> np.ndarray:
    """The model's next-token loss at each row, from losses [contexts, positions]; NaN past the contexts measured."""
    context, position = tokens["context"].to_numpy(), tokens["position"].to_numpy()
    inside = context < len(losses)
    found = np.full(len(tokens), np.nan)
    found[inside] = losses[context[inside], position[inside]]
    return found


def table(tokens: pd.DataFrame, losses: np.ndarray, preset: Preset) -> pd.DataFrame:
    """One row a predictor: predictor, value, low, high, n (scored tokens)."""
    predictions: Mapping[str, np.ndarray] = {
        "x, linear (the paper's probe)": tokens["error_norm2_hat"].to_numpy(np.float64),
        "mean of the token's type": token_mean(tokens),
        "model loss": line(tokens, loss_of(tokens, losses)),
        "L0": line(tokens, tokens["l0"].to_numpy(np.float64)),
        "‖x‖²": line(tokens, tokens["x_norm2"].to_numpy(np.float64)),
    }
    scores = {name: held_out_r2(tokens, predicted, preset) for name, predicted in predictions.items()}
    return pd.DataFrame([{"predictor": name, "value": s.value, "low": s.low, "high": s.high, "n": s.n}
                         for name, s in scores.items()])
