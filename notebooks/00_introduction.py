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
# # The dark matter of sparse autoencoders
#
# A sparse autoencoder (SAE) explains what a language model holds for a token as a sum of a few learned features. It never
# explains all of it. This book asks what the rest is made of. It follows *Decomposing The Dark Matter of Sparse
# Autoencoders* {cite:p}`engels2024dark` section by section and measures each claim again, on a real model. Every number is
# computed when the book is built.

# %% tags=["parameters", "hide-input"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # other SAEs than the preset's, with commas between: release:sae_id, directory, artifact:NAME or train:WIDTHxL0

# %% tags=["hide-input"]
import numpy as np
import pandas as pd

from darkmatter import figures, records, scaling, survey
from darkmatter.figures import interval, number, prose

run = records.start("00_introduction", preset, sae=sae)
p = run.preset

# %% tags=["hide-input"]
result = survey.run(p)
table = result.table().set_index("sae", drop=False)
name = result.names[p.default_sae]  # the SAE that stands for all where one is needed
rungs = scaling.ladder(table)
draws = scaling.draws(p, result, list(rungs["sae"]))
of_one = scaling.draws(p, result, [name])
widths = rungs["width"].to_numpy(float)
law = scaling.power_law(widths, draws, p.seed) if len(widths) >= 3 else None

scored = result.rows.query("metric == 'fvu' and sae == @name").iloc[0]
n_fit, n_eval, sources = int(scored["n_fit"]), int(scored["n_eval"]), int(scored["sources"])
text = result.acts.text
kinds = sorted(set(text.domains))
model = "SmolLM2-135M-Instruct (4-bit weights, dequantised)" if p.model == "smollm2" else f"`{p.model}`"

# %% tags=["hide-input"]
floor = scaling.estimate(draws.fvu_nonlinear.mean(1), draws.effective)
unit = result.unit
basis = f"{n_eval:,} held-out tokens of {sources} {unit}"
if law:
    main = "fig-intro-bands"
    c = scaling.estimate(law.c, draws.effective)
    far = np.geomspace(widths[0], 10 * widths[-1], 60)
    points = pd.DataFrame({"width": widths, "fvu": draws.fvu[0], "low": rungs["fvu_low"].to_numpy(float),
                           "high": rungs["fvu_high"].to_numpy(float), "nonlinear": draws.fvu_nonlinear[0]})
    fig = figures.bands(points, pd.DataFrame({"width": far, "fit": law.curve(far)[0]}), c[0], floor[0])
    where = f"not determined by these points, as {law.doubt}" if law.doubt else f"at {interval(*c)}"
    caption = (f"What SAEs of growing width leave unexplained of {model} at `{p.site}`, L0 {rungs['l0'].mean():.0f}, as a share "
               "of the variance. Green: what a wider SAE would still remove, by a power law drawn ten times past the widest "
               f"one. Blue: what no width removes, but a linear map of the activation predicts; its upper border is {where}. "
               f"Orange: the rest. Points are measured ({basis}). {{doc}}`04_scaling` says how.")
    alt = (f"Three bands against SAE width. FVU goes from {number(draws.fvu[0, 0])} at {widths[0]:,.0f} latents to "
           f"{number(draws.fvu[0, -1])} at {widths[-1]:,.0f}; the nonlinear part is {number(floor[0])} on average.")
else:
    main = "fig-intro-split"
    parts = {"FVU": "fvu", "FVU<sub>nonlinear</sub>": "fvu_nonlinear"}
    bars = pd.DataFrame([{"SAE": f"{row['width']:,} · L0 {row['l0']:.0f}", "part": label, "value": row[metric],
                          "low": row[f"{metric}_low"], "high": row[f"{metric}_high"]}
                         for label, metric in parts.items() for _, row in table.iterrows()])
    fig = figures.bars_by_setting(bars, "SAE", group="part", y_title="share of variance", x_title="SAE (width · L0)")
    caption = (f"What the error is made of, for {model} at `{p.site}`: the share of the variance that the SAE leaves unexplained "
               f"(FVU), and what is left of that when the best linear map of the activation is added ({basis}). The paper's main "
               "figure takes SAEs of three or more widths at one L0; this run has fewer.")
    alt = (f"Bars, one pair an SAE ({len(table)} in all): FVU between {number(table['fvu'].min())} and {number(table['fvu'].max())}, nonlinear part "
           f"between {number(table['fvu_nonlinear'].min())} and {number(table['fvu_nonlinear'].max())}.")
