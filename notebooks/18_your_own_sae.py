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
# # Your own SAE
#
# You have trained an {term}`SAE`, or downloaded one. **What is its error made of?** Where you hold
# the SAE and activations as tensors, three lines of Python answer. Where you have a model, a text
# and the SAE's directory, this chapter is a notebook that answers, and one command runs it on
# them:
#
# ```bash
# papermill notebooks/18_your_own_sae.ipynb mine.ipynb \
#     -p preset smollm2 -p sae path/to/my-sae -p corpus my-text.txt
# ```
#
# Leave `-p corpus` out to use the {term}`preset`'s own text. `-p site blocks.7.hook_mlp_out` moves
# to another place in the model. The result is `mine.ipynb`: this page, with your numbers. Every
# other chapter takes `-p sae` in the same way.
#
# In this book no SAE is given, so the notebook trains a small one, as you might.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # your SAE, in one of the forms of the table below; empty: one is trained here
site: str = ""  # where it reads, as a TransformerLens hook name; empty: the preset's site
corpus: str = ""  # your text: .txt, or .jsonl or .jsonl.zst with a document a line; empty: preset's
width: int = 512  # latents of the SAE that is trained here
k: int = 16  # its L0
steps: int = 100  # its training steps, of 1,024 tokens each

# %% tags=["hide-input"]
import os
import tempfile
import warnings
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in the page
warnings.filterwarnings("ignore", message="IProgress not found")

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

import darkmatter as dm
from darkmatter import decomposition, presets, regression, survey
from darkmatter.book import figures, records, report
from darkmatter.book.figures import number, prose
from darkmatter.models import activations
from darkmatter.saes.references import load_sae

run = records.start("18_your_own_sae", preset, sae=sae, site=site, corpus=corpus, width=width, k=k,
                    steps=steps)
p = run.preset
if not 0 < k <= width or steps < 1:
    raise dm.DarkmatterError(f"width, k and steps are {width}, {k} and {steps}, but k should lie "
                             "between 1 and width, and steps be at least 1.")
folder = Path(tempfile.mkdtemp()) / "my-sae"

# %% [markdown]
# ## In three lines
#
# `dm.decompose(sae, x, source=ids)` needs no model and no preset. `x` holds activations, one row a
# token; `ids` says which document each row is from, so that whole documents are held out; `sae` is
# a sae-lens SAE, or any function from $x$ to its reconstruction.
#
# First on a reconstruction whose answer is known: $x$ projected on 64 principal directions. That
# is a linear function of $x$, so its error is one too. All of it must be {term}`linear error
# <LinearError>`.
#
# The rows here are {term}`sources <source>` that the SAE below is not trained on.

# %%
acts = activations.evaluation(p)
seen = survey.fitted_rows(p, acts, regression.STRICT)  # these train the SAE below
rows = np.flatnonzero(~seen)[:40_000]
if len(rows) < 2 * acts.x.shape[1]:
    rows = np.arange(len(seen))  # of a short text, all
x = acts.x[torch.from_numpy(rows)].float()  # [token, d]
ids = acts.text.source[acts.context[rows]]  # the document of each token

# %%
middle = x.mean(0)
directions = torch.linalg.svd(x[:2000] - middle, full_matrices=False).Vh[:64]


def projected(x: torch.Tensor) -> torch.Tensor:
    """x on 64 directions, and its mean on the others."""
    return middle + (x - middle) @ directions.T @ directions


known = dm.decompose(projected, x, source=ids)
n = known.n_eval
assert float(known.fvu_nonlinear) < 0.001 * float(known.fvu), "its error is linear"
known

# %% [markdown]
# The $R^2$ of its error is 1 and its FVU_nonlinear is 0, but for rounding. A real SAE's error is
# not like that.
#
# ## An SAE, trained in ten lines
#
# This is plain sae-lens code; one line of it is this book's. It reads activations of the model in
# random order, trains a {term}`TopK` SAE on them, and saves a directory. The activations are those
# of the sources that the regressions below will be *fitted* on; those that *score* are never shown
# to it. (An SAE that is trained properly sees text of its own, and a thousand times more of it. On
# a small text this one learns its documents by heart, and its error there says less about others.)
#
# The line of this book is `evaluator`: `dm.Evaluator(x, source=ids)` is what sae-lens's trainers
# call now and then while they train. It adds `dark_matter/fvu_nonlinear` and the like to their
# log, which goes to Weights & Biases; here that is switched off, and the numbers are kept for the
# table below.

# %%
import wandb
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

history, evaluator = [], dm.Evaluator(x, source=ids)


def kept(*state: object) -> dict[str, float]:
    """What the evaluator says of the SAE as it is now, for the log and for this page."""
    history.append(evaluator(*state))
    return dict(history[-1])


