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
# # SAEs trained on the error
#
# The error of an {term}`SAE` has a part that is linear in $x$ and a part that is not
# ({eq}`eq-linear`). An SAE can be trained on any set of vectors, so also on these parts. It
# succeeds where vectors are sums of a few directions. So it can serve as an instrument: **is
# {term}`LinearError` made of sparse features, and {term}`NonlinearError` less so?**
#
# {cite:t}`engels2024dark` trained {term}`TopK` SAEs with $k = 32$ on both parts of the error of an
# SAE of Gemma 2 2B until they converged, after about 100 million tokens. The SAE on NonlinearError
# left .59 of the variance unexplained, the one on LinearError .54. They take the difference as a
# sign that NonlinearError is harder to build from sparse features.
#
# A difference of {term}`FVU` can have plainer reasons: the two parts have different variances and
# spread over different numbers of dimensions. The paper does not report such controls; here they
# come with the result.
#
# **Recorded or computed.** Training these SAEs takes hours on a CPU. Where a preset ships them,
# they are not trained again when the book is built: what is said of seeds, controls and longer
# training is read from a dated record, `artifacts/on-error.json`. The targets, two short training
# runs, and the scores on held-out sources, on which the verdict rests, are computed when the page
# is built.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # the SAE whose error is taken apart: release:sae_id, directory, artifact:NAME
seeds: int = 2  # seeds of each target, where the SAEs are trained on the spot
short_tokens: int = -1  # tokens of the short training runs; -1: a twentieth of the preset's

# %%
import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from darkmatter import survey
from darkmatter.book import figures, records, reference
from darkmatter.errors import DarkmatterError
from darkmatter.experiments import error_parts, on_error
from darkmatter.models import activations
from darkmatter.regression import STRICT
from darkmatter.saes.references import load_sae

run = records.start("08_on_error", preset, sae=sae, seeds=seeds, short_tokens=short_tokens)
p = run.preset
if seeds < 1 or short_tokens < -1:
    raise DarkmatterError("seeds should be at least 1, and short_tokens a number of tokens or -1.")

# %% [markdown]
# ## The targets
#
# The map $b^*$ is fitted on the fitted sources of the evaluation text, as in the chapters before.
# Then each part is written out once for every {term}`kept token`. The step that makes the parts,
# block by block:

# %% tags=["hide-input"]
figures.source(error_parts.split_error)

# %%
acts = activations.evaluation(p)
base = load_sae(p.default_sae, p)
fit = survey.fitted_rows(p, acts, STRICT)  # bool [token]: is its source one of the fitted ones?
targets = {part: error_parts.part(base, acts, fit, part) for part in error_parts.PARTS}
TERMS = {"linear": "LinearError", "nonlinear": "NonlinearError"}
LABELS = {"linear": "linear error", "nonlinear": "nonlinear error", "error": "SaeError", "x": "x",
          "gaussian-nonlinear": "Gaussian like nonlinear",
          "gaussian-linear": "Gaussian like linear"}

# %% [markdown]
# What an SAE can do with a part depends on how its variance is spread. Three numbers say it:
#
# - its **variance**, here as a share of the variance of $x$;
# - its **effective dimension** $\bigl(\sum_i \lambda_i\bigr)^2 / \sum_i \lambda_i^2$, with
#   $\lambda_i$ the eigenvalues of its covariance: as many dimensions of equal variance would give
#   the same value;
# - its **FVU under PCA** with as many directions as the SAE has active latents. PCA takes the same
#   directions for every token; an SAE chooses them token by token.

# %%
width, k = p.training.on_error  # latents, and active latents, of every SAE on the error
spectra = {part: error_parts.spectrum(error_parts.rows_where(rows, fit))
           for part, rows in targets.items()}


def by_pca(part: str):
    """Rebuild rows [n, d] of a part from its k leading directions on the fitted tokens."""
    mean, _, vectors = spectra[part]
    leading = vectors[:, -k:].float()
    return lambda y: mean.float() + (y - mean.float()) @ leading @ leading.T


variance = {part: float(values.sum()) for part, (_, values, _) in spectra.items()}
dimension = {part: error_parts.effective_dimension(spectra[part][1]) for part in targets}
pca = {part: on_error.held_out_fvu(p, targets[part], fit, by_pca(part)) for part in targets}

