"""The paper's text (section 3): documents of the uncopyrighted Pile that fill a context, streamed from the hub."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import cache
from .errors import DarkmatterError

DATASET, SEED, BUFFER = "monology/pile-uncopyrighted", 42, 10_000
BLOCK = 10  # contexts written at a time
TRIES, PAUSE = 4, 5.0  # of a stream that dies, and seconds before the first new try


def contexts(tokenize: Callable[[str], np.ndarray], length: int, wanted: int, folder: Path
             ) -> tuple[np.ndarray, list[int]]:
    """The first ``wanted`` contexts, int32 [wanted, length], and the number of the document each is the beginning of.

    ``tokenize`` gives a document's tokens, int32, a beginning-of-text token included where the model wants one. What
    was read is kept in ``folder``: a stream that dies is taken up where it was, in this call or in a later one.
    Raises DarkmatterError when the hub cannot be reached, or the stream ends early.
    """
    with cache.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        try:
            _read(tokenize, length, wanted, folder)
            break
        except (OSError, ValueError, RuntimeError) as error:  # datasets, its file systems and http clients raise many
            if attempt + 1 == TRIES:
                found, reason = len(_progress(folder).found), " ".join(str(error).split())[:200]
                raise DarkmatterError(f"The text cannot be streamed from the hub's '{DATASET}' ({reason}); {found} of "
                                      f"{wanted} contexts are on disk. Run the same command again to go on.") from error
            time.sleep(PAUSE * 2**attempt)
    tokens = np.fromfile(folder / "tokens.i32", np.int32, wanted * length).reshape(wanted, length)
    return tokens, _progress(folder).found[:wanted]


def _read(tokenize: Callable[[str], np.ndarray], length: int, wanted: int, folder: Path) -> None:
    state = _progress(folder)
    if len(state.found) >= wanted:
        return
    with (folder / "tokens.i32").open("ab") as file:
        file.truncate(len(state.found) * length * 4)  # what a cut-off call wrote past its last mark
        for number, text in enumerate(_documents(state.read), state.read):
            tokens = tokenize(text)
            if len(tokens) >= length:
                file.write(tokens[:length].astype(np.int32).tobytes())
                state.found.append(number)
                if len(state.found) % BLOCK == 0 or len(state.found) == wanted:
                    file.flush()
                    _mark(folder, number + 1, state.found)
                    print(f"text: {len(state.found)} of {wanted} contexts", file=sys.stderr, flush=True)
            if len(state.found) == wanted:
                return
    raise DarkmatterError(f"'{DATASET}' has {len(state.found)} documents that fill {length} tokens, and {wanted} are "
                          "asked for; ask for fewer contexts.")


@dataclass(frozen=True)
class _Progress:
    """How many documents were read, and the numbers of those that filled a context."""

    read: int
    found: list[int]


def _progress(folder: Path) -> _Progress:
    path = folder / "progress.json"
    return _Progress(**json.loads(path.read_text())) if path.exists() else _Progress(0, [])


def _mark(folder: Path, read: int, found: list[int]) -> None:
    cache.write_json(folder / "progress.json", {"read": read, "found": found})


def _documents(skip: int) -> Iterator[str]:
    from datasets import load_dataset

    stream = load_dataset(DATASET, split="train", streaming=True).shuffle(seed=SEED, buffer_size=BUFFER)
    yield from (row["text"] for row in stream.skip(skip))
