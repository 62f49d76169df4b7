"""Tokens one by one: which are scored, and the text under the curves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from darkmatter import survey
from darkmatter.errors import DarkmatterError
from darkmatter.experiments import per_token
from darkmatter.regression import probe
from tests import tiny


def test_rows_are_split_as_the_survey_splits_them() -> None:
    acts, preset = tiny.acts(), tiny.preset()
    rows = per_token.split_rows(preset, acts)
    strict = survey.fitted_rows(preset, acts, survey.PROTOCOLS["strict"])
    np.testing.assert_array_equal(rows.fit.numpy(), strict)
    np.testing.assert_array_equal(rows.group.numpy(), acts.context)
    owner = torch.from_numpy(rows.cluster)[rows.group]
    for source in owner.unique():
        assert len(rows.fit[owner == source].unique()) == 1  # a source lies on one side


def test_draws_go_with_the_surveys(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm test made here is the survey's own, draw by draw."""
    sae = tiny.loaded("w32", tiny.topk(32))
    preset = tiny.preset(saes=tiny.surveyed(monkeypatch, tiny.acts(), sae))
    result = survey.run(preset)
    target = torch.from_numpy(result.tokens("w32")[["error_norm2"]].to_numpy(float).copy())
    rows = per_token.split_rows(preset, result.acts)
    here, = probe.held_out_r2(result.acts.read, target, rows)
    there = result.draws("w32", "norm_test_error")
    np.testing.assert_allclose((here - there).values, 0, atol=1e-4)


# ---- the text under the curves

WORDS = {1: ("ĠThe", " The"), 2: ("Ġt", " t"), 3: ("ailor", "ailor"), 4: (",", ","),
         5: ("Ċ", "\n"), 6: ("Ġ", " "), 7: ("<b>", "<b>"), 8: ("$$", "$$"), 9: ("ĠOr", " Or"),
         10: ("Ġ" + 30 * "-", " " + 30 * "-")}


class Tokenizer(SimpleNamespace):
    """As much of a tokenizer as labels read."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[each][0] for each in ids]

    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[each][1] for each in ids)


def test_labels_are_readable_and_safe() -> None:
    found = per_token.labels(Tokenizer(), [1, 2, 3, 4, 5, 9, 6, 7, 8, 10])
    assert found[:6] == ["The", "t", "-ailor", ",", "⏎", "Or"]
    assert found[6] == "␣"
    assert found[7] == "&lt;b&gt;"
    assert "$" not in found[8]
    assert len(found[9]) == per_token.LONGEST and found[9].endswith("…")


def test_labels_of_a_vocabulary_whose_decoder_drops_the_space() -> None:
    """As Llama's, which marks a word's begin with '▁'."""
    pieces = {0: ("▁we", "we"), 1: ("ary", "ary"), 2: ("▁sea", "sea")}
    llama: Any = SimpleNamespace(convert_ids_to_tokens=lambda ids: [pieces[i][0] for i in ids],
                                 decode=lambda ids: pieces[ids[0]][1])
    assert per_token.labels(llama, [0, 1, 2]) == ["we", "-ary", "sea"]


def tokens(**columns: Any) -> pd.DataFrame:
    """Two contexts each of plays (0, 1), scripture (2, 3), news (4, 5); odd ones are held out."""
    context = np.repeat(np.arange(6), 12)
    words = np.where(np.arange(72) % 4 == 0, 1, 4)  # one word in four
    domain = np.array(["plays", "plays", "scripture", "scripture", "news", "news"])[context]
    planted = {"context": context, "is_eval": context % 2 == 1, "domain": domain, "token_id": words}
    return pd.DataFrame(planted | columns)


def test_stretch_takes_held_out_plays_first() -> None:
    found = per_token.stretch(tokens(), Tokenizer(), 8)
    assert found == slice(12, 20)
    assert per_token.stretch(tokens(), Tokenizer(), 8, domain="scripture") == slice(36, 44)
    assert per_token.stretch(tokens(), Tokenizer(), 8, context=3) == slice(36, 44)


def test_stretch_begins_after_a_line_break_and_prefers_words() -> None:
    broken = tokens()
    broken.loc[14, "token_id"] = 5
    assert per_token.stretch(broken, Tokenizer(), 8) == slice(15, 23)
    broken.loc[22, "token_id"] = 5  # a later one, after which too little would be left
    assert per_token.stretch(broken, Tokenizer(), 8) == slice(15, 23)
    more = tokens(is_eval=True)
    more.loc[12:23, "token_id"] = 1
    assert per_token.stretch(more, Tokenizer(), 8) == slice(12, 20)  # has more words than context 0


def test_stretch_never_shows_a_hidden_domain() -> None:
    with pytest.raises(DarkmatterError, match=r"'news'.*give one of plays, scripture"):
        per_token.stretch(tokens(), Tokenizer(), 8, domain="news")
    with pytest.raises(DarkmatterError, match="context 5 may not be shown"):
        per_token.stretch(tokens(), Tokenizer(), 8, context=5)
    with pytest.raises(DarkmatterError, match="context 2 may not be shown"):  # fitted on
        per_token.stretch(tokens(), Tokenizer(), 8, context=2)
    only = tokens(domain="news")
    with pytest.raises(DarkmatterError, match="give more text"):
        per_token.stretch(only, Tokenizer(), 8)
    assert per_token.stretch(only, Tokenizer(), 8, hidden=()) == slice(12, 20)  # of a reader's own


def test_stretch_needs_a_long_enough_context() -> None:
    with pytest.raises(DarkmatterError, match="give more text"):
        per_token.stretch(tokens(), Tokenizer(), 13)
