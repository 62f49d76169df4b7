"""Runs of a grid on this machine: processes, one a GPU."""

from __future__ import annotations

import os
import queue
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from . import cells
from .cells import Cell, status


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def run(todo: Sequence[Cell], jobs: int | None, tell: Callable[[Cell], None]) -> None:
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
        for _ in range(cells.TRIES):
            process = subprocess.Popen(cells.command(cell), env=environment, stdin=subprocess.DEVNULL)
            working.add(process)
            process.wait()
            working.discard(process)
            if status(cell) != "did not start":
                break
        free.put(gpu)
        tell(cell)

    pool = ThreadPoolExecutor(len(slots))
    try:
        for done in [pool.submit(one, cell) for cell in todo]:
            done.result()
    except BaseException:  # interrupted: start no more, stop what runs
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(working):
            process.terminate()
        raise
    pool.shutdown()
