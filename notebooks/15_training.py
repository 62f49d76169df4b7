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
if len(rows):
    k = int(rows.groupby("k").width.nunique().idxmax())  # the L0 that most widths have
    n = int(rows.fvu_n.iloc[0])
    ladder = rows[rows.k == k].sort_values(["width", "share"])
    table = ladder.assign(**{label: [interval(*row) for row in ladder[[name, f"{name}_low", f"{name}_high"]].to_numpy()]
                             for name, label in metrics.items()})
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
    table = first.assign(**{label: [interval(*row) for row in first[[name, f"{name}_low", f"{name}_high"]].to_numpy()]
                            for name, label in metrics.items()})
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

# %% tags=["hide-cell"]
for row in rows.to_dict("records"):
    for name in metrics:
        run.add(f"{name} after {row['share']:.3g} of the training", row[name], row[f"{name}_low"], row[f"{name}_high"], row[f"{name}_n"],
                "tokens", row["sae"])
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
