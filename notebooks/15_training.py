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
# The paper takes published {term}`SAEs <SAE>` as they are. Those of this book were trained on a
# few million tokens, far fewer. An SAE that stops early leaves an error that more training would
# have removed, and that part of the error may look linear. So the numbers of the chapters before
# could be numbers about too little training. **Do the shares of linear and nonlinear error still
# move at the end of training, and which way?**
#
# The paper makes no claim here. It finds that {term}`NonlinearError` hardly shrinks as SAEs get
# wider; this chapter asks whether it shrinks as they are trained longer.
#
# Checkpoints are too large to ship, so where this chapter is about SAEs that ship with the book
# its numbers are **records**: they were measured once, on the machine that trained the SAEs, and
# written down in `artifacts/convergence.json`. Building this page reads them and does not measure
# them again; each table says of which day its numbers are. For SAEs that are trained on the spot,
# as the preset `smoke` has them, they are measured when the page is built.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs, with commas between: artifact:NAME of this book, or train:WIDTHxL0

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import display

from darkmatter.book import figures, records, reference
from darkmatter.book.figures import interval, number, prose
from darkmatter.experiments import variants

run = records.start("15_training", preset, sae=sae)
p = run.preset

# %% [markdown]
# ## The same SAEs, earlier
#
# Training writes checkpoints. Each of those after an eighth, a quarter and half of the training
# tokens is an SAE of its own, and goes through the same {term}`survey` as the finished one: the
# same activations, the same {term}`sources <source>` fitted on and held out. The comparison is not
# quite fair to the early ones. The learning rate is lowered over the last fifth of the training,
# which gives the finished SAE an advantage that a longer run at the full rate would not have had.

# %%
rows = variants.recorded_convergence(p)
metrics = {"fvu": "FVU", "fvu_nonlinear": "FVU<sub>nonlinear</sub>",
           "r2_vector": "R² of the error vector", "r2_norm": "R² of the squared error norm"}


def dated(rows: pd.DataFrame) -> str:
    """Where rows come from: when they were written down, or that they were measured just now."""
    if "recorded" not in rows:
        return "Measured when this page was built."
    days = sorted(set(rows["recorded"].dropna()) - {""})
    return f"On record from {' and '.join(days) or 'a day that this copy does not know'}."


# %%
def in_words(rows: pd.DataFrame, **columns: str) -> pd.DataFrame:
    """The rows of a table: some columns under other names, then every metric with its interval."""
    numbers = {label: [interval(*row)
                       for row in rows[[name, f"{name}_low", f"{name}_high"]].to_numpy()]
               for name, label in metrics.items()}
    return pd.DataFrame({columns[name]: rows[name] for name in columns} | numbers)


if len(rows):
    k = int(rows.groupby("k").width.nunique().idxmax())  # the L0 that most widths have
    n = int(rows.fvu_n.iloc[0])
    ladder = rows[rows.k == k].sort_values(["width", "share"])
    display(figures.table(
        in_words(ladder, width="width", tokens="training tokens"),
        f"SAEs of L0 {k} after an eighth, a quarter, half and all of their training: value and "
        f"95% interval over held-out sources. n = {n:,} held-out tokens. {dated(rows)}",
        "tab-training"))
else:
    display(prose(f"There is no record of how the SAEs of `{p.name}` changed in training "
                  "(`artifacts/convergence.json`)."))

# %% tags=["hide-input"]
def lines(rows: pd.DataFrame, metric: str, x: str, group: str, prefix: str, name: str,
          caption: str, paper: str = "") -> None:
    """Draw one metric against training tokens or width, a line for each width or L0."""
    titles = {"tokens": "training tokens", "width": figures.WIDTH}
    points = pd.DataFrame({x: rows[x], "line": [f"{prefix} {value:,}" for value in rows[group]],
                           "value": rows[metric], "low": rows[f"{metric}_low"],
                           "high": rows[f"{metric}_high"]})
    fig = figures.interval_points(points, x, x_title=titles[x], y_title=metrics[metric],
                                  group="line")
    count = int(rows[f"{metric}_n"].iloc[0])
    display(figures.finish(
        fig, name, f"{caption} 95% intervals over held-out sources; n = {count:,} tokens.",
        f"Lines of {metrics[metric]} over {titles[x]}, one for each {prefix}.", paper=paper))


