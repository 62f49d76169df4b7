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
# # Would longer training change it?
#
# The paper takes published {term}`SAEs <SAE>` as they are. Those of this book were trained on a few million tokens, far fewer. An SAE
# that stops early leaves an error that more training would have removed, and that part of the error may look linear. So the numbers of
# the chapters before could be numbers about too little training. **Do the shares of linear and nonlinear error still move at the end of
# training, and which way?**
#
# The paper makes no claim here. It finds that {term}`NonlinearError` hardly shrinks as SAEs get wider; this chapter asks whether it shrinks
# as they are trained longer.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs than the preset's, with commas between: artifact:NAME of this book, or train:WIDTHxL0

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import display

from darkmatter import convergence, figures, records, reference
from darkmatter.figures import interval, number, prose

run = records.start("15_training", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## The same SAEs, earlier
#
# Training writes checkpoints. Each of those after an eighth, a quarter and half of the training tokens is an SAE of its own, and goes
# through the same {term}`survey` as the finished one: the same activations, the same {term}`sources <source>` fitted on and held out. The
# comparison is not quite fair to the early ones. The learning rate is lowered over the last fifth of the training, which gives the
# finished SAE an advantage that a longer run at the full rate would not have had.

# %%
rows = convergence.recorded(p)
metrics = {"fvu": "FVU", "fvu_nonlinear": "FVU<sub>nonlinear</sub>", "r2_vector": "R² of the error vector",
           "r2_norm": "R² of the squared error norm"}


# %% tags=["hide-input"]
def with_intervals(df: pd.DataFrame) -> pd.DataFrame:
    """A table's rows with every metric and its interval in words, under the metric's label."""
    return df.assign(**{label: [interval(*row) for row in df[[name, f"{name}_low", f"{name}_high"]].to_numpy()]
                        for name, label in metrics.items()})


if len(rows):
    k = int(rows.groupby("k").width.nunique().idxmax())  # the L0 that most widths have
    n = int(rows.fvu_n.iloc[0])
    ladder = rows[rows.k == k].sort_values(["width", "share"])
    table = with_intervals(ladder)
    display(figures.table(
        table[["width", "tokens", *metrics.values()]].rename(columns={"tokens": "training tokens"}),
        f"SAEs of L0 {k} after an eighth, a quarter, half and all of their training: value and 95% interval over held-out sources. "
        f"n = {n:,} held-out tokens.", "tab-training"))
else:
    display(prose(f"There is no record of how the SAEs of `{p.name}` changed in training (`artifacts/convergence.json`)."))


# %% tags=["hide-input"]
def against_tokens(name: str) -> pd.DataFrame:
    """One metric as value, low and high, for the SAEs of one L0."""
    return pd.DataFrame({"training tokens": ladder.tokens, "width": [f"width {w:,}" for w in ladder.width], "value": ladder[name],
                         "low": ladder[f"{name}_low"], "high": ladder[f"{name}_high"]})


if len(rows):
    display(figures.finish(
        figures.interval_points(against_tokens("fvu_nonlinear"), "training tokens", x_title="training tokens",
                                y_title="FVU<sub>nonlinear</sub>", group="width"),
        "fig-training-nonlinear", f"FVU$_\\mathrm{{nonlinear}}$ against training tokens, L0 {k}. Bars: 95% intervals over held-out sources, "
        f"n = {n:,} tokens.", "Lines of the nonlinear share of variance, one for each width, over training tokens."))

# %% tags=["hide-input"]
if len(rows):
    display(figures.finish(
        figures.interval_points(against_tokens("r2_vector"), "training tokens", x_title="training tokens",
                                y_title="R² of the error vector", group="width"),
        "fig-training-vector", f"$R^2$ of the error vector from $x$, against training tokens, L0 {k}. n = {n:,} held-out tokens.",
        "Lines of the R² of the error vector, one for each width, over training tokens."))


# %% [markdown]
# ## What moves, and what does not

# %%
def change(name: str, since: float) -> pd.Series:
    """How much a metric changed from a share of the training to its end, by SAE, as a share of what it was."""
    wide = rows.pivot(index="sae", columns="share", values=name)
    return wide[1.0] / wide[since] - 1


# %% tags=["hide-input"]
def words(name: str, since: float) -> str:
    found = change(name, since)
    return f"{number(100 * found.min(), 1)}% to {number(100 * found.max(), 1)}%"


if len(rows):
    moved = {name: change(name, 0.5) for name in metrics}
    falls = [label for name, label in metrics.items() if (moved[name] < 0).all()]
    rises = [label for name, label in metrics.items() if (moved[name] > 0).all()]
    smallest = min(metrics, key=lambda name: moved[name].abs().max())
    spread = {share: rows[(rows.k == k) & (rows.share == share)].fvu_nonlinear for share in (0.125, 1.0)}
    said = "; ".join([f"{' and '.join(falls) or 'no metric'} fall{'' if len(falls) > 1 else 's'} for every SAE",
                      *([f"{' and '.join(rises)} rise{'' if len(rises) > 1 else 's'} for every SAE"] if rises else [])])
    display(figures.table(pd.DataFrame({
        "metric": list(metrics.values()), "from an eighth to all": [words(name, 0.125) for name in metrics],
        "from half to all": [words(name, 0.5) for name in metrics]}),
        f"Change of each metric in training, as a share of its value before: smallest to largest over {len(moved['fvu'])} SAEs.",
        "tab-training-change"))
    display(prose(f"""
    Over the second half of the training {said}. What moves least is {metrics[smallest]}, by at most
    {number(100 * moved[smallest].abs().max(), 1)}% of its value.

    Is the flatness of FVU<sub>nonlinear</sub> over widths a matter of training? Over the widths of L0 {k} the largest value is
    {number(spread[0.125].max() / spread[0.125].min(), 2)} times the smallest after an eighth of the training, and
    {number(spread[1.0].max() / spread[1.0].min(), 2)} times at its end.
    These are ratios of point values; the intervals in {{numref}}`tab-training` say how far each can be trusted.
    {'A longer training would lower FVU further' if (moved['fvu'] < -0.01).any() else 'FVU has settled to within 1%'}; the chapters before should be read with
    the changes of the last column in mind.
    """))

# %% [markdown]
# ## More text, for longer
#
# The end of a training is not convergence: by then the learning rate is zero, and FVU stands still whether or not it would have fallen
# further. The better question is what the same recipe gives with more text. The book has two suites of the default's sizes. One saw its
# tokens twice; the other saw four times as many different tokens, each once, from more kinds of documents. So the two differ by more than
# the number of tokens. Both went through the same survey of the same held-out sources.

# %%
finished = convergence.suites(rows)

# %% tags=["hide-input"]
if len(finished):
    first = finished[finished.seed == 0].sort_values(["k", "width", "tokens"])
    table = with_intervals(first)
    display(figures.table(
        table[["width", "k", "tokens", "distinct", *metrics.values()]].rename(
            columns={"k": "L0", "tokens": "training tokens", "distinct": "different tokens"}),
        f"Finished SAEs of the same size, by how much they were trained on: value and 95% interval over held-out sources. "
        f"Tokens are those asked for. n = {n:,} held-out tokens.", "tab-training-longer"))
else:
    display(prose("No second suite of this model, site and sizes is on record."))

# %% tags=["hide-input"]
if len(finished):
    least, most = (first[first.tokens == tokens].set_index(["width", "k"]) for tokens in (first.tokens.min(), first.tokens.max()))
    by = {name: (most[name] / least[name] - 1).dropna() for name in metrics}
    one_l0 = {suite: side.xs(k, level="k").fvu_nonlinear for suite, side in (("less", least), ("more", most))}
    seeds = finished[(finished.seed > 0) | finished.set_index(["preset", "width", "k"]).index.isin(
        finished[finished.seed > 0].set_index(["preset", "width", "k"]).index)]
    spread = [f"{len(some)} seeds at width {width:,} and L0 {l0}: " + ", ".join(
        f"{metrics[name]} {number(some[name].min(), 4)} to {number(some[name].max(), 4)}" for name in ("fvu", "fvu_nonlinear", "r2_vector"))
        for (width, l0), some in seeds.groupby(["width", "k"])]
    said = "; ".join(f"{metrics[name]} by {number(100 * each.min(), 1)}% to {number(100 * each.max(), 1)}%" for name, each in by.items())
    display(prose(f"""
    With {number(first.tokens.max() / first.tokens.min(), 2)} times the tokens the metrics change over
    {len(by['fvu'])} sizes: {said}. These are changes of point values; {{numref}}`tab-training-longer` has the intervals. {f'For scale, {"; ".join(spread)}.' if spread else ''}

    Along the widths of L0 {k} the largest FVU<sub>nonlinear</sub> is {number(one_l0['less'].max() / one_l0['less'].min(), 2)} times the
    smallest with less training and {number(one_l0['more'].max() / one_l0['more'].min(), 2)} times with more.
    """))

# %% [markdown]
# ## Every width with other L0s
#
# The paper's Figures 2 and 3 lie on a grid of widths and L0s. It finds that, at a given L0, FVU$_\mathrm{nonlinear}$ hardly changes with
# the width. The default suite can test that at one L0 only: training each size takes minutes to an hour, and shipping it takes room. The larger
# suite was trained at more of them; their numbers are on record, and one command trains them again
# (`python -m darkmatter train --preset suite-8m`). **Does FVU$_\mathrm{nonlinear}$ stay flat over widths at every L0?**

# %%
training = convergence.widest(rows)
grid = training[training.share == 1] if len(training) else training


# %% tags=["hide-input"]
def over_widths(name: str) -> pd.DataFrame:
    """One metric as value, low and high, for the grid's SAEs of the L0s that several widths have."""
    several = grid[grid.groupby("k").width.transform("nunique") > 1].sort_values(["k", "width"])
    return pd.DataFrame({"width": several.width, "L0": [f"L0 {k}" for k in several.k], "value": several[name],
                         "low": several[f"{name}_low"], "high": several[f"{name}_high"]})


if len(grid):
    table = with_intervals(grid.sort_values(["k", "width"]))
    display(figures.table(
        table[["k", "width", *metrics.values()]].rename(columns={"k": "L0"}),
        f"The SAEs of `{grid.preset.iloc[0]}`, {int(grid.tokens.iloc[0]):,} training tokens each: value and 95% interval over held-out "
        f"sources. n = {int(grid.fvu_n.iloc[0]):,} held-out tokens.", "tab-training-grid"))
else:
    display(prose("No suite with more sizes of this model and site is on record."))

# %% tags=["hide-input"]
if len(grid):
    display(figures.finish(
        figures.interval_points(over_widths("fvu_nonlinear"), "width", x_title="SAE width (latents)",
                                y_title="FVU<sub>nonlinear</sub>", group="L0"),
        "fig-training-grid-nonlinear", "FVU$_\\mathrm{nonlinear}$ over widths, one line an L0. Bars: 95% intervals over held-out sources, "
        f"n = {int(grid.fvu_n.iloc[0]):,} tokens.", "Lines of the nonlinear share of variance over SAE width, one for each L0.",
        paper="Figure 3"))

# %% tags=["hide-input"]
if len(grid):
    display(figures.finish(
        figures.interval_points(over_widths("r2_vector"), "width", x_title="SAE width (latents)",
                                y_title="R² of the error vector", group="L0"),
        "fig-training-grid-vector", f"$R^2$ of the error vector from $x$ over widths, one line an L0. n = {int(grid.fvu_n.iloc[0]):,} "
        "held-out tokens.", "Lines of the R² of the error vector over SAE width, one for each L0.", paper="Figure 2"))

# %% tags=["hide-input"]
if len(grid):
    ends = {k: side.set_index("width").sort_index() for k, side in grid.groupby("k") if side.width.nunique() > 1}
    half = training[training.share == 0.5].set_index(["k", "width"]).fvu_nonlinear
    since = grid.set_index(["k", "width"]).fvu_nonlinear / half - 1

    def from_to(name: str, digits: int) -> str:
        """A metric of the narrowest and the widest SAE of each L0."""
        return "; ".join(f"{number(side[name].iloc[0], digits)} to {number(side[name].iloc[-1], digits)} at L0 {k}" for k, side in ends.items())

    def overlap(side: pd.DataFrame) -> str:
        """Whether the narrowest and the widest SAE's intervals overlap."""
        first, last = side.iloc[0], side.iloc[-1]
        apart = first.fvu_nonlinear_low > last.fvu_nonlinear_high or last.fvu_nonlinear_low > first.fvu_nonlinear_high
        return "" if apart else ", overlapping intervals"

    widths = [f"{width:,}" for width in (grid.width.min(), grid.width.max())]
    display(prose(f"""
    From width {widths[0]} to {widths[1]} FVU goes from {from_to('fvu', 3)}. FVU<sub>nonlinear</sub> goes from
    {"; ".join(f"{number(side.fvu_nonlinear.iloc[0], 4)} to {number(side.fvu_nonlinear.iloc[-1], 4)} at L0 {k}{overlap(side)}" for k, side in ends.items())}.
    Its largest value over the widths is
    {"; ".join(f"{number(side.fvu_nonlinear.max() / side.fvu_nonlinear.min(), 2)} times the smallest at L0 {k}" for k, side in ends.items())};
    FVU's is {"; ".join(f"{number(side.fvu.max() / side.fvu.min(), 2)} times at L0 {k}" for k, side in ends.items())}.
    R² of the error vector goes from {from_to('r2_vector', 2)}.

    Not all of these SAEs are equally near the end of what training can do. Over the second half of the training FVU<sub>nonlinear</sub> of the
    narrowest and of the widest changed by
    {"; ".join(f"{number(100 * since[k, side.index[0]], 1)}% and {number(100 * since[k, side.index[-1]], 1)}% at L0 {k}" for k, side in ends.items())}.
    Where the widest still falls faster than the narrowest, more training would lower the right end of its line more than the left.
    """))

# %% tags=["hide-cell"]
for row in rows.to_dict("records"):
    for name in metrics:
        run.add(f"{name} after {row['share']:.3g} of the training", row[name], row[f"{name}_low"], row[f"{name}_high"], row[f"{name}_n"],
                "tokens", row["sae"])
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
