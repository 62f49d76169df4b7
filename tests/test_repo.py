"""What is true of the repository as a whole: clean code, pairs in sync, no way to run what a file says."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from darkmatter import pairs

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.py"))


def test_lint() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_types() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyright"], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_pairs_agree_and_hold_no_outputs() -> None:
    assert NOTEBOOKS
    assert pairs.out_of_sync(HOME / "notebooks") == []


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_parameters(source: Path) -> None:
    """Typed and commented, the preset first, and 'smoke': a cell answers in seconds while one edits."""
    code = [cell for cell in pairs.read(source).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", [])
    lines = code[0].source.splitlines()
    assert re.match(r'preset: str = "smoke"  # ', lines[0])
    for line in lines:
        assert re.match(r"\w+: [\w\[\], ]+ = .+  # .+", line), (
            f"papermill --help-notebook cannot explain: {line}"
        )


def test_nothing_can_run_what_a_file_says() -> None:
    unsafe = re.compile(
        r"import pickle|pickle\.load|allow_pickle=True|yaml\.load\(|weights_only=False|(?<!\.)\beval\("
    )
    for path in [*(HOME / "darkmatter").glob("*.py"), *NOTEBOOKS]:
        assert not unsafe.search(path.read_text(encoding="utf-8")), path


BASE = ["errors", "outputs", "progress", "cache", "precision", "releases", "preset"]
MEASURING = ["pile", "library", "repeats", "corpus", "packaged", "model", "topk", "trainer", "activations", "training",
             "saes", "codes", "regression", "survey", "convergence", "sensitivity", "decomposition",
             "baselines", "scaling", "sizes", "plan"]
EXPERIMENTS = ["parts", "onerror", "windows", "interpret", "scorers", "pertoken", "theory", "synthetic", "components",
               "downstream", "pursuit"]
SHOWING = ["records", "figures", "report", "reference", "remaining", "pairs", "pages", "recorded", "execution", "book",
           "cells", "local", "slurm", "grid"]
ROOMS = [*BASE, *MEASURING, *EXPERIMENTS, *SHOWING, "evaluator"]


def test_the_rooms_import_one_way() -> None:
    """A room imports rooms before it in the list and none after it; only a call may reach further."""
    for path in (HOME / "darkmatter").glob("[!_]*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        froms = [node for node in body if isinstance(node, ast.ImportFrom) and node.level]
        used = {(node.module or alias.name).split(".")[0] for node in froms for alias in node.names}
        assert path.stem in ROOMS, "a new room needs its place in the list"
        later = used & set(ROOMS[ROOMS.index(path.stem) + 1 :])
        assert not later, f"{path.stem} imports {later}"


def test_inside_the_core_imports_go_one_way() -> None:
    """And the core imports nothing of the package but its exception, and what writes files."""
    order = ["splits", "moments", "scores", "draws", "passes", "decompose", "__init__"]
    files = {path.stem: path for path in (HOME / "darkmatter" / "regression").glob("*.py")}
    assert files.keys() == set(order)
    for name, path in files.items():
        froms = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        assert {node.module for node in froms if node.level == 2} <= {"errors", "outputs"}
        inside = {str(node.module) for node in froms if node.level == 1}
        assert inside <= set(order[:order.index(name)]), name


def test_sync_brings_a_pair_together(home: Path) -> None:
    folder = home / "notebooks"
    shutil.copy(HOME / "pyproject.toml", home)
    text = folder / "01_one.py"
    text.write_text(
        '# %% [markdown]\n# Words\n\n# %% tags=["parameters"]\npreset: str = "smoke"  # a preset\n'
    )
    pairs.sync(folder)
    assert pairs.out_of_sync(folder) == []
    notebook = folder / "01_one.ipynb"
    edited = (
        notebook.read_text()
        .replace("Words", "Better words")
        .replace('"outputs": []', '"outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]')
    )
    notebook.write_text(edited)
    assert pairs.out_of_sync(folder) == ["01_one.ipynb is not what 01_one.py says, or holds outputs"]
    pairs.sync(folder)
    assert pairs.out_of_sync(folder) == []
    assert "# Better words" in text.read_text()
    assert '"outputs": []' in notebook.read_text()
    text.unlink()
    assert pairs.out_of_sync(folder) == ["01_one has only one half"]
    pairs.sync(folder)
    assert "# Better words" in text.read_text()
