"""The claims of the paper, counted: whose each is, how large its effect, and nothing twice."""

from __future__ import annotations

import re

import pandas as pd

VERDICTS = ("agree", "differ", "cannot say")
OWNERS = ("the paper's number", "the paper's words", "not the paper's")
NOT_THE_PAPERS = ("unverified", "a variant", "follow-up")
SMALL = 0.05  # an effect below this share, R² or correlation is called small


def owner(paper: str) -> str:
    """Whose a claim is, by what its record says under ``paper``: one of OWNERS.

    What is second-hand, or tested without a result of the paper's, says so there; a digit outside
    brackets is the paper's number; all else is its words, whose range this book reads into them.
    """
    if any(mark in paper for mark in NOT_THE_PAPERS):
        return OWNERS[2]
    return OWNERS[0] if re.search(r"\d", re.sub(r"\(.*?\)", "", paper)) else OWNERS[1]


def judged(claims: pd.DataFrame) -> pd.DataFrame:
    """``records.claims`` with whose each claim is, its effect, and the statement it belongs to.

    ``effect``: how far the value lies on the claim's side of its border, where the range has one
    border only; NaN where it has two. ``statement``: claims of one chapter that rest on the same
    words of the paper, or on the same number, are one statement of it, read in several ways.
    """
    words = claims["paper"].where(claims["paper"] != "–", claims["text"])
    above = (claims["value"] - claims["least"]).where(claims["most"].isna())
    below = (claims["most"] - claims["value"]).where(claims["least"].isna())
    return claims.assign(owner=[owner(paper) for paper in claims["paper"]],
                         effect=above.fillna(below), statement=claims["notebook"] + ": " + words)


def statements(claims: pd.DataFrame) -> pd.DataFrame:
    """One row a statement of one preset's claims: owner, verdict and effect (the smallest).

    Where readings of one statement do not come to the same verdict, it is 'cannot say'.
    """
    groups = judged(claims).groupby("statement", sort=False)
    verdict = groups["verdict"].first().where(groups["verdict"].nunique() == 1, VERDICTS[2])
    return pd.DataFrame({"owner": groups["owner"].first(), "verdict": verdict,
                         "effect": groups["effect"].min()})


def count(claims: pd.DataFrame) -> pd.DataFrame:
    """Statements by owner (rows, and 'all') and verdict: int, columns VERDICTS, all and small.

    ``small``: those that agree by an effect below SMALL.
    """
    rows = statements(claims)
    table = pd.crosstab(rows["owner"], rows["verdict"]).reindex(
        index=list(OWNERS), columns=list(VERDICTS), fill_value=0)
    small = rows["owner"].where((rows["verdict"] == "agree") & (rows["effect"] < SMALL))
    table = table.assign(all=table.sum(axis=1), small=[(small == name).sum() for name in OWNERS])
    table.loc["all"] = table.sum()
    return table


def in_words(claims: pd.DataFrame) -> str:
    """The count in a sentence, the same wherever the book gives it; empty without claims."""
    if not len(claims):
        return ""
    table = count(claims)
    paper = table.loc[list(OWNERS[:2])].sum()
    other, small = table.loc[OWNERS[2]], int(table.loc["all", "small"])
    verdicts = ", ".join(f"{paper[verdict]} {verdict}" for verdict in VERDICTS)
    text = (f"Statements of the paper that were tested: {paper['all']} ({verdicts}). Tested beside "
            f"them and not the paper's own: {other['all']} ({other['agree']} agree).")
    slim = f" Agreeing by an effect below {SMALL}: {small}."
    return text + (slim if small else "")