# %%
n_fit, basis = int(fit.sum()), pca["x"].basis()
# The share of a part's variance in its leading directions, and how many of them hold 90%.
shares = {part: values.flip(0).cumsum(0) / values.sum() for part, (_, values, _) in spectra.items()}
needed = {part: 1 + int((share < 0.9).sum()) for part, share in shares.items()}
figures.table(pd.DataFrame({
    "target": [LABELS[part] for part in targets],
    "variance, share of that of x": [variance[part] / variance["x"] for part in targets],
    "effective dimension": [dimension[part] for part in targets],
    "directions for 90% of it": [needed[part] for part in targets],
    f"FVU under PCA with {k} directions": [f"{pca[part]}" for part in targets],
}), f"The targets, for the error of `{base.name}`. The first three numbers are of the {n_fit:,} "
    f"fitted tokens, PCA is scored on {basis} (95% intervals).", "tab-on-error-targets",
    digits={"effective dimension": 1})

# %% tags=["hide-input"]
fig = go.Figure()
for place, (part, share) in enumerate(shares.items()):
    shade = figures.MEANING.get(LABELS[part], list(figures.COLOURS)[place])
    dash = ("solid", "dash", "dot", "dashdot")[place]
    fig.add_scatter(x=np.arange(1, len(share) + 1), y=share, mode="lines", name=LABELS[part],
                    line={"color": figures.colour(shade), "dash": dash})
fig.update_xaxes(title_text="principal directions", type="log", tickvals=[1, 3, 10, 30, 100, 300])
fig.update_yaxes(title_text="share of variance", rangemode="tozero", tickformat="~%")
figures.finish(
    fig, "fig-on-error-spectrum",
    f"Share of a target's variance in its leading principal directions; n = {n_fit:,} fitted "
    "tokens. The further to the right a curve, the more dimensions the target fills.",
    "Cumulative spectra. Directions that hold 90% of the variance: "
    + ", ".join(f"{LABELS[part]} {needed[part]}" for part in targets) + ".")

# %% tags=["hide-input"]
wider, narrower = sorted(TERMS, key=lambda part: -dimension[part])
pca_apart = float(pca["nonlinear"] - pca["linear"])
harder = "NonlinearError" if pca_apart > 0 else "LinearError"
figures.prose(f"""
The two parts are not alike. {TERMS[wider]} fills more dimensions: effectively
{dimension[wider]:.0f}, against {dimension[narrower]:.0f} for {TERMS[narrower]}. PCA, which knows
nothing of sparsity, leaves more of {harder}. So even if neither part held any sparse features, an
SAE would not leave the same share of both.
""")

# %% [markdown]
# ## Training, in short
#
# The SAEs that this chapter reports saw the training text, whose activations are not made anew each
# time the book is built. To show the method, here are two short runs. They see the fitted sources
# of the evaluation text, and are watched on held-out ones. Nothing else in the book uses these two
# SAEs.

# %%
def curve(record: dict) -> pd.Series:
    """FVU at the checkpoints of a training run and at its end, by the tokens it had seen."""
    points = [*record["curve"], {"tokens": record["tokens"], "fvu": record["fvu"]}]
    return pd.DataFrame(points).groupby("tokens")["fvu"].last()


tokens = short_tokens if short_tokens >= 0 else p.training.tokens // 20
short = {}
for part in TERMS:
    folder = on_error.short(p, acts, fit, part, max(tokens, p.training.batch))
    short[part] = json.loads((folder / "record.json").read_text())
figures.table(
    pd.DataFrame({LABELS[part]: curve(short[part]) for part in TERMS}).reset_index(),
    f"FVU of two TopK SAEs (width {width:,}, $k$ = {k}) in the course of a short training run, on "
    f"held-out tokens. It sees {short['linear']['distinct_tokens']:,} different tokens.",
    "tab-on-error-short")

# %% [markdown]
# Compare the first row with the last. Where the order of the two columns turns, it depends on how
# long one trains: it can be read only from runs that have converged.
#
# ## Trained on the training text
#
# The SAEs themselves are all trained by one recipe: that of the {term}`ladder`, on the same
# training text, with $b^*$ fitted on that text too. There are three sets beside the two parts of
# the error. **SaeError** and **x** are references. The two **Gaussians** are the control: each
# token is drawn independently from a normal distribution with the mean and the covariance of a
# part. A Gaussian has its spectrum and nothing else, no sparse features. How much lower the FVU of
# a part lies than that of its Gaussian is what sparsity contributes.

# %% tags=["hide-input"]
figures.source(error_parts.gaussian_like)

# %% [markdown]
# FVU is watched on contexts that are left out of training, the last of the training text. The
# numbers of this section are the record of runs of an earlier day, unless the preset trains its
# SAEs on the spot; the table says which day.

# %%
trained, missing = {}, ""
try:
    trained = {part: on_error.load(p, part) for part in on_error.SHIPPED}
