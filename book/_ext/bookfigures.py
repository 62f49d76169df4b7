"""Sphinx extension of the book: numbered plotly figures and mathematics, nothing from a network.

Where ``notes.json`` lies beside the pages, each page begins with its line.

A plotly figure becomes an empty box, its JSON and a picture. ``book/_static/figures.js`` draws the
JSON into the box. The picture (or, where no Chromium is found to draw it, a small table of the
data) is for print and for readers without JavaScript. ``layout.meta`` of a figure holds its name,
caption and alt text, so that a caption can hold numbers that the chapter computed
(``darkmatter.book.figures.finish``). plotly.js and MathJax are copied at build time out of
installed wheels.
"""

from __future__ import annotations

import base64
import html
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import chromium
import numpy as np
from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer, create_figure_context
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

from darkmatter import cache

LOG = logging.getLogger(__name__)


class plotly_figure(nodes.General, nodes.Element):
    """A figure: ``json``, ``key`` (its hash), ``alt``, ``paper`` (its twin), ``height`` (px)."""


class figure_index(nodes.General, nodes.Element):
    """Stands for the table of figures until every figure has its number."""


def render(renderer: NbElementRenderer, data: MimeData) -> list[nodes.Node]:
    """The figure of one plotly output; called by ``darkmatter.book.figures.PlotlyMime``."""
    content: dict[str, Any] = data.content  # type: ignore[assignment]
    layout = content.get("layout", {})
    meta = layout.get("meta") or {}
    body = json.dumps({"data": content["data"], "layout": layout}, sort_keys=True,
                      separators=(",", ":"))
    node = plotly_figure(
        json=body,
        key=cache.key(figure=body, plotly=_plotly_js().stat().st_size),
        alt=meta.get("alt") or "A figure without a description",
        paper=meta.get("paper") or "–",
        height=layout.get("height", chromium.HEIGHT),
    )
    caption = {"name": meta["name"], "caption": meta["caption"]} if "name" in meta else None
    holder, writer = nodes.Element(), renderer.renderer
    figure = create_figure_context(writer, caption, data.line or 0)
    with writer.current_node_context(holder), figure:
        writer.current_node.append(node)
    return holder.children


# --- pictures and tables for print and for readers without JavaScript


def _draw_all(app: Sphinx, env: BuildEnvironment) -> None:
    """Draw the pictures that the cache lacks and lay all of them beside the pages."""
    kept = cache.root() / "pictures"
    pages = (env.get_doctree(name) for name in env.found_docs)
    figures = {node["key"]: node["json"] for page in pages for node in page.findall(plotly_figure)}
    missing = {key: body for key, body in figures.items() if not (kept / f"{key}.svg").exists()}
    for key, svg in _drawn(missing).items():
        with cache.atomic(kept / f"{key}.svg") as path:
            path.write_text(svg, encoding="utf-8")
    images = Path(app.outdir, app.builder.imagedir)
    images.mkdir(parents=True, exist_ok=True)
    for key in figures:
        if (kept / f"{key}.svg").exists():
            shutil.copyfile(kept / f"{key}.svg", images / f"{key}.svg")


def _drawn(figures: dict[str, str]) -> dict[str, str]:
    """SVG by key, as many as could be drawn: a page shows a table for the others."""
    browser = chromium.find()
    if figures and browser is None:
        LOG.info("no Chromium found: print and readers without JavaScript get tables instead of "
                 "pictures")
    if not figures or browser is None:
        return {}
    LOG.info("drawing %d figures for print and for readers without JavaScript", len(figures))
    try:
        return chromium.draw(figures, _plotly_js(), browser)
    except (OSError, subprocess.TimeoutExpired) as error:
        LOG.info("Chromium failed, so these readers get tables instead of pictures: %s", error)
        return {}


