"""Many runs: a grid file names presets, notebooks, layers, SAEs and parameters.

Every combination is one run. Nothing starts before all have been checked. A run is keyed as the
book's are, so what is finished is kept, here and there; a second call does only what is missing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ... import cache, presets
from ...errors import DarkmatterError
from .. import keys, records
from ..execution import Run
from . import local, slurm

FIELDS = ("presets", "notebooks", "layer", "sae", "parameters", "slurm")
TYPES = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


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


def run(path: Path, backend: str = "local", jobs: int | None = None,
        home: Path = records.HOME) -> Path:
    """Do what is missing of a grid, print the table of its runs and write it; returns its file.

    Beside the table, ``records`` holds the record of every finished run, for ``records.load_all``.
    Raises DarkmatterError before anything starts where the grid is not valid, and at the end where
    runs are not finished.
    """
    if jobs is not None and jobs < 1:
        raise DarkmatterError(f"--jobs is {jobs}, but at least 1 run at a time is needed.")
    grid = read(path)
    folder = home / "_build" / "grids" / grid.name
    runs, derived = expand(grid, home)
    missing = [run for run in runs if run.status != "finished"]
    if backend == "slurm" and missing:
        slurm.executor_of(grid.slurm, folder / "slurm")  # a mistake in the options is told now
    for file, preset in derived.items():
        _write_preset(file, preset)
    print(f"{len(runs)} runs: {len(runs) - len(missing)} finished earlier, {len(missing)} to do",
          flush=True)
    if missing and backend == "slurm":
        slurm.run(missing, jobs, _tell, grid.slurm, folder / "slurm")
    elif missing:
        local.run(missing, jobs, _tell)
    return _report(runs, missing, folder)


def read(path: Path) -> Grid:
    """The grid of a YAML file; a single value stands for a list of one."""
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DarkmatterError(f"The grid file {path} cannot be read: "
                              f"{' '.join(str(error).split())}") from error
    if not isinstance(text, dict) or not text.get("presets") or not text.get("notebooks"):
        raise DarkmatterError(f"The grid file {path} must name presets and notebooks.")
    if unknown := [name for name in text if name not in FIELDS]:
        raise DarkmatterError(f"The grid file {path} has an unknown field '{unknown[0]}'; the "
                              f"fields are {', '.join(FIELDS)}.")
    for name in ("parameters", "slurm"):
        if not isinstance(text.get(name) or {}, dict):
            raise DarkmatterError(f"In the grid file {path}, '{name}' must consist of "
                                  "'name: value' lines.")
    axes = {name: text[name] for name in ("layer", "sae") if name in text}
    axes |= text.get("parameters") or {}
    named, notebooks = (tuple(map(str, _listed(text[name]))) for name in FIELDS[:2])
    return Grid(path.stem, named, notebooks,
                {str(name): _listed(values) for name, values in axes.items()},
                text.get("slurm") or {})


def _listed(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, list) else (values,)


def expand(grid: Grid, home: Path) -> tuple[list[Run], dict[Path, presets.Preset]]:
    """Every run of a grid, each once, and the presets that have to be written to files for them.

    Raises DarkmatterError for an unknown notebook, preset or parameter, or a value that does not
    fit.
    """
    sources = keys.sources_of(home, grid.notebooks)
    for source in sources:
        if keys.reads_records(source):
            raise DarkmatterError(f"{source.stem} reads the records of other notebooks; it belongs "
                                  "to the book: make book.")
    combinations = [dict(zip(grid.axes, values, strict=True))
                    for values in itertools.product(*grid.axes.values())]
    folder = home / "_build" / "grids" / grid.name / "presets"
    runs, derived, sites = {}, {}, {}
    for preset, source, given in itertools.product(grid.presets, sources, combinations):
        run, chosen = _planned(preset, source, given, folder, home)
        runs[run.folder] = run
        if chosen.name != presets.load(preset).name:
            derived[Path(run.parameters["preset"])] = chosen
        sites[chosen.model, chosen.site] = chosen
    for chosen in sites.values() if "layer" in grid.axes else ():
        records.check_layer(chosen)
    return list(runs.values()), derived


def _planned(preset: str, source: Path, given: Mapping[str, Any], folder: Path, home: Path
             ) -> tuple[Run, presets.Preset]:
    """One run, and its preset without what the notebook itself overrides.

    What a preset has and the notebook does not take, such as the layer, makes a preset of its own.
    """
    # What the notebook does not take but the preset has goes into the preset.
    types = keys.parameters_of(source)
    inside = {name: value for name, value in given.items()
              if name not in types and name in records.OVERRIDES}
    passed = {name: value for name, value in given.items() if name not in inside}
    keys.reject_unknown(source, passed)
    for name, value in passed.items():
        if type(value) not in TYPES.get(types[name], (type(value),)):
            raise DarkmatterError(f"The parameter '{name}' of {source.stem} is {value!r}, but "
                                  f"should be of type {types[name]}.")
    # ``chosen`` is what the notebook is given, ``settled`` what it then works with.
    chosen, settled = presets.load(preset, **inside), records.preset_of(preset, given)
    if inside:
        name = f"{chosen.name}-{'-'.join(f'{name}{value}' for name, value in inside.items())}"
        if not re.fullmatch(r"[\w.-]{1,60}", name):
            name = f"{chosen.name}-{cache.key(**inside)}"
        chosen, settled = replace(chosen, name=name), replace(settled, name=name)
        preset = str(folder / f"{name}.yaml")
    elif presets.is_file(preset):
        preset = str(Path(preset).expanduser().resolve())  # a job may run in another directory
    key = keys.run_key(source, settled, passed)
    return Run(source.stem, chosen.name, {"preset": preset} | passed, key, str(home)), chosen


def _write_preset(file: Path, preset: presets.Preset) -> None:
    with cache.atomic(file) as temporary:
        temporary.write_text(yaml.safe_dump(json.loads(json.dumps(preset.fields()))))


# What became of the runs

def _tell(run: Run) -> None:
    print(f"{run.title}: {run.status}", flush=True)


def _report(runs: Sequence[Run], missing: Sequence[Run], folder: Path) -> Path:
    """Print and write the table, gather the records; DarkmatterError where runs are missing."""
    rows, shelf, table = [], folder / "records", folder / "runs.json"
    for run in runs:
        outcome, status = run.outcome, run.status if run in missing else "kept"
        rows.append({
            "status": status, "seconds": outcome.get("seconds"), "notebook": run.notebook,
            "preset": run.preset, "why": outcome.get("why", ""), "where": str(run.folder),
            "parameters": {k: v for k, v in run.parameters.items() if k != "preset"}})
        if status in ("finished", "kept"):
            run.shelve(shelf / f"{run.preset}-{run.notebook}-{run.key}.json")
    cache.write_json(table, rows)
    print("\n".join(["", *_lines(rows)]), flush=True)
    if unfinished := [row for row in rows if row["status"] not in ("finished", "kept")]:
        raise DarkmatterError(f"{len(unfinished)} of {len(rows)} runs are not finished; the same "
                              f"command runs only those.\nThe table is {table}")
    print(f"\nThe table is {table}\nThe records are in {shelf}", flush=True)
    return table


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{'status':<14}{'seconds':>8}  {'notebook':<20}{'preset':<24}parameters, where"
    for row in rows:
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        given = " ".join(f"{name}={value}" for name, value in row["parameters"].items())
        yield (f"{row['status']:<14}{seconds:>8}  {row['notebook']:<20}{row['preset']:<24}{given}")
        yield f"{'':<24}{row['where']}"
        if row["why"]:
            yield f"{'':<24}{row['why'].splitlines()[0]}"
