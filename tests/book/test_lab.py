"""JupyterLab in a real browser: edit a cell, save, and find the edit in both halves."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import chromium as browsers
import pytest

from darkmatter.book import pairs, records
from tests import browser
from tests.conftest import write_notebook

pytestmark = pytest.mark.browser
NO_HOST_BUT_THIS = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


def wait_for(condition: Callable[[], object], what: str, patience: float = 240) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"{what} took too long"
        time.sleep(0.2)


@pytest.fixture
def lab(home: Path) -> Iterator[str]:
    """A JupyterLab on ``home``, as `make lab` starts it; its address."""
    shutil.copy(records.HOME / "pyproject.toml", home)
    pairs.sync(write_notebook(home / "notebooks", "01_one", "x = 1").parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token="]
    code = ("import sys; from pathlib import Path; from darkmatter.book import pairs; "
            f"pairs.lab(Path({str(home)!r}), sys.argv[1:])")
    server = subprocess.Popen([sys.executable, "-c", code, *options], cwd=home,
                              stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"{address}/api", timeout=10).status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    try:
        wait_for(answers, "starting JupyterLab")
        yield address
    finally:
        server.terminate()
        server.wait(60)


def test_a_cell_edited_in_the_lab_reaches_both_halves(
    home: Path, lab: str, chromium: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browsers, "FLAGS", (*browsers.FLAGS, NO_HOST_BUT_THIS))
    text, notebook = home / "notebooks" / "01_one.py", home / "notebooks" / "01_one.ipynb"
    with browser.Browser(chromium) as page:
        page.size(1280)
        page.call("Page.navigate", url=f"{lab}/lab/tree/notebooks/01_one.ipynb")
        line = ("[...document.querySelectorAll('.jp-CodeCell .cm-line')]"
                ".find(l => l.textContent === 'x = 1')")
        wait_for(lambda: page.ask(f"!!({line})"), "opening the notebook")
        where = page.ask(
            f"(() => {{ const box = ({line}).getBoundingClientRect();"
            "return [box.left + 5, box.top + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            page.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left",
                      clickCount=1)
        wait_for(lambda: page.ask("document.activeElement.classList.contains('cm-content')"),
                 "entering the cell")
        page.call("Input.insertText", text="y = 2; ")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="s", code="KeyS", modifiers=2,
                      windowsVirtualKeyCode=83)
        wait_for(lambda: "y = 2" in text.read_text(), "saving")
        asked = [url for url in page.requests() if url.startswith(("http", "ws"))]
    assert all(url.startswith((lab, lab.replace("http", "ws"))) for url in asked), asked
    assert "y = 2" in notebook.read_text()
    pairs.sync(home / "notebooks")
    assert pairs.out_of_sync(home / "notebooks") == []
    assert "y = 2" in text.read_text()
    assert "y = 2" in notebook.read_text()
    assert "papermill" not in text.read_text()
