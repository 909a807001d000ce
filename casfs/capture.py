"""Capturing one regular file: one read into private buffers, and the evidence of whether it held still.

The states and the witness read are those of the README ("A file that changes"). Every digest is that
of the buffer that is stored. The source is never mapped and never read beyond the size seen at its
opening, so an endless writer cannot hold a backup.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from casfs.chunker import Chunker
from casfs.content import HOLE, RECORD, ContentWriter, Put
from casfs.digest import Digest
from casfs.source import Xattrs, make_extra, open_file, read_xattrs
from casfs.store.blob import BlobKind
from casfs.tree import Capture, Extra, Kind, Node, Reason, State, replace

DEFAULT_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.05
"""The pause before a further attempt; it doubles each time, so that a short burst of writing can end."""

DEFAULT_PATIENCE_S = 60.0
"""Time that one backup spends on pauses and further attempts in all."""

_TICK_NS = 20_000_000
"""Two ticks of a kernel with HZ=100: file systems stamp with the clock of the last tick."""
_COARSE_NS = 2_000_000_000
"""FAT stamps every two seconds; whole seconds are taken as a sign of such a clock."""

_ZEROS = bytes(1 << 20)
_WITNESS_BYTES = 1 << 20


class NotRegularError(Exception):
    """The name means something that is not a regular file by now."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One read of a file: what was stored, its size in bytes and its plain digest."""

    content: bytes
    levels: int
    size: int
    digest: Digest
    captured: Digest | None
    pending: tuple[Digest, bytes] | None = None


class Capturer:
    """Capture files of one backup; used by one thread.

    `put` stores a blob, `digest` names it. `pause` waits for some seconds (a test passes its own).
    """

    def __init__(
        self,
        chunker: Chunker,
        put: Put,
        digest: Callable[[bytes], Digest],
        attempts: int = DEFAULT_ATTEMPTS,
        patience_s: float = DEFAULT_PATIENCE_S,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._chunker = chunker
        self._put = put
        self._digest = digest
        self._attempts = max(attempts, 1)
        self._patience_s = patience_s
        self._pause = pause
        self._small_bytes = chunker.min_bytes

    def capture(self, dir_fd: int, name: bytes) -> Node:
        """Return the node of a regular file, its content handed to `put`.

        Raises NotRegularError where the name means something else by now, and OSError where the file
        has vanished or cannot be read.
        """
        best: Node | None = None
        kept: _Reading | None = None
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, self._attempts + 1):
            began = time.monotonic()
            try:
                node, reading = self._attempt(dir_fd, name, attempt)
            except OSError:
                if best is None:
                    raise
                break
            if best is None or node.state <= best.state:
                best, kept = node, reading
            if best.state != State.CHANGED:
                break
            if attempt < self._attempts:
                self._patience_s -= pause_s + time.monotonic() - began
                if self._patience_s <= 0:
                    break
                self._pause(pause_s)
                pause_s *= 2
        assert best is not None and kept is not None
        if kept.pending is not None:
            self._put(BlobKind.DATA, *kept.pending)
        return best

    def capture_stream(self, name: bytes, fd: int, st: os.stat_result) -> Node:
        """Return the node of a file that is read from a pipe to its end."""
        reading = self._read_chunks(_stream_reader(fd), None)
        node = _make_node(name, st, (), reading, State.STABLE, racy=True)
        return replace(node, mode=0o600, kind=Kind.FILE, nlink=1, extra=None)

    def _attempt(self, dir_fd: int, name: bytes, attempt: int) -> tuple[Node, _Reading]:
        fd = open_file(dir_fd, name)
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise NotRegularError(name)
            began_ns = time.time_ns()
            xattrs = read_xattrs(fd)
            reading = self._read(fd, before)
            after = os.fstat(fd)
            if (
                reading.size == before.st_size
                and before.st_mtime_ns == after.st_mtime_ns
                and before.st_ctime_ns == after.st_ctime_ns
                and before.st_size == after.st_size
            ):
                racy = _is_racy(before, began_ns)
                node = _make_node(name, before, xattrs, reading, State.STABLE, racy)
                return (node if attempt == 1 else _with(node, Reason.NONE, attempt, None)), reading
            return self._witness(fd, name, before, reading, attempt), reading
        finally:
            os.close(fd)

    def _witness(
        self, fd: int, name: bytes, before: os.stat_result, reading: _Reading, attempt: int
    ) -> Node:
        """Read once more, digests only, and say what the capture is worth."""
        prefix, observed, seen_bytes = _digest_again(fd, reading.size)
        after = os.fstat(fd)
        xattrs = read_xattrs(fd)
        if seen_bytes == reading.size and prefix == reading.digest:
            node = _make_node(name, after, xattrs, reading, State.STABLE, racy=True)
            return _with(node, Reason.NONE, attempt, None)
        if seen_bytes > reading.size and prefix == reading.digest:
            node = _make_node(name, after, xattrs, reading, State.APPENDED, racy=True)
            return _with(node, Reason.GREW, attempt, observed)
        if seen_bytes < reading.size or reading.size < before.st_size:
            reason = Reason.SHRANK
        elif seen_bytes > reading.size:
            reason = Reason.GREW
        else:
            reason = Reason.REWRITTEN
        node = _make_node(name, after, xattrs, reading, State.CHANGED, racy=True)
        return _with(node, reason, attempt, observed)

    def _read(self, fd: int, st: os.stat_result) -> _Reading:
        size = st.st_size
        if st.st_blocks * 512 < size:
            return self._read_sparse(fd, size)
        if size <= self._small_bytes:
            return self._read_small(fd, size)
        return self._read_chunks(_range_reader(fd, 0, size), size)

    def _read_small(self, fd: int, size: int) -> _Reading:
        data = os.read(fd, size) if size else b""
        while len(data) < size:
            more = os.read(fd, size - len(data))
            if not more:
                break
            data += more
        plain = Digest(blake3(data).digest())
        if not data:
            return _Reading(b"", 0, 0, plain, None)
        digest = self._digest(data)
        content = RECORD.pack(len(data), digest)
        captured = None if digest == plain else plain
        return _Reading(content, 0, len(data), plain, captured, (digest, data))

    def _read_chunks(
        self, read_into: Callable[[memoryview], int], most_bytes: int | None
    ) -> _Reading:
        whole = blake3()
        content = ContentWriter(self._put, self._digest)
        size = self._store_chunks(read_into, most_bytes, whole, content)
        return _finish(content, whole, size)

    def _read_sparse(self, fd: int, size: int) -> _Reading:
        whole = blake3()
        content = ContentWriter(self._put, self._digest)
        done = 0
        for begin, end in data_ranges(fd, size):
            _add_hole(content, whole, begin - done)
            stored = self._store_chunks(_range_reader(fd, begin, end), end - begin, whole, content)
            done = begin + stored
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
        whole: blake3,
        content: ContentWriter,
    ) -> int:
        size = 0
        for chunk in self._chunker.cut(read_into, most_bytes):
            digest = self._digest(chunk)
            whole.update(chunk)
            self._put(BlobKind.DATA, digest, chunk)
            content.add(len(chunk), digest)
            size += len(chunk)
        return size


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


