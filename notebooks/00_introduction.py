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
# A sparse autoencoder (SAE) explains what a language model holds for a token as a sum of a few
# learned features. It never explains all of it. This book asks what the rest is made of. It
# follows *Decomposing The Dark Matter of Sparse Autoencoders* {cite:p}`engels2024dark` section by
# section and measures each claim again, on a real model.
#
# Every number is computed when the book is built, with four exceptions. {doc}`08_on_error`,
# {doc}`15_training` and {doc}`16_sensitivity` also read dated records of training runs that take
# hours, and {doc}`17_speed` those of timings.

# %% tags=["parameters", "hide-input"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # SAEs, with commas between: release:sae_id, directory, artifact:NAME, train:WxL0

# %%
import numpy as np
import pandas as pd
from IPython.display import display

from darkmatter import survey
from darkmatter.book import figures, records, scoreboard
from darkmatter.book.figures import interval, prose
from darkmatter.experiments import scaling

run = records.start("00_introduction", preset, sae=sae)
p = run.preset

# %%
result = survey.run(p)  # the model reads the text, and the error of every SAE is taken apart
table = result.table()
name = result.names[p.default_sae]  # the SAE that stands for all where one is needed
rungs = scaling.ladder(table)  # the SAEs of one L0, from the narrowest to the widest
widths = rungs["width"].to_numpy(float)
fvu = [result.draws(key, "fvu") for key in rungs["sae"]]  # the share that each leaves unexplained
nonlinear = [result.draws(key, "fvu_nonlinear") for key in rungs["sae"]]
floor = sum(nonlinear) / len(nonlinear)
law = scaling.power_law(widths, fvu, p.seed) if len(widths) >= 3 else None

# %%
model = f"`{p.model}`"
if p.model == "smollm2":
    model = "SmolLM2-135M-Instruct (4-bit weights, dequantised)"
basis = fvu[0].basis(result.unit)
main = "fig-intro-bands" if law else "fig-intro-split"
if law:
    border = f"not determined by these points, as {law.doubt}" if law.doubt else f"at {law.c}"
    middle = ("Blue, the *absent-feature gap*: what no width removes, but a linear map of the "
              f"activation predicts; its upper border is {border}.")
    if float(law.c) <= float(floor):
        middle = (f"The constant of that law, {law.c}, does not lie above the mean of "
                  f"$\\mathrm{{FVU}}_\\mathrm{{nonlinear}}$, {floor}: this fit leaves no band of "
                  "absent-feature gap between the two, and none is drawn.")

# %% tags=["hide-input"]
if law:
    points = pd.DataFrame([
        {"width": width, "fvu": whole.value, "low": whole.low, "high": whole.high,
         "nonlinear": rest.value}
        for width, whole, rest in zip(widths, fvu, nonlinear, strict=True)])
    far = np.geomspace(widths[0], 10 * widths[-1], 60)
    curve = pd.DataFrame({"width": far, "fit": [float(height) for height in law.curve(far)]})
    display(figures.finish(
        figures.bands(points, curve, float(law.c), float(floor)), main,
        f"What SAEs of growing width leave unexplained of {model} at `{p.site}`, L0 "
        f"{rungs['l0'].mean():.0f}, as a share of the variance. Green: what a wider SAE would "
        f"still remove, by a power law drawn ten times past the widest one. {middle} Orange: the "
        f"rest, nonlinear error. Points are measured ({basis}). {{doc}}`04_scaling` says how.",
        f"Bands against SAE width. FVU goes from {fvu[0].value:.3f} at {widths[0]:,.0f} latents to "
        f"{fvu[-1].value:.3f} at {widths[-1]:,.0f}; the nonlinear part is {floor.value:.3f} on "
        "average.", paper="Figure 1"))
else:
    titles = {"fvu": "FVU", "fvu_nonlinear": "FVU<sub>nonlinear</sub>"}
    l0 = table.set_index("sae")["l0"]
    points = result.rows[result.rows["metric"].isin(titles)]
    label = [f"{row.width:,} · L0 {l0[row.sae]:.0f}" for row in points.itertuples()]
    points = points.assign(SAE=label, part=points["metric"].map(titles))
    display(figures.finish(
        figures.bars_by_setting(points, "SAE", group="part", y_title="share of variance"), main,
        f"What the error is made of, for {model} at `{p.site}`: the share of the variance that the "
        "SAE leaves unexplained, and what is left when the best linear map of the activation is "
        f"added ({basis}). The paper's main figure takes three or more widths at one L0.",
        f"Bars, a pair an SAE: FVU between {table['fvu'].min():.3f} and {table['fvu'].max():.3f}."))