if len(rows):
    lines(ladder, "fvu_nonlinear", "tokens", "width", "width", "fig-training-nonlinear",
          f"FVU$_\\mathrm{{nonlinear}}$ against training tokens, L0 {k}.")
    lines(ladder, "r2_vector", "tokens", "width", "width", "fig-training-vector",
          f"$R^2$ of the error vector from $x$, against training tokens, L0 {k}.")

# %% [markdown]
# ## What moves, and what does not

# %%
def change(name: str, since: float) -> pd.Series:
    """How much a metric changed from a share of the training to its end, as a share of itself."""
    wide = rows.pivot(index="sae", columns="share", values=name)
    return wide[1.0] / wide[since] - 1


def span(changes: pd.Series) -> str:
    """The smallest and the largest of some changes, in per cent."""
    return f"{number(100 * changes.min(), 1)}% to {number(100 * changes.max(), 1)}%"


if len(rows):
    display(figures.table(pd.DataFrame({
        "metric": list(metrics.values()),
        "from an eighth to all": [span(change(name, 0.125)) for name in metrics],
        "from half to all": [span(change(name, 0.5)) for name in metrics],
    }), "Change of each metric in training, as a share of its value before: smallest to largest "
        f"over {rows.sae.nunique()} SAEs. {dated(rows)}", "tab-training-change"))

# %%
if len(rows):
    moved = {label: change(name, 0.5) for name, label in metrics.items()}
    falls = [label for label, of_sae in moved.items() if (of_sae < 0).all()]
    rises = [label for label, of_sae in moved.items() if (of_sae > 0).all()]
    still = min(moved, key=lambda label: moved[label].abs().max())
    most = {share: side.fvu_nonlinear.max() / side.fvu_nonlinear.min()
            for share, side in ladder.groupby("share")}
    goes_on = "FVU has settled to within 1%"
    if (moved["FVU"] < -0.01).any():
        goes_on = "A longer training would lower FVU further"
    display(prose(f"""
    Over the second half of the training these fall for every SAE: {', '.join(falls) or 'none'}.
    These rise for every SAE: {', '.join(rises) or 'none'}. What moves least is {still}, by at most
    {number(100 * moved[still].abs().max(), 1)}% of its value.

    Is the flatness of FVU<sub>nonlinear</sub> over widths a matter of training? Over the widths of
    L0 {k} the largest value is {number(most[0.125], 2)} times the smallest after an eighth of the
    training, and {number(most[1.0], 2)} times at its end. These are ratios of point values; the
    intervals in {{numref}}`tab-training` say how far each can be trusted. {goes_on}; the chapters
    before should be read with the changes of the last column in mind.
    """))

# %% [markdown]
# ## More text, for longer
#
# The end of a training is not convergence: by then the learning rate is zero, and FVU stands still
# whether or not it would have fallen further. The better question is what the same recipe gives
# with more text. The book has two suites of the default's sizes. One saw its tokens twice; the
# other saw four times as many different tokens, each once, from more kinds of documents. So the
# two differ by more than the number of tokens. Both went through the same survey of the same
# held-out sources.

# %%
finished = variants.suites(rows)
if len(finished):
    first = finished[finished.seed == 0].sort_values(["k", "width", "tokens"])
    display(figures.table(
        in_words(first, width="width", k="L0", tokens="training tokens",
                 distinct="different tokens"),
        "Finished SAEs of the same size, by how much they were trained on: value and 95% interval "
        f"over held-out sources. Tokens are those asked for. n = {n:,} held-out tokens. "
        f"{dated(first)}", "tab-training-longer"))
else:
    display(prose("No second suite of this model, site and sizes is on record."))

# %%
if len(finished):
    size = ["width", "k"]
    least, most = (first[first.tokens == tokens].set_index(size)
                   for tokens in (first.tokens.min(), first.tokens.max()))
    by = {label: (most[name] / least[name] - 1).dropna() for name, label in metrics.items()}
    flat = [one_l0.max() / one_l0.min() for one_l0 in (
        side.xs(k, level="k").fvu_nonlinear for side in (least, most))]
    # SAEs that differ by their seed alone say how large a change has to be to mean anything.
    repeated = finished[finished.groupby(["preset", *size]).seed.transform("max") > 0]
    seeds = [f"{len(alike)} seeds at width {width:,} and L0 {l0}: " + ", ".join(
        f"{metrics[name]} {number(alike[name].min(), 4)} to {number(alike[name].max(), 4)}"
        for name in ("fvu", "fvu_nonlinear", "r2_vector"))
        for (width, l0), alike in repeated.groupby(size)]
    for_scale = f"For scale, {'; '.join(seeds)}." if seeds else ""
    changes = "; ".join(f"{label} by {span(of_size)}" for label, of_size in by.items())
    display(prose(f"""
    With {number(first.tokens.max() / first.tokens.min(), 2)} times the tokens the metrics change
    over {len(by['FVU'])} sizes: {changes}. These are changes of point values;
    {{numref}}`tab-training-longer` has the intervals. {for_scale}

    Along the widths of L0 {k} the largest FVU<sub>nonlinear</sub> is {number(flat[0], 2)} times the
    smallest with less training and {number(flat[1], 2)} times with more.
    """))

