"""CONTRIBUTING.md is a page for newcomers: what it points at is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
PAGE = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8")
DEFINITIONS = re.findall(r"`([\w/]+\.py): (\w+)`", PAGE)
FILES = set(re.findall(r"`([\w/]+/[\w./]*\.py)`", PAGE))


@pytest.mark.parametrize(("file", "name"), DEFINITIONS)
def test_a_definition_is_where_the_page_says(file: str, name: str) -> None:
    """At the top level, with a docstring."""
    tree = ast.parse((HOME / "darkmatter" / file).read_text(encoding="utf-8"))
    named = {node.name: ast.get_docstring(node) for node in tree.body
             if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert named.get(name), f"{file} defines {', '.join(named)}"


def test_the_files_that_it_names_are_there() -> None:
    assert len(DEFINITIONS) >= 10 and FILES
    missing = [file for file in FILES
               if not (HOME / file).exists() and not (HOME / "darkmatter" / file).exists()]
    assert not [file for file in missing if "NN" not in file]
