"""Norms token by token: predicted, scored on held-out sources, and shown beside their text (sections 4 and 5).

Figures 5, 11 and 12 predict a wide SAE's error norms from a narrow one's; Figure 7 predicts squared norms from x.
Here both are one regression with intercept, from any features of a token, scored draw by draw.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import regression, scaling, survey
from .activations import Activations
from .errors import DarkmatterError
from .preset import Preset
from .regression.moments import ROWS

HIDDEN = ("news", "essays")  # domains of the built-in text whose words are not ours to print
LONGEST = 14  # characters of a token that a label shows


@dataclass(frozen=True)
class Rows:
    """Which rows fit, which context each belongs to, and what the intervals are drawn over."""

    fit: Tensor
    """bool [row]: fitted on; the others are scored."""
    context: Tensor
    """int64 [row]: rows of one context adjoin."""
    clusters: np.ndarray
    """int [context]: the source, or block of contexts, that a bootstrap draws as one."""
    bootstrap: int = 1000
    seed: int = 0

    @classmethod
    def of(cls, preset: Preset, acts: Activations) -> Rows:
        """All kept tokens, split as the survey's strict protocol splits them."""
        fit = torch.from_numpy(survey.fitted_rows(preset, acts, regression.STRICT))
        context, clusters = torch.from_numpy(acts.context).long(), regression.clusters(acts.text.source)
        return cls(fit, context, clusters, preset.bootstrap, preset.seed)

    def thin(self, every: int) -> Rows:
        """One row in ``every``."""
        return replace(self, fit=self.fit[::every], context=self.context[::every])

    @property
    def effective(self) -> float:
        """What the held-out sources are worth in sources of equal size."""
        sizes = np.bincount(self.clusters[self.context[~self.fit].numpy()]).astype(float)
        return float(sizes.sum() ** 2 / np.square(sizes).sum())

    def estimate(self, draws: np.ndarray) -> tuple[float, float | None, float | None]:
        """A value and its 95% interval, from draws [1 + n]: as measured, then on n draws of the held-out sources."""
        return scaling.estimate(draws, self.effective)


def fit(read: Callable[[slice], Tensor], targets: Tensor, rows: Rows) -> regression.LinearMap:
    """Least squares with intercept from the features of a token to ``targets`` [row, k], float64, on the fitted rows.

    ``read`` gives the features [·, j] of a slice of rows, such as ``acts.read`` or a tensor's ``__getitem__``; products
    of float64 features are float64. Raises DarkmatterError where fewer rows are fitted than there are features.
    """
    first = read(slice(0, 1))
    regression.require_rows(int(rows.fit.sum()), first.shape[1])
    moments = regression.Moments("float64" if first.dtype == torch.float64 else "float32")
    for some in blocks(len(targets)):
        if (chosen := rows.fit[some]).any():
            moments.update(read(some)[chosen], [("norms", targets[some][chosen])])
    return regression.solve(moments)["norms"]


def predict(read: Callable[[slice], Tensor], targets: Tensor, rows: Rows) -> Tensor:
    """Predictions of ``fit``, float64 [row, k], for all rows."""
    fitted = fit(read, targets, rows)
    return torch.cat([fitted(read(some).double()) for some in blocks(len(targets))])


def blocks(n: int) -> Iterator[slice]:
    """n rows, a few thousand at a time."""
    yield from (slice(begin, min(begin + ROWS, n)) for begin in range(0, n, ROWS))


def r2(targets: Tensor, predicted: Tensor, rows: Rows) -> np.ndarray:
    """Held-out R² of each column of ``predicted`` [row, k], as draws [1 + n, k]; NaN where a target does not vary."""
    totals = _totals(targets, targets - predicted, rows)
    each = [regression.r2_vector({"n": totals["n"]} | {key: totals[key][:, [j]] for key in ("e", "ee", "rr")})
            for j in range(targets.shape[1])]
    return torch.stack(each, 1).numpy()


