"""Files as people bring them: a configuration that is whole, weights that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import DarkmatterError

POINTER = b"version https://git-lfs"  # what git leaves of a large file that was not fetched


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which may begin with a byte-order mark.

    Raises DarkmatterError where there is no such file, or no whole object in it.
    """
    present(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DarkmatterError(f"{path} holds no whole JSON object; copy it again.")
    return value


def present(path: Path) -> Path:
    """The same path. Raises DarkmatterError where there is no file, or git-lfs did not fetch it."""
    if not path.is_file():
        raise DarkmatterError(f"There is no {path.name} in {path.parent}.")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DarkmatterError(f"{path} is a git-lfs pointer, not the file itself; fetch it: "
                                  "git lfs pull")
    return path
