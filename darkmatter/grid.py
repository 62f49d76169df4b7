"""Many runs: a grid file names presets, notebooks, layers, SAEs and parameters, and every combination is run once.

Nothing starts before every combination has been checked. A run is keyed as the book's are, so what is finished is
kept, here and there; a second call does only what is missing.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from . import book, cache, local, pairs, records, slurm
from . import preset as presets
from .cells import Cell, status
from .errors import DarkmatterError

FIELDS = ("presets", "notebooks", "layer", "sae", "parameters", "slurm")
KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


@dataclass(frozen=True)
class Grid:
    """What a grid file says."""

    name: str
    presets: tuple[str, ...]
    notebooks: tuple[str, ...]
    axes: dict[str, tuple[Any, ...]]
    """Values of each parameter: layer, sae and those under ``parameters``."""
    slurm: dict[str, Any]
    """Options of submitit."""


def run(path: Path, backend: str = "local", jobs: int | None = None, home: Path = records.HOME) -> Path:
    """Run what is missing of a grid, print the table of its runs and write it; returns the table's file.

    Beside the table, ``records`` holds the record of every finished run, for ``records.load_all``. Raises
    DarkmatterError before anything starts where the grid is not valid, and at the end where runs are not finished.
    """
    if jobs is not None and jobs < 1:
        raise DarkmatterError(f"--jobs is {jobs}, but at least 1 run at a time is needed.")
    grid = read(path)
    folder = home / "_build" / "grids" / grid.name
    cells, derived = expand(grid, home)
    missing = [cell for cell in cells if status(cell) != "finished"]
    if backend == "slurm" and missing:
        slurm.executor_of(grid.slurm, folder / "slurm")  # a mistake in the options is told now
    for file, preset in derived.items():
        _write_preset(file, preset)
    print(f"{len(cells)} runs: {len(cells) - len(missing)} finished earlier, {len(missing)} to do", flush=True)
    if missing and backend == "slurm":
        slurm.run(missing, jobs, _tell, grid.slurm, folder / "slurm")
    elif missing:
        local.run(missing, jobs, _tell)
    return _report(cells, missing, folder)


def read(path: Path) -> Grid:
    """The grid of a YAML file; a single value stands for a list of one."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DarkmatterError(f"The grid file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict) or not said.get("presets") or not said.get("notebooks"):
        raise DarkmatterError(f"The grid file {path} must name presets and notebooks.")
    if unknown := [name for name in said if name not in FIELDS]:
        raise DarkmatterError(f"The grid file {path} has an unknown field '{unknown[0]}'; the fields are "
                              f"{', '.join(FIELDS)}.")
    for name in ("parameters", "slurm"):
        if not isinstance(said.get(name) or {}, dict):
            raise DarkmatterError(f"In the grid file {path}, '{name}' must consist of 'name: value' lines.")
    axes = {name: said[name] for name in ("layer", "sae") if name in said} | (said.get("parameters") or {})
    return Grid(path.stem, tuple(map(str, _listed(said["presets"]))), tuple(map(str, _listed(said["notebooks"]))),
                {str(name): _listed(values) for name, values in axes.items()}, said.get("slurm") or {})


def _listed(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, list) else (values,)


def expand(grid: Grid, home: Path) -> tuple[list[Cell], dict[Path, presets.Preset]]:
    """Every run of a grid, each once, and the presets that have to be written to files for them.

    Raises DarkmatterError for an unknown notebook, preset or parameter, or a value that does not fit.
    """
    sources = book.sources_of(home, grid.notebooks)
    for source in sources:
        if book.reads_records(source)[0]:
            raise DarkmatterError(f"{source.stem} reads the records of other notebooks; it belongs to the book: "
                                  "make book.")
    cells, derived, at = {}, {}, {}
    for preset, source, given in itertools.product(grid.presets, sources, _combinations(grid.axes)):
        cell, chosen = _cell(preset, source, given, home / "_build" / "grids" / grid.name / "presets", home)
        cells[cell.folder] = cell
        if chosen.name != presets.load(preset).name:
            derived[Path(cell.parameters["preset"])] = chosen
        at[chosen.model, chosen.site] = chosen
    for chosen in at.values() if "layer" in grid.axes else ():
        records.check_layer(chosen)
    return list(cells.values()), derived


