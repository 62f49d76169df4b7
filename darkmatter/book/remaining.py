"""The line that says where a run of the book is, and how long it still takes.

The time left is what the notebooks took where they were recorded, times how much slower this
machine has been so far.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from .. import presets, progress
from . import records, reference

PAGES = "the pages"
PRIOR = 30.0  # seconds for which a machine counts as the recorded one: the first ones do not decide
WIDE = 999  # columns: it is ``told`` that makes the line fit
EXTRA = records.HOME / "artifacts" / "seconds.json"  # recorded times that are in no reference


@dataclass
class Part:
    """One notebook of a run, or the pages: what is known of its time, all in seconds."""

    name: str
    recorded: float
    """What it took where it was recorded; 0 where there is a finished run to keep."""
    took: float = 0.0
    coming: float = 0.0
    """What a loop in it still takes, at least."""
    finished: bool = False
    cell: str = ""
    inside: Path | None = None
    """The file in which its loops say how far they are."""
    begun: float | None = None

    def at(self, cell: int, cells: int) -> None:
        """Note which of its cells it is at."""
        self.cell = f"cell {cell} of {cells}"


Stage = tuple[Sequence[Part], int]
"""Parts that may run at the same time, and how many of them do."""


def scale(parts: Sequence[Part]) -> float:
    """Seconds here for a recorded second: of finished parts, and of those that overrun that."""
    known = [(PRIOR, PRIOR)] + [(part.took, part.recorded) for part in parts if part.finished]
    so_far = _ratio(known)
    running = [(part.took + part.coming, part.recorded) for part in parts if not part.finished]
    late = [(here, there) for here, there in running if here > so_far * there]
    return _ratio(known + late)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    here, there = map(sum, zip(*pairs, strict=True))
    return here / there


def left(stages: Sequence[Stage]) -> float:
    """Seconds until all parts are finished: side by side in a stage, one stage after another."""
    slower, total = scale([part for parts, _ in stages for part in parts]), 0.0
    for parts, at_once in stages:
        times = [max(part.coming, slower * part.recorded - part.took, 0.0)
                 for part in parts if not part.finished]
        total += max([sum(times) / at_once, *times])
    return total


def words(seconds: float) -> str:
    """'about 1 h 20 min left', in whole minutes."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    if not hours and minutes <= 1:
        return "less than a minute left"
    return f"about {f'{hours} h ' if hours else ''}{minutes} min left"


def recorded(preset: str) -> dict[str, float]:
    """Seconds of each notebook, and of the pages, on record: of the preset, else of the default."""
    extra, seconds = json.loads(EXTRA.read_text()), dict[str, float]()
    for name in (presets.DEFAULT, preset):
        for record in reference.load(name):
            seconds[record["notebook"]] = record["wall_seconds"]
        seconds |= extra.get(name, {})
    return seconds


class Line:
    """One line for a whole run: in place on a terminal, below what is printed; else in a log."""

    def __init__(self, preset: str, stages: Sequence[tuple[Sequence[str], int]],
                 kept: Container[str] = ()) -> None:
        """``stages``: names of notebooks, or PAGES; ``kept``: those with a finished run."""
        known = recorded(preset)
        new = statistics.median(known.values())
        self.stages = [([Part(name, known.get(name, new)) for name in names], at_once)
                       for names, at_once in stages]
        self.parts = {part.name: part for parts, _ in self.stages for part in parts}
        self.notebooks = [name for name in self.parts if name != PAGES]
        for name in self.parts:
            if name in kept:
                self.keep(name)

    @contextmanager
    def running(self, name: str, inside: Path | None = None) -> Iterator[Part]:
        """While the body works, the line tells of this part, and of the loop in ``inside``."""
        part = self.parts[name]
        part.begun, part.inside = time.monotonic(), inside
        try:
            yield part
        finally:
            part.took, part.finished = time.monotonic() - part.begun, True

    def keep(self, name: str) -> None:
        """This part has a finished run."""
        self.parts[name].recorded, self.parts[name].finished = 0, True

    def told(self, width: int = 0) -> str:
        """The line, its middle left out where it is wider than ``width`` (0: any)."""
        running = [part for part in self.parts.values() if part.begun and not part.finished]
        where = " | ".join(self._where(part, part.begun or 0) for part in running)
        end = f" · {words(left(self.stages))}"
        long = 0 < width < len(where + end)
        return (f"{where[:width - len(end) - 1]}…" if long else where) + end

    def _where(self, part: Part, begun: float) -> str:
        loop = progress.read(part.inside) if part.inside else progress.Inside("", 0.0)
        part.took, part.coming = time.monotonic() - begun, loop.coming
        count = ""
        if part.name != PAGES:
            count = f" {self.notebooks.index(part.name) + 1} of {len(self.notebooks)}"
        return " · ".join(filter(None, [part.name + count, part.cell, loop.text]))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the body works, show the line."""
        stop, live = threading.Event(), sys.stdout.isatty()
        with ExitStack() as around:
            bar = around.enter_context(tqdm(bar_format="{desc}", file=sys.stdout, ncols=WIDE,
                                            nrows=20, leave=False, disable=not live))
            if live:  # what is printed goes above the line
                out, err = (cast(TextIO, DummyTqdmFile(file)) for file in (sys.stdout, sys.stderr))
                around.enter_context(redirect_stdout(out))
                around.enter_context(redirect_stderr(err))
            target = self._in_place if live else self._in_a_log
            teller = threading.Thread(target=target, args=[stop, bar], daemon=True)
            teller.start()
            try:
                yield
            finally:
                stop.set()
                teller.join()

    def _in_place(self, stop: threading.Event, bar: tqdm) -> None:
        while not stop.wait(1):
            width = shutil.get_terminal_size().columns - 3
            bar.set_description_str(f"  {self.told(width)}")

    def _in_a_log(self, stop: threading.Event, _: tqdm) -> None:
        while not stop.wait(30):
            print(f"  {self.told()}", flush=True)
