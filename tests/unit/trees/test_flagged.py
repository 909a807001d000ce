"""Flagged files are found by descending only where a summary says that there are any."""

from __future__ import annotations

import pytest

from casfs.errors import TreeError
from casfs.format.tree import MAX_DEPTH, CaptureState, Node, NodeType, replace
from casfs.trees.reader import flagged_below, flagged_files, is_flagged
from tests.support.builders import Grove, Plan, entry, file, flagged, reference


def names(grove: Grove, root: Node, path: bytes = b"") -> list[bytes]:
    return [found for found, _ in flagged_files(grove.trees, root, path)]


def test_flagged_files_are_found_at_every_depth_and_in_order() -> None:
    grove = Grove()
    root = grove.plant(
        {
            b"a": {b"b": {b"deep": flagged(file(b""))}, b"stable": b"x"},
            b"also": replace(file(b"", b"x"), state=CaptureState.APPENDED),
            b"log": flagged(file(b"", b"x")),
            b"z": {b"last": flagged(file(b""))},
        }
    )
    assert names(grove, root) == [b"a/b/deep", b"log", b"z/last"]
    assert names(grove, root, b"home/me") == [
        b"home/me/a/b/deep",
        b"home/me/log",
        b"home/me/z/last",
    ]
    assert all(is_flagged(node) for _, node in flagged_files(grove.trees, root))


def test_a_directory_without_flagged_files_is_not_read() -> None:
    grove = Grove()
    clean = grove.plant({b"deeper": {b"file": b"x"}})
    root = grove.plant({b"clean": clean, b"other": {b"file": flagged(file(b""))}})
    assert names(grove, root) == [b"other/file"]
    assert reference(clean) not in grove.reads
    assert len(grove.reads) == 2


def test_an_unflagged_tree_is_not_read() -> None:
    grove = Grove()
    root = grove.plant({b"file": b"x", b"folder": {b"file": b"y"}})
    assert names(grove, root) == []
    assert grove.reads == []


def test_only_pieces_with_flagged_files_of_a_split_directory_are_read() -> None:
    grove = Grove()
    plan: dict[bytes, object] = {b"%06d" % number: file(b"") for number in range(30_000)}
    plan[b"020000"] = flagged(file(b""))
    root = grove.plant(plan)
    pieces = grove.trees.piece(root.tree) if root.tree is not None else []
    assert len(pieces) > 4, "the directory is not split"
    grove.reads.clear()
    assert names(grove, root) == [b"020000"]
    assert len(grove.reads) == 2


def test_a_file_named_itself_is_listed_only_if_it_is_flagged() -> None:
    grove = Grove()
    assert names(grove, flagged(file(b"log")), b"var/log") == [b"var/log"]
    assert names(grove, file(b"log"), b"var/log") == []


def test_the_capture_state_of_an_entry_that_is_no_file_is_ignored() -> None:
    assert not is_flagged(entry(b"fifo", NodeType.FIFO, state=CaptureState.CHANGED))


def test_the_number_below_an_entry_is_known_without_reading() -> None:
    grove = Grove()
    root = grove.plant({b"a": flagged(file(b"")), b"b": {b"c": flagged(file(b""))}, b"d": b""})
    assert flagged_below(root) == 2
    assert flagged_below(flagged(file(b"x"))) == 1
    assert flagged_below(file(b"x")) == 0
    assert grove.reads == []


def test_directories_deeper_than_the_format_allows_are_refused() -> None:
    grove = Grove()
    plan: Plan = {b"file": flagged(file(b""))}
    node = grove.plant(plan)
    for _ in range(MAX_DEPTH - 1):
        node = grove.plant({b"d": node})
    assert len(names(grove, node)) == 1
    with pytest.raises(TreeError, match="deep"):
        names(grove, grove.plant({b"d": node}))
