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
# A wider {term}`SAE` leaves less of an activation unexplained: on average. What happens to a
# single token? **Do all SAEs of a {term}`ladder` fail on the same tokens, and does the error of a
# narrow one say how large the error of a wide one will be?**
#
# {cite:t}`engels2024dark` answer yes. They draw the error norms of SAEs of seven widths over a
# stretch of text, where the curves run side by side, and predict the norm of a wider SAE's error
# from a narrower one's. The first version of the paper adds a second claim: the norm of the
# narrower SAE's {term}`NonlinearError` *helps* to predict it. Both are shown as figures, without
# their numbers, so this book reports its own and says which way they point.
#
# Norms in this chapter are lengths, $\lVert\cdot\rVert_2$, **not squared**, as in the paper's
# figures. In the chapters before they were squared.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs: release:sae_id, directory, artifact:NAME or train:WIDTHxL0, by commas
domain: str = ""  # the part of the text to show, such as plays; "" takes plays where there are some
context: int = -1  # the held-out context to show; -1 takes the domain's one with most whole words

# %%
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import display
from plotly.subplots import make_subplots

from darkmatter import survey
from darkmatter.book import figures, records, reference
from darkmatter.book.figures import prose
from darkmatter.experiments import per_token, scaling
from darkmatter.models import model
from darkmatter.regression import probe

run = records.start("05_per_token", preset, sae=sae, domain=domain, context=context)
p = run.preset

# %% [markdown]
# ## The norms
#
# Everything here comes from the tables of the {term}`survey`: for every {term}`kept token` and
# SAE the squared norms of SaeError, LinearError and NonlinearError. The ladder is made of the
# SAEs that share the most common L0, one a width.

# %%
result = survey.run(p)
ladder = scaling.ladder(result.table())
names, widths = list(ladder["sae"]), ladder["width"].to_numpy()
tokens = {name: result.tokens(name) for name in names}
rows = per_token.split_rows(p, result.acts)  # which tokens are fitted, which held out


def norms(part: str) -> torch.Tensor:
    """The lengths of one part of the error, float64 [token, SAE of the ladder]."""
    squared = [tokens[name][f"{part}_norm2"].to_numpy(float) for name in names]
    return torch.from_numpy(np.sqrt(np.stack(squared, 1)))


error, linear, nonlinear, x = map(norms, ("error", "linear", "nonlinear", "x"))
x = x[:, :1]  # the same for every SAE
several = len(names) > 1
PARTS = {"SaeError": error, "LinearError": linear, "NonlinearError": nonlinear}

# %% tags=["hide-input"]
at = f"{ladder['l0'].mean():.0f}"
listed = ", ".join(f"{width:,}" for width in widths)
alone = "" if several else """**Predicting one SAE from another takes at least two widths at one L0.
This run has fewer; it shows the norms over the text and leaves the rest out.**"""
prose(f"The ladder has SAEs of width {listed}, at a mean L0 of {at}. {alone}")

# %% [markdown]
# ## Over a stretch of text
#
# The stretch is from a held-out {term}`source`. It begins after the first line break among the
# kept tokens of its context; of the contexts of one domain, the one is taken whose stretch has
# the most tokens that begin a word. Nothing about errors enters the choice.

# %%
LINES, A_LINE = 3, 20  # panels, and tokens a panel
table, tokenizer = tokens[names[0]], model.load_tokenizer(p)
hidden = per_token.HIDDEN if p.corpus == "mix" else ()
shown = per_token.stretch(table, tokenizer, LINES * A_LINE, domain,
                          None if context == -1 else context, hidden)
words = per_token.labels(tokenizer, table["token_id"][shown])
first = table.iloc[shown.start]
origin = result.acts.text.sources[first["source"]]


