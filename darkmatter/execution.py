"""One notebook, executed headless by papermill in a kernel of its own, with its progress on the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from . import pairs
from .errors import DarkmatterError

Result = TypeVar("Result")


def execute(source: Path, folder: Path, parameters: Mapping[str, Any], home: Path, shelf: Path,
            threads: int = 0) -> None:
    """Write ``folder``/executed.ipynb, and record.json where the notebook writes a record.

    ``shelf``: the other notebooks' records. ``threads``: how many of the processor's to use (0: as many as there are).
    Raises DarkmatterError when a cell fails; running.ipynb is the notebook as far as it got.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notebook, given, running = pairs.read(source), folder / "input.ipynb", folder / "running.ipynb"
    nbformat.write(notebook, given)
    inside = {"DARKMATTER_RECORD": str(folder / "record.json"), "DARKMATTER_RECORDS": str(shelf)}
    inside |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    try:
        with pairs.kernel(home, inside) as kernel, progress(source.stem, len(notebook.cells)) as tell:
            papermill.execute_notebook(given, running, dict(parameters), engine_name="darkmatter",
                                       kernel_name=kernel, language="python", progress_bar=False,
                                       start_timeout=300, tell=tell)
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
            tell(cell_index + 1)
            return begin(cell, cell_index, **rest)

        nb_man.cell_start = counted
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("darkmatter", _Engine)


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


# What the reader of the terminal sees

_NOW: dict[str, tuple[int, int, float]] = {}  # by what is being done: the cell it is at, of how many, begun when


@contextmanager
def progress(name: str, cells: int) -> Iterator[Callable[[int], None]]:
    """While the body works, say how far it and all others are: each second in place on a terminal, else each 30 s.

    Yields a function that takes the number of the cell it is at.
    """
    begun, stop = time.monotonic(), threading.Event()
    _NOW[name] = (0, cells, begun)
    teller = threading.Thread(target=_tell, args=[name, stop], daemon=True)
    teller.start()
    try:
        yield lambda cell: _NOW.update({name: (cell, cells, begun)})
    finally:
        _NOW.pop(name)
        stop.set()
        teller.join()
        print("\r\x1b[K" if sys.stdout.isatty() else "", end="", flush=True)


def _tell(name: str, stop: threading.Event) -> None:
    """Say what is being done, until told to stop; of several tellers the one that began first speaks for all."""
    live = sys.stdout.isatty()
    while not stop.wait(1 if live else 30):
        now = list(_NOW.items())
        if now and now[0][0] == name:
            line = "; ".join(_where(*each) for each in now)
            print(f"\r\x1b[K  {line}" if live else f"  {line}", end="" if live else "\n", flush=True)


def _where(name: str, state: tuple[int, int, float]) -> str:
    cell, cells, begun = state
    return f"{name}: {f'cell {cell} of {cells}, ' if cells else ''}{time.monotonic() - begun:.0f} s"
