"""How far a long loop is, for whoever looks: at a terminal, at a log, or at the book's runner.

A bar shows nothing for a loop that takes less than the time between two of its signs of life.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

FILE = "DARKMATTER_PROGRESS"  # names the file through which a notebook's bars reach the runner
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {remaining} left"
BAR = "{desc}: {n_fmt} of {total_fmt} {unit} |{bar}| {remaining} left"


class bar(tqdm):
    """tqdm with the time left: in place on a terminal, else a line each half minute on stderr.

    Where the runner has set ``DARKMATTER_PROGRESS``, each second in the file that it names.
    """

    in_place = True

    def __init__(self, iterable: Iterable[Any] | None, what: str, unit: str, **options: Any
                 ) -> None:
        self.file = os.environ.get(FILE, "")
        self.live = self.in_place and not self.file and sys.stderr.isatty()
        seconds = 1 if self.file or self.live else 30  # between two signs of life
        super().__init__(iterable, what, unit=unit, delay=seconds, miniters=1, smoothing=0,
                         mininterval=0.2 if self.live else seconds, leave=False, nrows=20,
                         ncols=shutil.get_terminal_size().columns - 1,
                         bar_format=BAR if self.live else LINE, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show where the loop is; an empty ``msg``: it has ended."""
        if self.live:
            return bool(super().display(msg, pos))
        if self.file:
            Path(self.file).write_text("" if msg == "" else json.dumps(self._inside()))
        elif msg is None:
            print(self, file=sys.stderr, flush=True)
        return False

    def clear(self, nolock: bool = False) -> None:
        """Make room on a terminal."""
        if self.live:
            super().clear(nolock)

    def _inside(self) -> Inside:
        total, seconds = self.total or 0, self.format_dict["elapsed"]
        coming = seconds * (total - self.n) / max(1, self.n - self.initial)
        return Inside(f"{self.desc} {self.n:,} of {total:,} {self.unit}", coming)


def in_lines() -> None:
    """From here on this process tells as in a log: others write to the same terminal."""
    bar.in_place = False


class Inside(NamedTuple):
    """Where a loop in a notebook is."""

    text: str
    coming: float
    """Seconds that it still takes."""


def read(file: Path) -> Inside:
    """What a bar in another process says; nothing where there is none or it is being written."""
    try:
        return Inside(*json.loads(file.read_text()))
    except (OSError, ValueError):
        return Inside("", 0.0)


def say(line: str) -> None:
    """A line on stderr, above the bars where there are any."""
    if bar.in_place and sys.stderr.isatty():
        bar.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