# %% tags=["hide-input"]
def over_text(panels: list[tuple[torch.Tensor, int, str]]) -> go.Figure:
    """A line of text a panel, one curve a width above it: (norms, first token, axis title)."""
    fig = make_subplots(rows=len(panels), shared_yaxes="all", vertical_spacing=0.36 / len(panels))
    place = np.arange(A_LINE)
    for row, (values, begin, title) in enumerate(panels, 1):
        line = values[shown.start + begin:shown.start + begin + A_LINE].numpy().round(2)
        text = words[begin:begin + A_LINE]
        for i, width in enumerate(widths):
            shade = figures.colour(list(figures.COLOURS)[i % 6])
            fig.add_scatter(x=place, y=line[:, i], row=row, col=1, name=f"{width:,}", marker_size=4,
                            mode="lines+markers", line={"width": 1.5, "color": shade},
                            customdata=text, hovertemplate="%{customdata}: %{y:.1f}",
                            showlegend=row == 1, legendgroup=str(width))
        fig.update_xaxes(tickvals=place, ticktext=text, tickangle=-60, tickfont_size=12,
                         range=[-0.5, A_LINE - 0.5], row=row, col=1)
        fig.update_yaxes(title_text=title, row=row, col=1)
    return fig.update_yaxes(rangemode="tozero").update_layout(showlegend=several)


together = f"; any two of them correlate by {np.corrcoef(error[shown].T).min():.2f} or more"
together = together if several else ""
figures.finish(
    over_text([(error, line * A_LINE, "‖SaeError‖") for line in range(LINES)]), "fig-token-text",
    f"The norm of SaeError, token by token, for the widths of the ladder, L0 {at} (colours). "
    f"The text stands below the curves and reads on from panel to panel: `{origin}`, context "
    f"{first['context']}, from position {first['position']}. ⏎ is a line break; a token that goes "
    "on with a word begins with a hyphen.", f"{LINES} panels of curves over {len(words)} tokens, "
    f"one curve a width{together}.", paper="Figures 4 and 5", height=240 * LINES)

# %% [markdown]
# The same norms split in two: LinearError, which a linear map of $x$ predicts, and
# NonlinearError, which it does not.

# %% tags=["hide-input"]
figures.finish(
    over_text([(linear, 0, "‖LinearError‖"), (nonlinear, 0, "‖NonlinearError‖")]),
    "fig-token-parts", "The first line of {numref}`fig-token-text` again: the norms of the linear "
    "and of the nonlinear part of the same errors, on one scale.", f"Two panels of curves over "
    f"{A_LINE} tokens: the norm of the linear part above, of the nonlinear part below.",
    paper="Figures 5 and 6", height=500)

# %% [markdown]
# ## The same over all tokens
#
# A stretch of text is an example. The table sums up all held-out tokens: how much shorter each
# part becomes from the narrowest SAE to the widest, for how many tokens it becomes shorter at
# all, and how well the narrowest SAE's norm predicts the widest's. All regressions of this
# chapter are least squares with intercept, fitted on some sources and scored on others:

# %%
figures.source(probe.held_out_r2)

# %%
summary, ratios = [], {}
for part, values in PARTS.items():
    narrow, wide = values[:, :1], values[:, -1:]
    ratio = wide / narrow
    of_narrow, of_wide, ratios[part], shorter = probe.means(
        torch.cat([narrow, wide, ratio, wide < narrow], 1), rows)
    r2, = probe.held_out_r2(narrow, wide, rows)
    summary.append({
        "norm of": part, "narrowest": of_narrow.value, "widest": of_wide.value,
        "mean ratio": f"{ratios[part]}", "its spread": float(ratio[rows.held].std()),
        "shorter for": f"{shorter.value:.0%}", "R²": f"{r2}", "r2": float(r2)})
basis = r2.basis(result.unit)

# %%
if several:
    display(figures.table(
        pd.DataFrame(summary).drop(columns="r2"),
        f"Norms of the errors of the narrowest SAE ({widths[0]:,} latents) and of the "
        f"widest ({widths[-1]:,}): their means; the mean over tokens of the ratio of the "
        "two, and its standard deviation; the share of tokens for which the widest has the "
        "shorter vector; $R^2$ of the widest's norm from the narrowest's. "
        f"n = {basis}; 95% intervals.", "tab-token-parts",
        digits={"narrowest": 1, "widest": 1}))
fall = {part: float((values[rows.held, 0] ** 2 - values[rows.held, -1] ** 2).sum())
        for part, values in PARTS.items()}
closest = max(summary, key=lambda row: row["r2"])["norm of"]

