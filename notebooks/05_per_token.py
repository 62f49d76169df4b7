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
# # Per-token scaling
#
# A wider {term}`SAE` leaves less of an activation unexplained: on average. What happens to a single token? **Do all SAEs
# of a {term}`ladder` fail on the same tokens, and does the error of a narrow one say how large the error of a wide one
# will be?**
#
# {cite:t}`engels2024dark` answer yes. They draw the error norms of SAEs of seven widths over a stretch of text, where the
# curves run side by side, and predict the norm of a wider SAE's error from a narrower one's. The first version of the
# paper adds a second claim: the norm of the narrower SAE's {term}`NonlinearError` *helps* to predict it. Both are shown as
# figures. This book does not know the numbers in them, so it reports its own and says which way they point.
#
# Norms in this chapter are lengths, $\lVert\cdot\rVert_2$, **not squared**, as in the paper's figures. In the chapters
# before they were squared.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs than the preset's, with commas between: release:sae_id, directory, artifact:NAME or train:WIDTHxL0
domain: str = ""  # the part of the text that is shown, such as plays or scripture; "" takes plays where there are some
context: int = -1  # the held-out context that is shown; -1 takes the one of the domain with the most whole words

# %% tags=["hide-input"]
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import display
from plotly.subplots import make_subplots

from darkmatter import figures, model, pertoken, records, reference, scaling, survey
from darkmatter.figures import interval, number, prose

run = records.start("05_per_token", preset, sae=sae, domain=domain, context=context)
p = run.preset

# %% [markdown]
# ## The norms
#
# Everything here comes from the tables of the {term}`survey`: for every {term}`kept token` and SAE the squared norms of
# SaeError, LinearError and NonlinearError. The ladder is made of the SAEs that share the most common L0, one a width.

# %%
result = survey.run(p)
ladder = scaling.ladder(result.table())
names, widths = list(ladder["sae"]), ladder["width"].to_numpy()
tokens = {name: result.tokens(name) for name in names}
rows = pertoken.Rows.of(p, result.acts)

PARTS = ("error", "linear", "nonlinear")
norms = {part: np.stack([np.sqrt(tokens[name][f"{part}_norm2"].to_numpy(float)) for name in names], 1) for part in PARTS}
x_norm = np.sqrt(tokens[names[0]]["x_norm2"].to_numpy(float))
held_out = ~rows.fit.numpy()

several = len(names) > 1
basis = f"{held_out.sum():,} held-out tokens of {len(set(rows.clusters[result.acts.context[held_out]]))} sources"
at = f"{ladder['l0'].mean():.0f}"

# %% tags=["hide-input"]
prose(f"""
The ladder has {len(names)} SAE{'s' if several else ''}, of width {', '.join(f'{w:,}' for w in widths)}, at a mean L0 of {at}.
{'' if several else '**Predicting one SAE from another takes at least two widths at one L0. This run has fewer; it shows the '
'norms over the text and leaves the rest out.**'}
""")

# %% [markdown]
# ## Over a stretch of text
#
# The stretch is from a held-out {term}`source`. It begins after the first line break among the kept tokens of its context;
# of the contexts of one domain, the one is taken whose stretch has the most tokens that begin a word. Nothing about errors
# enters the choice.

# %%
LINES, A_LINE = 3, 20
tokenizer = model.load_tokenizer(p)
hidden = pertoken.HIDDEN if p.corpus == "mix" else ()
shown = pertoken.stretch(tokens[names[0]], tokenizer, LINES * A_LINE, domain, None if context == -1 else context, hidden)
words = pertoken.labels(tokenizer, tokens[names[0]]["token_id"][shown])
first = tokens[names[0]].iloc[shown.start]
origin = result.acts.text.sources[first["source"]]


