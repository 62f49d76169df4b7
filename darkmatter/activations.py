"""Activations on disk: one flat file of kept tokens for a site and a text, written once, read by memory map."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from . import cache, corpus, model, progress
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
    mapped: np.memmap | None = None
    """The file behind x."""

    def read(self, rows: slice, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [rows, d_in] on a device, in memory of its own; pages of the file do not pile up in this process."""
        x = self.x[rows].to(device).float()
        if self.mapped is not None:
            self.mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        return x

    @property
    def starts(self) -> np.ndarray:
        """Row where each context begins, and the end: int [contexts + 1]."""
        return np.searchsorted(self.context, np.arange(len(self.text.tokens) + 1))


def evaluation(preset: Preset, loaded: model.LoadedModel | None = None) -> Activations:
    """The evaluation text at the preset's site, positions as the preset keeps them.

    Where that takes a forward pass, it reads the preset's other sites too.
    """
    return evaluations(preset, [preset.site], loaded)[preset.site]


def evaluations(preset: Preset, sites: Sequence[str], loaded: model.LoadedModel | None = None
                ) -> dict[str, Activations]:
    """The evaluation text at several sites: one forward pass for all that are not on disk yet."""
    tokenizer = loaded.tokenizer if loaded else model.load_tokenizer(preset)
    text = corpus.evaluation(preset, tokenizer)
    return _open(preset, sites, loaded, tokenizer, text, preset.first_kept, list(preset.elsewhere))


def training(preset: Preset, loaded: model.LoadedModel | None = None) -> Activations:
    """The training text at the preset's site: contexts in shuffled order, positions from 16 on."""
    return trainings(preset, [preset.site], loaded)[preset.site]


def trainings(preset: Preset, sites: Sequence[str], loaded: model.LoadedModel | None = None
              ) -> dict[str, Activations]:
    """The training text at several sites: one forward pass for all that are not on disk yet."""
    tokenizer = loaded.tokenizer if loaded else model.load_tokenizer(preset)
    return _open(preset, sites, loaded, tokenizer, training_text(preset, tokenizer), TRAIN_FIRST)


def training_text(preset: Preset, tokenizer: Any) -> corpus.Corpus:
    """As many contexts as the preset's distinct training tokens take."""
    contexts = -(-preset.training.distinct_tokens // (preset.context_length - 1 - TRAIN_FIRST))
    return corpus.training(preset, tokenizer, contexts)


def key(preset: Preset, site: str, text: corpus.Corpus, first: int) -> str:
    """What the activations of a site on a text, from a first position on, are known by."""
    return cache.key(text=text.digest, model=preset.model, dtype=model.dtype_of(preset), site=site, first=first,
                     **({"centre": True} if preset.centre else {}))


def _open(preset: Preset, sites: Sequence[str], loaded: model.LoadedModel | None, tokenizer: object,
          text: corpus.Corpus, first: int, also: Sequence[str] = ()) -> dict[str, Activations]:
    """Read the files, or make them, and then those of ``also`` too; an interrupted call goes on where it was."""
    keys = {site: key(preset, site, text, first) for site in dict.fromkeys([*sites, *also])}
    folders = {site: cache.root() / "activations" / key for site, key in keys.items()}
    keep = model.kept(tokenizer, text.tokens, first)
    with ExitStack() as locks:
        for name in sorted(keys.values()):  # in one order, so that two runs cannot wait for each other
            locks.enter_context(cache.lock(name))
        if not all(_whole(folders[site]) for site in sites):
            missing = {site: folder for site, folder in folders.items() if not _whole(folder)}
            _write(missing, preset, loaded or model.load(preset), text.tokens, keep)
    context, position = (where.astype(np.int32) for where in np.nonzero(keep))
    files = {site: _rows(folders[site]) for site in sites}
    return {site: Activations(torch.from_numpy(file).view(torch.bfloat16), context, position, text, keys[site], file)
            for site, file in files.items()}


def _rows(folder: Path) -> np.memmap:
    shape = json.loads((folder / "done.json").read_text())["shape"]
    return np.memmap(folder / "x.bf16", np.uint16, "c", shape=tuple(shape))  # 'c': torch wants it writable


def _whole(folder: Path) -> bool:
    """Whether the file was finished and still has its bytes; a damaged one is removed, with a warning."""
    return (folder / "sha256.json").exists() and cache.intact(folder)


def _write(folders: Mapping[str, Path], preset: Preset, loaded: model.LoadedModel, tokens: np.ndarray,
           keep: np.ndarray) -> None:
    """One forward pass over the text; the files grow together, from the last block that all of them have."""
    with ExitStack() as opened:
        for folder in folders.values():
            opened.enter_context(cache.writing(folder))
            folder.mkdir(parents=True, exist_ok=True)
        begin = min(_done(folder)["context"] for folder in folders.values())
        files = {site: opened.enter_context(_reopened(folder, int(keep[:begin].sum())))
                 for site, folder in folders.items()}
        bar = opened.enter_context(progress.bar(None, "forward pass", "contexts", total=len(tokens), initial=begin))
        for start in range(begin, len(tokens), BLOCK):
            end = min(start + BLOCK, len(tokens))
            for one in range(start, end, preset.batch_contexts):
                some = slice(one, min(one + preset.batch_contexts, end))
                wanted = torch.from_numpy(keep[some])
                for site, x in model.capture(loaded, tokens[some], list(folders)).items():
                    rows = _centred(x[wanted]) if preset.centre else x[wanted].to(torch.bfloat16).contiguous()
                    files[site].write(rows.view(torch.uint16).cpu().numpy().tobytes())
                bar.update(some.stop - some.start)
            for site, folder in folders.items():
                files[site].flush()
                cache.write_json(folder / "progress.json", {"context": end, "width": _width(files[site], keep[:end])})
    for folder in folders.values():
        (folder / "done.json").write_text(json.dumps({"shape": [int(keep.sum()), _done(folder)["width"]]}))
        cache.seal(folder)
    progress.say(f"activations: {len(tokens)} contexts at {len(folders)} sites")


def _centred(x: torch.Tensor) -> torch.Tensor:
    return (x.float() - x.float().mean(-1, keepdim=True)).to(torch.bfloat16)


def _done(folder: Path) -> dict[str, int]:
    progress = folder / "progress.json"
    return json.loads(progress.read_text()) if progress.exists() else {"context": 0, "width": 0}


def _reopened(folder: Path, rows: int) -> BinaryIO:
    """The file, cut to its first ``rows`` rows, at its end."""
    file = (folder / "x.bf16").open("r+b" if rows else "wb")
    file.truncate(rows * _done(folder)["width"] * 2)
    file.seek(0, 2)
    return file


def _width(file: BinaryIO, keep: np.ndarray) -> int:
    return file.tell() // max(1, int(keep.sum())) // 2
