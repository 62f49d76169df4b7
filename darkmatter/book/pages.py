"""The pages: executed notebooks with today's prose, and the written pages, as an HTML book."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml

from .. import cache
from ..errors import DarkmatterError
from . import pairs

INJECTED = "injected-parameters"  # papermill's tag of the cell that it adds
NOTES = "notes.json"  # beside the pages: what book/_ext/bookfigures.py puts at their tops
STRICT = ("-W", "--keep-going")


def build(executed: Mapping[str, Any], home: Path, place: Path | None = None,
          notes: Mapping[str, str] | None = None) -> Path:
    """Build ``place``/_build/html, warnings as errors, unless this very content was built already.

    ``executed`` holds each notebook as it was executed; where one is None, its page is prose alone
    and warnings do not count. ``place``: None for ``home``. ``notes``: a line for the top of each
    page, by its name, or for all others under "". Returns the first page. Raises DarkmatterError.
    """
    place = place or home
    staged, page = place / "_build" / "site-src", place / "_build" / "html" / "index.html"
    _stage(executed, home, staged)
    if notes:
        (staged / NOTES).write_text(json.dumps(notes))
    # The pages are built again when anything has changed that they are made of.
    marker, log = place / "_build" / "html.done", place / "_build" / "html.log"
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    machinery = [Path(__file__).with_name("figures.py"), home / "requirements.txt"]
    content = [(str(path), cache.sha256(path)) for path in files + machinery if path.exists()]
    wanted = cache.key(content=content)
    if page.exists() and marker.exists() and marker.read_text() == wanted:
        print("book: nothing changed", flush=True)
        return page
    marker.unlink(missing_ok=True)
    print("book: building the pages", flush=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build",
               str(staged), "--path-output", str(place), "--all", "-n",
               *([] if None in executed.values() else STRICT)]
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text().splitlines()
        told = [line for line in lines if "WARNING" in line or "ERROR" in line][:10]
        raise DarkmatterError("\n".join([f"The book could not be built; all of it is in {log}.",
                                         *told]))
    with cache.atomic(marker) as temporary:
        temporary.write_text(wanted)
    return page


def merge(current: Any, executed: Any) -> Any:
    """Today's notebook with the outputs of a run of the same code, and its parameters."""
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    cells = []
    for cell in current.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            twin = ran.pop(0)
            cell.outputs, cell.execution_count = twin.outputs, twin.execution_count
            if ran and is_injected(ran[0]):
                cells.append(ran.pop(0))
                cells[-1].metadata = nbformat.from_dict({"tags": [INJECTED]})
                cells[-1].id = INJECTED
    current.cells = cells
    return current


def is_injected(cell: Any) -> bool:
    """Whether papermill added this cell."""
    return INJECTED in cell.metadata.get("tags", [])


def _stage(executed: Mapping[str, Any], home: Path, staged: Path) -> None:
    """Everything the book is built from, in one directory."""
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "notebooks").mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(home / name, staged)
    if (home / "book").exists():
        shutil.copytree(home / "book", staged / "book",
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name, ran in executed.items():
        current = pairs.read(home / "notebooks" / f"{name}.py")
        whole = merge(current, ran) if ran else current
        nbformat.write(whole, staged / "notebooks" / f"{name}.ipynb")
    for page in _named(yaml.safe_load((staged / "_toc.yml").read_text())):
        paths = [Path(f"{staged / page}{suffix}") for suffix in ("", ".md", ".ipynb", ".rst")]
        if not any(path.exists() for path in paths):
            raise DarkmatterError(f"_toc.yml names {page}, but there is no such page or notebook.")


def _named(toc: Any) -> Iterator[str]:
    """The pages that a table of contents names."""
    for name, value in toc.items() if isinstance(toc, dict) else enumerate(toc):
        if name in ("file", "root"):
            yield value
        elif isinstance(value, dict | list):
            yield from _named(value)
