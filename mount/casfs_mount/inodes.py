"""Inode numbers by position: computed from the summaries in trees, the same at every mount.

A node's number is its parent's, plus one, plus the nodes before it in that directory. So a number leads
to its node by descending from the root with a binary search in each directory, and no table grows with
what was looked at. The exceptions are hard links, whose names must share a number: theirs comes from a
hash, and a table holds those that the kernel was told of and has not forgotten.

Numbers of one mount (all below 2**63):

    1 … 2**31               the whole-repository view's own directories and links
    2**31 … 2**32           its versions
    2**32 … 2**61           snapshots in that view, each a range that its id chooses
    2**62 … 2**63           hard links

A mount of one snapshot begins its only range at 1, which is what FUSE calls the root.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator

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


class StaleError(CasfsError):
    """A number leads to nothing in this mount (any more)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"inode {self.number} is not in this mount"


class Numbering:
    """The numbers of one snapshot's tree: `first` is the root's, `end` is one past the last node's."""

    def __init__(self, root: Node, first: int, pieces: TreeCache) -> None:
        self.root = root
        self.first = first
        self.end = first + subtree_count(root)
        self._pieces = pieces
        # Requests for one node come in a row.
        self._recent: tuple[int, Node] = first, root
        # The leaf that was searched last: first number, first number after it, itself, and the
        # number of the directory that it is of.
        self._last: tuple[int, int, TreePage, int] | None = None

    def node(self, number: int) -> Node:
        """Return the node with a number; raises StaleError, WouldBlock and what reading raises."""
        known, node = self._recent
        if known == number:
            return node
        last = self._last
        if last is not None and last[0] <= number < last[1]:
            piece = last[2]
            place = number - last[0]
            i = piece.index_of_position(place)
            node = piece.nodes[i]  # type: ignore[index]
            if piece.starts[i] != place:
                node = self._descend(node, last[0] + piece.starts[i], number, None)
        elif self.first <= number < self.end:
            node = self._descend(self.root, self.first, number, None)
        else:
            raise StaleError(number)
        self._recent = number, node
        return node

    def path_to(self, number: int) -> list[tuple[int, Node]]:
        """Return numbers and nodes from the root to a number, both ends included."""
        if not self.first <= number < self.end:
            raise StaleError(number)
        steps = [(self.first, self.root)]
        self._descend(self.root, self.first, number, steps)
        return steps

    def parent(self, number: int) -> int:
        """Return the number of the directory that holds a node; the root's is its own."""
        last = self._last
        if last is not None and last[0] <= number < last[1]:
            place = number - last[0]
            if last[2].starts[last[2].index_of_position(place)] == place:
                return last[3]
        return self.path_to(number)[-2:][0][0]

    def path(self, number: int) -> bytes:
        """Return the path below the root of the node with a number."""
        path = b""
        for _, node in self.path_to(number)[1:]:
            path = join(path, node.name)
        return path

    def child(self, number: int, directory: Node, name: bytes) -> tuple[int, Node] | None:
        """Return number and node of a directory's entry, or None where there is no such name."""
        ref = directory.tree
        base = number + 1
        for _ in range(MAX_PIECE_LEVELS + 1):
            if ref is None:
                return None
            piece = self._pieces.get(ref)
            i = piece.index_of_name(name)
            if i < 0:
                return None
            base += piece.starts[i]
            if piece.nodes is not None:
                return (base, piece.nodes[i]) if piece.firsts[i] == name else None
            ref = piece.parts[i]  # type: ignore[index]
        raise _too_split()

    def entries(
        self, number: int, directory: Node, place: int = 0
    ) -> Iterator[tuple[int, Node, int]]:
        """Yield number, node and the place after it of a directory's entries from a place on.

        A place is 0 at the beginning or one that was yielded; what is between two is rounded up.
        """
        if directory.tree is not None:
            yield from self._entries(directory.tree, number + 1, place, number + 1, 0)

    def _entries(
        self, ref: TreeRef, base: int, place: int, origin: int, level: int
    ) -> Iterator[tuple[int, Node, int]]:
        if level > MAX_PIECE_LEVELS:
            raise _too_split()
        piece = self._pieces.get(ref)
        starts = piece.starts
        if place >= starts[-1]:
            return
        i = piece.index_of_position(place) if place > 0 else 0
        shift = base - origin
        if piece.nodes is not None:
            if starts[i] < place:
                i += 1
            for k in range(i, len(piece.nodes)):
                yield base + starts[k], piece.nodes[k], shift + starts[k + 1]
            return
        for k in range(i, len(starts) - 1):
            part = piece.parts[k]  # type: ignore[index]
            yield from self._entries(part, base + starts[k], place - starts[k], origin, level + 1)

    def _descend(
        self, node: Node, base: int, number: int, steps: list[tuple[int, Node]] | None
    ) -> Node:
        for _ in range(MAX_DEPTH):
            if base == number:
                return node
            ref = node.tree
            directory = base
            base += 1
            for _ in range(MAX_PIECE_LEVELS + 1):
                if ref is None:
                    raise StaleError(number)
                piece = self._pieces.get(ref)
                i = piece.index_of_position(number - base)
                if piece.nodes is not None:
                    self._last = base, base + piece.starts[-1], piece, directory
                    base += piece.starts[i]
                    node = piece.nodes[i]
                    break
                base += piece.starts[i]
                ref = piece.parts[i]  # type: ignore[index]
            else:
                raise _too_split()
            if steps is not None:
                steps.append((base, node))
        raise TreeError("directories are nested more deeply than the format allows")


