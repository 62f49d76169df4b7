"""Activations on disk: one flat file of kept tokens for a site and a text, written once, read by memory map."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import cache, corpus, model
from .preset import Preset

BLOCK = 16  # contexts written at a time: what an interruption costs at most
TRAIN_FIRST = 16  # SAEs train on all positions but the first, whose norms are far from the rest


@dataclass(frozen=True)
class Activations:
    """The kept activations of one site on one text."""

    x: torch.Tensor
    """bfloat16 [token, d_in], memory-mapped: contexts in order, positions in order."""
    context: np.ndarray
    """int32 [token]: the context of each row."""
    position: np.ndarray
    """int32 [token]: its position in that context."""
    text: corpus.Corpus
    key: str
    """Changes with the text, the model, its dtype, the site and the positions kept."""

    @property
    def starts(self) -> np.ndarray:
        """Row where each context begins, and the end: int [contexts + 1]."""
        return np.searchsorted(self.context, np.arange(len(self.text.tokens) + 1))


def evaluation(preset: Preset, loaded: model.LoadedModel | None = None) -> Activations:
    """The evaluation text at the preset's site, positions as the preset keeps them."""
    tokenizer = loaded.tokenizer if loaded else model.load_tokenizer(preset)
    return _open(preset, loaded, tokenizer, corpus.evaluation(preset, tokenizer), preset.first_kept)


def training(preset: Preset, loaded: model.LoadedModel | None = None) -> Activations:
    """The training text at the preset's site: contexts in shuffled order, positions from 16 on."""
    tokenizer = loaded.tokenizer if loaded else model.load_tokenizer(preset)
    contexts = -(-preset.training.distinct_tokens // (preset.context_length - 1 - TRAIN_FIRST))
    return _open(preset, loaded, tokenizer, corpus.training(preset, tokenizer, contexts), TRAIN_FIRST)


def _open(preset: Preset, loaded: model.LoadedModel | None, tokenizer: object, text: corpus.Corpus,
          first: int) -> Activations:
    """Read the file, or make it; an interrupted call goes on where it was."""
    key = cache.key(text=text.digest, model=preset.model, dtype=preset.dtype, site=preset.site, first=first)
    folder = cache.root() / "activations" / key
    keep = model.kept(tokenizer, text.tokens, first)
    with cache.lock(key):
        if not _whole(folder):
            _write(folder, preset, loaded or model.load(preset), text.tokens, keep)
    shape = json.loads((folder / "done.json").read_text())["shape"]
    rows = np.memmap(folder / "x.bf16", np.uint16, "c", shape=tuple(shape))  # 'c': torch wants it writable
    context, position = (where.astype(np.int32) for where in np.nonzero(keep))
    return Activations(torch.from_numpy(rows).view(torch.bfloat16), context, position, text, key)


def _whole(folder: Path) -> bool:
    """Whether the file was finished and still has its bytes; a damaged one is removed, with a warning."""
    return (folder / "sha256.json").exists() and cache.intact(folder)


def _write(folder: Path, preset: Preset, loaded: model.LoadedModel, tokens: np.ndarray, keep: np.ndarray) -> None:
    with cache.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        progress = folder / "progress.json"
        at = json.loads(progress.read_text()) if progress.exists() else {"context": 0, "rows": 0, "width": 0}
        meter = _Meter(len(tokens), tokens.shape[1], at["context"])
        with (folder / "x.bf16").open("r+b" if at["rows"] else "wb") as file:
            file.truncate(at["rows"] * at["width"] * 2)
            file.seek(0, 2)
            for start in range(at["context"], len(tokens), BLOCK):
                end = min(start + BLOCK, len(tokens))
                for one in range(start, end, preset.batch_contexts):
                    some = slice(one, min(one + preset.batch_contexts, end))
                    x = model.capture(loaded, tokens[some], [preset.site])[preset.site]
                    rows = x[torch.from_numpy(keep[some])].to(torch.bfloat16).contiguous()
                    file.write(rows.view(torch.uint16).cpu().numpy().tobytes())
                file.flush()
                at = {"context": end, "rows": int(keep[:end].sum()), "width": x.shape[-1]}
                with cache.atomic(progress) as temporary:
                    temporary.write_text(json.dumps(at))
                meter(end)
    (folder / "done.json").write_text(json.dumps({"shape": [at["rows"], at["width"]]}))
    cache.seal(folder)


class _Meter:
    """Progress on stderr: every block on a terminal, else every half minute."""

    def __init__(self, contexts: int, length: int, begun_at: int) -> None:
        self.contexts, self.length, self.begun_at = contexts, length, begun_at
        self.began = self.told = time.time()

    def __call__(self, done: int) -> None:
        now, terminal = time.time(), sys.stderr.isatty()
        if terminal or now - self.told > 30 or done == self.contexts:
            self.told = now
            speed = (done - self.begun_at) * self.length / (now - self.began)
            end = "\r" if terminal and done < self.contexts else "\n"
            print(f"activations: {done} of {self.contexts} contexts, {speed:,.0f} tokens a second", end=end,
                  file=sys.stderr, flush=True)
