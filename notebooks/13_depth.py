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
# # Across depth
#
# So far there was one layer. A model builds its activations layer by layer: early ones are close to
# the token itself, late ones close to the next. **Is the error of an SAE equally predictable at
# every depth? And is a linear probe on $x$ better than simpler predictors everywhere?**
#
# {cite:t}`engels2024dark` draw $R^2$ of the squared error norm against depth for six families of
# SAEs on three models, and for one model compare the probe with simpler predictors at every layer
# (their Figure 13). The heights of these curves are not known to us; the first figure's axis runs
# from .4 to 1. Third-party notes on the paper give .7 to .95 for middle layers. That range is
# unverified.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # another SAE: release:sae_id, a directory, artifact:NAME or train:WIDTHxL0
loss_contexts: int = 40  # contexts on which the model's loss is measured, for the loss baseline

# %% tags=["hide-input"]
from functools import reduce

import numpy as np
import pandas as pd
from IPython.display import display
from transformers import AutoConfig

from darkmatter import Draws, survey
from darkmatter.book import figures, records, reference
from darkmatter.book.figures import number, prose
from darkmatter.errors import DarkmatterError
from darkmatter.experiments import baselines, components
from darkmatter.models import activations, model

run = records.start("13_depth", preset, sae=sae, loss_contexts=loss_contexts)
p = run.preset
if loss_contexts < 1:
    raise DarkmatterError(f"loss_contexts is {loss_contexts}, but the loss should be measured on "
                          "at least 1 context.")

# %% [markdown]
# ## The layers
#
# One SAE a layer, all at the same kind of site, of one width and {term}`L0` and trained in one way.
# One forward pass over the text captures all sites. The {term}`survey` of each is that of the
# chapters before: the same documents are fitted on at every layer, and the same held out.

# %%
kind = p.site.split(".", 2)[2]
layers = {model.layer_of(site): site for site in [p.site, *p.elsewhere]
          if site.split(".", 2)[2] == kind}
if len(layers) > 1:
    components.load_elsewhere(p)  # trains those that are not there yet, from one pass over text
    activations.evaluations(p, list(layers.values()))
surveys = {layer: survey.run(p.at(site)) for layer, site in sorted(layers.items())}

# %%
metrics = ["fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm"]
scores = {layer: {metric: result.draws(result.rows["sae"].iloc[0], metric) for metric in metrics}
          for layer, result in surveys.items()}
first, several = surveys[min(surveys)], len(surveys) > 1
basis = scores[min(scores)]["fvu"].basis(first.unit)
depth = AutoConfig.from_pretrained(model.directory(p)).num_hidden_layers

# %%
headings = {"fvu": "FVU", "fvu_nonlinear": "FVU nonlinear", "r2_vector": "R² of the vector",
            "r2_vector_weighted": "weighted", "r2_norm": "R² of the squared norm"}
table = pd.concat([result.table() for result in surveys.values()], ignore_index=True)
figures.table(
    pd.DataFrame({"layer": list(surveys), "width": table["width"], "L0": table["l0"],
                  **{words: [f"{of_layer[metric]}" for of_layer in scores.values()]
                     for metric, words in headings.items()}}),
    f"One SAE at each of {len(table)} of the model's {depth} layers, counted from 0. {basis}.",
    "tab-depth", digits={"L0": 1})

# %% tags=["hide-input"]
None if several else prose(f"""
**The preset `{p.name}` names no SAEs at other layers** (field `elsewhere`), so there is one layer
and nothing to see of depth. The rest of the chapter goes on with that one.
""")

# %% [markdown]
# ## What a linear probe explains

# %% tags=["hide-input"]
targets = {"r2_norm": "squared norm", "r2_vector": "vector",
           "r2_vector_weighted": "vector, weighted"}
points = pd.DataFrame([{"layer": layer, "target": words, **of_layer[metric].row}
                       for metric, words in targets.items()
                       for layer, of_layer in scores.items()]).astype({"low": float, "high": float})
fig = figures.interval_points(points, "layer", group="target", x_title="layer",
                              y_title="held-out R²", log_x=False)
heights = [f"{words} {', '.join(f'{value:.2f}' for value in rows['value'])}"
           for words, rows in points.groupby("target", sort=False)]
figures.finish(fig.update_xaxes(tickvals=list(surveys)).update_yaxes(rangemode="tozero"),
               "fig-depth", "$R^2$ of the squared norm of the error and of the error vector (mean "
               "over dimensions, and weighted by variance), predicted linearly from $x$ of the "
               f"same layer. 95% intervals; {basis}.",
               f"{'; '.join(heights)} at layers {', '.join(map(str, surveys))}.",
               paper="The figure of R² against depth")