figures.finish(fig, main, caption, alt, paper="Figure 1" if law else "")

# %% [markdown]
# ## What was found

# %% tags=["hide-input"]
def measured(metric: str) -> tuple[float, float, float]:
    """The default SAE's value and interval."""
    row = table.loc[name]
    return row[metric], row[f"{metric}_low"], row[f"{metric}_high"]


norm, vector = measured("r2_norm"), measured("r2_vector")
claims = records.claims([each for each in records.load_all() if each["preset"] == p.name])
told = [f"{(claims['verdict'] == each).sum()} {each}" for each in ("agree", "differ", "cannot say")]

# %% tags=["hide-input"]
fvu, nonlinear = measured("fvu"), measured("fvu_nonlinear")
linear = scaling.estimate(of_one.fvu[:, 0] - of_one.fvu_nonlinear[:, 0], of_one.effective)
spread = f"Over the {len(table)} SAEs of this run, " if len(table) > 1 else ""
if spread:
    spread += (f"these two go from {number(table['r2_vector'].min(), 2)} to {number(table['r2_vector'].max(), 2)} and from "
               f"{number(table['r2_norm'].min(), 2)} to {number(table['r2_norm'].max(), 2)}.")
prose(f"""
{model} read {len(text.tokens):,} contexts of {text.tokens.shape[1]:,} tokens, from {len(set(text.source)):,} sources of
{len(kinds)} kind{'s' if len(kinds) > 1 else ''} ({', '.join(kinds)}). Of the activations at `{p.site}`, {n_fit:,} were used to fit linear maps
and {n_eval:,}, from other {unit}, to score them. The SAE `{name}` has {table.loc[name, 'width']:,} latents, of which
{table.loc[name, 'l0']:.0f} are active on a token. It leaves {interval(*fvu)} of the variance of the activations unexplained.
**Of this {interval(*linear)} is linear error, which a linear map of the activation predicts, and {interval(*nonlinear)} is
nonlinear error** ({{numref}}`{main}`{' shows all widths' if law else ''}). Dimension by dimension, a linear
map explains {interval(*vector)} of the error vector on average, and {interval(*norm)} of its squared norm ($R^2$). {spread}
{f"Of the {len(claims)} claims of the paper that this run tests: {', '.join(told)} ({{numref}}`tab-intro-claims`)." if len(claims)
 else "The chapters test the paper's claims one by one."}
{'This is the `smoke` preset: an early layer, little text and tiny SAEs, to see that everything runs. It never says more '
'than *cannot say*.' if p.name == 'smoke' else ''}
""")

# %% tags=["hide-input"]
figures.table(
    pd.DataFrame({
        "the paper says": claims["text"], "here": [interval(*each, 2) for each in claims[["value", "low", "high"]].to_numpy()],
        "verdict": [f"**{each}**" for each in claims["verdict"]], "chapter": [f"{{doc}}`{each}`" for each in claims["notebook"]],
    }),
    "The paper's claims and this run. *Agree*: our whole 95% interval lies in the range that the claim states or, where it "
    "states none, that this book reads into it; *differ*: all of it lies outside; else *cannot say*. {doc}`14_scoreboard` has "
    "the ranges and what was measured.", "tab-intro-claims") if len(claims) else None

