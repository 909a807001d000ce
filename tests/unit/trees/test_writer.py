"""Writing a directory: one tree, split where it is big, so that one new name rewrites one piece."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable
from itertools import islice

import pytest

from casfs.backup.parent import ParentCursor
from casfs.digest import Digest, digest_of
from casfs.errors import TreeError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind
from casfs.format.tree import (
    Branch,
    Leaf,
    Node,
    NodeExtra,
    NodeType,
    TreeRef,
    decode_piece,
    replace,
    subtree_summary,
)
from casfs.trees.reader import TreeReader
from casfs.trees.writer import (
    FORMAT_SPLIT,
    PIECE_MAX_BYTES,
    PIECE_MAX_ENTRIES,
    PIECE_MIN_ENTRIES,
    TreeSplit,
    TreeWriter,
)
from tests.support.builders import entry, file, flagged
from tests.support.stores import MemoryBlobs

HUGE = 100_000


SMALL = TreeSplit(min_entries=2, max_entries=4)
"""Pieces so small that a few thousand entries have branches of branches."""


def write(
    memory: MemoryBlobs, nodes: Iterable[Node], seed: int = 0, split: TreeSplit = FORMAT_SPLIT
) -> TreeRef:
    writer = TreeWriter(memory.put, digest_of, seed, split=split)
    for node in nodes:
        writer.add(node)
    return writer.finish()


def piece_of(memory: MemoryBlobs, ref: TreeRef) -> Leaf | Branch:
    return decode_piece(memory.read(Digest(ref.digest)))


def pieces_of(memory: MemoryBlobs, ref: TreeRef) -> list[Leaf | Branch]:
    """Return every piece of a directory, the top first."""
    piece = piece_of(memory, ref)
    found: list[Leaf | Branch] = [piece]
    if isinstance(piece, Branch):
        for part in piece.pieces:
            found += pieces_of(memory, part.tree)
    return found


def pieces_on_the_way(memory: MemoryBlobs, ref: TreeRef) -> list[Leaf | Branch]:
    """Return the pieces from the top of a directory down to its first leaf."""
    found = [piece_of(memory, ref)]
    while isinstance(found[-1], Branch):
        found.append(piece_of(memory, found[-1].pieces[0].tree))
    return found


def numbered(count: int) -> list[Node]:
    return [file(b"file %08d" % number, inode=number + 1) for number in range(count)]


@pytest.fixture(scope="module")
def huge() -> list[Node]:
    """A directory as big as they come: entries of all kinds with random names."""
    names = random.Random(1)
    chosen = sorted({names.randbytes(names.randint(5, 20)).hex().encode() for _ in range(HUGE)})
    assert len(chosen) == HUGE
    return [file(name, inode=number + 1) for number, name in enumerate(chosen)]


@pytest.fixture
def memory() -> MemoryBlobs:
    return MemoryBlobs()


class TestSmallDirectory:
    @pytest.mark.parametrize("count", [0, 1, 2, 100, PIECE_MIN_ENTRIES - 1])
    def test_a_small_directory_is_one_leaf(self, memory: MemoryBlobs, count: int) -> None:
        nodes = numbered(count)
        ref = write(memory, nodes)
        assert len(memory.blobs) == 1
        assert piece_of(memory, ref) == Leaf(nodes)

    def test_a_tree_reference_has_the_summary_of_what_is_below(self, memory: MemoryBlobs) -> None:
        below = TreeRef(b"\x07" * 32, 5, 100, 1)
        nodes = [
            file(b"a", b"12345"),
            entry(b"b", NodeType.DIRECTORY, tree=below),
            flagged(file(b"c", b"123")),
        ]
        ref = write(memory, nodes)
        assert (ref.nodes, ref.total_bytes, ref.flagged) == subtree_summary(nodes) == (8, 108, 2)

    def test_equal_entries_have_the_same_tree(self, memory: MemoryBlobs) -> None:
        assert write(memory, numbered(10)) == write(MemoryBlobs(), numbered(10))
        assert write(memory, numbered(10)) != write(memory, numbered(11))


class TestEntryOrder:
    @pytest.mark.parametrize("names", [[b"b", b"a"], [b"a", b"a"], [b""]])
    def test_entries_in_wrong_order_are_refused(
        self, memory: MemoryBlobs, names: list[bytes]
    ) -> None:
        with pytest.raises(TreeError, match="comes after"):
            write(memory, map(file, names))


class TestLargeDirectory:
    def test_a_large_directory_is_read_whole_and_in_order(
        self, memory: MemoryBlobs, huge: list[Node]
    ) -> None:
        ref = write(memory, huge)
        assert list(TreeReader(memory.read).nodes(ref)) == huge
        assert (ref.nodes, ref.total_bytes, ref.flagged) == (HUGE, 0, 0)

    def test_pieces_of_a_large_directory_are_within_the_bounds_and_have_correct_summaries(
        self, memory: MemoryBlobs, huge: list[Node]
    ) -> None:
        ref = write(memory, huge)
        top, *leaves = pieces_of(memory, ref)
        assert isinstance(top, Branch)
        sizes = [len(leaf.nodes) for leaf in leaves if isinstance(leaf, Leaf)]
        assert len(sizes) == len(leaves) == len(top.pieces)
        assert all(PIECE_MIN_ENTRIES <= size <= PIECE_MAX_ENTRIES for size in sizes[:-1])
        assert 2000 < HUGE / len(sizes) < 4500
        assert [part.tree.nodes for part in top.pieces] == sizes
        firsts = [leaf.nodes[0].name for leaf in leaves if isinstance(leaf, Leaf)]
        assert [part.first for part in top.pieces] == firsts

    @pytest.mark.parametrize("position", [0, 1, HUGE // 3, HUGE // 2, HUGE - 2])
    def test_one_new_name_rewrites_one_leaf_and_the_branch(
        self, memory: MemoryBlobs, huge: list[Node], position: int
    ) -> None:
        write(memory, huge)
        before = dict(memory.blobs)
        new = replace(huge[position], name=huge[position].name + b" copy")
        ref = write(memory, [*huge[: position + 1], new, *huge[position + 1 :]])
        fresh = [data for digest, data in memory.blobs.items() if digest not in before]
        assert ref.nodes == HUGE + 1
        assert len(fresh) == 2
        assert {type(decode_piece(data)) for data in fresh} == {Leaf, Branch}

    def test_one_changed_or_removed_name_rewrites_one_leaf_and_the_branch(
        self, memory: MemoryBlobs, huge: list[Node]
    ) -> None:
        write(memory, huge)
        for nodes in (
            [*huge[:5000], replace(huge[5000], mtime_ns=1), *huge[5001:]],
            huge[:70_000] + huge[70_001:],
        ):
            before = dict(memory.blobs)
            write(memory, nodes)
            assert len(memory.blobs) - len(before) == 2

    def test_another_seed_splits_a_large_directory_elsewhere(
        self, memory: MemoryBlobs, huge: list[Node]
    ) -> None:
        first, second = MemoryBlobs(), MemoryBlobs()
        write(first, huge, seed=0)
        write(second, huge, seed=1)
        assert len(first.blobs.keys() & second.blobs.keys()) == 0

    def test_a_directory_is_split_at_the_greatest_number_of_entries_whatever_the_names(
        self, memory: MemoryBlobs
    ) -> None:
        split = TreeSplit(mask=(1 << 32) - 1)
        ref = write(memory, numbered(2 * PIECE_MAX_ENTRIES + 5), split=split)
        sizes = [len(p.nodes) for p in pieces_of(memory, ref) if isinstance(p, Leaf)]
        assert sizes == [PIECE_MAX_ENTRIES, PIECE_MAX_ENTRIES, 5]

    def test_a_directory_of_exactly_one_full_piece_has_no_branch(self, memory: MemoryBlobs) -> None:
        ref = write(memory, numbered(PIECE_MIN_ENTRIES), split=TreeSplit(mask=0))
        assert [type(piece) for piece in pieces_of(memory, ref)] == [Leaf]

    def test_a_directory_with_large_attributes_is_split_by_size(self, memory: MemoryBlobs) -> None:
        big = NodeExtra(((b"user.big", bytes(60_000)),))
        nodes = [replace(node, extra=big) for node in numbered(300)]
        ref = write(memory, nodes)
        leaves = [piece for piece in pieces_of(memory, ref) if isinstance(piece, Leaf)]
        assert len(leaves) > 3
        assert max(map(len, memory.blobs.values())) < PIECE_MAX_BYTES + 70_000 < MAX_PLAIN_BYTES
        assert list(TreeReader(memory.read).nodes(ref)) == nodes

    def test_a_directory_with_long_contents_is_split_by_size(self, memory: MemoryBlobs) -> None:
        nodes = [replace(node, content=bytes(40 * 32), size=9) for node in numbered(9000)]
        write(memory, nodes)
        assert max(map(len, memory.blobs.values())) < PIECE_MAX_BYTES + 2000

    def test_writing_a_directory_needs_memory_for_one_piece(self, huge: list[Node]) -> None:
        ended: list[int] = []
        tracemalloc.start()
        try:
            writer = TreeWriter(lambda kind, digest, data: ended.append(len(data)), digest_of, 0)
            for node in islice(huge, 40_000):
                writer.add(node)
            writer.finish()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert sum(ended) > 2_000_000
        assert peak < 2_000_000


class TestTreeLevels:
    """Branches of branches, which take millions of entries unless pieces are made small."""

    @pytest.mark.parametrize("count", [1, 2, 4, 5, 16, 17, 64, 65, 300, 5000])
    def test_a_tree_of_any_number_of_levels_yields_every_entry(
        self, memory: MemoryBlobs, count: int
    ) -> None:
        nodes = numbered(count)
        ref = write(memory, nodes, split=SMALL)
        reader = TreeReader(memory.read)
        assert list(reader.nodes(ref)) == nodes
        assert ref.nodes == count
        assert all(reader.lookup(ref, node.name) == node for node in nodes)

    def test_a_tree_of_five_thousand_entries_in_small_pieces_has_several_levels(
        self, memory: MemoryBlobs
    ) -> None:
        ref = write(memory, numbered(5000), split=SMALL)
        assert 6 <= len(pieces_on_the_way(memory, ref)) <= 9

    def test_one_new_name_rewrites_one_piece_on_each_level(self, memory: MemoryBlobs) -> None:
        split = TreeSplit(min_entries=2, max_entries=4, mask=1)
        depth = len(pieces_on_the_way(memory, write(memory, numbered(3000), split=split)))
        before = dict(memory.blobs)
        nodes = numbered(3000)
        nodes.insert(1500, replace(nodes[1499], name=nodes[1499].name + b"+"))
        write(memory, nodes, split=split)
        assert len(before) > 1000
        assert 5 <= depth <= len(memory.blobs) - len(before) <= 4 * depth

    def test_a_tree_beyond_the_level_bound_is_refused(self, memory: MemoryBlobs) -> None:
        split = TreeSplit(min_entries=2, max_entries=4, max_levels=3)
        write(memory, numbered(4**3), split=split)
        with pytest.raises(TreeError, match="more entries than the format can hold"):
            write(memory, numbered(4**5), split=split)


class TestUnchangedDirectory:
    def test_an_unchanged_directory_keeps_its_tree_and_stores_nothing(
        self, memory: MemoryBlobs
    ) -> None:
        nodes = numbered(50)
        ref = write(memory, nodes)
        before = dict(memory.blobs)
        again = TreeWriter(memory.put, digest_of, 0, ref, nodes)
        for node in nodes:
            again.add(node)
        assert again.finish() is ref
        assert memory.blobs == before

    def test_a_directory_with_any_changed_entry_gets_another_tree(
        self, memory: MemoryBlobs
    ) -> None:
        nodes = numbered(50)
        ref = write(memory, nodes)
        for now in (nodes[:-1], [*nodes, file(b"z")], [replace(nodes[0], mode=0), *nodes[1:]]):
            again = TreeWriter(memory.put, digest_of, 0, ref, nodes)
            for node in now:
                again.add(node)
            new = again.finish()
            assert new != ref
            assert list(TreeReader(memory.read).nodes(new)) == now

    def test_an_unchanged_split_directory_stores_nothing_new(
        self, memory: MemoryBlobs, huge: list[Node]
    ) -> None:
        ref = write(memory, huge)
        before = len(memory.blobs)
        again = TreeWriter(memory.put, digest_of, 0, ref, None)
        for node in huge:
            again.add(node)
        assert again.finish() == ref
        assert len(memory.blobs) == before
        assert set(memory.kinds) == {BlobKind.TREE}


class TestKeptLeaves:
    """Leaves of the previous tree whose entries are kept are neither encoded nor stored again."""

    SPLIT = TreeSplit(min_entries=3, max_entries=12, mask=3)

    def write_again(
        self,
        memory: MemoryBlobs,
        previous: TreeRef,
        nodes: list[Node],
        split: TreeSplit,
        tree_seed: int = 0,
    ) -> tuple[TreeRef, list[bytes]]:
        """Return the new tree of a directory, and what was stored for it, as a backup writes it."""
        cursor = ParentCursor(TreeReader(memory.read), previous)
        stored: list[bytes] = []

        def put(kind: BlobKind, digest: Digest, data: bytes) -> None:
            stored.append(data)
            memory.put(kind, digest, data)

        writer = TreeWriter(put, digest_of, tree_seed, previous, cursor.single, split=split)
        writer.reuse_leaves(cursor.leaf_from)
        for node in nodes:
            before = cursor.match(node.name)
            writer.add(before if before is not None and before == node else node)
        return writer.finish(), stored

    def edited(self, rng: random.Random, nodes: list[Node]) -> list[Node]:
        """Return entries with some removed, changed, inserted and appended."""
        found = [file(b"zz %d" % number) for number in range(rng.choice([0, 0, 1, 20]))]
        for node in nodes:
            roll = rng.random()
            if roll > 0.03:
                found.append(replace(node, mtime_ns=1) if roll < 0.06 else node)
            if roll > 0.97:
                found.append(file(node.name + b".new", inode=9))
        return [node for _, node in sorted({node.name: node for node in found}.items())]

    @pytest.mark.parametrize("seed", range(60))
    def test_a_changed_split_directory_is_split_as_if_no_leaf_had_been_kept(
        self, memory: MemoryBlobs, seed: int
    ) -> None:
        rng = random.Random(seed)
        with_xattrs = NodeExtra(xattrs=((b"user.a", b"1"),))
        nodes = [
            replace(node, extra=with_xattrs) if rng.random() < 0.05 else node
            for node in numbered(rng.randrange(1, 150))
        ]
        ref = write(memory, nodes, split=self.SPLIT)
        for _ in range(5):
            nodes = self.edited(rng, nodes)
            ref, _ = self.write_again(memory, ref, nodes, self.SPLIT)
            assert ref == write(MemoryBlobs(), nodes, split=self.SPLIT)

    @pytest.mark.parametrize("seed", range(20))
    def test_a_directory_stays_whole_where_a_removal_of_a_recipient_changed_the_seed(
        self, memory: MemoryBlobs, seed: int
    ) -> None:
        rng = random.Random(seed)
        nodes = numbered(rng.randrange(20, 200))
        ref = write(memory, nodes, seed=1, split=self.SPLIT)
        for tree_seed in (2, 2, 3):
            nodes = self.edited(rng, nodes)
            ref, _ = self.write_again(memory, ref, nodes, self.SPLIT, tree_seed)
            assert list(TreeReader(memory.read).nodes(ref)) == nodes
            assert ref.nodes == len(nodes)
            leaves = [piece for piece in pieces_of(memory, ref) if isinstance(piece, Leaf)]
            assert max(len(leaf.nodes) for leaf in leaves) <= self.SPLIT.max_entries

    def test_an_unchanged_split_directory_stores_only_its_branches(
        self, memory: MemoryBlobs
    ) -> None:
        nodes = numbered(1000)
        previous = write(memory, nodes, split=self.SPLIT)
        ref, stored = self.write_again(memory, previous, nodes, self.SPLIT)
        assert ref == previous
        assert stored and all(isinstance(decode_piece(data), Branch) for data in stored)

    def test_one_changed_name_encodes_one_leaf_again(self, memory: MemoryBlobs) -> None:
        nodes = numbered(1000)
        previous = write(memory, nodes, split=self.SPLIT)
        nodes[500] = replace(nodes[500], size=3)
        _, stored = self.write_again(memory, previous, nodes, self.SPLIT)
        assert sum(isinstance(decode_piece(data), Leaf) for data in stored) == 1

    def test_leaves_without_a_count_of_xattrs_are_stored_again_with_one(
        self, memory: MemoryBlobs
    ) -> None:
        nodes = numbered(100)
        previous = write(memory, nodes, split=self.SPLIT)
        cursor = ParentCursor(TreeReader(memory.read), previous)
        writer = TreeWriter(
            memory.put, digest_of, 0, previous, counts_xattrs=True, split=self.SPLIT
        )
        writer.reuse_leaves(cursor.leaf_from)
        for node in nodes:
            writer.add(cursor.match(node.name) or node)
        assert writer.finish().xattrs == 0
