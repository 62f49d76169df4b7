"""``pip install .`` into an empty environment brings what the core needs, and it runs there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
LINES = """
import sys
import numpy as np
import torch
import darkmatter as dm

x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
ids = np.arange(3000) // 60
result = dm.decompose(lambda rows: 0.8 * rows + 0.1 * rows.sin(), x, source=ids)
both = dm.decompose({"a": lambda rows: 0.9 * rows, "b": lambda rows: 0.5 * rows}, x, source=ids)
other = dm.decompose(lambda rows: rows[:, :3].relu(), x, target=x[:, :3], source=ids)
assert result.fvu.low < result.fvu.value < result.fvu.high and 0 < other.fvu.value < 1
assert (both["b"].fvu - both["a"].fvu).low > 0
assert result.nonlinear_error(x).shape == x.shape and len(result.plot().data) == 2
result.to_json("result.json")
missing = {"sae_lens", "transformers", "transformer_lens", "jupytext", "papermill"}
assert not missing & set(sys.modules)
for name in missing:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} came along")
print(f"{result.fvu}")
"""


@pytest.mark.slow
def test_the_wheel_alone_runs_the_core(tmp_path: Path) -> None:
    def pip(python: Path | str, *words: str) -> None:
        done = subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *words],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    # Building leaves files beside the source, so it is a copy that is built.
    shutil.copytree(HOME / "darkmatter", tmp_path / "source" / "darkmatter")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(HOME / name, tmp_path / "source")
    pip(sys.executable, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "source"))
    (wheel,) = tmp_path.glob("darkmatter-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # The version of torch is the book's, which may lie on disk.
    pip(python, "install", "-q", "torch==2.13.0", str(wheel))
    done = subprocess.run([python, "-c", LINES], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[" in done.stdout and (tmp_path / "result.json").exists()
