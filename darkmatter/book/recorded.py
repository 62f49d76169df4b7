"""The book as it was last recorded: what its pages show, in ``artifacts/recorded/PRESET``.

One file a notebook. ``keep`` writes them from finished runs and leaves one alone whose outputs are
what they were. ``build`` makes the pages from them and today's prose, with what
requirements-read.txt names: neither torch nor a model.
"""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat

from .. import cache
from ..errors import DarkmatterError
from . import pages, pairs

ENDING = ".json.gz"
# The forms that an output may come in; a page shows the first that there is, no other is recorded.
FORMS = ("application/vnd.plotly.v1+json", "text/markdown", "text/html", "image/svg+xml",
         "image/png", "text/plain")
MISSING = ("No output is recorded for today's code of this chapter; "
           "“make book” runs it and shows what it computes.")


def folder_of(home: Path, preset: str) -> Path:
    """Where the recorded outputs of a preset lie."""
    return home / "artifacts" / "recorded" / preset


# To record

def keep(runs: Mapping[str, Path], folder: Path) -> list[str]:
    """Record runs, by notebook the directory of its run; returns the notebooks that changed."""
    changed = []
    for name, run in runs.items():
        new, path = _record(run), folder / f"{name}{ENDING}"
        try:
            old = load(path)
        except DarkmatterError:
            old = {}
        if any(old.get(part) != new[part] for part in ("code", "cells")):
            changed.append(name)
            text = json.dumps(new, sort_keys=True, separators=(",", ":"))
            with cache.atomic(path) as temporary:
                temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return changed


def forget(folder: Path, names: Iterable[str]) -> None:
    """Remove what is recorded of notebooks that are not among ``names``."""
    for path in set(folder.glob(f"*{ENDING}")) - {folder / f"{name}{ENDING}" for name in names}:
        path.unlink()


def _record(run: Path) -> dict[str, Any]:
    """What a page needs of a run: outputs, papermill's cell of parameters, where they are from."""
    executed = nbformat.read(run / "executed.ipynb", as_version=4)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    path = run / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    machine = record.get("hardware", {})
    return {"code": _code(cell for cell in cells if not pages.is_injected(cell)),
            "cells": [_slim(cell) for cell in cells], "date": record.get("started", "")[:10],
            **{name: record.get(name) for name in ("commit", "dirty", "device", "dtype")},
            **{name: machine.get(name) for name in ("processor", "cores")}}


def _code(cells: Iterable[Any]) -> str:
    return cache.key(code=[cell.source for cell in cells])


def _slim(cell: Any) -> dict[str, Any]:
    """A code cell with what a page shows; the source is today's, except of papermill's cell."""
    injected = pages.is_injected(cell)
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return {"cell_type": "code", "execution_count": cell.execution_count,
            "source": cell.source if injected else "",
            "metadata": {"tags": [pages.INJECTED] if injected else []},
            "outputs": [_shown(output) for output in outputs]}


def _shown(output: Any) -> Any:
    """An output in the form that a page shows."""
    form = next((form for form in FORMS if form in output.get("data", ())), None)
    return {**output, "data": {form: output.data[form]}} if form else output


# To read

def build(preset: str, home: Path) -> Path:
    """Build the book from what is recorded, in a place of its own; returns its first page.

    A notebook without recorded outputs for today's code gets a page of prose, and a warning says
    which. Raises DarkmatterError where no notebook has any, or where the pages cannot be built.
    """
    folder = folder_of(home, preset)
    executed, problems = dict[str, Any](), dict[str, list[str]]()
    for source in pairs.texts(home / "notebooks"):
        try:
            executed[source.stem] = nbformat.from_dict(_fitting(source, folder))
        except DarkmatterError as why:
            executed[source.stem] = None
            problems.setdefault(str(why), []).append(source.stem)
    good = [notebook for notebook in executed.values() if notebook]
    if not good:
        others = sorted(path.name for path in folder.parent.glob("*") if path != folder)
        only = f" (other presets: {', '.join(others)})" if others else ""
        raise DarkmatterError(f"Nothing is recorded for today's notebooks on the preset '{preset}'"
                              f"{only}; 'make book PRESET={preset}' runs them and builds the book.")
    if problems:
        which = " ".join(f"{why}: {', '.join(names)}." for why, names in problems.items())
        warnings.warn("Some pages have prose only, because nothing is recorded for today's code "
                      f"('make book' runs it). {which}", stacklevel=2)
    notes = {"": line(good, "The chapters of this book were recorded")}
    notes |= {f"notebooks/{name}": line([notebook]) if notebook else MISSING
              for name, notebook in executed.items()}
    with cache.lock(f"the recorded book in {home}"):
        page = pages.build(executed, home, home / "_build" / "read", notes)
    print(f"The book is {page}\n  {page.as_uri()}", flush=True)
    return page


def line(notebooks: Iterable[Mapping[str, Any]], begin: str = "Recorded") -> str:
    """Where a page's numbers come from, in words: date, commit and machine of what is recorded."""
    dates, commits, machines = set[str](), set[str](), set[str]()
    for notebook in notebooks:
        commit = (notebook["commit"] or "")[:7]
        cores = f"{notebook['cores']} cores" if notebook["cores"] else ""
        device = notebook["device"] if notebook["device"] != "cpu" else ""
        machine = [notebook["processor"] or "an unknown machine", cores, device, notebook["dtype"]]
        dates.add(notebook["date"])
        commits.add(f"{commit} with changes" if commit and notebook["dirty"] else commit)
        machines.add(", ".join(filter(None, machine)))
    days = sorted(filter(None, dates))
    parts = [begin, " to ".join(dict.fromkeys([*days[:1], *days[-1:]])),
             f"at commit {', '.join(sorted(filter(None, commits)))}" if any(commits) else "",
             f"on {'; '.join(sorted(machines))}"]
    return f"{' '.join(filter(None, parts))}."


def load(path: Path) -> dict[str, Any]:
    """What is recorded of a notebook; DarkmatterError where nothing is, or it is damaged."""
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise DarkmatterError("Not recorded") from None
    except (OSError, EOFError, zlib.error, ValueError):
        raise DarkmatterError("Damaged") from None


def _fitting(source: Path, folder: Path) -> dict[str, Any]:
    """What is recorded of a notebook, if its code was today's."""
    recorded = load(folder / f"{source.stem}{ENDING}")
    today = _code(cell for cell in pairs.read(source).cells if cell.cell_type == "code")
    if recorded["code"] != today:
        raise DarkmatterError("Recorded with other code than today's")
    return recorded
