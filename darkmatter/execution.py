"""One notebook, executed headless by papermill in a kernel of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from . import pairs, progress
from .errors import DarkmatterError
from .remaining import Line

Result = TypeVar("Result")


def execute(source: Path, folder: Path, parameters: Mapping[str, Any], home: Path, shelf: Path,
            line: Line, threads: int = 0) -> None:
    """Write ``folder``/executed.ipynb, and record.json where the notebook writes a record.

    ``shelf``: the other notebooks' records. ``line``: what tells of it. ``threads``: how many of the processor's to use
    (0: as many as there are).
    Raises DarkmatterError when a cell fails; running.ipynb is the notebook as far as it got.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notebook, given, running = pairs.read(source), folder / "input.ipynb", folder / "running.ipynb"
    nbformat.write(notebook, given)
    loops = folder / "progress.json"
    loops.unlink(missing_ok=True)
    inside = {"DARKMATTER_RECORD": str(folder / "record.json"), "DARKMATTER_RECORDS": str(shelf),
              progress.FILE: str(loops)}
    inside |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    try:
        with pairs.kernel(home, inside) as kernel, line.running(source.stem, loops) as part:
            papermill.execute_notebook(given, running, dict(parameters), engine_name="darkmatter",
                                       kernel_name=kernel, language="python", progress_bar=False,
                                       start_timeout=300, kernel_manager_class=_Manager, tell=part.at)
    except PapermillExecutionError as error:
        what = error.evalue if error.ename == DarkmatterError.__name__ else f"{error.ename}: {error.evalue}"
        raise _failed(source, f"at In [{error.exec_count}]: {what}", running) from None
    except (DeadKernelError, RuntimeError) as error:
        raise _failed(source, f"as its kernel died ({error})", running) from None
    running.replace(folder / "executed.ipynb")


def _failed(source: Path, what: str, running: Path) -> DarkmatterError:
    return DarkmatterError(f"Notebook {source.stem} stopped {what}\nThe notebook as far as it got: {running}"
                           "\nFinished notebooks are kept; mend this and run the same command again.")


class _Engine(NBClientEngine):
    """papermill's own engine, which also tells which cell it is at."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        begin, tell = nb_man.cell_start, options.pop("tell")

        def counted(cell: Any, cell_index: int, **rest: Any) -> Any:
            tell(cell_index + 1, len(nb_man.nb.cells))
            return begin(cell, cell_index, **rest)

        nb_man.cell_start = counted
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("darkmatter", _Engine)


class _Manager(AsyncKernelManager):
    """jupyter_client's own, which does not interrupt a kernel as it asks it to end.

    A kernel that has sent its last answer and is not idle yet would say so on the terminal.
    """

    async def _async_interrupt_kernel(self) -> None:
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


def side_by_side(work: Sequence[Callable[[], Result]], jobs: int) -> list[Result]:
    """What each function returns, ``jobs`` of them at a time, in threads that Ctrl-C does not wait for.

    After one has failed none is begun any more; its error is raised when the others that had begun have ended.
    """
    todo = iter(list(enumerate(work)))  # threads may share a list's iterator
    found, failed = dict[int, Result](), list[BaseException]()

    def worker() -> None:
        while not failed and (next_one := next(todo, None)):
            try:
                found[next_one[0]] = next_one[1]()
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(jobs, len(work)))]
    for each in threads:
        each.start()
    for each in threads:
        while each.is_alive():
            each.join(0.2)
    if failed:
        raise failed[0]
    return [found[place] for place in sorted(found)]
