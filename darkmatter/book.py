"""The runner: execute each notebook once for what it depends on, then have the book built from the results.

A run is keyed by everything that determines it and lies in ``_build/runs/PRESET/NOTEBOOK/KEY``. Its marker
``done.json`` is written last, so a run that was cut off is never taken for finished. Prose is not in the key:
``pages`` takes the outputs of the run and today's prose.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from . import cache, pages, pairs, records
from . import preset as presets
from .errors import DarkmatterError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Done:
    """A finished run of one notebook: its directory, its seconds, and whether it was there already."""

    notebook: str
    folder: Path
    seconds: float
    kept: bool


def build(preset: str, only: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
          home: Path = records.HOME) -> Path | None:
    """Run the notebooks that have no finished run, then build the book unless ``only`` some were asked for.

    Returns the book's first page. Raises DarkmatterError when a notebook or the build of the book fails.
    """
    given = dict(parameters or {})
    chosen = presets.load(preset, **{name: given[name] for name in given if name in records.OVERRIDES})
    sources = sources_of(home, only)
    for source in sources:
        reject_unknown(source, given)
    if Path(preset).suffix:
        preset = str(Path(preset).expanduser().resolve())  # a notebook may run in another directory
    with cache.lock(f"the book in {home}"):
        runs: list[Done] = []
        for source in sources:
            runs.append(_run(source, chosen, {"preset": preset} | given, runs, home))
        begun = time.monotonic()
        with progress("book", 0):
            executed = {run.notebook: run.folder / "executed.ipynb" for run in runs}
            page = None if only else pages.build(executed, home)
        _summary(runs, time.monotonic() - begun, page)
    return page


def sources_of(home: Path, only: Sequence[str]) -> list[Path]:
    """The notebooks in the order they run in: by name, those that read the others' records last."""
    found = {path.stem: path for path in sorted((home / "notebooks").glob("*.py"), key=reads_records)}
    missing = [name for name in only if name not in found]
    if missing or not found:
        raise DarkmatterError(f"There is no notebook {' '.join(missing[:1])} in {home / 'notebooks'}; "
                              f"there are: {', '.join(found) or 'none'}.")
    return [path for name, path in found.items() if not only or name in only]


def reads_records(source: Path) -> tuple[bool, str]:
    return _mentions("load_all", _code(source)), source.name


def _mentions(word: str, code: Sequence[str]) -> bool:
    return any(word in cell for cell in code)


def _code(source: Path) -> list[str]:
    return [cell.source for cell in pairs.read(source).cells if cell.cell_type == "code"]


def reject_unknown(source: Path, parameters: Mapping[str, Any]) -> None:
    cells = pairs.read(source).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = records.assigned("\n".join(tagged))
    for name in ["preset", *parameters]:
        if name not in known:
            raise DarkmatterError(f"Unknown parameter '{name}'; {source.stem} takes: {', '.join(known)}.")


# What a run depends on

def run_key(source: Path, preset: presets.Preset, parameters: Mapping[str, Any],
            before: Sequence[Done], others: Path | None = None) -> str:
    """16 hex digits over settings, parameters, code cells, modules and data.

    And over the runs before this one, where the notebook reads their records, over ``others``, the records of other
    presets' builds, where it reads those, and over the committed results that it shows. Not over the reference: a run
    is compared with the one there was when it ran.
    """
    elsewhere = [path for path in sorted(others.rglob("*.json")) if path.parent.name != preset.name] if others else []
    code = _code(source)
    runs = before if _mentions("load_all", code) else ()
    modules = {path.name: cache.sha256(path) for path in modules_used("\n".join(code))}
    return cache.key(preset=preset.fields(), code=code, modules=modules, data=records.inputs(preset),
                     parameters={name: parameters[name] for name in parameters if name != "preset"},
                     before=[run.folder.name for run in runs],
                     others=[cache.sha256(path) for path in elsewhere + _shown("\n".join(code))])


# Committed results, in artifacts/, by a word in the code that reads them.
SHOWN = {"onerror": "on-error.json", "convergence": "convergence.json", "sensitivity": "sensitivity.json",
         "bench": "bench/*.json", "full-size": "full-size.json"}


