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
# The last chapter asked how well an {term}`SAE` can rebuild each part of the error. This one asks
# what its {term}`latents <latent>` react to: **can one say, from some examples, in which other
# texts a latent will fire?** A latent of which that is true means something to the reader. It is
# *interpretable* in this sense.
#
# {cite:t}`engels2024dark` test it by **detection**. A language model writes an explanation of a
# latent from texts in which it fires; then it is shown other texts, and says from the explanation
# alone which of them make the latent fire. They find that the SAE trained on {term}`NonlinearError`
# has fewer interpretable latents than the one trained on {term}`LinearError` (their Figure 8; the
# figure's values are not given in the text).
#
# The SAEs on the error are those of {doc}`08_on_error`. Where a preset ships them, they were
# trained on the day that the record of that chapter names, not when the book is built. All scores
# of this page are computed when it is built.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # the SAE whose error is taken apart: release:sae_id, directory, artifact:NAME
latents: int = 100  # latents of each SAE that are scored, drawn at random (the paper: 1000)
window: int = -1  # tokens in a window of text; -1: 8 for embeddings, 32 where a server is given
server: str = ""  # a server of OpenAI's chat protocol for scorer (b): http://127.0.0.1:8000/v1
server_model: str = ""  # the name of the model to ask that server for

# %%
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter import survey
from darkmatter.book import figures, records, reference
from darkmatter.book.figures import interval
from darkmatter.errors import DarkmatterError
from darkmatter.experiments import error_parts, on_error
from darkmatter.experiments.detection import detection, scorers
from darkmatter.experiments.detection.windows import active, cut, directions, peaks, pieces
from darkmatter.models import activations, model
from darkmatter.regression import STRICT
from darkmatter.saes.references import load_sae

run = records.start("09_interpret", preset, sae=sae, latents=latents, window=window,
                    server=server, server_model=server_model)
p = run.preset
if latents < 2 or (window != -1 and window < 2):
    raise DarkmatterError("latents should be at least 2, and window at least 2 tokens, or -1.")
if server and not server_model:
    raise DarkmatterError("A scorer server is given without server_model; name the model that it "
                          "should be asked for.")
LABELS = {"linear": "linear error", "nonlinear": "nonlinear error", "x": "x"}

# %% [markdown]
# ## Latents, windows, deciles
#
# Three SAEs of one size are compared: on LinearError, on NonlinearError, and, as a reference, on
# $x$ itself. The evaluation text is cut into **windows** of a few {term}`kept tokens <kept token>`.
# (The paper takes 128 tokens of much more text. Short windows give enough examples of each latent
# here. For the scorer of this page the shortest of 8, 16 and 32 tokens told latents on $x$ best
# from random directions, so 8 it is.) A latent *fires* in a window if it is active on any of its
# tokens; its strength there is the largest activation.
#
# A latent is explained from its strongest windows in the fitted {term}`sources <source>`. It is
# tested on windows of {term}`held-out <held out>` sources: some of each **decile** of its strength,
# Q1 (the weakest tenth of the windows in which it fires) to Q10, and as many in which it does not
# fire (*not*). The text is a mixture of plays, code, news and more. A scorer that merely recognises
# the kind of text would look good. Therefore there is a second set of windows in which the latent
# does not fire, with the same domains as those in which it does (*near*). The paper does not have
# that control.

# %%
acts, base = activations.evaluation(p), load_sae(p.default_sae, p)
windows = cut(p, acts, model.load_tokenizer(p), window if window > 0 else 32 if server else 8)
plenty = len(windows.tokens) >= 5000
few = {"least": 20, "negatives": 20, "per_decile": 1, "shown": 5}  # where windows are few
how = detection.Settings(latents=latents, seed=p.seed, **({} if plenty else few))

# %%
saes, missing = {"x": on_error.load(p, "x")}, ""
try:
    saes = {part: on_error.load(p, part) for part in ("linear", "nonlinear")} | saes
except DarkmatterError as reason:  # SAEs on this error are neither shipped nor trained on the spot
    missing = str(reason)
fit = survey.fitted_rows(p, acts, STRICT)
targets = {part: error_parts.part(base, acts, fit, part) for part in saes}

# Activations [token, latent] of every SAE on its own target, and the latents that are judged.
activity = {part: active(own, targets[part]) for part, own in saes.items()}
tasks, counts = {}, {}
for part in saes:
    tasks[part], counts[part] = detection.tasks(peaks(activity[part], windows), windows, how)

