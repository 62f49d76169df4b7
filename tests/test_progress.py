"""Bars: what they say on a terminal, in a log and to the runner, on a clock that the test turns."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkmatter import progress


class Clock:
    """Seconds that pass only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(progress.FILE, str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


def loop(clock: Clock, items: int, seconds: float, what: str = "forward pass") -> Iterator[int]:
    """Go through a bar of items that take so many seconds each; stops at each."""
    for i in progress.bar(range(items), what, "contexts"):
        yield i
        clock.now += seconds


def test_the_runner_reads_how_far_a_loop_is(clock: Clock, file: Path) -> None:
    steps = loop(clock, 10, 2.0)
    for _ in range(4):  # at the fourth, three are done
        next(steps)
    assert progress.read(file) == ("forward pass 3 of 10 contexts", 14.0)
    assert list(steps) == [4, 5, 6, 7, 8, 9]
    assert progress.read(file) == ("", 0.0)


def test_what_was_done_before_counts_for_the_place_but_not_for_the_time(
    clock: Clock, file: Path
) -> None:
    with progress.bar(None, "forward pass", "contexts", total=10, initial=4) as bar:
        clock.now += 6
        bar.update(3)
        assert progress.read(file) == ("forward pass 7 of 10 contexts", 6.0)


def test_the_file_is_written_once_a_second(clock: Clock, file: Path) -> None:
    texts = [progress.read(file).text for _ in loop(clock, 10, 0.4)]
    written = [f"forward pass {n} of 10 contexts" for n in (3, 6, 9)]
    assert list(dict.fromkeys(texts)) == ["", *written]


@pytest.mark.parametrize("content", ["", "[", "[\"forward pass"], ids=["empty", "begun", "cut"])
def test_a_file_that_is_being_written_says_nothing(content: str, file: Path) -> None:
    assert progress.read(file) == ("", 0.0)
    file.write_text(content)
    assert progress.read(file) == ("", 0.0)


def test_in_a_log_each_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(loop(clock, 10, 10.0))) == 10
    assert capsys.readouterr().err.splitlines() == [
        "forward pass: 3 of 10 contexts, 01:10 left",
        "forward pass: 6 of 10 contexts, 00:40 left",
        "forward pass: 9 of 10 contexts, 00:10 left",
    ]
    assert len(list(loop(clock, 10, 2.0))) == 10  # 20 seconds
    assert capsys.readouterr().err == ""


def test_on_a_terminal_in_place_below_what_is_said(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for i in loop(clock, 3, 5.0):
        if i == 2:
            progress.say("a checkpoint")
    assert "forward pass: 2 of 3 contexts |" in terminal.getvalue()
    assert "| 00:05 left" in terminal.getvalue()
    assert "a checkpoint\n" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1  # no bar stays


def test_beside_other_processes_a_terminal_is_a_log(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.bar, "in_place", True)
    progress.in_lines()
    for i in loop(clock, 4, 20.0):
        if i == 2:
            progress.say("a checkpoint")
    assert terminal.getvalue() == (
        "forward pass: 2 of 4 contexts, 00:40 left\na checkpoint\n"
        "forward pass: 4 of 4 contexts, 00:00 left\n")