def data_table(figure: dict[str, Any], most: int = 8) -> str:
    """An HTML table of a figure's traces: up to ``most`` evenly spaced points of each."""
    columns = [axis for axis in ("x", "y", "z") if any(axis in trace for trace in figure["data"])]
    rows = []
    for trace in figure["data"]:
        points = list(zip_longest(*(_values(trace.get(axis)) for axis in columns), fillvalue=""))
        for point in points[:: -(-len(points) // most) or 1]:
            cells = (trace.get("name") or "", *point)
            rows.append("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in cells) + "</tr>")
    return _table(("", *columns), rows)


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    """HTML of a table as the theme writes its own, so that a wide one scrolls by itself."""
    titles, body = "".join(f"<th>{title}</th>" for title in head), "".join(rows)
    return ('<div class="pst-scrollable-table-container"><table class="table">'
            f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>")


def _values(values: Any) -> list[Any]:
    """A trace's column as a list, whether plotly wrote it out or packed it in base64."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).tolist()
    return list(values or [])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


# --- pages


def _visit_figure(writer: HTML5Translator, node: plotly_figure) -> None:
    builder, picture = writer.builder, f"{node['key']}.svg"
    alt = html.escape(node["alt"], quote=True)
    if Path(builder.outdir, builder.imagedir, picture).exists():
        static = f'<img src="{builder.imgpath}/{picture}" alt="{alt}" loading="lazy">'
    else:
        static = data_table(json.loads(node["json"]))
    height = f"height:{node['height']}px"
    writer.body.append(
        f'<div class="dm-figure">'
        f'<div class="dm-plot" role="img" aria-label="{alt}" style="{height}"></div>'
        f'<script type="application/json">{chromium.in_script(node["json"])}</script>'
        f'<div class="dm-static">{static}</div></div>'
    )
    raise nodes.SkipNode


class FigureIndex(SphinxDirective):
    """``{figure-index}``: the book's figures, those of the paper, and their chapters."""

    def run(self) -> list[nodes.Node]:
        return [figure_index()]


def _fill_index(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for place in list(doctree.findall(figure_index)):
        rows = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
                for row in _index(app, docname))
        table = _table(("here", "in the paper", "chapter", "label"), rows)
        place.replace_self(nodes.raw("", table, format="html"))


def _index(app: Sphinx, docname: str) -> Iterator[tuple[str, str, str, str]]:
    """The cells of each numbered figure's row, in the order of the figures' numbers."""
    numbered = {page: kinds["figure"] for page, kinds in app.env.toc_fignumbers.items()
                if kinds.get("figure")}
    for page, numbers in sorted(numbered.items(), key=lambda item: min(item[1].values())):
        link = app.builder.get_relative_uri(docname, page)
        title = html.escape(app.env.titles[page].astext())
        chapter = f'<a href="{link}">{title}</a><br><code>{page}.ipynb</code>'
        for plot in app.env.get_doctree(page).findall(plotly_figure):
            figure = plot.parent
            label = next(iter(figure["ids"]), "") if isinstance(figure, nodes.figure) else ""
            if label in numbers:
                here = f'<a href="{link}#{label}">Figure {".".join(map(str, numbers[label]))}</a>'
                yield here, html.escape(plot["paper"]), chapter, f"<code>{label}</code>"


def _page_assets(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
                 ) -> None:
    """Load plotly only where there is a figure."""
    if doctree is not None and any(True for _ in doctree.findall(plotly_figure)):
        app.add_js_file(None, body="document.documentElement.classList.add('dm-js')", priority=100)
        app.add_js_file("plotly.min.js", loading_method="defer", priority=600)
        app.add_js_file("figures.js", loading_method="defer", priority=601)


def _note(notes: dict[str, str], app: Sphinx, page: str, template: str, context: dict[str, Any],
          doctree: Any) -> None:
    """The line above a page that says where its numbers were recorded (``book.recorded``)."""
    if "body" in context and page in app.env.found_docs:
        line = html.escape(notes.get(page, notes[""]), quote=False)
        context["body"] = f'<p class="dm-note" role="note">{line}</p>{context["body"]}'


# --- libraries


def _plotly_js() -> Path:
    return Path(str(files("plotly"))) / "package_data" / "plotly.min.js"


def _copy_libraries(app: Sphinx) -> None:
    """Put plotly.js and MathJax (with the TeX extensions it loads on demand) into the book."""
    try:
        mathjax = Path(str(files("mathjax"))) / "static" / "mathjax" / "es5"
    except ModuleNotFoundError as error:
        raise ExtensionError("MathJax is missing: pip install django-static-mathjax==3.2.2.1"
                             ) from error
    static, extensions = Path(app.outdir, "_static"), Path("input", "tex", "extensions")
    (static / "mathjax").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_plotly_js(), static / "plotly.min.js")
    shutil.copyfile(mathjax / "tex-mml-svg.js", static / "mathjax" / "tex-mml-svg.js")
    shutil.copytree(mathjax / extensions, static / "mathjax" / extensions, dirs_exist_ok=True)


def _start(app: Sphinx) -> None:
    if app.builder.format == "html":
        app.render_plotly = render  # type: ignore[attr-defined]  # for book.figures.PlotlyMime
        app.connect("env-updated", _draw_all)
        if (notes := Path(app.srcdir, "notes.json")).exists():
            lines = json.loads(notes.read_text(encoding="utf-8"))
            app.connect("html-page-context", partial(_note, lines))
        _copy_libraries(app)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(plotly_figure, html=(_visit_figure, None))
    app.add_directive("figure-index", FigureIndex)
    app.set_html_assets_policy("always")  # MathJax also where the only TeX is inside a figure
    app.connect("builder-inited", _start)
    app.connect("doctree-resolved", _fill_index)
    app.connect("html-page-context", _page_assets)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