# %% tags=["hide-input"]
def over_text(panels: list[tuple[np.ndarray, int, str]]) -> go.Figure:
    """A line of text a panel, with one curve a width above it: (norms [token, SAE], first token, title of the axis)."""
    fig = make_subplots(rows=len(panels), cols=1, shared_yaxes="all", vertical_spacing=0.36 / len(panels))
    place = np.arange(A_LINE)
    for row, (values, begin, title) in enumerate(panels, 1):
        some = slice(shown.start + begin, shown.start + begin + A_LINE)
        for i, width in enumerate(widths):
            fig.add_scatter(x=place, y=values[some, i].round(2), row=row, col=1, name=f"{width:,}", mode="lines+markers",
                            line={"width": 1.5, "color": figures.colour(list(figures.COLOURS)[i % 6])}, marker={"size": 4},
                            customdata=words[begin:begin + A_LINE], hovertemplate="%{customdata}: %{y:.1f}",
                            showlegend=row == 1, legendgroup=str(width))
        fig.update_xaxes(tickvals=place, ticktext=words[begin:begin + A_LINE], tickangle=-60, tickfont_size=12,
                         range=[-0.5, A_LINE - 0.5], row=row, col=1)
        fig.update_yaxes(title_text=title, row=row, col=1)
    return fig.update_yaxes(rangemode="tozero").update_layout(showlegend=several)


fig = over_text([(norms["error"], line * A_LINE, "‖SaeError‖") for line in range(LINES)])
figures.finish(
    fig, "fig-token-text", f"The norm of SaeError, token by token, for SAEs of {len(names)} width{'s' if several else ''} at "
    f"L0 {at} (colours). The text stands below the curves and reads on from panel to panel: `{origin}`, context "
    f"{first['context']}, from position {first['position']}. ⏎ is a line break; a token that goes on with a word begins with a hyphen.",
    f"{LINES} panels of curves over {LINES * A_LINE} tokens, one curve a width" + (f"; the correlation of two of them is at least "
    f"{np.corrcoef(norms['error'][shown].T).min():.2f}." if several else "."),
    paper="Figures 4 and 5", height=240 * LINES)

# %% [markdown]
# The same norms split in two: LinearError, which a linear map of $x$ predicts, and NonlinearError, which it does not.

# %% tags=["hide-input"]
fig = over_text([(norms["linear"], 0, "‖LinearError‖"), (norms["nonlinear"], 0, "‖NonlinearError‖")])
figures.finish(
    fig, "fig-token-parts", "The first line of {numref}`fig-token-text` again: the norms of the linear and of the nonlinear "
    "part of the same errors, on one scale.", f"Two panels of curves over the same {A_LINE} tokens: the norm of the linear "
    "part above, of the nonlinear part below.", paper="Figures 5 and 6", height=500)

# %% [markdown]
# ## The same over all tokens
#
# A stretch of text is an example. The table sums up all held-out tokens: how much shorter each part becomes from the
# narrowest SAE to the widest, for how many tokens it becomes shorter at all, and how well the narrowest SAE's norm predicts
# the widest's. All regressions of this chapter are least squares with intercept, fitted on some sources and scored on others.

