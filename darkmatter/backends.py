"""Where the runs of a grid happen: processes on this machine, one a GPU, or jobs of a Slurm cluster.

A run is one process (``python -m darkmatter.backends CELL``) that holds the lock of its folder, runs the notebook
through papermill and writes ``done.json`` last. What became of a run is read from its folder, never from memory, so
a run that was killed, or whose machine was lost, is told from a finished one by whoever looks.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import book, cache, execution, records
from . import preset as presets
from .errors import DarkmatterError

TRIES = 3  # starts of a run that does not get to its first cell
POLL = 2.0  # seconds between two looks at Slurm's queue
ARRAY = 500  # jobs in one array, half of Slurm's usual limit
WORKING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "REQUEUED", "SIGNALING",
           "STAGE_OUT", "STOPPED")


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
    execution.execute(source, cell.folder, given, home, cell.folder)


def preset_of(given: Mapping[str, Any]) -> presets.Preset:
    """The preset that a notebook works with: the one it is given, with its other parameters where they are fields."""
    return presets.load(given["preset"], **{name: given[name] for name in given if name in records.OVERRIDES})


def _log_to(path: Path) -> None:
    """Everything that this process and its children print goes to the end of a file."""
    with path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)


def _command(cell: Cell) -> list[str]:
    return [sys.executable, "-m", "darkmatter.backends", json.dumps(asdict(cell))]


# This machine

def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def local(cells: Sequence[Cell], jobs: int | None, tell: Callable[[Cell], None]) -> None:
    """Run cells in processes, each with a GPU of its own, or ``jobs`` at a time; without either, one at a time.

    With more jobs than GPUs, some share one. What does not get to its first cell is started again, twice at most.
    """
    names = gpus()
    slots = [names[i % len(names)] if names else "" for i in range(jobs or len(names) or 1)]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    working: set[subprocess.Popen[bytes]] = set()

    def one(cell: Cell) -> None:
        gpu = free.get()
        threads = max(1, (os.cpu_count() or 1) // len(slots))
        environment = ({"OMP_NUM_THREADS": str(threads)} if len(slots) > 1 else {}) | os.environ
        environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        for _ in range(TRIES):
            process = subprocess.Popen(_command(cell), env=environment, stdin=subprocess.DEVNULL)
            working.add(process)
            process.wait()
            working.discard(process)
            if status(cell) != "did not start":
                break
        free.put(gpu)
        tell(cell)

    pool = ThreadPoolExecutor(len(slots))
    try:
        for done in [pool.submit(one, cell) for cell in cells]:
            done.result()
    except BaseException:  # interrupted: start no more, stop what runs
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(working):
            process.terminate()
        raise
    pool.shutdown()


# A cluster

def slurm(cells: Sequence[Cell], jobs: int | None, tell: Callable[[Cell], None], options: Mapping[str, Any],
          folder: Path) -> None:
    """Run cells as jobs of Slurm, ``jobs`` of an array at a time, and wait for them.

    ``options`` are those of submitit's ``update_parameters``; its files lie in ``folder``. What does not get to its
    first cell is submitted again, twice at most, unless someone cancelled it.
    """
    executor = executor_of(dict(options) | ({"slurm_array_parallelism": jobs} if jobs else {}), folder)
    left = list(cells)
    for _ in range(TRIES):
        submitted: dict[str, Cell] = {}
        for begin in range(0, len(left), ARRAY):
            submitted |= _submit(executor, left[begin:begin + ARRAY])
        print(f"Submitted {len(submitted)} jobs to Slurm: {', '.join(sorted({i.split('_')[0] for i in submitted}))}. "
              "They go on if this command is stopped.", flush=True)
        cancelled = _wait(submitted, tell)
        left = [cell for cell in left if status(cell) == "did not start" and cell.folder not in cancelled]
        if not left:
            break


def executor_of(options: Mapping[str, Any], folder: Path) -> Any:
    """submitit's executor with these options; raises DarkmatterError where there is none or an option is unknown."""
    try:
        import submitit
    except ImportError:
        raise DarkmatterError("Slurm is reached through submitit; install it with: pip install submitit") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    except RuntimeError as error:
        raise DarkmatterError("Slurm was not found: run this where srun and sbatch are.") from error
    try:
        executor.update_parameters(**{"name": "darkmatter", "timeout_min": 240} | dict(options))
    except (NameError, TypeError, ValueError) as error:
        raise DarkmatterError(f"submitit does not take these options of slurm: {' '.join(str(error).split())}"
                              ) from None
    return executor


def _submit(executor: Any, cells: Sequence[Cell]) -> dict[str, Cell]:
    import submitit
    from submitit.core.utils import FailedJobError

    try:
        with executor.batch():
            jobs = [executor.submit(submitit.helpers.CommandFunction(_command(cell))) for cell in cells]
    except FailedJobError as error:
        raise DarkmatterError(f"Slurm did not take the jobs: {' '.join(str(error).split())}") from None
    return {job.job_id: cell for job, cell in zip(jobs, cells, strict=True)}


def _wait(submitted: Mapping[str, Cell], tell: Callable[[Cell], None]) -> set[Path]:
    """Wait until Slurm has ended every job; returns the folders of those that were cancelled.

    ``squeue`` is asked, which every Slurm has; submitit itself asks ``sacct``, which needs an accounting database.
    """
    left: dict[str, Cell] = dict(submitted)
    cancelled: set[Path] = set()
    while left:
        time.sleep(POLL)
        states = _states()
        if states is None:
            continue
        for job in [job for job in left if states.get(job) not in WORKING]:
            cell = left.pop(job)
            if states.get(job) == "CANCELLED":
                cancelled.add(cell.folder)
            tell(cell)
    return cancelled


def _states() -> dict[str, str] | None:
    """State of each of this user's jobs that Slurm still knows; None while its controller does not answer."""
    asked = ["squeue", "--array", "--noheader", "--states=all", "--format=%i %T", f"--user={os.getuid()}"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return {job: state for job, state in (line.split() for line in done.stdout.splitlines() if line.strip())}


if __name__ == "__main__":
    sys.exit(work(Cell(**json.loads(sys.argv[1]))))