# %% [markdown]
# ## What an SAE is, and what its dark matter is
#
# Inside a language model, every token has an {term}`activation` $x$ at every layer: a vector of some hundreds or thousands
# of numbers. Single numbers in it mean little. An {term}`SAE` looks for directions that do. It holds a large
# {term}`dictionary` of directions, its {term}`latents <latent>`, and writes each activation as a sum of a few of them:
# $x \approx \mathrm{Sae}(x)$. Few, so that each can stand for something one can name; its {term}`L0` is how many.
#
# What the sum misses, $\mathrm{SaeError}(x) = x - \mathrm{Sae}(x)$, is its {term}`dark matter`. One might expect noise. The
# paper's finding is that much of it is predictable: a linear map of $x$, fitted once, tells a good part of the error in
# advance. That part is the {term}`LinearError`; what remains is the {term}`NonlinearError`. The two behave differently,
# and the paper reads them as different failures: features that the SAE has not learned, and something that it adds or
# that is no sparse sum of features at all. The exact definitions are on the page {doc}`../book/notation`.
#
# ## How the book is organised
#
# One chapter a section of the paper; each states the claim, measures it, and says whether the two agree. Numbers of the paper
# that its text states are given as they are; some that exist only as heights in its figures, or in notes on an earlier version, were
# not at hand when this was written, and are marked *unverified* or *not known*.
#
# 1. {doc}`01_data`: the model, the text, the SAEs, and the few tokens that would spoil everything.
# 2. {doc}`02_norm`: can one tell in advance how *large* the error is?
# 3. {doc}`03_vector`: can one tell the error itself? The split into linear and nonlinear error.
# 4. {doc}`04_scaling`: what happens as SAEs grow?
# 5. {doc}`05_per_token`: the same, token by token.
# 6. {doc}`06_norm_test`: why a norm can be predicted at all, and which vectors pass the test.
# 7. {doc}`07_synthetic`: can the split be trusted? A check with errors that are known.
# 8. {doc}`08_on_error`: SAEs trained on the two parts of the error.
# 9. {doc}`09_interpret`: can their latents be understood?
# 10. {doc}`10_downstream`: what the parts do to the model's predictions.
# 11. {doc}`11_pursuit`: would a better encoder help?
# 12. {doc}`12_components`: what SAEs at other places know of the error.
# 13. {doc}`13_depth`: the same measurements from the first layers to the last.
# 14. {doc}`14_scoreboard`: every claim, the measurement and the verdict in one table.
# 15. {doc}`15_training`: beyond the paper, would SAEs that train longer change it?
# 16. {doc}`16_sensitivity`: beyond the paper, which choices of the experiment would change it?
#
# Words are explained in the {doc}`../book/glossary`, symbols in {doc}`../book/notation`; {doc}`../book/figures` lists which
# figure here belongs to which figure of the paper, and {doc}`90_provenance` the versions, the hardware and the time that
# each chapter took.
#
# ## How to run it
#
# `make book` builds these pages from nothing, on a laptop, without a model hub. Every chapter is a notebook that takes
# parameters, so that it can be run on another model, layer, text or SAE, and `python -m darkmatter decompose` answers for one
# SAE of your own what its error is made of. {doc}`../book/how-to-run` explains all three.
#
# ## How results are reported
#
# - **Held out.** Linear maps are fitted on some source documents and scored on others ({ref}`notation-split`).
# - **With an interval.** Brackets are 95% {term}`bootstrap intervals <bootstrap interval>` over the held-out sources
#   ({ref}`notation-intervals`). They say what other text would change, not what other SAEs would.
# - **By a named protocol.** The paper's text, the authors' code and good practice differ in details that matter. Numbers are
#   from the protocol `strict` unless they say otherwise ({ref}`notation-protocols`).
# - **Verdicts by a rule.** *Agree*, *differ* or *cannot say* is decided in code, from the interval and a range that is
#   stated beside it.
#
# ## What this is not
#
# - **Not the paper's models.** The paper reads Gemma 2 and Llama 3.1 with 2 to 9 billion weights. The default here has 135
#   million, is tuned to follow instructions, and its weights were stored in 4 bits.
# - **Not the paper's SAEs.** The default SAEs were trained by this project, on a few million tokens, and are narrower.
# - **Not the authors' code.** Everything was written afresh. Where a number of the paper could not be found, the chapters say
#   so and set nothing against it.

# %% tags=["hide-cell"]
run.add_rows(result.rows[(result.rows["sae"] == name)
                         & result.rows["metric"].isin(["l0", "fvu", "fvu_nonlinear", "r2_vector", "r2_norm"])])
run.add("fvu_linear", *linear, n_eval, "tokens", name)
record = run.finish()