# %% tags=["hide-input"]
if several:
    display(prose(f"""
    Of the fall of the mean squared error, {fall['LinearError'] / fall['SaeError']:.0%} is in
    LinearError. The norm that carries over best from one end of the ladder to the other is that of
    *{closest}* ({{numref}}`tab-token-parts`). A draft of the paper held that the nonlinear error of
    a token stays constant with width. Here its ratio has a standard deviation of
    {summary[-1]['its spread']:.3f}, and is below 1 for {summary[-1]['shorter for']} of the tokens.
    """))

# %% [markdown]
# ## A wider SAE's error from a narrower one's
#
# Now all pairs of the ladder (the paper's heatmap). For each pair the norm of the wider SAE's
# error is regressed on the norm of the narrower one's. The paper has no control for what such a
# prediction is worth. The last row of the table is one: the same norms predicted from $\lVert
# x\rVert_2$ alone, which needs no SAE at all.

# %%
pairs = {}  # R² of the wider SAE's error norm, by (narrower, wider)
for i in range(len(names) - 1):
    scores = probe.held_out_r2(error[:, [i]], error[:, i + 1:], rows)
    pairs |= {(i, j): score for j, score in enumerate(scores, i + 1)}
from_x = probe.held_out_r2(x, error, rows)

# %%
if several:
    wider = range(1, len(names))
    grid = [{"from": f"{widths[i]:,}"}
            | {f"to {widths[j]:,}": f"{pairs[i, j]}" if j > i else "" for j in wider}
            for i in range(len(names) - 1)]
    grid.append({"from": "$\\lVert x\\rVert$"}
                | {f"to {widths[j]:,}": f"{from_x[j]}" for j in wider})
    display(figures.table(
        pd.DataFrame(grid), "Held-out $R^2$ of the error norm of a wider SAE (columns) "
        "from that of a narrower one (rows); last row: from the norm of $x$. "
        f"n = {basis}; 95% intervals.", "tab-token-pairs"))
    points = [{"width": widths[j], "from": f"from {widths[i]:,}", **score.row}
              for (i, j), score in pairs.items()]
    points += [{"width": widths[j], "from": "from ‖x‖", **from_x[j].row} for j in wider]
    worst, best = (choose(pairs, key=lambda pair: float(pairs[pair]))
                   for choose in (min, max))

# %% tags=["hide-input"]
if several:
    fig = figures.interval_points(
        pd.DataFrame(points), "width", group="from", y_title="held-out R²",
        x_title="width of the SAE that is predicted").update_yaxes(rangemode="tozero")
    display(figures.finish(
        fig, "fig-token-pairs", "How well the norm of a wider SAE's error follows from a narrower "
        "one's: the numbers of {numref}`tab-token-pairs`.",
        f"R² of error norms of wider SAEs from narrower ones, between {pairs[worst].value:.2f} and "
        f"{pairs[best].value:.2f}; from the norm of x it is at most "
        f"{max(float(from_x[j]) for j in wider):.2f}.", paper="Figure 11"))
    beyond = pairs[worst] - from_x[worst[1]]
    hard = "That is not clearly more than what the norm of $x$ gives."
    if (beyond.low or 0) > 0:
        hard = "SAEs of one ladder find the same tokens hard, and not only the long ones."
    display(prose(f"""
    Even for the pair that is predicted worst, {widths[worst[0]]:,} to {widths[worst[1]]:,} latents,
    the narrower SAE's error explains {beyond} more of the variance than the norm of $x$. {hard}
    """))

# %% [markdown]
# ## Does NonlinearError help?
#
# Add the norm of the narrower SAE's NonlinearError as a second feature. What counts is the share
# of the *residual* variance that it removes:
#
# $$1 - \frac{1 - R^2_\text{with}}{1 - R^2_\text{without}} .$$
#
# Any further feature of the token might help a little, so the question is what NonlinearError
# does that others do not. The controls, each added in its place to the same regression:
#
# - the norm of {term}`LinearError` of the same SAE, and **both** norms together;
# - the **inner product** of the two parts: the square of the error's norm is
#   $\lVert\mathrm{Linear}\rVert^2 + \lVert\mathrm{Nonlinear}\rVert^2 +
#   2\,\mathrm{Linear}^{\mathsf T}\mathrm{Nonlinear}$, so the three norms together hold this too;
# - the norm of **$x$**;
# - what the **probe** of {doc}`02_norm` predicts for the narrower SAE, $a^{*\mathsf T}x$;
# - the norm of NonlinearError in **shuffled** order, which should remove nothing.