# %% [markdown]
# ## What was found

# %%
whole, rest = (result.draws(name, metric) for metric in ("fvu", "fvu_nonlinear"))
vector, norm = (result.draws(name, metric) for metric in ("r2_vector", "r2_norm"))
linear_part = whole - rest  # draw by draw: what LinearError takes away
run.add_draws("fvu_linear", linear_part, sae=name)
metrics = ["l0", "fvu", "fvu_nonlinear", "r2_vector", "r2_norm"]
rows = result.rows[result.rows["sae"] == name]
run.add_rows(rows[rows["metric"].isin(metrics)])
record = run.finish()

# %%
chapters = [record for record in records.load_all() if record["preset"] == p.name]
claims = records.claims(chapters)
falls = [row for record in chapters for row in record["metrics"]
         if row["name"] == "fall of FVU with gradient pursuit, %" and row["sae"] == name
         and row["low"] is not None and row["low"] > 0]
search = ("How much of it a better encoder would take away, with the same dictionary, "
          "{doc}`11_pursuit` measures.")
for row in falls:
    size = interval(row["value"], row["low"], row["high"], 0)
    search = ("Not all of it is the price of the dictionary: a longer search for the latents of "
              "each token, gradient pursuit, lowers this SAE's FVU by "
              f"{size} percent ({{doc}}`11_pursuit`).")
spread = ""
if len(table) > 1:
    low, high = table.min(numeric_only=True), table.max(numeric_only=True)
    spread = (f"Over the {len(table)} SAEs of this run the first goes from "
              f"{low['r2_vector']:.2f} to {high['r2_vector']:.2f}, the second from "
              f"{low['r2_norm']:.2f} to {high['r2_norm']:.2f}.")
tested = scoreboard.in_words(claims) or "The chapters test the paper's claims one by one."
smoke = ""
if p.name == "smoke":
    smoke = ("This is the `smoke` preset: an early layer, little text and tiny SAEs, to see that "
             "everything runs. It never says more than *cannot say*.")

# %% tags=["hide-input"]
text, default = result.acts.text, table.set_index("sae").loc[name]
prose(f"""
{model} read {len(text.tokens):,} contexts of {text.tokens.shape[1]:,} tokens, from
{len(set(text.source)):,} sources ({', '.join(sorted(set(text.domains)))}). Linear maps were fitted
on {rows['n_fit'].iloc[0]:,} tokens and scored on {whole.n:,}, from other {result.unit}.

The SAE `{name}` has {default['width']:,.0f} latents, of which {default['l0']:.0f} are active on a
token. It leaves {whole} of the variance of the activations unexplained. **Of this, {linear_part} is
the linear part, which a linear map of the activation predicts, and {rest} is nonlinear**
({{numref}}`{main}`). Dimension by dimension, such a map explains {vector} of the error vector on
average. Of the error's squared norm a linear map explains {norm} ($R^2$). {spread}

{search} {tested} {smoke}
""")

# %%
judged = scoreboard.judged(claims)
papers = judged[judged["owner"] != scoreboard.OWNERS[2]]  # what is not the paper's: scoreboard
measured = [interval(*ends, 2) for ends in papers[["value", "low", "high"]].to_numpy()]
figures.table(
    pd.DataFrame({"the paper says": papers["text"], "here": measured,
                  "verdict": "**" + papers["verdict"] + "**",
                  "chapter": "{doc}`" + papers["notebook"] + "`"}),
    "The paper's claims and this run. *Agree*: our whole 95% interval lies in the range that the "
    "claim states or, where it states none, that this book reads into it; *differ*: all of it lies "
    "outside; else *cannot say*. Two readings of the same words count once. {doc}`14_scoreboard` "
    "has the ranges, what was measured, and how large each effect is.",
    "tab-intro-claims") if len(papers) else None

