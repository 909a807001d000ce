"""Reading directories: sorted and whole however they are split, and bounded whatever they claim."""

from __future__ import annotations

from itertools import pairwise

import pytest

from casfs.digest import digest_of
from casfs.errors import BlobError, TreeError
from casfs.format.tree import (
    MAX_DEPTH,
    MAX_PIECE_LEVELS,
    Branch,
    Leaf,
    Node,
    NodeType,
    PieceRef,
    TreeRef,
    encode_piece,
)
from casfs.paths import join
from casfs.trees.reader import TreeReader
from casfs.trees.writer import TreeSplit
from tests.support.builders import TreeFixture, entry, file, reference
from tests.support.stores import MemoryBlobs


def keep(memory: MemoryBlobs, piece: Leaf | Branch, nodes: int = 1) -> TreeRef:
    return TreeRef(memory.keep(encode_piece(piece)), nodes, 0, 0)


@pytest.fixture
def memory() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def trees() -> TreeFixture:
    return TreeFixture(TreeSplit(min_entries=3, max_entries=5))


@pytest.fixture
def split(trees: TreeFixture) -> Node:
    """A directory of 200 files that is split over several levels."""
    return trees.build({b"%03d" % number: b"" for number in range(0, 400, 2)})


def tree_of(node: Node) -> TreeRef:
    assert node.tree is not None
    return node.tree


class TestSplitDirectory:
    def test_a_split_directory_is_read_as_one_sorted_list(
        self, trees: TreeFixture, split: Node
    ) -> None:
        names = [node.name for node in trees.reader.nodes(tree_of(split))]
        assert names == [b"%03d" % number for number in range(0, 400, 2)]
        assert trees.reader.unsplit_entries(tree_of(split)) is None
        leaves = list(trees.reader.leaves(tree_of(split)))
        assert len(leaves) >= 40
        assert all(before[-1].name < behind[0].name for before, behind in pairwise(leaves))

    @pytest.mark.parametrize("after", [b"", b"000", b"001", b"199", b"200", b"398", b"399", b"z"])
    def test_a_listing_of_a_split_directory_continues_after_any_name(
        self, trees: TreeFixture, split: Node, after: bytes
    ) -> None:
        names = [node.name for node in trees.reader.nodes(tree_of(split), after)]
        assert names == [b"%03d" % n for n in range(0, 400, 2) if b"%03d" % n > after]

    def test_a_lookup_in_a_split_directory_reads_only_the_pieces_on_the_way(
        self, trees: TreeFixture, split: Node
    ) -> None:
        trees.reads.clear()
        found = next(trees.reader.nodes(tree_of(split), b"299"))
        assert found.name == b"300"
        assert len(trees.reads) <= MAX_PIECE_LEVELS + 3
        trees.reads.clear()
        assert trees.reader.lookup(tree_of(split), b"300") == found
        assert len(trees.reads) <= MAX_PIECE_LEVELS + 1

    def test_a_lookup_in_a_split_directory_finds_exactly_its_names(
        self, trees: TreeFixture, split: Node
    ) -> None:
        for number in range(400):
            found = trees.reader.lookup(tree_of(split), b"%03d" % number)
            assert (found is not None) is (number % 2 == 0)
        assert trees.reader.lookup(tree_of(split), b"") is None
        assert trees.reader.lookup(tree_of(split), b"\xff") is None

    def test_a_split_directory_can_be_read_as_pieces(self, trees: TreeFixture, split: Node) -> None:
        top = trees.reader.piece(tree_of(split))
        firsts = [part[0] for part in top if isinstance(part, tuple)]
        assert len(firsts) == len(top) > 1
        assert firsts[0] == b"000"

    def test_a_split_directory_yields_the_entries_before_a_lost_piece(
        self, trees: TreeFixture, split: Node
    ) -> None:
        leaves = list(trees.reader.leaves(tree_of(split)))
        lost = encode_piece(Leaf(leaves[20]))
        del trees.blobs[digest_of(lost)]
        seen: list[bytes] = []
        with pytest.raises(KeyError):
            for node in trees.reader.nodes(tree_of(split)):
                seen.append(node.name)
        assert seen == [node.name for leaf in leaves[:20] for node in leaf]


