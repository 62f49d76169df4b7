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
# # How fast, and how far from the limit
#
# Measuring an SAE's error takes one pass of the model over the text and one product with each SAE's
# encoder. Nothing that this book computes can do without those two. **How much time and memory does
# everything else add? And how does it compare with the obvious way of doing the same?**
#
# The obvious way is the paper's own formulation, written afresh: hold all activations in memory,
# solve least squares anew for each SAE, give every atom of the {term}`dictionary` a weight in
# gradient pursuit, run the whole model for every vector put in. `make bench` measures both ways and
# writes down what it found. This page only reads those {term}`records <record>`.
#
# Three rules hold for every figure below.
#
# - First both sides do the work once, and their answers are compared. A row whose answers differ is
#   not timed.
# - Both sides are then timed in turn, in one process on one machine. A **pair** is one run of
#   each, and a ratio is taken within a pair, so that a machine that slows down slows both. What is
#   shown is the median ratio over pairs with the smallest and the largest; from 8 pairs on, with
#   the quartiles.
# - Each row has a target that was set before it was measured.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
bench: str = ""  # folder of the records to show; left out: artifacts/bench of this checkout

# %% tags=["hide-input"]
import json
import math
import re
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter.book import figures, records
from darkmatter.book.figures import colour, number, prose

run = records.start("17_speed", preset, bench=bench)

# %%
folder = Path(bench).expanduser() if bench else records.HOME / "artifacts" / "bench"
SIZES = ("default", "gemma")  # others are rehearsals
ORDER = ["regression", "ladder", "survey", "survey-ladder", "survey-memory", "pursuit",
         "cross-entropy", "training", "book", "cost-contexts", "cost-saes"]


def named(hardware: dict) -> str:
    """A machine in a few words, such as 'AMD EPYC, 2 cores'."""
    maker = hardware.get("gpu", hardware["processor"])
    maker = re.sub(r"\(R\)|\(TM\)| Processor| CPU| \d+GB.*| @.*", "", maker).strip()
    return maker if "gpu" in hardware else f"{maker}, {hardware['cores']} cores"


machines, every = {}, []
for path in sorted(folder.glob("*.json")):
    content = json.loads(path.read_text())
    if isinstance(content, dict) and "rows" in content:
        name = named(content["hardware"])
        name = f"{name} ({path.stem})" if name in machines else name
        # A row of an older record may be about a way of working that the package no longer has.
        rows = [row | {"machine": name} for row in content["rows"].values()
                if row["shapes"] in SIZES and not row.get("through_codes")]
        machines |= {name: content["hardware"]} if rows else {}
        every += rows
every.sort(key=lambda row: (row["machine"], row["shapes"], ORDER.index(row["row"])))
done = [row for row in every if "ratio" in row]

# %%
def label(row: dict) -> str:
    """A row in a few words."""
    case = f" ({row['case']})" if row["case"] else ""
    return row["row"].replace("-", " ") + case


def on(machine: str) -> str:
    """', MACHINE', where there are several."""
    return f", {machine}" if len(machines) > 1 else ""


def lines_of(row: dict) -> list[dict]:
    """A record as one line of the board, or two where its memory has a target of its own."""
    line = {"machine": row["machine"], "row": label(row), "sense": row["sense"],
            "pairs": row["pairs"], "seconds": row.get("ours_seconds"),
            "baseline": row.get("baseline_seconds"),
            **{key: row[key] for key in ("ratio", "low", "high", "target")}}
    if not (row.get("target_memory") and "memory_ratio" in row):
        return [line]
    memory = dict.fromkeys(("ratio", "low", "high"), row["memory_ratio"])
    return [line, line | memory | {"row": f"{line['row']}: memory", "sense": "of", "pairs": 1,
                                   "target": row["target_memory"], "seconds": None,
                                   "baseline": None}]


# %% [markdown]
# How far a ratio is beyond its target is again a ratio: 1 where the target is just met, more where
# it is beaten. For speed it is the ratio divided by the target, for a floor or for memory the
# target divided by the ratio.

# %%
NUMBERS = ["ratio", "low", "high", "target", "seconds", "baseline"]
board = pd.DataFrame([line for row in done for line in lines_of(row)],
                     columns=["machine", "row", "sense", "pairs", *NUMBERS])
board[NUMBERS] = board[NUMBERS].astype(float)
faster = board["sense"] == "times"
for end in ("ratio", "low", "high"):
    beyond = (board[end] / board["target"]).where(faster, board["target"] / board[end])
    board[f"beyond_{end}"] = beyond
aimed = board[board["target"].notna()]
reached = aimed["beyond_ratio"] >= 1