def train(x: torch.Tensor) -> None:
    """Train on rows x [token, d] and save."""
    torch.manual_seed(p.seed)
    mine = TopKTrainingSAE(TopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=width, k=k, decoder_init_norm=0.5,
        normalize_activations="expected_average_only_in"))
    batches = (x[torch.randint(len(x), (1024,))] for _ in iter(int, 1))
    log = LoggingConfig(wandb_log_frequency=max(1, steps // 5), eval_every_n_wandb_logs=1)
    how = SAETrainerConfig(
        total_training_samples=1024 * steps, train_batch_size_samples=1024, lr=3e-3, lr_end=3e-4,
        lr_warm_up_steps=steps // 10, lr_decay_steps=steps // 3, dead_feature_window=steps,
        n_checkpoints=0, checkpoint_path=None, n_batches_for_norm_estimate=10, logger=log)
    with wandb.init(mode="disabled"):
        trained = SAETrainer(cfg=how, sae=mine, data_provider=batches, evaluator=kept).fit()
    trained.save_inference_model(folder)


if not sae:
    train(acts.x[torch.from_numpy(seen)].float())

# %%
NAMES = {"fvu": "FVU", "fvu_nonlinear": "FVU_nonlinear", "r2_vector": "R² of the error vector",
         "r2_norm": "R² of the squared error norm"}
shown = prose("An SAE was given, so none is trained here.")
if history:
    log = pd.DataFrame(history)[[f"dark_matter/{name}" for name in NAMES]]
    log.columns = NAMES.values()
    log.insert(0, "step", max(1, steps // 5) * np.arange(1, len(log) + 1))
    shown = figures.table(log, "What the evaluator said while the SAE trained, on documents that "
                          "it was not trained on: some are fitted on, the others scored. "
                          f"n = {n:,} held-out tokens.", "tab-own-training")
shown

# %% [markdown]
# With the finished SAE in hand, the three lines again, beside the projection. Both share
# every pass over $x$, and their bootstrap draws, so a difference has an interval of its own.

# %%
reference = sae or str(folder)
mine = presets.load(preset, sae=reference, site=site, corpus=corpus)
opened = load_sae(reference, mine)
both = dm.decompose({"projection": projected, "SAE": opened.sae}, x, source=ids)
both

# %%
lead = both["SAE"].fvu_nonlinear - both["projection"].fvu_nonlinear
prose(f"The nonlinear error of the SAE is {both['SAE'].fvu_nonlinear} of the variance, that of the "
      f"projection {both['projection'].fvu_nonlinear}; the difference is {lead} "
      f"(n = {lead.n:,} held-out tokens).")

# %% [markdown]
# ## What its error is made of
#
# From here on the SAE is measured as everywhere in this book: on the preset's text, fitted on some
# of its sources and scored on all others. {doc}`Chapter 3 <03_vector>` says how. The numbers need
# not be those above: there $b^*$ was fitted on fewer tokens, and on documents that the SAE was not
# trained on. The variance of the activation $x$ is split into what the SAE rebuilds, what it
# misses but a linear function of $x$ gives back (linear error), and the rest ({term}`nonlinear
# error <NonlinearError>`).

# %%
result = decomposition.of_preset(mine)
figures.table(pd.DataFrame([(row["name"], row["value"], row["about"])
                            for row in report.metrics(result)],
                           columns=["measure", "value [95% interval]", "what it says"]),
              f"The error of `{opened.name}` ({opened.width:,} latents) at `{mine.site}`. Fitted "
              f"on {result['n_fit']:,} tokens, scored on {result['n_eval']:,} held-out tokens.",
              "tab-own")

# %%
surveyed = survey.run(mine)
fvu, rest, linear = (surveyed.draws(opened.name, metric)
                     for metric in ("fvu", "fvu_nonlinear", "r2_vector_weighted"))
lesson = "Most of what it misses is out of reach of a linear map."
if float(fvu) > 1:
    lesson = ("FVU above 1 means that the SAE explains less than the mean does; see the list of "
              "causes below.")
elif float(linear) > 0.5:
    lesson = ("Most of what it misses is thus in reach of a linear map, as directions that it has "
              "not learned or shrinkage would be.")
prose(f"""
The SAE leaves {fvu} of the variance unexplained. Of the variance of its error, a share of {linear}
is a linear function of $x$. What is not, is {rest} of the variance of $x$: the nonlinear error.
{lesson}
""")

# %% [markdown]
# ## Beside the ladder
#
# A number says more beside others. The preset has SAEs of its own at its own site. Yours stands
# among them if it was measured at that site and on that text; then the same sources were fitted on
# and held out.

# %%
base = presets.load(preset)
comparable = (mine.site, mine.corpus, mine.model) == (base.site, base.corpus, base.model) \
    and reference not in base.saes
ladder = survey.run(base).table() if comparable else pd.DataFrame(columns=["fvu", "fvu_nonlinear"])
compared = pd.concat([surveyed.table().assign(sae=f"yours: {opened.name}"), ladder],
                     ignore_index=True)
better = int((ladder["fvu"] < float(fvu)).sum())
less = int((ladder["fvu_nonlinear"] < float(rest)).sum())

# %% tags=["hide-input"]
fig = go.Figure()
parts = {"nonlinear error": compared["fvu_nonlinear"],
         "linear error": (compared["fvu"] - compared["fvu_nonlinear"]).clip(lower=0)}
for name, share in parts.items():
    fig.add_bar(y=compared["sae"].str[-34:], x=share, name=name, orientation="h",
                marker_color=figures.colour(figures.MEANING[name], 0.75))
fig.update_layout(barmode="stack").update_xaxes(title_text="share of variance", rangemode="tozero")
fig.update_yaxes(autorange="reversed", title_text="")
whose = "your SAE and of the SAEs of the preset" if comparable else "your SAE"
heights = "; ".join(f"{row.sae}: FVU {number(row.fvu)}, nonlinear {number(row.fvu_nonlinear)}"
                    for row in compared.itertuples())
figures.finish(fig, "fig-own-ladder", f"FVU of {whose}, divided into linear and nonlinear error. "
               f"Held out; n = {result['n_eval']:,} tokens.", heights,
               height=120 + 34 * len(compared))

# %% tags=["hide-input"]
prose(f"""
Of the {len(ladder)} SAEs of the preset, {better} leave less variance unexplained than this one
(L0 {number(result['l0'], 0)}), and {less} have less nonlinear error. Width and L0 differ between
them, so that neither is a contest.
""" if comparable else f"""
This SAE reads `{mine.site}` of `{mine.model}` on `{mine.corpus}`; the preset's own SAEs read
another place or another text, or it is one of them. So it stands alone here; the report below sets
it beside the SAEs that ship with the book.
""")

# %% [markdown]
# ## A page to keep or send
#
# The command line measures the same and writes a report: one HTML file that needs no network, with
# these numbers, a passage of the text with the error under each token, the worst tokens in their
# contexts, and the shipped SAEs for comparison.

# %%
page = folder.with_name("report.html")
report.write(page, mine, result)

# %% tags=["hide-input"]
model_word = preset if preset in presets.names() else mine.model
corpus_word = corpus or (preset if preset in presets.names() else mine.corpus)
prose(f"""
```bash
python -m darkmatter decompose --model {model_word} --site {mine.site} \\
    --sae {sae or 'path/to/my-sae'} --corpus {corpus_word} --report report.html
```

Here it wrote {page.stat().st_size / 1024:,.0f} KiB.
""")

# %% [markdown]
# ## What can be given
#
# | `sae` | what it opens |
# |---|---|
# | `path/to/dir` | a directory that sae-lens saved |
# | `release:sae_id` | a release that sae-lens lists, such as Gemma Scope's |
# | `owner/name:folder` | a folder of any repository of the hub, in sae-lens's format |
# | `sparsify:path/to/dir` | one that `sparsify` saved; on the hub `sparsify:owner/name/folder` |
# | `dictionary_learning:path/to/dir` | one that `dictionary_learning` saved; also from the hub |
# | `artifact:NAME` | one that ships with this book |
# | `train:4096x32` | 4,096 latents, L0 of 32, trained on the spot with the preset's recipe |
#
# `site` is a TransformerLens hook name: `blocks.L.hook_resid_post` and `hook_resid_pre` (the
# {term}`residual stream` after and before block L), `blocks.L.hook_mlp_out`,
# `blocks.L.hook_attn_out`, or `blocks.L.attn.hook_z` (attention's heads side by side). For another
# model write a preset file, `mine.yaml`:
#
# ```yaml
# model: google/gemma-2-2b     # a hub id, or a directory
# prepend_bos: true
# corpus: my-text.jsonl
# site: blocks.12.hook_resid_post
# saes: [path/to/my-sae]
# ```
#
# `python -m darkmatter plan --preset mine.yaml` says what it will need. Then `papermill … -p
# preset mine.yaml`.
#
# ## When the numbers look wrong
#
# - **FVU above 1.** The SAE was trained on another layer, another model, or activations scaled
#   otherwise (by their mean norm, or with a mean taken off). Check `site`, and that the scale is
#   folded into the weights.
# - **FVU far above what training showed.** The text differs, or the first tokens of a context:
#   this book leaves them out, and special tokens too, because their norms are far from the rest.
# - **R² of the vector near 1 with a high FVU.** The SAE is close to a scaled copy of a linear map:
#   few latents fire, or many are dead. Look at L0 and at the share of dead latents.
# - **Wide intervals.** Few documents were held out. Give more text: every source document counts
#   once.

# %%
run.add_rows(surveyed.rows)
record = run.finish()