# %% [markdown]
# ## What an SAE is, and what its dark matter is
#
# Inside a language model, every token has an {term}`activation` $x$ at every layer: a vector of
# some hundreds or thousands of numbers. Single numbers in it mean little. An {term}`SAE` looks for
# directions that do. It holds a large {term}`dictionary` of directions, its
# {term}`latents <latent>`, and writes each activation as a sum of a few of them:
# $x \approx \mathrm{Sae}(x)$. Few, so that each can stand for something one can name; its
# {term}`L0` is how many.
#
# What the sum misses, $\mathrm{SaeError}(x) = x - \mathrm{Sae}(x)$, is its {term}`dark matter`.
# One might expect noise. The paper's finding is that much of it is predictable: a linear map of
# $x$, fitted once, tells a good part of the error in advance. That part is the
# {term}`LinearError`; what remains is the {term}`NonlinearError`. The two behave differently, and
# the paper reads them as different failures: features that the SAE has not learned, and something
# that it adds or that is no sparse sum of features at all. The exact definitions are on the page
# {doc}`../book/notation`.
#
# ## How the book is organised
#
# Most chapters take one section of the paper: they state the claim, measure it, and say whether
# the two agree. Numbers that the paper's text states are given as they are. Some exist only as
# heights in its figures, or in notes on an earlier version; these are marked *unverified* or *not
# known*.
#
# 1. {doc}`01_data`: the model, the text, the SAEs, and the few tokens that would spoil everything.
# 2. {doc}`02_norm`: can one tell in advance how *large* the error is?
# 3. {doc}`03_vector`: can one tell the error itself? The split into linear and nonlinear error.
# 4. {doc}`04_scaling`: what happens as SAEs grow?
# 5. {doc}`05_per_token`: the same, token by token.
# 6. {doc}`06_norm_test`: which vectors have a norm that can be predicted? And
#    {doc}`06b_norm_theory`: why a norm can be predicted at all, and what such a test measures.
# 7. {doc}`07_synthetic`: can the split be trusted? A check with errors that are known.
# 8. {doc}`08_on_error`: SAEs trained on the two parts of the error.
# 9. {doc}`09_interpret`: can their latents be understood?
# 10. {doc}`10_downstream`: what the parts do to the model's predictions.
# 11. {doc}`11_pursuit`: would a better encoder help?
# 12. {doc}`12_components`: what SAEs at other places know of the error.
# 13. {doc}`13_depth`: the same measurements from the first layers to the last.
# 14. {doc}`14_scoreboard`: every claim, the measurement and the verdict.
# 15. {doc}`15_training`: beyond the paper, would SAEs that train longer change it?
# 16. {doc}`16_sensitivity`: beyond the paper, which choices of the experiment would change it?
#
# Words are explained in the {doc}`../book/glossary`, symbols in {doc}`../book/notation`;
# {doc}`../book/figures` lists which figure here belongs to which figure of the paper, and
# {doc}`90_provenance` the versions, the hardware and the time that each chapter took.
#
# ## How to run it
#
# `make book` builds these pages from nothing, on a laptop, without a model hub. Every chapter is a
# notebook that takes parameters, so that it can be run on another model, layer, text or SAE, and
# `python -m darkmatter decompose` answers for one SAE of your own what its error is made of.
# {doc}`../book/how-to-run` explains all three.
#
# ## How results are reported
#
# - **Held out.** Linear maps are fitted on some source documents and scored on others
#   ({ref}`notation-split`).
# - **With an interval.** Brackets are 95% {term}`bootstrap intervals <bootstrap interval>` over
#   the held-out sources ({ref}`notation-intervals`). They say what other text would change and,
#   but for two kinds in {doc}`04_scaling`, not what other SAEs would.
# - **By a named protocol.** The paper's text, the authors' code and good practice differ in
#   details that matter. Numbers are from the protocol `strict` unless they say otherwise
#   ({ref}`notation-protocols`).
# - **Verdicts by a rule.** *Agree*, *differ* or *cannot say* is decided in code, from the interval
#   and a range that is stated beside it.
#
# ## What this is not
#
# - **Not the paper's models.** The paper reads Gemma 2 and Llama 3.1 with 2 to 9 billion weights.
#   The default here has 135 million, is tuned to follow instructions, and its weights were stored
#   in 4 bits.
# - **Not the paper's SAEs.** The default SAEs were trained by this project, on a few million
#   tokens, and are narrower.
# - **Not the authors' code.** Everything was written afresh. Where a number of the paper could not
#   be found, the chapters say so and set nothing against it.
