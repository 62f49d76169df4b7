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
# Measuring an SAE's error takes one pass of the model over the text and one product with each SAE's encoder. Nothing that this
# book computes can do without those two. **How much time and memory does everything else add? And how does it compare with the
# obvious way of doing the same?**
#
# The obvious way is the paper's own formulation, written afresh: hold all activations in memory, solve least squares anew for
# each SAE, give every atom of the {term}`dictionary` a weight in gradient pursuit, run the whole model for every vector put in.
# `make bench` measures both ways and writes down what it found. This page only reads those {term}`records <record>`.
#
# Three rules hold for every figure below.
#
# - First both sides do the work once, and their answers are compared. A row whose answers differ is not timed.
# - Both sides are then timed in turn, in one process on one machine. A **pair** is one run of each, and a ratio is taken within
#   a pair, so that a machine that slows down slows both. What is shown is the median ratio over pairs with the smallest
#   and the largest; from 8 pairs on, with the quartiles.
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

from darkmatter import figures, records
from darkmatter.figures import colour, number, prose

run = records.start("17_speed", preset, bench=bench)
folder = Path(bench).expanduser() if bench else records.HOME / "artifacts" / "bench"
SIZES = {"default": "", "gemma": "full size"}  # other sizes are rehearsals
ORDER = ["regression", "ladder", "survey", "survey-ladder", "survey-memory", "pursuit", "cross-entropy", "training", "book",
         "cost-contexts", "cost-saes"]


def named(hardware: dict) -> str:
    """A machine in a few words, such as 'AMD EPYC, 2 cores'."""
    maker = re.sub(r"\(R\)|\(TM\)| Processor| CPU| \d+GB.*| @.*", "", hardware.get("gpu", hardware["processor"])).strip()
    return maker if "gpu" in hardware else f"{maker}, {hardware['cores']} cores"


machines, every = {}, []
for path in sorted(folder.glob("*.json")):
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or "rows" not in content:
        continue
    name = named(content["hardware"])
    name = f"{name} ({path.stem})" if name in machines else name
    rows = [row | {"machine": name} for row in content["rows"].values() if row["shapes"] in SIZES]
    machines |= {name: content["hardware"]} if rows else {}
    every += rows
every.sort(key=lambda row: (row["machine"], row["shapes"], ORDER.index(row["row"])))
done = [row for row in every if "ratio" in row]
failed = [row for row in every if "error" in row]

# %% tags=["hide-input"]
prose("""
**Nothing has been measured yet in this checkout**: there are no records in `artifacts/bench/`. `make bench` makes them; on two cores it
takes an hour or two, during which nothing else should run. The rest of this page fills itself from them.
""") if not every else None


# %% tags=["hide-input"]
def met(ratio: float, target: float | None, sense: str) -> float | None:
    """How far beyond its target a ratio is: 1 where it is just met, more where it is beaten; None without a target."""
    return None if target is None else ratio / target if sense == "times" else target / ratio


def label(row: dict) -> str:
    """A row in a few words."""
    return " ".join(filter(None, [row["row"].replace("-", " "), f"({row['case']})" if row["case"] else ""]))


def on(machine: str) -> str:
    """', MACHINE', where there are several."""
    return f", {machine}" if len(machines) > 1 else ""


