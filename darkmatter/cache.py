"""Files made once: where they live, what they are called, how a damaged one is caught.

A file gets its name only when it is complete. A reader that finds one damaged removes it, warns and
asks for it to be made again, because whatever lies in the cache can be.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from platformdirs import user_cache_dir
from safetensors.numpy import load_file, save_file

from .errors import DarkmatterError

DAY = 24 * 3600  # seconds


def root() -> Path:
    """The cache: the directory ``DARKMATTER_CACHE``, else the platform's; made if missing."""
    path = Path(os.environ.get("DARKMATTER_CACHE") or user_cache_dir("darkmatter")).expanduser()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def key(**parts: object) -> str:
    """16 hex digits that change with any part: what JSON can hold, others by their ``str``."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_KNOWN: dict[tuple[int, ...], str] = {}  # digests that this process knows, by the file as it was


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; read once a process, as long as the file does not change."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        version = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if version not in _KNOWN:
            _KNOWN[version] = hashlib.file_digest(file, "sha256").hexdigest()
    return _KNOWN[version]


LARGE = 2**28  # bytes; a larger file is known by its size and time, not by its content


def fingerprint(path: Path) -> str:
    """Changes with the content of a file, or of any file in a directory; '' where there is none."""
    if path.is_dir():
        files = {str(file.relative_to(path)): fingerprint(file)
                 for file in sorted(path.rglob("*")) if file.is_file()}
        return key(files=files)
    if not path.is_file():
        return ""
    stat = path.stat()
    large = stat.st_size >= LARGE
    return key(size=stat.st_size, changed=stat.st_mtime_ns) if large else sha256(path)


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock on what ``name`` says in words, so that one process at a time makes it."""
    folder = root() / "locks"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        held = FileLock(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock")
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(f"Waiting for another process that is busy with {name}.", file=sys.stderr,
                  flush=True)
            held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, for a file or directory that is renamed to it.

    It is removed instead when something fails. What a killed writer left of the same path goes once
    it is a day old: a live one may still be writing. Raises DarkmatterError when the disk is full
    or the place cannot be written to.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")  # writers look at the suffix
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".????????-{glob.escape(path.name)}"):
            with suppress(FileNotFoundError):  # its writer was alive, and has finished
                if time.time() - left.stat().st_mtime > DAY:
                    _remove(left)
        try:
            yield temporary
            if path.is_dir():
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as a JSON file, which is there whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays of any plain dtype as safetensors, with the sha256 in ``PATH.sha256``."""
    side = path.with_name(path.name + ".sha256")
    with atomic(path) as temporary:
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()},
                  temporary)
        digest = sha256(temporary)
        side.unlink(missing_ok=True)
    with atomic(side) as temporary:
        temporary.write_text(digest + "\n")


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read what ``save_arrays`` wrote; None when missing or damaged (removed, with a warning)."""
    side = path.with_name(path.name + ".sha256")
    if not path.exists():
        return None
    try:
        if side.read_text().strip() == sha256(path):
            return load_file(path)
    except (OSError, ValueError):
        pass  # no readable checksum: the writer was cut off between the two files
    warnings.warn(f"The cached file {path} is damaged; it was removed and is made again.",
                  stacklevel=2)
    path.unlink(missing_ok=True)
    side.unlink(missing_ok=True)
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusals into a sentence; safetensors hides their number in its text."""
    try:
        yield
    except Exception as error:
        inner = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(inner[1]) if inner else 0)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DarkmatterError(f"The disk is full: {path} could not be written. Free some space "
                                  "or set DARKMATTER_CACHE to another disk, and run again."
                                  ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DarkmatterError(f"{path} cannot be written: {os.strerror(number)}. Give another "
                                  "place; DARKMATTER_CACHE moves the cache.") from error
        raise


def seal(folder: Path) -> None:
    """Write ``sha256.json``, the digest of every other file: what ``intact`` checks."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / "sha256.json").write_text(json.dumps(digests))


def intact(folder: Path) -> bool:
    """Whether ``folder`` is there as it was sealed; a damaged one is removed, with a warning."""
    if not folder.exists():
        return False
    try:
        digests = json.loads((folder / "sha256.json").read_text())
        if digests and all(sha256(folder / name) == digest for name, digest in digests.items()):
            return True
    except (OSError, ValueError):
        pass
    warnings.warn(f"The cached folder {folder} is damaged; it was removed and is made again.",
                  stacklevel=2)
    shutil.rmtree(folder)
    return False
