"""What a person names is never destroyed: directories, inputs, links, pipes, what a file held."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from darkmatter import __main__ as cli
from darkmatter import decomposition, outputs
from darkmatter.errors import DarkmatterError
from darkmatter.saes import references
from tests import tiny


def test_a_file_is_written_and_its_mode_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    outputs.write_json(path, {"a": 1})
    path.chmod(0o640)
    outputs.write_json(path, {"a": 2})
    assert path.read_text() == '{\n "a": 2\n}\n' and path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]


def test_links_and_pipes_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    outputs.write(tmp_path / "link", "words")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "words"
    os.mkfifo(tmp_path / "pipe")
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    outputs.write(tmp_path / "pipe", "words")
    reader.join(10)
    assert heard == ["words"] and (tmp_path / "pipe").is_fifo()


def test_what_was_there_stays_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*words: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DarkmatterError, match="cannot be written: No space left"):
        outputs.write(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_place_that_will_not_do_is_told_before_anything_is_computed(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decomposition, "decompose", lambda **words: pytest.fail("it was computed"))
    folder, text = tmp_path / "folder", tmp_path / "text.txt"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    text.write_text("words")
    sae, other = tmp_path / "sae", tmp_path / "other.txt"
    sae.mkdir()
    other.write_text("words")
    words = ["decompose", "--site", "blocks.0.hook_resid_post", "--sae", str(sae),
             "--corpus", str(text), option]
    for place, sentence in ((folder, "is a directory: give the name of a file in it"),
                            (text, "would be written over what is read"),
                            (sae / "cfg.json", "would be written over what is read"),
                            (other / "below", "cannot be written")):
        assert cli.main([*words, str(place)]) == 2
        assert sentence in capsys.readouterr().err
    assert (folder / "precious").read_text() == "mine" and text.read_text() == "words"


def test_an_export_replaces_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = {"one": tiny.loaded("one", tiny.topk()), "two": tiny.loaded("two", tiny.topk())}
    monkeypatch.setattr(references, "load_sae", lambda ref, preset: opened[ref])
    taken = tmp_path / "two"
    taken.mkdir()
    (taken / "weights").write_text("mine")
    with pytest.raises(DarkmatterError, match="two is there already, and is not written over"):
        references.export(tiny.preset(saes=("one", "two")), tmp_path)
    assert (taken / "weights").read_text() == "mine" and not (tmp_path / "one").exists()


def test_an_empty_name_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an SAE that is a directory: else no result could be written beside one's work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sae").mkdir()
    assert outputs.check("result.json", ["", "sae", "release:none"]) == Path("result.json")
    with pytest.raises(DarkmatterError, match="would be written over what is read"):
        outputs.check("sae/result.json", ["", "sae"])