# %%
def shape(metric: str) -> str:
    """How a metric moves over the layers, in words."""
    values = pd.Series({layer: float(of_layer[metric]) for layer, of_layer in scores.items()})
    steps = np.sign(np.diff(values))
    way = "goes up and down"
    if (steps > 0).all() or (steps < 0).all():
        direction = "rises" if steps[0] > 0 else "falls"
        way = f"{direction} with every layer"
    return (f"{way}: lowest {number(values.min(), 2)} at layer {values.idxmin()}, highest "
            f"{number(values.max(), 2)} at layer {values.idxmax()}")


if several:
    words = (f"From layer {min(surveys)} to layer {max(surveys)} $R^2$ of the squared norm "
             f"{shape('r2_norm')}. $R^2$ of the vector {shape('r2_vector')}. FVU {shape('fvu')}.")
else:
    words = (f"$R^2$ of the squared norm is {number(table['r2_norm'].iloc[0], 2)}, of the vector "
             f"{number(table['r2_vector'].iloc[0], 2)}.")
prose(words)

# %% [markdown]
# ## Simpler predictors at every layer
#
# The baselines are those of {doc}`02_norm`, all fitted on the fitted sources and scored on the
# others: the mean squared norm of the error for the token's type, and straight lines in the model's
# loss, in L0 and in $\lVert x\rVert^2$. One more is not in the paper: the mean for the text's
# *domain* (plays, code, and so on). If the probe only told kinds of text apart, this would do as
# well.
#
# (In the authors' version the token's mean is scored on the tokens it was computed from, where a
# token type that occurs once is predicted perfectly.)

# %%
losses = survey.losses(p, loss_contexts)


