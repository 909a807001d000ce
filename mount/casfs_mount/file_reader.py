"""The reader of one open file: from an offset to verified bytes.

A read returns views of the decoded chunks that hold the range, and zeros for holes. Behind a sequential
reader the next chunks are decoded in the background. Several threads may read the same open file; the
event-loop thread gets WouldBlock where it would have to wait.
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

MAX_SMALL_BYTES = 128 * 1024
"""The largest file that is decoded as a whole when it is opened; the kernel requests a larger one in several
parts anyway."""

_LISTS = 8
"""Parsed extent lists that are kept for one open file; the biggest takes about 1 MB."""


class ExtentMap:
    """The extents of one regular file; `read` returns a list blob's verified bytes."""

    def __init__(self, node: Node, read: Callable[[bytes], bytes]) -> None:
        self._read = read
        self._levels = node.levels
        self._top = _ExtentList(node.content)
        if self._top.starts[-1] != node.size:
            raise TreeError("the chunks of a file do not add up to its recorded size")
        self._lists: dict[bytes, _ExtentList] = {}
        self._last: tuple[int, int, _ExtentList] | None = None

    def find(self, offset: int) -> tuple[int, int, Digest | None]:
        """Return begin, length and digest (None for a hole) of the extent that holds an offset.

        The offset must be below the file's size. Raises TreeError and the errors of `read`.
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
            raise TreeError("a content list has a chunk that is larger than the format allows")
        return base + found.starts[i], length, Digest(digest)

    def _list(self, digest: bytes, length: int) -> _ExtentList:
        known = self._lists.get(digest)
        if known is None:
            known = _ExtentList(self._read(digest))
            kept = dict(list(self._lists.items())[1 - _LISTS :])
            kept[digest] = known
            self._lists = kept
        if known.starts[-1] != length:
            raise TreeError("a content list does not add up to its recorded length")
        return known


def single_chunk(node: Node) -> Digest | None:
    """Return the digest of a file's chunk if it has exactly one and no hole, else None."""
    content = node.content
    if len(content) != EXTENT.size or node.levels or node.size > MAX_PLAIN_BYTES:
        return None
    length, digest = EXTENT.unpack(content)
    return Digest(digest) if length == node.size and digest != HOLE else None


class _ExtentList:
    """The records of one list, and the offset of each; the last of `starts` is the total length."""

    __slots__ = ("records", "starts")

    def __init__(self, data: bytes) -> None:
        self.records = parse_records(data)
        self.starts = list(accumulate((length for length, _ in self.records), initial=0))

    def index(self, offset: int) -> int:
        return bisect_right(self.starts, offset, 0, len(self.starts) - 1) - 1


_ZEROS = memoryview(bytes(1 << 20))

_PREFETCH_BYTES = 8 * 1024 * 1024
"""How far ahead of a sequential reader chunks are decoded: about six chunks."""

_SLACK_BYTES = 2 * 1024 * 1024
"""The kernel may reorder the requests of one sequential reader by this distance at most."""


class Readable(Protocol):
    """An open file."""

    @property
    def streamed(self) -> bool:
        """Whether reads must bypass the kernel's cache, because the size is unknown until the end."""

    def read(self, offset: int, size: int) -> list[memoryview]:
        """Return `size` bytes from `offset` in parts, fewer only at the end of the file."""

    def whole(self, max_bytes: int) -> bytes | None:
        """Return the content of a small file if it is at hand as a whole, else None; never raise."""


class FileReader:
    """An open regular file of a snapshot.

    `on_damage` is called with begin, length and error of each range that cannot be read.
    """

    streamed = False

    def __init__(
        self, node: Node, chunks: ChunkCache, on_damage: Callable[[int, int, CasfsError], None]
    ) -> None:
        self._node = node
        self._size = node.size
        self._chunks = chunks
        self._on_damage = on_damage
        self._map: ExtentMap | None = None
        # Most files have one chunk and need no map.
        self._single = single_chunk(node)
        self._expected = 0
        self._prefetched_to = 0
        self._window = min(_PREFETCH_BYTES, chunks.limit_bytes // 4)

    def read(self, offset: int, size: int) -> list[memoryview]:
        """Return the bytes of a range in parts, cut at the end of the file, without copying.

        The parts stay valid as long as they are referenced. Raises WouldBlock, and UnreadableError if any
        byte of the range is damaged or cannot be read now.
        """
        end = min(offset + size, self._size)
        parts: list[memoryview] = []
        at = offset
        while at < end:
            part = self._part(at, end)
            parts.append(part)
            at += len(part)
        if parts:
            self._prefetch(offset, end)
        return parts

    def whole(self, max_bytes: int) -> bytes | None:
        """Return the file's bytes if they are one chunk of at most `max_bytes` that is at hand, else None."""
        if self._single is None or self._size > max_bytes:
            return None
        try:
            data = self._chunks.get(self._single, keep=False)
        except (WouldBlock, CasfsError):
            return None  # a read waits for it, or reports the damage
        return data if len(data) == self._size else None

    def _part(self, offset: int, end: int) -> memoryview:
        """Return the bytes of a range up to the end of the extent at `offset`: one byte at least."""
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
            # A file read by one request is in the kernel's cache afterwards and is not read again.
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

    def _prefetch(self, offset: int, end: int) -> None:
        """Decode the chunks after `end` in the background if the reads are sequential."""
        if self._map is None:
            return
        sequential = abs(offset - self._expected) <= _SLACK_BYTES and offset > 0
        self._expected = end
        if not sequential:
            self._prefetched_to = 0
            return
        at = max(self._prefetched_to, end)
        limit = min(end + self._window, self._size)
        if at >= limit:
            return
        try:
            while at < limit:
                begin, length, digest = self._map.find(at)
                if digest is not None:
                    self._chunks.prefetch(digest)
                at = begin + length
        except (WouldBlock, CasfsError):
            pass  # a list is not cached, or damaged; a read of that range loads it or reports the damage
        self._prefetched_to = at
