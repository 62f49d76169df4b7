"""Activations on disk: a flat file of kept tokens a site and text, written once, memory-mapped."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from .. import cache, progress
from ..text import corpus
from . import model

if TYPE_CHECKING:
    from ..presets import Preset

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
        """float32 [rows, d_in] on a device, in memory of its own: no pages of the file stay."""
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
    text, first = corpus.evaluation(preset, tokenizer), preset.first_kept
    return _open(preset, sites, loaded, tokenizer, text, first, list(preset.elsewhere))


def training(preset: Preset, loaded: model.LoadedModel | None = None) -> Activations:
    """The training text at the preset's site: contexts in shuffled order, positions from 16 on."""
    return trainings(preset, [preset.site], loaded)[preset.site]


def trainings(preset: Preset, sites: Sequence[str], loaded: model.LoadedModel | None = None
              ) -> dict[str, Activations]:
    """The training text at several sites: one forward pass for all that are not on disk yet."""
    tokenizer = loaded.tokenizer if loaded else model.load_tokenizer(preset)
    text = training_text(preset, tokenizer)
    return _open(preset, sites, loaded, tokenizer, text, TRAIN_FIRST)


def training_text(preset: Preset, tokenizer: Any) -> corpus.Corpus:
    """As many contexts as the preset's distinct training tokens take."""
    kept = preset.context_length - 1 - TRAIN_FIRST
    return corpus.training(preset, tokenizer, -(-preset.training.distinct_tokens // kept))


def key(preset: Preset, site: str, text: corpus.Corpus, first: int) -> str:
    """What the activations of a site on a text, from a first position on, are known by."""
    centred = {"centre": True} if preset.centre else {}
    return cache.key(text=text.digest, dtype=model.dtype_of(preset), site=site, first=first,
                     **model.identity(preset), **centred)


def _open(preset: Preset, sites: Sequence[str], loaded: model.LoadedModel | None, tokenizer: object,
          text: corpus.Corpus, first: int, also: Sequence[str] = ()) -> dict[str, Activations]:
    """Read the files of ``sites``; where one is missing make it, and with it those of ``also``."""
    keys = {site: key(preset, site, text, first) for site in dict.fromkeys([*sites, *also])}
    folders = {site: cache.root() / "activations" / key for site, key in keys.items()}
    keep = model.kept(tokenizer, text.tokens, first)
    with ExitStack() as locks:
        # Every process takes the locks in one order, so that no two wait for each other.
        for name in sorted(keys.values()):
            locks.enter_context(cache.lock(name))
        if not all(_whole(folders[site]) for site in sites):
            missing = {site: folder for site, folder in folders.items() if not _whole(folder)}
            _write(missing, preset, loaded or model.load(preset), text.tokens, keep)
    context, position = (where.astype(np.int32) for where in np.nonzero(keep))
    files = {site: _mapped(folders[site]) for site in sites}
    return {site: Activations(torch.from_numpy(file).view(torch.bfloat16), context, position, text,
                              keys[site], file) for site, file in files.items()}


def _mapped(folder: Path) -> np.memmap:
    """The file's rows, uint16 [token, d]: copied where they are written to, as torch wants it."""
    shape = json.loads((folder / "done.json").read_text())["shape"]
    return np.memmap(folder / "x.bf16", np.uint16, "c", shape=tuple(shape))


def _whole(folder: Path) -> bool:
    """Whether the file was finished and has its bytes; a damaged one is removed, with a warning."""
    return (folder / "sha256.json").exists() and cache.intact(folder)


def _write(folders: Mapping[str, Path], preset: Preset, loaded: model.LoadedModel,
           tokens: np.ndarray, keep: np.ndarray) -> None:
    """One forward pass over the text; the files of all sites grow together."""
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(cache.writing(folder))
            folder.mkdir(parents=True, exist_ok=True)
        # An interrupted pass goes on from the last block of contexts that all files have.
        begin = min(_done(folder)["context"] for folder in folders.values())
        if not begin:
            model.check_limits(loaded, tokens, list(folders))
        rows_before = int(keep[:begin].sum())
        files = {site: stack.enter_context(_reopened(folder, rows_before))
                 for site, folder in folders.items()}
        bar = stack.enter_context(progress.bar(None, "forward pass", "contexts", total=len(tokens),
                                               initial=begin))
        for start in range(begin, len(tokens), BLOCK):
            end = min(start + BLOCK, len(tokens))
            for first in range(start, end, preset.batch_contexts):
                batch = slice(first, min(first + preset.batch_contexts, end))
                wanted = torch.from_numpy(keep[batch])
                for site, x in model.capture(loaded, tokens[batch], list(folders)).items():
                    rows = (_centred(x[wanted]) if preset.centre else x[wanted]).to(torch.bfloat16)
                    bits = rows.contiguous().view(torch.uint16)
                    files[site].write(bits.cpu().numpy().tobytes())
                bar.update(batch.stop - batch.start)
            # What is flushed and marked is not computed again.
            for site, folder in folders.items():
                files[site].flush()
                done = {"context": end, "width": _width(files[site], keep[:end])}
                cache.write_json(folder / "progress.json", done)
    for folder in folders.values():
        shape = [int(keep.sum()), _done(folder)["width"]]
        (folder / "done.json").write_text(json.dumps({"shape": shape}))
        cache.seal(folder)
    progress.say(f"activations: {len(tokens)} contexts at {len(folders)} sites")


def _centred(x: torch.Tensor) -> torch.Tensor:
    """x less its mean over dimensions, float32."""
    return x.float() - x.float().mean(-1, keepdim=True)


def _done(folder: Path) -> dict[str, int]:
    """Contexts that a file has, and the width of its rows."""
    mark = folder / "progress.json"
    return json.loads(mark.read_text()) if mark.exists() else {"context": 0, "width": 0}


def _reopened(folder: Path, rows: int) -> BinaryIO:
    """The file, cut to its first ``rows`` rows, at its end."""
    file = (folder / "x.bf16").open("r+b" if rows else "wb")
    file.truncate(rows * _done(folder)["width"] * 2)
    file.seek(0, 2)
    return file


def _width(file: BinaryIO, keep: np.ndarray) -> int:
    """Numbers in a row, from the file's size."""
    return file.tell() // max(1, int(keep.sum())) // 2
