"""Figures and tables: drawn from the data they are given, in colours that all can tell apart."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bookfigures
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from darkmatter.book import figures
from darkmatter.regression import Draws

HOME = Path(__file__).resolve().parents[2]
WIDTHS = [1024, 2048, 4096]
LADDER = pd.DataFrame({"width": WIDTHS, "l0": [32, 32, 64], "value": [0.3, 0.2, 0.15],
                       "low": [0.28, 0.19, 0.14], "high": [0.33, 0.22, 0.17]})
PAGE_COLOURS = {"light": (255, 255, 255), "dark": (18, 18, 18)}  # of the book's theme

# Simulation of colour vision (Machado, Oliveira and Fernandes 2009, severity 1), linear RGB.
VISION = {
    "usual": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def linear(rgb: tuple[int, ...]) -> np.ndarray:
    value = np.array(rgb) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(light, 0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(place: int) -> None:
    colours = [tuple(map(int, both[place].split(","))) for both in figures.COLOURS.values()]
    page = linear(list(PAGE_COLOURS.values())[place]) @ [0.2126, 0.7152, 0.0722]
    for rgb in colours:
        ends = sorted([page, linear(rgb) @ [0.2126, 0.7152, 0.0722]])
        assert (ends[1] + 0.05) / (ends[0] + 0.05) >= 3
    for seen in VISION.values():
        for one, two in itertools.combinations(colours, 2):
            apart = lab(seen @ linear(one)) - lab(seen @ linear(two))
            assert np.linalg.norm(apart) > 15, (one, two)


def test_the_dark_twin_of_a_colour_is_no_light_colour() -> None:
    """Else one swap in the page would undo or chain another."""
    light, dark = zip(*figures.COLOURS.values(), strict=True)
    assert not set(light) & set(dark)
    assert len({*light, *dark}) == 2 * len(figures.COLOURS)


def test_finish_needs_words() -> None:
    for name, caption, alt in (("ladder", "c", "a"), ("fig-ladder", " ", "a"),
                               ("fig-ladder", "c", "")):
        with pytest.raises(ValueError, match="needs a name"):
            figures.finish(go.Figure(), name, caption, alt)
    fig = figures.finish(go.Figure(), "fig-ladder", "FVU is\n 0.3.", "A line.", paper="Figure 1")
    meta = fig.to_dict()["layout"]["meta"]
    assert meta["caption"] == "FVU is 0.3."
    assert (meta["name"], meta["alt"], meta["paper"]) == ("fig-ladder", "A line.", "Figure 1")


@pytest.mark.parametrize(("values", "text"), [
    ((0.2414, 0.238, 0.2441), "0.241 [0.238, 0.244]"), ((0.5, None, None), "0.500"),
    ((None, None, 1.0), "–")])
def test_interval(values: tuple[float | None, float, float], text: str) -> None:
    assert figures.interval(*values) == text
    assert figures.interval(float("nan"), None, None) == "–"
    assert figures.number(12345.6, 1) == "12,345.6"


def test_table_is_markdown_for_the_book_and_html_for_a_notebook() -> None:
    frame = pd.DataFrame({"SAE": ["a|b", "c"], "width": [16384, 8], "FVU": [0.12345, None],
                          "share": [0.5, 0.25]})
    bundle = figures.table(frame, "Of $n = 2$\nSAEs.", "tab-two", digits={"share": 1})
    lines = bundle["text/markdown"].splitlines()
    assert lines[:2] == ["~~~~{table} Of $n = 2$ SAEs.", ":name: tab-two"]
    assert lines[4] == "| :--- | ---: | ---: | ---: |"
    assert lines[5] == "| a\\|b | 16,384 | 0.123 | 0.5 |"
    assert lines[6] == "| c | 8 | – | 0.2 |"
    assert "<table" in bundle["text/html"]
    with pytest.raises(ValueError, match="tab-"):
        figures.table(frame, "c", "two")


def traces(fig: Any) -> list[dict[str, Any]]:
    return [trace.to_plotly_json() for trace in fig.select_traces()]


CURVE = pd.DataFrame({"width": [1024.0, 4096.0, 40960.0], "fit": [0.3, 0.2, 0.17]})
DRAWN: dict[str, Callable[[pd.DataFrame], go.Figure]] = {
    "interval_points": lambda df: figures.interval_points(df, "width", x_title="width",
                                                          y_title="R²", group="l0"),
    "bars_by_setting": lambda df: figures.bars_by_setting(df, "width", y_title="R²", group="l0"),
    "histogram": lambda df: figures.histogram(df, "value", x_title="R²", bins=4, log_x=True),
    "bands": lambda df: figures.bands(df.assign(fvu=df["value"], nonlinear=0.1), CURVE, 0.14, 0.1),
    "grid_points": lambda df: figures.grid_points(df, "value", value_title="R²"),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_a_figure_holds_the_numbers_it_was_given(kind: str) -> None:
    more = LADDER.assign(value=LADDER["value"] * 1.1)
    assert DRAWN[kind](LADDER).to_json() != DRAWN[kind](more).to_json()
    if kind in ("interval_points", "bars_by_setting", "bands"):
        drawn = traces(DRAWN[kind](LADDER))
        assert set(LADDER["value"]) <= {value for trace in drawn for value in trace["y"]}


@pytest.mark.parametrize(("constant", "gap"), [(0.14, True), (0.1, False), (0.05, False)])
def test_the_absent_feature_gap_is_drawn_where_the_constant_lies_above_the_floor(
        constant: float, gap: bool) -> None:
    fig = figures.bands(LADDER.assign(fvu=LADDER["value"], nonlinear=0.1), CURVE, constant, 0.1)
    labels = [note.text for note in fig.layout.annotations]
    middle = ["absent-feature gap"] if gap else []
    assert labels == ["nonlinear error", *middle, "absent features"]
    filled = {trace["name"]: trace["line"]["color"] for trace in traces(fig) if "fill" in trace}
    assert list(filled) == labels and len(set(filled.values())) == len(labels)


def test_intervals_become_bars() -> None:
    points = figures.interval_points(LADDER, "width", x_title="width", y_title="R²")
    y, bars = traces(points)[0]["y"], traces(points)[0]["error_y"]
    assert np.allclose(y + bars["array"], LADDER["high"])
    assert np.allclose(y - bars["arrayminus"], LADDER["low"])


def test_draws_become_bars() -> None:
    draws = [Draws(np.array(values), 30.0, 7, 30) for values in ([0.5, 0.4, 0.6], [np.nan, 1, 2])]
    bars = figures.error_bars(draws, color="red")
    assert bars["array"][0] == pytest.approx((draws[0].high or 0) - 0.5)
    assert bars["arrayminus"][0] == pytest.approx(0.5 - (draws[0].low or 0))
    assert np.isnan(bars["array"][1]) and bars["color"] == "red"


def test_a_chapter_can_show_a_functions_source() -> None:
    text = str(figures.source(figures.number).data)
    assert text.startswith("`number`, in `darkmatter/book/figures.py`:")
    assert "def number(" in text and "return" in text


def test_the_template_is_the_default() -> None:
    assert pio.templates.default == "darkmatter"


def test_data_table_reads_packed_numbers() -> None:
    points = go.Scatter(x=np.arange(100.0), y=np.arange(100), name="<a>")
    figure = json.loads(str(go.Figure(points).to_json()))
    table = bookfigures.data_table(figure, most=5)
    assert table.count("<tr>") == 6
    assert "<td>20</td><td>20</td>" in table
    assert "&lt;a&gt;" in table


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A book of one executed notebook, ready to build with the real configuration."""
    fig = figures.finish(
        figures.interval_points(LADDER, "width", x_title="width", y_title="FVU"),
        "fig-ladder",
        f"The least FVU is ${LADDER['value'].min():.2f}$, see {{eq}}`eq-one`.",
        "Three points </script> that fall from left to right.",
        paper="Figure 1",
    )
    shown = [
        {"application/vnd.plotly.v1+json": json.loads(str(pio.to_json(fig)))},
        figures.table(LADDER, "The *ladder*.", "tab-ladder")._repr_mimebundle_(),
        {"text/markdown": "Computed: {numref}`fig-ladder`, {numref}`tab-ladder`, $x^2$.",
         "text/plain": "-"},
    ]
    outputs = [new_output("display_data", data) for data in shown]
    cells = [new_markdown_cell("# One\n\n$$x = 1$$ (eq-one)"),
             new_code_cell("draw()", outputs=outputs)]
    folder = tmp_path / "site-src"
    (folder / "notebooks").mkdir(parents=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / "one.ipynb")
    shutil.copytree(HOME / "book", folder / "book")
    shutil.copy(HOME / "_config.yml", folder)
    # Empty chapters, because other pages point at them.
    chapters = [path.stem for path in (HOME / "notebooks").glob("*.ipynb")]
    for name in chapters:
        empty = new_notebook(cells=[new_markdown_cell(f"# {name}")], metadata=kernel)
        nbformat.write(empty, folder / "notebooks" / f"{name}.ipynb")
    pages = [f"notebooks/{name}" for name in chapters]
    pages += [f"book/{path.stem}" for path in (HOME / "book").glob("*.md")]
    toc = {"format": "jb-book", "root": "notebooks/one",
           "chapters": [{"file": page} for page in pages]}
    (folder / "_toc.yml").write_text(json.dumps(toc))
    return folder


