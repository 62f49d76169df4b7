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
# # What else moves the numbers?
#
# Every number of this book comes with an interval. It answers one question: how far could the
# number be off because other {term}`sources <source>` of the same kind might have been drawn? It
# is silent on choices that were made once, for the whole book: how many contexts, which positions
# in them, whether a context begins with a special token, in which precision the model runs, and by
# which {ref}`protocol <protocols-side-by-side>` the maps are fitted and scored. **Does any of
# these choices move a result further than its interval?**
#
# The paper fixes them (300 contexts, positions from 200, no special token among the activations)
# and makes no claim about them.
#
# Each choice but a protocol takes activations of its own, so for the default preset the numbers
# of this chapter are a **record**: `python -m darkmatter vary` measured them once and wrote them
# down in `artifacts/sensitivity.json`. Building this page reads them and does not measure them
# again; the first table says of which day they are. For other presets it measures the cheap
# choices alone.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # another SAE: release:sae_id, a directory, artifact:NAME or train:WIDTHxL0

# %% tags=["hide-input"]
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display
from plotly.subplots import make_subplots

from darkmatter.book import figures, records, reference
from darkmatter.book.figures import colour, interval, prose
from darkmatter.experiments import variants

run = records.start("16_sensitivity", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## One choice at a time
#
# One SAE, the preset's default, is surveyed again and again. Each time one choice is made otherwise
# and the rest stays, and the maps are fitted and scored anew. Other than a protocol, a variant also
# has its own activations and its own codes, so that it shares nothing with the first row but the
# SAE's weights.
#
# The variant with all positions has the first token of each context, where models put an
# {term}`attention sink` ({doc}`01_data`). The paper leaves it out, and so did the training of these
# SAEs. A few sinks can hold most of the variance that all scores are shares of.

# %%
rows = variants.recorded_sensitivity(p)
strict = rows.protocol == "strict"
rows["choice"] = rows.variant.where(strict, "protocol " + rows.protocol)
metrics = {"fvu": "FVU", "fvu_nonlinear": "FVU<sub>nonlinear</sub>",
           "r2_vector": "R² of the error vector", "r2_norm": "R² of the squared norm",
           "norm_test_nonlinear": "norm test, NonlinearError"}
name = p.default_sae.split(":")[-1]
dated = "Measured when this page was built."
if "recorded" in rows:
    dated = f"On record from {rows.recorded.max() or 'a day that this copy does not know'}."

# %%
ends = {metric: [metric, f"{metric}_low", f"{metric}_high"] for metric in metrics}
table = pd.DataFrame({"choice": rows.choice, "tokens": rows.fvu_n, **{
    words: [interval(*row) for row in rows[ends[metric]].to_numpy()]
    for metric, words in metrics.items()}})
figures.table(table, f"The SAE `{name}` under other choices, with 95% intervals over held-out "
              "sources. tokens: how many the FVU was scored on (under `authors-code` it includes "
              f"those that were fitted on). {dated}", "tab-sensitivity", digits={"tokens": 0})
first = rows.iloc[0]  # as in the book
far = rows.fvu > 1  # worse than the mean: its points would squeeze all others together
near, absent = rows[~far], ""
if far.any():
    absent = f"Not drawn, because FVU is above 1: {', '.join(rows.choice[far])}."

# %% tags=["hide-input"]
panels = {"fvu_nonlinear": "FVU<sub>nonlinear</sub>", "r2_vector": "R², vector",
          "r2_norm": "R², squared norm"}
fig = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.05)
for place, (metric, words) in enumerate(panels.items(), start=1):
    value, low, high = (near[column] for column in ends[metric])
    fig.add_trace(go.Scatter(
        x=value, y=near.choice, mode="markers", marker={"size": 9, "color": colour("blue")},
        error_x={"symmetric": False, "array": high - value, "arrayminus": value - low, "width": 0},
        showlegend=False, hovertemplate="%{y}: %{x:.3f}"), row=1, col=place)
    # The band comes after the points: an empty panel takes no shape.
    fig.add_vrect(x0=first[f"{metric}_low"], x1=first[f"{metric}_high"], line_width=0,
                  fillcolor=colour("grey", 0.18), layer="below", row=1, col=place)
    fig.update_xaxes(title_text=words, nticks=4, row=1, col=place)
fig.update_yaxes(autorange="reversed", type="category")
described = [f"{row['choice']}: {', '.join(f'{metrics[m]} {row[m]:.3f}' for m in panels)}"
             for row in near.to_dict("records")]
figures.finish(fig, "fig-sensitivity", "Three results under other choices. Bars: 95% intervals "
               "over held-out sources; the grey band is the interval of the first row, *as in the "
               "book*. A point far outside the band is a choice that matters more than the choice "
               f"of the text. {absent}", "; ".join(described), height=140 + 30 * len(near))

# %% [markdown]
# ## Which of them matter

# %%
def beyond(row: dict, metric: str) -> bool:
    """Whether a variant's number lies outside the interval of the first row."""
    low, high = first[f"{metric}_low"], first[f"{metric}_high"]
    return pd.notna(row[metric]) and not low <= row[metric] <= high


moved = {row["choice"]: [f"{words} by {row[metric] - first[metric]:+.3f}"
                         for metric, words in metrics.items() if beyond(row, metric)]
         for row in rows.iloc[1:].to_dict("records")}
still = [f"*{choice}*" for choice, moves in moved.items() if not moves]
missing = sorted(set(variants.choices(p)) - set(rows.variant))

# %%
which_still = f": {', '.join(still)}" if still else ""
lines = [f"Of {len(moved)} other choices, {len(still)} leave every metric within its interval"
         f"{which_still}."]
if missing:
    lines.insert(0, f"Not run here: {'; '.join(missing)} (`python -m darkmatter vary` runs all).")
if len(still) < len(moved):
    lines += ["These move at least one beyond it:", "\n".join(
        f"- *{choice}*: {', '.join(moves)}" for choice, moves in moved.items() if moves)]
lines.append("The band is the interval of one number, while a variant's own number is uncertain "
             "too, so a point that lies just outside says little.")
prose("\n\n".join(lines))

# %%
for row in rows.to_dict("records"):
    for metric in metrics:
        run.add(f"{metric}, {row['choice']}", *(row[column] for column in ends[metric]),
                row[f"{metric}_n"], "tokens", name)
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
