"""Read an open file in one pass: cut it into chunks, and digest and store each from a private buffer.

A digest is always computed from the buffer that is stored. The source is never mapped into memory, and
never read beyond the size that the caller saw, so a process that appends forever cannot stall a backup.
Holes are located with SEEK_DATA and SEEK_HOLE and not read. One thread per reader; the digest of a large
file runs on a second one.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from blake3 import blake3

from casfs.backup import source_fs
from casfs.backup.source_fs import Handle
from casfs.digest import EMPTY_DIGEST, Digest, update_zeros
from casfs.format.chunker import Chunker
from casfs.format.codec import BlobKind
from casfs.trees.content import EXTENT, HOLE, MAX_HOLE_BYTES, ContentWriter, Put
from casfs.trees.file_content import Part

_READ_BYTES = 1 << 20
_DATA = BlobKind.DATA


def _ignore(_: int) -> None:
    """Do nothing about the progress."""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of the witness read.

    `prefix` is the digest of the first bytes, as many as were captured, `observed` the digest of all bytes
    read, `size` their number.
    """

    prefix: Digest
    observed: Digest
    size: int


TakeHole = Callable[[int, int], None]
"""Count a hole of some bytes in a file of a user, given by number; raises OSError to refuse it."""


def _allow(_uid: int, _length: int) -> None:
    """Allow every hole."""


def verify_read(
    fd: Handle,
    captured_bytes: int,
    take_hole: TakeHole = _allow,
    on_bytes: Callable[[int], None] = _ignore,
) -> VerifyResult:
    """Read an open file again for its digests, up to its current size (the witness read).

    `captured_bytes` is the number of bytes that the capture read. Raises OSError, also for a hole that
    `take_hole` refuses. `on_bytes` is called with the number of bytes of each read.
    """
    st = source_fs.stat_open(fd)
    end = st.st_size
    hasher = _VerifyingHash(captured_bytes)
    for begin, data_end in data_ranges(fd, end):
        if begin > hasher.done:
            take_hole(st.st_uid, begin - hasher.done)
        hasher.skip(begin)
        while hasher.done < data_end:
            stop = hasher.next_stop(data_end)
            data = source_fs.read_at(fd, min(stop - hasher.done, _READ_BYTES), hasher.done)
            if not data:
                return hasher.result()
            hasher.update(data)
            on_bytes(len(data))
    end = min(end, source_fs.stat_open(fd).st_size)
    if end > hasher.done:
        take_hole(st.st_uid, end - hasher.done)
    hasher.skip(end)
    return hasher.result()


class _VerifyingHash:
    """A running digest that also records its value after the captured bytes."""

    def __init__(self, captured_bytes: int) -> None:
        self.done = 0
        self._captured_bytes = captured_bytes
        self._whole = blake3()
        self._prefix: Digest | None = None
        self._mark()

    def next_stop(self, end: int) -> int:
        """Return the limit of one step: `end`, or the end of the captured bytes if that is nearer."""
        return self._captured_bytes if self.done < self._captured_bytes < end else end

    def update(self, data: bytes) -> None:
        self._whole.update(data)
        self.done += len(data)
        self._mark()

    def skip(self, end: int) -> None:
        """Digest the zeros of a hole that ends at `end`."""
        while self.done < end:
            stop = self.next_stop(end)
            update_zeros(self._whole, stop - self.done)
            self.done = stop
            self._mark()

    def result(self) -> VerifyResult:
        observed = Digest(self._whole.digest())
        return VerifyResult(self._prefix or observed, observed, self.done)

    def _mark(self) -> None:
        if self.done == self._captured_bytes:
            self._prefix = Digest(self._whole.digest())


_LARGE_BYTES = 8 * 1024 * 1024
"""The digest of a larger file is computed on a second thread."""

_WAITING_CHUNKS = 2
_ZEROS_STEP_BYTES = 256 << 20


class ReadResult(NamedTuple):
    """The result of one pass: the content list, the size in bytes and the plain digest of the file.

    `captured` is that digest where the node must record it, because it is not the digest of the only blob.
    `pending` is the blob of a small file, which `store_pending` stores once the attempt is accepted.
    """

    content: bytes
    levels: int
    size: int
    digest: Digest
    captured: Digest | None
    pending: tuple[Digest, bytes] | None = None


