"""Finds a Chromium and lets it draw plotly figures as SVG: all figures of a build at once."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
)
WIDTH, HEIGHT = 720, 400  # pixels; a figure's own layout.height wins over HEIGHT

_PAGE = """<!doctype html><meta charset="utf-8"><body><script src="{plotly}"></script><script>
(async () => {{
  for (const [key, figure] of Object.entries({figures})) {{
    const size = {{width: {width}, height: figure.layout.height || {height}}};
    Object.assign(figure.layout, {{paper_bgcolor: "white", plot_bgcolor: "white"}});
    const url = await Plotly.toImage(figure, {{format: "svg", ...size}}).catch(() => "");
    const picture = document.createElement("pre");
    picture.id = key;
    picture.textContent = decodeURIComponent(url.slice(url.indexOf(",") + 1));
    document.body.append(picture);
  }}
}})();
</script></body>"""


def find() -> str | None:
    """The command of a Chromium or Chrome, ``DARKMATTER_CHROMIUM`` first, or None."""
    names = (
        os.environ.get("DARKMATTER_CHROMIUM", ""),
        "chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
    )
    return next(filter(None, map(shutil.which, names)), None)


def draw(figures: dict[str, str], plotly_js: Path, browser: str, timeout: float = 300
         ) -> dict[str, str]:
    """SVG text by key of each figure (plotly JSON by key); one that could not be drawn is missing.

    Raises OSError or subprocess.TimeoutExpired when the browser does not start or does not end.
    """
    values = ",".join(f"{json.dumps(key)}:{figure}" for key, figure in figures.items())
    page = _PAGE.format(plotly=plotly_js.as_uri(), figures="{" + in_script(values) + "}",
                        width=WIDTH, height=HEIGHT)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        path = Path(scratch, "draw.html")
        path.write_text(page, encoding="utf-8")
        command = [browser, *FLAGS, f"--user-data-dir={scratch}/profile",
                   "--virtual-time-budget=600000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    document = done.stdout.decode("utf-8", "replace")
    drawn = re.findall(r'<pre id="(\w+)">(.*?)</pre>', document, re.DOTALL)
    return {key: html.unescape(svg) for key, svg in drawn if svg}


def in_script(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")
