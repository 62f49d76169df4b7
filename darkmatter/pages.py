"""The pages: executed notebooks with today's prose and the written pages, made into an HTML book."""

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

from . import cache, pairs
from .errors import DarkmatterError

INJECTED = "injected-parameters"  # papermill's tag of the cell that it adds
NOTES = "notes.json"  # beside the pages: what book/_ext/bookfigures.py puts at their tops
STRICT = ("-W", "--keep-going")

def build(executed: Mapping[str, Any], home: Path, place: Path | None = None,
          notes: Mapping[str, str] | None = None) -> Path:
    """Build ``place``/_build/html, warnings as errors, unless this very content was built already.

    ``executed`` holds each notebook as it was executed; where one is None, its page is prose alone and warnings do
    not count. ``place``: None for ``home``. ``notes``: a line for the top of each page, by its name, or for all others
    under "". Returns the first page. Raises DarkmatterError.
    """
    place = place or home
    staged, page = _stage(executed, home, place / "_build" / "site-src"), place / "_build" / "html" / "index.html"
    if notes:
        (staged / NOTES).write_text(json.dumps(notes))
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
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(staged),
               "--path-output", str(place), "--all", "-n", *([] if None in executed.values() else STRICT)]
    with log.open("w") as output:
        failed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if failed:
        said = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
        raise DarkmatterError("\n".join([f"The book could not be built; all of it is in {log}.", *said[:10]]))
    with cache.atomic(marker) as temporary:
        temporary.write_text(wanted)
    return page


def merge(current: Any, executed: Any) -> Any:
    """Today's notebook with the outputs of a run of the same code, and the parameters it was run with."""
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    cells = []
    for cell in current.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            twin = ran.pop(0)
            cell.outputs, cell.execution_count = twin.outputs, twin.execution_count
            if ran and is_injected(ran[0]):
                cells.append(ran.pop(0))
                cells[-1].metadata, cells[-1].id = nbformat.from_dict({"tags": [INJECTED]}), INJECTED
    current.cells = cells
    return current


def is_injected(cell: Any) -> bool:
    """Whether papermill added this cell."""
    return INJECTED in cell.metadata.get("tags", [])


def _stage(executed: Mapping[str, Any], home: Path, staged: Path) -> Path:
    """Everything the book is built from, in one directory."""
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "notebooks").mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(home / name, staged)
    if (home / "book").exists():
        shutil.copytree(home / "book", staged / "book", ignore=shutil.ignore_patterns("__pycache__"))
    for name, ran in executed.items():
        current = pairs.read(home / "notebooks" / f"{name}.py")
        nbformat.write(merge(current, ran) if ran else current, staged / "notebooks" / f"{name}.ipynb")
    for page in _named(yaml.safe_load((staged / "_toc.yml").read_text())):
        if not any(Path(f"{staged / page}{suffix}").exists() for suffix in ("", ".md", ".ipynb", ".rst")):
            raise DarkmatterError(f"_toc.yml names {page}, but there is no such page or notebook.")
    return staged


def _named(toc: Any) -> Iterator[str]:
    """The pages that a table of contents names."""
    for name, value in toc.items() if isinstance(toc, dict) else enumerate(toc):
        if name in ("file", "root"):
            yield value
        elif isinstance(value, dict | list):
            yield from _named(value)
