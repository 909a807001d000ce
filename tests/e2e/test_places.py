"""The table of the tests that run with a local repository only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.e2e.places import LOCAL, LOCAL_ONLY, chosen_places, local_only_reason, places_of


def names_in(module: Path) -> set[str]:
    """Return the names of a module, of its classes and of its tests as the table writes them."""
    found = {module.stem}
    for node in ast.parse(module.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(f"{module.stem}::{node.name}")
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{module.stem}::{node.name}::{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return found


def test_the_table_names_tests_that_exist() -> None:
    modules = Path(__file__).parent.glob("test_*.py")
    found = {name for module in modules for name in names_in(module)}
    assert set(LOCAL_ONLY) - found == set()


def test_a_reason_holds_for_all_tests_of_a_module_or_a_class() -> None:
    assert local_only_reason("test_remote", ["test_x"]) == LOCAL_ONLY["test_remote"]
    assert local_only_reason("test_restore", ["TestSelection", "test_x"]) is None
    for name, reason in LOCAL_ONLY.items():
        module, *names = name.split("::")
        assert local_only_reason(module, [*names, "test_x"]) == reason


def test_an_unknown_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASFS_PLACES", "s3 ftp")
    with pytest.raises(ValueError, match="names ftp"):
        chosen_places()
    monkeypatch.delenv("CASFS_PLACES")
    assert chosen_places() is None
    assert places_of("test_restore") == (LOCAL,)
