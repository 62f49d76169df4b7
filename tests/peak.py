"""python -m tests.peak CONTEXTS FILE: survey that many contexts of 250 rows, print the peak."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from darkmatter import survey
from darkmatter.models import activations
from darkmatter.models.activations import Activations
from darkmatter.saes import references
from darkmatter.text.corpus import Corpus
from tests import tiny

D, ROWS = 256, 250


def written(contexts: int, path: Path) -> Activations:
    """Activations as the package reads them: bfloat16, mapped from a file never whole in memory."""
    with path.open("wb") as file:
        for seed in range(contexts):
            file.write(tiny.features(ROWS, D, seed).bfloat16().view(torch.uint8).numpy().tobytes())
    rows = np.memmap(path, np.uint16, "c", shape=(contexts * ROWS, D))
    context, position = np.divmod(np.arange(contexts * ROWS, dtype=np.int32), np.int32(ROWS))
    owner = np.arange(contexts, dtype=np.int32) // 3
    names = tuple(f"plays/{i}" for i in range(owner[-1] + 1))
    text = Corpus(np.zeros((contexts, ROWS), np.int32), owner, names)
    x = torch.from_numpy(rows).view(torch.bfloat16)
    return Activations(x, context, position, text, path.name, rows)


def peak_of(work: Callable[[], object]) -> float:
    """The most memory in MB that the process held at once during ``work``, by the kernel."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main(contexts: int, path: Path) -> None:
    torch.set_num_threads(1)
    acts = written(contexts, path)
    sae, preset = tiny.loaded("toy", tiny.topk(256, 8, D)), tiny.preset(contexts=contexts)
    activations.evaluation = lambda preset, loaded=None: acts
    references.load_sae = lambda ref, preset: sae
    peak = peak_of(lambda: survey.run(preset))
    print(json.dumps({"peak": round(peak, 1), "x": round(path.stat().st_size / 2**20, 1)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
