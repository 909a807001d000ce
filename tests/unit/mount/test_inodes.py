"""Numbers of inodes by position: from a number to its node and back, with no table in between."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import cast

import pytest
from casfs_mount.inodes import (
    HARD_LINKS,
    LISTINGS_END,
    HardLinks,
    InodeRanges,
    Numbering,
    StaleError,
    hard_link_number,
)
from casfs_mount.tree_cache import TreeCache, TreePage

from casfs.digest import Digest, digest_of
from casfs.errors import TreeError
from casfs.format.tree import Leaf, Node, NodeType, TreeRef, encode_piece
from tests.support.builders import Plan, TreeFixture, entry


def numbering(
    trees: TreeFixture, root: Node, first: int = 1, cache_bytes: int = 1 << 20
) -> Numbering:
    return Numbering(root, first, TreeCache(trees.read, cache_bytes))


def walked(numbers: Numbering) -> dict[int, bytes]:
    """Return path by number for everything that listing finds, the root first."""
    found = {numbers.first: b""}
    stack = [(numbers.first, numbers.root, b"")]
    while stack:
        number, directory, above = stack.pop()
        for below, node, _ in numbers.entries(number, directory):
            assert below not in found
            found[below] = above + b"/" + node.name if above else node.name
            if node.tree is not None:
                stack.append((below, node, found[below]))
    return found


class Counted:
    """A tree cache that notes what is asked for."""

    def __init__(self, cache: TreeCache, gets: list[TreeRef]) -> None:
        self._cache = cache
        self._gets = gets

    def get(self, ref: TreeRef) -> TreePage:
        self._gets.append(ref)
        return self._cache.get(ref)


SMALL: Plan = {
    b"a": b"1",
    b"b": {b"c": b"2", b"d": {b"e": b"3", b"f": {}}, b"g": b"4"},
    b"h": b"5",
}

BIG: Plan = {
    b"before": b"",
    b"crowd": {b"%06d" % n: {b"in": b""} if n % 1000 == 7 else b"" for n in range(20_000)},
    b"then": {b"after": b""},
}


def test_inode_numbers_follow_the_order_of_a_walk() -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(SMALL))
    assert walked(numbers) == {
        1: b"",
        2: b"a",
        3: b"b",
        4: b"b/c",
        5: b"b/d",
        6: b"b/d/e",
        7: b"b/d/f",
        8: b"b/g",
        9: b"h",
    }
    assert numbers.end == 10


@pytest.mark.parametrize("cache_bytes", [1, 1 << 24], ids=["cold", "warm"])
def test_an_inode_number_leads_to_its_node_path_and_parent(cache_bytes: int) -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(SMALL), 100, cache_bytes)
    paths = walked(numbers)
    by_path = {path: number for number, path in paths.items()}
    for number, path in random.Random(1).sample(sorted(paths.items()), len(paths)):
        assert numbers.path(number) == path
        assert numbers.node(number).name == path.rpartition(b"/")[2]
        assert numbers.parent(number) == by_path[path.rpartition(b"/")[0]]


def test_inode_numbers_of_a_split_directory_are_found_in_few_reads() -> None:
    trees = TreeFixture()
    root = trees.build(BIG)
    numbers = numbering(trees, root, cache_bytes=1 << 26)
    paths = walked(numbers)
    assert len(paths) == 1 + 1 + 1 + 20_000 + 20 + 2
    trees.reads.clear()
    fresh = numbering(trees, root)
    number = next(number for number, path in paths.items() if path == b"crowd/015007/in")
    assert fresh.node(number).name == b"in"
    assert len(trees.reads) <= 4
    for number, path in random.Random(2).sample(sorted(paths.items()), 500):
        assert numbers.node(number).name == path.rpartition(b"/")[2]
        assert numbers.path(number) == path


def test_a_walk_reads_only_one_tree_for_each_directory() -> None:
    trees = TreeFixture()
    plan: Plan = {
        b"%d" % a: {b"%d" % b: {b"in": {b"file": b""}} for b in range(5)} for a in range(5)
    }
    numbers = numbering(trees, trees.build(plan), cache_bytes=1 << 26)
    paths = walked(numbers)
    gets: list[TreeRef] = []
    cache = numbers._tree_cache
    numbers._tree_cache = cast(TreeCache, Counted(cache, gets))
    for number in sorted(paths):
        assert numbers.node(number).name == paths[number].rpartition(b"/")[2]
        numbers.parent(number)
    assert len(gets) <= 1 + 5 + 25 + 25


def test_a_deep_path_with_large_directories_is_remembered_in_bounded_memory() -> None:
    trees = TreeFixture()
    plan: Plan = {b"leaf": b""}
    for _ in range(40):
        plan = {**{b"%0250d" % n: b"" for n in range(700)}, b"z": plan}
    numbers = numbering(trees, trees.build(plan), cache_bytes=1)
    for number in range(numbers.end - 1, 0, -997):
        numbers.node(number)
        assert sum(step.page.weight for step in numbers._trail) <= 2 << 20


def test_lookup_and_listing_give_the_same_inode_number() -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(BIG), cache_bytes=1 << 26)
    crowd_number, crowd = numbers.child(1, numbers.root, b"crowd") or (0, numbers.root)
    listed = {node.name: number for number, node, _ in numbers.entries(crowd_number, crowd)}
    for name in (b"000000", b"000007", b"000008", b"010000", b"019999"):
        found = numbers.child(crowd_number, crowd, name)
        assert found is not None and found[0] == listed[name] and found[1].name == name
    for name in (b"", b"!", b"0000000", b"zzz"):
        assert numbers.child(crowd_number, crowd, name) is None


def test_a_listing_continues_from_any_position_that_it_gave() -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(BIG), cache_bytes=1 << 26)
    crowd_number, crowd = numbers.child(1, numbers.root, b"crowd") or (0, numbers.root)
    whole = list(numbers.entries(crowd_number, crowd))
    assert len(whole) == 20_000
    for i in (0, 1, 7, 8, 5_000, 19_998, 19_999):
        rest = numbers.entries(crowd_number, crowd, whole[i][2])
        assert next(rest, None) == (whole[i + 1] if i + 1 < len(whole) else None)


def test_a_position_inside_a_subtree_is_rounded_up() -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(SMALL))
    assert [node.name for _, node, _ in numbers.entries(1, numbers.root, 2)] == [b"h"]


def test_the_position_at_the_end_gives_nothing_more() -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(SMALL))
    *_, (_, _, end) = numbers.entries(1, numbers.root)
    assert list(numbers.entries(1, numbers.root, end)) == []
    assert list(numbers.entries(1, numbers.root, end + 1000)) == []


def test_an_inode_number_outside_the_range_is_stale() -> None:
    trees = TreeFixture()
    numbers = numbering(trees, trees.build(SMALL), 100)
    for number in (0, 99, 109, 1 << 40):
        with pytest.raises(StaleError):
            numbers.node(number)
        with pytest.raises(StaleError):
            numbers.path(number)


def test_a_tree_with_a_wrong_summary_is_refused() -> None:
    """Otherwise numbers of one directory would run into those of the next."""
    trees = TreeFixture()
    leaf = encode_piece(Leaf([entry(b"one"), entry(b"two")]))
    trees.blobs[digest_of(leaf)] = leaf
    liar = entry(b"", NodeType.DIRECTORY, tree=TreeRef(digest_of(leaf), 1, 0, 0))
    numbers = numbering(trees, liar)
    with pytest.raises(TreeError, match="differs from the number recorded"):
        list(numbers.entries(1, liar))


def test_a_cached_tree_referenced_with_different_counts_is_refused() -> None:
    trees = TreeFixture()
    honest = trees.build({b"a": b"", b"b": b""})
    assert honest.tree is not None
    cache = TreeCache(trees.read)
    cache.get(honest.tree)
    with pytest.raises(TreeError):
        cache.get(TreeRef(honest.tree.digest, 5, 0, 0))


def test_the_tree_cache_stays_in_its_bounds_and_keeps_what_is_used() -> None:
    trees = TreeFixture()
    references = [trees.build({b"%d" % n: b""}).tree for n in range(100)]
    one = TreeCache(trees.read)
    assert references[0] is not None
    one.get(references[0])
    cache = TreeCache(trees.read, 10 * one.cached_bytes)
    for tree in references:
        assert tree is not None
        cache.get(tree)
        cache.get(references[0])
        assert cache.cached_bytes <= 10 * one.cached_bytes
    assert trees.reads.count(Digest(references[0].digest)) == 2


class TestInodeRanges:
    def test_inode_ranges_do_not_overlap_whatever_the_keys(self) -> None:
        ranges = InodeRanges(100, 1100)
        random_bytes = random.Random(3).randbytes
        taken = [(ranges.add(random_bytes(32), 10), 10) for _ in range(60)]
        taken.append((ranges.add(bytes(32), 30), 30))
        taken.append((ranges.add(b"\xff" * 32, 30), 30))
        ordered = sorted(taken)
        assert ordered[0][0] >= 100
        assert ordered[-1][0] + ordered[-1][1] <= 1100
        for (first, count), (following, _) in pairwise(ordered):
            assert first + count <= following
        for first, count in taken:
            assert ranges.find(first) == ranges.find(first + count - 1) == first

    def test_an_inode_range_depends_on_its_key_alone_where_there_is_room(self) -> None:
        one, other = InodeRanges(), InodeRanges()
        keys = [digest_of(b"%d" % n) for n in range(20)]
        first = {key: one.add(key, 1000 + n) for n, key in enumerate(keys)}
        again = {key: other.add(key, 1000 + n) for n, key in reversed(list(enumerate(keys)))}
        assert first == again
        assert min(first.values()) >= LISTINGS_END

    def test_a_removed_inode_range_leaves_nothing_behind(self) -> None:
        ranges = InodeRanges()
        first = ranges.add(digest_of(b"x"), 100)
        ranges.remove(first)
        for number in (first, first + 50):
            with pytest.raises(StaleError):
                ranges.find(number)
        assert ranges.add(digest_of(b"x"), 100) == first

    def test_an_inode_range_that_is_too_large_is_refused(self) -> None:
        with pytest.raises(TreeError):
            InodeRanges().add(bytes(32), 1 << 61)


class TestHardLinks:
    def test_a_hard_link_number_is_unique_to_file_and_snapshot(self) -> None:
        number = hard_link_number(1, (7, 42, 1, 0, b"x"))
        assert number == hard_link_number(1, (7, 42, 1, 0, b"x")) >= HARD_LINKS
        others = {
            hard_link_number(1, (7, 43, 1, 0, b"x")),
            hard_link_number(1, (8, 42, 1, 0, b"x")),
            hard_link_number(1, (7, 42, 4, 0, b"x")),
            hard_link_number(1, (7, 42, 1, 1, b"x")),
            hard_link_number(1, (7, 42, 1, 0, b"y")),
            hard_link_number(2, (7, 42, 1, 0, b"x")),
        }
        assert len(others | {number}) == 7
        assert number < 1 << 63

    def test_a_hard_link_is_known_until_it_was_forgotten_as_often_as_remembered(self) -> None:
        links = HardLinks()
        links.remember(HARD_LINKS + 5, 17)
        links.remember(HARD_LINKS + 5, 99)
        assert links.position(HARD_LINKS + 5) == 17
        links.forget(HARD_LINKS + 5, 1)
        assert links.position(HARD_LINKS + 5) == 17
        links.forget(HARD_LINKS + 5, 1)
        assert len(links) == 0
        with pytest.raises(StaleError):
            links.position(HARD_LINKS + 5)
        links.forget(HARD_LINKS + 5, 3)

    def test_a_hard_link_number_accepts_device_numbers_of_any_sign_and_size(self) -> None:
        assert hard_link_number(1 << 61, (-1, 1 << 70, 6, 1 << 64, b"")) >= HARD_LINKS
