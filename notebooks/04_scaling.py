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
# An {term}`SAE` with more {term}`latents <latent>` leaves less of the activation unexplained. **If
# the {term}`width` grows without end, does the error go to zero? And which part of it goes?**
#
# {cite:t}`gao2024scaling` found that the error of SAEs follows a power law of the width *plus a
# constant*: a floor that width does not remove. {cite:t}`engels2024dark` start from that floor. At
# a fixed {term}`L0` they divide the {term}`FVU` of a {term}`ladder` of SAEs into bands (their
# Figure 1). One of them, cut from the nonlinear one by a better encoder, is in {doc}`11_pursuit`.
# Three are drawn here:
#
# - **absent features**, what falls with width: from the fitted curve down to its constant $c$;
# - **linear error**, as the paper calls it, from $c$ down to the mean
#   $\mathrm{FVU}_\mathrm{nonlinear}$;
# - **nonlinear error**, $\mathrm{FVU}_\mathrm{nonlinear}$ itself {eq}`eq-fvu`, which they find
#   roughly constant in width.
#
# Two things are called linear here, so this book keeps two names. The **linear part** of an SAE's
# error is $\mathrm{FVU} - \mathrm{FVU}_\mathrm{nonlinear}$, as in {doc}`03_vector`. The middle band
# is $c$ less the mean $\mathrm{FVU}_\mathrm{nonlinear}$: what would stay linear once a wide enough
# SAE lacked no feature any more. It is called the **absent-feature gap**.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs: release:sae_id, directory, artifact:NAME or train:WIDTHxL0, by commas

# %%
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter import survey
from darkmatter.book import figures, records, reference
from darkmatter.book.figures import number, prose
from darkmatter.experiments import scaling