def without_machine(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose rows are all of one machine need not name it."""
    return table if len(machines) > 1 else table.drop(columns="machine", errors="ignore")


def flat(row: dict) -> list[dict]:
    """A record as one line of the table, or two where memory has a target of its own."""
    own = {"machine": row["machine"], "row": label(row), "key": row["row"], "against": row["against"], "sense": row["sense"],
           "pairs": row["pairs"]}
    lines = [own | {"ratio": row["ratio"], "low": row["low"], "high": row["high"], "target": row["target"],
                    "seconds": row.get("ours_seconds"), "baseline": row.get("baseline_seconds")}]
    if row.get("target_memory") and "memory_ratio" in row:
        lines.append(own | dict.fromkeys(("ratio", "low", "high"), row["memory_ratio"]) | {
            "row": f"{own['row']}: memory", "sense": "of", "target": row["target_memory"], "pairs": 1})
    return lines


board = pd.DataFrame([line for row in done for line in flat(row)], columns=["machine", "row", "key", "against", "sense", "pairs", "ratio",
                                                                           "low", "high", "target", "seconds", "baseline"])
board["target"] = board["target"].astype(object).where(board["target"].notna(), None)
for end in ("ratio", "low", "high"):
    board[f"met_{end}"] = [met(*each) for each in board[[end, "target", "sense"]].to_numpy()]
board["reached"] = [None if pd.isna(each) else each >= 1 for each in board["met_ratio"]]

# %% tags=["hide-input"]
GPU_NOTE = """
The targets were set for two cores. On a GPU the same rows have the sizes of Gemma 2 with Gemma Scope, on random numbers, and the other way of
doing the work runs there too."""
missed = board[board["reached"].eq(False)]
reached = board[board["reached"].eq(True)]
dates = sorted(row["when"][:10] for row in done)
when = f"between {dates[0]} and {dates[-1]}" if dates and dates[0] != dates[-1] else f"on {dates[0]}" if dates else ""


def described(machine: str) -> str:
    """A machine's processor, memory and what it measured, in words."""
    hardware, own = machines[machine], board[board["machine"] == machine]
    gpu = f"{hardware['gpu']} with {hardware['gpu_memory_gib']:.0f} GiB, and " if "gpu" in hardware else ""
    part = own.loc[own["reached"].eq(False), "row"]
    return (f"- **{machine}**: {gpu}{hardware['processor']}, {hardware['cores']} cores, {hardware.get('memory_gib', 0):.0f} GiB. "
            f"{own['reached'].eq(True).sum()} of {own['reached'].notna().sum()} targets reached"
            f"{'; not reached: ' + ', '.join(part) if len(part) else ''}.")


nl = "\n"
prose(f"""
The figures were taken {when}. Of {len(reached) + len(missed)} figures with a target, **{len(reached)} reach it and {len(missed)} do not**.

{nl.join(map(described, machines))}

{'Not measured, because the row failed: ' + '; '.join(f"{label(row)}{on(row['machine'])} ({row['error'][:120]})" for row in failed) + '.' if failed else ''}
{GPU_NOTE if any("gpu" in hardware for hardware in machines.values()) else ''}
""") if done else None

# %% tags=["hide-input"]
shown = board[board["target"].notna()].iloc[::-1].reset_index(drop=True)
shown["place"] = shown["row"].str.replace(" (", "<br>(", regex=False)  # two lines leave room for the points on a narrow page
fig = go.Figure()
for place, (machine, own) in enumerate(shown.groupby("machine", sort=False)):
    hue = list(figures.COLOURS)[place % len(figures.COLOURS)]
    ends = own[["met_low", "met_high"]].astype(float)
    middle = own["met_ratio"].astype(float)
    bars = {"type": "data", "symmetric": False, "array": ends.max(axis=1) - middle, "arrayminus": middle - ends.min(axis=1), "thickness": 1.6, "width": 4}
    fig.add_scatter(x=middle, y=own["place"], name=machine, mode="markers", error_x=bars,
                    marker={"size": 10, "symbol": place, "color": colour(hue)}, customdata=own[["ratio", "target"]],
                    hovertemplate="%{y}: %{customdata[0]:.3g}, target %{customdata[1]:.3g}")
fig.add_vline(x=1, line_width=1.5, line_dash="dash", line_color=colour("grey"))
TICKS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
fig.update_xaxes(title_text="ratio over its target", type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS])
fig.update_yaxes(title_text="", type="category")
fig.update_layout(showlegend=len(machines) > 1)
figures.finish(fig, "fig-speed", "Every row with a target: how far its ratio is beyond the target. For speed that is the ratio divided by the target, for a floor or for "
               "memory the target divided by the ratio, so that farther right is better everywhere, and right of the dashed line a target is reached. Points are medians over pairs; bars run from the smallest to the largest pair "
               "(quartiles where there are at least 8 pairs; rows measured once have none).",
               "; ".join(f"{each.row}{on(each.machine)} {number(each.met_ratio, 2)}" for each in shown.itertuples()) + " times its target.",
               height=max(260, 90 + 40 * shown["row"].nunique())) if len(shown) else None

# %% [markdown]
# ## Every row
#
# *Times* means how many times as fast as the other side; more is better. *Of* means the share of the other side, or how far
# above a floor; less is better.

# %% tags=["hide-input"]
against = pd.DataFrame(done).drop_duplicates("row") if done else pd.DataFrame()
figures.table(pd.DataFrame({"row": [name.replace("-", " ") for name in against["row"]], "what": list(against["what"]), "against": list(against["against"])}),
              "What is measured, and the other side.", "tab-speed-sides") if len(against) else None

# %% tags=["hide-input"]
def measured(each: dict) -> str:
    """A ratio with its spread; the unit tells which way is better."""
    spread = figures.interval(each["ratio"], each["low"], each["high"], 2) if each["pairs"] > 1 else number(each["ratio"], 2)
    return f"{spread} {'times' if each['sense'] == 'times' else 'of it'}"


