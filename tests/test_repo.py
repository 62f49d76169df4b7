"""What is true of the whole repository: clean code, pairs in sync, no file that can run code."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from darkmatter.book import pairs

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.py"))
FLOORS = 8


def test_lint() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=HOME,
                          capture_output=True, text=True, check=False)
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
    """Typed and commented; the preset first, 'smoke', so that a cell answers in seconds."""
    code = [cell for cell in pairs.read(source).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", [])
    lines = code[0].source.splitlines()
    assert re.match(r'preset: str = "smoke"  # ', lines[0])
    for line in lines:
        assert re.match(r"\w+: [\w\[\], ]+ = .+  # .+", line), (
            f"papermill --help-notebook cannot explain: {line}"
        )


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_chapter_teaches(source: Path) -> None:
    """Cells are short, most of the code is seen, and no sentence is made of branches."""
    lines, hidden = 0, 0
    for cell in pairs.read(source).cells:
        if cell.cell_type == "code":
            count = sum(bool(line.strip()) for line in cell.source.splitlines())
            assert count <= 40, cell.source
            lines += count
            hidden += count * any(tag.startswith(("hide", "remove"))
                                  for tag in cell.metadata.get("tags", []))
            for node in ast.walk(ast.parse(cell.source)):
                inside = ast.walk(node) if isinstance(node, ast.JoinedStr) else ()
                assert not any(isinstance(part, ast.IfExp) for part in inside), ast.unparse(node)
    assert hidden <= 0.4 * lines, f"{hidden} of {lines} lines of code are hidden"


def test_nothing_can_run_what_a_file_says() -> None:
    unsafe = re.compile(
        r"import pickle|pickle\.load|allow_pickle=True|yaml\.load\(|weights_only=False"
        r"|(?<!\.)\beval\("
    )
    for path in [*(HOME / "darkmatter").rglob("*.py"), *NOTEBOOKS]:
        assert not unsafe.search(path.read_text(encoding="utf-8")), path


PACKAGE = HOME / "darkmatter"
# A room imports rooms before it in the list, and none after it; only a call may reach further.
ROOMS = ["errors", "progress", "cache", "outputs", "inputs", "regression", "evaluator", "presets",
         "text", "models", "saes", "survey", "plan", "decomposition", "experiments", "book"]


def _imports(path: Path) -> set[Path]:
    """Files of the package that a file imports as it is imported itself."""
    froms = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, ast.ImportFrom) and node.level]
    found = set()
    for node in froms:
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for place in (base, *(base / alias.name for alias in node.names)):
            files = place.with_suffix(".py"), place / "__init__.py"
            found |= {file for file in files if file.exists()}
    return {file for file in found if file.parent not in path.parents or file.stem != "__init__"}


FILES = sorted(PACKAGE.rglob("*.py"))
GRAPH = {path: _imports(path) for path in FILES if path != PACKAGE / "__init__.py"}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", GRAPH, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_rooms_below_its_own(path: Path) -> None:
    if path.stem == "__main__":
        return
    assert _room(path) in ROOMS, "a new room needs its place in the list"
    above = {_room(other) for other in GRAPH[path]} - set(ROOMS[:ROOMS.index(_room(path)) + 1])
    assert not above, f"{path} imports {above}"


def test_the_house_has_few_floors_and_no_circle() -> None:
    """The longest chain of imports; ``graphlib`` raises where files import in a circle."""
    floor: dict[Path, int] = {}
    for path in graphlib.TopologicalSorter(GRAPH).static_order():
        floor[path] = 1 + max((floor[below] for below in GRAPH.get(path, ())), default=0)
    highest = max(floor, key=lambda path: floor[path])
    assert floor[highest] <= FLOORS, f"{highest} stands on floor {floor[highest]}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}),
                         ids=lambda path: path.name)
def test_a_folder_can_be_overlooked(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= 12


def test_the_core_knows_tensors_and_nothing_else() -> None:
    """It imports nothing of the package but its exception, and what writes files."""
    outside = {_room(file) for path, files in GRAPH.items() for file in files
               if _room(path) == "regression"}
    assert outside <= {"regression", "errors", "outputs"}


def test_no_module_reaches_for_anothers_private_names() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                private = [a.name for a in node.names
                           if a.name.startswith("_") and a.name != "__version__"]
                assert not private, f"{path} imports {private}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                modules = {file.stem for file in GRAPH.get(path, ())}
                inner = node.attr.startswith("_") and not node.attr.startswith("__")
                reached = f"{path}: {node.value.id}.{node.attr}"
                assert not (inner and node.value.id in modules), reached


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
        .replace('"outputs": []',
                 '"outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]')
    )
    notebook.write_text(edited)
    assert pairs.out_of_sync(folder) == [
        "01_one.ipynb is not what 01_one.py says, or holds outputs"]
    pairs.sync(folder)
    assert pairs.out_of_sync(folder) == []
    assert "# Better words" in text.read_text()
    assert '"outputs": []' in notebook.read_text()
    text.unlink()
    assert pairs.out_of_sync(folder) == ["01_one has only one half"]
    pairs.sync(folder)
    assert "# Better words" in text.read_text()