def _combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _cell(preset: str, source: Path, given: Mapping[str, Any], folder: Path, home: Path
          ) -> tuple[Cell, presets.Preset]:
    """One run, and its preset without what the notebook itself overrides.

    What a preset has and the notebook does not take, such as the layer, makes a preset of its own.
    """
    takes = _parameters(source)
    inside = {name: value for name, value in given.items() if name not in takes and name in records.OVERRIDES}
    passed = {name: value for name, value in given.items() if name not in inside}
    book.reject_unknown(source, passed)
    for name, value in passed.items():
        _check_kind(source, name, value, takes[name])
    chosen = presets.load(preset, **inside)
    fields = {name: value for name, value in passed.items() if name in records.OVERRIDES}
    settled = presets.load(preset, **inside, **fields)
    if inside:
        name = f"{chosen.name}-{'-'.join(f'{name}{value}' for name, value in inside.items())}"
        name = name if re.fullmatch(r"[\w.-]{1,60}", name) else f"{chosen.name}-{cache.key(**inside)}"
        chosen, settled = replace(chosen, name=name), replace(settled, name=name)
        preset = str(folder / f"{name}.yaml")
    elif Path(preset).suffix:
        preset = str(Path(preset).expanduser().resolve())  # a job may run in another directory
    key = book.run_key(source, settled, passed, [])
    return Cell(source.stem, chosen.name, {"preset": preset} | passed, key, str(home)), chosen


def _parameters(source: Path) -> dict[str, str]:
    """Names and types of a notebook's parameters."""
    cells = [cell.source for cell in pairs.read(source).cells if "parameters" in cell.metadata.get("tags", [])]
    nodes = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.AnnAssign)]
    typed = {node.target.id: ast.unparse(node.annotation) for node in nodes if isinstance(node.target, ast.Name)}
    return dict.fromkeys(records.assigned("\n".join(cells)), "") | typed


def _check_kind(source: Path, name: str, value: Any, kind: str) -> None:
    fits = KINDS.get(kind, (object,))
    if not isinstance(value, fits) or (isinstance(value, bool) and bool not in fits and object not in fits):
        raise DarkmatterError(f"The parameter '{name}' of {source.stem} is {value!r}, but should be of type {kind}.")


def _write_preset(file: Path, preset: presets.Preset) -> None:
    with cache.atomic(file) as temporary:
        temporary.write_text(yaml.safe_dump(json.loads(json.dumps(preset.fields()))))


# What became of the runs

def _tell(cell: Cell) -> None:
    print(f"{cell.title}: {status(cell)}", flush=True)


def _report(cells: Sequence[Cell], missing: Sequence[Cell], folder: Path) -> Path:
    """Print and write the table, gather the records; raises DarkmatterError where runs are not finished."""
    rows = [_row(cell, cell not in missing) for cell in cells]
    shelf = folder / "records"
    for cell, row in zip(cells, rows, strict=True):
        record = cell.folder / "record.json"
        if row["status"] in ("finished", "kept") and record.exists():
            kept = json.loads(record.read_text()) | {"wall_seconds": row["seconds"]}
            cache.write_json(shelf / f"{cell.preset}-{cell.notebook}-{cell.key}.json", kept)
    table = folder / "runs.json"
    cache.write_json(table, rows)
    print("\n".join(["", *_lines(rows)]), flush=True)
    if unfinished := [row for row in rows if row["status"] not in ("finished", "kept")]:
        raise DarkmatterError(f"{len(unfinished)} of {len(rows)} runs are not finished; the same command runs only "
                              f"those.\nThe table is {table}")
    print(f"\nThe table is {table}\nThe records are in {shelf}", flush=True)
    return table


def _row(cell: Cell, kept: bool) -> dict[str, Any]:
    became = status(cell)
    told = next((_said(cell.folder / name) for name in ("done.json", "failed.json")
                 if (cell.folder / name).exists()), {})
    return {"status": "kept" if kept else became, "seconds": told.get("seconds"), "notebook": cell.notebook,
            "preset": cell.preset, "parameters": {k: v for k, v in cell.parameters.items() if k != "preset"},
            "why": told.get("why", ""), "where": str(cell.folder)}


def _said(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{'status':<14}{'seconds':>8}  {'notebook':<20}{'preset':<24}parameters, where"
    for row in rows:
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        given = " ".join(f"{name}={value}" for name, value in row["parameters"].items())
        yield f"{row['status']:<14}{seconds:>8}  {row['notebook']:<20}{row['preset']:<24}{given}"
        yield f"{'':<24}{row['where']}"
        if row["why"]:
            yield f"{'':<24}{row['why'].splitlines()[0]}"
