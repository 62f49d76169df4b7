"""Runs of a grid as jobs of a Slurm cluster, through submitit."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DarkmatterError
from .. import execution
from ..execution import Run

POLL = 2.0  # seconds between two looks at Slurm's queue
ARRAY = 500  # jobs in one array, half of Slurm's usual limit
WORKING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "REQUEUED",
           "SIGNALING", "STAGE_OUT", "STOPPED")


def run(todo: Sequence[Run], jobs: int | None, tell: Callable[[Run], None],
        options: Mapping[str, Any], folder: Path) -> None:
    """Do runs as jobs of Slurm, ``jobs`` of an array at a time, and wait for them.

    ``options`` are those of submitit's ``update_parameters``; its files lie in ``folder``. What
    does not get to its first cell is submitted again, twice at most, unless someone cancelled it.
    """
    parallel = {"slurm_array_parallelism": jobs} if jobs else {}
    executor = executor_of(dict(options) | parallel, folder)
    left = list(todo)
    for _ in range(execution.TRIES):
        submitted: dict[str, Run] = {}
        for begin in range(0, len(left), ARRAY):
            submitted |= _submit(executor, left[begin:begin + ARRAY])
        arrays = ", ".join(sorted({job.split("_")[0] for job in submitted}))
        print(f"Submitted {len(submitted)} jobs to Slurm: {arrays}. They go on if this command is "
              "stopped.", flush=True)
        cancelled = _wait(submitted, tell)
        left = [run for run in left
                if run.status == "did not start" and run.folder not in cancelled]
        if not left:
            break


def executor_of(options: Mapping[str, Any], folder: Path) -> Any:
    """submitit's executor with these options; raises DarkmatterError where it cannot be made."""
    try:
        import submitit
    except ImportError:
        raise DarkmatterError("Slurm is reached through submitit; install it with: "
                              "pip install submitit") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    except RuntimeError as error:
        raise DarkmatterError("Slurm was not found: run this where srun and sbatch are."
                              ) from error
    try:
        executor.update_parameters(**{"name": "darkmatter", "timeout_min": 240} | dict(options))
    except (NameError, TypeError, ValueError) as error:
        raise DarkmatterError("submitit does not take these options of slurm: "
                              f"{' '.join(str(error).split())}") from None
    return executor


def _submit(executor: Any, array: Sequence[Run]) -> dict[str, Run]:
    import submitit
    from submitit.core.utils import FailedJobError

    try:
        with executor.batch():
            jobs = [executor.submit(submitit.helpers.CommandFunction(run.command))
                    for run in array]
    except FailedJobError as error:
        raise DarkmatterError(f"Slurm did not take the jobs: {' '.join(str(error).split())}"
                              ) from None
    return {job.job_id: run for job, run in zip(jobs, array, strict=True)}


def _wait(submitted: Mapping[str, Run], tell: Callable[[Run], None]) -> set[Path]:
    """Wait until Slurm has ended every job; returns the folders of those that were cancelled.

    ``squeue`` is asked, which every Slurm has; submitit itself asks ``sacct``, which needs an
    accounting database.
    """
    left, cancelled = dict(submitted), set[Path]()
    while left:
        time.sleep(POLL)
        states = _states()
        if states is None:
            continue
        for job in [job for job in left if states.get(job) not in WORKING]:
            run = left.pop(job)
            if states.get(job) == "CANCELLED":
                cancelled.add(run.folder)
            tell(run)
    return cancelled


def _states() -> dict[str, str] | None:
    """State of each of this user's jobs that Slurm knows; None while its controller is silent."""
    command = ["squeue", "--array", "--noheader", "--states=all", "--format=%i %T",
               f"--user={os.getuid()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return dict(line.split() for line in done.stdout.splitlines() if line.strip())
