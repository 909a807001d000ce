"""Inode numbers by position: computed from the summaries in trees, the same at every mount.

A node's number is its parent's number, plus one, plus the number of nodes before it in that directory. To
find the node of a number, descend from the root with a binary search in each directory; no table grows
with the number of visited nodes. Hard links are the exception, since all names of a file must share a
number: theirs is a hash, and a table holds those that the kernel knows now.

Numbers of one mount (all below 2**63):

    1 … 2**31               directories and links of the view of a whole repository
    2**31 … 2**32           its `versions/`
    2**32 … 2**61           its snapshots, each in a range that the snapshot's id determines
    2**62 … 2**63           hard links

A mount of one snapshot has one range, which begins at 1, FUSE's number of the root.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from casfs.digest import digest_of
from casfs.errors import CasfsError, TreeError
from casfs.format.tree import (
    MAX_DEPTH,
    MAX_PIECE_LEVELS,
    HardLinkKey,
    Node,
    TreeRef,
    subtree_count,
)
from casfs.paths import join
from casfs_mount.tree_cache import TreeCache, TreePage

ROOT = 1
VERSIONS = 1 << 31
LISTINGS_END = 1 << 32
RANGES_END = 1 << 61
HARD_LINKS = 1 << 62

_LINK = struct.Struct("<QQQQQ")

_MAX_TRAIL = 16
_TRAIL_PAGE_BYTES = 128 * 1024
"""The pages that a trail holds beside the tree cache: up to 2 MiB."""


class StaleError(CasfsError):
    """An inode number belongs to no node of this mount, or to none any more."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"inode {self.number} is not in this mount"


class _Step(NamedTuple):
    """A leaf on the way to a node, with its first number, the first after it, and its directory's number."""

    begin: int
    end: int
    page: TreePage
    directory: int


class Numbering:
    """The inode numbers of one snapshot: `first` is the root's number, `end` the last number plus one.

    Safe to share between threads: the two fields that remember recent results are replaced as a whole.
    """

    def __init__(self, root: Node, first: int, tree_cache: TreeCache) -> None:
        self.root = root
        self.first = first
        self.end = first + subtree_count(root)
        self._tree_cache = tree_cache
        # The kernel sends several requests for the same node in a row.
        self._recent: tuple[int, Node] = first, root
        # The leaves on the way to the node that was searched last. A walk goes on near it, so that the next
        # search can begin at the deepest of them that contains its number.
        self._trail: tuple[_Step, ...] = ()

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError, WouldBlock and the errors of the read."""
        known, node = self._recent
        if known == number:
            return node
        if not self.first <= number < self.end:
            raise StaleError(number)
        trail = self._trail_to(number)
        if trail:
            begin, _, page, _ = trail[-1]
            i = page.index_of_position(number - begin)
            node = page.nodes[i]  # type: ignore[index]
            if page.starts[i] != number - begin:
                node = self._descend(node, begin + page.starts[i], number, trail, None)
        else:
            node = self._descend(self.root, self.first, number, trail, None)
        self._recent = number, node
        return node

    def _trail_to(self, number: int) -> tuple[_Step, ...]:
        """Return the part of the trail that leads to a number."""
        trail = self._trail
        for count in range(len(trail), 0, -1):
            step = trail[count - 1]
            if step.begin <= number < step.end:
                return trail[:count]
        return ()

    def path_to(self, number: int) -> list[tuple[int, Node]]:
        """Return the numbers and nodes on the path from the root to a number, both included."""
        if not self.first <= number < self.end:
            raise StaleError(number)
        steps = [(self.first, self.root)]
        self._descend(self.root, self.first, number, (), steps)
        return steps

    def parent(self, number: int) -> int:
        """Return the number of a node's directory; for the root, its own number."""
        trail = self._trail_to(number)
        if trail:
            step = trail[-1]
            position = number - step.begin
            if step.page.starts[step.page.index_of_position(position)] == position:
                return step.directory
        return self.path_to(number)[-2:][0][0]

    def path(self, number: int) -> bytes:
        """Return the path of the node with a number, relative to the root."""
        path = b""
        for _, node in self.path_to(number)[1:]:
            path = join(path, node.name)
        return path

    def child(self, number: int, directory: Node, name: bytes) -> tuple[int, Node] | None:
        """Return number and node of a directory's entry, None if the name does not exist."""
        ref = directory.tree
        base = number + 1
        for _ in range(MAX_PIECE_LEVELS + 1):
            if ref is None:
                return None
            page = self._tree_cache.get(ref)
            i = page.index_of_name(name)
            if i < 0:
                return None
            base += page.starts[i]
            if page.nodes is not None:
                return (base, page.nodes[i]) if page.firsts[i] == name else None
            ref = page.parts[i]  # type: ignore[index]
        raise _too_split()

    def entries(
        self, number: int, directory: Node, position: int = 0
    ) -> Iterator[tuple[int, Node, int]]:
        """Yield the entries of a directory from a position on: number, node and position after it.

        A position is 0 or one that was yielded; any other is rounded up to the next entry.
        """
        if directory.tree is None:
            return iter(())
        return self._entries(directory.tree, number + 1, position, number + 1, 0)

    def _entries(
        self, ref: TreeRef, base: int, position: int, origin: int, level: int
    ) -> Iterator[tuple[int, Node, int]]:
        if level > MAX_PIECE_LEVELS:
            raise _too_split()
        page = self._tree_cache.get(ref)
        starts = page.starts
        if position >= starts[-1]:
            return iter(())
        i = page.index_of_position(position) if position > 0 else 0
        shift = base - origin
        if page.nodes is not None:
            if starts[i] < position:
                i += 1
            ends = starts[i + 1 :]
            return zip(
                map(base.__add__, starts[i:-1]),
                page.nodes[i:],
                map(shift.__add__, ends) if shift else ends,
                strict=True,
            )
        parts: list[TreeRef] = page.parts  # type: ignore[assignment]
        return chain.from_iterable(
            self._entries(parts[k], base + starts[k], position - starts[k], origin, level + 1)
            for k in range(i, len(parts))
        )

    def _descend(
        self,
        node: Node,
        base: int,
        number: int,
        trail: tuple[_Step, ...],
        steps: list[tuple[int, Node]] | None,
    ) -> Node:
        """Return the node with a number at or below `node`, whose number is `base`.

        `trail` leads to `node`; `steps` receives what comes after it on the way.
        """
        for _ in range(MAX_DEPTH):
            if base == number:
                self._trail = trail
                return node
            ref = node.tree
            directory = base
            base += 1
            for _ in range(MAX_PIECE_LEVELS + 1):
                if ref is None:
                    raise StaleError(number)
                page = self._tree_cache.get(ref)
                i = page.index_of_position(number - base)
                if page.nodes is not None:
                    if page.weight <= _TRAIL_PAGE_BYTES:
                        step = _Step(base, base + page.starts[-1], page, directory)
                        trail = (*trail[-_MAX_TRAIL + 1 :], step)
                    base += page.starts[i]
                    node = page.nodes[i]
                    break
                base += page.starts[i]
                ref = page.parts[i]  # type: ignore[index]
            else:
                raise _too_split()
            if steps is not None:
                steps.append((base, node))
        raise TreeError("directories are nested more deeply than the format allows")