class SourceReader:
    """Read the files of one backup. One thread.

    `put` stores a blob, `digest` computes its digest, `take_hole` may refuse a hole. `on_bytes` is called
    with the size of each chunk of a file larger than one chunk.
    """

    def __init__(
        self,
        chunker: Chunker,
        put: Put,
        digest: Callable[[bytes], Digest],
        take_hole: TakeHole = _allow,
        on_bytes: Callable[[int], None] = _ignore,
    ) -> None:
        self._on_bytes = on_bytes
        self._take_hole = take_hole
        self._chunker = chunker
        self._put = put
        self._digest = digest
        self._small_bytes = chunker.min_bytes
        # Without encryption both digests of a small file are equal: hash it once.
        self._digest_is_plain = digest(b"casfs") == blake3(b"casfs").digest()

    def read(self, fd: Handle, st: os.stat_result) -> ReadResult:
        """Read a regular file up to the size in `st`, or up to its end if that comes first."""
        size = st.st_size
        if st.st_blocks * 512 < size:
            return self._read_sparse(fd, size, st.st_uid)
        if size <= self._small_bytes:
            return self._read_small(fd, size)
        return self._read_chunks(_range_reader(fd, 0, size), size)

    def read_stream(self, fd: int) -> ReadResult:
        """Read a pipe until its end."""
        return self._read_chunks(lambda buffer: os.readv(fd, [buffer]), None)

    def read_parts(self, parts: Iterator[Part], size: int) -> ReadResult:
        """Read the verified parts of a stored file of `size` bytes; holes stay holes."""
        content = ContentWriter(self._put, self._digest)
        with closing(_WholeDigest()) as whole:
            for is_hole, run in groupby(parts, key=lambda part: part.data is None):
                if is_hole:
                    _add_hole(content, whole, sum(part.length for part in run))
                else:
                    self._store_chunks(_part_reader(run), size, whole, content)
            return _finish(content, whole, size)

    def store_pending(self, reading: ReadResult) -> None:
        """Store the pending blob of an accepted attempt, if it has one."""
        if reading.pending is not None:
            self._put(_DATA, *reading.pending)

    def _read_small(self, fd: Handle, size: int) -> ReadResult:
        data = source_fs.read_next(fd, size) if size else b""
        while len(data) < size:
            more = source_fs.read_next(fd, size - len(data))
            if not more:
                break
            data += more
        if not data:
            return ReadResult(b"", 0, 0, EMPTY_DIGEST, None)
        size = len(data)
        plain = Digest(blake3(data).digest())
        if self._digest_is_plain:
            return ReadResult(EXTENT.pack(size, plain), 0, size, plain, None, (plain, data))
        digest = self._digest(data)
        return ReadResult(EXTENT.pack(size, digest), 0, size, plain, plain, (digest, data))

    def _read_chunks(
        self, read_into: Callable[[memoryview], int], most_bytes: int | None
    ) -> ReadResult:
        content = ContentWriter(self._put, self._digest)
        with closing(_WholeDigest()) as whole:
            size = self._store_chunks(read_into, most_bytes, whole, content)
            return _finish(content, whole, size)

    def _read_sparse(self, fd: Handle, size: int, uid: int) -> ReadResult:
        content = ContentWriter(self._put, self._digest)
        done = data_bytes = 0
        with closing(_WholeDigest()) as whole:
            for begin, end in data_ranges(fd, size):
                _require_readable_holes(begin - data_bytes)
                self._add_hole(content, whole, begin - done, uid)
                read_into = _range_reader(fd, begin, end)
                done = begin + self._store_chunks(read_into, end - begin, whole, content)
                if done < end:
                    return _finish(content, whole, done)
                data_bytes += end - begin
            end = min(size, source_fs.stat_open(fd).st_size)
            if end > done:
                _require_readable_holes(end - data_bytes)
                self._add_hole(content, whole, end - done, uid)
                done = end
            return _finish(content, whole, done)

    def _add_hole(self, content: ContentWriter, whole: _WholeDigest, length: int, uid: int) -> None:
        if length > 0:
            self._take_hole(uid, length)
        _add_hole(content, whole, length)

    def _store_chunks(
        self,
        read_into: Callable[[memoryview], int],
        most_bytes: int | None,
        whole: _WholeDigest,
        content: ContentWriter,
    ) -> int:
        size = 0
        for chunk in self._chunker.cut(read_into, most_bytes):
            whole.add(chunk)
            digest = self._digest(chunk)
            self._put(BlobKind.DATA, digest, chunk)
            content.add(len(chunk), digest)
            self._on_bytes(len(chunk))
            size += len(chunk)
        return size


