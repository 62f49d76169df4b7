"""The one-page report: it says what was measured, nothing in it runs, only open text is shown."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darkmatter import __main__ as cli
from darkmatter import decomposition
from darkmatter.book import records, report
from darkmatter.errors import DarkmatterError
from darkmatter.models import model
from darkmatter.saes import artifacts, references
from darkmatter.text.corpus import Corpus
from tests import tiny

EVIL = '<script>alert(1)</script>"\'&<img src=x onerror=alert(2)>'


class Tokenizer:
    """Token i is 'wi ', but for some that a text could hold."""

    all_special_ids = (0,)

    def __init__(self, odd: dict[int, str]) -> None:
        self.odd = odd

    def decode(self, ids: list[int]) -> str:
        return "".join(self.odd.get(int(each), f"w{each} ") for each in ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"▁{self.decode([each]).strip()}" for each in ids]


@pytest.fixture
def world(own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A toy survey whose every other token is an attack; ``world(domains)`` renames the domains."""
    torch.set_num_threads(1)
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path / "artifacts")
    monkeypatch.setattr(records, "load_all", lambda *_, **__: [])
    odd = dict.fromkeys(range(1, 50, 2), EVIL) | {2: "\n", 4: "word", 6: " "}
    monkeypatch.setattr(model, "load_tokenizer", lambda preset: Tokenizer(odd))

    def make(*domains: str, sae: str = "toy", corpus: str = "") -> Any:
        acts = tiny.acts()
        names = tuple(f"{domains[i % len(domains)]}/{i}" for i in range(len(acts.text.sources)))
        named = acts.__class__(acts.x, acts.context, acts.position,
                               Corpus(acts.text.tokens, acts.text.source, names), acts.key)
        tiny.surveyed(monkeypatch, named, tiny.loaded(sae, tiny.topk()))
        preset = decomposition.settings("smoke", tiny.SITE, sae, corpus or "smoke")
        return preset, decomposition.decompose("smoke", tiny.SITE, sae, corpus or "smoke")
    return make


class Text(HTMLParser):
    """The tags and the visible text of a page; raises nothing, as browsers do."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attributes}
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_numbers_are_the_results(world: Any) -> None:
    preset, result = world("plays", "code")
    page = Text(report.page(preset, result))
    assert page.open == []
    shown = " ".join(page.text.split())
    low, high = result["intervals"]["fvu"]
    assert f"{result['fvu']:.3f} [{low:.3f}, {high:.3f}]" in shown
    fvu, nonlinear = result["fvu"], result["fvu_nonlinear"]
    for name, share in (("rebuilt", 1 - fvu), ("linear error", fvu - nonlinear),
                        ("nonlinear error", nonlinear)):
        assert f"{name} {100 * share:.1f}%" in shown
    assert f"{result['n_fit']:,} tokens to fit on" in shown
    assert all(row["about"] in shown for row in report.metrics(result))


def test_nothing_in_it_runs(world: Any) -> None:
    """Not the text of the tokens, the name of the SAE, or what a preset holds."""
    preset, result = world("plays", sae=f"dir/{EVIL}")
    page = report.page(preset, result)
    read = Text(page)
    assert read.names <= {"lang", "charset", "name", "content", "http-equiv", "rel", "href",
                          "class", "style", "role", "aria-label", "title"}
    assert read.links == ["data:,"]
    assert set(read.tags) <= {
        "html", "head", "meta", "link", "title", "style", "body", "main", "h1", "h2", "p", "code",
        "div", "i", "ul", "li", "em", "strong", "table", "tr", "th", "td", "span", "br", "mark",
        "cite"}
    assert EVIL in read.text
    assert "url(" not in page and "@import" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


@pytest.mark.parametrize(("domains", "corpus", "shown"), [
    (("plays",), "", True), (("news", "essays"), "", False), (("speeches",), "", False),
    (("pile",), "pile", False), (("news",), "file", True)])
def test_only_text_that_may_be_shown_is(
    world: Any, tmp_path: Path, domains: tuple[str, ...], corpus: str, shown: bool
) -> None:
    """A reader's own file may be called 'news'; the built-in news are not ours to print."""
    file = str(tmp_path / "news.txt")
    preset, result = world(*domains, corpus=file if corpus == "file" else corpus)
    page = Text(report.page(preset, result)).text
    assert ("alert(1)" in page) == shown
    assert ("may be printed here" in page) != shown


def test_of_mixed_text_only_the_open_domains(world: Any) -> None:
    preset, _ = world("plays", "news")
    surveyed = report.survey.run(preset)
    tokens = surveyed.tokens("toy")
    hidden = report.concealed(preset, tokens)
    assert hidden == ("news",)
    bad = report.worst(tokens, Tokenizer({}), hidden)
    assert 0 < len(bad) <= report.WORST
    news = tokens[tokens["domain"] == "news"]["error_norm2"].max() ** 0.5
    plays = (tokens.query("domain == 'plays' and is_eval")["error_norm2"] ** 0.5).to_numpy()
    assert all(np.isclose(plays, row["norm"], rtol=1e-6, atol=0).any() for row in bad)
    assert not any(np.isclose(plays, news, rtol=1e-6, atol=0)), "else the test would show nothing"
    assert news > min(row["norm"] for row in bad), "else the test would show nothing"


