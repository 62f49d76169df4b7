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
loss_contexts: int = -1  # held-out contexts to run the model on with every SAE; -1: one for 15 of the preset's, at least 3
more_contexts: int = -1  # further held-out contexts, with one SAE and without controls; -1: twice as many
loss_positions: int = -1  # kept tokens of each context that are replaced and scored, from the first on; 0: all; -1: a quarter

# %% tags=["hide-input"]
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import display

from darkmatter import downstream, figures, model, parts, records, reference, regression, saes, scaling, survey
from darkmatter.figures import interval, prose

run = records.start("10_downstream", preset, sae=sae, loss_contexts=loss_contexts, more_contexts=more_contexts,
                    loss_positions=loss_positions)
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
# The model then runs on from there, and its loss is read at the same positions. With $z$ one of the last two, the
# **share of the loss gap recovered** is
#
# $$\frac{\mathrm{CE}(\mathrm{Sae}(x)) - \mathrm{CE}(z)}{\mathrm{CE}(\mathrm{Sae}(x)) - \mathrm{CE}(x)},$$ (eq-recovered)
#
# 0% when giving the part back does not help, 100% when it repairs everything. It is compared with two measures of how
# large the part is. The **share of variance** is the same fraction with the squared error $\lVert x - z\rVert^2$ in the
# place of the loss. The **share of norm** is the part's mean length, divided by the sum of the mean lengths of both parts.
#
# The contexts are of held-out {term}`sources <source>`. $b^*$ is the one of the survey, fitted on the other sources. To run
# the model is most of the work, so all SAEs are compared on some contexts, and one SAE, the one that the claim is tested on,
# on more.

# %%
acts = survey.run(p).acts
fit = survey.fitted_rows(p, acts, survey.PROTOCOLS["strict"])
chosen = downstream.stretches(acts, ~fit, contexts + max(0, further), positions, p.seed)
common = downstream.stretches(acts, ~fit, contexts, positions, p.seed)  # the first ones drawn: they are among the chosen
rows = np.concatenate([np.arange(each.rows.start, each.rows.stop) for each in chosen])
x = acts.x[rows].float()
ends = np.cumsum([each.rows.stop - each.rows.start for each in chosen])
place = {each.context: slice(int(end) - (each.rows.stop - each.rows.start), int(end)) for each, end in zip(chosen, ends, strict=True)}

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
scale = {"mean": average.expand_as(x), "x + random": x + downstream.noise(x - own.sae, p.seed + 3)}


def of_one(stretch: downstream.Stretch) -> dict[str, torch.Tensor]:
    """x, and the three versions of one SAE, for one context."""
    here, each = place[stretch.context], divided[name]
    return {"x": x[here], f"{name} sae": each.sae[here], f"{name} linear": (each.sae + each.linear)[here],
            f"{name} nonlinear": (each.sae + each.nonlinear)[here]}


def of_all(stretch: downstream.Stretch) -> dict[str, torch.Tensor]:
    """Every version of one context's activations."""
    here, found = place[stretch.context], of_one(stretch)
    for sae_name, each in divided.items():
        found |= {f"{sae_name} sae": each.sae[here], f"{sae_name} linear": (each.sae + each.linear)[here],
                  f"{sae_name} nonlinear": (each.sae + each.nonlinear)[here]}
    found |= {f"{name} {part}, {kind}": (own.sae + each)[here] for (part, kind), each in instead.items()}
    return found | {label: each[here] for label, each in scale.items()}


# %% [markdown]
# All versions of a context share the positions before the first kept token, whose keys and values are cached, and everything below the
# site. These run once; then a hook at the site hands a batch of versions to the upper part. A test compares this with a full
# forward pass for each version. Here is what it saves, on one context.

# %%
loaded = model.load(p)
first = common[0]
tokens, kept = acts.text.tokens[first.context], acts.position[first.rows]
stack = torch.stack(list(of_all(first).values()))


