"""A run is one notebook, executed once: headless, by papermill, in a kernel of its own.

A run lies in ``_build/runs/PRESET/NOTEBOOK/KEY``, where the key is made of all that determines it
(``keys``). What became of it is read from that folder, never from memory, so a run that was killed,
or whose machine was lost, is told from a finished one by whoever looks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from .. import cache, progress
from ..errors import DarkmatterError
from . import pairs

if TYPE_CHECKING:
    from .remaining import Line

Result = TypeVar("Result")
TRIES = 3  # starts of a run of a grid that does not get to its first cell


class Changed(DarkmatterError):
    """What a run depends on is no longer what it was planned with."""


@dataclass(frozen=True)
class Run:
    """One notebook with its parameters, and what it depends on."""

    notebook: str
    preset: str
    """The preset's own name; ``parameters['preset']`` is what the notebook is given, or a file."""
    parameters: dict[str, Any]
    key: str
    """What it depends on, as ``keys.run_key`` says."""
    home: str

    @property
    def source(self) -> Path:
        return Path(self.home) / "notebooks" / f"{self.notebook}.py"

    @property
    def folder(self) -> Path:
        return Path(self.home) / "_build" / "runs" / self.preset / self.notebook / self.key

    @property
    def title(self) -> str:
        given = [f"{name}={value}" for name, value in self.parameters.items() if name != "preset"]
        return " ".join([self.notebook, self.preset, *given])

    @property
    def command(self) -> list[str]:
        """The words that start it as a process of its own."""
        return [sys.executable, "-m", "darkmatter.book.grid.runs", json.dumps(asdict(self))]

    @property
    def status(self) -> str:
        """finished, failed (by an error of its own), cut off (in a cell), or did not start."""
        if (self.folder / "done.json").exists():
            return "finished"
        if (failed := self.folder / "failed.json").exists():
            return "did not start" if json.loads(failed.read_text())["again"] else "failed"
        return "cut off" if self.began else "did not start"

    @property
    def began(self) -> bool:
        """Whether a cell was begun, as papermill notes in the notebook that it is running."""
        try:
            cells = json.loads((self.folder / "running.ipynb").read_text(encoding="utf-8"))["cells"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError):
            return True  # cut off while it was written
        states = [cell["metadata"].get("papermill", {}).get("status", "pending") for cell in cells]
        return any(state != "pending" for state in states)

    @property
    def outcome(self) -> dict[str, Any]:
        """Its seconds, and why it failed where it did; empty where it has not ended."""
        files = (self.folder / name for name in ("done.json", "failed.json"))
        return next((json.loads(path.read_text()) for path in files if path.exists()), {})

    def shelve(self, path: Path) -> None:
        """Copy its record, if it wrote one, with the seconds of the whole notebook, imports too."""
        if (record := self.folder / "record.json").exists():
            seconds = {"wall_seconds": self.outcome["seconds"]}
            cache.write_json(path, json.loads(record.read_text()) | seconds)


@dataclass(frozen=True)
class Done:
    """A finished run: its seconds, and whether it was there already."""

    run: Run
    seconds: float
    kept: bool