class _WholeDigest:
    """The plain digest of a file, computed from the buffers of its chunks. The caller closes it.

    The digest of a large file runs on a second thread while the caller cuts and digests the chunks.
    """

    def __init__(self) -> None:
        self._hasher = blake3()
        self._bytes = 0
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[object]] = deque()

    def add(self, data: bytes) -> None:
        """Append data; the caller must not modify the buffer afterwards."""
        self._bytes += len(data)
        if self._pool is None and self._bytes > _LARGE_BYTES:
            self._pool = ThreadPoolExecutor(1, "casfs-digest")
        self._do(partial(self._hasher.update, data))

    def add_zeros(self, length: int) -> None:
        """Append `length` zeros."""
        while length > 0:
            # In steps: an interrupt waits for the end of one.
            step = min(length, _ZEROS_STEP_BYTES)
            self._do(partial(update_zeros, self._hasher, step))
            length -= step

    def digest(self) -> Digest:
        """Return the digest of all appended bytes."""
        while self._waiting:
            self._waiting.popleft().result()
        return Digest(self._hasher.digest())

    def close(self) -> None:
        """End the second thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _do(self, step: Callable[[], object]) -> None:
        if self._pool is None:
            step()
            return
        if len(self._waiting) >= _WAITING_CHUNKS:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(step))


def data_ranges(fd: Handle, size: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end, in bytes, of the data ranges below `size`; changes the position of `fd`.

    On a file system without holes this is a single range.
    """
    end = 0
    while end < size:
        try:
            begin = source_fs.seek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if end == 0:
                yield 0, size
                return
            raise
        if begin >= size:
            return
        try:
            end = min(source_fs.seek(fd, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # truncated between the two calls
        yield begin, end


def _require_readable_holes(hole_bytes: int) -> None:
    """Raise OSError for holes that no reader would accept."""
    if hole_bytes > MAX_HOLE_BYTES:
        raise OSError(
            errno.EFBIG,
            f"it has holes of more than {MAX_HOLE_BYTES >> 40} TiB, which a snapshot cannot hold",
        )


def _finish(content: ContentWriter, whole: _WholeDigest, size: int) -> ReadResult:
    records, levels = content.finish()
    plain = whole.digest()
    single = levels == 0 and len(records) == EXTENT.size and records[8:] == plain
    captured = None if single or not records else plain
    return ReadResult(records, levels, size, plain, captured)


def _add_hole(content: ContentWriter, whole: _WholeDigest, length: int) -> None:
    if length > 0:
        content.add(length, HOLE)
        whole.add_zeros(length)


def _part_reader(parts: Iterator[Part]) -> Callable[[memoryview], int]:
    left = memoryview(b"")

    def read_into(buffer: memoryview) -> int:
        nonlocal left
        if not left:
            part = next(parts, None)
            if part is None or part.data is None:
                return 0
            left = memoryview(part.data)
        count = min(len(left), len(buffer))
        buffer[:count] = left[:count]
        left = left[count:]
        return count

    return read_into


def _range_reader(fd: Handle, begin: int, end: int) -> Callable[[memoryview], int]:
    offset = begin

    def read_into(buffer: memoryview) -> int:
        nonlocal offset
        wanted = min(len(buffer), end - offset)
        if wanted <= 0:
            return 0
        count = source_fs.read_into(fd, buffer[:wanted], offset)
        offset += count
        return count

    return read_into
