"""The two halves of a notebook: NAME.py (percent format, the source), NAME.ipynb (no outputs)."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import jupytext
import nbformat
from jupytext.cli import jupytext as jupytext_command

from .. import cache
from ..errors import DarkmatterError

# Held by whoever parses Python: CPython's ast counts its depth for all threads together.
PARSING = threading.Lock()
CONFLICT = re.compile(r"^(# )?(<<<<<<<|>>>>>>>) ", re.M)  # as git writes them
METADATA = {"jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
# A kernel that is this very Python, whatever else is installed.
KERNEL: dict[str, Any] = {
    "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
             "--log-level=ERROR"],
    "display_name": "Python 3", "language": "python", "metadata": {"debugger": True}}


def bare(notebook: Any) -> Any:
    """The notebook without outputs, its ids made of the cells' text: the same bytes every time."""
    seen = Counter[str]()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] += 1
        cell.id = f"{digest}-{seen[digest]}"
        kept = cell.metadata.keys() & {"tags", "mystnb"}
        cell.metadata = {name: cell.metadata[name] for name in sorted(kept)}
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5  # the first with cell ids
    return notebook


def read(source: Path) -> Any:
    """The notebook that a percent file stands for."""
    with PARSING:
        return bare(jupytext.read(source))


def texts(folder: Path) -> list[Path]:
    """The percent files of a folder; a plain module among them is none, and is left alone."""
    return sorted(path for path in folder.glob("*.py")
                  if path.with_suffix(".ipynb").exists() or _has_cells(path))


def _has_cells(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return any(line.startswith("# %%") for line in lines)


def out_of_sync(folder: Path) -> list[str]:
    """One line for each pair of a folder that ``sync`` would change."""
    lines = []
    halves = [*texts(folder), *folder.glob("*.ipynb")]
    for name in sorted({path.stem for path in halves}):
        text, notebook = folder / f"{name}.py", folder / f"{name}.ipynb"
        if not (text.exists() and notebook.exists()):
            lines.append(f"{name} has only one half")
        elif not _is_written(text, notebook):
            lines.append(f"{name}.ipynb is not what {name}.py says, or holds outputs")
    return lines


def sync(folder: Path) -> list[Path]:
    """Bring both halves of every pair together (the newer one wins), strip outputs; the texts.

    Raises DarkmatterError, before anything is changed, for a half that is empty, cut off or holds
    a merge's conflict markers, and for a pair of which both halves were edited since they agreed.
    """
    agreed = folder.parent / "_build" / "pairs.json"
    _check(folder, json.loads(agreed.read_text()) if agreed.exists() else {})
    for text in texts(folder):
        _without_mark(text)
        if not text.with_suffix(".ipynb").exists():
            _write(text)
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        raise DarkmatterError(f"There are no notebooks in {folder}.")
    jupytext_command(["--quiet", "--sync", *map(str, notebooks)])
    written = [notebook.with_suffix(".py") for notebook in notebooks]
    for text in written:
        _write(text)
    cache.write_json(agreed, {text.stem: _digest(text) for text in written})
    return written


def _check(folder: Path, agreed: dict[str, str]) -> None:
    """Raise DarkmatterError for a pair that ``sync`` would destroy; it changes nothing."""
    for half in [*texts(folder), *sorted(folder.glob("*.ipynb"))]:
        content = half.read_text(encoding="utf-8-sig")
        if CONFLICT.search(content):
            raise DarkmatterError(f"{half} holds the conflict markers of a merge; resolve them, "
                                  "then sync again.")
        try:
            whole = bool(content.strip()) and bool(_cells(half))
        except Exception:  # nbformat and jupytext raise many kinds
            whole = False
        if not whole:
            raise DarkmatterError(f"{half} is empty or cut off; delete it to have it made from its "
                                  "other half, or restore it, then sync again.")
    for text in texts(folder):
        notebook, before = text.with_suffix(".ipynb"), agreed.get(text.stem)
        if before and notebook.exists():
            halves = {_digest(text), _digest(notebook)}
            if len(halves) == 2 and before not in halves:
                raise DarkmatterError(
                    f"{text} and {notebook.name} were both edited since they last agreed, each "
                    "otherwise; take one back (git checkout) or delete it, then sync again.")


def _cells(half: Path) -> list[Any]:
    return bare(jupytext.read(half)).cells


def _digest(half: Path) -> str:
    """Changes with the cells of one half: text, kind and tags."""
    with PARSING:
        cells = [(cell.cell_type, cell.source, sorted(cell.metadata.get("tags", ())))
                 for cell in _cells(half)]
    return cache.key(cells=cells)


def _without_mark(text: Path) -> None:
    """Take a byte-order mark off a text, which would make a code cell of its header."""
    content = text.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        changed = text.stat().st_mtime_ns
        with cache.atomic(text) as temporary:
            temporary.write_bytes(content.removeprefix(codecs.BOM_UTF8))
        os.utime(text, ns=(changed, changed))


def _write(text: Path) -> None:
    """Make the notebook that a text stands for, as old as the text: then neither is newer."""
    notebook, changed = text.with_suffix(".ipynb"), text.stat().st_mtime_ns
    if not (notebook.exists() and _is_written(text, notebook)):
        with cache.atomic(notebook) as temporary:
            temporary.write_text(nbformat.writes(read(text)) + "\n", encoding="utf-8")
    os.utime(notebook, ns=(changed, changed))


def _is_written(text: Path, notebook: Path) -> bool:
    return nbformat.writes(read(text)) + "\n" == notebook.read_text(encoding="utf-8")


def lab(home: Path, options: list[str]) -> NoReturn:
    """Become JupyterLab on ``home``/notebooks, paired: a save of one half writes the other.

    Its kernel 'python3' is KERNEL, from a Jupyter data directory that is made for it.
    """
    data = home / "_build" / "jupyter"
    cache.write_json(data / "kernels" / "python3" / "kernel.json", KERNEL)
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={home}",
               "--LabApp.default_url=/lab/tree/notebooks", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *options]
    os.execve(sys.executable, command, os.environ | {"JUPYTER_PATH": str(data)})