# %%
order = np.random.default_rng(p.seed).permutation(len(x))


def candidates(i: int) -> dict[str, torch.Tensor]:
    """What may be added to the error norm of SAE i of the ladder, each [token, 1 or 2]."""
    whole, long, rest = error[:, [i]], linear[:, [i]], nonlinear[:, [i]]
    predicted = tokens[names[i]][["error_norm2_hat"]].to_numpy(float)
    return {"NonlinearError": rest, "LinearError": long, "both": torch.cat([long, rest], 1),
            "inner": whole**2 - long**2 - rest**2, "x": x,
            "probe": torch.tensor(predicted), "shuffled": rest[order]}


gain = {}  # share of the residual variance removed, by (what is added, narrower, wider)
slope = {}  # the coefficient of what is added, beside that of the error's norm
for i in range(len(names) - 1):
    for label, added in candidates(i).items():
        features, targets = torch.cat([error[:, [i]], added], 1), error[:, i + 1:]
        scores = probe.held_out_r2(features, targets, rows)
        slopes = probe.fit(features, targets, rows).weight[-1]
        for j, score in enumerate(scores, i + 1):
            gain[label, i, j] = probe.removed(pairs[i, j], score)
            slope[label, i, j] = float(slopes[j - i - 1])
ADDED = {"NonlinearError": "NonlinearError", "LinearError": "LinearError",
         "both": "both norms", "inner": "inner product", "x": "‖x‖", "probe": "the probe",
         "shuffled": "NonlinearError,<br>shuffled"}
mean_gain = {label: sum(gain[label, i, j] for i, j in pairs) / len(pairs)
             for label in ADDED if pairs}

# %% tags=["hide-input"]
if several:
    fig = go.Figure()
    for label, title in list(ADDED.items())[::-1]:
        mean, meaning = 100 * mean_gain[label], label.replace("Error", " error").lower()
        shade = figures.colour(figures.MEANING.get(meaning, "grey"))
        stroke = {"size": 12, "symbol": "line-ns", "line": {"width": 1.5, "color": shade}}
        fig.add_scatter(x=[100 * float(gain[label, i, j]) for i, j in pairs], marker=stroke,
                        y=[title] * len(pairs), mode="markers", hovertemplate="%{x:.2f}%")
        fig.add_scatter(x=[float(mean)], y=[title], error_x=figures.error_bars([mean]),
                        mode="markers", marker={"size": 10, "color": shade},
                        hovertemplate="mean %{x:.2f}%")
    fig.update_xaxes(title_text="residual variance removed", ticksuffix="%")
    display(figures.finish(
        fig.update_layout(showlegend=False), "fig-token-gain", "What one more feature of the "
        "narrower SAE removes of the residual variance of the prediction. A stroke is one of the "
        f"{len(pairs)} pairs, the dot their mean with its 95% interval. n = {basis}.",
        "Mean share of residual variance removed: "
        + ", ".join(f"{label} {float(mean_gain[label]):.1%}" for label in ADDED),
        paper="Figure 12", height=360))

# %%
if several:
    display(figures.table(pd.DataFrame([
        {"from": f"{widths[i]:,}", "to": f"{widths[j]:,}"}
        | {ADDED[label]: f"{gain[label, i, j]:z.1%}"
           for label in ("NonlinearError", "LinearError", "x")} for i, j in pairs]),
        "Share of the residual variance that each norm removes, for every pair. "
        f"n = {basis}; 95% intervals.", "tab-token-gain"))

# %% [markdown]
# Is that little? It depends on how much there is to be had. For scale, the next cell adds *all*
# of $x$, every one of its dimensions, to the narrowest SAE's error norm.

# %%
def all_of_x(block: slice) -> torch.Tensor:
    """Every dimension of x, and the narrowest SAE's error norm: [token, d + 1]."""
    return torch.cat([result.acts.read(block), error[block, :1].float()], 1)


