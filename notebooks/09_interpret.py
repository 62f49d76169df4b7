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
# # Are their latents interpretable?
#
# The last chapter asked how well an {term}`SAE` can rebuild each part of the error. This one asks what its
# {term}`latents <latent>` react to: **can one say, from some examples, in which other texts a latent will fire?** A latent of
# which that is true means something to the reader. It is *interpretable* in this sense.
#
# {cite:t}`engels2024dark` test it by **detection**. A language model writes an explanation of a latent from texts in which it
# fires; then it is shown other texts, and says from the explanation alone which of them make the latent fire. They find that
# the SAE trained on {term}`NonlinearError` has fewer interpretable latents than the one trained on {term}`LinearError` (their
# Figure 8; the figure's values are not given in the text).

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # the SAE whose error is taken apart, instead of the preset's: release:sae_id, directory, artifact:NAME
latents: int = 100  # latents of each SAE that are scored, drawn at random (the paper: 1000)
window: int = -1  # tokens in a window of text; -1: 8 for sentence embeddings, 32 where a server is given
server: str = ""  # address of a server that speaks OpenAI's chat protocol, for the second scorer, such as http://127.0.0.1:8000/v1
server_model: str = ""  # the name of the model to ask that server for

# %% tags=["hide-input"]
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter import (
    activations,
    figures,
    interpret,
    model,
    onerror,
    parts,
    records,
    reference,
    saes,
    scorers,
    survey,
    windows,
)
from darkmatter.errors import DarkmatterError
from darkmatter.figures import interval, number, prose

run = records.start("09_interpret", preset, sae=sae, latents=latents, window=window, server=server, server_model=server_model)
p = run.preset
if latents < 2 or (window != -1 and window < 2):
    raise DarkmatterError("latents should be at least 2, and window at least 2 tokens, or -1.")
if server and not server_model:
    raise DarkmatterError("A scorer server is given without server_model; name the model that it should be asked for.")
LABELS = {"linear": "linear error", "nonlinear": "nonlinear error", "x": "x"}

# %% [markdown]
# ## Latents, windows, deciles
#
# Three SAEs of one size are compared: on LinearError, on NonlinearError, and, as a reference, on $x$ itself. The evaluation text
# is cut into **windows** of a few {term}`kept tokens <kept token>`. (The paper takes 128 tokens of much more text. Short windows
# give enough examples of each latent here. For the scorer of this page the shortest of 8, 16 and 32 tokens told latents on $x$
# best from random directions, so 8 it is.) A latent *fires* in a window if it is active on any of its tokens; its strength there
# is the largest activation.
#
# A latent is explained from its strongest windows in the fitted {term}`sources <source>`. It is tested on windows of
# {term}`held-out <held out>` sources: some of each **decile** of its strength, Q1 (the weakest tenth of the windows in which it
# fires) to Q10, and as many in which it does not fire (*not*). The text is a mixture of plays, code, news and more. A scorer that
# merely recognises the kind of text would look good. Therefore there is a second set of windows in which the latent does not
# fire, with the same domains as those in which it does (*near*). The paper does not have that control.

# %%
acts = activations.evaluation(p)
tokenizer = model.load_tokenizer(p)
cut = windows.cut(p, acts, tokenizer, window if window > 0 else 32 if server else 8)
much = len(cut.tokens) >= 5000
how = interpret.Settings(latents=latents, seed=p.seed) if much else interpret.Settings(
    latents=latents, least=20, negatives=20, per_decile=1, shown=5, seed=p.seed)

# %%
base = saes.load(p.default_sae, p)
fit = survey.fitted_rows(p, acts, survey.PROTOCOLS["strict"])
opened, missing = {"x": onerror.load(p, "x")}, ""
try:
    opened = {which: onerror.load(p, which) for which in ("linear", "nonlinear")} | opened
except DarkmatterError as reason:  # SAEs on the error of this one are neither shipped nor trained on the spot
    missing = str(reason)
targets = {which: parts.of(base, acts, fit, which) for which in opened}

# %%
found = {which: windows.active(each, targets[which]) for which, each in opened.items()}
drawn, counts = {}, {}
for which, activity in found.items():
    drawn[which], counts[which] = interpret.tasks(windows.peaks(activity, cut), cut, how)

# %% tags=["hide-input"]
figures.table(pd.DataFrame({
    "SAE on": [LABELS[which] for which in opened], "SAE": [f"`{each.name}`" for each in opened.values()],
    "latents": [counts[which]["latents"] for which in opened], "never fire": [counts[which]["never fire"] for which in opened],
    "with enough examples": [counts[which]["enough examples"] for which in opened],
    "scored": [len(drawn[which]) for which in opened],
}), f"Latents, over {len(cut.tokens):,} windows of {cut.tokens.shape[1]} tokens. Enough examples: the latent fires in at least "
    f"{how.least} windows, of which at most {how.most:,} are used, and there are enough on both sides of the split.",
    "tab-interpret-latents")

