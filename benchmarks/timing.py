"""Seconds in alternating pairs, peak memory, and the straight line through a cost.

A ratio is taken within a pair, so that a machine whose speed drifts favours neither side; who goes
first alternates.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HOME = Path(__file__).resolve().parents[1]
MIB = 2**20


@dataclass(frozen=True)
class Times:
    """Seconds of each pair, in the order they were taken."""

    baseline: list[float]
    ours: list[float]

    def fields(self, faster: bool = True, scale: float = 1.0) -> dict[str, Any]:
        """Ratio (median over pairs) with its spread, and the median seconds of each side.

        ``faster``: baseline ÷ ours, how many times as fast; else ours ÷ baseline, above a floor.
        ``scale``: what the baseline's seconds are multiplied by, where it did a part of the work.
        """
        base = [seconds * scale for seconds in self.baseline]
        ratios = [b / o if faster else o / b for b, o in zip(base, self.ours, strict=True)]
        return {**spread(ratios), "baseline_seconds": statistics.median(base),
                "ours_seconds": statistics.median(self.ours), "pairs": len(ratios)}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median of some ratios; quartiles where there are at least 8, else smallest and largest."""
    low, high = np.quantile(ratios, [0.25, 0.75] if len(ratios) >= 8 else [0, 1]).tolist()
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def pairs(baseline: Callable[[], object], ours: Callable[[], object],
          device: str = "cpu", most: int = 5, limit: float = 600,
          ours_first: bool = False) -> Times:
    """Time both sides ``most`` times, but begin no pair that would end after ``limit`` seconds."""
    times, begun = Times([], []), time.perf_counter()
    while len(times.ours) < most:
        one = (time.perf_counter() - begun) / max(1, len(times.ours))
        if times.ours and time.perf_counter() - begun + one > limit:
            break
        sides = [(baseline, times.baseline), (ours, times.ours)]
        for work, into in sides if len(times.ours) % 2 == ours_first else sides[::-1]:
            into.append(seconds(work, device))
    return times


def peak_of(work: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """MiB that ``work`` takes beside what was held before, at most; and its seconds.

    On CUDA what torch allocates on the device; else this process's resident memory, so call it in a
    process of its own.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(work, device)
        return (torch.cuda.max_memory_allocated() - before) / MIB, taken
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = _resident()
    taken = seconds(work)
    return _resident() - before, taken


def _resident() -> float:
    """The most MiB held so far."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def apart(what: str, device: str = "cpu", **arguments: Any) -> tuple[float, float]:
    """``peak_of`` the work that 'module:function' of this folder prepares, in a process apart."""
    words = [sys.executable, "-m", "benchmarks.timing", what,
             json.dumps({"device": device, **arguments})]
    done = subprocess.run(words, cwd=HOME, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} failed in its own process: {done.stderr.strip()[-800:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["mib"], found["seconds"]


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The straight line through a cost, its R², and the power of x that it grows with."""
    slope, intercept = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + intercept)
    power = np.polyfit(np.log(x), np.log(y), 1)[0]
    return {"slope": float(slope), "intercept": float(intercept), "power": float(power),
            "r2": float(1 - left.var() / np.var(y))}


def main(what: str, arguments: str) -> None:
    """What ``apart`` runs."""
    import importlib

    module, name = what.split(":")
    given = json.loads(arguments)
    with getattr(importlib.import_module(f"benchmarks.{module}"), name)(**given) as work:
        mib, taken = peak_of(work, given["device"])
    print(json.dumps({"mib": mib, "seconds": taken}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
