"""Where the keys of a TOML document are, compared with what the standard library's parser reads."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.config.lines import KeyPath, find_key_lines

# Values that look like other parts of a document.
DECOYS = [
    '"[a] # b = 1 \\" }"',
    "'[a] \\'",
    '"""\nkey = 1\n[table]\n"" \\""" # no comment\n"""',
    '"""x"""""',
    "'''\nkey = 1 ''\n[[x]]\n'''",
    "''''x'''''",
    "1979-05-27T07:32:00Z",
    "-1.5e3",
    "true",
    '""',
    "''",
]


def paths_of(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if path:
        yield path, value
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


KEY_STYLES = ["a{}", "-{}-", '"a.{}"', '"q\\"]{}"', "'lit # = {}'", '"\\u00e9{}"', '"é{}"']

blanks = st.sampled_from(["", " ", "\t"])
breaks = st.sampled_from(["", "\n", "\n\n  ", " # [x] = 1 '\"\n"])

# "@" becomes the number of its line.
flat_values = st.one_of(st.just("@"), st.sampled_from([v for v in DECOYS if "\n" not in v]))


def inline_tables(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(st.sampled_from(KEY_STYLES), values), max_size=3)
    return pairs.map(
        lambda found: (
            "{ "
            + ", ".join(f"{style.format(n)} = {v}" for n, (style, v) in enumerate(found))
            + " }"
        )
    )


def arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(st.tuples(breaks, values, breaks), max_size=4)
    return st.tuples(items, breaks).map(
        lambda found: "[" + ",".join("".join(item) for item in found[0]) + found[1] + "]"
    )


values = st.one_of(
    st.recursive(flat_values, lambda inner: st.one_of(inline_tables(inner), arrays(inner))),
    st.sampled_from(DECOYS),
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    lines = []
    serial = itertools.count()

    def key() -> str:
        return draw(st.sampled_from(KEY_STYLES)).format(next(serial))

    for position in range(draw(st.integers(0, 3))):
        if position:
            name, blank = key(), draw(blanks)
            if draw(st.booleans()):
                lines.append(f"[{blank}{name}.{key()} . {key()}]{blank}")
            else:
                lines += [f"[[{blank}{name}]]{blank}"] * 2 + [f"[{name}.{key()}]"]
        for _ in range(draw(st.integers(0, 3))):
            lines.append(draw(st.sampled_from(["", "# c = 1", "   "])))
            dotted = ".".join(key() for _ in range(draw(st.integers(1, 2))))
            lines.append(f"{draw(blanks)}{dotted}{draw(blanks)}={draw(blanks)}{draw(values)}")
    text = "\n".join(lines)
    return "\n".join(
        line.replace("@", str(number)) for number, line in enumerate(text.split("\n"), 1)
    )


@given(documents())
def test_every_key_of_a_random_document_is_found_on_its_line(text: str) -> None:
    expected = dict(paths_of(tomllib.loads(text)))
    lines = find_key_lines(text)
    assert set(lines) == set(expected)
    for path, value in expected.items():
        if type(value) is int:
            assert lines[path] == value, path


def test_keys_in_tables_arrays_of_tables_and_inline_tables_are_found() -> None:
    text = (
        "top = 1\n[a.b]\nc = { d = 2,\n e = [\n 3,\n {f = 4}] }\n".replace(",\n e", ", e")
        + "[[list]]\nx = 5\n[[list]]\nx.y = 6\n[list.below]\nz = 7\n"
    )
    tomllib.loads(text)
    assert find_key_lines(text) == {
        ("top",): 1,
        ("a",): 2,
        ("a", "b"): 2,
        ("a", "b", "c"): 3,
        ("a", "b", "c", "d"): 3,
        ("a", "b", "c", "e"): 3,
        ("a", "b", "c", "e", 0): 4,
        ("a", "b", "c", "e", 1): 5,
        ("a", "b", "c", "e", 1, "f"): 5,
        ("list",): 6,
        ("list", 0): 6,
        ("list", 0, "x"): 7,
        ("list", 1): 8,
        ("list", 1, "x"): 9,
        ("list", 1, "x", "y"): 9,
        ("list", 1, "below"): 10,
        ("list", 1, "below", "z"): 11,
    }


@pytest.mark.parametrize("value", DECOYS)
def test_a_value_that_looks_like_a_table_hides_no_key_after_it(value: str) -> None:
    text = f"first = {value}\nlast = 1\n"
    tomllib.loads(text)
    assert find_key_lines(text) == {("first",): 1, ("last",): text.count("\n")}


def test_an_empty_document_has_no_keys() -> None:
    assert find_key_lines("") == {}
    assert find_key_lines("# nothing\n\n") == {}