class TestTreePath:
    @pytest.fixture
    def root(self, trees: TreeFixture) -> Node:
        return trees.build({b"a": {b"b": {b"c": b"deep"}, b"f": b"file"}, b"\xff": b"", b"z": {}})

    def test_a_path_resolves_to_its_entry(self, trees: TreeFixture, root: Node) -> None:
        found = trees.reader.resolve(root, b"a/b/c")
        assert found is not None
        assert (found.name, found.size) == (b"c", 4)
        assert trees.reader.resolve(root, b"") is root
        assert trees.reader.resolve(root, b"/a//b/") == trees.reader.resolve(root, b"a/b")
        assert trees.reader.resolve(root, b"\xff") is not None

    @pytest.mark.parametrize("path", [b"b", b"a/c", b"a/f/x", b"z/x", b"a/b/c/d", b"..", b"."])
    def test_a_path_without_an_entry_resolves_to_none(
        self, trees: TreeFixture, root: Node, path: bytes
    ) -> None:
        assert trees.reader.resolve(root, path) is None

    def test_a_walk_yields_a_directory_before_its_entries(
        self, trees: TreeFixture, root: Node
    ) -> None:
        paths = [path for path, _ in trees.reader.walk(root)]
        assert paths == [b"a", b"a/b", b"a/b/c", b"a/f", b"z", b"\xff"]
        below = trees.reader.resolve(root, b"a")
        assert below is not None
        assert [path for path, _ in trees.reader.walk(below, b"x/y")] == [
            *(b"x/y/b", b"x/y/b/c", b"x/y/f")
        ]
        assert list(trees.reader.walk(file(b"f"))) == []

    def test_joining_a_name_to_the_root_adds_no_slash(self) -> None:
        assert join(b"", b"a") == b"a"
        assert join(b"a/b", b"c") == b"a/b/c"

    def test_a_walk_handles_thousands_of_nested_directories(self, trees: TreeFixture) -> None:
        node = trees.build({b"f": b""})
        for _ in range(MAX_DEPTH - 1):
            node = trees.build({b"d": node})
        paths = [path for path, _ in trees.reader.walk(node)]
        assert len(paths) == MAX_DEPTH
        assert paths[-1] == b"d/" * (MAX_DEPTH - 1) + b"f"
        assert trees.reader.resolve(node, paths[-1]) is not None

    def test_a_walk_refuses_directories_below_the_depth_bound(self, trees: TreeFixture) -> None:
        node = trees.build({b"f": b""})
        for _ in range(MAX_DEPTH):
            node = trees.build({b"d": node})
        with pytest.raises(TreeError, match="more than 4096 levels deep"):
            list(trees.reader.walk(node))


class TestHostileTree:
    def test_a_split_directory_with_unordered_pieces_is_refused(self, memory: MemoryBlobs) -> None:
        first = keep(memory, Leaf([file(b"m"), file(b"z")]))
        second = keep(memory, Leaf([file(b"n")]))
        ref = keep(memory, Branch([PieceRef(b"a", first), PieceRef(b"n", second)]))
        with pytest.raises(TreeError, match="pieces of a split directory are not in order"):
            list(TreeReader(memory.read).nodes(ref))

    def test_a_split_directory_with_a_name_in_two_pieces_is_refused(
        self, memory: MemoryBlobs
    ) -> None:
        leaf = keep(memory, Leaf([file(b"m")]))
        ref = keep(memory, Branch([PieceRef(b"a", leaf), PieceRef(b"m", leaf)]))
        with pytest.raises(TreeError, match="not in order"):
            list(TreeReader(memory.read).nodes(ref))

    def test_a_split_directory_with_empty_pieces_is_read(self, memory: MemoryBlobs) -> None:
        empty = keep(memory, Leaf([]), 0)
        full = keep(memory, Leaf([file(b"m")]))
        parts = [PieceRef(b"a", empty), PieceRef(b"m", full), PieceRef(b"n", empty)]
        ref = keep(memory, Branch(parts))
        reader = TreeReader(memory.read)
        assert [node.name for node in reader.nodes(ref)] == [b"m"]
        assert reader.lookup(ref, b"n") is None

    def test_a_directory_split_deeper_than_the_bound_is_refused(self, memory: MemoryBlobs) -> None:
        ref = keep(memory, Leaf([file(b"m")]))
        for _ in range(MAX_PIECE_LEVELS):
            ref = keep(memory, Branch([PieceRef(b"m", ref)]))
        reader = TreeReader(memory.read)
        assert [node.name for node in reader.nodes(ref)] == [b"m"]
        assert reader.lookup(ref, b"m") == file(b"m")
        ref = keep(memory, Branch([PieceRef(b"m", ref)]))
        with pytest.raises(TreeError, match="split more often"):
            list(reader.nodes(ref))
        with pytest.raises(TreeError, match="split more often"):
            reader.lookup(ref, b"m")

    def test_a_blob_that_is_no_tree_is_refused(self, memory: MemoryBlobs) -> None:
        ref = TreeRef(memory.keep(b"a chunk of a file"), 1, 0, 0)
        reader = TreeReader(memory.read)
        with pytest.raises(TreeError):
            list(reader.nodes(ref))
        with pytest.raises(TreeError):
            reader.unsplit_entries(ref)
        with pytest.raises(TreeError):
            reader.lookup(ref, b"m")
        with pytest.raises(TreeError):
            reader.piece(ref)

    def test_a_missing_tree_raises_the_error_of_the_store(self, memory: MemoryBlobs) -> None:
        lost = entry(b"", NodeType.DIRECTORY, tree=TreeRef(b"\x07" * 32, 1, 0, 0))
        with pytest.raises(BlobError):
            list(TreeReader(memory.read).walk(lost))

    def test_a_tree_with_a_wrong_summary_is_read_by_its_entries(self, trees: TreeFixture) -> None:
        node = trees.build({b"a": b"", b"b": b""})
        lying = TreeRef(reference(node), 1_000_000, 1 << 60, 1000)
        assert [found.name for found in trees.reader.nodes(lying)] == [b"a", b"b"]
