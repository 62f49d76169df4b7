"""One run of a grid in a process of its own: ``python -m darkmatter.book.grid.runs RUN``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ...errors import DarkmatterError
from .. import execution, keys, records
from ..execution import Run
from ..remaining import Line


def work(run: Run) -> int:
    """Do a run unless it is finished; returns the exit code. What it prints goes to log.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    _log_to(run.folder / "log.txt")
    line = Line(run.preset, [([run.notebook], 1)])
    try:
        with line.shown():
            execution.run_once(run, run.folder, line, check=lambda: _check(run))
    except (DarkmatterError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    return 0


def _check(run: Run) -> None:
    chosen = records.preset_of(run.parameters["preset"], run.parameters)
    if keys.run_key(run.source, chosen, run.parameters) != run.key:
        raise execution.Changed("The code, the settings or the data changed after the grid was "
                                "started: run it again.")


def _log_to(path: Path) -> None:
    """Everything that this process and its children print goes to the end of a file."""
    with path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)


if __name__ == "__main__":
    sys.exit(work(Run(**json.loads(sys.argv[1]))))
