"""The line that says where a run of the book is, and how long it still takes.

The time left is what the notebooks took where they were recorded, times how much slower this machine has been so far.
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

from . import preset as presets
from . import progress, records, reference

PAGES = "the pages"
PRIOR = 30.0  # seconds for which a machine counts as the recorded one, so that the first of them do not decide
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
    """Seconds here for a recorded second: of the finished parts, and of those running that take longer than that."""
    known = [(PRIOR, PRIOR)] + [(part.took, part.recorded) for part in parts if part.finished]
    so_far = _ratio(known)
    late = [(part.took + part.coming, part.recorded) for part in parts
            if not part.finished and part.took + part.coming > so_far * part.recorded]
    return _ratio(known + late)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    here, there = map(sum, zip(*pairs, strict=True))
    return here / there


def left(stages: Sequence[Stage]) -> float:
    """Seconds until all parts are finished; those of a stage run side by side, and stages one after another."""
    slower, total = scale([part for parts, _ in stages for part in parts]), 0.0
    for parts, at_once in stages:
        each = [0.0 if part.finished else max(part.coming, slower * part.recorded - part.took, 0.0) for part in parts]
        total += max([sum(each) / at_once, *each])
    return total


def words(seconds: float) -> str:
    """'about 1 h 20 min left', in whole minutes."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    if not hours and minutes <= 1:
        return "less than a minute left"
    return f"about {f'{hours} h ' if hours else ''}{minutes} min left"


def recorded(preset: str) -> dict[str, float]:
    """Seconds of each notebook, and of the pages, on record: of the preset, else of the default one."""
    found = json.loads(EXTRA.read_text())
    return {name: seconds for each in (presets.DEFAULT, preset) for name, seconds in
            [*((record["notebook"], record["wall_seconds"]) for record in reference.load(each)),
             *found.get(each, {}).items()]}


class Line:
    """One line for a whole run: in place on a terminal, below all that is printed; else each half minute."""

    def __init__(self, preset: str, stages: Sequence[tuple[Sequence[str], int]], kept: Container[str] = ()) -> None:
        """``stages``: names of notebooks, or PAGES; ``kept``: those with a finished run."""
        known = recorded(preset)
        new = statistics.median(known.values())
        self.stages = [([Part(name, 0 if name in kept else known.get(name, new), finished=name in kept)
                         for name in names], at_once) for names, at_once in stages]
        self.parts = {part.name: part for parts, _ in self.stages for part in parts}
        self.notebooks = [name for name in self.parts if name != PAGES]

    @contextmanager
    def running(self, name: str, inside: Path | None = None) -> Iterator[Part]:
        """While the body works, the line tells of this part, and of the loop that ``inside`` is about."""
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
        return f"{where[:width - len(end) - 1]}…{end}" if 0 < width < len(where + end) else where + end

    def _where(self, part: Part, begun: float) -> str:
        inside = progress.read(part.inside) if part.inside else progress.Inside("", 0.0)
        part.took, part.coming = time.monotonic() - begun, inside.coming
        count = f" {self.notebooks.index(part.name) + 1} of {len(self.notebooks)}" if part.name != PAGES else ""
        return " · ".join(filter(None, [part.name + count, part.cell, inside.text]))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the body works, show the line."""
        stop, live = threading.Event(), sys.stdout.isatty()
        with ExitStack() as around:
            bar = around.enter_context(tqdm(bar_format="{desc}", file=sys.stdout, ncols=WIDE, nrows=20, leave=False,
                                             disable=not live))
            if live:  # what is printed goes above the line
                around.enter_context(redirect_stdout(cast(TextIO, DummyTqdmFile(sys.stdout))))
                around.enter_context(redirect_stderr(cast(TextIO, DummyTqdmFile(sys.stderr))))
            teller = threading.Thread(target=self._in_place if live else self._in_a_log, args=[stop, bar], daemon=True)
            teller.start()
            try:
                yield
            finally:
                stop.set()
                teller.join()

    def _in_place(self, stop: threading.Event, bar: tqdm) -> None:
        while not stop.wait(1):
            bar.set_description_str(f"  {self.told(shutil.get_terminal_size().columns - 3)}")

    def _in_a_log(self, stop: threading.Event, _: tqdm) -> None:
        while not stop.wait(30):
            print(f"  {self.told()}", flush=True)