if several:
    scores = probe.held_out_r2(all_of_x, error[:, 1:], rows)
    removed_by_all = [float(probe.removed(pairs[0, j], score))
                      for j, score in enumerate(scores, 1)]
    more = mean_gain["LinearError"] - mean_gain["NonlinearError"]
    on_top = mean_gain["both"] - mean_gain["LinearError"]
    display(figures.table(pd.DataFrame({
        "what is added": [*(title.replace("<br>", " ") for title in ADDED.values()),
                          "LinearError rather than NonlinearError",
                          "NonlinearError on top of LinearError"],
        "residual variance removed": [f"{draws:z.1%}"
                                      for draws in (*mean_gain.values(), more, on_top)],
    }), "Means over the pairs, and two differences of them. All dimensions of $x$ together "
        f"remove {min(removed_by_all):.0%} to {max(removed_by_all):.0%}, from the "
        f"narrowest SAE to each wider one. n = {basis}; 95% intervals.",
        "tab-token-means"))
    helps_more = (more.low or 0) > 0
    same_sign = sum(slope["LinearError", i, j] * slope["NonlinearError", i, j] > 0
                    for i, j in pairs)

# %% tags=["hide-input"]
if several:
    signs = f"They have opposite signs for {len(pairs) - same_sign} of the {len(pairs)} pairs."
    if same_sign > len(pairs) / 2:
        signs = f"""They have the same sign for {same_sign} of the {len(pairs)} pairs. What both
        measure is how the two parts point: at a given length of their sum, two long parts must
        point against each other, and their inner product says it directly."""
    verdict = "The norm of LinearError does not clearly help more than that of NonlinearError."
    if helps_more:
        verdict = f"""**The norm of LinearError helps more** ({{numref}}`tab-token-means`). So what
        helps is not something that only the nonlinear part holds. One might think that either norm
        tells how an error divides into a part that a wider SAE removes and a part that it does not.
        Then the two would have coefficients of opposite sign. {signs}"""
    display(prose(verdict))

# %% [markdown]
# ## Agreement with the paper
#
# Both ranges are this book's own reading of the paper's words: *predictable* as more than half of
# the variance, for the worst pair; *helps* as removing more than nothing, on average over the
# pairs. The second range is easily met, so the size of the effect stands beside the verdict.

# %%
lowest = helped = (None, None, None)
n = int(rows.held.sum())
if several:
    head, *tail = pairs.values()
    lowest = head.map(lambda *scores: np.min(scores, axis=0), *tail)  # the worst pair
    helped = mean_gain["NonlinearError"]
predictable = run.claim(
    "The norm of a wide SAE's error on a token can be predicted from a narrow one's.",
    "R² of the wider SAE's error norm from the narrower one's, for the pair of the ladder "
    "that is predicted worst", lowest, (0.5, np.inf), n,
    paper="can be predicted (read here as: R² above .5)")
helps = run.claim(
    "The norm of the narrow SAE's NonlinearError helps to predict it (the paper's first "
    "version).",
    "share of the residual variance that it removes, mean over the pairs of the ladder",
    helped, (0.0, np.inf), n, paper="helps (read here as: above 0)")

# %%
figures.table(pd.DataFrame({
    "claim": ["A wide SAE's error norm follows from a narrow one's",
              "The norm of NonlinearError helps (first version)"],
    "measured": ["$R^2$, worst pair", "residual variance removed, mean of the pairs"],
    "value": [f"{lowest}", f"{helped:.1%}"] if several else ["–", "–"],
    "verdict": [f"**{predictable}**", f"**{helps}**"],
}), f"The claims of this chapter. n = {basis}.", "tab-token-claims")

# %% tags=["hide-input"]
if several and helps_more:
    control = """whatever NonlinearError adds, the control that the paper does not have, the norm of
    LinearError, adds more."""
    if helps == "agree":
        control = """the norm of NonlinearError does help, but little, and the control that the
        paper does not have, the norm of LinearError, helps more. The claim is true as stated and
        does not show that the nonlinear part is special."""
    display(prose(f"On the second claim: {control}"))

# %%
if several:
    for (i, j), score in pairs.items():
        run.add_draws(f"r2_error_norm from width {widths[i]}", score, sae=names[j])
    for j in wider:
        run.add_draws("r2_error_norm from the norm of x", from_x[j], sae=names[j])
    for label, mean in mean_gain.items():
        run.add_draws(f"residual variance removed by {label}, mean over pairs", mean)
    for part, ratio in zip(("error", "linear", "nonlinear"), ratios.values(), strict=True):
        run.add_draws(f"ratio of the norm of {part}, widest over narrowest", ratio)
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