except DarkmatterError as reason:  # SAEs on this error are neither shipped nor trained on the spot
    missing = str(reason)
runs = on_error.recorded(p, range(seeds)) if trained else []
if runs:
    # One row a checkpoint; ``budget``: the tokens that the run trains on in all.
    history = pd.concat([curve(record).reset_index().assign(
        target=record["target"], budget=record["tokens"]) for record in runs])
    usual = history["budget"].min()
    ends = history[history["tokens"] == history["budget"]]
    longer = ends[ends["budget"] > usual].groupby("target")["fvu"].mean()
    by_target = ends[ends["budget"] == usual].groupby("target")["fvu"]
    finals = by_target.agg(["mean", "min", "max", "count"])
    finals = finals.loc[[target for target in LABELS if target in finals.index]]

# %% tags=["hide-input"]
if not trained:
    display(figures.prose(f"""
    **The rest of this chapter needs SAEs on the error of `{base.name}`, and there are none.**
    {missing}
    """))
if runs:
    points = history[history["budget"] == usual].groupby(["target", "tokens"])["fvu"]
    curves = points.agg(value="mean", low="min", high="max").loc[list(finals.index)].reset_index()
    fig = figures.interval_points(curves.assign(label=curves["target"].map(LABELS)), "tokens",
                                  group="label", x_title="training tokens", log_x=False,
                                  y_title="FVU on left-out contexts")
    fig.update_yaxes(rangemode="tozero").update_xaxes(tickformat="~s")
    ended = ", ".join(f"{LABELS[part]} {fvu:.2f}" for part, fvu in finals["mean"].items())
    display(figures.finish(
        fig, "fig-on-error-curves",
        "FVU against training tokens, on contexts left out of training; "
        f"width {width:,}, $k$ = {k}. Points are means over the seeds of "
        "{numref}`tab-on-error-final`, bars their range.", f"Falling curves that end at {ended}.",
        paper="The SAEs of Figure 8", height=480))