def target(each: dict) -> str:
    """The target, and whether it is reached."""
    return "–" if each["reached"] is None else f"{each['target']:.3g}, {'reached' if each['reached'] else '**not reached**'}"


def seconds(taken: float) -> str:
    """To three digits: rows take from milliseconds to an hour."""
    return "–" if pd.isna(taken) else number(taken, max(0, 2 - math.floor(math.log10(taken))))


for place, (machine, own) in enumerate(board.groupby("machine", sort=False)):
    display(figures.table(pd.DataFrame([{
        "row": each["row"], "measured": measured(each), "target": target(each), "seconds": seconds(each["seconds"]),
        "the other side's": seconds(each["baseline"]), "pairs": each["pairs"]} for each in own.to_dict("records")]),
        f"All rows on {machine}, with the median seconds of each side. Brackets: smallest and largest pair, or the quartiles of at least 8.",
        f"tab-speed-{place + 1}"))

# %% [markdown]
# ## What bounds each row
#
# A ratio to another way of doing the same thing says little about what could still be gained. For some rows the work that no
# method can avoid was timed alone. In the regressions our side decodes each SAE's codes and the other side is given the errors; on a
# GPU decoding takes nearly as long as the products.

# %% tags=["hide-input"]
bounds = []
for row in done:
    where = f"{label(row)}{on(row['machine'])}"
    if "encoders_seconds" in row:
        rest, random = row["ours_seconds"] - row["forward_seconds"] - row["encoders_seconds"], row["sizes"].get("source") == "random"
        bounds.append((where, "the encoder products" if random else "one forward pass and the encoder products",
                       ("" if random else f"{number(row['forward_seconds'], 2)} s + ") + f"{number(row['encoders_seconds'], 2)} s", row["ours_seconds"],
                       f"{number(rest, 2)} s is all else" if rest >= 0 else f"{number(-rest, 2)} s less: within the noise of two timings"))
    if "products_seconds" in row:
        left = "each SAE's" if row.get("through_codes") else "each SAE's XᵀSaeError and"
        bounds.append((where, f"half of XᵀX, {left} predictions held out, in float32", f"{number(row['products_seconds'], 2)} s", row["ours_seconds"],
                       f"the products alone would be {number(row['baseline_seconds'] / row['products_seconds'], 2)} times as fast as the baseline"))
    if "floor_tokens_a_second" in row:
        share = row["tokens_a_second"] / row["floor_tokens_a_second"]
        bounds.append((where, "the inner products with all atoms", f"{row['floor_tokens_a_second']:,.0f} tokens a second",
                       row["ours_seconds"], f"{row['tokens_a_second']:,.0f} tokens a second: {share:.0%} of that"))
    if "bound_seconds" in row:
        bounds.append((where, "the model below the site once, above it once a variant", f"{number(row['bound_seconds'], 2)} s", row["ours_seconds"],
                       f"{number(row['above_bound'], 2)} times the bound; at the bound the ratio would be {number(row['bound_ratio'], 2)}"))
figures.table(pd.DataFrame(bounds, columns=["row", "the work that remains", "alone", "seconds in all", "so"]),
              "What is left to gain. The parts were timed alone, in the same run.", "tab-bounds", digits=2) if bounds else None

# %% tags=["hide-input"]
agreement = pd.DataFrame([{"row": label(row), "machine": row["machine"], "both sides": text} for row in done for text in [
    f"R² differs by {row['difference']:.1e} at most" if row["row"] in ("regression", "ladder") else
    f"squared norms differ from sae-lens's own by {row['difference']:.1e} at most on 99% of tokens" if row["row"].startswith("survey") and "difference" in row else
    f"{row['same_atoms']:.1%} of tokens have the same atoms" if "same_atoms" in row else
    f"final FVU {row['fvu']['stock']:.4f} and {row['fvu']['ours']:.4f} after {row['steps']} steps" if "fvu" in row else
    f"mean loss differs by {row['difference']:.1e} nats" if "bound_seconds" in row else ""] if text])
figures.table(without_machine(agreement), "That both sides give the same answer was checked before they were timed.", "tab-agreement") if len(agreement) else None

# %% [markdown]
# ## Memory, and how cost grows
#
# The survey reads its text in batches and keeps sums, so its memory should not depend on how much text there is, and its time
# should grow in proportion.

# %% tags=["hide-input"]
sizes = pd.DataFrame([{"row": label(row), "machine": row["machine"], "side": side, "MiB": mib} for row in done for side, mib in row.get("memory_mib", {}).items()])
figures.table(without_machine(sizes), "Peak memory beside what was held before (weights, or the inputs that both sides share), each side in a process of its own.", "tab-peaks",
              digits=0) if len(sizes) else None