class InodeRanges:
    """Ranges of numbers that do not overlap; each is where its key wants it, if there is room.

    So a snapshot's numbers do not depend on the other snapshots, whatever comes and goes. Used by
    one thread at a time.
    """

    def __init__(self, begin: int = LISTINGS_END, end: int = RANGES_END) -> None:
        self._begin = begin
        self._end = end
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def add(self, key: bytes, count: int) -> int:
        """Return the first number of a new range of `count` numbers."""
        room = self._end - self._begin - count
        if room <= 0:
            raise TreeError("a snapshot has more entries than can be numbered")
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
        """Give a range back."""
        i = bisect_right(self._firsts, first) - 1
        del self._firsts[i], self._ends[i]

    def find(self, number: int) -> int:
        """Return the first number of the range that holds a number; raises StaleError."""
        i = bisect_right(self._firsts, number) - 1
        if i < 0 or self._ends[i] <= number:
            raise StaleError(number)
        return self._firsts[i]


class HardLinks:
    """Where the hard links are that the kernel knows, as long as it does.

    Used by the event loop's thread alone, which makes a number and counts it in one step.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[int]] = {}

    def place(self, number: int) -> int:
        """Return the number by position of a name that was told; raises StaleError."""
        known = self._known.get(number)
        if known is None:
            raise StaleError(number)
        return known[0]

    def remember(self, number: int, place: int) -> None:
        """Count that the kernel was told a number, which leads to `place`."""
        known = self._known.get(number)
        if known is None:
            self._known[number] = [place, 1]
        else:
            known[1] += 1

    def forget(self, number: int, times: int) -> None:
        """Count that the kernel forgot a number `times` times."""
        known = self._known.get(number)
        if known is not None:
            known[1] -= times
            if known[1] <= 0:
                del self._known[number]

    def __len__(self) -> int:
        return len(self._known)


def hard_link_number(first: int, key: HardLinkKey) -> int:
    """Return the number of all names of one stored file in the snapshot that begins at `first`."""
    device, inode, kind, rdev, content = key
    mask = (1 << 64) - 1
    head = _LINK.pack(first, device & mask, inode & mask, kind, rdev & mask)
    return HARD_LINKS | int.from_bytes(digest_of(head + content)[:8], "big") >> 2


def _too_split() -> TreeError:
    return TreeError("a directory is split more often than the format allows")
