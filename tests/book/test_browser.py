"""The built book in a real browser with no host to be reached: all is drawn, nothing asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import NARROW, WIDE, Browser

pytestmark = pytest.mark.browser
HOME = Path(__file__).resolve().parents[2]
PAGES = re.findall(r"(?:root|file): *(\S+)", (HOME / "_toc.yml").read_text(encoding="utf-8"))

# Text nodes that a reader would see as TeX, in prose and in figures.
RAW_TEX = r"""(() => {
  const walker = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
  const hidden = 'code, pre, script, style, mjx-container, .dm-static';
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.nodeValue;
    const around = walker.currentNode.parentElement;
    if (around.closest(hidden) || !around.checkVisibility()) continue;
    const tex = /\$\S[^$]*\$|\\[([]|\\[a-zA-Z]{2,}|\{(term|numref|eq|ref|doc|cite:?\w*)\}/;
    if (tex.test(text)) found.push(text);
  }
  return found;
})()"""

FIGURES = """[...document.querySelectorAll('.dm-figure')].map(box => {
  const plot = box.querySelector('.dm-plot');
  const given = JSON.parse(box.querySelector('script').textContent);
  const frame = plot.querySelector('.main-svg')?.getBoundingClientRect();
  return {
    drawn: box.classList.contains('dm-drawn') && !box.classList.contains('dm-failed'),
    traces: [given.data.length, plot.data?.length], size: [frame?.width ?? 0, frame?.height ?? 0],
    alt: plot.getAttribute('aria-label').length,
  };
})"""

# The least contrast of the text of figures and of prose with the page, by WCAG's definition.
CONTRAST = """(() => {
  const rgb = (css) => css.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (css) => rgb(css).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  // Of numbers in cells plotly makes black or white what stands on the cell.
  const onPage = (e) => !e.closest('.heatmap-label');
  const labels = [...document.querySelectorAll('.dm-plot text')].filter(onPage);
  const prose = [...document.querySelectorAll('article p, figcaption, td')];
  const colours = labels.map((e) => getComputedStyle(e).fill)
    .concat(prose.map((e) => getComputedStyle(e).color));
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return { page, least: Math.min(...colours.map((c) => ratio(light(c), page))) };
})()"""

# Elements that stick out of the window, unless something around them scrolls.
OVERFLOW = """[...document.querySelectorAll('article *')].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && e.getBoundingClientRect().width > 0
  && !e.closest('pre, mjx-container, .pst-scrollable-table-container, .math, .dm-plot, .modebar')
).map(e => e.tagName + '.' + e.className).slice(0, 5)"""


@pytest.fixture(scope="session")
def built_book() -> Path:
    """The folder of a built book: DARKMATTER_BOOK, or the smoke preset's, built now."""
    given = os.environ.get("DARKMATTER_BOOK")
    if given:
        return Path(given)
    command = [sys.executable, "-m", "darkmatter", "book", "--preset", "smoke"]
    subprocess.run(command, cwd=HOME, check=True)
    return HOME / "_build" / "html"


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with Browser(chromium) as one:
        yield one


@pytest.mark.parametrize("name", PAGES)
def test_page_draws_everything_and_asks_for_nothing(
    built_book: Path, browser: Browser, name: str
) -> None:
    browser.size(WIDE)
    browser.open(built_book / f"{name}.html")
    browser.theme("light")
    assert browser.complaints() == []
    asked = browser.requests()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    for figure in browser.ask(FIGURES):
        assert figure["drawn"]
        assert figure["traces"][0] == figure["traces"][1] > 0
        assert figure["size"][0] > 300
        assert figure["size"][1] > 200
        assert figure["alt"] > 20
    assert browser.ask(RAW_TEX) == []
    bare = "article .math:not(:has(mjx-container))"
    assert browser.ask(f"document.querySelectorAll('{bare}').length") == 0
    assert browser.ask("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0

    light = browser.ask(CONTRAST)
    browser.theme("dark")
    dark = browser.ask(CONTRAST)
    assert light["page"] > 0.9
    assert dark["page"] < 0.1
    assert light["least"] > 4.5
    assert dark["least"] > 4.5
    assert browser.complaints() == []


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(built_book: Path, browser: Browser, name: str) -> None:
    browser.size(NARROW)
    browser.open(built_book / f"{name}.html")
    assert browser.ask("document.documentElement.scrollWidth") <= NARROW
    assert browser.ask(OVERFLOW) == []
    assert all(200 < figure["size"][0] <= NARROW for figure in browser.ask(FIGURES))


def with_figures(book: Path) -> Path:
    pages = [book / f"{name}.html" for name in PAGES]
    return next(page for page in pages if 'class="dm-figure"' in page.read_text())


def taller(browser: Browser, what: str) -> list[bool]:
    """Which of the elements take up room."""
    return browser.ask(f"[...document.querySelectorAll('{what}')]"
                       ".map(e => e.getBoundingClientRect().height > 100)")


def check_still_pictures(browser: Browser) -> None:
    """The pictures have loaded and show; the live figures do not."""
    images = "[...document.querySelectorAll('.dm-static img')]"
    browser.ask(f"{images}.forEach(e => {{ e.loading = 'eager'; }})")
    browser.wait(f"{images}.every(e => e.complete && e.naturalWidth > 0)")
    pictures = taller(browser, ".dm-static img")
    assert pictures
    assert all(pictures)
    assert not any(taller(browser, ".dm-plot"))


def test_print_shows_the_still_pictures(built_book: Path, browser: Browser) -> None:
    browser.size(WIDE)
    browser.open(with_figures(built_book))
    assert all(taller(browser, ".dm-plot"))
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        check_still_pictures(browser)
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_without_javascript_the_still_pictures_are_there(
    built_book: Path, browser: Browser
) -> None:
    browser.size(WIDE)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=with_figures(built_book).resolve().as_uri())
        browser.wait("document.readyState === 'complete' "
                     "&& !!document.querySelector('.dm-static img')")
        check_still_pictures(browser)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
