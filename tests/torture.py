"""``kill -9`` at random moments, many times, then a normal run: the files of an undisturbed run.

    python -m tests.torture [book train survey] [--preset smoke] [--kills 20] [--seed 0]

works on a copy of the package, in a temporary directory, with caches of its own. Half of the kills
hit the command alone and leave what it started to find that out, the others hit all at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from darkmatter import cache

HOME = Path(__file__).resolve().parents[1]
COMMANDS = {name: ("-m", "darkmatter", name) for name in ("book", "train", "survey")}
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "_build", "artifacts", "__pycache__",
                                  ".*_cache", "*.egg-info")
TIMES = {"seconds", "seconds_cover_tokens", "started", "wall_seconds", "peak_memory_gib"}
# Notebooks whose tables show how long things took.
TIMED = {"10_downstream", "11_pursuit", "17_speed", "90_provenance"}


@dataclass
class Place:
    """A copy of the project and a cache for one series of runs."""

    folder: Path
    source: Path = HOME

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.source, self.home, ignore=LEFT_OUT)
        (self.home / "artifacts").symlink_to(HOME / "artifacts")

    def start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        variables = {"PYTHONPATH": str(self.home), "DARKMATTER_CACHE": str(self.cache),
                     "OMP_NUM_THREADS": "1"}  # two at once would fight for the cores
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *words], cwd=self.home, env=os.environ | variables,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def finish(self, words: Sequence[str]) -> None:
        if self.start(words).wait():
            raise RuntimeError(f"the run failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")


def undisturbed(place: Place, words: Sequence[str]) -> tuple[float, float]:
    """Run to the end; returns the seconds until it wrote its first file, and in all."""
    place.clear()
    begun, first = time.monotonic(), 0.0
    process = place.start(words)
    while process.poll() is None:
        if not first and place.cache.exists():
            first = time.monotonic() - begun
        time.sleep(0.05)
    if process.returncode:
        place.finish(words)  # raises, with what it said
    return first, time.monotonic() - begun


def disturbed(place: Place, words: Sequence[str], kills: int, rng: random.Random,
              window: tuple[float, float]) -> int:
    """Kill ``kills`` runs, each after a random time; where one ends before, begin with nothing.

    At last one normal run. Returns how often a run ended before its kill.
    """
    place.clear()
    killed = ended = 0
    while killed < kills:
        process, moment = place.start(words), rng.uniform(*window)
        try:
            process.wait(moment)
            if process.returncode:
                place.finish(words)  # raises, with what it said
            ended, window = ended + 1, (window[0], max(window[0] + 1, 0.8 * window[1]))
            place.clear()
        except subprocess.TimeoutExpired:
            kill(process, alone=rng.random() < 0.5)
            killed += 1
            print(f"  kill {killed} after {moment:.1f} s", flush=True)
    place.finish(words)
    return ended


def kill(process: subprocess.Popen[bytes], alone: bool) -> None:
    """SIGKILL to a command, and unless ``alone`` to everything that it started."""
    children = [] if alone else psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


# What must be the same

def results(place: Place) -> dict[str, Any]:
    """Digests of a cache's finished files; metrics, claims and tables of notebooks, untimed."""
    found = {str(path.relative_to(place.cache)): digest(path, place)
             for path in finished(place.cache)}
    for path in sorted((place.home / "_build/records").rglob("*.json")):
        record = json.loads(path.read_text())
        parts = ("metrics", "claims", "parameters")
        found[f"record {path.stem}"] = [untimed(record[name]) for name in parts]
    for path in sorted((place.home / "_build/runs").rglob("executed.ipynb")):
        name = path.parent.parent.name
        shown = tables(json.loads(path.read_text()))
        found[f"tables of {name}"] = [] if name in TIMED else list(shown)
    return found


def finished(folder: Path) -> Iterator[Path]:
    """Files that count: no locks, measured speeds, temporary ones, or old checkpoints."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part.endswith(".work") for part in parts)
        if path.is_file() and not hidden and parts[0] not in ("locks", "processor"):
            yield path


def digest(path: Path, place: Place) -> Any:
    if path.suffix == ".svg":
        return drawn(path.read_text())
    if path.name == "sha256.json":
        return sorted(json.loads(path.read_text()))
    if path.suffix != ".json":
        return cache.sha256(path)
    return untimed(json.loads(path.read_text().replace(str(place.folder), "")))


def drawn(picture: str) -> str:
    """A picture's text without the names that plotly draws at random for figure and traces."""
    names = re.findall(r'(?:"defs-|trace)([0-9a-f]{6})\b', picture)
    for i, name in enumerate(dict.fromkeys(names)):
        picture = picture.replace(name, f"name {i}")
    return picture


def untimed(value: Any) -> Any:
    if isinstance(value, list):
        return [untimed(each) for each in value if not (isinstance(each, dict) and is_time(each))]
    if isinstance(value, dict):
        return {name: untimed(part) for name, part in value.items() if name not in TIMES}
    return value


def is_time(metric: dict[str, Any]) -> bool:
    return bool(metric.get("timing"))


def tables(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            if "<table" in html:
                yield re.sub(r"T_\w+|[0-9a-f-]{32,}", "", html)  # pandas names each table at random


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def torture(folder: Path, words: Sequence[str], kills: int, seed: int, share: float = 1 / 3
            ) -> list[str]:
    """What differs between an undisturbed series and one with kills in a run's first ``share``."""
    whole = Place(folder / "whole")
    harmed = Place(folder / "harmed", whole.home)  # the same code, should someone be writing it
    first, seconds = undisturbed(whole, words)
    window = first, max(first + 1, share * seconds)
    title = " ".join(words[2:])
    print(f"{title}: undisturbed {seconds:.0f} s; kills after {window[0]:.0f} to {window[1]:.0f} s",
          flush=True)
    ended = disturbed(harmed, words, kills, random.Random(seed), window)
    found = results(whole), results(harmed)
    assert found[0], "nothing to compare"
    apart = differences(*found)
    print(f"{title}: {kills} kills, {ended} runs ended before theirs, {len(found[0])} results "
          f"compared, {len(apart)} differ", flush=True)
    return apart


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=[], help="book, train, survey (default: all)")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notebooks", nargs="+", default=[], help="of the book only these")
    arguments = parser.parse_args()
    apart: list[str] = []
    for name in arguments.what or COMMANDS:
        words = [*COMMANDS[name], "--preset", arguments.preset]
        words += ["--only", *arguments.notebooks] if name == "book" and arguments.notebooks else []
        with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
            apart += torture(Path(folder), words, arguments.kills, arguments.seed)
    different = "\n".join(f"DIFFERS: {name}" for name in apart)
    print(different or "Every result is the same, bit for bit.")
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(main())
