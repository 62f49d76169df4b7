"""Runs of a grid on this machine: processes, one a GPU."""

from __future__ import annotations

import os
import queue
import subprocess
from collections.abc import Callable, Sequence
from functools import partial

from .. import execution
from ..execution import Run


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def run(todo: Sequence[Run], jobs: int | None, tell: Callable[[Run], None]) -> None:
    """Do runs in processes, each with a GPU of its own, or ``jobs`` at a time; else one by one.

    With more jobs than GPUs, some share one. What does not get to its first cell is started again,
    twice at most.
    """
    names = gpus()
    slots = [names[i % len(names)] if names else "" for i in range(jobs or len(names) or 1)]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(slots)))}
    working, stopped = set[subprocess.Popen[bytes]](), list[bool]()

    def one(run: Run) -> None:
        gpu = free.get()
        environment = (threads if len(slots) > 1 else {}) | os.environ
        environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        for _ in range(execution.TRIES):
            process = subprocess.Popen(run.command, env=environment, stdin=subprocess.DEVNULL)
            working.add(process)
            process.wait()
            working.discard(process)
            if stopped or run.status != "did not start":
                break
        free.put(gpu)
        tell(run)

    try:
        execution.side_by_side([partial(one, run) for run in todo], len(slots))
    except BaseException:  # interrupted: start no more, stop what runs
        stopped.append(True)
        for process in list(working):
            process.terminate()
        raise