def seconds(what: Callable[[], object]) -> float:
    """Of the faster of two calls."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        what()
        taken.append(time.perf_counter() - begun)
    return min(taken)


full = seconds(lambda: model.losses(loaded, tokens[None, :kept[-1] + 1]))
floor = downstream.bound(loaded, p.site, tokens, kept, stack, seconds)
begun = time.perf_counter()
together_losses = downstream.losses(loaded, p.site, tokens, kept, stack)
together = time.perf_counter() - begun
plain = model.losses(loaded, tokens[None])[0, kept]
put_back = float(together_losses[list(of_all(first)).index("x")].mean()) - float(plain.mean())
assert abs(put_back) < 0.02, "putting x back should leave the loss as it was"

# %% tags=["hide-input"]
prose(f"""
{len(stack)} versions of {len(kept)} kept tokens: {together:.1f} s together, where a full forward pass for each would take
{len(stack) * full:.1f} s ({len(stack) * full / together:.1f} times as long). The bound is what they share once and the rest for
every version: {floor:.1f} s from the two timed alone. {'It is reached to within a fifth.'
if together < 1.2 * floor else 'It is not reached on this run; with other work on the machine such timings are rough.'}
With $x$ put back the mean loss of this context changes by {put_back:+.4f} nats, the rounding of {model.dtype_of(p)}.
""")

# %% [markdown]
# ## What each part is worth
#
# Now all contexts. The sums of the loss over each context are all that is kept; the 95% {term}`intervals <bootstrap interval>`
# draw the held-out sources again with replacement, with the same draws for every version, so that shares are compared
# on the same text.

# %%
sums = downstream.measure(loaded, p.site, acts, common, of_all)
rest = [each for each in chosen if each not in common]
more = downstream.measure(loaded, p.site, acts, rest, of_one) if rest else {}
owner = torch.from_numpy(acts.context[rows]).long()
for sae_name, each in divided.items():
    lengths = {"error²": (x - each.sae).double().square().sum(1), "linear²": each.linear.double().square().sum(1),
               "nonlinear²": each.nonlinear.double().square().sum(1), "linear": each.linear.norm(dim=1),
               "nonlinear": each.nonlinear.norm(dim=1)}
    sums |= {f"{sae_name} |{key}|": torch.zeros(len(acts.text.tokens)).double().index_add(0, owner, values.double())
             for key, values in lengths.items()}

# %%
ids = regression.clusters(acts.text.source)
joined = {key: sums[key] + more.get(key, 0) for key in sums if key in ("n", *of_one(first)) or key.startswith(f"{name} |")}
totals = {"common": regression.resample(sums, ids, p.bootstrap, p.seed), "all": regression.resample(joined, ids, p.bootstrap, p.seed)}
effective, n = ({which: float(each[key][0]) for which, each in totals.items()} for key in ("effective", "n"))
unit = "sources" if len(set(acts.text.source)) >= regression.MIN_SOURCES else "blocks of contexts"
basis = {which: f"{n[which]:,.0f} tokens of {len(of)} held-out contexts, {int(totals[which]['sources'][0])} {unit}"
         for which, of in (("common", common), ("all", chosen))}

# %%
def estimate(draws: torch.Tensor, which: str = "common") -> tuple[float, float | None, float | None]:
    """Value and 95% interval of draws [1 + n]."""
    return scaling.estimate(draws.numpy(), effective[which])


def shares(sae_name: str, part: str, which: str = "common") -> dict[str, torch.Tensor]:
    """Percent of the loss gap, of variance and of norm that a part of this SAE's error stands for, draw by draw."""
    of, other = totals[which], "linear" if part == "nonlinear" else "nonlinear"
    length = {key: of[f"{sae_name} |{key}|"] for key in ("error²", "linear²", "nonlinear²", "linear", "nonlinear")}
    return {"loss gap": downstream.recovered(of, f"{sae_name} sae", f"{sae_name} {part}"),
            "variance": 100 * (1 - length[f"{other}²"] / length["error²"]),
            "norm": 100 * length[part] / (length["linear"] + length["nonlinear"])}


l0 = {each.name: float(each.k or each(x)[1].double().mean()) for each in opened.values()}
found = pd.DataFrame([
    {"sae": each.name, "width": each.width, "L0": l0[each.name], "part": part, "measure": measure,
     **dict(zip(("value", "low", "high"), estimate(draws), strict=True))}
    for each in opened.values() for part in ("linear", "nonlinear") for measure, draws in shares(each.name, part).items()])
