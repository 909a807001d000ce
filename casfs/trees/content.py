"""Content lists: the chunks and holes of a file of any size (FORMAT.md, "Content lists").

A list consists of records with a length in bytes and a digest; an all-zero digest is a hole. A short list is
stored in the node. A long list is cut at content-defined points into list blobs, whose own list may be cut
again. So a change in a huge file rewrites one piece a level, and no process needs the whole list in memory.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from casfs.digest import DIGEST_BYTES, Digest
from casfs.errors import IntegrityError, TreeError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind
from casfs.format.tree import MAX_FILE_BYTES, MAX_PIECE_LEVELS

EXTENT = struct.Struct("<Q32s")
assert EXTENT.size == 40

HOLE = bytes(DIGEST_BYTES)

MAX_INLINE_RECORDS = 32
_PIECE_MIN_RECORDS = 256
_PIECE_MAX_RECORDS = 8192
_PIECE_MASK = 0x3FF
"""A record whose digest ends in ten zero bits ends a piece: on average 1,280 records, or 1.5 GB of a file."""

MAX_HOLE_BYTES = 64 << 40
"""Limit of the holes of one file, whose zeros a reader digests: 3.6 hours at 5 GiB/s."""

Put = Callable[[BlobKind, Digest, bytes], None]


@dataclass(frozen=True, slots=True)
class ContentSplit:
    """Where a content list is split; the defaults are those of the format.

    Writers of a repository use the defaults: with other numbers an unchanged file has another list.
    """

    inline_records: int = MAX_INLINE_RECORDS
    min_records: int = _PIECE_MIN_RECORDS
    max_records: int = _PIECE_MAX_RECORDS
    mask: int = _PIECE_MASK
    max_levels: int = MAX_PIECE_LEVELS


FORMAT_SPLIT = ContentSplit()


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a file: `begin` and `length` in bytes; `digest` of the chunk, or None for a hole.

    `lost` marks a run whose list blob cannot be read, so that its chunks are unknown; `digest` is that
    list's.
    """

    begin: int
    length: int
    digest: Digest | None
    lost: bool = False


class ContentWriter:
    """Builds one file's content list and passes full list blobs to `put`.

    Memory holds at most one unfinished piece for each level. Raises TreeError for a file with too many
    chunks.
    """

    def __init__(
        self, put: Put, digest: Callable[[bytes], Digest], *, split: ContentSplit = FORMAT_SPLIT
    ) -> None:
        self._split = split
        self._put = put
        self._digest = digest
        self._levels: list[list[bytes]] = [[]]

    def add(self, length: int, digest: bytes) -> None:
        """Append a chunk, or a hole when `digest` is HOLE."""
        self._add(0, EXTENT.pack(length, digest), digest)

    def finish(self) -> tuple[bytes, int]:
        """Return the records for the node and the number of levels of list blobs below them."""
        level = 0
        while (
            level < len(self._levels) - 1 or len(self._levels[level]) > self._split.inline_records
        ):
            if self._levels[level]:
                self._flush(level)
            level += 1
        return b"".join(self._levels[level]), level

    def _add(self, level: int, record: bytes, digest: bytes) -> None:
        records = self._levels[level]
        records.append(record)
        full = len(records) >= self._split.max_records
        cut = int.from_bytes(digest[-2:], "big") & self._split.mask == 0 and digest != HOLE
        if full or (cut and len(records) >= self._split.min_records):
            self._flush(level)

    def _flush(self, level: int) -> None:
        records, self._levels[level] = self._levels[level], []
        if level + 1 == len(self._levels):
            if level + 1 > self._split.max_levels:
                raise TreeError("a file has more chunks than the format can list")
            self._levels.append([])
        data = b"".join(records)
        digest = self._digest(data)
        self._put(BlobKind.CONTENT, digest, data)
        length = sum(EXTENT.unpack_from(record)[0] for record in records)
        self._add(level + 1, EXTENT.pack(length, digest), digest)


class ContentReader:
    """Reads the extents of one file; `read` returns the verified bytes of a list blob.

    Every method raises TreeError for a list that breaks the format's rules, and passes on the errors of
    `read`.
    """

    def __init__(self, content: bytes, levels: int, read: Callable[[Digest], bytes]) -> None:
        self._records = parse_records(content)
        self._levels = levels
        self._read = read

    def extents(self, begin: int = 0, lost_lists: bool = False) -> Iterator[Extent]:
        """Yield the extents in order, starting with the extent that contains offset `begin`.

        With `lost_lists` a list blob that cannot be read or breaks the rules raises no error; everything that
        it lists becomes one extent marked as lost.
        """
        yield from self._walk(self._records, self._levels, 0, begin, lost_lists)

    def _walk(
        self,
        records: list[tuple[int, bytes]],
        levels: int,
        base: int,
        begin: int,
        lost_lists: bool,
    ) -> Iterator[Extent]:
        ends = list(accumulate((length for length, _ in records), initial=base))
        first = max(bisect_right(ends, begin) - 1, 0)
        for i in range(first, len(records)):
            length, digest = records[i]
            if levels == 0:
                yield Extent(ends[i], length, None if digest == HOLE else Digest(digest))
                continue
            try:
                piece = self._piece(length, digest)
            except IntegrityError:
                if not lost_lists:
                    raise
                yield Extent(ends[i], length, Digest(digest), lost=True)
                continue
            yield from self._walk(piece, levels - 1, ends[i], begin, lost_lists)

    def _piece(self, length: int, digest: bytes) -> list[tuple[int, bytes]]:
        piece = parse_records(self._read(Digest(digest)))
        if sum(size for size, _ in piece) != length:
            raise TreeError("a content list has another length than recorded")
        return piece

    def blobs(self) -> Iterator[Digest]:
        """Yield the digest of every chunk and list blob, each list before its contents."""
        stack = [(iter(self._records), self._levels)]
        while stack:
            records, levels = stack[-1]
            for _, digest in records:
                if digest == HOLE:
                    continue
                yield Digest(digest)
                if levels:
                    stack.append((iter(parse_records(self._read(Digest(digest)))), levels - 1))
                    break
            else:
                stack.pop()


def parse_records(data: bytes) -> list[tuple[int, bytes]]:
    """Return the lengths and digests of a list; raise TreeError where it breaks the format's rules."""
    if len(data) % EXTENT.size:
        raise TreeError("a content list has an invalid size")
    records = list(EXTENT.iter_unpack(data))
    total = 0
    for length, _ in records:
        total += length
        if length == 0:
            raise TreeError("a content list has an empty extent")
    if total > MAX_FILE_BYTES:
        raise TreeError("a content list has an invalid file size")
    return records


def check_chunk_length(extent: Extent) -> None:
    """Raise TreeError for a chunk that exceeds the largest blob."""
    if extent.digest is not None and extent.length > MAX_PLAIN_BYTES:
        raise TreeError("a content list has an invalid chunk size")
