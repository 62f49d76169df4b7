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
# Every chapter tests claims of {cite:t}`engels2024dark`. This page collects them from the {term}`records <record>` of the
# chapters, and computes nothing anew.
#
# **The rule.** For each claim there is a range: the paper's own where it gives one, else this book's reading of its words.
# *Agree* means that our whole 95% interval lies inside the range, *differ* that all of it lies outside, *cannot say* is
# everything else: an interval that straddles a border, a quantity that is not determined, or the `smoke` preset, which is
# made to be quick and never says more.

# %% tags=["parameters"]
preset: str = "smoke"  # preset name or YAML file

# %% tags=["hide-input"]
import pandas as pd

from darkmatter import figures, records

run = records.start("14_scoreboard", preset)
found = [record for record in records.load_all(every_preset=True) if record["notebook"] != run.notebook]
claims = records.claims(found)
claims = claims[claims["notebook"] != "00_introduction"]
here = claims[claims["preset"] == run.preset.name]

# %% tags=["hide-input"]
VERDICTS = ("agree", "differ", "cannot say")
counts = {preset: part["verdict"].value_counts() for preset, part in claims.groupby("preset")}
words = f"No chapter of the preset `{run.preset.name}` has recorded a claim yet. `make book` runs all of them."
if len(here):
    told = ", ".join(f"**{counts[run.preset.name].get(each, 0)} {each}**" for each in VERDICTS)
    words = f"On the preset `{run.preset.name}`, of {len(here)} claims: {told}."
figures.prose(words)


# %% tags=["hide-input"]
def board(part: pd.DataFrame) -> pd.DataFrame:
    """The claims of one preset as the columns that are shown."""
    return pd.DataFrame({
        "claim": part["text"], "the paper": part["paper"], "measured": part["measured"],
        "here": [figures.interval(*each, 2) for each in part[["value", "low", "high"]].to_numpy()],
        "agrees if": [figures.within(*each) for each in part[["least", "most"]].to_numpy()],
        "verdict": [f"**{each}**" for each in part["verdict"]],
        "chapter": [f"{{doc}}`{each}`" for each in part["notebook"]],
    })


figures.table(
    board(here),
    f"Every claim that the preset `{run.preset.name}` tested, in the order of the chapters. Brackets are 95% intervals; the "
    "chapters say over what, on how many tokens, and why where the verdict is not *agree*. A dash under *the paper*: no "
    "number of the paper is known to us.",
    "tab-scoreboard",
)

# %% [markdown]
# ## Other presets
#
# Whatever other presets have been run in this checkout is shown beside.

# %% tags=["hide-input"]
others = claims[claims["preset"] != run.preset.name]
shown = others.assign(here=[figures.interval(*each, 2) for each in others[["value", "low", "high"]].to_numpy()])
figures.table(
    shown[["preset", "text", "here", "verdict"]].rename(columns={"text": "claim"}),
    "The same claims on other presets that have been run here.", "tab-scoreboard-others",
) if len(others) else figures.prose("None has been run here.")

# %% tags=["hide-cell"]
for verdict in VERDICTS:
    run.add(f"claims: {verdict}", int((here["verdict"] == verdict).sum()), n=len(here), unit="claims")
record = run.finish()
