"""The page of promises names tests that exist, and no promise is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TypeGuard

import pytest

import casfs

PROJECT = Path(casfs.__file__).parent.parent
PAGE = (PROJECT / "PROMISES.md").read_text("utf-8")
NAMED = re.findall(r"`(tests/[^`]+)`", PAGE)


def names_in(path: Path) -> set[str]:
    """Return the tests of a module as `Class::test` or `test`."""
    found = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{one.name}" for one in node.body if _is_test(one)}
        elif _is_test(node):
            found.add(node.name)
    return found


def _is_test(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
        "test_"
    )


@pytest.mark.parametrize("name", sorted(set(NAMED)))
def test_every_test_that_is_named_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert (PROJECT / file).is_file()
    assert test in names_in(PROJECT / file)


def test_every_promise_names_a_test() -> None:
    promises, _, _ = PAGE.partition("## What these tests do not show")
    sentences = re.split(r"^- ", promises, flags=re.MULTILINE)[1:]
    assert len(sentences) > 50
    assert [sentence for sentence in sentences if "`tests/" not in sentence] == []


def test_every_fault_test_that_kills_or_damages_is_on_the_page() -> None:
    """A matrix that is added and that no promise speaks of would be looked for in vain."""
    files = {name.partition("::")[0] for name in NAMED}
    there = {str(path.relative_to(PROJECT)) for path in (PROJECT / "tests/fault").glob("test_*.py")}
    assert there - files == set()