# %% tags=["hide-input"]
if missing:
    display(prose(f"**There are no SAEs on the error of `{base.name}`, so only the SAE on x is scored.** {missing}"))
if not much:
    display(prose(f"""
    This text has {len(cut.tokens)} windows. That is too few for the paper’s 200 examples a latent, so {how.least} suffice here;
    the numbers below show the method and little more.
    """))

# %% [markdown]
# ## What a latent reacts to
#
# Before any score, judge for yourself. For each SAE, here are two of the scored latents: the one that the scorer below tells
# apart best, and the one in the middle of its ranking. They are chosen by that rule, not by hand. Each line is one of the
# latent's strongest windows with ten tokens more on each side, and marks the tokens on which it fires. Only text that may be
# reprinted is shown, so some of the strongest windows are left out.

# %%
vectors = scorers.embed(cut.texts)
by_embedding = scorers.Embeddings(vectors)
answers = {which: interpret.detect(by_embedding, drawn[which], cut, found[which]) for which in opened}

# %% tags=["hide-input"]
FREE = {"plays", "scripture", "dictionary", "reference", "code"}


def readable(pieces: list[tuple[str, bool]]) -> str:
    """One line of markdown, whatever the text holds, with what is active marked."""
    said = ""
    for text, on in pieces:
        plain = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", re.sub(r"\s+", " ", text))
        before = " " if plain.startswith(" ") else ""
        said += f"{before}<mark>{plain.strip()}</mark>" if on and plain.strip() else plain
    return said.strip()


def examples(which: str, latent: int, why: str) -> str:
    task = next(each for each in drawn[which] if each.latent == latent)
    shown = [w for w in task.shown.tolist() if p.corpus != "mix" or cut.domain[w] in FREE][:4]
    lines = [f"- {cut.domain[w]}: {readable(windows.pieces(cut, w, found[which], latent, 10))}" for w in shown]
    often = float((found[which][:, [latent]] != 0).sum()) / len(acts.x)
    return (f"**SAE on {LABELS[which]}, latent {latent}** ({why}; active on {often:.1%} of the tokens)\n\n"
            + ("\n".join(lines) or "None of its strongest windows may be reprinted."))


