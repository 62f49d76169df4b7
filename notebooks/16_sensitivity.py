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
# Every number of this book comes with an interval. It answers one question: how far could the number be off because other
# {term}`sources <source>` of the same kind might have been drawn? It is silent on choices that were made once, for the whole book: how
# many contexts, which positions in them, whether a context begins with a special token, in which precision the model runs, and by which
# {ref}`protocol <protocols-side-by-side>` the maps are fitted and scored. **Does any of these choices move a result further than
# its interval?**
#
# The paper fixes them (300 contexts, positions from 200, no special token among the activations) and makes no claim about them.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # another SAE than the preset's default: release:sae_id, a directory, artifact:NAME or train:WIDTHxL0

# %% tags=["hide-input"]
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display
from plotly.subplots import make_subplots

from darkmatter import figures, records, reference, sensitivity
from darkmatter.figures import colour, interval, prose

run = records.start("16_sensitivity", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## One choice at a time
#
# One SAE, the preset's default, is surveyed again and again. Each time one choice is made otherwise and the rest stays, and the maps
# are fitted and scored anew. Other than a protocol, a variant also has its own activations and its own codes, so that it shares
# nothing with the first row but the SAE's weights.
#
# The variant with all positions has the first token of each context, where models put an {term}`attention sink` ({doc}`01_data`). The
# paper leaves it out, and so did the training of these SAEs. A few sinks can hold most of the variance that all scores are shares of.

# %%
rows = sensitivity.recorded(p)
labels = [variant if protocol == "strict" else f"protocol {protocol}" for variant, protocol in zip(rows.variant, rows.protocol, strict=True)]
rows = rows.assign(choice=labels)
metrics = {"fvu": "FVU", "fvu_nonlinear": "FVU<sub>nonlinear</sub>", "r2_vector": "R² of the error vector", "r2_norm": "R² of the squared norm",
           "norm_test_nonlinear": "norm test, NonlinearError"}

# %% tags=["hide-input"]
first = rows.iloc[0]
figures.table(
    rows.assign(**{label: [interval(*row) for row in rows[[name, f"{name}_low", f"{name}_high"]].to_numpy()] for name, label in metrics.items()},
                tokens=rows.fvu_n)[["choice", "tokens", *metrics.values()]],
    f"The SAE `{p.default_sae.split(':')[-1]}` under other choices, with 95% intervals over held-out sources. "
    "tokens: how many the FVU was scored on (under `authors-code` it includes those that were fitted on).", "tab-sensitivity", digits={"tokens": 0})

# %% tags=["hide-input"]
drawn = {"fvu_nonlinear": "FVU<sub>nonlinear</sub>", "r2_vector": "R², vector", "r2_norm": "R², squared norm"}
far = rows.fvu > 1  # worse than the mean: its points would squeeze all others together
plotted = rows[~far]
fig = make_subplots(rows=1, cols=len(drawn), shared_yaxes=True, horizontal_spacing=0.05)
for place, name in enumerate(drawn, start=1):
    bars = {"type": "data", "symmetric": False, "array": plotted[f"{name}_high"] - plotted[name], "arrayminus": plotted[name] - plotted[f"{name}_low"],
            "thickness": 1.5, "width": 0}
    fig.add_trace(go.Scatter(x=plotted[name], y=plotted.choice, error_x=bars, mode="markers", marker={"size": 9, "color": colour("blue")},
                             showlegend=False, hovertemplate="%{y}: %{x:.3f}"), row=1, col=place)
    fig.add_vrect(x0=first[f"{name}_low"], x1=first[f"{name}_high"], fillcolor=colour("grey", 0.18), line_width=0, layer="below", row=1,
                  col=place)  # after the trace: an empty panel takes no shape
    fig.update_xaxes(title_text=drawn[name], nticks=4, row=1, col=place)
fig.update_yaxes(autorange="reversed", type="category")
figures.finish(fig, "fig-sensitivity", "Three results under other choices. Bars: 95% intervals over held-out sources; the grey band is the interval of the first row, "
               "*as in the book*. A point far outside the band is a choice that matters more than the choice of the text."
               + (f" Not drawn, because FVU is above 1: {', '.join(rows[far].choice)}." if far.any() else ""),
               "; ".join(f"{row.choice}: {', '.join(f'{metrics[name]} {getattr(row, name):.3f}' for name in drawn)}" for row in plotted.itertuples()),
               height=140 + 30 * len(plotted))

# %% [markdown]
# ## Which of them matter

# %%
band = {name: (first[f"{name}_low"], first[f"{name}_high"]) for name in metrics}
outside = pd.DataFrame([{"choice": row["choice"], "name": name, "moved": row[name] - first[name]}
                        for row in rows.to_dict("records")[1:] for name in metrics
                        if pd.notna(row[name]) and not band[name][0] <= row[name] <= band[name][1]])

# %% tags=["hide-input"]
def said(choice: str) -> str:
    moves = outside[outside.choice == choice]
    return f"- *{choice}*: " + ", ".join(f"{metrics[name]} by {moved:+.3f}" for name, moved in zip(moves["name"], moves["moved"], strict=True))


still = [choice for choice in rows.choice.iloc[1:] if not len(outside) or choice not in set(outside.choice)]
missing = sorted(set(sensitivity.variants(p)) - set(rows.variant))
prose("\n".join([
    *([f"Not run here: {'; '.join(missing)} (`python -m darkmatter vary` runs all).", ""] if missing else []),
    f"Of {len(rows) - 1} other choices, {len(still)} leave every metric within its interval" + (": " + ", ".join(f"*{each}*" for each in still) if still else "") + ".",
    "", *(["These move at least one beyond it:", "", *(said(choice) for choice in outside.choice.unique())] if len(outside) else []),
    "", "The band is the interval of one number, while a variant's own number is uncertain too, so a point that lies just outside says little."]))

# %% tags=["hide-cell"]
for row in rows.to_dict("records"):
    for name in metrics:
        run.add(f"{name}, {row['choice']}", row[name], row[f"{name}_low"], row[f"{name}_high"], row[f"{name}_n"], "tokens", p.default_sae.split(":")[-1])
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
