"""Files that a person names: looked at before anything is computed, and replacing nothing else.

What the cache makes is written by ``cache.atomic``; that may replace what it finds, this may not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import DarkmatterError


def check(path: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """The file to write, ~ expanded.

    Raises DarkmatterError where it is a directory, one of the ``inputs`` or inside one, or cannot
    be written.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DarkmatterError(f"{path} is a directory: give the name of a file in it.")
    # What is read stays; an empty name is no input, and not this directory.
    real = path.resolve()
    for read in (Path(name).expanduser().resolve() for name in inputs if str(name)):
        if read.exists() and (real == read or read in real.parents):
            raise DarkmatterError(f"{path} would be written over what is read ({read}): give "
                                  "another place.")
    # A new file needs a directory that may be written to, the nearest that is there already.
    there = path if path.exists() else next(parent for parent in real.parents if parent.exists())
    if not os.access(there, os.W_OK) or not (path.exists() or there.is_dir()):
        raise DarkmatterError(f"{path} cannot be written: {there} does not allow it. Give another "
                              "place.")
    return path


def new_folder(path: str | Path) -> Path:
    """A directory to make. Raises DarkmatterError where something is there already."""
    path = Path(path).expanduser()
    if path.exists() or path.is_symlink():
        raise DarkmatterError(f"{path} is there already, and is not written over: remove it, or "
                              "give another place.")
    return path


def write(path: str | Path, text: str) -> None:
    """Write a text to a file, through links and into pipes.

    What was in the file stays until all of the new is there. Raises DarkmatterError as ``check``
    does, and where the disk refuses.
    """
    path = check(path)
    try:
        if path.exists() and not path.is_file():  # a pipe, or a device
            path.write_text(text, encoding="utf-8")
            return
        real = path.resolve()
        real.parent.mkdir(parents=True, exist_ok=True)
        beside = real.with_name(f".{os.getpid()}-{real.name}")
        try:
            beside.write_text(text, encoding="utf-8")
            if real.exists():
                shutil.copymode(real, beside)
            beside.replace(real)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise DarkmatterError(f"{path} cannot be written: {error.strerror}. Give another place."
                              ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value that JSON can hold, as ``write`` does."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