by_name = totals["common"]
gap = {each: estimate((by_name[f"{each} sae"] - by_name["x"]) / by_name["n"]) for each in opened}

# %% tags=["hide-input"]
def cells(part: str, measure: str) -> list[str]:
    """Value and interval of a share, one string an SAE."""
    these = found[(found["part"] == part) & (found["measure"] == measure)].set_index("sae").loc[list(opened)]
    return [interval(*row, 1) for row in these[["value", "low", "high"]].to_numpy()]


plain_loss, without = by_name["x"] / by_name["n"], by_name["mean"] / by_name["n"]
listed = found.drop_duplicates("sae")
display(figures.table(pd.DataFrame({
    "width": listed["width"], "L0": listed["L0"], "loss gap, nats": [interval(*gap[each]) for each in opened],
    "+ LinearError: loss, %": cells("linear", "loss gap"), "variance, %": cells("linear", "variance"),
    "+ NonlinearError: loss, %": cells("nonlinear", "loss gap"), " variance, %": cells("nonlinear", "variance"),
}), f"The loss that Sae(x) adds, and the share of it that each part of the error gives back, beside the part's share of the "
    f"variance of the error. n = {basis['common']}.", "tab-downstream", digits={"L0": 0}))
kept_share = estimate(100 * (without - by_name[f"{name} sae"] / by_name["n"]) / (without - plain_loss))
prose(f"""
The model's own loss on these tokens is {interval(*estimate(plain_loss))} nats. With the mean activation in every place it
would be {interval(*estimate(without))}. Of that difference, `{name}` keeps {interval(*kept_share, 1)}%.
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
        f"Bars: 95% intervals over {unit}. Marks: the part's share of variance and of norm. n = {basis['common']}.",
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
both = {each: estimate(shares(each, "linear")["loss gap"] + shares(each, "nonlinear")["loss gap"]) for each in opened}
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
     **dict(zip(("value", "low", "high"), estimate(downstream.recovered(by_name, f"{name} sae", f"{name} {part}{suffix}")), strict=True))}
    for part in COLOURS for kind, suffix in kinds.items()])
harm = {label: (by_name[label] - by_name["x"]) / by_name["n"] for label in (f"{name} sae", "x + random")}
times = harm[f"{name} sae"] / harm["x + random"]

# %% tags=["hide-input"]
fig = figures.bars_by_setting(controls, "part", group="added", y_title="% of the loss gap recovered")
figures.finish(
    fig, "fig-downstream-controls", f"The share of the loss gap of `{name}` that is recovered by adding to Sae(x) a part of its "
    f"error, the same part of another token, and a random vector of the part's length. 95% intervals over {unit}; n = {basis['common']}.",
    "; ".join(f"{row.part}, {row.added}: {row.value:.0f}%" for row in controls.itertuples()))

# %% tags=["hide-input"]
value = {(row.part, row.added): (row.value, row.low, row.high) for row in controls.itertuples()}
helps = [f"{part} of another token" for part in ("LinearError", "NonlinearError")
         if (value[part, "another token's"][1] or 0) > 0]
harmful = sum((value[part, kind][2] or 0) < 0 for part in ("LinearError", "NonlinearError") for kind in ("another token's", "random"))
own_direction = all((value[part, "the part itself"][1] or -np.inf) > (np.inf if value[part, kind][2] is None else value[part, kind][2])
                    for part in ("LinearError", "NonlinearError") for kind in ("another token's", "random"))
fold = estimate(times)
prose(f"""
A random vector of the right length recovers {interval(*value['LinearError', 'random'], 0)}% in the place of LinearError and
{interval(*value['NonlinearError', 'random'], 0)}% in the place of NonlinearError; another token's part,
{interval(*value['LinearError', "another token's"], 0)}% and {interval(*value['NonlinearError', "another token's"], 0)}%.
{f'{harmful} of these four do harm, their whole intervals below zero.' if harmful else 'None of these four clearly does harm.'}
{f'What still helps: {" and ".join(helps)}, which shares its mean with the right one.' if helps else ''}
{'Each part itself does better than any of its stand-ins, beyond the intervals: it is the direction of a part at its own token that the '
 'model uses.' if own_direction else 'On this text the intervals of the parts and of their stand-ins overlap.'}

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
mine = shares(name, "nonlinear", "all")
ratio = {measure: mine["loss gap"] / mine[measure] for measure in ("variance", "norm")}
verdicts = {measure: run.claim(
    f"NonlinearError affects the loss in proportion to its share of {measure}.",
    f"share of the loss gap recovered by NonlinearError / its share of {measure}, of {name}", estimate(draws, "all"), close,
    int(n["all"]), paper="proportional (read here as: 0.8 to 1.25)") for measure, draws in ratio.items()}

# %% tags=["hide-input"]
def beside_one(value: float, low: float | None, high: float | None) -> str:
    """What the interval of a ratio says of it."""
    return "less than" if high is not None and high < 1 else "more than" if low is not None and low > 1 else "not clearly more or less than"


of_ratio = {measure: estimate(draws, "all") for measure, draws in ratio.items()}
display(figures.table(pd.DataFrame({
    "the paper": [f"loss in proportion to the share of {measure}" for measure in ratio],
    "measured": [f"loss share / {measure} share" for measure in ratio],
    "here": [interval(*each, 2) for each in of_ratio.values()], "agrees if within": ["0.80 to 1.25"] * len(ratio),
    "verdict": [f"**{each}**" for each in verdicts.values()],
}), f"The claim about NonlinearError, for `{name}`. n = {basis['all']}.", "tab-downstream-agreement"))
own_share = {measure: estimate(draws, "all") for measure, draws in mine.items()}
stays = estimate(100 - shares(name, "linear", "all")["loss gap"], "all")
open_ones = [f"its share of {measure}, from {of_ratio[measure][1]:.2f} to {of_ratio[measure][2]:.2f}" for measure, said in verdicts.items()
             if said == "cannot say" and p.name != "smoke" and of_ratio[measure][1] is not None]
prose(f"""
For `{name}`, NonlinearError is {interval(*own_share['variance'], 0)}% of the variance of the error and {interval(*own_share['norm'], 0)}% of the norm,
and gives back {interval(*own_share['loss gap'], 0)}% of the loss gap: {beside_one(*of_ratio['variance'])} its share of variance,
{beside_one(*of_ratio['norm'])} its share of norm. Where it is left out and only LinearError is given back, {interval(*stays, 0)}% of the gap stays.
{'So NonlinearError is no harmless remainder: the model uses it.' if (own_share['loss gap'][1] or 0) > 0 else ''}
{f'Where the verdict is open, the interval reaches beyond an end of the range (for {" and ".join(open_ones)}): the loss of {int(n["all"]):,} tokens is too few to tell.' if open_ones else ''}
What differs from the paper: one model of {acts.x.shape[1]} dimensions; {f'the first {positions} kept tokens of each context rather than all'
if positions else 'all kept tokens of each context, as there'}; {len(chosen)} contexts rather than 300; and contexts that $b^*$ has not seen.
""")

# %% tags=["hide-cell"]
for row in found.itertuples():
    run.add(f"share of {row.measure}, {row.part} error, %", row.value, row.low, row.high, int(n["common"]), "tokens", row.sae)
for each, value_of in gap.items():
    run.add("loss gap, nats", *value_of, int(n["common"]), "tokens", each)
    run.add("sum of both shares of the loss gap, %", *both[each], int(n["common"]), "tokens", each)
for row in controls[controls["added"] != "the part itself"].itertuples():
    run.add(f"share of loss gap, {row.part} ({row.added}), %", row.value, row.low, row.high, int(n["common"]), "tokens", name)
run.add("loss that Sae(x) adds / loss that a random error of its length adds", *fold, int(n["common"]), "tokens", name)
run.add_timing("forward passes saved: full passes / shared pass", len(stack) * full / together, n=1, unit="context")
run.add_timing("floor / shared pass", floor / together, n=1, unit="context")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
