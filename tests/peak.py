"""python -m tests.peak CONTEXTS FILE: survey that many contexts of 400 rows of 256 dimensions; peak memory as JSON."""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from darkmatter import activations, saes, survey
from darkmatter.activations import Activations
from darkmatter.corpus import Corpus
from tests import tiny

D, ROWS = 256, 400


def written(contexts: int, path: Path) -> Activations:
    """Activations as the package reads them: bfloat16, mapped from a file that is never whole in memory."""
    with path.open("wb") as file:
        for seed in range(contexts):
            file.write(tiny.features(ROWS, D, seed).bfloat16().view(torch.uint8).numpy().tobytes())
    rows = np.memmap(path, np.uint16, "c", shape=(contexts * ROWS, D))
    context, position = np.divmod(np.arange(contexts * ROWS, dtype=np.int32), np.int32(ROWS))
    owner = np.arange(contexts, dtype=np.int32) // 3
    names = tuple(f"plays/{i}" for i in range(owner[-1] + 1))
    text = Corpus(np.zeros((contexts, ROWS), np.int32), owner, names)
    return Activations(torch.from_numpy(rows).view(torch.bfloat16), context, position, text, path.name)


class Peak(threading.Thread):
    """The most memory of its own, in bytes, that the process held while this ran; pages of files do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(line for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, int(anonymous.split()[1]) * 1024)


def main(contexts: int, path: Path) -> None:
    torch.set_num_threads(1)
    of, each = written(contexts, path), tiny.loaded("toy", tiny.topk(512, 16, D))
    activations.evaluation = lambda preset, loaded=None: of
    saes.load = lambda ref, preset: each
    peak = Peak()
    peak.start()
    survey.run(tiny.preset(contexts=contexts))
    peak.done.set()
    peak.join()
    megabyte = 2**20
    print(json.dumps({"anonymous": peak.most / megabyte, "x": path.stat().st_size / megabyte,
                      "with_files": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
