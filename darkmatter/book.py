"""The runner: execute each notebook once for what it depends on, then have the book built from the results.

A run is keyed by everything that determines it and lies in ``_build/runs/PRESET/NOTEBOOK/KEY``. Its marker
``done.json`` is written last, so a run that was cut off is never taken for finished. Prose is not in the key:
``pages`` takes the outputs of the run and today's prose.
"""

from __future__ import annotations

import ast
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat

from . import cache, execution, model, pages, pairs, recorded, records
from . import preset as presets
from .errors import DarkmatterError
from .remaining import PAGES, Line

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Done:
    """A finished run of one notebook: its directory, its seconds, and whether it was there already."""

    notebook: str
    folder: Path
    seconds: float
    kept: bool


def build(preset: str, only: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
          home: Path = records.HOME, jobs: int | None = None, record: bool = False) -> Path | None:
    """Run the notebooks that have no finished run, then build the book unless ``only`` some were asked for.

    The first runs alone, because it makes what the others share; then ``jobs`` at a time (None: two, each on half of
    the processor, or one where the model runs on a GPU); at last, one after another, those that read the others'
    records. ``record``: also keep the outputs for ``recorded.build``. Returns the book's first page. Raises
    DarkmatterError when a notebook or the build of the book fails.
    """
    given = dict(parameters or {})
    if record and (given or Path(preset).suffix):
        raise DarkmatterError("Only a preset of the package, as it is, can be recorded: "
                              "give its name, and no parameters.")
    chosen = presets.load(preset, **{name: given[name] for name in given if name in records.OVERRIDES})
    sources = sources_of(home, only)
    for source in sources:
        reject_unknown(source, given)
    if Path(preset).suffix:
        preset = str(Path(preset).expanduser().resolve())  # a notebook may run in another directory
    given = {"preset": preset} | given
    stages = _stages(sources, _jobs(chosen) if jobs is None else jobs)
    line = _line(stages, chosen, given, home, () if only else (PAGES,))
    one = partial(_run, preset=chosen, parameters=given, home=home, line=line)
    with cache.lock(f"the book in {home}"), line.shown():
        runs, begun = list[Done](), time.monotonic()
        for stage, at_once in stages:
            threads = max(1, (os.cpu_count() or 1) // at_once) if at_once > 1 else 0
            work = [partial(one, source, before=list(runs), threads=threads) for source in stage]
            runs += execution.side_by_side(work, at_once)
        ran = time.monotonic()
        page = None
        if not only:
            with line.running(PAGES):
                page = pages.build({run.notebook: _executed(run) for run in runs}, home)
    if record:
        _record(runs, bool(only), recorded.folder_of(home, chosen.name))
    _summary(runs, time.monotonic() - ran, time.monotonic() - begun, page)
    if page:
        cache.write_json(home / "_build" / f"built-{chosen.name}.json", {
            "seconds": round(time.monotonic() - begun, 1), "kept": [run.notebook for run in runs if run.kept],
            "notebooks": {run.notebook: run.seconds for run in runs}})
    return page


def _executed(run: Done) -> Any:
    return nbformat.read(run.folder / "executed.ipynb", as_version=4)


def _record(runs: Sequence[Done], some: bool, folder: Path) -> None:
    """Keep the outputs of these runs, and of no others unless they are just ``some`` of the notebooks."""
    folders = {run.notebook: run.folder for run in runs}
    changed = recorded.keep(folders, folder)
    if not some:
        recorded.forget(folder, folders)
    print(f"recorded in {folder}: {', '.join(changed) or 'nothing changed'}", flush=True)


def _jobs(preset: presets.Preset) -> int:
    """Notebooks at a time: two on a processor, where much of a notebook keeps one core busy; one on a GPU."""
    return 2 if model.device_of(preset).type == "cpu" else 1


Stage = tuple[Sequence[Path], int]


def _stages(sources: Sequence[Path], jobs: int) -> list[Stage]:
    """Notebooks that may run at the same time, and how many of them."""
    readers = [source for source in sources if reads_records(source)[0]]
    others = sources[:len(sources) - len(readers)]
    return [(others[:1], 1), (others[1:], jobs), *(([reader], 1) for reader in readers)]


def _line(stages: Sequence[Stage], preset: presets.Preset, parameters: Mapping[str, Any], home: Path,
          last: Sequence[str]) -> Line:
    """What tells of a run; a notebook that reads others' records is kept or not when they are there."""
    kept = {source.stem for sources, _ in stages for source in sources if not reads_records(source)[0]
            and (_folder(source, preset, parameters, (), home) / "done.json").exists()}
    named = [([source.stem for source in sources], at_once) for sources, at_once in stages]
    return Line(preset.name, [*named, (last, 1)], kept)


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
    modules = {str(path.relative_to(PACKAGE)): cache.sha256(path) for path in modules_used("\n".join(code))}
    settings = preset.fields() | {"dtype": model.dtype_of(preset)}
    return cache.key(preset=settings, code=code, modules=modules, data=records.inputs(preset),
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
    with pairs.PARSING:
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package.name if node.level else "", node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    inner = {name.split(".")[1] for name in names if name.startswith(f"{package.name}.")}
    found = [path for name in inner for path in (package / f"{name}.py", *(package / name).glob("*.py"))]
    return {path for path in found if path.exists()}


# One notebook

def _folder(source: Path, preset: presets.Preset, parameters: Mapping[str, Any], before: Sequence[Done],
            home: Path) -> Path:
    others = home / "_build" / "records" if _mentions("every_preset", _code(source)) else None
    key = run_key(source, preset, parameters, before, others)
    return home / "_build" / "runs" / preset.name / source.stem / key


def _run(source: Path, preset: presets.Preset, parameters: Mapping[str, Any], before: Sequence[Done],
         home: Path, line: Line, threads: int) -> Done:
    name, shelf = source.stem, home / "_build" / "records" / preset.name
    folder = _folder(source, preset, parameters, before, home)
    marker, record = folder / "done.json", folder / "record.json"
    with cache.lock(f"the run {folder}"):  # a grid may be at the same one
        if kept := marker.exists():
            line.keep(name)
            seconds = json.loads(marker.read_text())["seconds"]
        else:
            print(f"{name}: running", flush=True)
            begun = time.monotonic()
            execution.execute(source, folder, parameters, home, shelf, line, threads)
            seconds = round(time.monotonic() - begun, 1)
            cache.write_json(marker, {"notebook": name, "preset": preset.name, "seconds": seconds})
    print(f"{name}: {'finished earlier, kept' if kept else f'finished in {seconds:.0f} s'}", flush=True)
    if record.exists():  # where records.load_all looks; with the time of the whole notebook, imports included
        cache.write_json(shelf / f"{name}.json", json.loads(record.read_text()) | {"wall_seconds": seconds})
    return Done(name, folder, seconds, kept)


# What the reader of the terminal sees

def _summary(runs: Sequence[Done], html: float, all_of_it: float, page: Path | None) -> None:
    for run in runs:
        print(f"  {run.notebook:<24}{run.seconds:8.0f} s{'  (kept)' if run.kept else ''}")
    if page:
        print(f"  {'HTML':<24}{html:8.0f} s\n  {'from start to end':<24}{all_of_it:8.0f} s\n")
        print(f"The book is {page}\n  {page.as_uri()}", flush=True)