# %%
def described(machine: str) -> str:
    """A machine's processor, memory and what it measured, in words."""
    hardware, here = machines[machine], aimed["machine"] == machine
    gpu = ""
    if "gpu" in hardware:
        gpu = f"{hardware['gpu']} with {hardware['gpu_memory_gib']:.0f} GiB, and "
    missed = ", ".join(aimed["row"][here & ~reached])
    which_missed = f"; not reached: {missed}" if missed else ""
    return (f"- **{machine}**: {gpu}{hardware['processor']}, {hardware['cores']} cores, "
            f"{hardware.get('memory_gib', 0):.0f} GiB. {(here & reached).sum()} of {here.sum()} "
            f"targets reached{which_missed}.")


failed = [f"{label(row)}{on(row['machine'])} ({row['error'][:120]})"
          for row in every if "error" in row]
if done:
    dates = sorted({row["when"][:10] for row in done})
    when = f"on {dates[0]}" if len(dates) == 1 else f"between {dates[0]} and {dates[-1]}"
    lines = [f"The figures were taken {when}. Of {len(aimed)} figures with a target, "
             f"**{reached.sum()} reach it and {(~reached).sum()} do not**.",
             "\n".join(map(described, machines))]
    lines += [f"Not measured, because the row failed: {'; '.join(failed)}."] if failed else []
    if any("gpu" in hardware for hardware in machines.values()):
        lines.append("The targets were set for two cores. On a GPU the same rows have the sizes of "
                     "Gemma 2 with Gemma Scope, on random numbers, and the other way of doing the "
                     "work runs there too.")
else:
    lines = ["**Nothing has been measured yet in this checkout**: there are no records in "
             "`artifacts/bench/`. `make bench` makes them; on two cores it takes an hour or two, "
             "during which nothing else should run. The rest of this page fills itself from them."]
prose("\n\n".join(lines))

# %% tags=["hide-input"]
HUES = list(figures.COLOURS)
TICKS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
fig = go.Figure()
shown = aimed.iloc[::-1]
for place, (machine, rows) in enumerate(shown.groupby("machine", sort=False)):
    middle, ends = rows["beyond_ratio"], rows[["beyond_low", "beyond_high"]]
    fig.add_scatter(
        x=middle, y=rows["row"].str.replace(" (", "<br>(", regex=False), name=machine,
        mode="markers", error_x={"symmetric": False, "array": ends.max(axis=1) - middle,
                                 "arrayminus": middle - ends.min(axis=1)},
        marker={"size": 10, "symbol": place, "color": colour(HUES[place % len(HUES)])},
        customdata=rows[["ratio", "target"]],
        hovertemplate="%{y}: %{customdata[0]:.3g}, target %{customdata[1]:.3g}")
fig.add_vline(x=1, line_width=1.5, line_dash="dash", line_color=colour("grey"))
fig.update_xaxes(title_text="ratio over its target", type="log", tickvals=TICKS,
                 ticktext=[f"{tick:g}" for tick in TICKS])
fig.update_yaxes(title_text="", type="category").update_layout(showlegend=len(machines) > 1)
far = "; ".join(f"{row.row}{on(row.machine)} {row.beyond_ratio:.2f}" for row in shown.itertuples())
figures.finish(fig, "fig-speed", "Every row with a target: how far its ratio is beyond the target. "
               "Right of the dashed line a target is reached. Points are medians over pairs; bars "
               "run from the smallest to the largest pair (quartiles where there are at least 8 "
               "pairs; rows measured once have none).", f"{far} times its target.",
               height=max(260, 90 + 40 * shown["row"].nunique())) if len(shown) else None

# %% [markdown]
# ## Every row
#
# *Times* means how many times as fast as the other side; more is better. *Of* means the share of
# the other side, or how far above a floor; less is better.

# %%
sides = {row["row"]: row for row in reversed(done)}
if done:
    display(figures.table(pd.DataFrame([{
        "row": name.replace("-", " "), "what": sides[name]["what"],
        "against": sides[name]["against"]} for name in ORDER if name in sides]),
        "What is measured, and the other side.", "tab-speed-sides"))

# %%
def seconds(taken: float) -> str:
    """To three digits: rows take from milliseconds to an hour."""
    return number(taken, max(0, 2 - math.floor(math.log10(taken))) if taken > 0 else 2)


def measured(line: pd.Series) -> str:
    """A ratio with its spread; the unit tells which way is better."""
    spread = number(line["ratio"], 2)
    if line["pairs"] > 1:
        spread = figures.interval(line["ratio"], line["low"], line["high"], 2)
    unit = "times" if line["sense"] == "times" else "of it"
    return f"{spread} {unit}"


