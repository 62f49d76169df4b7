"""The notebooks of a project, and what a run of one depends on.

A run's key is made of the settings, the parameters, the notebook's code, the modules that it uses
and its data: a change of prose alone runs nothing again, because ``pages`` takes the outputs of the
run and today's prose.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager
from papermill.translators import PythonTranslator

from .. import cache, presets
from ..errors import DarkmatterError
from ..models import model
from . import pairs, records

PACKAGE = Path(__file__).parents[1]
# Committed results, in artifacts/, by a word in the code that reads them.
SHOWN = {"on_error": "on-error.json", "convergence": "convergence.json",
         "sensitivity": "sensitivity.json", "bench": "bench/*.json", "full-size": "full-size.json"}


def sources_of(home: Path, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks in the order they run in: by name, those that read the others' records last."""
    paths = sorted(pairs.texts(home / "notebooks"),
                   key=lambda path: (reads_records(path), path.name))
    names = [path.stem for path in paths]
    missing = [name for name in only if name not in names]
    if missing or not paths:
        raise DarkmatterError(f"There is no notebook {' '.join(missing[:1])} in "
                              f"{home / 'notebooks'}; there are: {', '.join(names) or 'none'}.")
    return [path for path in paths if not only or path.stem in only]


def reads_records(source: Path) -> bool:
    """Whether a notebook reads the records of others."""
    return "load_all" in "\n".join(code_of(source))


def code_of(source: Path) -> list[str]:
    """The code cells of a notebook."""
    return [cell.source for cell in pairs.read(source).cells if cell.cell_type == "code"]


def python_of(source: Path) -> str:
    """The code of a notebook as plain Python, its magics and shell commands as calls.

    Raises DarkmatterError that names notebook and cell where a cell is not Python.
    """
    cells = [TransformerManager().transform_cell(cell) for cell in code_of(source)]
    for number, cell in enumerate(cells, 1):
        try:
            _parsed(cell)
        except SyntaxError as error:
            raise DarkmatterError(f"Code cell {number} of {source.stem} is not Python: {error.msg} "
                                  f"(line {error.lineno}).") from None
    return "\n".join(cells)


def parameters_of(source: Path) -> dict[str, str]:
    """Names and types of a notebook's parameters, as ``papermill --help-notebook`` reads them."""
    return {parameter.name: parameter.inferred_type_name
            for cell in pairs.read(source).cells if "parameters" in cell.metadata.get("tags", ())
            for parameter in PythonTranslator.inspect(cell)}


def reject_unknown(source: Path, parameters: Mapping[str, Any]) -> None:
    """Raise DarkmatterError for a parameter that a notebook does not have."""
    known = parameters_of(source)
    for name in ["preset", *parameters]:
        if name not in known:
            raise DarkmatterError(f"Unknown parameter '{name}'; {source.stem} takes: "
                                  f"{', '.join(known)}.")


def run_key(source: Path, preset: presets.Preset, parameters: Mapping[str, Any],
            before: Sequence[str] = (), shelves: Path | None = None) -> str:
    """16 hex digits over settings, parameters, code cells, modules and data.

    Where the notebook reads records, also over the keys of the runs ``before`` it, and over the
    records of builds of other presets in ``shelves`` if it reads those; and over the committed
    results that it shows. Not over the reference: a run is compared with the one there was when it
    ran.
    """
    cells = code_of(source)
    code = "\n".join(cells)
    modules = {str(path.relative_to(PACKAGE)): cache.sha256(path)
               for path in modules_used(python_of(source))}
    files = [path for word, name in SHOWN.items() if word in code
             for path in sorted((records.HOME / "artifacts").glob(name))]
    if shelves and "every_preset" in code:
        files += [path for path in sorted(shelves.rglob("*.json"))
                  if path.parent.name != preset.name]
    return cache.key(preset=preset.fields() | {"dtype": model.dtype_of(preset)}, code=cells,
                     modules=modules, data=records.inputs(preset),
                     parameters={k: v for k, v in parameters.items() if k != "preset"},
                     before=list(before) if "load_all" in code else [],
                     files=[cache.sha256(path) for path in files])


def modules_used(code: str, package: Path = PACKAGE) -> list[Path]:
    """The files of ``package`` that a notebook's code imports, directly or through one another."""
    used, todo = set[Path](), _imported(code, package, package.name)
    while todo:
        module = todo.pop()
        used.add(module)
        room = ".".join([package.name, *module.parent.relative_to(package).parts])
        todo |= _imported(module.read_text(encoding="utf-8"), package, room) - used
    return sorted(used)


def _parsed(code: str) -> ast.AST:
    """The syntax tree of some code; an ``await`` may stand at the top, as in a notebook."""
    with pairs.PARSING:
        return compile(code, "<cell>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def _imported(code: str, package: Path, room: str) -> set[Path]:
    """Files of ``package`` that some code imports, which stands in the package ``room``."""
    names = {package.name}
    for node in ast.walk(_parsed(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), room)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    inner = [name.split(".")[1:] for name in names if name.split(".")[0] == package.name]
    # Importing a.b.c runs a/__init__.py and a/b/__init__.py first.
    places = [package.joinpath(*parts[:n]) for parts in inner for n in range(len(parts) + 1)]
    files = {path for place in places for path in (place / "__init__.py", place.with_suffix(".py"))}
    return {path for path in files if path.exists() and path.is_relative_to(package)}
