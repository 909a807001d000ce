"""The promises and the threat model name tests that exist, and no promise or attack is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TypeGuard

import pytest

import casfs

PROJECT = Path(casfs.__file__).parent.parent
PROMISES = (PROJECT / "docs" / "promises.md").read_text("utf-8")
THREAT_MODEL = (PROJECT / "docs" / "threat-model.md").read_text("utf-8")
TEST_NAME = re.compile(r"`(tests/[^`]+)`")
NAMED = TEST_NAME.findall(PROMISES)


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


@pytest.mark.parametrize("name", sorted({*NAMED, *TEST_NAME.findall(THREAT_MODEL)}))
def test_every_test_that_is_named_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert (PROJECT / file).is_file()
    assert test in names_in(PROJECT / file)


def test_every_promise_names_a_test() -> None:
    promises, _, _ = PROMISES.partition("## What these tests do not show")
    sentences = re.split(r"^- ", promises, flags=re.MULTILINE)[1:]
    assert len(sentences) > 50
    assert [sentence for sentence in sentences if "`tests/" not in sentence] == []


def test_every_attack_in_the_threat_model_names_a_test_or_says_why_there_is_none() -> None:
    _, _, attacks = THREAT_MODEL.partition("| Attack | Result | Test |\n|---|---|---|\n")
    table, _, _ = attacks.partition("\n\n")
    tests = [row.strip("|").split("|")[2].strip() for row in table.splitlines()]
    assert len(tests) >= 10
    unproven = [test for test in tests if not TEST_NAME.match(test)]
    assert [test for test in unproven if not test.startswith("none: ")] == []
    assert len(unproven) <= 1


def test_every_attacker_has_a_row_whose_cannot_names_a_test() -> None:
    head = "| Attacker | Has | Can | Cannot | Test |\n|---|---|---|---|---|\n"
    rows = [
        row.strip("|").split(" | ")
        for table in THREAT_MODEL.split(head)[1:]
        for row in table.partition("\n\n")[0].splitlines()
    ]
    assert THREAT_MODEL.count("| Attacker |") == 2 and len(rows) >= 20
    assert [row[0] for row in rows if len(row) != 5 or not all(cell.strip() for cell in row)] == []
    assert [row[0] for row in rows if not TEST_NAME.match(row[4].strip())] == []
    actors = " ".join(row[0] for row in rows)
    for actor in ("differently the second time", "create-only", "Former recipient", "Other user"):
        assert actor in actors


def test_every_fault_test_that_kills_or_damages_is_on_the_page() -> None:
    """Require a promise for every file of fault tests, so that a reader finds them from this page."""
    files = {name.partition("::")[0] for name in NAMED}
    existing = {
        str(path.relative_to(PROJECT)) for path in (PROJECT / "tests/fault").glob("test_*.py")
    }
    assert existing - files == set()
