"""Reading one open file: from an offset to verified bytes.

A range is answered with views of the decoded chunks that hold it, and of zeros for holes. Who reads in
sequence has the next chunks decoded ahead. Several threads may read the same open file; the one that
must not wait gets WouldBlock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Protocol

from casfs.digest import Digest
from casfs.errors import CasfsError, TreeError
from casfs.format.codec import MAX_PLAIN_BYTES
from casfs.format.tree import Node
from casfs.trees.content import EXTENT, HOLE, parse_records
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.damage_log import UnreadableError
from casfs_mount.event_loop_guard import WouldBlock

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
    if len(content) != EXTENT.size or node.levels or node.size > MAX_PLAIN_BYTES:
        return None
    length, digest = EXTENT.unpack(content)
    return Digest(digest) if length == node.size and digest != HOLE else None


class _ExtentList:
    """One list's records, and where each begins; the last start is the length of all."""

    __slots__ = ("records", "starts")

    def __init__(self, data: bytes) -> None:
        self.records = parse_records(data)
        self.starts = list(accumulate((length for length, _ in self.records), initial=0))

    def index(self, offset: int) -> int:
        return bisect_right(self.starts, offset, 0, len(self.starts) - 1) - 1


_ZEROS = memoryview(bytes(1 << 20))

_AHEAD_BYTES = 8 * 1024 * 1024
"""How far ahead of a reader the chunks are decoded: some six of them."""

_SLACK_BYTES = 2 * 1024 * 1024
"""Requests of one sequential reader overtake one another by no more than this."""


class Readable(Protocol):
    """An open file. `streamed`: its size is not known before it was read to its end."""

    @property
    def streamed(self) -> bool:
        """Tell whether reads have to bypass the kernel's cache."""

    def read(self, offset: int, size: int) -> list[memoryview]:
        """Return `size` bytes from `offset` in pieces, fewer only at the end of the file."""


class FileReader:
    """An open regular file of a snapshot; `on_damage` is told begin, length and error of a range."""

    streamed = False

    def __init__(
        self, node: Node, chunks: ChunkCache, on_damage: Callable[[int, int, CasfsError], None]
    ) -> None:
        self._node = node
        self._size = node.size
        self._chunks = chunks
        self._on_damage = on_damage
        self._map: ExtentMap | None = None
        # Most files are one chunk, and need no map.
        self._single = single_chunk(node)
        self._expected = 0
        self._ahead_to = 0
        self._window = min(_AHEAD_BYTES, chunks.limit_bytes // 4)

    def read(self, offset: int, size: int) -> list[memoryview]:
        """Return the bytes of a range in pieces, cut at the end of the file; nothing is copied.

        Raises WouldBlock, and UnreadableError when any of it is damaged or cannot be read now.
        """
        end = min(offset + size, self._size)
        parts: list[memoryview] = []
        at = offset
        while at < end:
            part = self._part(at, end)
            parts.append(part)
            at += len(part)
        if parts:
            self._look_ahead(offset, end)
        return parts

    def _part(self, offset: int, end: int) -> memoryview:
        """Return what one extent has of a range: at least a byte, from `offset` on."""
        begin, length = offset, end - offset
        digest: Digest | None = self._single
        try:
            if digest is not None:
                begin, length = 0, self._size
            else:
                if self._map is None:
                    self._map = ExtentMap(self._node, self._chunks.get)
                begin, length, digest = self._map.find(offset)
            if digest is None:
                size = min(begin + length, end) - offset
                return _ZEROS[:size] if size <= len(_ZEROS) else memoryview(bytes(size))
            # Who gets the whole file at once does not come back: the kernel keeps what it got.
            whole = length == self._size == end - offset
            data = self._chunks.get(digest, keep=not whole)
            if len(data) != length:
                raise TreeError(
                    f"its chunk {digest.hex()} has {len(data)} bytes where {length} are recorded"
                )
        except CasfsError as error:
            self._on_damage(begin, length, error)
            raise UnreadableError(str(error)) from error
        return memoryview(data)[offset - begin : end - begin]

    def _look_ahead(self, offset: int, end: int) -> None:
        """Have the chunks after `end` decoded when the reads go on where the last one ended."""
        if self._map is None:
            return
        sequential = abs(offset - self._expected) <= _SLACK_BYTES and offset > 0
        self._expected = end
        if not sequential:
            self._ahead_to = 0
            return
        at = max(self._ahead_to, end)
        limit = min(end + self._window, self._size)
        if at >= limit:
            return
        try:
            while at < limit:
                begin, length, digest = self._map.find(at)
                if digest is not None:
                    self._chunks.read_ahead(digest)
                at = begin + length
        except (WouldBlock, CasfsError):
            pass  # a list is not at hand or damaged; who reads there sees to it
        self._ahead_to = at
