"""Tokens one by one: which of them are scored, and a stretch of text to show under their norms.

Figures 4 to 6 draw error norms over a text; Figures 7, 11 and 12 predict them. The regressions are
those of ``regression.probe``.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import DarkmatterError

if TYPE_CHECKING:
    from ..models.activations import Activations
    from ..presets import Preset
    from ..regression import probe

HIDDEN = ("news", "essays")  # domains of the built-in text whose words are not ours to print
LONGEST = 14  # characters of a token that a label shows


def split_rows(preset: Preset, acts: Activations) -> probe.Rows:
    """All kept tokens, split and drawn as the survey's strict protocol splits and draws them.

    Draws over them and the survey's own (``SurveyResult.draws``) are of the same sources.
    """
    import torch

    from .. import regression, survey  # who only shows a stretch of text needs neither
    from ..regression import probe

    fit = torch.from_numpy(survey.fitted_rows(preset, acts, regression.STRICT))
    context, clusters = torch.from_numpy(acts.context).long(), regression.clusters(acts.text.source)
    return probe.Rows(fit, context, clusters, preset.bootstrap, preset.seed)


def labels(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """One readable label a token, safe in a figure.

    '⏎' breaks a line, '␣' is other white space, '-' begins a token that goes on with a word.
    """
    words, before = [], ""
    for piece, text in _pieces(tokenizer, ids):
        if not text.strip():
            words.append("⏎" if "\n" in text else "␣")
        else:
            begins = piece.startswith(("Ġ", "▁"))
            joined = not begins and before[-1:].isalnum() and text[0].isalnum()
            plain = ("-" if joined else "") + text.strip()
            short = plain if len(plain) <= LONGEST else plain[:LONGEST - 1] + "…"
            words.append(html.escape(short, quote=False).replace("$", "＄"))
        before = text
    return words


def _pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[tuple[str, str]]:
    """(the vocabulary's form, the text) of each token; only the first shows where words begin."""
    plain = [int(token) for token in ids]
    return [(piece, tokenizer.decode([token]))
            for piece, token in zip(tokenizer.convert_ids_to_tokens(plain), plain, strict=True)]


def stretch(tokens: pd.DataFrame, tokenizer: Any, length: int, domain: str = "",
            context: int | None = None, hidden: Sequence[str] = HIDDEN) -> slice:
    """Rows of ``length`` consecutive held-out tokens to show, all of one context.

    It begins after the context's first line break, if there is one. Of a domain's contexts, the one
    with the most tokens there that begin a word. ``domain`` '' takes plays, else the first there
    is; never one of ``hidden``. Raises DarkmatterError where nothing fits what is asked for.
    """
    held = tokens.query("is_eval and domain not in @hidden")
    contexts: dict[int, pd.DataFrame] = {
        int(number): rows for number, rows in held.groupby("context") if len(rows) >= length}  # type: ignore[arg-type]
    domains = {number: str(rows["domain"].iloc[0]) for number, rows in contexts.items()}
    names = sorted(set(domains.values()), key=lambda name: (name != "plays", name))
    if not names:
        raise DarkmatterError(f"No held-out context has {length} kept tokens that may be shown; "
                              "give more text.")
    if domain and domain not in names:
        raise DarkmatterError(f"No held-out text of '{domain}' may be shown; give one of "
                              f"{', '.join(names)}.")
    if context is not None and context not in contexts:
        some = ", ".join(map(str, list(contexts)[:8]))
        raise DarkmatterError(f"The text of context {context} may not be shown; give one of {some} "
                              "or another held-out one.")
    if context is None:
        wanted = [number for number in contexts if domains[number] == (domain or names[0])]
    else:
        wanted = [context]
    starts = (_start(contexts[number], tokenizer, length) for number in wanted)
    _, begin = max(starts, key=lambda start: start[0])
    return slice(begin, begin + length)


def _start(rows: pd.DataFrame, tokenizer: Any, length: int) -> tuple[int, int]:
    """How many words begin in the stretch of one context, and the table's row where it begins."""
    pieces = _pieces(tokenizer, rows["token_id"].to_numpy())
    breaks = (i + 1 for i, (_, text) in enumerate(pieces[:len(rows) - length]) if "\n" in text)
    first = next(breaks, 0)
    words = sum(piece.startswith(("Ġ", "▁")) and piece[1:].isalpha()
                for piece, _ in pieces[first:first + length])
    return words, int(rows.index[0]) + first