def goal(line: pd.Series) -> str:
    """The target, and whether it is reached."""
    if pd.isna(line["target"]):
        return "–"
    outcome = "reached" if line["beyond_ratio"] >= 1 else "**not reached**"
    return f"{line['target']:.3g}, {outcome}"


for place, (machine, lines) in enumerate(board.groupby("machine", sort=False), start=1):
    display(figures.table(pd.DataFrame({
        "row": lines["row"], "measured": lines.apply(measured, axis=1),
        "target": lines.apply(goal, axis=1), "seconds": lines["seconds"].map(seconds),
        "the other side's": lines["baseline"].map(seconds), "pairs": lines["pairs"]}),
        f"All rows on {machine}, with the median seconds of each side. Brackets: smallest and "
        "largest pair, or the quartiles of at least 8.", f"tab-speed-{place}"))

# %% [markdown]
# ## What bounds each row
#
# A ratio to another way of doing the same thing says little about what could still be gained. For
# some rows the work that no method can avoid was timed alone. In the regressions our side decodes
# each SAE's codes and the other side is given the errors; on a GPU decoding takes nearly as long
# as the products.

# %%
def bound(row: dict) -> tuple[str, str, str] | None:
    """The work that remains, how long it takes alone, and what follows; None where not timed."""
    if "encoders_seconds" in row:
        forward, encoders = row["forward_seconds"], row["encoders_seconds"]
        rest, alone = row["ours_seconds"] - forward - encoders, f"{number(encoders, 2)} s"
        so = f"{number(rest, 2)} s is all else"
        if rest < 0:
            so = f"{number(-rest, 2)} s less: within the noise of two timings"
        if row["sizes"].get("source") == "random":  # activations that no model was run for
            return "the encoder products", alone, so
        return "one forward pass and the encoder products", f"{number(forward, 2)} s + {alone}", so
    if "products_seconds" in row:
        gain = row["baseline_seconds"] / row["products_seconds"]
        return ("half of XᵀX, each SAE's XᵀSaeError and predictions held out, in float32",
                f"{number(row['products_seconds'], 2)} s",
                f"the products alone would be {number(gain, 2)} times as fast as the baseline")
    if "floor_tokens_a_second" in row:
        share = row["tokens_a_second"] / row["floor_tokens_a_second"]
        return ("the inner products with all atoms",
                f"{row['floor_tokens_a_second']:,.0f} tokens a second",
                f"{row['tokens_a_second']:,.0f} tokens a second: {share:.0%} of that")
    if "bound_seconds" in row:
        return ("the model below the site once, above it once a variant",
                f"{number(row['bound_seconds'], 2)} s",
                f"{number(row['above_bound'], 2)} times the bound; at the bound the ratio would be "
                f"{number(row['bound_ratio'], 2)}")
    return None


# %%
bounds = [(f"{label(row)}{on(row['machine'])}", *bound(row), row["ours_seconds"])
          for row in done if bound(row)]
if bounds:
    columns = ["row", "the work that remains", "alone", "so", "seconds in all"]
    display(figures.table(pd.DataFrame(bounds, columns=columns), "What is left to gain. The parts "
                          "were timed alone, in the same run.", "tab-bounds", digits=2))

# %%
def agreement(row: dict) -> str:
    """How near the two sides' answers are, in words; '' where nothing was compared."""
    if row["row"] in ("regression", "ladder"):
        return f"R² differs by {row['difference']:.1e} at most"
    if row["row"].startswith("survey") and "difference" in row:
        return ("squared norms differ from sae-lens's own by "
                f"{row['difference']:.1e} at most on 99% of tokens")
    if "same_atoms" in row:
        return f"{row['same_atoms']:.1%} of tokens have the same atoms"
    if "fvu" in row:
        stock, ours = row["fvu"]["stock"], row["fvu"]["ours"]
        return f"final FVU {stock:.4f} and {ours:.4f} after {row['steps']} steps"
    return f"mean loss differs by {row['difference']:.1e} nats" if "bound_seconds" in row else ""


if done:
    display(figures.table(pd.DataFrame([
        {"row": f"{label(row)}{on(row['machine'])}", "both sides": agreement(row)}
        for row in done if agreement(row)]), "That both sides give the same answer was checked "
        "before they were timed.", "tab-agreement"))

# %% [markdown]
# ## Memory, and how cost grows
#
# The survey reads its text in batches and keeps sums, so its memory should not depend on how much
# text there is, and its time should grow in proportion.

# %%
peaks = [{"row": f"{label(row)}{on(row['machine'])}", "side": side, "MiB": mib}
         for row in done for side, mib in row.get("memory_mib", {}).items()]