def _shown(code: str) -> list[Path]:
    """Committed results that a notebook reads."""
    return [path for word, name in SHOWN.items() if word in code
            for path in sorted((records.HOME / "artifacts").glob(name))]


def modules_used(code: str, package: Path = PACKAGE) -> list[Path]:
    """The files of ``package`` that a notebook's code imports, directly or through one another."""
    magic = ("%", "!")
    plain = "\n".join("" if line.startswith(magic) else line for line in code.splitlines())
    found, todo = {package / "__init__.py"}, _imported(plain, package)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo |= _imported(module.read_text(encoding="utf-8"), package)
    return sorted(found)


def _imported(code: str, package: Path) -> set[Path]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package.name if node.level else "", node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    inner = [name.split(".")[1] for name in names if name.startswith(f"{package.name}.")]
    return {path for name in inner if (path := package / f"{name}.py").exists()}


# One notebook

def _run(source: Path, preset: presets.Preset, parameters: Mapping[str, Any], before: Sequence[Done],
         home: Path) -> Done:
    name, shelf = source.stem, home / "_build" / "records" / preset.name
    others = shelf.parent if _mentions("every_preset", _code(source)) else None
    key = run_key(source, preset, parameters, before, others)
    folder = home / "_build" / "runs" / preset.name / name / key
    marker, record = folder / "done.json", folder / "record.json"
    with cache.lock(f"the run {folder}"):  # a grid may be at the same one
        if kept := marker.exists():
            seconds = json.loads(marker.read_text())["seconds"]
        else:
            print(f"{name}: running", flush=True)
            begun = time.monotonic()
            execute(source, folder, parameters, home, shelf)
            seconds = round(time.monotonic() - begun, 1)
            write_json(marker, {"notebook": name, "preset": preset.name, "seconds": seconds})
    print(f"{name}: {'finished earlier, kept' if kept else f'finished in {seconds:.0f} s'}", flush=True)
    if record.exists():  # where records.load_all looks; with the time of the whole notebook, imports included
        write_json(shelf / f"{name}.json", json.loads(record.read_text()) | {"wall_seconds": seconds})
    return Done(name, folder, seconds, kept)


def execute(source: Path, folder: Path, parameters: Mapping[str, Any], home: Path, shelf: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    notebook, given, running = pairs.read(source), folder / "input.ipynb", folder / "running.ipynb"
    nbformat.write(notebook, given)
    os.environ |= {"DARKMATTER_RECORD": str(folder / "record.json"), "DARKMATTER_RECORDS": str(shelf),
                   "JUPYTER_PATH": str(pairs.kernels(home))}  # the kernel inherits these
    try:
        with progress(source.stem, len(notebook.cells)):
            papermill.execute_notebook(given, running, dict(parameters), engine_name="darkmatter",
                                       kernel_name="python3", language="python", progress_bar=False,
                                       start_timeout=300)
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

    cell = 0

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        begin = nb_man.cell_start

        def counted(cell: Any, cell_index: int, **rest: Any) -> Any:
            _Engine.cell = cell_index + 1
            return begin(cell, cell_index, **rest)

        nb_man.cell_start = counted
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("darkmatter", _Engine)


def write_json(path: Path, value: Any) -> None:
    with cache.atomic(path) as temporary:
        temporary.write_text(json.dumps(value))


# What the reader of the terminal sees

def _summary(runs: Sequence[Done], seconds: float, page: Path | None) -> None:
    for run in runs:
        print(f"  {run.notebook:<24}{run.seconds:8.0f} s{'  (kept)' if run.kept else ''}")
    if page:
        print(f"  {'HTML':<24}{seconds:8.0f} s\n\nThe book is {page}\n  {page.as_uri()}", flush=True)


@contextmanager
def progress(name: str, cells: int) -> Iterator[None]:
    """While the body works, say how far it is: each second in place on a terminal, else a line each 30 s."""
    live, begun, stop = sys.stdout.isatty(), time.monotonic(), threading.Event()
    _Engine.cell = 0

    def tell() -> None:
        while not stop.wait(1 if live else 30):
            where = f"cell {_Engine.cell} of {cells}, " if cells else ""
            line = f"  {name}: {where}{time.monotonic() - begun:.0f} s"
            print(f"\r{line}" if live else line, end="" if live else "\n", flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join()
        print("\r\x1b[K" if live else "", end="", flush=True)
