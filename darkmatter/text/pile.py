"""The paper's text (section 3): documents of the uncopyrighted Pile that fill a context, streamed.

Each gives one context, its beginning. What was read is kept: a stream that dies is taken up where
it was, in the same call or in a later one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import cache
from ..errors import DarkmatterError
from .contexts import Picked, cut

if TYPE_CHECKING:
    from ..presets import Preset

DATASET, SEED, BUFFER = "monology/pile-uncopyrighted", 42, 10_000
BLOCK = 10  # contexts written at a time
TRIES, PAUSE = 4, 5.0  # of a stream that dies, and seconds before the first new try


def identity(preset: Preset) -> dict[str, Any]:
    """What the text is known by: the data set, and how it is shuffled."""
    return {"dataset": DATASET, "seed": SEED, "buffer": BUFFER}


def evaluation(preset: Preset, tokenizer: Any) -> list[Picked]:
    """The preset's contexts, each from a document of its own.

    Raises DarkmatterError where the hub cannot be reached, or the stream ends early.
    """
    key = cache.key(**identity(preset), length=preset.context_length, bos=preset.prepend_bos,
                    vocabulary=sorted(tokenizer.get_vocab().items()))
    folder = cache.root() / "pile" / key
    with cache.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        try:
            _read(preset, tokenizer, folder)
            break
        except (OSError, ValueError, RuntimeError) as error:  # http clients and datasets raise many
            if attempt + 1 == TRIES:
                reason = " ".join(str(error).split())[:200]
                raise DarkmatterError(
                    f"The text cannot be streamed from the hub's '{DATASET}' ({reason}); "
                    f"{len(_progress(folder).found)} of {preset.contexts} contexts are on disk. "
                    "Run the same command again to go on.") from error
            time.sleep(PAUSE * 2**attempt)
    numbers, length = _progress(folder).found[:preset.contexts], preset.context_length
    tokens = np.fromfile(folder / "tokens.i32", np.int32, len(numbers) * length)
    rows = tokens.reshape(-1, 1, length)
    return [(f"pile/{number}", row) for number, row in zip(numbers, rows, strict=True)]


def _read(preset: Preset, tokenizer: Any, folder: Path) -> None:
    """Read on until the folder holds as many contexts as the preset asks for."""
    state, wanted, length = _progress(folder), preset.contexts, preset.context_length
    if len(state.found) >= wanted:
        return
    with (folder / "tokens.i32").open("ab") as file:
        file.truncate(len(state.found) * length * 4)  # what a cut-off call wrote past its last mark
        for number, text in enumerate(_documents(state.read), state.read):
            rows = cut(text[:length * 40], tokenizer, preset)[:1]  # enough of it for one context
            if len(rows):
                file.write(rows.tobytes())
                state.found.append(number)
                if len(state.found) % BLOCK == 0 or len(state.found) == wanted:
                    file.flush()
                    cache.write_json(folder / "progress.json",
                                     {"read": number + 1, "found": state.found})
                    print(f"text: {len(state.found)} of {wanted} contexts", file=sys.stderr,
                          flush=True)
            if len(state.found) == wanted:
                return
    raise DarkmatterError(
        f"'{DATASET}' has {len(state.found)} documents that fill {length} tokens, and {wanted} are "
        "asked for; ask for fewer contexts.")


@dataclass(frozen=True)
class _Progress:
    """How many documents were read, and the numbers of those that filled a context."""

    read: int
    found: list[int]


def _progress(folder: Path) -> _Progress:
    path = folder / "progress.json"
    return _Progress(**json.loads(path.read_text())) if path.exists() else _Progress(0, [])


def _documents(skip: int) -> Iterator[str]:
    from datasets import load_dataset

    stream = load_dataset(DATASET, split="train", streaming=True)
    shuffled = stream.shuffle(seed=SEED, buffer_size=BUFFER)
    yield from (row["text"] for row in shuffled.skip(skip))
