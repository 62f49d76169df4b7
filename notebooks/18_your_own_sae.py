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
# You have trained an {term}`SAE`, or downloaded one. **What is its error made of?** This chapter is a notebook that answers, and one
# command runs it on your SAE, your model's layer and your text:
#
# ```bash
# papermill notebooks/18_your_own_sae.ipynb mine.ipynb \
#     -p preset smollm2 -p sae path/to/my-sae -p corpus my-text.txt
# ```
#
# Leave `-p corpus` out to use the {term}`preset`'s own text. `-p site blocks.7.hook_mlp_out` moves to another place in the model. The
# result is `mine.ipynb`: this page, with your numbers. Every other chapter takes `-p sae` in the same way.
#
# In this book no SAE is given, so the notebook trains a small one first, as you might.

# %% tags=["parameters"]
preset: str = "smoke"  # a preset's name, or the path of a YAML file
sae: str = ""  # your SAE: a directory, release:sae_id, or another form of the table below; empty: one is trained here
site: str = ""  # where it reads, as a TransformerLens hook name; empty: the preset's site
corpus: str = ""  # your text: a text file, or .jsonl or .jsonl.zst with a document a line; empty: the preset's text
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

import pandas as pd
import plotly.graph_objects as go
import torch

from darkmatter import activations, decomposition, figures, records, regression, report, saes, survey
from darkmatter import preset as presets
from darkmatter.errors import DarkmatterError
from darkmatter.figures import interval, number, prose

run = records.start("18_your_own_sae", preset, sae=sae, site=site, corpus=corpus, width=width, k=k, steps=steps)
p = run.preset
if not 0 < k <= width or steps < 1:
    raise DarkmatterError(f"width, k and steps are {width}, {k} and {steps}, but k should lie between 1 and width, and steps "
                          "be at least 1.")
folder = Path(tempfile.mkdtemp()) / "my-sae"

# %% [markdown]
# ## An SAE, trained in ten lines
#
# This is plain sae-lens code and knows nothing of this book. It reads activations of the model in random order, trains a
# {term}`TopK` SAE on them, and saves a directory. The activations are those of the {term}`sources <source>` that the regressions will be
# *fitted* on; those that *score* are never shown to it. (An SAE that is trained properly sees text of its own, and a
# thousand times more of it. On a small text this one learns its documents by heart, and its error there says less about others.)

# %%
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def train(x: torch.Tensor) -> None:
    """Train on rows x [token, d] and save."""
    torch.manual_seed(p.seed)
    mine = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=width, k=k, decoder_init_norm=0.5,
                                                 normalize_activations="expected_average_only_in"))
    batches = (x[torch.randint(len(x), (1024,))] for _ in iter(int, 1))
    how = SAETrainerConfig(total_training_samples=1024 * steps, train_batch_size_samples=1024, lr=3e-3, lr_end=3e-4,
                           lr_warm_up_steps=steps // 10, lr_decay_steps=steps // 3, dead_feature_window=steps, n_checkpoints=0,
                           checkpoint_path=None, n_batches_for_norm_estimate=10, logger=LoggingConfig(log_to_wandb=False))
    trained = SAETrainer(cfg=how, sae=mine, data_provider=batches).fit()
    trained.save_inference_model(folder)


if not sae:
    read = activations.evaluation(p)
    train(read.x[torch.from_numpy(survey.fitted_rows(p, read, regression.STRICT))].float())

# %% [markdown]
# ## What its error is made of
#
# One call does the measuring: {doc}`chapter 3 <03_vector>` says how. It splits the variance of the activation $x$ into what
# the SAE rebuilds, what it misses but a linear function of $x$ gives back ({term}`linear error <LinearError>`), and the rest
# ({term}`nonlinear error <NonlinearError>`).

# %%
reference = sae or str(folder)
mine = presets.load(preset, sae=reference, site=site, corpus=corpus)
result = decomposition.of(mine)

# %% tags=["hide-input"]
fvu, rest, ends = result["fvu"], result["fvu_nonlinear"], result["intervals"]
low, high = ends["fvu"] or (None, None)
rows = [(row["name"], row["value"], row["about"]) for row in report.metrics(result)]
opened = saes.load(reference, mine)
figures.table(pd.DataFrame(rows, columns=["measure", "value [95% interval]", "what it says"]),
              f"The error of `{opened.name}` ({opened.width:,} latents) at `{mine.site}`. Fitted on {result['n_fit']:,} tokens, "
              f"scored on {result['n_eval']:,} held-out tokens.", "tab-own")