def predictions(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """‖SaeError‖² of every token as each predictor has it; NaN where it has none."""
    by_domain = tokens.assign(token_id=pd.factorize(tokens["domain"])[0])
    numbers = {"‖x‖²": tokens["x_norm2"].to_numpy(float), "L0": tokens["l0"].to_numpy(float),
               "loss": baselines.loss_of(tokens, losses)}
    return {"x (the probe)": tokens["error_norm2_hat"].to_numpy(float),
            "token's type": baselines.token_mean(tokens), "domain": baselines.token_mean(by_domain),
            **{name: baselines.line(tokens, feature) for name, feature in numbers.items()}}


# %%
compared, trimmed = {}, {}
for layer, result in surveys.items():
    tokens = result.tokens(result.rows["sae"].iloc[0])
    by_name = predictions(tokens)
    compared[layer] = {name: baselines.held_out_r2(tokens, predicted, p)
                       for name, predicted in by_name.items()}
    # The same probe, scored without the 1% of tokens that have the largest errors.
    small = tokens["error_norm2"] <= tokens["error_norm2"].quantile(0.99)
    trimmed[layer] = baselines.held_out_r2(
        tokens, np.where(small, by_name["x (the probe)"], np.nan), p)

# %% tags=["hide-input"]
rows = pd.DataFrame([{"layer": layer, "predictor": name, **draws.row}
                     for layer, by_name in compared.items() for name, draws in by_name.items()])
rows = rows.astype({"value": float, "low": float, "high": float})
span = rows.groupby("predictor", sort=False)["value"].agg(["min", "max"])
fig = figures.interval_points(rows, "layer", group="predictor", x_title="layer",
                              y_title="held-out R²", log_x=False)
of_loss = f"{compared[min(compared)]['loss'].n:,} tokens of the first {len(losses)} contexts"
figures.finish(fig.update_xaxes(tickvals=list(surveys)), "fig-depth-baselines",
               "$R^2$ of predicting $\\lVert\\mathrm{SaeError}\\rVert^2$ from $x$ and from simpler "
               f"things, at every layer. 95% intervals; {basis}, for the loss {of_loss}.",
               "; ".join(f"{name} {least:.2f} to {most:.2f}"
                         for name, (least, most) in zip(span.index, span.to_numpy(), strict=True)),
               paper="Figure 13", height=440)

# %% tags=["hide-input"]
grid = pd.DataFrame([{"layer": layer} | {name: f"{draws:.2f}" for name, draws in by_name.items()}
                     | {"x, without the 1% largest errors": f"{trimmed[layer]:.2f}"}
                     for layer, by_name in compared.items()])
figures.table(grid, "The same in numbers. The last column scores the same probe without the 1% of "
              f"tokens with the largest errors. {basis}.", "tab-depth-baselines")

# %% [markdown]
# The lead of the probe is a difference of two $R^2$ on the same tokens, so it is taken draw by
# draw, and so is the smallest lead over all layers and predictors. The loss is left out of it: it
# is known on other tokens.

# %%
leads = {layer: {name: by_name["x (the probe)"] - by_name[name]
                 for name in ("token's type", "domain", "‖x‖²", "L0")}
         for layer, by_name in compared.items()}
every_lead = [lead for by_name in leads.values() for lead in by_name.values()]
smallest = reduce(lambda least, lead: least.map(np.minimum, lead), every_lead)
nearest = pd.Series({layer: min(by_name, key=lambda name: float(by_name[name]))
                     for layer, by_name in leads.items()})

# %%
def in_words(layers: pd.Index) -> str:
    """Layers by number, after the word for one or for several."""
    noun = "layers" if len(layers) > 1 else "layer"
    return f"{noun} {', '.join(map(str, layers))}"


close = "; ".join(f"*{name}* at {in_words(at.index)}"
                  for name, at in nearest.groupby(nearest, sort=False))
reach = {name: f"{number(least, 2)} to {number(most, 2)}"
         for name, (least, most) in zip(span.index, span.to_numpy(), strict=True)}
of_l0 = f"L0 explains {reach['L0']}."
if table["k"].notna().all():
    of_l0 = ("L0 is the same for nearly every token of a {term}`TopK` SAE, so that it cannot "
             "explain anything here; it varies in the SAEs that the paper uses.")
without = sorted(float(draws) for draws in trimmed.values())
prose(f"""
The simpler predictor that comes nearest is {close}. The smallest lead of the probe, over all layers
and all of them but the loss, is {smallest}.
The loss explains {reach['loss']}, the domain {reach['domain']}. {of_l0}
Without the 1% of tokens with the largest errors the probe's $R^2$ is {number(without[0], 2)} to
{number(without[-1], 2)}.
""")

# %% [markdown]
# ## Agreement with the paper
#
# *Middle layers* is read here as the middle half of the model, and the range for them is the
# unverified one. That the probe leads *at every layer* is this book's reading of Figure 13; it is
# tested by the smallest lead over all layers and predictors.

# %%
middle = [layer for layer in surveys if 0.25 <= (layer + 1) / depth <= 0.75]
of_middle: Draws | tuple[None, None, None] = (None, None, None)
if middle:
    of_middle = sum(compared[layer]["x (the probe)"] for layer in middle) / len(middle)
statements = {  # what is claimed: what is measured for it, the number, where it agrees, words
    "at middle layers, .7 to .95 of the variance of the squared error norm is linearly predictable "
    "(unverified)": ("mean of R² over the middle layers", of_middle, (0.7, 0.95),
                     ".7 to .95, unverified"),
    "at every layer the probe on x predicts the squared error norm better than simpler predictors":
        ("smallest lead in R²", smallest, (0, np.inf) if several else None, "–"),
}
verdicts = [run.claim(claim, measured, found, agrees, n=smallest.n, paper=words)
            for claim, (measured, found, agrees, words) in statements.items()]

# %%
figures.table(pd.DataFrame({
    "the paper": list(statements), "measured": [measured for measured, *_ in statements.values()],
    "here": [f"{of_middle}" if middle else "–", f"{smallest}"],
    "agrees if": ["0.70 to 0.95", "above 0"], "verdict": verdicts,
}), f"Statements of the paper about depth, and this run ({basis}).", "tab-depth-agreement")

# %% tags=["hide-input"]
which = "This run has no SAE in the middle half of the model."
if middle:
    which = f"The middle layers of this run are {', '.join(map(str, middle))}."
noun = "layers" if several else "layer"
prose(f"""
{which} What differs from the paper: {len(surveys)} {noun} of a model with
{depth}, rather than every layer of models with up to 42; TopK SAEs of one width and one L0; and
every baseline held out.
""")

# %%
for result in surveys.values():
    run.add_rows(result.rows[result.rows["metric"].isin(metrics)])
for layer, by_name in compared.items():
    for name, draws in by_name.items():
        run.add_draws(f"r2_norm at layer {layer} from {name}", draws)
for layer, draws in trimmed.items():
    run.add_draws(f"r2_norm at layer {layer} without the 1% largest errors", draws)
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
