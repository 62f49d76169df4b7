"""The cache: complete files only, damage detected, the disk's refusals told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from darkmatter import cache
from darkmatter.errors import DarkmatterError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.array(7, np.int64)}
    cache.save_arrays(tmp_path / "x.safetensors", **arrays)
    back = cache.load_arrays(tmp_path / "x.safetensors")
    assert back is not None
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("harm", ["flip", "cut", "no checksum", "garbled checksum"])
def test_a_damaged_file_is_removed_with_a_warning(tmp_path: Path, harm: str) -> None:
    path, side = tmp_path / "x.safetensors", tmp_path / "x.safetensors.sha256"
    cache.save_arrays(path, a=np.ones(100))
    whole = path.read_bytes()
    if harm == "no checksum":
        side.unlink()
    elif harm == "garbled checksum":
        side.write_bytes(b"\xff\xfe")
    else:
        path.write_bytes(whole[:-1] if harm == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load_arrays(path) is None
    assert not path.exists()
    assert cache.load_arrays(path) is None  # now simply missing: no warning


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyError), cache.atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with cache.atomic(path) as temporary:
        temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "new"


def test_what_a_killed_writer_left_goes_when_it_is_a_day_old(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".01234560-a.txt", ".01234561-a.txt",
                                                      ".01234562-b.txt"))
    for path in (old, young, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (0, 0))
    with cache.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert not old.exists()
    assert young.exists() and other.exists()


def test_a_directory_is_atomic_too(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with cache.atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)
    with pytest.raises(KeyError), cache.atomic(tmp_path / "folder") as temporary:
        temporary.mkdir()
        raise KeyError
    assert [folder.name for folder in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_text() == "two"


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(DarkmatterError, match="disk is full"):
        cache.save_arrays(tmp_path / "x.safetensors", a=np.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DARKMATTER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DarkmatterError, match="DARKMATTER_CACHE"):
        cache.root()
    with pytest.raises(DarkmatterError, match="cannot be written"):
        cache.save_arrays(tmp_path / "file" / "x.safetensors", a=np.ones(3))


def test_keys_depend_on_content_not_on_order() -> None:
    assert cache.key(a=1, b=[2, "x"]) == cache.key(b=[2, "x"], a=1) != cache.key(a=1, b=[2, "y"])
    assert len(cache.key(a=Path("x"))) == 16


def test_a_lock_keeps_another_process_waiting(tmp_path: Path) -> None:
    code = "from darkmatter import cache\nwith cache.lock('it'): print('in', flush=True)"
    with cache.lock("it"):
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        other = subprocess.Popen([sys.executable, "-c", code], **both)
        assert other.stderr is not None
        assert other.stderr.readline() == "Waiting for another process that is busy with it.\n"
        time.sleep(0.3)
        assert other.poll() is None
    assert other.communicate(timeout=30)[0] == "in\n"


@pytest.mark.parametrize("harm", ["", "flip", "lost", "unsealed"])
def test_a_sealed_folder_is_whole_or_made_again(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "folder"
    assert not cache.intact(folder)
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")
    if harm != "unsealed":
        cache.seal(folder)
    if harm == "flip":
        (folder / "a").write_text("c")
    if harm == "lost":
        (folder / "b").unlink()
    if harm:
        with pytest.warns(UserWarning, match="damaged"):
            assert not cache.intact(folder)
        assert not folder.exists()
    else:
        assert cache.intact(folder)
