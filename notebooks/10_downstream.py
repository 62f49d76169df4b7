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
# # Downstream cross entropy
#
# So far the error was measured at the {term}`site` itself. But an activation is there to be used:
# the layers above it read it to predict the next token. When Sae(x) is put in the place of $x$, the
# model predicts worse, and its **cross entropy** (the loss, in nats a token) rises. **Which part of
# the error does that damage: LinearError, NonlinearError, or both?**
#
# {cite:t}`engels2024dark` give each part back and see how much of the loss returns (their Figure
# 9). Their claim: NonlinearError matters to the model about in proportion to its size, so it is not
# noise that the model ignores. They give no percentages in a form we know of, so none are printed
# here as theirs.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs: release:sae_id, directory, artifact:NAME or train:WIDTHxL0, by commas
loss_contexts: int = -1  # held-out contexts for every SAE; -1: one for 15 of the preset's
more_contexts: int = -1  # further ones for one SAE, without controls; -1: twice as many
loss_positions: int = -1  # kept tokens of each that are replaced; 0: all; -1: a quarter

# %%
import time

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import display

from darkmatter import survey
from darkmatter.book import figures, records, reference
from darkmatter.book.figures import number, prose
from darkmatter.experiments import downstream, error_parts, scaling
from darkmatter.models import model
from darkmatter.saes.references import load_sae

run = records.start("10_downstream", preset, sae=sae, loss_contexts=loss_contexts,
                    more_contexts=more_contexts, loss_positions=loss_positions)
