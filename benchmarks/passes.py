"""Rows of the survey: its passes against a floor, its memory, its cost by contexts and SAEs.

The floor is ONE forward pass to the site plus ONE encoder product for each SAE, each timed alone.
The survey runs from an empty cache, except for the model and the tokens of the text: forward pass,
codes, three passes, all intervals. Activations are a model's (``source`` 'model'), or random ones
on disk, for which the floor is the encoder product.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darkmatter import cache, presets, survey
from darkmatter.models import activations, model
from darkmatter.presets import Preset
from darkmatter.saes import references
from darkmatter.saes.loaded import LoadedSAE
from darkmatter.text import corpus

from . import data, timing

MADE = ("activations", "codes", "surveys", "locks")  # what a survey leaves in the cache
LOOKED_AT = 2000  # tokens whose survey is compared with the SAE run plainly
RANDOM = {"name": "benchmark", "model": "none", "saes": ("none",),
          "site": "blocks.0.hook_resid_post"}


@dataclass(frozen=True)
class Setting:
    """What is surveyed, ready but for what the survey itself does."""

    preset: Preset
    opened: list[LoadedSAE]
    loaded: model.LoadedModel | None
    device: str

    def survey(self) -> survey.SurveyResult:
        """All passes from an empty cache."""
        for name in MADE:
            shutil.rmtree(cache.root() / name, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random SAEs explain little, and the survey says so
            return survey.run(self.preset, [sae.ref for sae in self.opened], loaded=self.loaded)

    def forward(self) -> None:
        """ONE forward pass to the site."""
        if self.loaded is None:
            return
        tokens = corpus.evaluation(self.preset, self.loaded.tokenizer).tokens  # already made
        for begin in range(0, len(tokens), self.preset.batch_contexts):
            model.capture(self.loaded, tokens[begin:begin + self.preset.batch_contexts],
                          [self.preset.site])

    def encoders(self, x: torch.Tensor) -> None:
        """ONE encoder product of each SAE: W_enc x + b_enc for the kept rows x [token, d]."""
        for sae in self.opened:
            rows = max(64, (2**24 if self.device == "cpu" else 2**28) // sae.width)
            out = torch.empty(rows, sae.width, device=self.device)
            for part in x.split(rows):
                torch.addmm(sae.sae.b_enc.data, part.float(),
                            sae.sae.W_enc.data, out=out[:len(part)])


@contextmanager
def setting(device: str, source: str, contexts: int, saes_: list[Any],
            **fields: Any) -> Iterator[Setting]:
    """A cache of its own inside the shared one, and what is surveyed in it."""
    with _own_cache() as folder, ExitStack() as patched:
        if source == "random":
            preset, loaded, d = Preset(**RANDOM, device=device, contexts=contexts,
                                       bootstrap=fields.get("bootstrap", 1000)), None, fields["d"]
            found = data.activations(contexts, fields["kept"], d, folder, device)
            patched.enter_context(data.instead(activations, "evaluation",
                                               lambda preset, loaded=None: found))
        else:
            # Its site alone is read.
            preset = replace(presets.load(source, device=device), elsewhere={}, on_error={})
            loaded = model.load(preset)
            text, d = _first(corpus.evaluation(preset, loaded.tokenizer), contexts), loaded.d_model
            preset = replace(preset, contexts=contexts)
            patched.enter_context(data.instead(corpus, "evaluation",
                                               lambda preset, tokenizer: text))
        opened = [_opened(given, preset, d, device, i)
                  for i, given in enumerate(saes_ or preset.saes)]
        known = {sae.ref: sae for sae in opened}
        patched.enter_context(data.instead(references, "load_sae", lambda ref, preset: known[ref]))
        for sae in opened:
            sae.sae.to(device)
        yield Setting(preset, opened, loaded, device)


def _first(text: corpus.Corpus, contexts: int) -> corpus.Corpus:
    """So many contexts of a text, which begins again where it ends: its words cost nothing."""
    times = -(-contexts // len(text.tokens))
    owner = np.concatenate([text.source + i * len(text.sources) for i in range(times)])[:contexts]
    names = tuple(f"{name}, {i}" for i in range(times) for name in text.sources)
    return corpus.Corpus(np.tile(text.tokens, (times, 1))[:contexts], owner.astype(np.int32), names)


def _opened(given: Any, preset: Preset, d: int, device: str, seed: int) -> LoadedSAE:
    """An SAE by its reference, or a random one by [kind, width, k]."""
    if isinstance(given, str):
        return references.load_sae(given, preset)
    kind, width, k = given
    return data.loaded(f"random-{seed}", data.sae(kind, width, k, d, device, seed))


@contextmanager
def _own_cache() -> Iterator[Path]:
    """The benchmarks' cache: models and tokens are the shared cache's, the rest is its own."""
    shared, before = cache.root(), os.environ.get("DARKMATTER_CACHE")
    own = shared / "bench"
    own.mkdir(exist_ok=True)
    for name in ("models", "tokens"):
        (shared / name).mkdir(exist_ok=True)
        if not (own / name).is_symlink():
            (own / name).symlink_to(shared / name)
    os.environ["DARKMATTER_CACHE"] = str(own)
    try:
        yield own
    finally:
        for name in MADE:
            shutil.rmtree(own / name, ignore_errors=True)
        for path in own.glob("x-*.bf16"):
            path.unlink()
        os.environ.pop("DARKMATTER_CACHE")
        if before is not None:
            os.environ["DARKMATTER_CACHE"] = before


def run(device: str, pairs: int, limit: float, **case: Any) -> dict[str, Any]:
    """The survey above its floor."""
    with setting(device, **case) as what:
        held: list[survey.SurveyResult] = []

        def ours() -> None:
            held[:] = [what.survey()]

        x = once(lambda: held[0].acts.x.to(device))
        parts: dict[str, list[float]] = {"forward": [], "encoders": []}
        beside: dict[str, float] = {}
        if device != "cpu":
            beside["device_peak_mib"], _ = timing.peak_of(ours, device)
            x()  # moved before anything is timed

        def floor() -> None:
            parts["forward"].append(timing.seconds(what.forward, device))
            parts["encoders"].append(timing.seconds(lambda: what.encoders(x()), device))

        times = timing.pairs(floor, ours, device, pairs, limit, ours_first=True)
        found = times.fields(faster=False) | {"difference": _check(what, held[0]),
                                              "tokens": len(held[0].acts.x)}
        return found | beside | {f"{name}_seconds": sorted(taken)[len(taken) // 2]
                                 for name, taken in parts.items()}


def _check(what: Setting, result: survey.SurveyResult) -> float:
    """Largest relative difference of ‖Sae(x)‖² and ‖SaeError‖² from sae-lens's, on some tokens."""
    chosen = torch.linspace(0, len(result.acts.x) - 1, min(LOOKED_AT, len(result.acts.x))).long()
    x, worst = result.acts.x[chosen].float().to(what.device), 0.0
    for sae in what.opened:
        table = result.tokens(sae.name).iloc[chosen.numpy()]
        with torch.no_grad():
            plain = sae.sae.decode(sae.sae.encode(x))
        for column, vectors in (("sae_norm2", plain), ("error_norm2", x - plain)):
            size = vectors.double().square().sum(1).cpu()
            off = (torch.from_numpy(table[column].to_numpy("float64")) - size).abs() / size
            worst = max(worst, float(off.quantile(0.99)))  # a near tie may choose another latent
    if not worst < 1e-3:
        raise ValueError(f"The survey's squared norms are off by {worst:.2g}.")
    return worst