# %% tags=["hide-input"]
growing = [row for row in done if "points" in row]
fig = go.Figure()
for place, row in enumerate(growing):
    points, cost, hue = pd.DataFrame(row["points"]), row["cost"], list(figures.COLOURS)[place % len(figures.COLOURS)]
    first = points["seconds"].iloc[0]
    fig.add_scatter(x=points["n"] / points["n"].iloc[0], y=points["seconds"] / first, mode="markers", marker={"size": 10, "symbol": place}, marker_color=colour(hue),
                    name=f"{row['over']}{on(row['machine'])}", customdata=points[["n", "seconds", "mib"]],
                    hovertemplate="%{customdata[0]}: %{customdata[1]:.1f} s, %{customdata[2]:,.0f} MiB")
    ends = points["n"].iloc[[0, -1]]
    fig.add_scatter(x=ends / points["n"].iloc[0], y=(cost["slope"] * ends + cost["intercept"]) / first, mode="lines", line_color=colour(hue), line_width=1.5, showlegend=False)
    ideal = ends / points["n"].iloc[0]
    fig.add_scatter(x=ideal, y=ideal, mode="lines", line_color=colour("grey"), line_dash="dot", line_width=1, showlegend=False, hoverinfo="skip")
fig.update_xaxes(title_text="times as much").update_yaxes(title_text="times as long", rangemode="tozero")
figures.finish(fig, "fig-cost", "Time of the survey against the number of contexts and of SAEs, relative to the smallest. Lines are fitted; the dotted one is proportional cost.",
               "; ".join(f"{row['over']}: " + ", ".join(f"{p['n']} in {p['seconds']:.0f} s" for p in row["points"]) for row in growing) + ".") if growing else None

# %% tags=["hide-input"]
prose("\n".join(f"""- **{row['over']}**{on(row['machine'])}: {number(row['cost']['slope'], 2)} s for each more, plus {number(row['cost']['intercept'], 1)} s
  ($R^2$ of the line {number(row['cost']['r2'])}); cost grows as $n$ to the power {number(row['cost']['power'], 2)}. Memory at the largest is
  {number(row['memory_growth'], 2)} times that at the smallest.""" for row in growing))

# %% [markdown]
# ## On a GPU, at the paper's sizes
#
# `python -m benchmarks.full_size gemma-2-2b` builds the paper's model with random weights and a random JumpReLU SAE of full size, and surveys it
# on 300 contexts of random tokens. Real weights would change neither time nor memory but through the number of active latents. The floor is
# one forward pass to the site and one encoder product, each timed alone.

# %%
full = json.loads((records.HOME / "artifacts" / "full-size.json").read_text())

# %% tags=["hide-input"]
figures.table(pd.DataFrame([{
    "model": each["size"], "GPU": each["device"], "SAE widths": ", ".join(f"{w:,}" for w in each["widths"]),
    "mean L0": number(each["l0"][0], 0), "kept tokens": f"{each['kept']:,}", "forward pass": f"{number(each['forward_seconds'], 2)} s",
    "encoder": f"{number(sum(each['encoder_seconds']), 2)} s", "all of it": f"{number(each['total_seconds'], 1)} s",
    "all / floor": number(each["ratio"], 1), "GPU memory beside weights": f"{number(each['peak_bytes_beside_weights'] / 1e9, 2)} GB",
    "x and the error in float32": f"{number(each['held_in_memory_bytes'] / 1e9, 2)} GB",
} for each in full]).T.reset_index().set_axis(["", *(f"run {i}" for i in range(1, len(full) + 1))], axis=1),
    "One survey from nothing at full size: seconds, and memory on the GPU beside the weights of model and SAE, next to what holding $x$ and "
    "the error would take. One run each.", "tab-speed-full-size")

# %% tags=["hide-input"]
took = "; ".join(f"{number(each['total_seconds'], 1)} s for {each['size']} with {len(each['widths'])} SAE{'s' if len(each['widths']) > 1 else ''}, "
                 f"{number(each['ratio'], 1)} times the floor" for each in full)
prose(f"""The survey took {took}. Beside the forward pass it writes the activations to disk with their checksums, writes the codes of
all active latents, and reads both three times.""")

# %% tags=["hide-cell"]
for each in board.to_dict("records"):
    run.add_timing(f"speed: {each['row']}, {each['machine']}", each["ratio"], n=each["pairs"], unit="pairs")
run.add("targets reached", len(reached), n=len(reached) + len(missed), unit="figures with a target")
record = run.finish()