if peaks:
    display(figures.table(pd.DataFrame(peaks), "Peak memory beside what was held before (weights, "
                          "or the inputs that both sides share), each side in a process of its "
                          "own.", "tab-peaks", digits=0))

# %% tags=["hide-input"]
growing = [row for row in done if "points" in row]
fig = go.Figure()
for place, row in enumerate(growing):
    points, cost, hue = pd.DataFrame(row["points"]), row["cost"], colour(HUES[place % len(HUES)])
    least = points.iloc[0]
    ends = points["n"].iloc[[0, -1]]
    fig.add_scatter(x=points["n"] / least["n"], y=points["seconds"] / least["seconds"],
                    mode="markers", marker={"size": 10, "symbol": place, "color": hue},
                    name=f"{row['over']}{on(row['machine'])}",
                    customdata=points[["n", "seconds", "mib"]],
                    hovertemplate="%{customdata[0]}: %{customdata[1]:.1f} s, "
                                  "%{customdata[2]:,.0f} MiB")
    fitted = (cost["slope"] * ends + cost["intercept"]) / least["seconds"]
    for y, style in ((fitted, {"color": hue, "width": 1.5}), (
            ends / least["n"], {"color": colour("grey"), "width": 1, "dash": "dot"})):
        fig.add_scatter(x=ends / least["n"], y=y, mode="lines", line=style, showlegend=False,
                        hoverinfo="skip")
fig.update_xaxes(title_text="times as much")
fig.update_yaxes(title_text="times as long", rangemode="tozero")
took = [f"{row['over']}: " + ", ".join(f"{p['n']} in {p['seconds']:.0f} s" for p in row["points"])
        for row in growing]
figures.finish(fig, "fig-cost", "Time of the survey against the number of contexts and of SAEs, "
               "relative to the smallest. Lines are fitted; the dotted one is proportional cost.",
               f"{'; '.join(took)}.") if growing else None

# %%
prose("\n".join(
    f"- **{row['over']}**{on(row['machine'])}: {number(row['cost']['slope'], 2)} s for each more, "
    f"plus {number(row['cost']['intercept'], 1)} s ($R^2$ of the line {number(row['cost']['r2'])})"
    f"; cost grows as $n$ to the power {number(row['cost']['power'], 2)}. Memory at the largest is "
    f"{number(row['memory_growth'], 2)} times that at the smallest." for row in growing))

# %% [markdown]
# ## On a GPU, at the paper's sizes
#
# `python -m benchmarks.full_size gemma-2-2b` builds the paper's model with random weights and a
# random JumpReLU SAE of full size, and surveys it on 300 contexts of random tokens. Real weights
# would change neither time nor memory but through the number of active latents. The floor is one
# forward pass to the site and one encoder product, each timed alone.

# %%
full = json.loads((records.HOME / "artifacts" / "full-size.json").read_text())
columns = {f"run {place}": {
    "model": survey["size"], "GPU": survey["device"],
    "SAE widths": ", ".join(f"{width:,}" for width in survey["widths"]),
    "mean L0": number(survey["l0"][0], 0), "kept tokens": f"{survey['kept']:,}",
    "forward pass": f"{number(survey['forward_seconds'], 2)} s",
    "encoder": f"{number(sum(survey['encoder_seconds']), 2)} s",
    "all of it": f"{number(survey['total_seconds'], 1)} s",
    "all / floor": number(survey["ratio"], 1),
    "GPU memory beside weights": f"{number(survey['peak_bytes_beside_weights'] / 1e9, 2)} GB",
    "x and the error in float32": f"{number(survey['held_in_memory_bytes'] / 1e9, 2)} GB",
} for place, survey in enumerate(full, start=1)}
figures.table(pd.DataFrame(columns).rename_axis("").reset_index(), "One survey from nothing at "
              "full size: seconds, and memory on the GPU beside the weights of model and SAE, next "
              "to what holding $x$ and the error would take. One run each.", "tab-speed-full-size")

# %%
took = "; ".join(f"{number(survey['total_seconds'], 1)} s for {survey['size']} (SAEs: "
                 f"{len(survey['widths'])}), {number(survey['ratio'], 1)} times the floor"
                 for survey in full)
prose(f"The survey took {took}. Beside the forward pass it writes the activations to disk with "
      "their checksums, writes the codes of all active latents, and reads both three times.")

# %%
for line in board.to_dict("records"):
    run.add_timing(f"speed: {line['row']}, {line['machine']}", line["ratio"], n=line["pairs"],
                   unit="pairs")
run.add("targets reached", int(reached.sum()), n=len(aimed), unit="figures with a target")
record = run.finish()