told = []
for which in opened:
    ranking = interpret.separation(answers[which]).dropna().sort_values()
    told += [examples(which, int(ranking.index[-1]), "told apart best"),
             examples(which, int(ranking.index[len(ranking) // 2]), "in the middle of the ranking")]
figures.prose("\n\n".join(told))

# %% [markdown]
# ## Scorer (a): sentence embeddings
#
# The first scorer needs no server. A small sentence-embedding model (all-MiniLM-L6-v2, read from a Python package) turns each
# window into a vector. The "explanation" of a latent is the mean vector of its strongest windows. A tested window is taken for
# one in which the latent fires if its vector is close enough to that mean; the threshold lies half way between the mean
# similarity of further windows with and without the latent, all of fitted sources.
#
# This scorer knows what a text is about. It cannot count brackets or see that a comma comes third. It also knows no
# activations: each window gets one vector, wherever in it the latent fires. So its scores are low, and are to be compared with
# each other and with the control, not with those of a language model.
#
# **The control is random directions.** For each scored latent a direction is drawn at random, and made to fire on as many
# tokens of the same target as the latent does. Whatever such directions score is not due to the SAE.

# %%
controls = {}
for which in opened:
    rates = [found[which][:, [task.latent]].count_nonzero() / len(acts.x) for task in drawn[which]]
    random = windows.directions(targets[which], rates, p.seed)
    controls[which] = interpret.detect(by_embedding, interpret.tasks(windows.peaks(random, cut), cut, how)[0], cut, random)
scores = {which: interpret.accuracy(each, p.bootstrap, p.seed).set_index("group") for which, each in answers.items()}
control = {which: interpret.accuracy(each, p.bootstrap, p.seed).set_index("group") for which, each in controls.items()}

# %% tags=["hide-input"]
def deciles(table: dict[str, pd.DataFrame]) -> go.Figure:
    """Accuracy by decile and on both kinds of windows without the latent."""
    fig = go.Figure()
    groups = [*interpret.DECILES, interpret.SILENT, interpret.NEARBY]
    for place, (which, each) in enumerate(table.items()):
        name = figures.colour(figures.MEANING.get(LABELS[which], "purple"))
        rows, at = each.loc[groups], np.arange(len(groups)) + 0.18 * (place - (len(table) - 1) / 2)
        at[10:] += [1, 2]
        for part, legend in ((slice(0, 10), True), (slice(10, 12), False)):
            some = rows.iloc[part]
            bars = {"array": some["high"] - some["value"], "arrayminus": some["value"] - some["low"], "symmetric": False,
                    "thickness": 1.4, "width": 2}
            fig.add_scatter(x=at[part], y=some["value"], error_y=bars, name=LABELS[which], showlegend=legend, line_width=1.5,
                            mode="lines+markers" if legend else "markers", line_color=name,
                            marker={"size": 7, "symbol": place, "color": name}, customdata=some.index,
                            hovertemplate="%{customdata}: %{y:.3f}")
    fig.add_hline(y=0.5, line={"dash": "dot", "width": 1, "color": figures.colour("grey")})
    fig.update_xaxes(tickvals=[*range(10), 11, 13], ticktext=[*map(str, range(1, 11)), "not", "near"], tickangle=0,
                     title_text="decile of activation, Q1 to Q10")
    return fig.update_yaxes(title_text="share judged rightly", range=[0, 1])


first = next(iter(scores.values()))
figures.finish(
    deciles(scores), "fig-interpret-deciles",
    f"Detection by sentence embeddings: share of windows judged rightly, by decile of the latent's activation (Q10 the strongest), "
    f"for windows in which the latent does not fire (*not*), and for such windows of the same domains (*near*). "
    f"{int(first['latents'].max())} latents an SAE; {int(first.loc['Q1', 'n'])} windows a decile, all latents together, {int(first.loc['not', 'n']):,} *not*. "
    "95% intervals over latents. The dotted line is chance.",
    "Accuracy by decile. " + "; ".join(f"{LABELS[which]}: Q1 {number(each.loc['Q1', 'value'], 2)}, Q10 "
                                       f"{number(each.loc['Q10', 'value'], 2)}" for which, each in scores.items()) + ".",
    paper="Figure 8")

# %% tags=["hide-input"]
def cell(each: pd.DataFrame, group: str) -> str:
    return interval(*each.loc[group, ["value", "low", "high"]])


def mean_separation(each: pd.DataFrame) -> float:
    return float(interpret.separation(each, interpret.NEARBY).mean())


figures.table(pd.DataFrame([{
    "target": LABELS[which], "judged": kind, "balanced": cell(each, "balanced"),
    "balanced, same domains": cell(each, "balanced, same domains"), "AUC, same domains": mean_separation(raw)}
    for which in opened for kind, each, raw in (("latents", scores[which], answers[which]),
                                                ("random directions", control[which], controls[which]))]),
    "Balanced accuracy: the mean of the accuracy over the deciles and of that on windows without the latent, drawn from all domains "
    "or from the same ones; 0.5 is chance. AUC is the chance that a window with the latent ranks above one without it, which needs no "
    "threshold. 95% intervals over latents.", "tab-interpret-scores")

# %%
gaps = {which: {kind: interpret.difference(interpret.by_latent(answers[which], kind), interpret.by_latent(controls[which], kind))
                for kind in (interpret.SILENT, interpret.NEARBY)} for which in opened}
both = {kind: interpret.difference(*(interpret.by_latent(answers[which], kind) for which in ("linear", "nonlinear")))
        for kind in (interpret.SILENT, interpret.NEARBY)} if not missing else {}

# %% tags=["hide-input"]
def verb(found: tuple[float, float, float]) -> str:
    return "more than" if found[1] > 0 else "less than" if found[2] < 0 else "not clearly more or less than"


lines = [f"- On {LABELS[which]}, latents score {verb(gap[interpret.SILENT])} random directions: {interval(*gap[interpret.SILENT])}, and "
         f"{interval(*gap[interpret.NEARBY])} where the domains are the same." for which, gap in gaps.items()]
rise = {which: float(each.loc["Q10", "value"] - each.loc["Q1", "value"]) for which, each in scores.items()}
drop = {which: float(each.loc["balanced", "value"] - each.loc["balanced, same domains", "value"]) for which, each in scores.items()}
prose("\n".join([
    f"From Q1 to Q10 the accuracy changes by {', '.join(f'{change:+.2f} ({LABELS[which]})' for which, change in rise.items())}. With "
    f"windows of the same domains the balanced accuracy is lower by "
    f"{', '.join(f'{number(change, 2)} ({LABELS[which]})' for which, change in drop.items())}. About that much of the score is "
    f"due to the kind of text alone.",
    "", *lines]))

# %% [markdown]
# ## Scorer (b): a language model
#
# The second scorer works as the paper's does, behind the same interface. A language model is shown the strongest windows with the
# active tokens marked, and writes one sentence (50 tokens at most). Then it is asked, four windows at a time (25 tokens at most,
# temperature 0), which of them fit that sentence. It talks to any server that speaks OpenAI's chat protocol: vLLM, llama.cpp, or a
# hosted one. Where an answer is not a list of zeros and ones, it counts as no answer.
#
# ```bash
# papermill notebooks/09_interpret.ipynb out.ipynb -p preset smollm2 -p latents 1000 \
#     -p server http://127.0.0.1:8000/v1 -p server_model NAME
# ```

# %%
spoken, explained = {}, {}
if server:
    for which in opened:
        judge = scorers.LanguageModel(scorers.Server(server, server_model))
        spoken[which] = interpret.detect(judge, drawn[which], cut, found[which])
        explained[which] = judge.explanations

# %% tags=["hide-input"]
if spoken:
    said = {which: interpret.accuracy(each, p.bootstrap, p.seed).set_index("group") for which, each in spoken.items()}
    silent = {which: float(each["right"].isna().mean()) for which, each in spoken.items()}
    display(figures.finish(
        deciles(said), "fig-interpret-model", f"The same by `{server_model}`, which explains and judges. 95% intervals over latents.",
        "Accuracy by decile, judged by a language model.", paper="Figure 8"))
    display(figures.table(pd.DataFrame([{
        "SAE on": LABELS[which], "balanced": cell(each, "balanced"), "balanced, same domains": cell(each, "balanced, same domains"),
        "no answer": f"{silent[which]:.1%}", "an explanation": next(iter(explained[which].values()))} for which, each in said.items()]),
        f"Balanced accuracy, judged by `{server_model}`.", "tab-interpret-model"))
else:
    display(prose(f"""
    **What was run for this page: scorer (a), with {max(map(len, drawn.values()))} latents an SAE. Scorer (b) was not run**, because no
    server was given. It is tested against a server on the same machine that generates with a small model; that shows that it works,
    and says nothing about latents. The paper used Llama 3.1 70B Instruct and 1,000 latents.
    """))

# %% [markdown]
# ## Agreement with the paper
#
# The claim is that the SAE on NonlinearError has fewer interpretable latents. Here it is read as: latents of the SAE on LinearError
# have the higher mean balanced accuracy. **The rule:** *agree* if the whole interval of the difference lies above 0, *differ* if it
# lies wholly below, else *cannot say*; the `smoke` preset always *cannot say*. The verdict is by the scorer that ran, and where both
# ran, by the language model.

# %%
judged = spoken or answers
verdicts, statements = [], {}
if not missing:
    statements = {kind: interpret.difference(*(interpret.by_latent(judged[which], negatives) for which in ("linear", "nonlinear")))
                  for kind, negatives in {"windows of all domains": interpret.SILENT, "windows of the same domains": interpret.NEARBY}.items()}
    verdicts = [run.claim(f"Latents of the SAE on NonlinearError are less interpretable ({kind})",
                          "balanced accuracy, LinearError − NonlinearError", each, (0, np.inf), len(drawn["linear"]) + len(drawn["nonlinear"]),
                          "latents", paper="fewer interpretable latents") for kind, each in statements.items()]

# %% tags=["hide-input"]
if statements:
    display(figures.table(pd.DataFrame({
        "windows without the latent": [kind.removeprefix("windows ") for kind in statements],
        "LinearError − NonlinearError": [interval(*each) for each in statements.values()],
        "agrees if within": ["above 0"] * len(statements), "verdict": verdicts,
    }), f"Difference of the mean balanced accuracy, of {len(drawn['linear'])} and {len(drawn['nonlinear'])} latents "
        f"({'language model' if spoken else 'sentence embeddings'}).", "tab-interpret-agreement"))
    middle = statements["windows of the same domains"]
    display(prose(f"""
    {'Where the domains are the same, latents on LinearError are the easier to tell.' if middle[1] > 0 else
     'Where the domains are the same, latents on NonlinearError are the easier to tell.' if middle[2] < 0 else
     'Where the domains are the same, this scorer finds no clear difference.'}
    What differs from the paper: the scorer, the model, {cut.tokens.shape[1]} tokens a window instead of 128, explanations and tests
    from different documents, and SAEs of {opened['x'].width:,} latents.
    """))
else:
    display(prose("Without SAEs on the two parts of the error the claim cannot be tested."))

# %% tags=["hide-cell"]
for which, each in scores.items():
    for group, row in each.iterrows():
        run.add(f"detection_{LABELS[which]}_{group}", row["value"], row["low"], row["high"], int(row["n"]), "windows", opened[which].name)
    row = control[which].loc["balanced"]
    run.add(f"detection_random_directions_{LABELS[which]}", row["value"], row["low"], row["high"], int(row["n"]), "windows")
for which, gap in gaps.items():
    run.add(f"detection_above_random_{LABELS[which]}", *gap[interpret.SILENT], len(drawn[which]), "latents", opened[which].name)
for kind, each in both.items():
    run.add(f"detection_linear_minus_nonlinear ({kind})", *each, len(drawn["linear"]), "latents")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
