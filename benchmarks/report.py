"""Records of the rows: one JSON file a machine, in artifacts/bench/, written after every row."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from darkmatter import cache
from darkmatter.models import precision

from .shapes import ROWS
from .timing import HOME

FOLDER = HOME / "artifacts" / "bench"
PACKAGES = ("torch", "numpy", "scipy", "sae-lens", "transformer-lens", "transformers")


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": precision.processor(), "cores": cores,
                             "threads": torch.get_num_threads(), "system": platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES")
                                    * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return found


def slug(found: dict[str, Any]) -> str:
    """A file's name for a machine: 'nvidia-h100-80gb-hbm3', 'amd-epyc-2-cores'."""
    text = found["gpu"] if "gpu" in found else f"{found['processor']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of Python and the packages that the figures depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source(row: str, case: dict[str, Any]) -> str:
    """Changes with the code that a row measures, its sizes and the versions."""
    module = ROWS[row].function.split(":")[0]
    files = [HOME / "benchmarks" / f"{name}.py" for name in (module, "data", "timing")]
    files += [HOME / "darkmatter" / f"{name}.py" for name in ROWS[row].uses]
    parts = [json.dumps([case, versions()], sort_keys=True), *(path.read_text() for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def commit() -> str | None:
    """The commit that is checked out; with '+' where files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HOME), *words],
                              capture_output=True, text=True, check=True).stdout
    try:
        changed = git("status", "--porcelain", "-uno").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Report:
    """The records of one machine, by row and case."""

    def __init__(self, device: str, folder: Path = FOLDER) -> None:
        found = machine(device)
        self.path = folder / f"{slug(found)}.json"
        self.content: dict[str, Any] = {"rows": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        self.content["hardware"] = found

    def done(self, key: str, version: str) -> bool:
        """Whether a row was measured with this very code and these sizes (``source``)."""
        return self.content["rows"].get(key, {}).get("source") == version

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Write the file again with one more row; a failure leaves a row measured before."""
        if "error" in record and "ratio" in self.content["rows"].get(key, {}):
            return
        stamp = {"commit": commit(), "versions": versions(),
                 "when": datetime.now(UTC).isoformat(timespec="seconds")}
        self.content["rows"][key] = {**record, **stamp}
        with cache.atomic(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1,
                                            sort_keys=True, allow_nan=False) + "\n")