def test_the_worst_tokens_are_the_worst(world: Any) -> None:
    preset, _ = world("plays")
    tokens = report.survey.run(preset).tokens("toy")
    bad = report.worst(tokens, Tokenizer({}), ())
    held = tokens.query("is_eval").sort_values("error_norm2", ascending=False)
    assert bad[0]["norm"] ** 2 == pytest.approx(float(held["error_norm2"].iloc[0]))
    assert [row["norm"] for row in bad] == sorted((row["norm"] for row in bad), reverse=True)
    first = held.iloc[0]
    near = tokens[(tokens["context"] == first["context"])
                  & (abs(tokens["position"] - first["position"]) <= report.AROUND)]
    whole = bad[0]["before"] + bad[0]["text"] + bad[0]["after"]
    assert whole == Tokenizer({}).decode(near["token_id"].tolist())


def test_parts_add_up(world: Any) -> None:
    for fvu, nonlinear in ((0.3, 0.1), (0.2, 0.25), (1.4, 0.2)):
        found = report.parts({"fvu": fvu, "fvu_nonlinear": nonlinear})
        assert sum(part["share"] for part in found) == pytest.approx(1)
        assert sum(part["drawn"] for part in found) == pytest.approx(100)
        assert all(part["drawn"] >= 0 for part in found)


def test_an_sae_without_error(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No R² of an error that is 0; the page still stands."""
    preset, _ = world("plays")
    acts = report.survey.activations.evaluation(preset)
    tiny.surveyed(monkeypatch, acts, tiny.formula("same", torch.clone))
    settings = decomposition.settings("smoke", tiny.SITE, "same", "smoke")
    result = decomposition.decompose("smoke", tiny.SITE, "same", "smoke")
    assert "no variance" in Text(report.page(settings, result)).text


# ---- the ladder ----

@pytest.fixture
def shipped(world: Any, tmp_path: Path) -> list[str]:
    names = ["smollm2-l15-w1024-k32", "smollm2-l15-w4096-k32"]
    for i, name in enumerate(names):
        folder = tmp_path / name
        tiny.topk(32 * (i + 1), 4).save_model(folder)
        record = {"width": 1024 * 4**i, "k": 32, "fvu": 0.2 - i / 20}
        (folder / "record.json").write_text(json.dumps(record))
        references.ship(folder, artifacts.FOLDER / f"{name}.safetensors")
    return names


def test_the_ladder_from_the_saes_own_records(world: Any, shipped: list[str]) -> None:
    ladder = report.reference()
    assert [(row["name"], row["fvu"], row["fvu_nonlinear"]) for row in ladder] == [
        (shipped[0], 0.2, None), (shipped[1], pytest.approx(0.15), None)]
    page = Text(report.page(*world("plays"))).text
    assert shipped[0] in page and report.FALL_BACK in page


def test_the_ladder_as_this_machines_book_measured_it(
    world: Any, shipped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = (("fvu", 0.31, "strict"), ("fvu_nonlinear", 0.12, "strict"), ("fvu", 0.99, "paper"))
    rows = [{"name": name, "sae": shipped[0], "value": value, "protocol": protocol}
            for name, value, protocol in measured]
    monkeypatch.setattr(records, "load_all", lambda *_, **__: [
        {"preset": "smollm2", "metrics": rows},
        {"preset": "smoke", "metrics": [rows[0] | {"value": 0.5}]}])
    first = report.reference()[0]
    assert (first["fvu"], first["fvu_nonlinear"], first["measured"]) == (0.31, 0.12, True)
    page = Text(report.page(*world("plays"))).text
    assert "0.310" in page and report.FALL_BACK not in page


# ---- the command ----

def test_the_command_writes_the_page(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world("plays")
    words = ["--model", "smoke", "--site", tiny.SITE, "--sae", "toy", "--corpus", "smoke"]
    out = tmp_path / "deep" / "page.html"
    assert cli.main(["decompose", *words, "--report", str(out)]) == 0
    assert "What the error of" in out.read_text()
    assert "FVU" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert cli.main(["decompose", *words, "--report", str(tmp_path / "file" / "page.html")]) == 2
    with pytest.raises(DarkmatterError, match="cannot be written"):
        report.write(tmp_path / "file" / "page.html", *world("plays"))


@pytest.mark.browser
def test_in_a_real_browser(world: Any, chromium: str, tmp_path: Path) -> None:
    """Nothing asked for, nothing complained about; legible in light and dark; it fits a phone."""
    from tests.book.test_browser import CONTRAST
    from tests.browser import NARROW, WIDE, Browser

    page = tmp_path / "page.html"
    report.write(page, *world("plays", "code"))
    with Browser(chromium) as browser:
        for width in (WIDE, NARROW):
            browser.size(width)
            browser.open(page)
            assert browser.complaints() == []
            asked = browser.requests()
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask("window.alerted === undefined && document.images.length === 0")
            assert browser.ask(
                "[...document.querySelectorAll('.bar i')].some(e => e.offsetWidth > 9)")
            bars = "[...document.querySelectorAll('.t i')].filter(e => e.offsetHeight > 1)"
            assert browser.ask(f"{bars}.length > 20")
        for theme, dark in (("light", False), ("dark", True)):
            scheme = {"name": "prefers-color-scheme", "value": theme}
            browser.call("Emulation.setEmulatedMedia", features=[scheme])
            found = browser.ask(CONTRAST)
            assert found["least"] > 4.5
            assert (found["page"] < 0.1) == dark


def test_the_colours_stand_out() -> None:
    """A colour a part, the ones that the book's figures give them."""
    assert set(report.colours()) == {"rebuilt", "linear", "nonlinear"}
    assert len({pair for pair in report.colours().values()}) == 3
