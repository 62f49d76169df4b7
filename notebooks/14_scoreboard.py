# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,mystnb,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Scoreboard
#
# Every chapter tests claims of {cite:t}`engels2024dark`. This page collects them from the
# {term}`records <record>` of the chapters, and computes nothing anew.
#
# **The rule.** For each claim there is a range: the paper's own where it gives one, else this
# book's reading of its words. *Agree* means that our whole 95% interval lies inside the range,
# *differ* that all of it lies outside, *cannot say* is everything else: an interval that straddles
# a border, a quantity that is not determined, or the `smoke` preset, which is made to be quick and
# never says more.
#
# **Whose claim it is.** Some of what is tested here is a number that the paper gives. More is in
# its words, into which this book reads a range. And some is not the paper's: notes of others on
# it, numbers that are unverified, a variant for which the paper gives no result.
#
# **How large.** That an interval lies above zero does not say that an effect is large. Where a
# range has one border, the verdict says how far beyond it the value lies.
#
# **Nothing twice.** Two readings of the same words of the paper, or of one number, count as one
# statement, with a verdict only where both have the same.

# %% tags=["parameters"]
preset: str = "smoke"  # preset name or YAML file

# %%
import pandas as pd
from IPython.display import display

from darkmatter.book import figures, records, scoreboard

run = records.start("14_scoreboard", preset)
chapters = [record for record in records.load_all(every_preset=True)
            if record["notebook"] != run.notebook]
claims = records.claims(chapters)
here = claims[claims["preset"] == run.preset.name]

# %% [markdown]
# Whose a claim is follows from what its record says of the paper:

# %%
figures.source(scoreboard.owner)

# %% [markdown]
# ## The count

# %%
counts = scoreboard.count(here)
for verdict in scoreboard.VERDICTS:
    run.add(f"claims: {verdict}", int(counts.loc["all", verdict]), n=int(counts.loc["all", "all"]),
            unit="statements")
record = run.finish()
small = f"agree, by less than {scoreboard.SMALL}"
board = counts.rename(columns={"small": small}).rename_axis(index="whose").reset_index()
nothing = (f"No chapter of the preset `{run.preset.name}` has recorded a claim yet. `make book` "
           "runs all of them.")

# %% tags=["hide-input"]
display(figures.prose(scoreboard.in_words(here) or nothing))
figures.table(
    board, f"Statements by whose they are and by verdict, on the preset `{run.preset.name}`. "
    f"{len(here)} claims were recorded; those that read the same words or the same number in two "
    "ways count once.", "tab-scoreboard") if len(here) else None

# %% [markdown]
# ## Claim by claim


# %%
def effect(claim: dict) -> str:
    """How far the value lies from the border of its range, where it has one border."""
    if claim["verdict"] == "cannot say" or pd.isna(claim["effect"]):
        return ""
    small = claim["verdict"] == "agree" and claim["effect"] < scoreboard.SMALL
    only = "only " if small else ""
    return f", by {only}{abs(claim['effect']):.3f}"


def row_of(claim: dict) -> dict[str, str]:
    """A claim as it is shown; what was measured stands under it, in italics."""
    interval = figures.interval(claim["value"], claim["low"], claim["high"], 2)
    short = claim["notebook"].partition("_")[2].replace("_", " ")  # 05_per_token: per token
    return {
        "claim; *what was measured*": f"{claim['text'].rstrip('.')}; *{claim['measured']}*",
        "the paper": claim["paper"], "here": interval.replace(" ", "\u00a0"),  # in one line
        "agrees if": figures.within(claim["least"], claim["most"]),
        "verdict": f"**{claim['verdict']}**{effect(claim)}",
        "chapter": f"{{doc}}`{short} <{claim['notebook']}>`"}


# %% tags=["hide-input"]
captions = {
    "the paper's number": "Numbers that the paper gives.",
    "the paper's words": "Words of the paper; the range is this book's reading of them. A dash: "
                         "the claim is the paper's statement itself.",
    "not the paper's": "Not the paper's own: others' notes on it, unverified numbers, variants.",
}
for number, (whose, group) in enumerate(scoreboard.judged(here).groupby("owner", sort=False), 1):
    display(figures.table(
        pd.DataFrame([row_of(claim) for claim in group.to_dict("records")]),
        f"{captions[whose]} In the order of the chapters, which say over what, on how many tokens, "
        "and why where the verdict is not *agree*. Brackets are 95% intervals.",
        f"tab-scoreboard-{number}"))

# %% [markdown]
# ## Other presets
#
# Whatever other presets have been run in this checkout is counted, and shown, beside.

# %%
others = claims[claims["preset"] != run.preset.name]
for name, group in others.groupby("preset"):
    display(figures.prose(f"`{name}`. {scoreboard.in_words(group)}"))

# %% tags=["hide-input"]
measured = [figures.interval(*ends, 2) for ends in others[["value", "low", "high"]].to_numpy()]
shown = others.assign(here=measured).rename(columns={"text": "claim"})
figures.table(
    shown[["preset", "claim", "here", "verdict"]],
    "The same claims on other presets that have been run here.", "tab-scoreboard-others",
) if len(others) else figures.prose("None has been run here.")