@pytest.mark.slow
def test_figures_captions_and_tables_in_a_book_without_chromium(
    staged: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(own_cache))  # no Chromium to be found there
    monkeypatch.delenv("DARKMATTER_CHROMIUM", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build",
         str(staged), "--path-output", str(staged.parent), "-W", "-n", "--keep-going"],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    html = staged.parent / "_build" / "html"
    page = (html / "notebooks" / "one.html").read_text(encoding="utf-8")
    assert 'id="fig-ladder"' in page
    assert "Figure 1" in page
    assert "0.15" in page.split("<figcaption>")[1]
    assert 'aria-label="Three points &lt;/script&gt; that fall from left to right."' in page
    assert "\\u003c/script>" in page
    assert '<div class="dm-static"><div class="pst-scrollable-table-container"><table' in page
    assert page.count('href="#fig-ladder"') >= 1
    assert page.count('href="#tab-ladder"') >= 1
    index = (html / "book" / "figures.html").read_text(encoding="utf-8")
    assert "../notebooks/one.html#fig-ladder" in index
    outside = [part[:80] for part in page.split('src="')[1:] if part.startswith(("http", "//"))]
    assert outside == []


@pytest.mark.parametrize(("ends", "words"), [
    ((0.3, 0.72), "0.30 to 0.72"), ((0.9, float("nan")), "above 0.90"),
    ((float("nan"), 0), "below 0.00"), ((float("nan"),) * 2, "–")])
def test_a_range_in_words(ends: tuple[float, float], words: str) -> None:
    assert figures.within(*ends) == words