class InodeRanges:
    """Ranges of inode numbers that do not overlap; the key of each range determines where it begins.

    So the numbers of a snapshot do not depend on the other snapshots, unless two ranges collide. Not safe
    to share between threads without a lock.
    """

    def __init__(self, begin: int = LISTINGS_END, end: int = RANGES_END) -> None:
        self._begin = begin
        self._end = end
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def add(self, key: bytes, count: int) -> int:
        """Allocate a range of `count` numbers and return its first number; raise TreeError if none fits."""
        room = self._end - self._begin - count
        if room <= 0:
            raise TreeError("a snapshot has more entries than there are inode numbers")
        first = self._begin + int.from_bytes(key[:8], "big") % room
        while True:
            i = bisect_right(self._firsts, first)
            if i > 0 and self._ends[i - 1] > first:
                first = self._ends[i - 1]
            elif i < len(self._firsts) and self._firsts[i] < first + count:
                first = self._ends[i]
            elif first + count > self._end:
                first = self._begin
            else:
                break
        self._firsts.insert(i, first)
        self._ends.insert(i, first + count)
        return first

    def remove(self, first: int) -> None:
        """Release the range that begins at `first`."""
        i = bisect_right(self._firsts, first) - 1
        del self._firsts[i], self._ends[i]

    def find(self, number: int) -> int:
        """Return the first number of the range that contains a number; raise StaleError."""
        i = bisect_right(self._firsts, number) - 1
        if i < 0 or self._ends[i] <= number:
            raise StaleError(number)
        return self._firsts[i]


class HardLinks:
    """The positions of the hard links that the kernel knows, with its count of lookups for each.

    Used only by the event-loop thread, which computes a number and counts it in one step.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[int]] = {}

    def position(self, number: int) -> int:
        """Return the number by position of a hard link that the kernel knows; raise StaleError."""
        known = self._known.get(number)
        if known is None:
            raise StaleError(number)
        return known[0]

    def remember(self, number: int, position: int) -> None:
        """Count a reply that gave the kernel a number, whose node is at `position`."""
        known = self._known.get(number)
        if known is None:
            self._known[number] = [position, 1]
        else:
            known[1] += 1

    def forget(self, number: int, times: int) -> None:
        """Subtract `times` lookups that the kernel forgot; remove the number when none is left."""
        known = self._known.get(number)
        if known is not None:
            known[1] -= times
            if known[1] <= 0:
                del self._known[number]

    def __len__(self) -> int:
        return len(self._known)


def hard_link_number(first: int, key: HardLinkKey) -> int:
    """Return the inode number that all names of one stored file share in a snapshot.

    `first` is the first number of the snapshot's range.
    """
    device, inode, kind, rdev, content = key
    mask = (1 << 64) - 1
    head = _LINK.pack(first, device & mask, inode & mask, kind, rdev & mask)
    return HARD_LINKS | int.from_bytes(digest_of(head + content)[:8], "big") >> 2


def _too_split() -> TreeError:
    return TreeError("a directory is split into more levels than the format allows")
