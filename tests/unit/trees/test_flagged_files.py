"""Flagged files are found by descending only where a summary says that there are any."""

from __future__ import annotations

import pytest

from casfs.errors import TreeError
from casfs.format.tree import MAX_DEPTH, CaptureState, Node, NodeType, replace
from casfs.trees.reader import flagged_below, flagged_files, is_flagged
from tests.support.builders import Plan, TreeFixture, entry, file, flagged, reference


def names(trees: TreeFixture, root: Node, path: bytes = b"") -> list[bytes]:
    return [found for found, _ in flagged_files(trees.reader, root, path)]


def test_flagged_files_are_found_at_every_depth_and_in_order() -> None:
    trees = TreeFixture()
    root = trees.build(
        {
            b"a": {b"b": {b"deep": flagged(file(b""))}, b"stable": b"x"},
            b"also": replace(file(b"", b"x"), state=CaptureState.APPENDED),
            b"log": flagged(file(b"", b"x")),
            b"z": {b"last": flagged(file(b""))},
        }
    )
    assert names(trees, root) == [b"a/b/deep", b"log", b"z/last"]
    assert names(trees, root, b"home/me") == [
        b"home/me/a/b/deep",
        b"home/me/log",
        b"home/me/z/last",
    ]
    assert all(is_flagged(node) for _, node in flagged_files(trees.reader, root))


def test_a_directory_without_flagged_files_is_not_read() -> None:
    trees = TreeFixture()
    clean = trees.build({b"deeper": {b"file": b"x"}})
    root = trees.build({b"clean": clean, b"other": {b"file": flagged(file(b""))}})
    assert names(trees, root) == [b"other/file"]
    assert reference(clean) not in trees.reads
    assert len(trees.reads) == 2


def test_an_unflagged_tree_is_not_read() -> None:
    trees = TreeFixture()
    root = trees.build({b"file": b"x", b"folder": {b"file": b"y"}})
    assert names(trees, root) == []
    assert trees.reads == []


def test_only_pieces_with_flagged_files_of_a_split_directory_are_read() -> None:
    trees = TreeFixture()
    plan: dict[bytes, object] = {b"%06d" % number: file(b"") for number in range(30_000)}
    plan[b"020000"] = flagged(file(b""))
    root = trees.build(plan)
    pieces = trees.reader.piece(root.tree) if root.tree is not None else []
    assert len(pieces) > 4, "the directory is not split"
    trees.reads.clear()
    assert names(trees, root) == [b"020000"]
    assert len(trees.reads) == 2


def test_a_file_named_itself_is_listed_only_if_it_is_flagged() -> None:
    trees = TreeFixture()
    assert names(trees, flagged(file(b"log")), b"var/log") == [b"var/log"]
    assert names(trees, file(b"log"), b"var/log") == []


def test_the_capture_state_of_an_entry_that_is_no_file_is_ignored() -> None:
    assert not is_flagged(entry(b"fifo", NodeType.FIFO, state=CaptureState.CHANGED))


def test_the_number_below_an_entry_is_known_without_reading() -> None:
    trees = TreeFixture()
    root = trees.build({b"a": flagged(file(b"")), b"b": {b"c": flagged(file(b""))}, b"d": b""})
    assert flagged_below(root) == 2
    assert flagged_below(flagged(file(b"x"))) == 1
    assert flagged_below(file(b"x")) == 0
    assert trees.reads == []


def test_directories_deeper_than_the_format_allows_are_refused() -> None:
    trees = TreeFixture()
    plan: Plan = {b"file": flagged(file(b""))}
    node = trees.build(plan)
    for _ in range(MAX_DEPTH - 1):
        node = trees.build({b"d": node})
    assert len(names(trees, node)) == 1
    with pytest.raises(TreeError, match="deep"):
        names(trees, trees.build({b"d": node}))
