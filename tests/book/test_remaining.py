"""How long a run still takes, where the answer is known; and the line that says it."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest

from darkmatter.book import reference, remaining
from darkmatter.book.remaining import PAGES, Line, Part, left, scale


def finished(recorded: float, took: float) -> Part:
    return Part("finished", recorded, took, finished=True)


def test_before_anything_is_known_it_takes_what_was_recorded() -> None:
    pair = [Part("two", 100), Part("three", 100)]
    assert left([([Part("one", 600)], 1), (pair, 2)]) == pytest.approx(700)


def test_a_machine_that_is_twice_as_slow_takes_twice_what_is_left() -> None:
    rest = [Part("two", 200), Part("three", 300)]
    assert left([([finished(600, 600)], 1), (rest, 1)]) == pytest.approx(500)
    assert left([([finished(600, 1200)], 1), (rest, 1)]) == pytest.approx(1000, rel=0.05)
    assert left([([finished(600, 300)], 1), (rest, 1)]) == pytest.approx(250, rel=0.06)


def test_one_short_notebook_does_not_decide() -> None:
    assert scale([finished(2, 20)]) == pytest.approx(50 / 32)


def test_what_a_running_notebook_took_is_not_left() -> None:
    parts = [finished(600, 1200), Part("two", 200, took=100)]
    assert left([(parts, 1)]) == pytest.approx(300, rel=0.05)


def test_kept_runs_take_none_and_say_nothing_of_the_machine() -> None:
    kept = Part("kept", 0, 0, finished=True)
    assert left([([kept, kept], 2), ([Part("two", 100)], 1)]) == pytest.approx(100)


def test_a_notebook_that_overran_takes_no_negative_time() -> None:
    over = Part("over", 100, took=1000)
    assert left([([over], 1)]) == 0
    both = left([([over, Part("next", 100)], 1)])
    assert 100 < both <= 1000  # and the next is expected to be slow too


def test_a_loop_that_will_take_longer_tells_of_a_slow_machine_at_once() -> None:
    """Two fifths took twice the recorded time: as long again and half is to come, and the rest."""
    first = Part("one", 600, took=480, coming=720)
    assert left([([first], 1), ([Part("two", 300)], 1)]) == pytest.approx(720 + 600, rel=0.03)


def test_a_short_loop_says_nothing_of_the_rest() -> None:
    assert left([([Part("one", 600, took=100, coming=20)], 1)]) == pytest.approx(500)


def test_side_by_side() -> None:
    pair = [Part("one", 100), Part("two", 100)]
    assert left([(pair, 1)]) == pytest.approx(200)
    assert left([(pair, 2)]) == pytest.approx(100)
    assert left([([Part("long", 190), Part("short", 10)], 2)]) == pytest.approx(190)
    assert left([([], 2)]) == 0


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "less than a minute left"), (60, "less than a minute left"), (61, "about 2 min left"),
    (840, "about 14 min left"), (3601, "about 1 h 1 min left"), (7200, "about 2 h 0 min left")])
def test_words(seconds: float, words: str) -> None:
    assert remaining.words(seconds) == words


def test_recorded_times_are_the_presets_own_where_it_has_any() -> None:
    names = ("smollm2", "suite-8m", "gemma-2-2b")
    default, own, other = (remaining.recorded(name) for name in names)
    (known,) = (record for record in reference.load("smollm2") if record["notebook"] == "01_data")
    assert default["01_data"] == known["wall_seconds"] > 60 and PAGES in default
    assert own["01_data"] != default["01_data"]
    assert own["18_your_own_sae"] == default["18_your_own_sae"]
    assert other == default


def test_the_line_tells_of_all_that_run(tmp_path: Path) -> None:
    inside = tmp_path / "progress.json"
    inside.write_text(json.dumps(["forward pass 120 of 300 contexts", 30]))
    stages = [(["01_data"], 1), (["02_norm", "03_vector", "04_scaling"], 2), ([PAGES], 1)]
    line = Line("smollm2", stages, {"03_vector"})
    with line.running("01_data"):
        pass
    with line.running("02_norm", inside) as part, line.running("04_scaling"):
        part.at(5, 21)
        said = line.told()
        assert said.startswith("02_norm 2 of 4 · cell 5 of 21 · forward pass 120 of 300 contexts | "
                               "04_scaling 4 of 4")
        assert said.endswith(" left")
        assert len(line.told(60)) == 60
        assert line.told(60).startswith("02_norm 2 of 4 · cell") and line.told(60).endswith(" left")
        assert part.coming == 30
    line.keep("01_data")
    with line.running(PAGES):
        assert line.told().startswith("the pages · ")


def test_a_part_that_failed_is_not_told_of() -> None:
    line = Line("smollm2", [(["01_data", "02_norm"], 2)])
    with pytest.raises(ValueError, match="it"), line.running("01_data"):
        raise ValueError("it")
    with line.running("02_norm"):
        assert line.told().startswith("02_norm 2 of 2 · ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_stands_below_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    line = Line("smollm2", [(["01_data"], 1)])
    with line.shown(), line.running("01_data"):
        end = time.monotonic() + 20
        while "01_data 1 of 1" not in terminal.getvalue() and time.monotonic() < end:
            time.sleep(0.1)
        print("something", "else")
        print("a warning", file=sys.stderr)
    assert sys.stdout is terminal
    minutes = round(remaining.recorded("smollm2")["01_data"] / 60)
    told = re.search(r"\r  01_data 1 of 1 · about (\d+) min left", terminal.getvalue())
    assert told and abs(int(told[1]) - minutes) <= 1
    assert "\rsomething else\n" in terminal.getvalue()
    shown = terminal.getvalue()
    assert shown.rstrip(" \r").endswith("\n") or shown.endswith("\r")  # nothing stays
