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
# # What other components' SAEs know
#
# {term}`NonlinearError` is the part of an SAE's error that no linear map of $x$ predicts. But $x$ is not all there is. The
# {term}`residual stream` at a layer is the sum of the stream at the layer before, the output of the layer's attention and the
# output of its MLP, and each of these can have an SAE of its own. **Do the SAEs of nearby components know something of the error
# that is not linear in $x$?**
#
# {cite:t}`engels2024dark` (their section 6.2) fit linear maps from the reconstructions of nearby SAEs to the error and its
# two parts. Relayed in notes on the second version: such maps explain **up to 50%** of the variance of NonlinearError, so
# that it can be reduced more than by a better encoder. They draw the $R^2$ as bars (their Figure 10b), whose axis ends at .62;
# the heights of single bars are not known to us.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # one SAE instead of the preset's own: release:sae_id, a directory, artifact:NAME or train:WIDTHxL0

# %% tags=["hide-input"]
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter import activations, components, figures, records, reference, saes, survey
from darkmatter.components import TARGETS, Predicted
from darkmatter.figures import interval, number, prose
from darkmatter.scaling import estimate

run = records.start("12_components", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## The components
#
# The SAE whose error is to be explained is the preset's default. Its neighbours are the SAEs that the preset names at the
# same layer, and at the residual stream one layer before. A neighbour sees the activation of *its* site on the same token,
# and gives its reconstruction of it. Those reconstructions are the predictors.

# %%
own, sites = saes.load(p.default_sae, p), components.nearby(p)
opened = components.load_elsewhere(p) if sites else {}
acts = activations.evaluations(p, [p.site, *sites.values()])
result = survey.run(p, [p.default_sae])
errors = components.Errors(p, own, acts[p.site])
neighbours = {label: components.decoded(opened[site], acts[site]) for label, site in sites.items()}

# %% tags=["hide-input"]
if sites:
    display(figures.table(pd.DataFrame({
        "component": ["this site", *sites], "hook": [f"`{site}`" for site in (p.site, *sites.values())],
        "SAE": [f"`{each.name}`" for each in (own, *(opened[site] for site in sites.values()))],
        "dimensions": [acts[site].x.shape[1] for site in (p.site, *sites.values())],
        "width": [each.width for each in (own, *(opened[site] for site in sites.values()))],
    }), "The SAE whose error is explained, and its neighbours.", "tab-components-saes"))
else:
    display(prose(f"""
    **The preset `{p.name}` names no SAEs near `{p.site}`** (field `elsewhere`), so there are no neighbours to ask. What is left
    of this chapter is the SAE's own reconstruction and the controls that take no neighbour.
    """))

# %% [markdown]
# ## What they predict
#
# The maps are affine, fitted by least squares on some {term}`sources <source>` and scored on the others. Their targets are the
# error of the SAE at this site, {term}`SaeError`, and its two parts. $R^2$ is the mean over dimensions, as in the paper; the
# table also has it weighted by variance ({eq}`eq-r2`). The SAE's own reconstruction is the reference, as in the paper.
# $x$ itself scores 1 on {term}`LinearError` and 0 on NonlinearError, by construction.

# %%
own_site, others, together = "this site", "neighbours together", "all together"
bars_of = {own_site: [own_site]} | {label: [label] for label in neighbours}
if neighbours:
    bars_of |= {others: list(neighbours), together: [own_site, *neighbours]}
beside = {"x and this site": ["x", own_site]} | ({"x and neighbours": ["x", *neighbours]} if neighbours else {})
found = components.predict(errors, {"x": acts[p.site].read, own_site: errors.reconstruction, **neighbours}, bars_of | beside)
basis = f"{found.n:,} held-out tokens of {result.rows['sources'].iloc[0]} {result.unit}"
d, n_fit = acts[p.site].x.shape[1], int(errors.fitted.sum())
most = sum(acts[site].x.shape[1] for site in (p.site, *sites.values()))
enough = n_fit > 20 * most  # else the price of fitting hides what the maps know

# %% tags=["hide-input"]
def bars(of: Predicted, labels: list[str]) -> go.Figure:
    """R², mean over dimensions, of every set and target, with intervals."""
    rows, fig = of.table().query("metric == 'r2_vector'"), go.Figure()
    for target, name in (("NonlinearError", "orange"), ("LinearError", "blue"), ("SaeError", "grey")):  # drawn from below
        each = rows[rows["target"] == target].set_index("set").loc[labels[::-1]].astype({"low": float, "high": float})
        fig.add_bar(y=each.index.str.replace(", ", ",<br>"), x=each["value"], orientation="h", name=target, marker_color=figures.colour(name, 0.7), error_x={
            "array": each["high"] - each["value"], "arrayminus": each["value"] - each["low"], "symmetric": False,
            "thickness": 1.2, "width": 2, "color": figures.colour("grey")})
    fig.update_xaxes(title_text="held-out R²", rangemode="tozero").update_yaxes(automargin=True)
    return fig.update_layout(barmode="group", bargap=0.25, legend_traceorder="reversed")


def value(of: Predicted, label: str, target: str, metric: str = "r2_vector") -> tuple[float, float | None, float | None]:
    """R² and its interval."""
    return estimate(of.draws[label, target, metric], of.effective)


figures.finish(bars(found, list(bars_of)), "fig-components", f"$R^2$ of linear maps from SAE reconstructions to the error of "
               f"`{own.name}` and its two parts. 95% intervals; {basis}.",
               "Bars of R² for NonlinearError: " + ", ".join(f"{label} {value(found, label, 'NonlinearError')[0]:.2f}" for label in bars_of),
               paper="Figure 10b", height=110 + 62 * len(bars_of))

# %% tags=["hide-input"]
def rows_of(of: Predicted, labels: dict[str, str]) -> pd.DataFrame:
    """A table row for each set: label: what it is called."""
    return pd.DataFrame([
        {"from": words, **{target: interval(*value(of, label, target)) for target in TARGETS},
         "NonlinearError, weighted": interval(*value(of, label, "NonlinearError", "r2_vector_weighted"))}
        for label, words in labels.items()])


figures.table(rows_of(found, {label: label for label in bars_of}), f"The same in numbers: mean over dimensions, and for NonlinearError "
              f"also weighted by variance. {basis}.", "tab-components")

# %% tags=["hide-input"]
alone = {label: value(found, label, "NonlinearError") for label in [own_site, *neighbours]}
best = max(alone, key=lambda label: alone[label][0])
everything = value(found, together, "NonlinearError") if neighbours else (None, None, None)
display(prose(f"""
{f'Alone, *{best}* predicts NonlinearError best: {interval(*alone[best])}.' if enough else ''}
{f'All together reach {interval(*everything)}.' if neighbours else ''}
{'' if enough else f'**{n_fit:,} tokens are few to fit {most:,} dimensions on**: every map also fits noise, the more the more '
 'dimensions it has, and its held-out score falls, even below zero. Scores of this run should not be compared with each other.'}
"""))

# %% [markdown]
# ## What the own reconstruction knows
#
# There is a catch in the reference. From {eq}`eq-sum` and {eq}`eq-linear`,
#
# $$\mathrm{Sae}(x) = x - b^* x - c^* - \mathrm{NonlinearError}(x).$$ (eq-circular)
#
# The SAE's own reconstruction *contains* NonlinearError, with its sign turned. So it must predict some of it, and next to $x$ it
# predicts all of it: $x - \mathrm{Sae}(x)$ *is* the error. That is arithmetic and no knowledge. What it knows of the whole error,
# without $x$, is the honest question, and training answers it: an error that a linear map of the reconstruction could predict would have
# been trained away.
#
# For the neighbours there is no such identity. Their honest question is what they add *next to* $x$: how much of NonlinearError a map
# from $x$ and their reconstructions takes away, without the own reconstruction.

# %% tags=["hide-input"]
own_rows = rows_of(found, {own_site: f"{own_site} alone", **{label: label for label in beside}})
figures.table(own_rows, f"The own reconstruction alone and next to $x$, and the neighbours next to $x$. {basis}.", "tab-components-beside")

# %% tags=["hide-input"]
of_error, of_linear, of_rest = (value(found, own_site, target) for target in TARGETS)
taken = value(found, "x and neighbours", "NonlinearError") if neighbours else (None, None, None)
told = [f"The own reconstruction predicts {interval(*of_rest)} of NonlinearError and {interval(*of_linear)} of LinearError, but "
        f"{interval(*of_error)} of their sum, SaeError. " + (
            "It knows less of the whole than of a part." if of_error[0] > 0.1 * of_rest[0] else
            "What it says of one part it takes back with the other." if of_linear[0] > 0 else
            "Of the whole error it knows nothing.")]
if neighbours:
    left = float(result.table()["fvu_nonlinear"].iloc[0])
    weighted = value(found, "x and neighbours", "NonlinearError", "r2_vector_weighted")[0]
    told.append(f"Next to $x$, the neighbours' reconstructions explain {interval(*taken)} of NonlinearError." + (
        f" That would change $\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$ from {number(left)} to about {number(left * (1 - weighted))}."
        if weighted > 0 else " They take nothing away."))
prose("\n\n".join(told))

# %% [markdown]
# ## Is it the SAEs that know it?
#
# The bars above do not say where the knowledge comes from. Three controls, which the paper does not have:
#
# - **The raw activations** of the neighbouring sites, in place of their reconstructions. If these predict as much, then the
#   neighbours' SAEs add nothing: their *sites* know it. (With all three components the raw activations add up to $x$, so that
#   together they must predict LinearError completely. That is a check of the pipeline.)
# - **Another SAE at this site**, of another width. It sees nothing but $x$. If its reconstruction predicts as much, then what helps is a
#   second opinion on $x$, not another component.
# - **A shuffled reconstruction**: each token gets the reconstruction of some other token. This must predict nothing.

# %%
ladder = [saes.load(ref, p) for ref in p.saes if ref != p.default_sae]
same_l0 = [each for each in ladder if each.k == own.k and each.width != own.width]
second = min(same_l0 or ladder, key=lambda each: abs(np.log(each.width / own.width)), default=None)
readers = {"x": acts[p.site].read, "shuffled": components.shuffled(
    next(iter(neighbours.values()), errors.reconstruction), len(acts[p.site].x), p.seed)}
control_sets = {"shuffled": ["shuffled"]}
if second:
    readers["second"] = components.decoded(second, acts[p.site])
    control_sets |= {"second": ["second"], "both": ["x", "second"]}
controls = components.predict(errors, readers, control_sets)

# %%
raw_sets = {label: [label] for label in sites} | ({others: list(sites)} if sites else {})
from_raw = components.predict(errors, {label: acts[site].read for label, site in sites.items()}, raw_sets) if sites else None

# %% tags=["hide-input"]
words = ({"second": f"another SAE here, {second.width:,} wide", "both": "x and that one"} if second else {}) | {
    "shuffled": f"{next(iter(neighbours), own_site)}, shuffled"}
shown = rows_of(controls, words)
if from_raw:
    shown = pd.concat([rows_of(from_raw, {label: f"raw: {label}" for label in raw_sets}), shown], ignore_index=True)
figures.table(shown, f"Controls: $R^2$ of linear maps to the error and its parts, mean over dimensions; the last column is weighted. {basis}.",
              "tab-components-controls")

# %% tags=["hide-input"]
if from_raw:
    pairs = pd.DataFrame([{"from": label, "what": kind, "value": one[0], "low": one[1], "high": one[2]} for label in raw_sets
                          for kind, of in (("reconstruction", found), ("raw activation", from_raw))
                          for one in [value(of, label, "NonlinearError")]])
    fig = go.Figure()
    for kind, name in (("raw activation", "purple"), ("reconstruction", "orange")):
        each = pairs[pairs["what"] == kind].iloc[::-1].astype({"low": float, "high": float})
        fig.add_bar(y=each["from"].str.replace(", ", ",<br>"), x=each["value"], orientation="h", name=kind, marker_color=figures.colour(name, 0.7), error_x={
            "array": each["high"] - each["value"], "arrayminus": each["value"] - each["low"], "symmetric": False,
            "thickness": 1.2, "width": 2, "color": figures.colour("grey")})
    fig.update_xaxes(title_text="R² of NonlinearError", rangemode="tozero").update_yaxes(automargin=True)
    display(figures.finish(fig.update_layout(barmode="group", bargap=0.3, legend_traceorder="reversed"), "fig-components-raw",
                           f"NonlinearError from what the neighbours' SAEs say, and from the activations that they read. {basis}.",
                           "Bars of R² for NonlinearError: " + ", ".join(
                               f"{row['from']} {row['what']} {row['value']:.2f}" for _, row in pairs.iterrows()),
                           height=110 + 56 * len(raw_sets)))

# %% tags=["hide-input"]
def compared(difference: tuple[float, float | None, float | None], more: str, less: str, same: str) -> str:
    """The words that fit a difference: its interval above zero, below zero, or across it."""
    _, low, high = difference
    if not enough:
        return "With so few tokens nothing follows from this."
    return same if low is None or high is None or low <= 0 <= high else more if low > 0 else less


mixed = value(controls, "shuffled", "NonlinearError")
told = [f"Shuffled, a reconstruction predicts {interval(*mixed)} of NonlinearError"
        + (": nothing, as it should be." if abs(mixed[0]) < 0.02 else
           f". Below zero is what fitting {d} dimensions of noise on {n_fit:,} tokens costs."
           if mixed[0] < 0 else ": it should be nothing, so the scores above are too high by about as much.")]
if from_raw:
    over = estimate(found.draws[others, "NonlinearError", "r2_vector"] - from_raw.draws[others, "NonlinearError", "r2_vector"], found.effective)
    told.append(f"The neighbours' reconstructions together predict {interval(*value(found, others, 'NonlinearError'))}, their raw "
                f"activations {interval(*value(from_raw, others, 'NonlinearError'))}; the difference is {interval(*over)}. "
                + compared(over, "So the reconstructions hold something that no linear map finds in the activations they are made from: "
                           "the encoders' nonlinear step.",
                           "So the raw activations know more of it than the SAEs do: what helps is the place, not the SAE.",
                           "So it cannot be said that the SAEs add to what their sites know."))
    told.append(f"From the raw activations together LinearError is predicted with $R^2$ = {interval(*value(from_raw, others, 'LinearError'))}"
                + (", as it must be where they add up to $x$." if len(sites) >= 3 else "."))
if second and neighbours:
    beyond = estimate(found.draws["x and neighbours", "NonlinearError", "r2_vector"] - controls.draws["both", "NonlinearError", "r2_vector"],
                      found.effective)
    told.append(f"Next to $x$, one other SAE at this very site ({second.width:,} wide) takes away {interval(*value(controls, 'both', 'NonlinearError'))} "
                f"of NonlinearError, all neighbours {interval(*taken)}. " + compared(
                    beyond, "So other components know more than a second opinion on $x$ does.",
                    "So a second opinion on $x$ helps more than all other components do: what is gained need not come from elsewhere.",
                    "So a second opinion on $x$ helps as much as all other components do."))
prose("\n\n".join(told))

# %% [markdown]
# ## Agreement with the paper
#
# *Up to 50%* names the best case of the paper. This book reads it as .30 to .60 for all reconstructions together, the own one
# included, as in the paper's figure. The second claim, that nearby SAEs *reduce* NonlinearError, is tested without the own one.

# %%
statements = {
    "maps from nearby SAEs' reconstructions explain up to half of the variance of NonlinearError":
        ("R² of NonlinearError, all together", everything, (0.3, 0.6), "0.30 to 0.60"),
    "NonlinearError can be reduced by linear maps from nearby SAEs":
        ("R² of NonlinearError, x and the neighbours' reconstructions", taken, (0, np.inf), "above 0"),
}
verdicts = [run.claim(claim, what, one, agrees, found.n, paper="up to 50%" if i == 0 else "–")
            for i, (claim, (what, one, agrees, _)) in enumerate(statements.items())]

# %% tags=["hide-input"]
figures.table(pd.DataFrame({
    "the paper": list(statements), "measured": [each[0] for each in statements.values()],
    "here": [interval(*each[1]) for each in statements.values()], "agrees if": [each[3] for each in statements.values()],
    "verdict": verdicts,
}), f"Statements of the paper about other components, and this run ({basis}).", "tab-components-agreement")

# %% tags=["hide-input"]
prose(f"""
The paper's SAEs are 16,384 wide on 3,584 dimensions; here the SAE is {own.width:,} wide on {d}. {f"A smaller error also has its price: the map from $x$ and all neighbours has {most * d / 1e6:.1f} million weights, the SAE itself "
f"{2 * own.width * d / 1e6:.1f} million, and the neighbours' SAEs have to be run too." if neighbours else ''}
""")

# %% tags=["hide-cell"]
for words_of, of in (("reconstruction", found), ("raw", from_raw), ("control", controls)):
    for row in of.table().itertuples() if of else ():
        run.add(f"{row.metric} of {row.target} from {row.set} ({words_of})", row.value, row.low, row.high, row.n, "tokens", own.name)
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
