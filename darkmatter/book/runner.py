"""The runner: execute each notebook once for what it depends on, then have the book built."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat

from .. import cache, presets
from ..errors import DarkmatterError
from ..models import model
from . import execution, keys, pages, recorded, records
from .execution import Done, Run
from .remaining import PAGES, Line


def build(preset: str, only: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
          home: Path = records.HOME, jobs: int | None = None, record: bool = False) -> Path | None:
    """Run the notebooks that have no finished run, then build the book unless given ``only`` some.

    The first runs alone, because it makes what the others share; then ``jobs`` at a time (None:
    two, each on half of the processor, or one where the model runs on a GPU); at last, one after
    another, those that read the others' records. ``record``: also keep the outputs for
    ``recorded.build``. Returns the book's first page. Raises DarkmatterError when a notebook or the
    build of the book fails.
    """
    given = dict(parameters or {})
    if record and (given or presets.is_file(preset)):
        raise DarkmatterError("Only a preset of the package, as it is, can be recorded: "
                              "give its name, and no parameters.")
    chosen = records.preset_of(preset, given)
    sources = keys.sources_of(home, only)
    for source in sources:
        keys.reject_unknown(source, given)
    if presets.is_file(preset):
        preset = str(Path(preset).expanduser().resolve())  # a notebook may run in another directory
    plan = partial(_planned, preset=chosen, parameters={"preset": preset} | given, home=home)

    # A notebook keeps about one core busy, so two run at a time on a processor; a GPU is for one.
    jobs = jobs or (2 if model.device_of(chosen).type == "cpu" else 1)
    readers = [source for source in sources if keys.reads_records(source)]
    others = [source for source in sources if source not in readers]
    stages = [(others[:1], 1), (others[1:], jobs), *(([reader], 1) for reader in readers)]
    # Whether a reader's run can be kept is known only when the records are there that it reads.
    kept = {source.stem for source in others if plan(source).status == "finished"}
    names = [([source.stem for source in stage], at_once) for stage, at_once in stages]
    line = Line(chosen.name, [*names, ([] if only else [PAGES], 1)], kept)

    with cache.lock(f"the book in {home}"), line.shown():
        runs, begun = list[Done](), time.monotonic()
        for stage, at_once in stages:
            threads = max(1, (os.cpu_count() or 1) // at_once) if at_once > 1 else 0
            before = [done.run.key for done in runs]
            work = [partial(_run, source, partial(plan, before=before), line, threads)
                    for source in stage]
            runs += execution.side_by_side(work, at_once)
        ran = time.monotonic()
        page = None if only else _pages(runs, home, line)
    if record:
        _record(runs, bool(only), recorded.folder_of(home, chosen.name))
    for done in runs:
        print(f"  {done.run.notebook:<24}{done.seconds:8.0f} s{'  (kept)' if done.kept else ''}")
    if page:
        ended = time.monotonic()
        print(f"  {'HTML':<24}{ended - ran:8.0f} s\n  {'from start to end':<24}"
              f"{ended - begun:8.0f} s\n\nThe book is {page}\n  {page.as_uri()}", flush=True)
        cache.write_json(home / "_build" / f"built-{chosen.name}.json", {
            "seconds": round(ended - begun, 1),
            "kept": [done.run.notebook for done in runs if done.kept],
            "notebooks": {done.run.notebook: done.seconds for done in runs}})
    return page


def _planned(source: Path, preset: presets.Preset, parameters: Mapping[str, Any], home: Path,
             before: Sequence[str] = ()) -> Run:
    key = keys.run_key(source, preset, parameters, before, home / "_build" / "records")
    return Run(source.stem, preset.name, dict(parameters), key, str(home))


def _run(source: Path, plan: Callable[[Path], Run], line: Line, threads: int) -> Done:
    """Run one notebook as it is now, and put its record where ``records.load_all`` looks."""
    run = plan(source)
    shelf = Path(run.home) / "_build" / "records" / run.preset
    done = execution.run_once(run, shelf, line, threads)
    run.shelve(shelf / f"{run.notebook}.json")
    return done


def _pages(runs: Sequence[Done], home: Path, line: Line) -> Path:
    files = {done.run.notebook: done.run.folder / "executed.ipynb" for done in runs}
    with line.running(PAGES):
        return pages.build({name: nbformat.read(file, 4) for name, file in files.items()}, home)


def _record(runs: Sequence[Done], some: bool, folder: Path) -> None:
    """Keep the outputs of these runs, and of no others unless they are just ``some`` notebooks."""
    folders = {done.run.notebook: done.run.folder for done in runs}
    changed = recorded.keep(folders, folder)
    if not some:
        recorded.forget(folder, folders)
    print(f"recorded in {folder}: {', '.join(changed) or 'nothing changed'}", flush=True)