# %%
if runs:
    days = ", ".join(sorted({record.get("date", "a day not noted") for record in runs}))
    versions = runs[0]["versions"]
    halves = curves.groupby("target")["value"].apply(lambda fvu: fvu.iloc[len(fvu) // 2])
    table = pd.DataFrame({
        "target": [LABELS[target] for target in finals.index],
        "seeds": finals["count"], "FVU, mean of seeds": finals["mean"],
        "least": finals["min"], "most": finals["max"],
        "fall over the last half of training": halves[finals.index] - finals["mean"],
    })
    if len(longer):
        times = f"{history['budget'].max() / usual:.0f} times the tokens"
        table[f"with {times}"] = longer.reindex(finals.index).to_numpy()
    display(figures.table(
        table, f"FVU at the end of training ({usual:,} tokens), on contexts left out of training. "
        f"Runs of {days}, with torch {versions['torch']} and sae-lens {versions['sae-lens']}.",
        "tab-on-error-final"))

# %% [markdown]
# A few differences say what to make of this. If the two Gaussians differ in the same direction as
# the two parts, the spectra alone explain some of what separates the parts. If they differ in the
# other direction, the spectra hide part of it. A difference that more training leaves as it is, is
# not one of speed.

# %%
if runs:
    end = finals["mean"].reindex(list(LABELS))  # NaN for what a suite has no record of
    apart, gaussians_apart = (end[f"{kind}nonlinear"] - end[f"{kind}linear"]
                              for kind in ("", "gaussian-"))
    gain = {part: end[f"gaussian-{part}"] - end[part] for part in TERMS}
    late = longer.reindex(list(TERMS))
    spread = (finals["max"] - finals["min"])[finals["count"] > 1].max()  # NaN for one seed
    differences = {"NonlinearError − LinearError": apart,
                   "the same, with more tokens": late["nonlinear"] - late["linear"],
                   "the same, of their Gaussians": gaussians_apart,
                   **{f"Gaussian − {TERMS[part]}": gain[part] for part in TERMS},
                   "most − least of the seeds, at most": spread}
    display(figures.table(
        pd.DataFrame(differences.items(), columns=["difference of FVU", "value"]).dropna(),
        f"Differences at the end of training, of the runs of {days}.", "tab-on-error-differences"))

# %% tags=["hide-input"]
if runs and "gaussian-linear" in finals.index:
    richer, poorer = sorted(TERMS, key=lambda part: -gain[part])
    fell = float((finals["mean"] - longer).max())
    display(figures.prose(f"""
    Against its own Gaussian, {TERMS[richer]} is rebuilt better by {gain[richer]:.3f}, and
    {TERMS[poorer]} by {gain[poorer]:.3f}. By this measure {TERMS[richer]} has more of what an SAE
    can use.
    """))
    if len(longer):
        display(figures.prose(f"Had they converged? With {times}, FVU falls by at most {fell:.3f} "
                              "more."))

# %% [markdown]
# ## On held-out sources
#
# The contexts above that are left out of training come from documents of which other contexts are
# trained on. For a stricter comparison the SAEs of seed 0 are scored on the evaluation text, no
# source of which is in the training text. The map $b^*$ is that of the evaluation text. The
# intervals say how much the numbers would change with other text; the seeds above say how much with
# another start of training.

# %%
if trained:
    scores = {part: on_error.held_out_fvu(p, targets[part], fit, lambda y, own=own: own(y)[0])
              for part, own in trained.items()}
    difference = scores["nonlinear"] - scores["linear"]  # draw by draw: the same sources for both
    display(figures.table(pd.DataFrame({
        "SAE on": [LABELS[part] for part in trained],
        "SAE": [f"`{own.name}`" for own in trained.values()],
        "FVU": [f"{scores[part]}" for part in trained],
        f"PCA with {k} directions": [f"{pca[part]}" for part in trained],
    }), f"FVU of each SAE on its own target: {basis}, 95% intervals over sources.",
        "tab-on-error-held-out"))

# %% tags=["hide-input"]
if trained:
    display(figures.prose(f"""
    The FVU on NonlinearError minus that on LinearError is {difference}. It is taken on the same
    draws of sources, so that text that is hard for both cancels.
    """))

# %% [markdown]
# ## Agreement with the paper
#
# The paper's two numbers, .59 and .54, are of SAEs with 36,864 latents for 2,304 dimensions, on the
# error of another SAE of another model; taken singly they cannot be compared with ours. Their
# difference can. **The rule:** *agree* if our whole interval lies above 0, *differ* if it lies
# wholly below, else *cannot say*; the `smoke` preset always *cannot say*. How large the difference
# is stands beside the paper's. It is one number, so it is judged once.

# %%
if trained:
    statement = "An SAE on NonlinearError leaves a larger share unexplained than one on LinearError"
    verdict = run.claim(statement, "FVU on NonlinearError − FVU on LinearError", difference,
                        (0, np.inf), paper=".59 against .54")
    display(figures.table(pd.DataFrame({
        "the paper": [statement], "its numbers": [".59 − .54 = .05"], "here": [f"{difference}"],
        "agrees if": ["above 0"], "verdict": [verdict],
    }), f"The paper's statement, and this run ({basis}).", "tab-on-error-agreement"))

# %%
if runs:
    # Do the spectra alone put the parts in the order in which the SAEs find them?
    opposite = ("The spectra alone would give the opposite order: PCA and the Gaussians leave more "
                f"of {harder}. So they do not explain the difference; they hide part of it.")
    alike = ("The spectra alone would give the same order. So part of the difference, perhaps all, "
             "needs no sparse features to explain it.")
    unclear = "PCA and the Gaussians do not agree on which part the spectra alone make the harder."
    unknown = "For these SAEs there is no record of Gaussians: what the spectra do is not known."
    same = gaussians_apart * float(difference) > 0
    by_spectra = alike if same else opposite
    if not gaussians_apart * pca_apart > 0:
        by_spectra = unknown if pd.isna(gaussians_apart) else unclear
    display(figures.prose(f"""
    {by_spectra} What differs from the paper: the model, the width of the SAEs ({width:,} latents
    for {acts.x.shape[1]} dimensions), and {usual / 1e6:,.2g} million training tokens instead of
    about 100 million.
    """))

# %%
for part in targets:
    run.add(f"variance_share_{part}", variance[part] / variance["x"], n=n_fit, unit="tokens",
            sae=base.name)
    run.add(f"effective_dimension_{part}", dimension[part], n=n_fit, unit="tokens", sae=base.name)
    run.add_draws(f"fvu_pca_{part}", pca[part], "tokens", base.name)
for part in trained:
    run.add_draws(f"fvu_on_{part}", scores[part], "tokens", trained[part].name)
if trained:
    run.add_draws("fvu_on_nonlinear_minus_linear", difference, "tokens", base.name)
for target, row in finals.iterrows() if runs else ():
    run.add(f"fvu_seeds_{target}", row["mean"], row["min"], row["max"], int(row["count"]), "seeds")
record = run.finish()

# %% tags=["hide-input"]
display(*reference.beside(record))