# %% [markdown]
# ## Every width with other L0s
#
# The paper's Figures 2 and 3 lie on a grid of widths and L0s. It finds that, at a given L0,
# FVU$_\mathrm{nonlinear}$ hardly changes with the width. The default suite can test that at one L0
# only: training each size takes minutes to an hour, and shipping it takes room. The larger suite
# was trained at more of them; their numbers are on record, and one command trains them again
# (`python -m darkmatter train --preset suite-8m`). **Does FVU$_\mathrm{nonlinear}$ stay flat over
# widths at every L0?**

# %%
suite = variants.widest(rows)
grid = suite[suite.share == 1].sort_values(["k", "width"]) if len(suite) else suite
if len(grid):
    display(figures.table(
        in_words(grid, k="L0", width="width"),
        f"The SAEs of `{grid.preset.iloc[0]}`, {int(grid.tokens.iloc[0]):,} training tokens each: "
        f"value and 95% interval over held-out sources. n = {int(grid.fvu_n.iloc[0]):,} held-out "
        f"tokens. {dated(grid)}", "tab-training-grid"))
else:
    display(prose("No suite with more sizes of this model and site is on record."))

# %% tags=["hide-input"]
if len(grid):
    several = grid[grid.groupby("k").width.transform("nunique") > 1]
    lines(several, "fvu_nonlinear", "width", "k", "L0", "fig-training-grid-nonlinear",
          "FVU$_\\mathrm{nonlinear}$ over widths, one line an L0.", "Figure 3")
    lines(several, "r2_vector", "width", "k", "L0", "fig-training-grid-vector",
          "$R^2$ of the error vector from $x$ over widths, one line an L0.", "Figure 2")

# %%
if len(grid):
    half = suite[suite.share == 0.5].set_index(["k", "width"]).fvu_nonlinear
    late = 100 * (grid.set_index(["k", "width"]).fvu_nonlinear / half - 1)
    table = []
    for l0, side in several.groupby("k"):
        narrow, wide = side.iloc[0], side.iloc[-1]
        apart = (narrow.fvu_nonlinear_low > wide.fvu_nonlinear_high
                 or wide.fvu_nonlinear_low > narrow.fvu_nonlinear_high)
        largest = {name: side[name].max() / side[name].min() for name in ("fvu", "fvu_nonlinear")}
        table.append({
            "L0": l0, **{label: f"{number(narrow[name])} to {number(wide[name])}"
                         for name, label in metrics.items() if name != "r2_norm"},
            "FVU, largest over smallest": largest["fvu"],
            "FVU<sub>nonlinear</sub>, largest over smallest": largest["fvu_nonlinear"],
            "intervals of FVU<sub>nonlinear</sub>": "apart" if apart else "overlap",
            "FVU<sub>nonlinear</sub> since half of the training":
                f"{number(late[l0, narrow.width], 1)}%, {number(late[l0, wide.width], 1)}%"})
    display(figures.table(
        pd.DataFrame(table), f"From the narrowest SAE ({grid.width.min():,} latents) to the widest "
        f"({grid.width.max():,}) at each L0; the last column has the change of both over the "
        "second half of their training.", "tab-training-flat", digits=2))
    display(prose("""
    Not all of these SAEs are equally near the end of what training can do. Where the widest still
    falls faster than the narrowest in the last column, more training would lower the right end of
    its line more than the left.
    """))

# %%
for row in rows.to_dict("records"):
    for name in metrics:
        run.add(f"{name} after {row['share']:.3g} of the training", row[name], row[f"{name}_low"],
                row[f"{name}_high"], row[f"{name}_n"], "tokens", row["sae"])
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