def memory(device: str, **case: Any) -> dict[str, Any]:
    """The survey's peak beside the weights, against x and one error in float32: 8 · tokens · d."""
    ours, taken = timing.apart("passes:surveyed", device, **case)
    held = _both(device, **case) / timing.MIB
    return {"ratio": ours / held, "low": ours / held, "high": ours / held, "pairs": 1,
            "memory_mib": {"x and the error (computed)": held, "survey": ours},
            "survey_seconds": taken}


def _both(device: str, **case: Any) -> int:
    """Bytes of x and SaeError in float32."""
    with setting(device, **case) as what:
        if what.loaded is None:
            n, d = activations.evaluation(what.preset).x.shape
        else:
            tokenizer, d = what.loaded.tokenizer, what.loaded.d_model
            tokens = corpus.evaluation(what.preset, tokenizer).tokens
            n = int(model.kept(tokenizer, tokens, what.preset.first_kept).sum())
    return 2 * 4 * n * d


@contextmanager
def surveyed(device: str, **case: Any) -> Iterator[Any]:
    """The survey, for a process of its own."""
    with setting(device, **case) as what:
        yield what.survey


def slope(device: str, over: str, at: list[int], **case: Any) -> dict[str, Any]:
    """Seconds and peak memory of the survey at several numbers of ``over``: contexts or saes."""
    points = []
    for n in at:
        changed = {"contexts": n} if over == "contexts" else {"saes_": case["saes_"] * n}
        mib, taken = timing.apart("passes:surveyed", device, **{**case, **changed})
        points.append({"n": n, "seconds": taken, "mib": mib})
    n, taken, mib = ([point[name] for point in points] for name in ("n", "seconds", "mib"))
    cost, held = timing.line(n, taken), timing.line(n, mib)
    return {"ratio": cost["power"], "low": cost["power"], "high": cost["power"],
            "pairs": 1, "over": over, "points": points, "cost": cost,
            "memory": held, "memory_growth": mib[-1] / mib[0]}
