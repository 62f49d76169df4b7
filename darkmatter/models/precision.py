"""The type a device multiplies fastest in: bfloat16 where it has a kernel for that, else float32.

A processor without such a kernel (AVX2 alone, say) still takes bfloat16 products, one element at a
time, and needs several times as long as for float32. So it is measured, once a machine, and
everything that may choose asks ``fast``.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from pathlib import Path

import torch
from torch.nn.functional import linear

from .. import cache

ROWS, WIDTH, HIDDEN = 1024, 576, 1536  # a context through a linear layer of the default model
REPEATS = 7  # the fastest of so many counts: about a tenth of a second in all
CLEARLY = 0.8  # bfloat16 is chosen where it takes at most this share of float32's time


def fast(device: torch.device | str) -> torch.dtype:
    """torch.bfloat16 or torch.float32, whichever is faster on ``device``; a GPU keeps bfloat16."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if ratio() <= CLEARLY else torch.float32


@functools.cache
def ratio() -> float:
    """Time of a product in bfloat16 over that in float32 on this processor, as first measured.

    The first measurement is kept in the cache, by processor, instruction set and torch version, so
    that processes that run side by side agree.
    """
    isa = [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")]
    kind = [processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__, *isa]
    path = cache.root() / "processor" / f"{cache.key(kind=kind)}.json"
    with cache.lock(path.name):
        if not path.exists():
            cache.write_json(path, {"ratio": _measured()})
        return float(json.loads(path.read_text())["ratio"])


def processor() -> str:
    """The processor's name, as Linux gives it, or Python elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@torch.inference_mode()
def _measured() -> float:
    """Both types take turns, so that other work slows both; the fastest product of each counts."""
    pairs = {kind: (torch.ones(ROWS, WIDTH, dtype=kind), torch.ones(HIDDEN, WIDTH, dtype=kind))
             for kind in (torch.bfloat16, torch.float32)}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(REPEATS):
        for kind, (x, weight) in pairs.items():
            begun = time.perf_counter()
            linear(x, weight)
            best[kind] = min(best[kind], time.perf_counter() - begun)
    return best[torch.bfloat16] / best[torch.float32]
