"""From an offset in a file to the chunk or hole that holds it, with a few list blobs in memory.

Used by several threads for one open file: what it caches is replaced as a whole, never changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

from casfs.digest import Digest
from casfs.errors import TreeError
from casfs.format.codec import MAX_PLAIN_BYTES
from casfs.format.tree import Node
from casfs.trees.content import HOLE, RECORD, parse_records

_LISTS = 8
"""Parsed lists that are kept for one open file; the biggest takes about a megabyte."""


class ExtentMap:
    """The extents of one regular file; `read` returns a list blob's verified bytes."""

    def __init__(self, node: Node, read: Callable[[bytes], bytes]) -> None:
        self._read = read
        self._levels = node.levels
        self._top = _ExtentList(node.content)
        if self._top.starts[-1] != node.size:
            raise TreeError("a file's chunks do not have the length that is recorded for it")
        self._lists: dict[bytes, _ExtentList] = {}
        self._last: tuple[int, int, _ExtentList] | None = None

    def find(self, offset: int) -> tuple[int, int, Digest | None]:
        """Return begin, length and digest (None: a hole) of the extent that holds an offset.

        The offset is below the file's size. Raises TreeError and whatever `read` raises.
        """
        last = self._last
        if last is not None and last[0] <= offset < last[1]:
            base, _, found = last
        else:
            base, found = 0, self._top
            for _ in range(self._levels):
                i = found.index(offset - base)
                length, digest = found.records[i]
                base += found.starts[i]
                found = self._list(digest, length)
            self._last = base, base + found.starts[-1], found
        i = found.index(offset - base)
        length, digest = found.records[i]
        if digest == HOLE:
            return base + found.starts[i], length, None
        if length > MAX_PLAIN_BYTES:
            raise TreeError("a content list tells an impossible chunk size")
        return base + found.starts[i], length, Digest(digest)

    def _list(self, digest: bytes, length: int) -> _ExtentList:
        known = self._lists.get(digest)
        if known is None:
            known = _ExtentList(self._read(digest))
            kept = dict(list(self._lists.items())[1 - _LISTS :])
            kept[digest] = known
            self._lists = kept
        if known.starts[-1] != length:
            raise TreeError("a content list does not have the length that is recorded for it")
        return known


def single_chunk(node: Node) -> Digest | None:
    """Return the digest of the one chunk that makes up a file, or None where there is more to it."""
    content = node.content
    if len(content) != RECORD.size or node.levels or node.size > MAX_PLAIN_BYTES:
        return None
    length, digest = RECORD.unpack(content)
    return Digest(digest) if length == node.size and digest != HOLE else None


class _ExtentList:
    """One list's records, and where each begins; the last start is the length of all."""

    __slots__ = ("records", "starts")

    def __init__(self, data: bytes) -> None:
        self.records = parse_records(data)
        self.starts = list(accumulate((length for length, _ in self.records), initial=0))

    def index(self, offset: int) -> int:
        return bisect_right(self.starts, offset, 0, len(self.starts) - 1) - 1
