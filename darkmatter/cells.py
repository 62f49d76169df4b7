"""One run of a grid: a process (``python -m darkmatter.cells CELL``) that holds the lock of its folder.

It runs the notebook through papermill and writes ``done.json`` last. What became of a run is read from its folder,
never from memory, so a run that was killed, or whose machine was lost, is told from a finished one by whoever looks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import book, cache, execution, records
from . import preset as presets
from .errors import DarkmatterError
from .remaining import Line

TRIES = 3  # starts of a run that does not get to its first cell


class Changed(DarkmatterError):
    """What a run depends on is no longer what it was planned with."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: a notebook, its parameters (the preset among them), and where it lies."""

    notebook: str
    preset: str
    """The preset's own name; ``parameters['preset']`` is what the notebook is given, a name or a file."""
    parameters: dict[str, Any]
    key: str
    """What the run depends on, as ``book.run_key`` says."""
    home: str

    @property
    def folder(self) -> Path:
        return Path(self.home) / "_build" / "runs" / self.preset / self.notebook / self.key

    @property
    def title(self) -> str:
        given = [f"{name}={value}" for name, value in self.parameters.items() if name != "preset"]
        return " ".join([self.notebook, self.preset, *given])


def status(cell: Cell) -> str:
    """finished, failed (by an error of its own), cut off (after its first cell began), or did not start."""
    if (cell.folder / "done.json").exists():
        return "finished"
    if (failed := cell.folder / "failed.json").exists():
        return "did not start" if json.loads(failed.read_text())["again"] else "failed"
    return "cut off" if _began(cell.folder / "running.ipynb") else "did not start"


def _began(running: Path) -> bool:
    """Whether a cell was begun, as papermill notes in the notebook that it is running."""
    try:
        cells = json.loads(running.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return True  # cut off while it was written
    return any(cell["metadata"].get("papermill", {}).get("status", "pending") != "pending" for cell in cells)


def work(cell: Cell) -> int:
    """Run one cell unless it is finished; returns the exit code. Others that want the same run wait for this one."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    _log_to(cell.folder / "log.txt")
    with cache.lock(f"the run {cell.folder}"):
        if status(cell) == "finished":
            return 0
        for old in ("failed.json", "running.ipynb"):
            (cell.folder / old).unlink(missing_ok=True)
        begun = time.monotonic()
        try:
            _run(cell)
        except (DarkmatterError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
            again = not isinstance(error, Changed) and not _began(cell.folder / "running.ipynb")
            cache.write_json(cell.folder / "failed.json", {"why": str(error), "again": again,
                                                           "seconds": round(time.monotonic() - begun, 1)})
            return 2
        cache.write_json(cell.folder / "done.json", {"notebook": cell.notebook, "preset": cell.preset,
                                                     "seconds": round(time.monotonic() - begun, 1)})
    return 0


def _run(cell: Cell) -> None:
    home, given = Path(cell.home), cell.parameters
    source = home / "notebooks" / f"{cell.notebook}.py"
    if book.run_key(source, preset_of(given), given, []) != cell.key:
        raise Changed("The code, the settings or the data changed after the grid was started: run it again.")
    line = Line(cell.preset, [([cell.notebook], 1)])
    with line.shown():
        execution.execute(source, cell.folder, given, home, cell.folder, line)


def preset_of(given: Mapping[str, Any]) -> presets.Preset:
    """The preset that a notebook works with: the one it is given, with its other parameters where they are fields."""
    return presets.load(given["preset"], **{name: given[name] for name in given if name in records.OVERRIDES})


def _log_to(path: Path) -> None:
    """Everything that this process and its children print goes to the end of a file."""
    with path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)


def command(cell: Cell) -> list[str]:
    return [sys.executable, "-m", "darkmatter.cells", json.dumps(asdict(cell))]


if __name__ == "__main__":
    sys.exit(work(Cell(**json.loads(sys.argv[1]))))
