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
# So far there was one layer. A model builds its activations layer by layer: early ones are close to the token itself, late ones
# close to the next. **Is the error of an SAE equally predictable at every depth? And is a linear probe on $x$ better than simpler
# predictors everywhere?**
#
# {cite:t}`engels2024dark` draw $R^2$ of the squared error norm against depth for six families of SAEs on three models, and for one model
# compare the probe with simpler predictors at every layer (their Figure 13). The heights of these curves are not known to us; the
# first figure's axis runs from .4 to 1. Third-party notes on the paper give .7 to .95 for middle layers. That range is
# unverified.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # one SAE instead of the preset's own: release:sae_id, a directory, artifact:NAME or train:WIDTHxL0
loss_contexts: int = 40  # contexts on which the model's loss is measured, for the loss baseline

# %% tags=["hide-input"]
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from transformers import AutoConfig

from darkmatter import activations, baselines, components, figures, model, records, reference, survey
from darkmatter.errors import DarkmatterError
from darkmatter.figures import interval, number, prose
from darkmatter.regression import STATISTICS, Sums, clusters, resample
from darkmatter.scaling import estimate

run = records.start("13_depth", preset, sae=sae, loss_contexts=loss_contexts)
p = run.preset
if loss_contexts < 1:
    raise DarkmatterError(f"loss_contexts is {loss_contexts}, but the loss should be measured on at least 1 context.")

# %% [markdown]
# ## The layers
#
# One SAE a layer, all at the same kind of site, of one width and {term}`L0` and trained in one way. One forward pass over the text
# captures all sites. The {term}`survey` of each is that of the chapters before: the same documents are fitted on at every layer, and the
# same held out.

# %%
kind = p.site.split(".", 2)[2]
layers = {model.layer_of(site): site for site in p.elsewhere if site.split(".", 2)[2] == kind and site != p.site}
if layers:
    components.load_elsewhere(p)  # trains those that are not there yet, from one pass over their text
    activations.evaluations(p, [p.site, *layers.values()])
layers = dict(sorted((layers | {model.layer_of(p.site): p.site}).items()))
surveys = {layer: survey.run(p.at(site)) for layer, site in layers.items()}
several = len(surveys) > 1

# %% tags=["hide-input"]
depth = AutoConfig.from_pretrained(model.directory(p)).num_hidden_layers
table = pd.concat([found.table().assign(layer=layer) for layer, found in surveys.items()], ignore_index=True)
scored = next(iter(surveys.values())).rows.query("metric == 'fvu'").iloc[0]
basis = f"{scored['n_eval']:,} held-out tokens of {scored['sources']} {next(iter(surveys.values())).unit}"


