"""JSON that others wrote has one error for everything that can be wrong with it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import casfs
from casfs.json_document import InvalidJsonError, parse_json

PACKAGE = Path(casfs.__file__).parent


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a":1} x', b'{"\xff":1}', b'{"a":' + b"[" * 5000, b'{"a":"x"}', b"9" * 5000],
)
def test_anything_but_a_document_of_the_form_is_one_error(data: bytes) -> None:
    with pytest.raises(InvalidJsonError):
        parse_json(data, dict[str, int])


def test_a_document_of_the_form_is_returned_as_a_value() -> None:
    assert parse_json(b'{"a":1}', dict[str, int]) == {"a": 1}


def test_no_other_module_decodes_json() -> None:
    """A parser of its own forgets one of the errors: of bytes that are not UTF-8, or of deep nesting."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "json.loads",
                "json.load",
                "msgspec.json.decode",
                "msgspec.json.Decoder",
            ):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"json_document.py"}
