"""A sweep on a real Slurm of two nodes: a job killed, a node lost, a disk full; then completed."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from darkmatter.book import records
from darkmatter.book.grid import grid, slurm
from darkmatter.errors import DarkmatterError
from tests import cluster
from tests.book.test_book import wait_for
from tests.conftest import write_notebook

pytestmark = pytest.mark.slow
SMALL, LARGE = 2, 32  # MiB of the disk that the cache is on

CODE = """\
import json, os, time
from pathlib import Path
import numpy as np
from darkmatter import cache
folder = Path({folder!r})
def tell(what):
    with (folder / "events").open("a") as file:
        file.write(f"{{what}} {{n}}\\n")
again = f"begin {{n}}" in ((folder / "events").read_text() if (folder / "events").exists() else "")
tell("begin")
if n in (1, 2) and not again:
    sign = folder / f"sign-{{n}}"
    sign.with_suffix(".new").write_text(json.dumps([os.getpid(), os.environ["SLURMD_NODENAME"]]))
    sign.with_suffix(".new").rename(sign)
    time.sleep(600)
size = 2**20 if n == 3 else 2**10
cache.save_arrays(cache.root() / f"{{n}}.safetensors", a=np.full(size, n, np.float32))
Path(os.environ["DARKMATTER_RECORD"]).write_text(
    json.dumps({{"preset": preset, "notebook": "01_one", "parameters": {{"n": n}}}}))
tell("end")"""


def slurm_or_skip(reason: str) -> None:
    if "slurm" in os.environ.get("DARKMATTER_REQUIRE", ""):
        pytest.fail(f"DARKMATTER_REQUIRE names slurm, but: {reason}")
    pytest.skip(f"no Slurm can be started here: {reason}")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[cluster.Cluster]:
    """Two nodes that are up, and this process set to speak to them."""
    if lacking := cluster.missing():
        slurm_or_skip(lacking)
    if "slurm" not in os.environ.get("DARKMATTER_REQUIRE", ""):
        pytest.importorskip("submitit")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        made = cluster.Cluster(Path(folder))
        try:
            made.start()
            for name, value in made.environment.items():
                monkeypatch.setenv(name, value)
            yield made
        finally:
            made.stop()


@pytest.fixture
def small_disk(own_cache: Path) -> Iterator[Path]:
    """The cache on a disk of its own, of a few MiB: what a quota is to those who fill it."""
    own_cache.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}m", "tmpfs", str(own_cache)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        slurm_or_skip(f"no small disk can be mounted ({done.stderr.strip()})")
    try:
        yield own_cache
    finally:
        subprocess.run(["umount", "--lazy", str(own_cache)], check=False)


def statuses(home: Path) -> dict[int, str]:
    rows = json.loads((home / "_build/grids/sweep/runs.json").read_text())
    return {row["parameters"]["n"]: row["status"] for row in rows}


def test_a_sweep_survives_a_killed_job_a_lost_node_and_a_full_disk(
    toy: cluster.Cluster, small_disk: Path, home: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_notebook(home / "notebooks", "01_one", CODE.format(folder=str(tmp_path)),
                   parameters='preset: str = "smoke"  # a preset\nn: int = 0  # which')
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("presets: smoke\nnotebooks: 01_one\nparameters:\n  n: [0, 1, 2, 3, 4]\n"
                     "slurm: {timeout_min: 10, slurm_partition: toy, cpus_per_task: 1}\n")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(grid.run, sweep, "slurm", None, home)
        signs = [tmp_path / f"sign-{n}" for n in (1, 2)]
        wait_for(lambda: first.done() or all(sign.exists() for sign in signs))
        (kernel, _), (_, node) = (json.loads(sign.read_text()) for sign in signs)
        worker = psutil.Process(kernel).parent()
        assert worker is not None
        worker.kill()
        toy.lose_node(node)
        wait_for(lambda: first.done() or toy.hurry())
        with pytest.raises(DarkmatterError, match="2 of 5 runs are not finished"):
            first.result(600)
    assert statuses(home) == {
        0: "finished", 1: "cut off", 2: "finished", 3: "failed", 4: "finished"}
    assert "The disk is full" in capsys.readouterr().out
    stored = sorted(path.name for path in small_disk.glob("*.safetensors"))
    assert stored == [f"{n}.safetensors" for n in (0, 2, 4)]
    assert [path.name for path in small_disk.glob(".*")] == []

    subprocess.run(["mount", "-o", f"remount,size={LARGE}m", str(small_disk)], check=True)
    grid.run(sweep, "slurm", home=home)
    assert statuses(home) == {0: "kept", 1: "finished", 2: "kept", 3: "finished", 4: "kept"}
    grid.run(sweep, "slurm", home=home)
    assert set(statuses(home).values()) == {"kept"}

    events = Counter((tmp_path / "events").read_text().splitlines())
    assert events == Counter({f"end {n}": 1 for n in range(5)} | {"begin 0": 1, "begin 4": 1}
                             | {f"begin {n}": 2 for n in (1, 2, 3)})
    found = records.load_all(home / "_build/grids/sweep/records")
    assert sorted(record["parameters"]["n"] for record in found) == list(range(5))


def test_a_mistake_is_told_before_a_job_is_submitted(
    toy: cluster.Cluster, home: Path, tmp_path: Path
) -> None:
    write_notebook(home / "notebooks", "01_one", "1")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("presets: smoke\nnotebooks: 01_one\nslurm: {colour: red}\n")
    with pytest.raises(DarkmatterError, match=r"does not take these options of slurm: .*colour"):
        grid.run(sweep, "slurm", home=home)
    sweep.write_text("presets: smoke\nnotebooks: 01_one\nslurm: {slurm_partition: nowhere}\n")
    with pytest.raises(DarkmatterError, match=r"Slurm did not take the jobs: .*nvalid partition"):
        grid.run(sweep, "slurm", home=home)
    assert slurm._states() == {}