# %%
figures.table(pd.DataFrame({
    "SAE on": [LABELS[part] for part in saes], "SAE": [f"`{own.name}`" for own in saes.values()],
    "latents": [counts[part]["latents"] for part in saes],
    "never fire": [counts[part]["never fire"] for part in saes],
    "with enough examples": [counts[part]["enough examples"] for part in saes],
    "scored": [len(tasks[part]) for part in saes],
}), f"Latents, over {len(windows.tokens):,} windows of {windows.tokens.shape[1]} tokens. Enough "
    f"examples: the latent fires in at least {how.least} windows, of which at most {how.most:,} "
    "are used, and there are enough on both sides of the split.", "tab-interpret-latents")

# %% tags=["hide-input"]
if missing:
    display(figures.prose(f"**There are no SAEs on the error of `{base.name}`, so only the SAE on "
                          f"x is scored.** {missing}"))
if not plenty:
    display(figures.prose(f"""
    This text has {len(windows.tokens)} windows. That is too few for the paper’s 200 examples a
    latent, so {how.least} suffice here; the numbers below show the method and little more.
    """))

# %% [markdown]
# ## Scorer (a): sentence embeddings
#
# The first scorer needs no server. A small sentence-embedding model (all-MiniLM-L6-v2, read from a
# Python package) turns each window into a vector. The "explanation" of a latent is the mean vector
# of its strongest windows. A tested window is taken for one in which the latent fires if its vector
# is close enough to that mean; the threshold lies half way between the mean similarity of further
# windows with and without the latent, all of fitted sources.

# %% tags=["hide-input"]
figures.source(scorers.Embeddings.__call__)

# %% [markdown]
# The detection score is the share of tested windows that a scorer judges rightly. Any scorer takes
# the same way to it:

# %% tags=["hide-input"]
figures.source(detection.detect)

# %%
by_embedding = scorers.Embeddings(scorers.embed(windows.texts))
answers = {part: detection.detect(by_embedding, tasks[part], windows, activity[part])
           for part in saes}
scores = {part: detection.accuracy(answers[part], p.bootstrap, p.seed) for part in saes}

# %% [markdown]
# This scorer knows what a text is about. It cannot count brackets or see that a comma comes third.
# It also knows no activations: each window gets one vector, wherever in it the latent fires. So its
# scores are low, and are to be compared with each other and with the control, not with those of a
# language model.
#
# **The control is random directions.** For each scored latent a direction is drawn at random, and
# made to fire on as many tokens of the same target as the latent does. Whatever such directions
# score is not due to the SAE.

# %%
controls = {}
for part in saes:
    rates = [activity[part][:, [task.latent]].count_nonzero() / len(acts.x) for task in tasks[part]]
    random = directions(targets[part], rates, p.seed)
    random_tasks, _ = detection.tasks(peaks(random, windows), windows, how)
    controls[part] = detection.detect(by_embedding, random_tasks, windows, random)
control = {part: detection.accuracy(controls[part], p.bootstrap, p.seed) for part in saes}

# %% [markdown]
# ## What a latent reacts to
#
# Before any score, judge for yourself. For each SAE, here are two of the scored latents: the one
# that the scorer tells apart best, and the one in the middle of its ranking. They are chosen by
# that rule, not by hand. Each line is one of the latent's strongest windows with ten tokens more on
# each side, and marks the tokens on which it fires. Only text that may be reprinted is shown, so
# some of the strongest windows are left out.

# %% tags=["hide-input"]
FREE = {"plays", "scripture", "dictionary", "reference", "code"}


def readable(parts: list[tuple[str, bool]]) -> str:
    """One line of markdown, whatever the text holds, with what is active marked."""
    line = ""
    for text, on in parts:
        plain = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", re.sub(r"\s+", " ", text))
        space = " " if plain.startswith(" ") else ""
        line += f"{space}<mark>{plain.strip()}</mark>" if on and plain.strip() else plain
    return line.strip()


# %%
def examples(part: str, latent: int, why: str) -> str:
    """A latent's strongest windows that may be printed, as a list."""
    task = next(task for task in tasks[part] if task.latent == latent)
    free = [w for w in task.shown.tolist() if p.corpus != "mix" or windows.domain[w] in FREE][:4]
    lines = [f"- {windows.domain[w]}: "
             f"{readable(pieces(windows, w, activity[part], latent, 10))}" for w in free]
    often = activity[part][:, [latent]].count_nonzero() / len(acts.x)
    return (f"**SAE on {LABELS[part]}, latent {latent}** ({why}; active on {often:.1%} of the "
            "tokens)\n\n" + ("\n".join(lines) or "None of its strongest windows may be reprinted."))


