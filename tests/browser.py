"""A headless Chromium driven over its DevTools protocol: enough to open pages, ask and photograph.

    python -m tests.browser BOOK OUT     screenshots of every page: light and dark, wide and narrow
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket  # websocket-client, which jupyter-server depends on

sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "_ext"))
import chromium

WIDE, NARROW = 1280, 390
READY = """(async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  const figures = document.querySelectorAll('.dm-figure').length;
  return figures === 0 || document.documentElement.classList.contains('dm-ready');
})()"""


class Browser:
    """One page of one Chromium with a profile of its own; a context manager."""

    def __init__(self, command: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        words = [command, *chromium.FLAGS, "--remote-debugging-port=0",
                 f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)
        self._socket = websocket.create_connection(self._address(), suppress_origin=True,
                                                   timeout=300)
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _address(self, patience: float = 120) -> str:
        """The page's websocket, once the browser has written down its port."""
        port = Path(self._profile.name, "DevToolsActivePort")
        for _ in range(int(patience * 10)):
            if port.exists() and port.read_text().strip():
                number = port.read_text().split()[0]
                address = f"http://127.0.0.1:{number}/json/list"
                with urllib.request.urlopen(address, timeout=10) as answer:
                    pages = [page for page in json.load(answer) if page["type"] == "page"]
                if pages:
                    return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.1)
        raise TimeoutError("Chromium did not start")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile go to ``events``."""
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def size(self, width: int, height: int = 900) -> None:
        scale = {"deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)

    def open(self, page: Path, patience: float = 120) -> None:
        """Open a file and wait until mathematics and figures are drawn (or patience is over)."""
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait("document.readyState === 'complete'", patience)
        self.wait(READY, patience)

    def wait(self, script: str, patience: float = 120) -> None:
        """Wait until the expression is true; else the caller's assertions say what was missing."""
        end = time.monotonic() + patience
        while time.monotonic() < end and not self.ask(script):
            time.sleep(0.05)

    def theme(self, name: str) -> None:
        """Switch to 'light' or 'dark', as the page's own button does; the figures follow."""
        self.ask(f"{{const root = document.documentElement.dataset; root.theme = '{name}'; "
                 f"root.mode = '{name}';}}")
        self.ask("new Promise(done => setTimeout(done, 400))")

    def requests(self) -> list[str]:
        """URLs that the page asked for since it was opened."""
        sent = (e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Failed requests, console errors and uncaught exceptions since the page was opened."""
        texts = []
        for event in self.events:
            method, params = event["method"], event.get("params", {})
            failed = method == "Network.loadingFailed" and not params.get("canceled")
            error = method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert")
            logged = method == "Log.entryAdded" and params["entry"]["level"] == "error"
            if failed or error or logged or method == "Runtime.exceptionThrown":
                texts.append(json.dumps(params)[:400])
        return texts

    def screenshot(self, path: Path, width: int, tallest: int = 16000) -> None:
        """The whole page, not only what fits a window, as PNG."""
        self.size(width)
        height = self.call("Page.getLayoutMetrics")["cssContentSize"]["height"]
        self.size(width, min(int(height), tallest))
        self.ask("new Promise(done => setTimeout(done, 300))")
        png = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(png))


def pages(book: Path) -> list[Path]:
    """Every page of a built book, without Sphinx's redirect and index pages."""
    found = [*book.glob("notebooks/*.html"), *book.glob("book/*.html")]
    return sorted(page for page in found if not page.name.startswith("_"))


def screenshots(book: Path, out: Path, command: str) -> None:
    """PNG files ``PAGE-THEME-WIDTH.png`` of every page."""
    out.mkdir(parents=True, exist_ok=True)
    with Browser(command) as browser:
        for width in (WIDE, NARROW):
            for page in pages(book):
                browser.size(width)
                browser.open(page)
                for theme in ("light", "dark"):
                    browser.theme(theme)
                    browser.screenshot(out / f"{page.stem}-{theme}-{width}.png", width)


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]), Path(sys.argv[2]),
                chromium.find() or sys.exit("no Chromium found"))
