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
# So far the error was measured at the {term}`site` itself. But an activation is there to be used: the layers above it read
# it to predict the next token. When Sae(x) is put in the place of $x$, the model predicts worse, and its **cross entropy**
# (the loss, in nats a token) rises. **Which part of the error does that damage: LinearError, NonlinearError, or both?**
#
# {cite:t}`engels2024dark` give each part back and see how much of the loss returns (their Figure 9). Their claim:
# NonlinearError matters to the model about in proportion to its size, so it is not noise that the model ignores. They give
# no percentages in a form we know of, so none are printed here as theirs.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs than the preset's, with commas between: release:sae_id, directory, artifact:NAME or train:WIDTHxL0
loss_contexts: int = -1  # held-out contexts to run the model on; -1: one for 15 of the preset's, at least 3
loss_positions: int = -1  # kept tokens of each context that are replaced and scored, from the first on; 0: all; -1: two in five

# %% tags=["hide-input"]
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import display

from darkmatter import downstream, figures, model, parts, records, regression, saes, scaling, survey
from darkmatter.figures import interval, number, prose

run = records.start("10_downstream", preset, sae=sae, loss_contexts=loss_contexts, loss_positions=loss_positions)
p = run.preset
contexts = max(3, p.contexts // 15) if loss_contexts == -1 else loss_contexts
positions = max(1, 2 * len(p.kept) // 5) if loss_positions == -1 else loss_positions

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
# The model then runs on from there, and its loss is read at the same positions. With $z$ one of the last two, the
# **share of the loss gap recovered** is
#
# $$\frac{\mathrm{CE}(\mathrm{Sae}(x)) - \mathrm{CE}(z)}{\mathrm{CE}(\mathrm{Sae}(x)) - \mathrm{CE}(x)},$$ (eq-recovered)
#
# 0% when giving the part back does not help, 100% when it repairs everything. It is compared with two measures of how
# large the part is. The **share of variance** is the same fraction with the squared error $\lVert x - z\rVert^2$ in the
# place of the loss. The **share of norm** is the part's mean length, divided by the sum of the mean lengths of both parts.
#
# The contexts are of held-out {term}`sources <source>`. $b^*$ is the one of the survey, fitted on the other sources.

# %%
acts = survey.run(p).acts
fit = survey.fitted_rows(p, acts, survey.PROTOCOLS["strict"])
chosen = downstream.stretches(acts, ~fit, contexts, positions, p.seed)
rows = np.concatenate([np.arange(each.rows.start, each.rows.stop) for each in chosen])
x = acts.x[rows].float()
starts = np.cumsum([0, *(each.rows.stop - each.rows.start for each in chosen)])

# %%
opened = {each.name: each for each in (saes.load(ref, p) for ref in p.saes)}
name = next(each.name for each in opened.values() if each.ref == p.default_sae)
divided = {each.name: downstream.divided(each, parts.error_map(each, acts, fit), x) for each in opened.values()}

# %% [markdown]
# Two controls, which the paper does not have, are run on one SAE. *Random*: a vector of random direction that is exactly as
# long as the part at that token, in place of the part. *Another token's*: the same part, but of another token, drawn from all
# chosen contexts. If the loss only cared about length, they would do as well as the part itself. Two more versions give a
# scale: the mean activation for every token, which is what a {term}`dead <dead latent>` SAE would return, and
# $x$ plus a random vector as long as SaeError(x), an error of the SAE's size without the SAE's direction.

# %%
own = divided[name]
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(p.seed))
average = acts.x[np.flatnonzero(fit)[:: max(1, int(fit.sum()) // 20_000)]].float().mean(0)
instead = {
    ("linear", "random"): downstream.noise(own.linear, p.seed + 1),
    ("linear", "another token's"): own.linear[order],
    ("nonlinear", "random"): downstream.noise(own.nonlinear, p.seed + 2),
    ("nonlinear", "another token's"): own.nonlinear[order],
}
fixed = {"x": x, "mean": average.expand_as(x), "x + random": x + downstream.noise(x - own.sae, p.seed + 3)}


def variants(stretch: downstream.Stretch) -> dict[str, torch.Tensor]:
    """Every version of one context's activations, by name."""
    at = [each.context for each in chosen].index(stretch.context)
    here = slice(int(starts[at]), int(starts[at + 1]))
    found = {label: each[here] for label, each in fixed.items()}
    for sae_name, each in divided.items():
        found |= {f"{sae_name} sae": each.sae[here], f"{sae_name} linear": (each.sae + each.linear)[here],
                  f"{sae_name} nonlinear": (each.sae + each.nonlinear)[here]}
    return found | {f"{name} {part}, {kind}": (own.sae + each)[here] for (part, kind), each in instead.items()}


# %% [markdown]
# All versions of a context share everything below the site. So the lower part of the model runs once, and a hook at the site
# hands a batch of versions to the upper part. A test compares this with a full forward pass for each version. Here is what
# it saves, on one context.

# %%
loaded = model.load(p)
first = chosen[0]
tokens, kept = acts.text.tokens[first.context], acts.position[first.rows]
stack = torch.stack(list(variants(first).values()))


def seconds(what: Callable[[], object]) -> float:
    """Of the faster of two calls."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        what()
        taken.append(time.perf_counter() - begun)
    return min(taken)


below = seconds(lambda: model.capture(loaded, tokens[None, :kept[-1] + 1], [p.site]))
alone = seconds(lambda: downstream.losses(loaded, p.site, tokens, kept, stack[:1]))
begun = time.perf_counter()
together_losses = downstream.losses(loaded, p.site, tokens, kept, stack)
together = time.perf_counter() - begun
plain = model.losses(loaded, tokens[None])[0, kept]
put_back = float(together_losses[list(variants(first)).index("x")].mean()) - float(plain.mean())
assert abs(put_back) < 0.02, "putting x back should leave the loss as it was"

# %% tags=["hide-input"]
floor = below + len(stack) * max(alone - below, 0)
prose(f"""
{len(stack)} versions of {len(kept)} kept tokens: {together:.1f} s together, where a full forward pass for each would take
{len(stack) * alone:.1f} s ({len(stack) * alone / together:.1f} times as long). The bound is the lower part once and the upper
part for every version: {floor:.1f} s from the two timed alone. {'It is reached to within a fifth.'
if together < 1.2 * floor else 'It is not reached on this run; with other work on the machine such timings are rough.'}
With $x$ put back the mean loss of this context changes by {put_back:+.4f} nats, the rounding of {p.dtype}.
""")

# %% [markdown]
# ## What each part is worth
#
# Now all contexts. The sums of the loss over each context are all that is kept; the 95% {term}`intervals <bootstrap interval>`
# draw the held-out sources again with replacement, with the same draws for every version, so that shares are compared
# on the same text.

# %%
sums = downstream.measure(loaded, p.site, acts, chosen, variants)
owner = torch.from_numpy(acts.context[rows]).long()
for sae_name, each in divided.items():
    lengths = {"error²": (x - each.sae).double().square().sum(1), "linear²": each.linear.double().square().sum(1),
               "nonlinear²": each.nonlinear.double().square().sum(1), "linear": each.linear.norm(dim=1),
               "nonlinear": each.nonlinear.norm(dim=1)}
    sums |= {f"{sae_name} |{key}|": torch.zeros(len(acts.text.tokens)).double().index_add(0, owner, values.double())
             for key, values in lengths.items()}
ids = regression.clusters(acts.text.source)
totals = regression.resample(sums, ids, p.bootstrap, p.seed)
effective, n = float(totals["effective"][0]), int(totals["n"][0])

# %%
def estimate(draws: torch.Tensor) -> tuple[float, float | None, float | None]:
    """Value and 95% interval of draws [1 + n]."""
    return scaling.estimate(draws.numpy(), effective)


def shares(sae_name: str, part: str) -> dict[str, torch.Tensor]:
    """Percent of the loss gap, of variance and of norm that a part of this SAE's error stands for, draw by draw."""
    other = "linear" if part == "nonlinear" else "nonlinear"
    length = {key: totals[f"{sae_name} |{key}|"] for key in ("error²", "linear²", "nonlinear²", "linear", "nonlinear")}
    return {"loss gap": downstream.recovered(totals, f"{sae_name} sae", f"{sae_name} {part}"),
            "variance": 100 * (1 - length[f"{other}²"] / length["error²"]),
            "norm": 100 * length[part] / (length["linear"] + length["nonlinear"])}


found = pd.DataFrame([
    {"sae": each.name, "width": each.width, "L0": each.k or float((each(x)[1]).double().mean()), "part": part, "measure": measure,
     **dict(zip(("value", "low", "high"), estimate(draws), strict=True))}
    for each in opened.values() for part in ("linear", "nonlinear") for measure, draws in shares(each.name, part).items()])
gap = {each: estimate((totals[f"{each} sae"] - totals["x"]) / totals["n"]) for each in opened}
unit = "sources" if len(set(acts.text.source)) >= regression.MIN_SOURCES else "blocks of contexts"
basis = f"{n:,} tokens of {len(chosen)} held-out contexts, {int(totals['sources'][0])} {unit}"

# %% tags=["hide-input"]
def cells(part: str, measure: str) -> list[str]:
    """Value and interval of a share, one string an SAE."""
    these = found[(found["part"] == part) & (found["measure"] == measure)].set_index("sae").loc[list(opened)]
    return [interval(*row, 1) for row in these[["value", "low", "high"]].to_numpy()]


plain_loss, without = totals["x"] / totals["n"], totals["mean"] / totals["n"]
listed = found.drop_duplicates("sae")
display(figures.table(pd.DataFrame({
    "width": listed["width"], "L0": listed["L0"], "loss gap, nats": [interval(*gap[each]) for each in opened],
    "+ LinearError: loss, %": cells("linear", "loss gap"), "variance, %": cells("linear", "variance"),
    "+ NonlinearError: loss, %": cells("nonlinear", "loss gap"), " variance, %": cells("nonlinear", "variance"),
}), f"The loss that Sae(x) adds, and the share of it that each part of the error gives back, beside the part's share of the "
    f"variance of the error. n = {basis}.", "tab-downstream", digits={"L0": 0}))
scale = estimate(100 * (without - totals[f"{name} sae"] / totals["n"]) / (without - plain_loss))
prose(f"""
The model's own loss on these tokens is {interval(*estimate(plain_loss))} nats. With the mean activation in every place it
would be {interval(*estimate(without))}. Of that difference, `{name}` keeps {interval(*scale, 1)}%.
""")

# %% tags=["hide-input"]
COLOURS = {"linear": "blue", "nonlinear": "orange"}


def drawn(these: pd.DataFrame, x_title: str, settings: list[str]) -> go.Figure:
    """Bars of the loss recovered by each part, with marks for its share of variance and of norm."""
    fig = go.Figure()
    for side, part in ((-0.2, "linear"), (0.2, "nonlinear")):
        of = {measure: these[(these["part"] == part) & (these["measure"] == measure)] for measure in ("loss gap", "variance", "norm")}
        place = np.arange(len(settings)) + side
        bars = of["loss gap"]
        error = {"type": "data", "symmetric": False, "array": bars["high"] - bars["value"], "arrayminus": bars["value"] - bars["low"],
                 "color": figures.colour("grey"), "thickness": 1.6, "width": 4}
        fig.add_bar(x=place, y=bars["value"], width=0.36, name=f"+ {part.capitalize()}Error",
                    marker_color=figures.colour(COLOURS[part], 0.6), error_y=error if bars["low"].notna().all() else None)
        for measure, symbol in (("variance", "diamond"), ("norm", "line-ew")):
            fig.add_scatter(x=place - 0.1, y=of[measure]["value"], mode="markers", name=f"share of {measure}", legendgroup=measure,
                            showlegend=side < 0, marker={"symbol": symbol, "size": 9 if symbol == "diamond" else 14,
                                                         "color": figures.colour("grey"), "line": {"width": 2, "color": figures.colour("grey")}})
    fig.update_xaxes(title_text=x_title, tickvals=list(range(len(settings))), ticktext=settings)
    return fig.update_yaxes(title_text="% of the loss gap recovered", rangemode="tozero").update_layout(barmode="overlay")


def shown(these: pd.DataFrame, label: str, x_title: str, settings: list[str], words: str) -> None:
    """One of the two panels of the paper's Figure 9."""
    loss = these[these["measure"] == "loss gap"]
    display(figures.finish(
        drawn(these, x_title, settings), label, f"The share of the loss gap that each part of the error gives back, {words}. "
        f"Bars: 95% intervals over {unit}. Marks: the part's share of variance and of norm. n = {basis}.",
        "; ".join(f"{row.part} at {row.width:,}, L0 {row.L0:.0f}: {row.value:.0f}% of the loss" for row in loss.itertuples()),
        paper="Figure 9"))


ladder = scaling.ladder(pd.DataFrame({"sae": list(opened), "width": listed["width"].to_numpy(), "k": listed["L0"].to_numpy(),
                                      "l0": listed["L0"].to_numpy()}))
by_width = found[found["sae"].isin(ladder["sae"])].sort_values("width", kind="stable")
if len(ladder) > 1:
    shown(by_width, "fig-downstream-width", figures.WIDTH, [f"{w:,}" for w in ladder["width"]],
          f"by width, at L0 {ladder['l0'].mean():.0f}")
else:
    display(prose("This run has one width only, so the figure by width is left out."))

# %% tags=["hide-input"]
most = listed.groupby("width")["L0"].nunique().idxmax()
by_l0 = found[found["width"] == most].sort_values("L0", kind="stable")
if by_l0["L0"].nunique() > 1:
    shown(by_l0, "fig-downstream-l0", "L0 (active latents a token)", [f"{k:.0f}" for k in by_l0["L0"].unique()],
          f"by L0, at width {most:,}")
else:
    display(prose("No width of this run has SAEs at more than one L0, so the figure by L0 is left out."))

# %% tags=["hide-input"]
both = {each: estimate(downstream.recovered(totals, f"{each} sae", f"{each} linear")
                       + downstream.recovered(totals, f"{each} sae", f"{each} nonlinear")) for each in opened}
low_sum, high_sum = min(both.values())[0], max(both.values())[0]
apart = sum(one[1] is not None and one[1] > 100 for one in both.values())
per = {part: by_width[(by_width["part"] == part) & (by_width["measure"] == "loss gap")]["value"] for part in COLOURS}
prose(f"""
{f"From the narrowest to the widest SAE, LinearError gives back {per['linear'].iloc[0]:.0f}% and {per['linear'].iloc[-1]:.0f}%, and "
 f"NonlinearError {per['nonlinear'].iloc[0]:.0f}% and {per['nonlinear'].iloc[-1]:.0f}%." if len(ladder) > 1 else ''}
The two shares need not add up to 100%: over the SAEs their sum goes from {low_sum:.0f}% to {high_sum:.0f}%
(`{name}`: {interval(*both[name], 0)}%), and for {apart} of {len(both)} SAEs its interval lies above 100%.
{'A sum above 100% means that the first half of a repair is worth more than the second: the loss grows faster than in '
 'proportion to what is missing.' if apart > len(both) / 2 else ''}
""")

# %% [markdown]
# ## Length is not enough
#
# The controls, on one SAE. Adding a vector that has only the right length should not repair anything. If it does harm, the
# bar goes below zero.

# %%
kinds = {"the part itself": "", "another token's": ", another token's", "random": ", random"}
controls = pd.DataFrame([
    {"part": f"{part.capitalize()}Error", "added": kind,
     **dict(zip(("value", "low", "high"), estimate(downstream.recovered(totals, f"{name} sae", f"{name} {part}{suffix}")), strict=True))}
    for part in COLOURS for kind, suffix in kinds.items()])
harm = {label: (totals[label] - totals["x"]) / totals["n"] for label in (f"{name} sae", "x + random")}
times = harm[f"{name} sae"] / harm["x + random"]

# %% tags=["hide-input"]
fig = figures.bars_by_setting(controls, "part", group="added", y_title="% of the loss gap recovered")
figures.finish(
    fig, "fig-downstream-controls", f"The share of the loss gap of `{name}` that is recovered by adding to Sae(x) a part of its "
    f"error, the same part of another token, and a random vector of the part's length. 95% intervals over {unit}; n = {basis}.",
    "; ".join(f"{row.part}, {row.added}: {row.value:.0f}%" for row in controls.itertuples()))

# %% tags=["hide-input"]
value = {(row.part, row.added): (row.value, row.low, row.high) for row in controls.itertuples()}
helps = [f"{part} of another token" for part in ("LinearError", "NonlinearError")
         if (value[part, "another token's"][1] or 0) > 0]
harmful = sum((value[part, kind][2] or 0) < 0 for part in ("LinearError", "NonlinearError") for kind in ("another token's", "random"))
fold = estimate(times)
prose(f"""
A random vector of the right length recovers {interval(*value['LinearError', 'random'], 0)}% in the place of LinearError and
{interval(*value['NonlinearError', 'random'], 0)}% in the place of NonlinearError; another token's part,
{interval(*value['LinearError', "another token's"], 0)}% and {interval(*value['NonlinearError', "another token's"], 0)}%.
{f'{harmful} of these four do harm, their whole intervals below zero.' if harmful else 'None of these four clearly does harm.'}
{f'What still helps: {" and ".join(helps)}, which shares its mean with the right one.' if helps else ''}
So it is the direction of a part at its own token that the model uses.

Is SaeError worse for the model than any error of its length? Gurnee found that SAE errors in GPT-2 move the model's output 2 to 4.5
times as much as random vectors of the same length {{cite:p}}`gurnee2024pathological`. Here Sae(x) costs
{interval(*estimate(harm[f'{name} sae']))} nats and $x$ plus a random vector as long as SaeError costs
{interval(*estimate(harm['x + random']))}: {interval(*fold, 1)} times as much in loss, which is another measure than his.
""")

# %% [markdown]
# ## Agreement with the paper
#
# The claim is that NonlinearError has a *proportional* effect on the loss. How close is proportional, and to which size? The
# paper draws both the share of variance and the share of norm. **This book's reading:** the share of the loss gap that
# NonlinearError recovers is between 0.8 and 1.25 times its share. The range was set before the first run.

# %%
close = (0.8, 1.25)
ratio = {measure: shares(name, "nonlinear")["loss gap"] / shares(name, "nonlinear")[measure] for measure in ("variance", "norm")}
verdicts = {measure: run.claim(
    f"NonlinearError affects the loss in proportion to its share of {measure}.",
    f"share of the loss gap recovered by NonlinearError / its share of {measure}, of {name}", estimate(draws), close, n,
    paper="proportional (read here as: 0.8 to 1.25)") for measure, draws in ratio.items()}

# %% tags=["hide-input"]
display(figures.table(pd.DataFrame({
    "the paper": [f"loss in proportion to the share of {measure}" for measure in ratio],
    "measured": [f"loss share / {measure} share" for measure in ratio],
    "here": [interval(*estimate(draws), 2) for draws in ratio.values()], "agrees if within": ["0.80 to 1.25"] * len(ratio),
    "verdict": [f"**{each}**" for each in verdicts.values()],
}), f"The claim about NonlinearError, for `{name}`. n = {basis}.", "tab-downstream-agreement"))
mine = {measure: estimate(draws) for measure, draws in shares(name, "nonlinear").items()}
side = "more" if mine["loss gap"][0] > mine["variance"][0] else "less"
prose(f"""
For `{name}`, NonlinearError is {interval(*mine['variance'], 0)}% of the variance of the error and {interval(*mine['norm'], 0)}% of the norm, and gives
back {interval(*mine['loss gap'], 0)}% of the loss: {side} than its share of variance. What is left out when only LinearError is given back
points the same way: {number(100 - estimate(shares(name, 'linear')['loss gap'])[0], 0)}% of the gap stays.
{'So NonlinearError is no harmless remainder: a reader of SAEs who discards it discards what the model uses.' if (mine['loss gap'][1] or 0) > 0 else ''}
What differs from the paper: one model of {acts.x.shape[1]} dimensions; {f'the first {positions} kept tokens of each context rather than all'
if positions else 'all kept tokens of each context, as there'}; {len(chosen)} contexts rather than 300; and contexts that $b^*$ has not seen.
""")

# %% tags=["hide-cell"]
for row in found.itertuples():
    run.add(f"share of {row.measure}, {row.part} error, %", row.value, row.low, row.high, n, "tokens", row.sae)
for each, value_of in gap.items():
    run.add("loss gap, nats", *value_of, n, "tokens", each)
    run.add("sum of both shares of the loss gap, %", *both[each], n, "tokens", each)
for row in controls[controls["added"] != "the part itself"].itertuples():
    run.add(f"share of loss gap, {row.part} ({row.added}), %", row.value, row.low, row.high, n, "tokens", name)
run.add("loss that Sae(x) adds / loss that a random error of its length adds", *fold, n, "tokens", name)
run.add("forward passes saved: full passes / shared pass", len(stack) * alone / together, n=1, unit="context")
run.add("floor / shared pass", floor / together, n=1, unit="context")
record = run.finish()