def ends(metric: str) -> list[str]:
    """Value and interval of a metric, one string a layer."""
    return [interval(*row) for row in table[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy()]


figures.table(pd.DataFrame({
    "layer": table["layer"], "width": table["width"], "L0": table["l0"], "FVU": ends("fvu"), "FVU nonlinear": ends("fvu_nonlinear"),
    "R² of the vector": ends("r2_vector"), "weighted": ends("r2_vector_weighted"), "R² of the squared norm": ends("r2_norm"),
}), f"One SAE at each of {len(table)} of the model's {depth} layers, counted from 0. {basis}.", "tab-depth", digits={"L0": 1})

# %% tags=["hide-input"]
None if several else prose(f"""
**The preset `{p.name}` names no SAEs at other layers** (field `elsewhere`), so there is one layer and nothing to see of depth. The rest of the
chapter goes on with that one.
""")

# %% [markdown]
# ## What a linear probe explains

# %% tags=["hide-input"]
names = {"r2_norm": "squared norm", "r2_vector": "vector", "r2_vector_weighted": "vector, weighted"}
points = pd.concat([found.rows.assign(layer=layer) for layer, found in surveys.items()]).query("metric in @names")
points = points.assign(target=points["metric"].map(names)).astype({"value": float, "low": float, "high": float})
fig = figures.interval_points(points, "layer", group="target", x_title="layer", y_title="held-out R²", log_x=False)
figures.finish(fig.update_xaxes(tickvals=list(surveys)).update_yaxes(rangemode="tozero"), "fig-depth",
               "$R^2$ of the squared norm of the error and of the error vector (mean over dimensions, and weighted by variance), predicted "
               f"linearly from $x$ of the same layer. 95% intervals; {basis}.",
               "; ".join(f"{label} " + ", ".join(f"{v:.2f}" for v in points[points["target"] == label].sort_values("layer")["value"])
                         for label in names.values()) + f" at layers {', '.join(map(str, surveys))}.",
               paper="The figure of R² against depth")

# %% tags=["hide-input"]
def shape(metric: str) -> str:
    """How a metric moves over the layers, in words."""
    each = table.set_index("layer")[metric].astype(float)
    steps = np.sign(np.diff(each))
    way = "rises with every layer" if (steps > 0).all() else "falls with every layer" if (steps < 0).all() else "goes up and down"
    return f"{way}: lowest {number(each.min(), 2)} at layer {each.idxmin()}, highest {number(each.max(), 2)} at layer {each.idxmax()}"


prose(f"""
From layer {table['layer'].min()} to layer {table['layer'].max()} $R^2$ of the squared norm {shape('r2_norm')}. $R^2$ of the vector
{shape('r2_vector')}. FVU {shape('fvu')}.
""" if several else f"$R^2$ of the squared norm is {number(table['r2_norm'].iloc[0], 2)}, of the vector {number(table['r2_vector'].iloc[0], 2)}.")

# %% [markdown]
# ## Simpler predictors at every layer
#
# The baselines are those of {doc}`02_norm`, all fitted on the fitted sources and scored on the others: the mean squared norm of the
# error for the token's type, and straight lines in the model's loss, in L0 and in $\lVert x\rVert^2$. One more is not in the
# paper: the mean for the text's *domain* (plays, code, and so on). If the probe only told kinds of text apart, this would do as well.
#
# (In the authors' version the token's mean is scored on the tokens it was computed from, where a token type that occurs once is
# predicted perfectly.)

# %%
losses = survey.losses(p, loss_contexts)


def draws(tokens: pd.DataFrame, predicted: np.ndarray) -> tuple[np.ndarray, float, int]:
    """R² of predicted squared norms, as measured and on draws of the sources; what these are worth; n. NaN rows are left out."""
    rows = tokens["is_eval"].to_numpy() & np.isfinite(predicted)
    context, actual = (torch.from_numpy(tokens[name].to_numpy(kind)) for name, kind in (("context", np.int64), (baselines.TARGET, np.float64)))
    sums = Sums(len(text.tokens))
    sums.add_error(context[rows], actual[rows], (actual - torch.from_numpy(predicted))[rows])
    totals = resample(sums, clusters(text.source), p.bootstrap, p.seed)
    return STATISTICS["r2_norm"](totals).numpy(), float(totals["effective"][0]), int(rows.sum())


# %%
text, compared, trimmed = next(iter(surveys.values())).acts.text, {}, {}
for layer, found in surveys.items():
    tokens = found.tokens(found.rows["sae"].iloc[0])
    domain = tokens.assign(token_id=pd.factorize(tokens["domain"])[0])
    probe = tokens["error_norm2_hat"].to_numpy(float)
    predictions = {
        "x (the probe)": probe, "token's type": baselines.token_mean(tokens), "domain": baselines.token_mean(domain),
        "‖x‖²": baselines.line(tokens, tokens["x_norm2"].to_numpy(float)), "L0": baselines.line(tokens, tokens["l0"].to_numpy(float)),
        "loss": baselines.line(tokens, baselines.loss_of(tokens, losses)),
    }
    compared[layer] = {name: draws(tokens, predicted) for name, predicted in predictions.items()}
    most = tokens["error_norm2"].quantile(0.99)
    trimmed[layer] = draws(tokens, np.where(tokens["error_norm2"] <= most, probe, np.nan))

# %% tags=["hide-input"]
rows = pd.DataFrame([{"layer": layer, "predictor": name, "n": n} | dict(zip(("value", "low", "high"), estimate(each, worth), strict=True))
                     for layer, found in compared.items() for name, (each, worth, n) in found.items()])
rows = rows.astype({"low": float, "high": float})
fig = figures.interval_points(rows, "layer", group="predictor", x_title="layer", y_title="held-out R²", log_x=False)
figures.finish(fig.update_xaxes(tickvals=list(surveys)), "fig-depth-baselines",
               "$R^2$ of predicting $\\lVert\\mathrm{SaeError}\\rVert^2$ from $x$ and from simpler things, at every layer. 95% intervals; "
               f"{basis}, for the loss {rows.set_index('predictor').loc[['loss'], 'n'].iloc[0]:,} tokens of the first {len(losses)} contexts.",
               "; ".join(f"{name} {each['value'].min():.2f} to {each['value'].max():.2f}" for name, each in rows.groupby("predictor", sort=False)),
               paper="Figure 13", height=440)

# %% tags=["hide-input"]
grid = {name: [interval(*row[["value", "low", "high"]], 2) for _, row in each.iterrows()] for name, each in rows.groupby("predictor", sort=False)}
figures.table(pd.DataFrame({"layer": list(surveys), **grid, "x, without the 1% largest errors": [
    interval(*estimate(each, worth), 2) for each, worth, _ in trimmed.values()]}),
    f"The same in numbers. The last column scores the same probe without the 1% of tokens with the largest errors. {basis}.", "tab-depth-baselines")

# %%
simple = ("token's type", "domain", "‖x‖²", "L0")  # the loss is known on other tokens, so it cannot be compared draw by draw
leads = np.array([[found["x (the probe)"][0] - found[name][0] for name in simple] for found in compared.values()])
worth = next(iter(compared.values()))["domain"][1]
lead = estimate(leads.min((0, 1)), worth)
nearest = {layer: simple[int(of[:, 0].argmin())] for layer, of in zip(compared, leads, strict=True)}

# %% tags=["hide-input"]
value = rows.pivot(index="layer", columns="predictor", values="value")
last = {layer: float(each[0][0]) for layer, each in trimmed.items()}
prose(f"""
The simpler predictor that comes nearest is {'; '.join(f"*{name}* at layer{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}"
for name in dict.fromkeys(nearest.values()) for at in [[layer for layer, other in nearest.items() if other == name]])}.
The smallest lead of the probe, over all layers and all of them but the loss, is {interval(*lead)}.
The loss explains {number(value['loss'].min(), 2)} to {number(value['loss'].max(), 2)}, the domain {number(value['domain'].min(), 2)} to
{number(value['domain'].max(), 2)}. {'L0 is the same for nearly every token of a {term}`TopK` SAE, so that it cannot explain anything here; it varies in the SAEs that the '
'paper uses.' if table['k'].notna().all() else f"L0 explains {number(value['L0'].min(), 2)} to {number(value['L0'].max(), 2)}."}
Without the 1% of tokens with the largest errors the probe's $R^2$ is {number(min(last.values()), 2)} to {number(max(last.values()), 2)}.
""")

# %% [markdown]
# ## Agreement with the paper
#
# *Middle layers* is read here as the middle half of the model, and the range for them is the unverified one. That the probe leads *at every
# layer* is this book's reading of Figure 13; it is tested by the smallest lead over all layers and predictors.

# %%
middle = [layer for layer in surveys if 0.25 <= (layer + 1) / depth <= 0.75]
of_middle = np.array([compared[layer]["x (the probe)"][0] for layer in middle])
nothing = (None, None, None)
statements = {
    "at middle layers, .7 to .95 of the variance of the squared error norm is linearly predictable (unverified)":
        ("mean of R² over the middle layers", estimate(of_middle.mean(0), worth) if middle else nothing, (0.7, 0.95), "0.70 to 0.95"),
    "at every layer the probe on x predicts the squared error norm better than simpler predictors":
        ("smallest lead in R²", lead, (0, np.inf) if several else None, "above 0"),
}
n = int(scored["n_eval"])
verdicts = [run.claim(claim, what, found, agrees, n, paper=".7 to .95, unverified" if i == 0 else "–")
            for i, (claim, (what, found, agrees, _)) in enumerate(statements.items())]

# %% tags=["hide-input"]
figures.table(pd.DataFrame({
    "the paper": list(statements), "measured": [each[0] for each in statements.values()],
    "here": [interval(*each[1]) for each in statements.values()], "agrees if": [each[3] for each in statements.values()],
    "verdict": verdicts,
}), f"Statements of the paper about depth, and this run ({basis}).", "tab-depth-agreement")

# %% tags=["hide-input"]
prose(f"""
{'The middle layers of this run are ' + ', '.join(map(str, middle)) + '.' if middle else 'This run has no SAE in the middle half of the model.'}
What differs from the paper: {len(surveys)} layer{'s' if several else ''} of a model with {depth}, rather than every layer of models with up to 42;
TopK SAEs of one width and one L0; and every baseline held out.
""")

# %% tags=["hide-cell"]
for found in surveys.values():
    run.add_rows(found.rows[found.rows["metric"].isin(["fvu", "fvu_nonlinear", "r2_norm", "r2_vector", "r2_vector_weighted"])])
for row in rows.itertuples():
    run.add(f"r2_norm at layer {row.layer} from {row.predictor}", row.value, row.low, row.high, row.n, "tokens")
for layer, (each, worth_here, count) in trimmed.items():
    run.add(f"r2_norm at layer {layer} without the 1% largest errors", *estimate(each, worth_here), count, "tokens")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