run = records.start("04_scaling", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## The ladder
#
# The survey is the one of the chapters before. The ladder is made of those SAEs that share the most
# common L0, one for each width. Every number comes with its draws: the same number on each
# {term}`bootstrap <bootstrap interval>` draw of the held-out {term}`sources <source>`. A draw takes
# the same sources for all SAEs. Text that is hard for one SAE is hard for the others too, so that
# differences between SAEs are known better than the SAEs themselves.

# %%
result = survey.run(p)
table = result.table()
rungs = scaling.ladder(table)
names, widths = list(rungs["sae"]), rungs["width"].to_numpy(float)

fvu = [result.draws(name, "fvu") for name in names]
nonlinear = [result.draws(name, "fvu_nonlinear") for name in names]
linear = [whole - rest for whole, rest in zip(fvu, nonlinear, strict=True)]
basis = fvu[0].basis(result.unit)

# %%
METRICS = {"fvu": "FVU", "fvu_nonlinear": "FVU nonlinear",
           "r2_vector": "R² of the vector", "r2_norm": "R² of the squared norm"}
measured = {title: [f"{result.draws(name, metric)}" for name in table["sae"]]
            for metric, title in METRICS.items()}
on_a_rung = ["yes" if name in names else "no" for name in table["sae"]]
figures.table(
    pd.DataFrame({"width": table["width"], "L0": table["l0"], **measured,
                  "in the ladder": on_a_rung}),
    f"Every SAE of this run, on {basis}; brackets are 95% intervals.", "tab-scaling",
    digits={"L0": 1})

# %% tags=["hide-input"]
enough, at = len(widths) >= 3, f"{rungs['l0'].mean():.0f}"
count = f"{len(widths)} SAEs" if len(widths) > 1 else "one SAE"
too_few = "" if enough else """**A curve with three parameters takes at least three widths at one
L0. This run has fewer, so what needs a ladder is left out.**"""
prose(f"The ladder has {count}, at a mean L0 of {at}. {too_few}")

# %% [markdown]
# ## The power law
#
# The curve is
#
# $$\mathrm{FVU}(W) = c + a\,W^{-m}.$$ (eq-power)
#
# It has three parameters, and there are as many points as widths. The authors fit it to seven
# points by gradient descent from a random start. That is unstable: $a$ and $m$ can move together
# over orders of magnitude and hardly change the curve. Here the fit is least squares, with
# $c \ge 0$ and $a \ge 0$: for each $m$ the best $c$ and $a$ are a plain regression, so that only
# $m$ has to be searched.

# %%
figures.source(scaling.fit)

# %% [markdown]
# The intervals hold two things. One is other text: the curve is fitted again to every bootstrap
# draw. The other is other SAEs: real SAEs do not lie exactly on a curve, and each draw is moved by
# a scatter of the size that the residuals show. With few points the residuals tell little about
# that scatter, and the intervals become wide. With three points there are as a rule no residuals at
# all; then the interval says only what other text would do, and $c$ counts as *not determined*.

# %%
floor = sum(nonlinear) / len(nonlinear)  # mean FVU nonlinear: the lowest line
law = scaling.power_law(widths, fvu, p.seed) if enough else None
if law:
    gap = law.c - floor  # the absent-feature gap
    far = np.geomspace(widths[0], 10 * widths[-1], 60)  # as in the paper, ten times past
    curve = law.curve(far)
    figure_1 = pd.DataFrame([
        {"width": width, "fvu": whole.value, "low": whole.low, "high": whole.high,
         "nonlinear": rest.value}
        for width, whole, rest in zip(widths, fvu, nonlinear, strict=True)])

# %% tags=["hide-input"]
if law:
    fitted = pd.DataFrame({"width": far, "fit": [float(height) for height in curve]})
    fig = figures.bands(figure_1, fitted, float(law.c), float(floor))
    for edge in ([height.low for height in curve], [height.high for height in curve]):
        fig.add_scatter(x=far, y=edge, mode="lines", showlegend=False, hoverinfo="skip",
                        line={"width": 1, "dash": "dot", "color": figures.colour("green")})
    below = """The lines below it are $c$ and the mean of $\\mathrm{FVU}_\\mathrm{nonlinear}$; the
        band between them is the absent-feature gap."""
    if float(gap) <= 0:
        below = f"""The line below it is the mean of $\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$. The
            fitted constant, {law.c}, does not lie above it: this fit leaves no absent-feature gap,
            and neither a line for $c$ nor a band for the gap is drawn."""
    display(figures.finish(
        fig, "fig-scaling-bands", f"""The share of the variance of $x$ that SAEs leave unexplained,
        against their width, at L0 {at}. The upper curve is {{eq}}`eq-power`, drawn ten times past
        the widest SAE; dotted, its 95% interval. {below} Points: {basis}.""",
        f"Bands against width. FVU goes from {fvu[0].value:.3f} to {fvu[-1].value:.3f}; the fitted "
        f"constant is {law.c.value:.3f}, mean FVU nonlinear {floor.value:.3f}.", paper="Figure 1"))

# %%
if law:
    fall = 1 - law.m.map(lambda m: 2.0**-m)  # of what lies above the constant
    display(figures.table(pd.DataFrame({
        "": ["constant $c$", "factor $a$", "exponent $m$",
             "share of FVU − $c$ that a doubling of the width takes away",
             f"FVU at {far[-1]:,.0f} latents, if one believes the curve so far",
             "mean FVU nonlinear", "absent-feature gap, $c$ − mean FVU nonlinear"],
        "value and 95% interval": [
            f"{law.c}", f"{law.a:.3g}", f"{law.m}", f"{fall:.0%}", f"{curve[-1]}",
            f"{floor}", f"{gap}"],
    }), f"The power law with a constant, fitted to {len(widths)} SAEs, on {basis}.",
        "tab-scaling-law"))

# %% tags=["hide-input"]
constant = """determined by these points: its interval keeps away from zero and is narrower than
half the lowest FVU"""
if law and law.doubt:
    constant = f"**not determined**: {law.doubt}"
prose(f"The constant is {constant} ({{numref}}`tab-scaling-law`).") if law else None

# %% [markdown]
# A floor of SAEs that are trained and encode in this way need not be a floor of their dictionaries:
# {doc}`11_pursuit` keeps the dictionary, searches longer for the latents of each token, and
# measures how much of the error goes away.

# %% [markdown]
# ## When points are few
#
# How much does $c$ hang on single SAEs? Leave each width out in turn and fit again; then fit to
# every choice of three or more of the widths. Nothing else changes: the same SAEs, the same text.
# With three points that fall ever more slowly the curve as a rule passes through all of them.

# %%
heights = np.array([float(whole) for whole in fvu])
places = range(len(widths))
choices = [list(kept) for n in places[2:] for kept in combinations(places, n + 1)]
fits = pd.DataFrame([scaling.fit(widths[kept], heights[kept]) for kept in choices],
                    columns=["c", "a", "m"])
fits["widths"] = [len(kept) for kept in choices]
fits["left out"] = [[widths[i] for i in places if i not in kept] for kept in choices]
# No floor at all, or one below the nonlinear error: there Figure 1's bands make no sense.
fits["senseless"] = (fits["c"] <= 0.01 * heights[-1]) | (fits["c"] < float(floor))
without_one = fits[fits["widths"] == len(widths) - 1]
few = len(without_one) > 0

# %%
if few:
    by_number = fits.groupby("widths")
    ends = by_number[["c", "m"]].agg(["min", "max"])
    display(figures.table(pd.DataFrame({
        "widths in the fit": ends.index, "fits": by_number.size().to_numpy(),
        "lowest $c$": ends["c", "min"], "highest $c$": ends["c", "max"],
        "lowest $m$": ends["m", "min"], "highest $m$": ends["m", "max"],
        "no floor above the nonlinear error": [
            f"{share:.0%}" for share in by_number["senseless"].mean()],
    }), "The power law fitted to every choice of three or more widths: the range of its "
        "parameters, and the share of fits for which the bands of Figure 1 make no sense.",
        "tab-scaling-few"))
elif law:
    display(prose("""This ladder has three widths, as many as the curve has parameters. To
    leave one out would leave fewer, so there is nothing to compare."""))

# %% tags=["hide-input"]
if few:
    fig = go.Figure()
    for place, row in enumerate(without_one[::-1].to_dict("records")):
        shade = figures.colour(list(figures.COLOURS)[place % 6])
        fig.add_scatter(x=far, y=row["c"] + row["a"] * far ** -row["m"], mode="lines",
                        name=f"{row['left out'][0]:,.0f}",
                        line={"width": 1.5, "color": shade, "dash": ("dash", "dot")[place % 2]})
    fig.add_scatter(x=widths, y=heights, mode="markers", name="measured", showlegend=False,
                    marker={"size": 9, "color": figures.colour("grey")})
    fig.update_xaxes(title_text=figures.WIDTH, type="log", tickvals=widths,
                     ticktext=[f"{width:,.0f}" for width in widths])
    fig.update_yaxes(title_text="FVU").update_layout(legend_title_text="left out")
    display(figures.finish(
        fig, "fig-scaling-loo", "The power law with one width left out, drawn ten times past the "
        f"widest SAE. Points are measured ({basis}).", "Fitted curves with one width left out, "
        f"with constants from {ends['c', 'min'].iloc[-2]:.3f} to {ends['c', 'max'].iloc[-2]:.3f}."))

# %% [markdown]
# ## Is nonlinear error constant in width?
#
# The paper says that, at fixed sparsity, $\mathrm{FVU}_\mathrm{nonlinear}$ is *roughly constant*
# in width, and leaves open how much it may change. We use the slope: the change with each
# doubling of the width, by least squares, for FVU and for $\mathrm{FVU}_\mathrm{nonlinear}$.
# **The rule:** nonlinear error is roughly constant if its slope is at most a quarter of the slope
# of FVU, in either direction. The quarter is ours. The intervals of the slopes are over sources,
# for these SAEs as they are; that of the ratio is widened to hold what comes out when any one SAE
# is left out.

# %%
if enough:
    slopes = {"FVU": scaling.slope(widths, fvu),
              "FVU nonlinear": scaling.slope(widths, nonlinear),
              "linear part, FVU − FVU nonlinear": scaling.slope(widths, linear)}
    ratio = scaling.slope_ratio(widths, fvu, nonlinear)
    table_of_slopes = {name: f"{slope:.4f}" for name, slope in slopes.items()}
    table_of_slopes["slope of FVU nonlinear / slope of FVU"] = figures.interval(*ratio, 2)
    display(figures.table(
        pd.DataFrame(table_of_slopes.items(), columns=["", "each doubling"]),
        "Change with each doubling of the width, as shares of the variance of $x$; last, "
        f"the ratio that the rule is about ({basis}).", "tab-scaling-slopes"))

# %%
def direction(slope):
    """What an interval says about the sign of a slope."""
    if slope.low is None or slope.low <= 0 <= slope.high:
        return "shows no clear direction"
    return "rises" if slope.low > 0 else "falls"


ladder = pd.DataFrame([
    {"width": width, "what": what, **draws.row}
    for what, column in (("FVU", fvu), ("FVU<sub>nonlinear</sub>", nonlinear))
    for width, draws in zip(widths, column, strict=True)])

# %% tags=["hide-input"]
if enough:
    fig = figures.interval_points(ladder, "width", group="what", x_title=figures.WIDTH,
                                  y_title="share of variance").update_yaxes(rangemode="tozero")
    of_fvu, of_rest = (direction(slopes[name]) for name in ("FVU", "FVU nonlinear"))
    rests = ladder["value"].iloc[-len(widths):]
    display(figures.finish(
        fig, "fig-scaling-width", f"""Over the ladder FVU {of_fvu}, and
        $\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$ {of_rest}: its largest value is
        {rests.max() / rests.min() - 1:.0%} above its smallest. L0 {at}, 95% intervals over sources
        ({basis}).""",
        f"FVU from {fvu[0].value:.3f} to {fvu[-1].value:.3f}; FVU nonlinear from "
        f"{nonlinear[0].value:.3f} to {nonlinear[-1].value:.3f}."))

# %% [markdown]
# ## Over width and L0
#
# The paper's Figures 2 and 3 are contours over width and L0, on 60 SAEs. With few SAEs contours
# would be mostly interpolation, so the points themselves are shown, each with its value.

# %% tags=["hide-input"]
GRIDS = {"r2_norm": ("Figure 2", "eq-norm"), "r2_vector": ("Figure 2", "eq-r2"),
         "fvu_nonlinear": ("Figure 3", "eq-fvu")}
settings = table.assign(l0=table["k"].astype(float).fillna(table["l0"].round()))  # 7.998 is 8
edges = np.log10([settings["l0"].min() / 1.3, settings["l0"].max() * 1.3])
for metric, (paper, equation) in GRIDS.items() if len(table) > 1 else ():
    fig = figures.grid_points(settings, metric, value_title=METRICS[metric],
                              digits=3 if metric == "fvu_nonlinear" else 2)
    display(figures.finish(
        fig.update_yaxes(range=edges), f"fig-scaling-grid-{metric.replace('_', '-')}",
        f"{METRICS[metric]} {{eq}}`{equation}` over width and L0, for {len(table)} SAEs. Intervals "
        f"are in {{numref}}`tab-scaling` ({basis}).", f"{METRICS[metric]} by width and L0, between "
        f"{number(table[metric].min())} and {number(table[metric].max())}.", paper=paper))

# %%
most = table.groupby("width")["l0"].nunique().idxmax()  # the width with most values of L0
column = table[table["width"] == most].sort_values("l0")
if len(column) > 1:
    sparse, dense = column.iloc[0], column.iloc[-1]
    first, last = ({metric: result.draws(one["sae"], metric) for metric in METRICS}
                   for one in (sparse, dense))
    display(figures.table(pd.DataFrame({
        "": list(METRICS.values()),
        f"at L0 {sparse['l0']:.0f}": [f"{first[metric]}" for metric in METRICS],
        f"at L0 {dense['l0']:.0f}": [f"{last[metric]}" for metric in METRICS],
        "change": [f"{last[metric] - first[metric]}" for metric in METRICS],
    }), f"What more active latents change at width {most:,}: the sparsest SAE, the "
        f"densest, and the difference, draw by draw over the same sources ({basis}).",
        "tab-scaling-l0"))
else:
    display(prose("No width of this run has SAEs at more than one L0."))

# %% [markdown]
# ## Agreement with the paper
#
# We know of no published values of the paper's $c$, $a$ and $m$, nor of its mean
# $\mathrm{FVU}_\mathrm{nonlinear}$, so no number is set against a number here. Two statements can
# be tested. **The rule:** *agree* if our whole interval lies in the range of the statement,
# *differ* if the whole interval lies outside, else *cannot say*; where $c$ is not determined, and
# in the `smoke` preset, which is made to be quick, always *cannot say*.

# %%
if law:
    flat = run.claim(
        "nonlinear error is roughly constant in width at fixed sparsity",
        "slope of FVU nonlinear / slope of FVU", ratio, (-0.25, 0.25), fvu[0].n,
        paper="roughly constant (read here as: at most a quarter of the slope of FVU)")
    above = run.claim(
        "width does not remove all error: it ends at a constant above the nonlinear error",
        "$c$ − mean FVU nonlinear", gap, None if law.doubt else (0, np.inf),
        paper="shown as a figure (read here as: above 0)")
    display(figures.table(pd.DataFrame({
        "the paper": [claim["text"] for claim in run.claims],
        "measured": [claim["measured"] for claim in run.claims],
        "here": [figures.interval(*ratio), f"{gap}"],
        "agrees if within": ["−0.25 to 0.25", "above 0"], "verdict": [flat, above],
    }), f"Statements of the paper about scaling, and this run ({basis}).",
        "tab-scaling-agreement"))

# %% tags=["hide-input"]
if law:
    caution = """The constant is an extrapolation: its interval holds if the power law does, which
    no number of points inside the ladder can show."""
    if law.doubt:
        caution = f"The constant is an extrapolation, and here it is not determined: {law.doubt}."
else:
    caution = "With fewer than three widths at one L0, neither of the statements can be tested."
prose(f"""
What should be kept in mind: the widths here go from {widths[0]:,.0f} to {widths[-1]:,.0f}; the
paper's go from 16 thousand to a million, at a layer with 3,584 dimensions against
{result.acts.x.shape[1]:,} here. {caution}
""")

# %%
run.add_rows(result.rows[result.rows["metric"].isin(["l0", *METRICS])])
run.add_draws("mean_fvu_nonlinear", floor)
if law:
    for name, draws in {
            "power_law_c": law.c, "power_law_a": law.a, "power_law_m": law.m,
            "power_law_c_minus_mean_fvu_nonlinear": gap, "slope_fvu": slopes["FVU"],
            "slope_fvu_nonlinear": slopes["FVU nonlinear"]}.items():
        run.add_draws(name, draws)
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
