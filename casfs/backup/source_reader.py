"""Reading: one pass over the bytes of an open file, cut, stored and digested from private buffers.

Every digest is that of the buffer that is stored. The source is never mapped, and never read beyond the
size that the caller saw, so that an endless writer cannot hold a backup. Holes are found, not read.
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
from typing import NamedTuple

from blake3 import blake3

from casfs.digest import EMPTY_DIGEST, Digest, update_zeros
from casfs.format.chunker import Chunker
from casfs.format.codec import BlobKind
from casfs.trees.content import EXTENT, HOLE, ContentWriter, Put

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a witness saw: the digest of the beginning that was captured, of all, and the size of all."""

    prefix: Digest
    observed: Digest
    size: int


def verify_read(fd: int, captured_bytes: int) -> VerifyResult:
    """Read an open file again, no further than the size that it has now."""
    end = os.fstat(fd).st_size
    witness = _VerifyingHash(captured_bytes)
    for begin, data_end in data_ranges(fd, end):
        witness.skip(begin)
        while witness.done < data_end:
            stop = witness.next_stop(data_end)
            data = os.pread(fd, min(stop - witness.done, _READ_BYTES), witness.done)
            if not data:
                return witness.result()
            witness.update(data)
    witness.skip(min(end, os.fstat(fd).st_size))
    return witness.result()


class _VerifyingHash:
    """Digests over the bytes from the beginning, told apart where the captured ones end."""

    def __init__(self, captured_bytes: int) -> None:
        self.done = 0
        self._captured_bytes = captured_bytes
        self._whole = blake3()
        self._prefix: Digest | None = None
        self._mark()

    def next_stop(self, end: int) -> int:
        """Return how far one step may go: up to `end`, and not across the end of what was captured."""
        return self._captured_bytes if self.done < self._captured_bytes < end else end

    def update(self, data: bytes) -> None:
        self._whole.update(data)
        self.done += len(data)
        self._mark()

    def skip(self, end: int) -> None:
        """See the zeros of a hole that ends at `end`."""
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
"""From here on the digest of a whole file is computed by a thread of its own."""

_WAITING_CHUNKS = 2


class ReadResult(NamedTuple):
    """What one pass found: the content list, the size in bytes and the plain digest of the file.

    `captured` is that digest where a node has to keep it, `pending` a blob that is stored only when
    the reading is kept.
    """

    content: bytes
    levels: int
    size: int
    digest: Digest
    captured: Digest | None
    pending: tuple[Digest, bytes] | None = None


class SourceReader:
    """Read files of one backup; `put` stores a blob, `digest` names it. Used by one thread."""

    def __init__(self, chunker: Chunker, put: Put, digest: Callable[[bytes], Digest]) -> None:
        self._chunker = chunker
        self._put = put
        self._digest = digest
        self._small_bytes = chunker.min_bytes
        # Then a small file is hashed once and not twice.
        self._digest_is_plain = digest(b"casfs") == blake3(b"casfs").digest()

    def read(self, fd: int, st: os.stat_result) -> ReadResult:
        """Read a regular file from its beginning to the size in `st`, or to where it ends before."""
        size = st.st_size
        if st.st_blocks * 512 < size:
            return self._read_sparse(fd, size)
        if size <= self._small_bytes:
            return self._read_small(fd, size)
        return self._read_chunks(_range_reader(fd, 0, size), size)

    def read_stream(self, fd: int) -> ReadResult:
        """Read a pipe to its end."""
        return self._read_chunks(lambda buffer: os.readv(fd, [buffer]), None)

    def store_pending(self, reading: ReadResult) -> None:
        """Store what is pending of a reading that a node will refer to."""
        if reading.pending is not None:
            self._put(BlobKind.DATA, *reading.pending)

    def _read_small(self, fd: int, size: int) -> ReadResult:
        data = os.read(fd, size) if size else b""
        while len(data) < size:
            more = os.read(fd, size - len(data))
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

    def _read_sparse(self, fd: int, size: int) -> ReadResult:
        content = ContentWriter(self._put, self._digest)
        done = 0
        with closing(_WholeDigest()) as whole:
            for begin, end in data_ranges(fd, size):
                _add_hole(content, whole, begin - done)
                read_into = _range_reader(fd, begin, end)
                done = begin + self._store_chunks(read_into, end - begin, whole, content)
                if done < end:
                    return _finish(content, whole, done)
            end = min(size, os.fstat(fd).st_size)
            if end > done:
                _add_hole(content, whole, end - done)
                done = end
            return _finish(content, whole, done)

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
            size += len(chunk)
        return size


class _WholeDigest:
    """The plain digest of a file, of the very buffers of its chunks; to be closed.

    That of a large file is computed by another thread while the chunks are cut and named.
    """

    def __init__(self) -> None:
        self._hasher = blake3()
        self._bytes = 0
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[object]] = deque()

    def add(self, data: bytes) -> None:
        """Append data, which nobody changes afterwards."""
        self._bytes += len(data)
        if self._pool is None and self._bytes > _LARGE_BYTES:
            self._pool = ThreadPoolExecutor(1, "casfs-digest")
        self._do(partial(self._hasher.update, data))

    def add_zeros(self, length: int) -> None:
        """Append zeros."""
        self._do(partial(update_zeros, self._hasher, length))

    def digest(self) -> Digest:
        """Return the digest of all that was appended."""
        while self._waiting:
            self._waiting.popleft().result()
        return Digest(self._hasher.digest())

    def close(self) -> None:
        """Let no thread outlive this."""
        if self._pool is not None:
            self._pool.shutdown()

    def _do(self, step: Callable[[], object]) -> None:
        if self._pool is None:
            step()
            return
        if len(self._waiting) >= _WAITING_CHUNKS:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(step))


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end, in bytes, of what is not a hole below `size`; the position of `fd` moves.

    A file system that knows no holes tells one range.
    """
    end = 0
    while end < size:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
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
            end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # truncated between the two questions
        yield begin, end


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


def _range_reader(fd: int, begin: int, end: int) -> Callable[[memoryview], int]:
    offset = begin

    def read_into(buffer: memoryview) -> int:
        nonlocal offset
        wanted = min(len(buffer), end - offset)
        if wanted <= 0:
            return 0
        count = os.preadv(fd, [buffer[:wanted]], offset)
        offset += count
        return count

    return read_into