# %% tags=["hide-input"]
linear = result["r2_vector_weighted"]
prose(f"""
The SAE leaves {interval(fvu, low, high)} of the variance unexplained. Of that, a share of {interval(linear, *(ends['r2_vector_weighted'] or (None, None)))} is linear error: a linear map
of $x$ finds it. The rest, {interval(rest, *(ends['fvu_nonlinear'] or (None, None)))} of the variance, is nonlinear error.
{'FVU above 1 means that the SAE explains less than the mean does; see the list of causes below.' if fvu and fvu > 1 else
'Most of what it misses is thus in reach of a linear map, as directions that it has not learned or shrinkage would be.' if linear and
linear > 0.5 else 'Most of what it misses is out of reach of a linear map.'}
""")

# %% [markdown]
# ## Beside the ladder
#
# A number says more beside others. The preset has SAEs of its own at its own site. Yours stands among them if it was measured at
# that site and on that text; then the same sources were fitted on and held out.

# %%
base = presets.load(preset)
comparable = (mine.site, mine.corpus, mine.model) == (base.site, base.corpus, base.model) and reference not in base.saes
ladder = survey.run(base).table() if comparable else pd.DataFrame()
own = survey.run(mine).table().assign(sae=f"yours: {opened.name}")
compared = pd.concat([own, ladder], ignore_index=True)

# %% tags=["hide-input"]
fig = go.Figure()
parts = {"nonlinear error": compared["fvu_nonlinear"], "linear error": (compared["fvu"] - compared["fvu_nonlinear"]).clip(lower=0)}
for name, share in parts.items():
    fig.add_bar(y=compared["sae"].str[-34:], x=share, name=name, orientation="h",
                marker_color=figures.colour(figures.MEANING[name], 0.75))
fig.update_layout(barmode="stack").update_xaxes(title_text="share of variance", rangemode="tozero")
fig.update_yaxes(autorange="reversed", title_text="")
figures.finish(fig, "fig-own-ladder", f"FVU of your SAE{' and of the SAEs of the preset' if comparable else ''}, divided into linear "
               f"and nonlinear error. Held out; n = {result['n_eval']:,} tokens.",
               "; ".join(f"{r.sae}: FVU {number(r.fvu)}, nonlinear {number(r.fvu_nonlinear)}" for r in compared.itertuples()),
               height=120 + 34 * len(compared))

# %% tags=["hide-input"]
better = int((ladder["fvu"] < fvu).sum()) if comparable else 0
less = int((ladder["fvu_nonlinear"] < rest).sum()) if comparable else 0
shown = f"""
Of the {len(ladder)} SAEs of the preset, {better} leave less variance unexplained than this one (L0
{number(result['l0'], 0)}), and {less} have less nonlinear error. {'Width and L0 differ between them, so that neither is a contest.'}
"""
prose(shown if comparable else f"""
This SAE reads `{mine.site}` of `{mine.model}` on `{mine.corpus}`; the preset's own SAEs read another place or another text, or it
is one of them. So it stands alone here; the report below sets it beside the SAEs that ship with the book.
""")

# %% [markdown]
# ## A page to keep or send
#
# The command line measures the same and writes a report: one HTML file that needs no network, with these numbers, a passage of the
# text with the error under each token, the worst tokens in their contexts, and the shipped SAEs for comparison.

# %%
page = folder.with_name("report.html")
report.write(page, mine, result)

# %% tags=["hide-input"]
corpus_word = corpus or (preset if preset in presets.names() else mine.corpus)
prose(f"""
```bash
python -m darkmatter decompose --model {preset if preset in presets.names() else mine.model} --site {mine.site} \\
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
# | `sparsify:path/to/dir` | an SAE that `sparsify` saved; also `sparsify:owner/name/folder` on the hub |
# | `dictionary_learning:path/to/dir` | one that `dictionary_learning` saved; also from the hub |
# | `artifact:NAME` | one that ships with this book |
# | `train:4096x32` | 4,096 latents, L0 of 32, trained on the spot with the preset's recipe |
#
# `site` is a TransformerLens hook name: `blocks.L.hook_resid_post` and `hook_resid_pre` (the {term}`residual stream` after and
# before block L), `blocks.L.hook_mlp_out`, `blocks.L.hook_attn_out`, or `blocks.L.attn.hook_z` (attention's heads side by side). For another
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
# `python -m darkmatter plan --preset mine.yaml` says what it will need. Then `papermill … -p preset mine.yaml`.
#
# ## When the numbers look wrong
#
# - **FVU above 1.** The SAE was trained on another layer, another model, or activations scaled otherwise (by their mean norm, or
#   with a mean taken off). Check `site`, and that the scale is folded into the weights.
# - **FVU far above what training showed.** The text differs, or the first tokens of a context: this book leaves them out, and
#   special tokens too, because their norms are far from the rest.
# - **R² of the vector near 1 with a high FVU.** The SAE is close to a scaled copy of a linear map: few latents fire, or
#   many are dead. Look at L0 and at the share of dead latents.
# - **Wide intervals.** Few documents were held out. Give more text: every source document counts once.

# %% tags=["hide-cell"]
run.add_rows(survey.run(mine).rows)
record = run.finish()
