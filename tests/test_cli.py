"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from darkmatter import __main__ as cli
from darkmatter.book import runner
from darkmatter.errors import DarkmatterError

RESULT: dict[str, Any] = {
    "l0": 32.0,
    "dead_share": 0.01,
    "fvu": 0.2,
    "fvu_nonlinear": 0.11,
    "r2_vector": float("nan"),
    "r2_vector_weighted": 0.5,
    "r2_norm": 0.8,
    "norm_test": dict.fromkeys(("x", "sae", "error", "linear", "nonlinear"), 0.9),
    "n_fit": 1500,
    "n_eval": 900,
    "intervals": {"fvu": [0.19, 0.21], "norm_test": {"x": [0.88, 0.92]}},
    "provenance": {},
}


def given(monkeypatch: pytest.MonkeyPatch, room: str, **functions: Any) -> None:
    """Put a stand-in in the place of a room that a command hands over to."""
    stand_in = types.SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, f"darkmatter.{room}", stand_in)  # type: ignore[arg-type]
    package, _, module = f"darkmatter.{room}".rpartition(".")
    monkeypatch.setattr(importlib.import_module(package), module, stand_in, raising=False)


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets"]) == 0
    assert "smollm2     smollm2, blocks." in capsys.readouterr().out


def test_decompose_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def decompose(**words: Any) -> dict[str, Any]:
        asked.update(words)
        return RESULT

    given(monkeypatch, "decomposition", decompose=decompose)
    words = ["decompose", "--model", "smollm2", "--site", "blocks.3.hook_resid_post", "--sae",
             "some/dir", "--corpus", "text.txt", "--contexts", "60", "--json",
             str(tmp_path / "out.json")]
    assert cli.main(words) == 0
    assert asked == {"model": "smollm2", "site": "blocks.3.hook_resid_post", "sae": "some/dir",
                     "corpus": "text.txt", "contexts": 60, "context_length": None}
    shown = " ".join(capsys.readouterr().out.split())
    assert "FVU 0.200 [0.190, 0.210]" in shown
    assert "R² of the error vector – –" in shown
    assert "norm test of x 0.900 [0.880, 0.920]" in shown
    assert "fitted on 1,500 tokens, scored on 900" in shown
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["r2_vector"] is None
    assert written["provenance"]["versions"]["python"] == platform.python_version()


def test_book_passes_on_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(runner, "build", lambda *words, jobs, record: asked.extend(
        [*words, jobs, record]))
    words = ["book", "--jobs", "3", "--preset", "smoke", "--only", "01_one", "02_two",
             "-p", "contexts", "30", "-p", "sae", "a"]
    assert cli.main(words) == 0
    assert asked == ["smoke", ["01_one", "02_two"], {"contexts": 30, "sae": "a"}, 3, False]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (DarkmatterError("Do it so."), 2, "darkmatter: Do it so."),
        (OSError(28, "No space left on device"), 2, "The disk is full"),
        (KeyboardInterrupt(), 130, "run the same command again to go on"),
    ],
)
def test_endings(
    error: BaseException, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(runner, "build", stop)
    assert cli.main(["book"]) == code
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["bok"], ["book", "--prest", "x"], ["decompose"]])
def test_a_mistyped_command_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: python -m darkmatter" in capsys.readouterr().err


def test_an_unknown_preset_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["book", "--preset", "smolm2"]) == 2
    assert "did you mean 'smollm2'?" in capsys.readouterr().err


def run(words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a shell, as a user types it."""
    command = f"set -o pipefail; {sys.executable} -u -m darkmatter {words}"
    return subprocess.run(["bash", "-c", command], capture_output=True, check=False,
                          env=os.environ | environment)


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_hears_nothing() -> None:
    done = run("presets | head -1")
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""


@pytest.mark.slow
def test_a_terminal_of_ascii_is_written_to() -> None:
    done = run("presets; exit $?", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    told = run("book --preset 'fünf'", PYTHONIOENCODING="ascii")
    assert told.returncode == 2 and b"There is no preset" in told.stderr


def test_a_fault_of_the_program_asks_to_be_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: Any) -> None:
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(cli, "_presets", broken)
    broken.__doc__, broken.__name__ = "Broken.", "_presets"
    assert cli.main(["presets"]) == 1
    told = capsys.readouterr().err
    assert "what nobody thought of" in told
    assert told.endswith("this command: python -m darkmatter presets\n")


COMMANDS = ["presets", "plan", "train", "ship", "survey", "converge", "vary", "decompose", "export",
            "book", "read", "run", "check", "lab", "sync"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_is_understood(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    example = capsys.readouterr().out.rstrip().splitlines()[-1].split()
    assert end.value.code == 0 and example[:4] == ["python", "-m", "darkmatter", command]
    seen: list[Any] = []

    def instead(arguments: Any) -> None:
        """Only see what was understood."""
        seen.append(arguments)

    instead.__name__ = f"_{command}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, instead.__name__, instead)
        assert cli.main(example[3:]) == 0
    assert len(seen) == 1


def test_every_command_has_its_example_tested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out.split("COMMAND\n")[1]
    assert re.findall(r"^    (\w+)", told, re.MULTILINE) == COMMANDS