p = run.preset
contexts = max(3, p.contexts // 15) if loss_contexts == -1 else loss_contexts
further = 2 * contexts if more_contexts == -1 else more_contexts
positions = max(1, len(p.kept) // 4) if loss_positions == -1 else loss_positions

# %% [markdown]
# ## Four versions of one activation
#
# On some contexts the activation at every {term}`kept token` is replaced, by
#
# 1. $x$ itself, which changes nothing;
# 2. Sae(x);
# 3. Sae(x) + LinearError(x), which leaves out NonlinearError alone;
# 4. Sae(x) + NonlinearError(x), which leaves out LinearError alone.
#
# The model then runs on from there, and its loss is read at the same positions. With $z$ one of the
# last two, the **share of the loss gap recovered** is
#
# $$
# \frac{\mathrm{CE}(\mathrm{Sae}(x)) - \mathrm{CE}(z)}
# {\mathrm{CE}(\mathrm{Sae}(x)) - \mathrm{CE}(x)},
# $$ (eq-recovered)
#
# 0% when giving the part back does not help, 100% when it repairs everything. It is compared with
# two measures of how large the part is. The **share of variance** is the same fraction with the
# squared error $\lVert x - z\rVert^2$ in the place of the loss. The **share of norm** is the part's
# mean length, divided by the sum of the mean lengths of both parts.
#
# The contexts are of held-out {term}`sources <source>`. $b^*$ is the one of the survey, fitted on
# the other sources. To run the model is most of the work, so all SAEs are compared on some
# contexts, and one SAE, the one that the claim is tested on, on more.

# %%
result = survey.run(p)
acts, fit = result.acts, survey.fitted_rows(p, result.acts, survey.PROTOCOLS["strict"])
chosen = downstream.stretches(acts, ~fit, contexts + max(0, further), positions, p.seed)
# The contexts for all SAEs are the first that were drawn, so they are among the chosen.
common = downstream.stretches(acts, ~fit, contexts, positions, p.seed)

rows = np.concatenate([np.arange(s.rows.start, s.rows.stop) for s in chosen])
x, context = acts.x[rows].float(), acts.context[rows]
place = {s.context: slice(*np.searchsorted(context, (s.context, s.context + 1))) for s in chosen}

# %%
opened = {sae.name: sae for sae in (load_sae(ref, p) for ref in p.saes)}
name = next(sae.name for sae in opened.values() if sae.ref == p.default_sae)
parts = {}
for sae_name, loaded_sae in opened.items():
    b = error_parts.error_map(loaded_sae, acts, fit)
    parts[sae_name] = downstream.divided(loaded_sae, b, x)


def versions(sae_name, here):
    """Sae(x), and Sae(x) with either part of the error given back, for some rows of x."""
    rebuilt, linear, nonlinear = (vectors[here] for vectors in parts[sae_name])
    return {f"{sae_name} sae": rebuilt, f"{sae_name} linear": rebuilt + linear,
            f"{sae_name} nonlinear": rebuilt + nonlinear}


# %% [markdown]
# Two controls, which the paper does not have, are run on one SAE. *Random*: a vector of random
# direction that is exactly as long as the part at that token, in place of the part. *Another
# token's*: the same part, but of another token, drawn from all chosen contexts. If the loss only
# cared about length, they would do as well as the part itself. Two more versions give a scale: the
# mean activation for every token, which is what a {term}`dead <dead latent>` SAE would return, and
# $x$ plus a random vector as long as SaeError(x), an error of the SAE's size without the SAE's
# direction.

# %%
rebuilt, linear, nonlinear = parts[name]
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(p.seed))
instead = {
    "linear, random": downstream.noise(linear, p.seed + 1),
    "linear, another token's": linear[order],
    "nonlinear, random": downstream.noise(nonlinear, p.seed + 2),
    "nonlinear, another token's": nonlinear[order],
}
sampled = np.flatnonzero(fit)[:: max(1, int(fit.sum()) // 20_000)]
scale = {"mean": acts.x[sampled].float().mean(0).expand_as(x),
         "x + random": x + downstream.noise(x - rebuilt, p.seed + 3)}


def of_one(stretch):
    """x, and the three versions of one SAE, for one context."""
    here = place[stretch.context]
    return {"x": x[here], **versions(name, here)}


def of_all(stretch):
    """Every version of one context's activations."""
    here, every = place[stretch.context], of_one(stretch)
    for sae_name in parts:
        every |= versions(sae_name, here)
    every |= {f"{name} {label}": rebuilt[here] + part[here] for label, part in instead.items()}
    return every | {label: vectors[here] for label, vectors in scale.items()}


# %% [markdown]
# ## The splice
#
# All versions of a context share the positions before the first kept token, whose keys and values
# are cached, and everything below the site. These run once; then a hook at the site hands a batch
# of versions to the upper part. A test compares this with a full forward pass for each version.

# %%
figures.source(downstream.spliced)

# %% [markdown]
# Here is what it saves, on one context.

# %%
loaded = model.load(p)
first = common[0]
tokens, kept = acts.text.tokens[first.context], acts.position[first.rows]
stack = torch.stack(list(of_all(first).values()))


def seconds(call):
    """Of the faster of two calls."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return min(taken)


full = seconds(lambda: model.losses(loaded, tokens[None, :kept[-1] + 1]))
floor = downstream.bound(loaded, p.site, tokens, kept, stack, seconds)
begun = time.perf_counter()
spliced = downstream.losses(loaded, p.site, tokens, kept, stack)
together = time.perf_counter() - begun

plain = model.losses(loaded, tokens[None])[0, kept]
put_back = float(spliced[list(of_all(first)).index("x")].mean()) - float(plain.mean())
assert abs(put_back) < 0.02, "putting x back should leave the loss as it was"

# %% tags=["hide-input"]
reached = "It is not reached on this run; with other work on the machine such timings are rough."
if together < 1.2 * floor:
    reached = "It is reached to within a fifth."
prose(f"""
{len(stack)} versions of {len(kept)} kept tokens: {together:.1f} s together, where a full forward
pass for each would take {len(stack) * full:.1f} s ({len(stack) * full / together:.1f} times as
long). The bound is what they share once and the rest for every version: {floor:.1f} s from the two
timed alone. {reached} With $x$ put back the mean loss of this context changes by
{number(put_back, 4)} nats, the rounding of {model.dtype_of(p)}.
""")

# %% [markdown]
# ## What each part is worth
#
# Now all contexts. The sums of the loss over each context are all that is kept; the 95%
# {term}`intervals <bootstrap interval>` draw the held-out sources again with replacement, with the
# same draws for every version, so that shares are compared on the same text.

# %%
sums = downstream.measure(loaded, p.site, acts, common, of_all)
rest = [stretch for stretch in chosen if stretch not in common]
more = downstream.measure(loaded, p.site, acts, rest, of_one) if rest else {}

# The lengths of the parts, summed over each context as the losses are.
LENGTHS = ("error²", "linear²", "nonlinear²", "linear", "nonlinear")
owner = torch.from_numpy(context).long()
for sae_name, part in parts.items():
    vectors = {"error": x - part.sae, "linear": part.linear, "nonlinear": part.nonlinear}
    for key in LENGTHS:
        length = vectors[key.rstrip("²")].double().norm(dim=1) ** (2 if "²" in key else 1)
        empty = torch.zeros(len(acts.text.tokens)).double()
        sums[f"{sae_name} |{key}|"] = empty.index_add(0, owner, length)

# %%
joined = {key: total + more.get(key, 0) for key, total in sums.items()
          if key in more or key.startswith(f"{name} |")}
some, every = (downstream.totals(p, acts, of) for of in (sums, joined if rest else sums))
n, unit = some["n"], result.unit
basis = f"{n.basis(unit)}, in {len(common)} contexts"
basis_of_all = f"{every['n'].basis(unit)}, in {len(chosen)} contexts"


def shares(total, sae_name, part):
    """Percent of the loss gap, of variance and of norm that a part of the error stands for."""
    other = "linear" if part == "nonlinear" else "nonlinear"
    length = {key: total[f"{sae_name} |{key}|"] for key in LENGTHS}
    return {"loss gap": downstream.recovered(total, f"{sae_name} sae", f"{sae_name} {part}"),
            "variance": 100 * (1 - length[f"{other}²"] / length["error²"]),
            "norm": 100 * length[part] / (length["linear"] + length["nonlinear"])}


# %%
PARTS = ("linear", "nonlinear")
share = {(sae_name, part): shares(some, sae_name, part) for sae_name in opened for part in PARTS}
gap = {sae_name: (some[f"{sae_name} sae"] - some["x"]) / n for sae_name in opened}
listed = pd.DataFrame([
    {"sae": sae.name, "width": sae.width, "k": sae.k,
     "l0": float(sae.k or sae(x)[1].double().mean())} for sae in opened.values()])


def column(part, measure):
    """A share of every SAE, with its interval."""
    return [f"{share[sae_name, part][measure]:.1f}" for sae_name in opened]


figures.table(pd.DataFrame({
    "width": listed["width"], "L0": listed["l0"],
    "loss gap, nats": [f"{draws}" for draws in gap.values()],
    "+ LinearError: loss, %": column("linear", "loss gap"),
    "variance, %": column("linear", "variance"),
    "+ NonlinearError: loss, %": column("nonlinear", "loss gap"),
    " variance, %": column("nonlinear", "variance"),
}), "The loss that Sae(x) adds, and the share of it that each part of the error gives back, beside "
    f"the part's share of the variance of the error. n = {basis}.", "tab-downstream",
    digits={"L0": 0})

# %% tags=["hide-input"]
plain_loss, without = some["x"] / n, some["mean"] / n
kept_share = 100 * (without - some[f"{name} sae"] / n) / (without - plain_loss)
prose(f"""
The model's own loss on these tokens is {plain_loss} nats. With the mean activation in every place
it would be {without}. Of that difference, `{name}` keeps {kept_share:.1f}%.
""")

# %% tags=["hide-input"]
def figure_9(these, label, x_title, ticks, words):
    """Bars of the loss recovered by each part; marks for its share of variance and of norm."""
    fig, grey, alt = go.Figure(), figures.colour("grey"), []
    for side, part in zip((-0.2, 0.2), PARTS, strict=True):
        loss, *sizes = ([share[sae_name, part][measure] for sae_name in these["sae"]]
                        for measure in ("loss gap", "variance", "norm"))
        at, shade = np.arange(len(these)) + side, figures.MEANING[f"{part} error"]
        fig.add_bar(x=at, y=[float(draws) for draws in loss], width=0.36,
                    name=f"+ {part.capitalize()}Error", marker_color=figures.colour(shade, 0.6),
                    error_y=figures.error_bars(loss, color=grey))
        for measure, draws, symbol, size in zip(("variance", "norm"), sizes,
                                                ("diamond", "line-ew"), (9, 14), strict=True):
            marker = {"symbol": symbol, "size": size, "color": grey,
                      "line": {"width": 2, "color": grey}}
            fig.add_scatter(x=at - 0.1, y=[float(d) for d in draws], mode="markers", marker=marker,
                            name=f"share of {measure}", legendgroup=measure, showlegend=side < 0)
        alt += [f"{part} at {tick}: {number(float(draws), 0)}% of the loss"
                for tick, draws in zip(ticks, loss, strict=True)]
    fig.update_xaxes(title_text=x_title, tickvals=list(range(len(ticks))), ticktext=ticks)
    fig.update_yaxes(title_text="% of the loss gap recovered", rangemode="tozero")
    return figures.finish(
        fig.update_layout(barmode="overlay"), label,
        f"The share of the loss gap that each part of the error gives back, {words}. Bars: 95% "
        f"intervals over {unit}. Marks: the part's share of variance and of norm. n = {basis}.",
        "; ".join(alt), paper="Figure 9")


ladder = scaling.ladder(listed)
if len(ladder) > 1:
    display(figure_9(ladder, "fig-downstream-width", figures.WIDTH,
                     [f"{width:,}" for width in ladder["width"]],
                     f"by width, at L0 {ladder['l0'].mean():.0f}"))
else:
    display(prose("This run has one width only, so the figure by width is left out."))

# %% tags=["hide-input"]
most = listed.groupby("width")["l0"].nunique().idxmax()
by_l0 = listed[listed["width"] == most].sort_values("l0", kind="stable")
if by_l0["l0"].nunique() > 1:
    display(figure_9(by_l0, "fig-downstream-l0", "L0 (active latents a token)",
                     [f"{l0:.0f}" for l0 in by_l0["l0"]], f"by L0, at width {most:,}"))
else:
    display(prose("No width of this run has SAEs at more than one L0, so the figure by L0 is left "
                  "out."))

# %%
both = {sae_name: share[sae_name, "linear"]["loss gap"] + share[sae_name, "nonlinear"]["loss gap"]
        for sae_name in opened}
above = sum(draws.low is not None and draws.low > 100 for draws in both.values())
halves = """A sum above 100% means that the first half of a repair is worth more than the second:
the loss grows faster than what is missing does.""" if above > len(both) / 2 else ""

# %% tags=["hide-input"]
narrow, wide = ladder["sae"].iloc[0], ladder["sae"].iloc[-1]
given = {(sae_name, part): number(float(share[sae_name, part]["loss gap"]), 0)
         for sae_name in (narrow, wide) for part in PARTS}
by_width = f"""From the narrowest to the widest SAE, LinearError gives back
{given[narrow, 'linear']}% and {given[wide, 'linear']}%, and NonlinearError
{given[narrow, 'nonlinear']}% and {given[wide, 'nonlinear']}%.""" if len(ladder) > 1 else ""
least, largest = (number(float(end(both.values(), key=float)), 0) for end in (min, max))
prose(f"""
{by_width} The two shares need not add up to 100%: over the SAEs their sum goes from {least}% to
{largest}% (`{name}`: {both[name]:.0f}%), and for {above} of {len(both)} SAEs its interval lies
above 100%. {halves}
""")

# %% [markdown]
# ## Length is not enough
#
# The controls, on one SAE. Adding a vector that has only the right length should not repair
# anything. If it does harm, the bar goes below zero.

# %%
KINDS = {"the part itself": "", "another token's": ", another token's", "random": ", random"}
controls = {(part, kind): downstream.recovered(some, f"{name} sae", f"{name} {part}{suffix}")
            for part in PARTS for kind, suffix in KINDS.items()}
harm = {label: (some[label] - some["x"]) / n for label in (f"{name} sae", "x + random")}
times = harm[f"{name} sae"] / harm["x + random"]

# %% tags=["hide-input"]
bars = pd.DataFrame([{"part": f"{part.capitalize()}Error", "added": kind, **draws.row}
                     for (part, kind), draws in controls.items()])
fig = figures.bars_by_setting(bars.astype({"low": float, "high": float}), "part", group="added",
                              y_title="% of the loss gap recovered")
figures.finish(
    fig, "fig-downstream-controls",
    f"The share of the loss gap of `{name}` that is recovered by adding to Sae(x) a part of its "
    "error, the same part of another token, and a random vector of the part's length. 95% "
    f"intervals over {unit}; n = {basis}.",
    "; ".join(f"{row.part}, {row.added}: {number(row.value, 0)}%" for row in bars.itertuples()))

# %% [markdown]
# What the intervals say of the controls: whether a stand-in helps (above zero), does harm (below
# zero), and whether each part itself does better than its stand-ins on the same draws of the text.

# %%
stand_ins = {key: draws for key, draws in controls.items() if key[1] != "the part itself"}
better = [controls[part, "the part itself"] - draws for (part, _), draws in stand_ins.items()]
harmful = sum(draws.high is not None and draws.high < 0 for draws in stand_ins.values())
helpful = [f"the {part} part of another token" for part in PARTS
           if (stand_ins[part, "another token's"].low or 0) > 0]

do_harm = {
    0: "None of the four clearly does harm.",
    1: "One of the four does harm: its whole interval lies below zero.",
    4: "All four do harm: their whole intervals lie below zero.",
}.get(harmful, f"{harmful} of the four do harm: their whole intervals lie below zero.")
help_too = f"What still helps: {' and '.join(helpful)}, which shares its mean with the right one."
help_too = help_too if helpful else ""
direction = "On this text the parts are not all clearly better than their stand-ins."
if all((draws.low or 0) > 0 for draws in better):
    direction = """Each part itself does better than any of its stand-ins, on the same text: it is
    the direction of a part at its own token that the model uses."""

# %% [markdown]
# Is SaeError worse for the model than any error of its length? Gurnee found that SAE errors in
# GPT-2 move the model's output 2 to 4.5 times as much as random vectors of the same length
# {cite:p}`gurnee2024pathological`. The same question here, in loss, which is another measure than
# his: what Sae(x) costs, divided by what $x$ plus a random vector as long as SaeError costs. One
# means that the direction of the error does not matter.

# %%
worse = {
    "agree": "So the SAE's error does more harm than a random one of its length.",
    "differ": "So the SAE's error does less harm than a random one of its length.",
    "cannot say": """The interval holds 1, so on this text the SAE's error cannot be told from a
    random one of its length.""",
}[records.verdict(times.low, times.high, 1, np.inf)]
gurnee = {
    "agree": "The interval lies within Gurnee's range.",
    "differ": "The interval lies outside Gurnee's range.",
    "cannot say": "The interval reaches beyond an end of Gurnee's range.",
}[records.verdict(times.low, times.high, 2, 4.5)]

# %% tags=["hide-input"]
percent = {key: f"{draws:.0f}%" for key, draws in controls.items()}
prose(f"""
A random vector of the right length recovers {percent['linear', 'random']} in the place of
LinearError and {percent['nonlinear', 'random']} in the place of NonlinearError; another token's
part, {percent['linear', "another token's"]} and {percent['nonlinear', "another token's"]}.
{do_harm} {help_too} {direction}

Sae(x) costs {harm[f'{name} sae']} nats, and $x$ plus a random vector as long as SaeError costs
{harm['x + random']}: {times:.2f} times as much. {worse} {gurnee}
""")

# %% [markdown]
# ## Agreement with the paper
#
# The claim is that NonlinearError has a *proportional* effect on the loss. How close is
# proportional, and to which size? The paper draws both the share of variance and the share of norm.
# **This book's reading:** the share of the loss gap that NonlinearError recovers is between 0.8 and
# 1.25 times its share. The range was set before the first run.

# %%
nonlinear_share = shares(every, name, "nonlinear")
ratio = {measure: nonlinear_share["loss gap"] / nonlinear_share[measure]
         for measure in ("variance", "norm")}
verdicts = {measure: run.claim(
    f"NonlinearError affects the loss in proportion to its share of {measure}.",
    f"share of the loss gap recovered by NonlinearError / its share of {measure}, of {name}",
    draws, (0.8, 1.25), paper="proportional (read here as: 0.8 to 1.25)")
    for measure, draws in ratio.items()}

figures.table(pd.DataFrame({
    "the paper": [f"loss in proportion to the share of {measure}" for measure in ratio],
    "measured": [f"loss share / {measure} share" for measure in ratio],
    "here": [f"{draws:.2f}" for draws in ratio.values()],
    "agrees if within": ["0.80 to 1.25"] * len(ratio),
    "verdict": [f"**{verdict}**" for verdict in verdicts.values()],
}), f"The claim about NonlinearError, for `{name}`. n = {basis_of_all}.",
    "tab-downstream-agreement")

# %%
stays = 100 - shares(every, name, "linear")["loss gap"]
beside_one = {
    measure: {"agree": "more than", "differ": "less than",
              "cannot say": "not clearly more or less than",
              }[records.verdict(draws.low, draws.high, 1, np.inf)]
    for measure, draws in ratio.items()}
used = ""
if (nonlinear_share["loss gap"].low or 0) > 0:
    used = "So NonlinearError is no harmless remainder: the model uses it."
unsettled = [f"its share of {measure}, from {number(draws.low, 2)} to {number(draws.high, 2)}"
             for measure, draws in ratio.items()
             if verdicts[measure] == "cannot say" and draws.low is not None]
open_verdict = ""
if unsettled and p.name != "smoke":
    open_verdict = f"""Where the verdict is open, the interval reaches beyond an end of the range
    (for {' and '.join(unsettled)}): the loss of {every['n'].n:,} tokens is too few to tell."""

# %% tags=["hide-input"]
replaced = f"the first {positions} kept tokens of each context rather than all"
if not positions:
    replaced = "all kept tokens of each context, as there"
percent = {measure: f"{draws:.0f}%" for measure, draws in nonlinear_share.items()}
prose(f"""
For `{name}`, NonlinearError is {percent['variance']} of the variance of the error and
{percent['norm']} of the norm, and gives back {percent['loss gap']} of the loss gap:
{beside_one['variance']} its share of variance, {beside_one['norm']} its share of norm. Where it is
left out and only LinearError is given back, {stays:.0f}% of the gap stays. {used} {open_verdict}

What differs from the paper: one model of {acts.x.shape[1]} dimensions; {replaced}; {len(chosen)}
contexts rather than 300; and contexts that $b^*$ has not seen.
""")

# %%
for (sae_name, part), measures in share.items():
    for measure, draws in measures.items():
        run.add_draws(f"share of {measure}, {part} error, %", draws, sae=sae_name)
for sae_name in opened:
    run.add_draws("loss gap, nats", gap[sae_name], sae=sae_name)
    run.add_draws("sum of both shares of the loss gap, %", both[sae_name], sae=sae_name)
for (part, kind), draws in stand_ins.items():
    run.add_draws(f"share of loss gap, {part.capitalize()}Error ({kind}), %", draws, sae=name)
run.add_draws("loss that Sae(x) adds / loss that a random error of its length adds", times,
              sae=name)
run.add_timing("forward passes saved: full passes / shared pass", len(stack) * full / together,
               n=1, unit="context")
run.add_timing("floor / shared pass", floor / together, n=1, unit="context")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