# %%
def regress(features: list[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Held-out R² [1 + draws, k] of norms [token, k] predicted from features, each [token]."""
    table, wanted = torch.from_numpy(np.stack(features, 1)), torch.from_numpy(targets)
    return pertoken.r2(wanted, pertoken.predict(table.__getitem__, wanted, rows), rows)


def slope(features: list[np.ndarray], target: np.ndarray) -> float:
    """The coefficient of the last feature on the fitted tokens."""
    table = np.stack([*features, np.ones_like(target)], 1)[~held_out]
    return float(np.linalg.lstsq(table, target[~held_out])[0][-2])


TITLES = {"error": "SaeError", "linear": "LinearError", "nonlinear": "NonlinearError"}
summary, ends = [], {}
for part, title in TITLES.items():
    narrow, wide = norms[part][:, 0], norms[part][:, -1]
    mean = pertoken.means(torch.from_numpy(np.stack([narrow, wide, wide / narrow, wide < narrow], 1)), rows)
    ends[part] = {"ratio": mean[:, 2], "spread": float(np.std((wide / narrow)[held_out])), "shorter": mean[0, 3],
                  "r2": regress([narrow], wide[:, None])[:, 0]}
    summary.append({
        "norm of": title, f"at {widths[0]:,}": mean[0, 0], f"at {widths[-1]:,}": mean[0, 1],
        "mean ratio": interval(*rows.estimate(mean[:, 2])), "its spread": ends[part]["spread"],
        "shorter for": f"{mean[0, 3]:.0%}", "R²": interval(*rows.estimate(ends[part]["r2"]))})

# %% tags=["hide-input"]
if several:
    display(figures.table(
        pd.DataFrame(summary), f"Norms of the errors of the narrowest SAE ({widths[0]:,} latents) and of the widest "
        f"({widths[-1]:,}): their means; the mean over tokens of the ratio of the two, and its standard deviation; the share of "
        f"tokens for which the widest has the shorter vector; $R^2$ of the widest's norm from the narrowest's. n = {basis}; 95% "
        "intervals.", "tab-token-parts", digits={f"at {widths[0]:,}": 1, f"at {widths[-1]:,}": 1}))
    closest = max(TITLES, key=lambda part: ends[part]["r2"][0])
    fall = {part: float((norms[part][held_out, 0] ** 2 - norms[part][held_out, -1] ** 2).sum()) for part in TITLES}
    display(prose(f"""
    From the narrowest SAE to the widest, the norm of LinearError is multiplied by
    {interval(*rows.estimate(ends['linear']['ratio']))} and that of NonlinearError by
    {interval(*rows.estimate(ends['nonlinear']['ratio']))}, on average over tokens. Of the fall of the mean squared error,
    {fall['linear'] / fall['error']:.0%} is in LinearError. The norm that carries over best from one end of the ladder to the other
    is that of *{TITLES[closest]}*: its ratio has a standard deviation of only {ends[closest]['spread']:.3f} over tokens.
    A draft of the paper held that the nonlinear error of a token stays constant with width. Here the ratio for NonlinearError has a
    standard deviation of {ends['nonlinear']['spread']:.3f}, and it is below 1 for {ends['nonlinear']['shorter']:.0%} of the tokens.
    """))

# %% [markdown]
# ## A wider SAE's error from a narrower one's
#
# Now all pairs of the ladder (the paper's heatmap). For each pair the norm of the wider SAE's error is regressed on the norm
# of the narrower one's. The paper has no control for what such a prediction is worth. The last row of the table is one: the
# same norms predicted from $\lVert x\rVert_2$ alone, which needs no SAE at all.

# %%
pairs = {}  # draws of R² of the wider SAE's error norm, by (narrower, wider)
for i in range(len(names) - 1):
    draws = regress([norms["error"][:, i]], norms["error"][:, i + 1:])
    pairs |= {(i, j): draws[:, j - i - 1] for j in range(i + 1, len(names))}
from_x = regress([x_norm], norms["error"])

# %% tags=["hide-input"]
if several:
    cells = {pair: interval(*rows.estimate(draws)) for pair, draws in pairs.items()}
    upper = pd.DataFrame([
        {"from": f"{widths[i]:,}"} | {f"to {widths[j]:,}": cells.get((i, j), "") for j in range(1, len(names))}
        for i in range(len(names) - 1)])
    upper.loc[len(upper)] = ["$\\lVert x\\rVert$", *(interval(*rows.estimate(from_x[:, j])) for j in range(1, len(names)))]
    display(figures.table(upper, "Held-out $R^2$ of the error norm of a wider SAE (columns) from that of a narrower one (rows); "
                          f"last row: from the norm of $x$. n = {basis}; 95% intervals.", "tab-token-pairs"))

# %% tags=["hide-input"]
if several:
    points = pd.DataFrame(
        [(widths[j], f"from {widths[i]:,}", *rows.estimate(draws)) for (i, j), draws in pairs.items()]
        + [(widths[j], "from ‖x‖", *rows.estimate(from_x[:, j])) for j in range(1, len(names))],
        columns=["width", "from", "value", "low", "high"])
    fig = figures.interval_points(points, "width", group="from", x_title="width of the SAE that is predicted", y_title="held-out R²")
    fig.update_yaxes(rangemode="tozero")
    worst, best = (choose(pairs, key=lambda pair: pairs[pair][0]) for choose in (min, max))
    display(figures.finish(
        fig, "fig-token-pairs",
        "How well the norm of a wider SAE's error follows from a narrower one's: the numbers of {numref}`tab-token-pairs`.",
        f"R² of error norms of wider SAEs from narrower ones, between {pairs[worst][0]:.2f} and {pairs[best][0]:.2f}; from the "
        "norm of x it is " + ", ".join(f"{value:.2f}" for value in from_x[0, 1:]) + ".", paper="Figure 11"))
    beyond = rows.estimate(pairs[worst] - from_x[:, worst[1]])
    display(prose(f"""
    $R^2$ lies between {number(pairs[worst][0])} ({widths[worst[0]]:,} to {widths[worst[1]]:,}) and {number(pairs[best][0])}
    ({widths[best[0]]:,} to {widths[best[1]]:,}). Even for the pair that is predicted worst, the narrower SAE's error explains
    {interval(*beyond)} more of the variance than the norm of $x$ does:
    {'SAEs of one ladder find the same tokens hard, and not only the long ones.' if (beyond[1] or 0) > 0 else
     'that is not clearly more than what the norm of $x$ gives.'}
    """))

# %% [markdown]
# ## Does NonlinearError help?
#
# Add the norm of the narrower SAE's NonlinearError as a second feature. What counts is the share of the *residual* variance
# that it removes:
#
# $$1 - \frac{1 - R^2_\text{with}}{1 - R^2_\text{without}} .$$
#
# Any further feature of the token might help a little, so the question is what NonlinearError does that others do not. The
# controls, each added in its place to the same regression:
#
# - the norm of {term}`LinearError` of the same SAE, and **both** norms together;
# - the **inner product** of the two parts: the square of the error's norm is
#   $\lVert\mathrm{Linear}\rVert^2 + \lVert\mathrm{Nonlinear}\rVert^2 + 2\,\mathrm{Linear}^{\mathsf T}\mathrm{Nonlinear}$, so the
#   three norms together hold this too;
# - the norm of **$x$**;
# - what the **probe** of {doc}`02_norm` predicts for the narrower SAE, $a^{*\mathsf T}x$;
# - the norm of NonlinearError in **shuffled** order, which should remove nothing.

# %%
ADDED = {"NonlinearError": "NonlinearError", "LinearError": "LinearError", "both": "both norms",
         "inner": "inner product", "x": "‖x‖", "probe": "the probe", "shuffled": "NonlinearError,<br>shuffled"}
order = np.random.default_rng(p.seed).permutation(len(x_norm))
gain = {}  # draws of the share that is removed, by (narrower, wider, what is added)
slopes = {}  # the coefficient of a norm beside the error's, by (which norm, narrower, wider)
for i, name in enumerate(names[:-1]):
    linear, nonlinear = norms["linear"][:, i], norms["nonlinear"][:, i]
    features = {"NonlinearError": [nonlinear], "LinearError": [linear], "both": [linear, nonlinear],
                "inner": [norms["error"][:, i] ** 2 - linear**2 - nonlinear**2], "x": [x_norm],
                "probe": [tokens[name]["error_norm2_hat"].to_numpy(float)], "shuffled": [nonlinear[order]]}
    for label in ADDED:
        draws = regress([norms["error"][:, i], *features[label]], norms["error"][:, i + 1:])
        if label in ("NonlinearError", "LinearError"):
            slopes |= {(label, i, j): slope([norms["error"][:, i], *features[label]], norms["error"][:, j]) for j in range(i + 1, len(names))}
        gain |= {(i, j, label): pertoken.removed(pairs[i, j], draws[:, j - i - 1]) for j in range(i + 1, len(names))}
mean_gain = {label: np.mean([gain[i, j, label] for i, j in pairs], axis=0) for label in ADDED} if several else {}

# %% tags=["hide-input"]
def percent(draws: np.ndarray) -> str:
    """0.7% [0.5%, 0.9%]."""
    value, low, high = (each if each is None else round(each, 3) + 0.0 for each in rows.estimate(draws))  # no -0.0%
    return f"{value:.1%}" + ("" if low is None else f" [{low:.1%}, {high:.1%}]")


if several:
    fig = go.Figure()
    for label, title in list(ADDED.items())[::-1]:
        value, low, high = rows.estimate(100 * mean_gain[label])
        colour = figures.colour(figures.MEANING.get(label.replace("Error", " error").lower(), "grey"))
        each_pair = [100 * gain[i, j, label][0] for i, j in pairs]
        fig.add_scatter(x=each_pair, y=[title] * len(each_pair), mode="markers", hovertemplate="%{x:.2f}%",
                        marker={"size": 12, "symbol": "line-ns", "line": {"width": 1.5, "color": colour}})
        bars = {} if low is None else {"error_x": {"array": [high - value], "arrayminus": [value - low], "symmetric": False, "thickness": 1.6}}
        fig.add_scatter(x=[value], y=[title], mode="markers", hovertemplate="mean %{x:.2f}%", marker={"size": 10, "color": colour}, **bars)
    fig.update_xaxes(title_text="residual variance removed", ticksuffix="%").update_layout(showlegend=False)
    display(figures.finish(
        fig, "fig-token-gain", "What one more feature of the narrower SAE removes of the residual variance of the prediction. A "
        f"stroke is one of the {len(pairs)} pairs, the dot their mean with its 95% interval. n = {basis}.",
        "Mean share of residual variance removed: " + ", ".join(f"{label} {mean_gain[label][0]:.1%}" for label in ADDED),
        paper="Figure 12", height=360))

# %% tags=["hide-input"]
if several:
    display(figures.table(pd.DataFrame([
        {"from": f"{widths[i]:,}", "to": f"{widths[j]:,}"}
        | {ADDED[label]: percent(gain[i, j, label]) for label in ("NonlinearError", "LinearError", "x")} for i, j in pairs]),
        f"Share of the residual variance that each norm removes, for every pair. n = {basis}; 95% intervals.", "tab-token-gain"))

# %% [markdown]
# Is that little? It depends on how much there is to be had. For scale, the next cell adds *all* of $x$, every one of its
# dimensions, to the narrowest SAE's error norm.

# %%
if several:
    beside = torch.from_numpy(norms["error"][:, :1]).float()
    wider = torch.from_numpy(norms["error"][:, 1:])
    predicted = pertoken.predict(lambda some: torch.cat([result.acts.read(some), beside[some]], 1), wider, rows)
    all_of_x = pertoken.removed(np.stack([pairs[0, j] for j in range(1, len(names))], 1), pertoken.r2(wider, predicted, rows))

# %% tags=["hide-input"]
if several:
    more, on_top = mean_gain["LinearError"] - mean_gain["NonlinearError"], mean_gain["both"] - mean_gain["LinearError"]
    linear_helps_more = (rows.estimate(more)[1] or 0) > 0
    same_sign = [slopes["LinearError", i, j] * slopes["NonlinearError", i, j] > 0 for i, j in pairs]
    told = f"""They have the same sign for {sum(same_sign)} of the {len(pairs)} pairs. What both measure is how the two parts point: at
    a given length of their sum, two long parts must point against each other. Their inner product says it directly, and removes
    {percent(mean_gain['inner'])} by itself.""" if sum(same_sign) > len(pairs) / 2 else f"""They have opposite signs for
    {len(pairs) - sum(same_sign)} of the {len(pairs)} pairs. The inner product of the two parts removes
    {percent(mean_gain['inner'])} by itself."""
    display(prose(f"""
    On average over the pairs, the norm of NonlinearError removes {percent(mean_gain['NonlinearError'])} of the residual variance,
    that of LinearError {percent(mean_gain['LinearError'])}, the norm of $x$ {percent(mean_gain['x'])}; shuffled, NonlinearError
    removes {percent(mean_gain['shuffled'])}. All {result.acts.x.shape[1]} dimensions of $x$ remove
    {all_of_x[0].min():.0%} to {all_of_x[0].max():.0%}, from the narrowest SAE to each wider one.
    """))
    display(prose(f"""
    **The norm of LinearError helps more**, by {percent(more)}; NonlinearError on top of it adds {percent(on_top)}. So what helps
    is not something that only the nonlinear part holds. One might think that either norm tells how an error divides into a part
    that a wider SAE removes and a part that it does not. Then the two would have coefficients of opposite sign. {told}
    """ if linear_helps_more else "The norm of LinearError does not clearly help more than that of NonlinearError."))

# %% [markdown]
# ## Agreement with the paper
#
# The paper's numbers behind these figures are not known to this book, so both ranges are its own reading of the words:
# *predictable* as more than half of the variance, for the worst pair; *helps* as removing more than nothing, on average
# over the pairs.

# %%
n, nothing = int(held_out.sum()), (None, None, None)
lowest = rows.estimate(np.min(list(pairs.values()), axis=0)) if several else nothing
helped = rows.estimate(mean_gain["NonlinearError"]) if several else nothing
predictable = run.claim(
    "The norm of a wide SAE's error on a token can be predicted from a narrow one's.",
    "R² of the wider SAE's error norm from the narrower one's, for the pair of the ladder that is predicted worst",
    lowest, (0.5, np.inf), n, paper="can be predicted (read here as: R² above .5)")
helps = run.claim(
    "The norm of the narrow SAE's NonlinearError helps to predict it (the paper's first version).",
    "share of the residual variance that it removes, mean over the pairs of the ladder",
    helped, (0.0, np.inf), n, paper="helps (read here as: above 0)")

# %% tags=["hide-input"]
figures.table(pd.DataFrame({
    "claim": ["A wide SAE's error norm follows from a narrow one's", "The norm of NonlinearError helps (first version)"],
    "measured": ["$R^2$, worst pair", "residual variance removed, mean of the pairs"],
    "value": [interval(*lowest) if several else "–", percent(mean_gain["NonlinearError"]) if several else "–"],
    "verdict": [f"**{predictable}**", f"**{helps}**"],
}), f"The claims of this chapter. n = {basis}.", "tab-token-claims")

# %% tags=["hide-input"]
if several and linear_helps_more:
    display(prose("""
    On the second claim: the norm of NonlinearError does help, but little, and the control that the paper does not have, the norm of
    LinearError, helps more. The claim is true as stated and does not show that the nonlinear part is special.
    """ if helps == "agree" else """
    On the second claim: whatever NonlinearError adds, the control that the paper does not have, the norm of LinearError, adds more.
    """))

# %% tags=["hide-cell"]
if several:
    for (i, j), draws in pairs.items():
        run.add(f"r2_error_norm from width {widths[i]}", *rows.estimate(draws), n, "tokens", names[j])
    for j in range(1, len(names)):
        run.add("r2_error_norm from the norm of x", *rows.estimate(from_x[:, j]), n, "tokens", names[j])
    for label, draws in mean_gain.items():
        run.add(f"residual variance removed by {label}, mean over pairs", *rows.estimate(draws), n, "tokens")
    for part in TITLES:
        run.add(f"ratio of the norm of {part}, widest over narrowest", *rows.estimate(ends[part]["ratio"]), n, "tokens")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