passages = []
for part in saes:
    ranking = detection.separation(answers[part]).dropna().sort_values().index
    passages += [examples(part, int(ranking[-1]), "told apart best"),
                 examples(part, int(ranking[len(ranking) // 2]), "in the middle of the ranking")]
figures.prose("\n\n".join(passages))

# %% [markdown]
# ## What the embeddings find
#
# If latents mean something, the accuracy rises with the decile: a latent's strongest windows are
# the easiest to tell.

# %% tags=["hide-input"]
PLACES = {**{f"Q{i}": i - 1 for i in range(1, 11)}, detection.SILENT: 11, detection.NEARBY: 13}


def deciles(scores: dict[str, dict]) -> go.Figure:
    """Accuracy by decile, joined, and apart on both kinds of windows without the latent."""
    fig = go.Figure()
    for place, (part, accuracy) in enumerate(scores.items()):
        shade = figures.colour(figures.MEANING.get(LABELS[part], "purple"))
        shift = 0.18 * (place - (len(scores) - 1) / 2)
        for groups, mode in ((detection.DECILES, "lines+markers"),
                             ((detection.SILENT, detection.NEARBY), "markers")):
            draws = [accuracy[group] for group in groups]
            fig.add_scatter(
                x=[PLACES[group] + shift for group in groups], y=[float(share) for share in draws],
                error_y=figures.error_bars(draws, thickness=1.4, width=2), name=LABELS[part],
                mode=mode, showlegend="lines" in mode, line={"width": 1.5, "color": shade},
                marker={"size": 7, "symbol": place, "color": shade}, customdata=groups,
                hovertemplate="%{customdata}: %{y:.3f}")
    fig.add_hline(y=0.5, line={"dash": "dot", "width": 1, "color": figures.colour("grey")})
    fig.update_xaxes(tickvals=list(PLACES.values()), tickangle=0,
                     ticktext=[*map(str, range(1, 11)), "not", "near"],
                     title_text="decile of activation, Q1 to Q10")
    return fig.update_yaxes(title_text="share judged rightly", range=[0, 1])


first = next(iter(scores.values()))
ends = "; ".join(f"{LABELS[part]}: Q1 {float(accuracy['Q1']):.2f}, Q10 {float(accuracy['Q10']):.2f}"
                 for part, accuracy in scores.items())
figures.finish(
    deciles(scores), "fig-interpret-deciles",
    "Detection by sentence embeddings: share of windows judged rightly, by decile of the latent's "
    "activation (Q10 the strongest), for windows in which the latent does not fire (*not*), and "
    f"for such windows of the same domains (*near*). {first['Q1'].sources} latents an SAE; "
    f"{first['Q1'].n} windows a decile, all latents together, {first['not'].n:,} *not*. 95% "
    "intervals over latents. The dotted line is chance.", f"Accuracy by decile. {ends}.",
    paper="Figure 8")

# %%
rows = []
for part in saes:
    for kind, accuracy, raw in (("latents", scores[part], answers[part]),
                                ("random directions", control[part], controls[part])):
        rows.append({"target": LABELS[part], "judged": kind, "balanced": f"{accuracy['balanced']}",
                     "balanced, same domains": f"{accuracy['balanced, same domains']}",
                     "AUC, same domains": detection.separation(raw, detection.NEARBY).mean(),
                     "from Q1 to Q10": f"{accuracy['Q10'] - accuracy['Q1']:+.2f}"})
figures.table(
    pd.DataFrame(rows), "Balanced accuracy: the mean of the accuracy over the deciles and of that "
    "on windows without the latent, drawn from all domains or from the same ones; 0.5 is chance. "
    "AUC is the chance that a window with the latent ranks above one without it, which needs no "
    "threshold. 95% intervals over latents.", "tab-interpret-scores")

# %% [markdown]
# What a balanced accuracy loses when the windows have the same domains is the share of the score
# that is due to the kind of text alone. What latents score above random directions is due to the
# SAE:

# %%
KINDS = {detection.SILENT: "all domains", detection.NEARBY: "the same domains"}


def mean_difference(one: pd.DataFrame, other: pd.DataFrame, negatives: str):
    """Difference of the mean balanced accuracy of two sets of latents, with its 95% interval."""
    return detection.difference(*(detection.by_latent(rows, negatives) for rows in (one, other)))


gaps = {part: {kind: mean_difference(answers[part], controls[part], kind) for kind in KINDS}
        for part in saes}
figures.table(
    pd.DataFrame([{"SAE on": LABELS[part]}
                  | {f"windows of {KINDS[kind]}": interval(*gap[kind]) for kind in KINDS}
                  for part, gap in gaps.items()]),
    "Balanced accuracy of latents minus that of random directions (Welch's 95% intervals over "
    "latents).", "tab-interpret-gaps")

# %% [markdown]
# ## Scorer (b): a language model
#
# The second scorer works as the paper's does, behind the same interface. A language model is shown
# the strongest windows with the active tokens marked, and writes one sentence (50 tokens at most).
# Then it is asked, four windows at a time (25 tokens at most, temperature 0), which of them fit
# that sentence. It talks to any server that speaks OpenAI's chat protocol: vLLM, llama.cpp, or a
# hosted one. Where an answer is not a list of zeros and ones, it counts as no answer.
#
# ```bash
# papermill notebooks/09_interpret.ipynb out.ipynb -p preset smollm2 -p latents 1000 \
#     -p server http://127.0.0.1:8000/v1 -p server_model NAME
# ```

# %%
spoken, explained = {}, {}
for part in saes if server else ():
    judge = scorers.LanguageModel(scorers.Server(server, server_model))
    spoken[part] = detection.detect(judge, tasks[part], windows, activity[part])
    explained[part] = judge.explanations

# %% tags=["hide-input"]
if spoken:
    by_model = {part: detection.accuracy(spoken[part], p.bootstrap, p.seed) for part in saes}
    display(figures.finish(
        deciles(by_model), "fig-interpret-model",
        f"The same by `{server_model}`, which explains and judges. 95% intervals over latents.",
        "Accuracy by decile, judged by a language model.", paper="Figure 8"))
    display(figures.table(pd.DataFrame([{
        "SAE on": LABELS[part], "balanced": f"{accuracy['balanced']}",
        "balanced, same domains": f"{accuracy['balanced, same domains']}",
        "no answer": f"{spoken[part]['right'].isna().mean():.1%}",
        "an explanation": next(iter(explained[part].values()))}
        for part, accuracy in by_model.items()]),
        f"Balanced accuracy, judged by `{server_model}`.", "tab-interpret-model"))
else:
    display(figures.prose(f"""
    **What was run for this page: scorer (a), with {max(map(len, tasks.values()))} latents an SAE.
    Scorer (b) was not run**, because no server was given. It is tested against a server on the
    same machine that generates with a small model; that shows that it works, and says nothing about
    latents. The paper used Llama 3.1 70B Instruct and 1,000 latents.
    """))

# %% [markdown]
# ## Agreement with the paper
#
# The claim is that the SAE on NonlinearError has fewer interpretable latents. Here it is read as:
# latents of the SAE on LinearError have the higher mean balanced accuracy. **The rule:** *agree* if
# the whole interval of the difference lies above 0, *differ* if it lies wholly below, else *cannot
# say*; the `smoke` preset always *cannot say*. The verdict is by the scorer that ran, and where
# both ran, by the language model.

# %%
judged, scorer = (spoken, "language model") if spoken else (answers, "sentence embeddings")
verdicts, statements = {}, {}
if not missing:
    statements = {kind: mean_difference(judged["linear"], judged["nonlinear"], kind)
                  for kind in KINDS}
    n = len(tasks["linear"]) + len(tasks["nonlinear"])
    for kind, gap in statements.items():
        verdicts[kind] = run.claim(
            "Latents of the SAE on NonlinearError are less interpretable "
            f"(windows of {KINDS[kind]})",
            "balanced accuracy, LinearError − NonlinearError", gap, (0, np.inf), n, "latents",
            paper="fewer interpretable latents")
    display(figures.table(pd.DataFrame({
        "windows without the latent": [f"of {KINDS[kind]}" for kind in statements],
        "LinearError − NonlinearError": [interval(*gap) for gap in statements.values()],
        "agrees if within": ["above 0"] * len(statements), "verdict": list(verdicts.values()),
    }), f"Difference of the mean balanced accuracy, of {len(tasks['linear'])} and "
        f"{len(tasks['nonlinear'])} latents ({scorer}).", "tab-interpret-agreement"))

# %% tags=["hide-input"]
if statements:
    _, low, high = statements[detection.NEARBY]
    easier = "LinearError" if low > 0 else "NonlinearError"
    clear = f"Where the domains are the same, latents on {easier} are the easier to tell."
    unclear = "Where the domains are the same, this scorer finds no clear difference."
    which_is_easier = clear if low > 0 or high < 0 else unclear
    display(figures.prose(f"""
    {which_is_easier}
    What differs from the paper: the scorer, the model, {windows.tokens.shape[1]} tokens a window
    instead of 128, explanations and tests from different documents, and SAEs of
    {saes['x'].width:,} latents.
    """))
else:
    display(figures.prose("Without SAEs on the two parts of the error the claim cannot be tested."))

# %%
for part, accuracy in scores.items():
    name = saes[part].name
    for group, share in accuracy.items():
        run.add_draws(f"detection_{LABELS[part]}_{group}", share, "windows", name)
    run.add_draws(f"detection_random_directions_{LABELS[part]}", control[part]["balanced"],
                  "windows")
for part, gap in gaps.items():
    run.add(f"detection_above_random_{LABELS[part]}", *gap[detection.SILENT], len(tasks[part]),
            "latents", saes[part].name)
for kind in KINDS if not missing else ():
    run.add(f"detection_linear_minus_nonlinear ({kind})",
            *mean_difference(answers["linear"], answers["nonlinear"], kind), len(tasks["linear"]),
            "latents")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