def run_once(run: Run, shelf: Path, line: Line, threads: int = 0,
             check: Callable[[], None] = lambda: None) -> Done:
    """Execute a run unless it is finished; others who want the same one wait for this.

    ``done.json`` is written last, so a run that was cut off is never taken for a finished one. What
    ``check`` or ``execute`` raises is also noted in ``failed.json``: why, and whether to try again.
    """
    done, name = run.folder / "done.json", run.notebook
    with cache.lock(f"the run {run.folder}"):
        if done.exists():
            line.keep(name)
            print(f"{name}: finished earlier, kept", flush=True)
            return Done(run, run.outcome["seconds"], kept=True)
        # What an earlier try left would be taken for what becomes of this one.
        for left in ("failed.json", "running.ipynb"):
            (run.folder / left).unlink(missing_ok=True)
        print(f"{name}: running", flush=True)
        begun = time.monotonic()
        try:
            check()
            execute(run.source, run.folder, run.parameters, Path(run.home), shelf, line, threads)
        except (DarkmatterError, OSError) as error:
            cache.write_json(run.folder / "failed.json", {
                "why": str(error), "again": not isinstance(error, Changed) and not run.began,
                "seconds": round(time.monotonic() - begun, 1)})
            raise
        seconds = round(time.monotonic() - begun, 1)
        cache.write_json(done, {"notebook": name, "preset": run.preset, "seconds": seconds})
    print(f"{name}: finished in {seconds:.0f} s", flush=True)
    return Done(run, seconds, kept=False)


def execute(source: Path, folder: Path, parameters: Mapping[str, Any], home: Path, shelf: Path,
            line: Line, threads: int = 0) -> None:
    """Write ``folder``/executed.ipynb, and record.json where the notebook writes a record.

    ``shelf``: the other notebooks' records. ``line``: what tells of it. ``threads``: how many of
    the processor's to use (0: as many as there are). Raises DarkmatterError when a cell fails;
    running.ipynb is the notebook as far as it got.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notebook, given, running = pairs.read(source), folder / "input.ipynb", folder / "running.ipynb"
    nbformat.write(notebook, given)
    loops = folder / "progress.json"
    loops.unlink(missing_ok=True)
    variables = {"DARKMATTER_RECORD": str(folder / "record.json"),
                 "DARKMATTER_RECORDS": str(shelf), progress.FILE: str(loops)}
    variables |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    count = len(notebook.cells) + 1  # papermill adds one with the parameters
    try:
        with line.running(source.stem, loops) as part:
            papermill.execute_notebook(
                given, running, dict(parameters), progress_bar=False, start_timeout=300,
                kernel_manager_class=kernel_manager(variables),
                on_cell_start=lambda cell, cell_index: part.at(cell_index + 1, count))
    except PapermillExecutionError as error:
        ours = error.ename == DarkmatterError.__name__
        sentence = error.evalue if ours else f"{error.ename}: {error.evalue}"
        raise _failed(source, f"at In [{error.exec_count}]: {sentence}", running) from None
    except (DeadKernelError, RuntimeError) as error:
        raise _failed(source, f"as its kernel died ({error})", running) from None
    running.replace(folder / "executed.ipynb")


def _failed(source: Path, what: str, running: Path) -> DarkmatterError:
    return DarkmatterError(
        f"Notebook {source.stem} stopped {what}\nThe notebook as far as it got: {running}\n"
        "Finished notebooks are kept; mend this and run the same command again.")


def kernel_manager(variables: Mapping[str, str]) -> type[AsyncKernelManager]:
    """What starts kernels of this very Python with these environment variables.

    jupyter_client's own but for one thing: it does not interrupt a kernel as it asks it to end. A
    kernel that has sent its last answer and is not idle yet would say so on the terminal.
    """
    class Manager(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**pairs.KERNEL, env=dict(variables))  # found in no folder

        async def _async_interrupt_kernel(self) -> None:
            if not self.shutting_down:
                await super()._async_interrupt_kernel()

    return Manager


def side_by_side(work: Sequence[Callable[[], Result]], jobs: int) -> list[Result]:
    """What each function returns, ``jobs`` of them at a time, in threads that Ctrl-C leaves behind.

    After one has failed none is begun any more; its error is raised when the others that had begun
    have ended.
    """
    failed: list[BaseException] = []

    def one(function: Callable[[], Result]) -> Any:
        try:
            return None if failed else function()
        except BaseException as error:
            failed.append(error)

    with ThreadPool(max(1, min(jobs, len(work)))) as pool:
        results = pool.map(one, work, chunksize=1)
    if failed:
        raise failed[0]
    return results