def means(values: Tensor, rows: Rows) -> np.ndarray:
    """Means of ``values`` [row, k] over the held-out rows, as draws [1 + n, k]."""
    totals = _totals(values, values, rows)
    return (totals["e"] / totals["n"][:, None]).numpy()


def _totals(targets: Tensor, residuals: Tensor, rows: Rows) -> dict[str, Tensor]:
    """Sums over the held-out rows and over each draw of their sources: one seed draws the same sources always."""
    held, sums = ~rows.fit, regression.Sums(len(rows.clusters))
    sums.add_error(rows.context[held], targets[held], residuals[held])
    return regression.resample(sums, rows.clusters, rows.bootstrap, rows.seed)


def removed(without: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Share of the residual variance that a further feature removes (Figure 12), from R² without and with it."""
    return 1 - (1 - added) / (1 - without)


def labels(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """One readable label a token, safe in a figure: '⏎' breaks a line, '-' begins a token that goes on with a word."""
    found, before = [], ""
    for piece, text in _pieces(tokenizer, ids):
        if not text.strip():
            found.append("⏎" if "\n" in text else "␣")
        else:
            joined = not piece.startswith(("Ġ", "▁")) and before[-1:].isalnum() and text[0].isalnum()
            plain = ("-" if joined else "") + text.strip()
            short = plain if len(plain) <= LONGEST else plain[:LONGEST - 1] + "…"
            found.append(html.escape(short, quote=False).replace("$", "＄"))
        before = text
    return found


def _pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[tuple[str, str]]:
    """(the vocabulary's own form, the text) of each token; only the first says whether a word begins."""
    plain = [int(each) for each in ids]
    return [(piece, tokenizer.decode([each]))
            for piece, each in zip(tokenizer.convert_ids_to_tokens(plain), plain, strict=True)]


def stretch(tokens: pd.DataFrame, tokenizer: Any, length: int, domain: str = "", context: int | None = None,
            hidden: Sequence[str] = HIDDEN) -> slice:
    """Rows of ``length`` consecutive held-out tokens to show, of one context, after its first line break if it has one.

    Of a domain's contexts, the one with the most tokens there that begin a word. ``domain`` '' takes plays, else the
    first there is; never one of ``hidden``. Raises DarkmatterError where nothing fits what is asked for.
    """
    held = tokens.query("is_eval and domain not in @hidden")
    places = {int(each): rows for each, rows in held.groupby("context") if len(rows) >= length}  # type: ignore[arg-type]
    domains = {each: str(rows["domain"].iloc[0]) for each, rows in places.items()}
    names = sorted(set(domains.values()), key=lambda name: (name != "plays", name))
    if not names:
        raise DarkmatterError(f"No held-out context has {length} kept tokens that may be shown; give more text.")
    if domain and domain not in names:
        raise DarkmatterError(f"No held-out text of '{domain}' may be shown; give one of {', '.join(names)}.")
    if context is not None and context not in places:
        raise DarkmatterError(f"The text of context {context} may not be shown; give one of "
                              f"{', '.join(map(str, list(places)[:8]))} or another held-out one.")
    wanted = [each for each in places if domains[each] == (domain or names[0])] if context is None else [context]
    _, begin = max((_start(places[each], tokenizer, length) for each in wanted), key=lambda found: found[0])
    return slice(begin, begin + length)


def _start(rows: pd.DataFrame, tokenizer: Any, length: int) -> tuple[int, int]:
    """How many words begin in the stretch of one context, and the table's row where the stretch begins."""
    pieces = _pieces(tokenizer, rows["token_id"].to_numpy())
    breaks = (i + 1 for i, (_, text) in enumerate(pieces[:len(rows) - length]) if "\n" in text)
    first = next(breaks, 0)
    words = sum(piece.startswith(("Ġ", "▁")) and piece[1:].isalpha() for piece, _ in pieces[first:first + length])
    return words, int(rows.index[0]) + first
