"""The two halves of a notebook: NAME.py (percent format, the source of truth) and NAME.ipynb (no outputs)."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jupytext
import nbformat
from jupytext.cli import jupytext as jupytext_command

from . import cache
from .errors import DarkmatterError

PARSING = threading.Lock()  # held by whoever parses Python: CPython's ast counts depth for all threads together
METADATA = {"jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def bare(notebook: Any) -> Any:
    """The notebook without outputs, its cell ids made from the cells' text: the same bytes every time."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"
        cell.metadata = {name: value for name, value in cell.metadata.items() if name in ("tags", "mystnb")}
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5  # the first with cell ids
    return notebook


def read(source: Path) -> Any:
    """The notebook that a percent file stands for."""
    with PARSING:
        return bare(jupytext.read(source))


def out_of_sync(folder: Path) -> list[str]:
    """One line for each pair of a folder that ``sync`` would change."""
    found = []
    for stem in sorted({path.stem for pattern in ("*.py", "*.ipynb") for path in folder.glob(pattern)}):
        text, notebook = folder / f"{stem}.py", folder / f"{stem}.ipynb"
        if not (text.exists() and notebook.exists()):
            found.append(f"{stem} has only one half")
        elif not _is_written(text, notebook):
            found.append(f"{stem}.ipynb is not what {stem}.py says, or holds outputs")
    return found


def sync(folder: Path) -> list[Path]:
    """Bring both halves of every pair together (the newer one wins), strip outputs; returns the texts."""
    for text in folder.glob("*.py"):
        if not text.with_suffix(".ipynb").exists():
            _write(text)
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        raise DarkmatterError(f"There are no notebooks in {folder}.")
    jupytext_command(["--quiet", "--sync", *map(str, notebooks)])
    texts = [notebook.with_suffix(".py") for notebook in notebooks]
    for text in texts:
        _write(text)
    return texts


def _write(text: Path) -> None:
    """Make the notebook that a text stands for, as old as the text: then neither is the newer one."""
    notebook, changed = text.with_suffix(".ipynb"), text.stat().st_mtime_ns
    if not (notebook.exists() and _is_written(text, notebook)):
        with cache.atomic(notebook) as temporary:
            temporary.write_text(nbformat.writes(read(text)) + "\n", encoding="utf-8")
    os.utime(notebook, ns=(changed, changed))


def _is_written(text: Path, notebook: Path) -> bool:
    return nbformat.writes(read(text)) + "\n" == notebook.read_text(encoding="utf-8")


def lab(home: Path, options: list[str]) -> NoReturn:
    """Become JupyterLab on ``home``/notebooks with the pairing on; a save of one half writes the other."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={home}",
               "--LabApp.default_url=/lab/tree/notebooks", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *options]
    os.execve(sys.executable, command, os.environ | {"JUPYTER_PATH": str(kernels(home))})


def kernels(home: Path) -> Path:
    """A Jupyter data directory whose kernel 'python3' is this very Python, whatever else is installed."""
    return _kernels(home / "_build" / "jupyter", "python3", {})


def _kernels(folder: Path, name: str, inside: Mapping[str, str]) -> Path:
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
    spec = {"argv": words, "display_name": "Python 3", "language": "python", "metadata": {"debugger": True},
            "env": dict(inside)}
    cache.write_json(folder / "kernels" / name / "kernel.json", spec)
    return folder


@contextmanager
def kernel(home: Path, inside: Mapping[str, str]) -> Iterator[str]:
    """The name of a kernel of its own with these environment variables, as long as the body works.

    It lies apart from those that JupyterLab offers.
    """
    name = f"run-{uuid.uuid4().hex[:12]}"
    folder = _kernels(home / "_build" / "jupyter-runs", name, inside)
    os.environ["JUPYTER_PATH"] = str(folder)
    try:
        yield name
    finally:
        shutil.rmtree(folder / "kernels" / name)
