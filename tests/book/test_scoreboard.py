"""The count of claims: whose they are, how large the effect, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from darkmatter.book import records, reference, scoreboard

RANGES = {"above": (0.0, None), "below": (None, 0.5), "between": (0.3, 0.7), "nothing": None}


def claim(text: str, paper: str = "–", verdict: str = "agree", value: float = 0.4,
          agrees: str = "above") -> dict[str, Any]:
    return {"text": text, "paper": paper, "measured": "R²", "found": [value, value, value],
            "agrees": RANGES[agrees], "n": 10, "unit": "tokens", "verdict": verdict}


def claims(*tested: dict[str, Any], notebook: str = "02_norm") -> pd.DataFrame:
    return records.claims([{"preset": "toy", "notebook": notebook, "claims": tested}])


@pytest.mark.parametrize(("paper", "owner"), [
    ("above 0.90", 0), (".59 against .54", 0), ("up to 50%", 0), ("about half", 1), ("–", 1),
    ("can be predicted (read here as: R² above .5)", 1), (".7 to .95, unverified", 2),
    ("3 to 5% (notes of a follow-up project, unverified)", 2),
    ("– (a variant that the authors' code has switched off)", 2)])
def test_whose_a_claim_is(paper: str, owner: int) -> None:
    assert scoreboard.owner(paper) == scoreboard.OWNERS[owner]


def test_an_effect_is_how_far_a_value_lies_on_the_claims_side() -> None:
    tested = claims(*(claim(side, agrees=side) for side in RANGES))
    effect = dict(zip(RANGES, scoreboard.judged(tested)["effect"].tolist(), strict=True))
    assert effect["above"] == pytest.approx(0.4) and effect["below"] == pytest.approx(0.1)
    assert np.isnan(effect["between"]) and np.isnan(effect["nothing"])


def test_two_readings_of_the_same_words_count_once() -> None:
    twice = [claim("larger", ".59 against .54"), claim("about 5 percent", ".59 against .54")]
    assert scoreboard.count(claims(*twice)).loc["all", "all"] == 1
    mixed = scoreboard.statements(claims(twice[0], {**twice[1], "verdict": "differ"}))
    assert list(mixed["verdict"]) == ["cannot say"]
    apart = pd.concat([claims(twice[0]), claims(twice[1], notebook="08_on_error")])
    assert scoreboard.count(apart).loc["all", "all"] == 2
    assert scoreboard.count(claims(claim("one"), claim("two"))).loc["all", "all"] == 2


def test_the_count_is_by_owner_and_verdict_and_tells_of_small_effects() -> None:
    tested = claims(claim("a", "0.9"), claim("b", "half", "differ"), claim("d", "0.5, unverified"),
                   claim("c", "roughly", value=0.01),
                   claim("e", "rises", "cannot say", value=0.01))
    table = scoreboard.count(tested)
    assert table.loc["all"].tolist() == [3, 1, 1, 5, 1]
    assert table.loc["the paper's words"].tolist() == [1, 1, 1, 3, 1]
    words = scoreboard.in_words(tested)
    assert "tested: 4 (2 agree, 1 differ, 1 cannot say)" in words
    assert "not the paper's own: 1 (1 agree)" in words and "by an effect below 0.05: 1." in words
    assert scoreboard.in_words(claims()) == ""
    assert scoreboard.count(claims()).to_numpy().sum() == 0


def test_the_reference_holds_numbers_and_words_of_the_paper_and_others() -> None:
    tested = records.claims(reference.load("smollm2"))
    table = scoreboard.count(tested)
    assert table.loc["all", "all"] < len(tested)  # chapter 8 reads one number in two ways
    assert (table.loc[list(scoreboard.OWNERS), "all"] > 0).all()


def test_the_readme_gives_the_count_of_the_reference() -> None:
    """README, introduction and scoreboard say the same: the README's is of the default preset."""
    home = Path(__file__).resolve().parents[2]
    reference = (home / "artifacts" / "reference" / "smollm2").glob("*.json")
    claims = records.claims([json.loads(path.read_text()) for path in sorted(reference)])
    readme = " ".join((home / "README.md").read_text(encoding="utf-8").split())
    assert scoreboard.in_words(claims) in readme
