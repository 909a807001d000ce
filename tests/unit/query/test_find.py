"""Finding is right for every snapshot, and reads a tree that holds nothing only once."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.digest import Digest
from casfs.errors import BlobError
from casfs.format.node_types import TYPES_BY_LETTER
from casfs.format.tree import Node, NodeType
from casfs.monitor import ProblemKind, RecordingMonitor
from casfs.query.find import Finder, Query
from tests.support.builders import Plan, TreeFixture, entry, file, flagged, reference


def finder(trees: TreeFixture, *query: Any, **conditions: Any) -> Finder:
    return Finder(trees.reader, Query(*query, **conditions), RecordingMonitor())


def found(which: Finder, root: Node, path: bytes = b"") -> list[bytes]:
    return [at for at, _ in which.find(root, path)]


TREE: Plan = {
    b"Report.txt": b"1",
    b"docs": {b"caf\xc3\xa9": b"2", b"report.pdf": b"3", b"report.txt": b"4"},
    b"link": entry(b"", NodeType.SYMLINK, content=b"docs"),
    b"report.d": {b"x": b"5"},
}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query("report.txt"), [b"docs/report.txt"]),
        (Query("report.*"), [b"docs/report.pdf", b"docs/report.txt", b"report.d"]),
        (Query("report.txt", ignore_case=True), [b"Report.txt", b"docs/report.txt"]),
        (Query("caf?"), [b"docs/caf\xc3\xa9"]),
        (Query("[rR]eport.txt"), [b"Report.txt", b"docs/report.txt"]),
        (Query("docs/*.txt"), [b"docs/report.txt"]),
        (Query("/docs/*.txt"), [b"docs/report.txt"]),
        (Query("docs/r*"), [b"docs/report.pdf", b"docs/report.txt"]),
        (Query("*/x"), [b"report.d/x"]),
        (Query("report"), []),
        (Query("report.*", kinds=frozenset([TYPES_BY_LETTER["d"]])), [b"report.d"]),
        (Query("*", kinds=frozenset([TYPES_BY_LETTER["l"]])), [b"link"]),
        (Query(kinds=frozenset([NodeType.DIRECTORY])), [b"docs", b"report.d"]),
    ],
    ids=str,
)
def test_a_query_finds_what_fits_and_nothing_else(query: Query, expected: list[bytes]) -> None:
    trees = TreeFixture()
    root = trees.build(TREE)
    assert found(Finder(trees.reader, query, RecordingMonitor()), root) == expected


def test_an_empty_query_finds_everything_in_the_order_of_a_walk() -> None:
    trees = TreeFixture()
    root = trees.build(TREE)
    everything = list(trees.reader.walk(root, b"top"))
    assert list(finder(trees).find(root, b"top")) == everything


def test_a_path_pattern_is_held_against_the_path_in_the_snapshot() -> None:
    trees = TreeFixture()
    docs = trees.build(TREE[b"docs"])
    assert found(finder(trees, "home/*/report.txt"), docs, b"home/me") == [b"home/me/report.txt"]
    assert found(finder(trees, "me/*/report.txt"), docs, b"home/me") == []


def test_a_name_that_is_not_utf_8_is_found_by_itself_and_by_a_wildcard() -> None:
    trees = TreeFixture()
    root = trees.build({b"caf\xe9": b""})
    exact = b"caf\xe9".decode("utf-8", "surrogateescape")
    for pattern in (exact, "caf?", "c*"):
        assert found(finder(trees, pattern), root) == [b"caf\xe9"]


def test_only_flagged_files_are_found_when_only_they_are_asked_for() -> None:
    trees = TreeFixture()
    clean = trees.build({b"a.log": b"1"})
    root = trees.build(
        {b"clean": clean, b"var": {b"a.log": flagged(file(b"")), b"b": flagged(file(b""))}}
    )
    assert found(finder(trees, only_flagged=True), root) == [b"var/a.log", b"var/b"]
    assert found(finder(trees, "*.log", only_flagged=True), root) == [b"var/a.log"]
    assert reference(clean) not in trees.reads


def test_a_root_that_is_a_file_is_looked_at_itself() -> None:
    trees = TreeFixture()
    assert found(finder(trees, "*.log"), file(b"a.log"), b"var/a.log") == [b"var/a.log"]
    assert found(finder(trees, "var/*.log"), file(b"a.log"), b"var/a.log") == [b"var/a.log"]
    assert found(finder(trees, "*.txt"), file(b"a.log"), b"var/a.log") == []


def test_a_tree_that_holds_nothing_is_not_read_again_in_the_next_snapshot() -> None:
    trees = TreeFixture()
    barren = trees.build({b"deeper": {b"file": b"x"}})
    first = trees.build({b"barren": barren, b"docs": {b"report": b"1"}})
    second = trees.build({b"docs": {b"report": b"1"}, b"moved": barren})
    searching = finder(trees, "report")
    assert found(searching, first) == [b"docs/report"]
    trees.reads.clear()
    assert found(searching, second) == [b"docs/report"]
    assert reference(barren) not in trees.reads
    assert len(trees.reads) == 2, "the root and docs hold something"


def test_a_tree_that_was_moved_is_looked_through_again_for_a_path() -> None:
    trees = TreeFixture()
    docs = trees.build({b"report": b"1"})
    searching = finder(trees, "new/*")
    assert found(searching, trees.build({b"old": docs})) == []
    assert found(searching, trees.build({b"new": docs})) == [b"new/report"]
    trees.reads.clear()
    assert found(searching, trees.build({b"old": docs, b"x": b""})) == []
    assert reference(docs) not in trees.reads


def test_pieces_of_a_split_directory_are_remembered_one_by_one() -> None:
    trees = TreeFixture()
    plan: dict[bytes, object] = {b"%06d" % number: file(b"") for number in range(30_000)}
    plan[b"020000.txt"] = file(b"")
    searching = finder(trees, "*.txt")
    assert found(searching, trees.build(plan)) == [b"020000.txt"]
    assert len(trees.reads) > 4, "the directory is not split"
    trees.reads.clear()
    assert found(searching, trees.build(plan)) == [b"020000.txt"]
    assert len(trees.reads) == 2


def test_a_finder_remembers_a_bounded_number_of_trees() -> None:
    trees = TreeFixture()
    root = trees.build({b"a": {b"x": b""}, b"b": {b"y": b""}, b"c": {b"hit": b""}})
    searching = Finder(trees.reader, Query("hit"), RecordingMonitor(), max_remembered=1)
    assert found(searching, root) == [b"c/hit"]
    first = list(trees.reads)
    trees.reads.clear()
    assert found(searching, root) == [b"c/hit"]
    assert len(first) - len(trees.reads) == 1


def test_find_reports_a_damaged_directory_once_and_searches_the_others() -> None:
    trees = TreeFixture()
    bad = trees.build({b"hit": b"", b"other": b""})
    root = trees.build({b"bad": bad, b"good": {b"hit": b""}})

    def read(digest: Digest) -> bytes:
        if digest == reference(bad):
            raise BlobError(digest, "it is damaged")
        return trees.blobs[digest]

    monitor = RecordingMonitor()
    searching = Finder(type(trees.reader)(read), Query("hit"), monitor)
    for _ in range(2):
        assert found(searching, root) == [b"good/hit"]
    (problem,) = monitor.problems
    assert (problem.kind, problem.path) == (ProblemKind.DAMAGED, b"bad")


_names = st.sampled_from([b"a", b"b", b"ab", b"ba"])
_plans: st.SearchStrategy[Plan] = st.recursive(
    st.dictionaries(_names, st.just(b""), max_size=3),
    lambda below: st.dictionaries(_names, st.one_of(st.just(b""), below), max_size=3),
    max_leaves=12,
)


@given(st.lists(_plans, min_size=1, max_size=4), st.sampled_from(["a", "?b", "a/*", "*/b", "b*"]))
def test_the_same_is_found_as_by_looking_at_every_entry_of_every_snapshot(
    plans: list[Plan], pattern: str
) -> None:
    trees = TreeFixture()
    searching = finder(trees, pattern)
    for plan in plans:
        root = trees.build(plan)
        expected = [
            path
            for path, node in trees.reader.walk(root)
            if fnmatch.fnmatchcase((path if "/" in pattern else node.name).decode(), pattern)
        ]
        assert found(searching, root) == expected