def _finish(content: ContentWriter, whole: blake3, size: int) -> _Reading:
    records, levels = content.finish()
    plain = Digest(whole.digest())
    single = levels == 0 and len(records) == RECORD.size and records[8:] == plain
    captured = None if single or not records else plain
    return _Reading(records, levels, size, plain, captured)


def _add_hole(content: ContentWriter, whole: blake3, length: int) -> None:
    if length > 0:
        content.add(length, HOLE)
        _update_zeros(whole, length)


def _update_zeros(whole: blake3, length: int) -> None:
    view = memoryview(_ZEROS)
    while length > 0:
        part = min(length, len(_ZEROS))
        whole.update(view[:part])
        length -= part


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


def _stream_reader(fd: int) -> Callable[[memoryview], int]:
    return lambda buffer: os.readv(fd, [buffer])


def _digest_again(fd: int, captured_bytes: int) -> tuple[Digest, Digest, int]:
    """Return the digest of the first `captured_bytes`, that of all, and the size in bytes of all."""
    end = os.fstat(fd).st_size
    whole = blake3()
    prefix: Digest | None = None
    done = 0
    for begin, data_end in data_ranges(fd, end):
        for stop in _stops(done, begin, captured_bytes):
            _update_zeros(whole, stop - done)
            done = stop
            if done == captured_bytes:
                prefix = Digest(whole.digest())
        while done < data_end:
            stop = captured_bytes if done < captured_bytes < data_end else data_end
            data = os.pread(fd, min(stop - done, _WITNESS_BYTES), done)
            if not data:
                return prefix or Digest(whole.digest()), Digest(whole.digest()), done
            whole.update(data)
            done += len(data)
            if done == captured_bytes:
                prefix = Digest(whole.digest())
    for stop in _stops(done, min(end, os.fstat(fd).st_size), captured_bytes):
        _update_zeros(whole, stop - done)
        done = stop
        if done == captured_bytes:
            prefix = Digest(whole.digest())
    if captured_bytes == 0:
        prefix = Digest(blake3(b"").digest())
    observed = Digest(whole.digest())
    return prefix or observed, observed, done


def _stops(begin: int, end: int, between: int) -> list[int]:
    if end <= begin:
        return []
    return [between, end] if begin < between < end else [end]


def _is_racy(st: os.stat_result, began_ns: int) -> bool:
    """Tell whether a later change could leave the timestamps as they are."""
    whole_seconds = st.st_mtime_ns % 1_000_000_000 == 0 and st.st_ctime_ns % 1_000_000_000 == 0
    grain_ns = _COARSE_NS if whole_seconds else _TICK_NS
    return st.st_ctime_ns > began_ns - grain_ns or abs(st.st_mtime_ns - began_ns) < grain_ns


def _make_node(
    name: bytes, st: os.stat_result, xattrs: Xattrs, reading: _Reading, state: State, racy: bool
) -> Node:
    return Node(
        name,
        Kind.FILE,
        stat.S_IMODE(st.st_mode),
        st.st_uid,
        st.st_gid,
        st.st_mtime_ns,
        st.st_ctime_ns,
        st.st_ino,
        st.st_nlink,
        reading.size,
        state,
        racy,
        reading.content,
        reading.levels,
        reading.captured,
        None,
        make_extra(st, xattrs, Kind.FILE) if xattrs or st.st_nlink > 1 else None,
    )


def _with(node: Node, reason: Reason, attempts: int, observed: Digest | None) -> Node:
    if reason == Reason.NONE and attempts == 1:
        return node
    extra = node.extra or Extra()
    return replace(node, extra=replace(extra, capture=Capture(reason, attempts, observed)))
