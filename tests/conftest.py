"""What several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import chromium as browsers
import pytest

HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""


@pytest.fixture(autouse=True)
def _no_runner_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test starts as if no runner had set where records go."""
    for name in ("DARKMATTER_RECORD", "DARKMATTER_RECORDS", "DARKMATTER_PROGRESS", "JUPYTER_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory for this test alone."""
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The command of a Chromium; without one the test is skipped, or fails where it is required."""
    command = browsers.find()
    if command:
        return command
    if "browser" in os.environ.get("DARKMATTER_REQUIRE", ""):
        pytest.fail("DARKMATTER_REQUIRE names browser, but no Chromium was found")
    pytest.skip("no Chromium was found (Debian: apt-get install chromium)")


@pytest.fixture
def home(tmp_path: Path, own_cache: Path) -> Path:
    """An empty project: notebooks/, a table of contents and a configuration."""
    folder = tmp_path / "home"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: notebooks/01_one\n")
    (folder / "_config.yml").write_text("title: A book\nexecute:\n  execute_notebooks: 'off'\n")
    return folder


def write_notebook(
    folder: Path,
    name: str,
    code: str,
    prose: str = "# A chapter",
    parameters: str = 'preset: str = "smoke"  # a preset',
) -> Path:
    """A percent notebook: prose, a parameters cell, and the code."""
    path = folder / f"{name}.py"
    path.write_text(
        f'{HEADER}# %% [markdown]\n{"# " + prose}\n\n# %% tags=["parameters"]\n{parameters}\n\n'
        f"# %%\n{code}\n"
    )
    return path
