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
# # Scaling: what a wider SAE buys
#
# An {term}`SAE` with more {term}`latents <latent>` leaves less of the activation unexplained. **If the {term}`width` grows
# without end, does the error go to zero? And which part of it goes?**
#
# {cite:t}`gao2024scaling` found that the error of SAEs follows a power law of the width *plus a constant*: a floor that
# width does not remove. {cite:t}`engels2024dark` start from that floor. At a fixed {term}`L0` they divide the {term}`FVU`
# of a {term}`ladder` of SAEs into three bands (their Figure 1):
#
# - **absent features**, what falls with width: from the fitted curve down to its constant $c$;
# - **linear error**, from $c$ down to the mean $\mathrm{FVU}_\mathrm{nonlinear}$;
# - **nonlinear error**, $\mathrm{FVU}_\mathrm{nonlinear}$ itself {eq}`eq-fvu`, which they find roughly constant in width.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs than the preset's, with commas between: release:sae_id, directory, artifact:NAME or train:WIDTHxL0

# %% tags=["hide-input"]
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter import figures, records, reference, scaling, survey
from darkmatter.figures import interval, number, prose

run = records.start("04_scaling", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## The ladder
#
# The survey is the one of the chapters before. The ladder is made of those SAEs that share the most common L0, one for
# each width. `draws` holds what is behind the intervals: the FVU of every SAE of the ladder on each
# {term}`bootstrap <bootstrap interval>` draw of the held-out {term}`sources <source>`. A draw takes the same sources for
# all SAEs. Text that is hard for one SAE is hard for the others too, so that differences between SAEs are known better
# than the SAEs themselves.

# %%
result = survey.run(p)
table = result.table()
rungs = scaling.ladder(table)
draws = scaling.draws(p, result, list(rungs["sae"]))

widths = rungs["width"].to_numpy(float)
enough = len(widths) >= 3
assert np.allclose(draws.fvu[0], rungs["fvu"].astype(float), rtol=1e-3), "the draws should be those of the survey"

# %% tags=["hide-input"]
def ends(metric: str) -> list[str]:
    """Value and interval of a metric, one string an SAE."""
    return [interval(*row) for row in table[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy()]


scored = result.rows.query("metric == 'fvu'").iloc[0]
n_eval, at = int(scored["n_eval"]), f"{rungs['l0'].mean():.0f}"
basis = f"{n_eval:,} held-out tokens of {scored['sources']} {result.unit}"
figures.table(
    pd.DataFrame({
        "width": table["width"], "L0": table["l0"], "FVU": ends("fvu"), "FVU nonlinear": ends("fvu_nonlinear"),
        "R² of the vector": ends("r2_vector"), "R² of the squared norm": ends("r2_norm"),
        "in the ladder": ["yes" if each in set(rungs["sae"]) else "no" for each in table["sae"]],
    }),
    f"Every SAE of this run, on {basis}; brackets are 95% intervals.", "tab-scaling", digits={"L0": 1})

# %% tags=["hide-input"]
listed = ", ".join(f"{width:,.0f}" for width in widths)
prose(f"""
The ladder has {len(widths)} SAE{'s' if len(widths) > 1 else ''}, of width {listed}, at a mean L0 of {at}.
{'' if enough else '**A curve with three parameters takes at least three widths at one L0. This run has fewer, so the '
'figures over width are left out; the rest of the chapter goes on without them.**'}
""")

# %% [markdown]
# ## The power law
#
# The curve is
#
# $$\mathrm{FVU}(W) = c + a\,W^{-m}.$$ (eq-power)
#
# It has three parameters, and there are as many points as widths. The authors fit it to seven points by gradient
# descent from a random start. That is unstable: $a$ and $m$ can move together over orders of magnitude and hardly change
# the curve. Here the fit is least squares, with $c \ge 0$ and $a \ge 0$: for each $m$ the best $c$ and $a$ are a plain
# regression, so that only $m$ has to be searched.
#
# The intervals hold two things. One is other text: the curve is fitted again to every bootstrap draw. The other is other
# SAEs: real SAEs do not lie exactly on a curve, and each draw is moved by a scatter of the size that the residuals show.
# With few points the residuals tell little about that scatter, and the intervals become wide. With three points there
# are no residuals at all; then the interval says only what other text would do, and $c$ counts as *not determined*.

# %%
law = scaling.power_law(widths, draws, p.seed) if enough else None
floor = draws.fvu_nonlinear.mean(1)  # the horizontal line of Figure 1, on each draw
mean_nonlinear = scaling.estimate(floor, draws.effective)
if law:
    c, a, m = (scaling.estimate(each, draws.effective) for each in (law.c, law.a, law.m))
    gap = scaling.estimate(law.c - floor, draws.effective)  # the band of linear error
    far = np.geomspace(widths[0], 10 * widths[-1], 60)  # as in the paper, ten times past the last SAE
    curve = law.curve(far)
    curve_ends = np.array([scaling.estimate(column, draws.effective)[1:] for column in curve.T], float)

# %% tags=["hide-input"]
if law:
    points = pd.DataFrame({"width": widths, "fvu": draws.fvu[0], "low": rungs["fvu_low"].to_numpy(float),
                           "high": rungs["fvu_high"].to_numpy(float), "nonlinear": draws.fvu_nonlinear[0]})
    fig = figures.bands(points, pd.DataFrame({"width": far, "fit": curve[0]}), c[0], mean_nonlinear[0])
    for edge in curve_ends.T:
        fig.add_scatter(x=far, y=edge, mode="lines", line={"width": 1, "dash": "dot", "color": figures.colour("green")},
                        showlegend=False, hoverinfo="skip")
    order = "" if c[0] > mean_nonlinear[0] else """The fitted constant is not above that mean: this fit leaves no
        band of linear error, and the two lines are drawn as one. """
    display(figures.finish(
        fig, "fig-scaling-bands",
        f"The share of the variance of $x$ that SAEs leave unexplained, against their width, at L0 {at}. The upper curve is "
        f"{{eq}}`eq-power`, drawn ten times past the widest SAE; dotted, its 95% interval. The lines below it are "
        f"$c$ = {interval(*c)} and the mean of $\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$, {interval(*mean_nonlinear)}. {order}"
        f"{'The border between absent features and linear error is not determined: ' + law.doubt + '. ' if law.doubt else ''}"
        f"Points: {basis}.",
        f"Bands against width: absent features above {number(c[0])}, linear error down to {number(mean_nonlinear[0])}, "
        f"nonlinear error below. FVU goes from {number(draws.fvu[0, 0])} to {number(draws.fvu[0, -1])}.",
        paper="Figure 1"))

# %% tags=["hide-input"]
def short(value: float, low: float | None, high: float | None) -> str:
    """Three significant digits: a spans orders of magnitude."""
    return f"{value:.3g}" + ("" if low is None or high is None else f" [{low:.3g}, {high:.3g}]")


if law:
    display(figures.table(pd.DataFrame({
        "": ["constant $c$", "factor $a$", "exponent $m$", "mean FVU nonlinear", "linear error, $c$ − mean FVU nonlinear"],
        "value and 95% interval": [interval(*c), short(*a), interval(*m), interval(*mean_nonlinear), interval(*gap)],
    }), f"The power law with a constant, fitted to {len(widths)} SAEs, on {basis}.", "tab-scaling-law"))
    display(prose(f"""
    In words ({{numref}}`fig-scaling-bands`, {{numref}}`tab-scaling-law`): each doubling of the width takes away
    {1 - 2 ** -m[0]:.0%} of what lies above the constant. The constant itself is
    {'**not determined**: ' + law.doubt if law.doubt else 'determined by these points: its interval keeps away from zero and '
     'is narrower than half the lowest FVU'}.
    The widest SAE leaves {number(draws.fvu[0, -1])} unexplained; the fit, if one believes it ten times past the data, says
    {interval(curve[0, -1], *curve_ends[-1])} for an SAE of {far[-1]:,.0f} latents.
    """))

# %% [markdown]
# ## When points are few
#
# How much does $c$ hang on single SAEs? Leave each width out in turn and fit again; then fit to every choice of three or
# more of the widths. Nothing else changes: the same SAEs, the same text. With three points the curve passes through
# all of them, whatever they are.

# %%
fits = pd.DataFrame([
    {"points": n, "left out": [i for i in range(len(widths)) if i not in kept]}
    | dict(zip("cam", scaling.fit(widths[list(kept)], draws.fvu[0, list(kept)]), strict=True))
    for n in range(3, len(widths) + 1) for kept in combinations(range(len(widths)), n)
], columns=["points", "left out", "c", "a", "m"])
without_one = fits[fits["points"] == len(widths) - 1]
few = len(without_one) > 0

# %% tags=["hide-input"]
if law and few:
    fig = go.Figure()
    for place, row in enumerate(without_one[::-1].itertuples()):
        name = list(figures.COLOURS)[place % 6]
        fig.add_scatter(x=far, y=row.c + row.a * far ** -row.m, mode="lines", name=f"{widths[row[2][0]]:,.0f}",
                        line={"width": 1.5, "color": figures.colour(name), "dash": ("dash", "dot")[place % 2]})
    fig.add_scatter(x=widths, y=draws.fvu[0], mode="markers", name="measured", showlegend=False,
                    marker={"size": 9, "color": figures.colour("grey")})
    fig.update_xaxes(title_text=figures.WIDTH, type="log", tickvals=widths, ticktext=[f"{w:,.0f}" for w in widths])
    fig.update_yaxes(title_text="FVU").update_layout(legend_title_text="left out")
    display(figures.finish(
        fig, "fig-scaling-loo", "The power law with one width left out, drawn ten times past the widest SAE. Points are "
        f"measured ({basis}).", "Fitted curves with one width left out; their constants go from "
        f"{number(without_one['c'].min())} to {number(without_one['c'].max())}."))

# %% tags=["hide-input"]
if law and few:
    fig = go.Figure(go.Scatter(x=fits["points"], y=fits["c"], mode="markers", showlegend=False,
                               marker={"size": 11, "color": figures.colour("blue", 0.5)}, customdata=fits["m"],
                               hovertemplate="c %{y:.3f}, m %{customdata:.2f}"))
    for y, label in ((float(draws.fvu[0].min()), "lowest FVU measured"), (mean_nonlinear[0], "mean FVU<sub>nonlinear</sub>")):
        fig.add_hline(y=y, line={"width": 1, "dash": "dot", "color": figures.colour("grey")}, annotation_text=label)
    fig.update_xaxes(title_text="widths in the fit", dtick=1).update_yaxes(title_text="constant c", rangemode="tozero")
    display(figures.finish(
        fig, "fig-scaling-few", f"The constant $c$ from every choice of three or more of the {len(widths)} widths "
        f"({len(fits)} fits).", "Constants by number of widths in the fit: " + "; ".join(
            f"{n} widths, {number(each.min())} to {number(each.max())}" for n, each in fits.groupby("points")["c"])))

# %% tags=["hide-input"]
if law and few:
    three = fits[fits["points"] == 3]["c"]
    outside = float(((three <= 0.01 * draws.fvu[0, -1]) | (three < mean_nonlinear[0])).mean())
    display(prose(f"""
    With one width left out $c$ goes from {number(without_one['c'].min())} to {number(without_one['c'].max())}, and $m$ from
    {number(without_one['m'].min(), 2)} to {number(without_one['m'].max(), 2)} ({{numref}}`fig-scaling-loo`). With three widths
    $c$ goes from {number(three.min())} to {number(three.max())} ({{numref}}`fig-scaling-few`); {outside:.0%} of these
    {len(three)} fits have no floor at all, or one below the nonlinear error, where the bands of Figure 1 make no sense.
    """))
elif law:
    display(prose("""
    This ladder has three widths, as many as the curve has parameters. To leave one out would leave fewer points than
    parameters, so there is nothing to compare.
    """))

# %% [markdown]
# ## Is nonlinear error constant in width?
#
# The paper says that, at fixed sparsity, $\mathrm{FVU}_\mathrm{nonlinear}$ is *roughly constant* in width. It gives no
# measure of roughly. We use the slope: the change with each doubling of the width, by least squares, for FVU and for
# $\mathrm{FVU}_\mathrm{nonlinear}$. **The rule:** nonlinear error is roughly constant if its slope is at most a quarter of
# the slope of FVU, in either direction. The quarter is ours. The intervals of the slopes are over sources, for these SAEs
# as they are; that of the ratio is widened to hold what comes out when any one SAE is left out.

# %%
if enough:
    parts = {"FVU": draws.fvu, "FVU nonlinear": draws.fvu_nonlinear, "linear, FVU − FVU nonlinear": draws.fvu - draws.fvu_nonlinear}
    slope = {name: scaling.estimate(scaling.slopes(widths, each), draws.effective) for name, each in parts.items()}
    ratio = scaling.slope_ratio(widths, draws)

# %% tags=["hide-input"]
if enough:
    metrics = {"fvu": "FVU", "fvu_nonlinear": "FVU<sub>nonlinear</sub>"}
    points = result.rows[result.rows["metric"].isin(metrics) & result.rows["sae"].isin(rungs["sae"])]
    fig = figures.interval_points(points.assign(what=points["metric"].map(metrics)), "width", group="what",
                                  x_title=figures.WIDTH, y_title="share of variance").update_yaxes(rangemode="tozero")
    display(figures.finish(
        fig, "fig-scaling-width", f"FVU and $\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$ against width at L0 {at}, with 95% "
        f"intervals over sources ({basis}).",
        "; ".join(f"{name} from {number(each[0, 0])} to {number(each[0, -1])}" for name, each in
                  (("FVU", draws.fvu), ("FVU nonlinear", draws.fvu_nonlinear)))))
    display(figures.table(pd.DataFrame({
        "": list(slope), "change with each doubling": [interval(*each, 4) for each in slope.values()],
    }), f"Slopes over the ladder, as shares of the variance of $x$ ({basis}).", "tab-scaling-slopes"))

# %% tags=["hide-input"]
def direction(value: float, low: float | None, high: float | None) -> str:
    """What an interval says about the sign of a slope."""
    if low is None or high is None or low <= 0 <= high:
        return "shows no clear direction"
    return "rises" if value > 0 else "falls"


if enough:
    change = draws.fvu_nonlinear[0].max() / draws.fvu_nonlinear[0].min() - 1
    display(prose(f"""
    Over the ladder FVU {direction(*slope['FVU'])} and $\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$
    {direction(*slope['FVU nonlinear'])} ({{numref}}`fig-scaling-width`). The slope of the second is {interval(*ratio, 2)} times the slope of the first
    (in the brackets, also with any one SAE left out). Its largest value is {change:.0%} above its smallest.
    """))

# %% [markdown]
# ## Over width and L0
#
# The paper's Figures 2 and 3 are contours over width and L0, on 60 SAEs. With few SAEs contours would be mostly
# interpolation, so the points themselves are shown, each with its value.

# %% tags=["hide-input"]
grids = (
    ("r2_norm", "norm", "R² of the squared norm", "$R^2$ of predicting the squared norm of the error from $x$ {eq}`eq-norm`",
     "Figure 2"),
    ("r2_vector", "vector", "R² of the vector", "$R^2$ of predicting the error vector from $x$, mean over dimensions {eq}`eq-r2`",
     "Figure 2"),
    ("fvu_nonlinear", "nonlinear", "FVU<sub>nonlinear</sub>", "$\\mathrm{FVU}_\\mathrm{nonlinear}$ {eq}`eq-fvu`", "Figure 3"),
)
settings = table.assign(l0=table["k"].astype(float).fillna(table["l0"].round()))  # 7.998 and 8.002 are both 8
edges = np.log10([settings["l0"].min() / 1.3, settings["l0"].max() * 1.3])
for metric, name, title, words, paper in grids if len(table) > 1 else ():
    plain = title.replace("<sub>", " ").replace("</sub>", "")
    fig = figures.grid_points(settings, metric, value_title=title, digits=3 if metric == "fvu_nonlinear" else 2)
    display(figures.finish(
        fig.update_yaxes(range=edges), f"fig-scaling-grid-{name}",
        f"{words}, over width and L0, for {len(table)} SAEs. Intervals are in {{numref}}`tab-scaling` ({basis}).",
        f"{plain} between {number(table[metric].min())} and {number(table[metric].max())}, by width and L0.", paper=paper))

# %% tags=["hide-input"]
def compared(first: pd.Series, last: pd.Series, metric: str) -> str:
    """What the intervals of two SAEs say."""
    if first[f"{metric}_low"] <= last[f"{metric}_high"] and last[f"{metric}_low"] <= first[f"{metric}_high"]:
        return "the intervals overlap"
    return "lower" if last[metric] < first[metric] else "higher"


most = table.groupby("width")["l0"].nunique().idxmax()
column = table[table["width"] == most].sort_values("l0")
names = {"fvu": "FVU", "fvu_nonlinear": "$\\mathrm{FVU}_\\mathrm{nonlinear}$", "r2_vector": "$R^2$ of the vector",
         "r2_norm": "$R^2$ of the squared norm"}
if len(column) > 1:
    first, last = column.iloc[0], column.iloc[-1]
    told = "; ".join(f"{label} {number(first[metric])} and {number(last[metric])} ({compared(first, last, metric)})"
                     for metric, label in names.items())
    display(prose(f"At width {most:,}, from L0 {first['l0']:.0f} to L0 {last['l0']:.0f}: {told}."))
else:
    display(prose("No width of this run has SAEs at more than one L0, so nothing can be said about L0."))

# %% [markdown]
# ## Agreement with the paper
#
# We know of no published values of the paper's $c$, $a$ and $m$, nor of its mean $\mathrm{FVU}_\mathrm{nonlinear}$, so no
# number is set against a number here. Two statements can be tested. **The rule:** *agree* if our whole interval lies in the
# range of the statement, *differ* if the whole interval lies outside, else *cannot say*; where $c$ is not determined, and
# in the `smoke` preset, which is made to be quick, always *cannot say*.

# %%
if law:
    statements = {
        "nonlinear error is roughly constant in width at fixed sparsity":
            ("slope of FVU nonlinear / slope of FVU", ratio, (-0.25, 0.25), "−0.25 to 0.25"),
        "width does not remove all error: it ends at a constant above the nonlinear error":
            ("$c$ − mean FVU nonlinear", gap, None if law.doubt else (0, np.inf), "above 0"),
    }
    verdicts = [run.claim(claim, measured, value, agrees, n_eval)
                for claim, (measured, value, agrees, _) in statements.items()]

# %% tags=["hide-input"]
if law:
    display(figures.table(pd.DataFrame({
        "the paper": list(statements), "measured": [each[0] for each in statements.values()],
        "here": [interval(*each[1]) for each in statements.values()],
        "agrees if within": [each[3] for each in statements.values()], "verdict": verdicts,
    }), f"Statements of the paper about scaling, and this run ({basis}).", "tab-scaling-agreement"))
    display(prose(f"""
    What should be kept in mind: the widths here go from {widths[0]:,.0f} to {widths[-1]:,.0f}, a factor of
    {widths[-1] / widths[0]:,.0f}; the paper's go from 16 thousand to a million, a factor of about 60, at a layer with 3,584
    dimensions against {result.acts.x.shape[1]:,} here. {'The constant is an extrapolation, and here it is not determined: ' + law.doubt + '.' if law.doubt
    else 'The constant is an extrapolation: its interval holds if the power law does, which no number of points inside the '
    'ladder can show.'}
    """))
else:
    display(prose("With fewer than three widths at one L0, neither of the paper's statements about width can be tested."))

# %% tags=["hide-cell"]
run.add_rows(result.rows[result.rows["metric"].isin(["l0", "fvu", "fvu_nonlinear", "r2_vector", "r2_norm"])])
run.add("mean_fvu_nonlinear", *mean_nonlinear, n_eval, "tokens")
if law:
    for name, each in {"power_law_c": c, "power_law_a": a, "power_law_m": m, "power_law_c_minus_mean_fvu_nonlinear": gap,
                       "slope_fvu": slope["FVU"], "slope_fvu_nonlinear": slope["FVU nonlinear"]}.items():
        run.add(name, *each, n_eval, "tokens")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
