"""Capturing one regular file: readings, and the evidence of whether the file held still.

The states are those of the README ("A file that changes"). A capture is stable when the descriptor's
metadata are the same before and behind it and too old to hide a change, when a witness saw the same
bytes, or when a frozen clone was read. Nothing is referred to that was not kept. One thread.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import time
from collections.abc import Callable
from typing import NamedTuple

from casfs.backup.reflink import Reflinker
from casfs.backup.source_fs import Xattrs, clamp_time_ns, make_extra, open_file, read_xattrs
from casfs.backup.source_reader import ReadResult, SourceReader, verify_read
from casfs.errors import NotRegularError
from casfs.format.tree import (
    Capture,
    CaptureState,
    ChangeReason,
    Node,
    NodeExtra,
    NodeType,
    capture_of,
    replace,
)

DEFAULT_ATTEMPTS = 3
FIRST_PAUSE_S = 0.05
"""The pause before a further attempt; it doubles each time, so that a short burst of writing can end."""

DEFAULT_PATIENCE_S = 60.0
"""Time that one backup spends on pauses and further attempts in all."""

_TICK_NS = 20_000_000
"""Two ticks of a kernel with HZ=100: file systems stamp with the clock of the last tick."""
_COARSE_NS = 2_000_000_000
"""FAT stamps every two seconds; whole seconds are taken as a sign of such a clock."""

_DIRTY_NS = 600_000_000_000
"""Pages of files that changed within ten minutes may be dirty still; the kernel writes after 35 s."""

_FREEZE_TRIES = 3
_LIKE_ANOTHER_KIND = frozenset([errno.ELOOP, errno.ENXIO])
"""Opening a symlink without following it, and a socket."""

_SYNC_FILE_RANGE_WRITE = 1 | 2  # and wait for what is on its way


class RetryBudget:
    """The time that a backup has for pauses and further attempts.

    Until `release_reserve` half of it is kept back: at the end of the backup, writers have had most time to
    finish. Whether one more reading fits is told by how fast the ones before were.
    """

    def __init__(self, seconds: float = DEFAULT_PATIENCE_S) -> None:
        self._left_s = seconds
        self._reserve_s = seconds / 2
        self._read_bytes = 0
        self._read_s = 0.0

    def can_spend(self, seconds: float) -> bool:
        """Tell whether there is so much time."""
        return seconds < self._left_s - self._reserve_s

    def spend(self, seconds: float) -> None:
        """Take time away."""
        self._left_s -= seconds

    def release_reserve(self) -> None:
        """Give up the reserve."""
        self._reserve_s = 0.0

    def record(self, read_bytes: int, seconds: float) -> None:
        """Take note of how long an unsuccessful attempt took."""
        self._read_bytes += read_bytes
        self._read_s += seconds

    def estimate(self, read_bytes: int) -> float:
        """Return the seconds that an attempt at a file of this size will take."""
        return read_bytes * self._read_s / max(self._read_bytes, 1)


class _Found(NamedTuple):
    """The result of one attempt; `again` says that its name means another file by now."""

    node: Node
    result: ReadResult
    replaced: bool = False


class Capturer:
    """Capture files of one backup; used by one thread.

    `pause` waits for some seconds (a test passes its own).
    """

    def __init__(
        self,
        reader: SourceReader,
        freezer: Reflinker,
        patience: RetryBudget,
        attempts: int = DEFAULT_ATTEMPTS,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._reader = reader
        self._freezer = freezer
        self._patience = patience
        self._attempts = max(attempts, 1)
        self._pause = pause

    def capture(self, dir_fd: int, name: bytes) -> Node:
        """Return the node of a regular file, its content handed to the reader's `put`.

        Raises NotRegularError where the name means something else by now, and OSError where the file
        has vanished or cannot be read.
        """
        began = time.monotonic()
        found = self._attempt(dir_fd, name, 1)
        if found.replaced or found.node.state == CaptureState.CHANGED:
            found = self._capture_further(dir_fd, name, found, time.monotonic() - began)
        self._reader.store_pending(found.result)
        return found.node

    def capture_again(self, dir_fd: int, before: Node) -> Node | None:
        """Capture once more, at the end of a backup, a file that was captured as changed.

        Returns None where there is no time for it, or the file is no longer there to be read.
        """
        capture = capture_of(before)
        attempts = capture.attempts if capture is not None else 0
        if not self._patience.can_spend(self._patience.estimate(before.size)):
            return None
        began = time.monotonic()
        try:
            found = self._attempt(dir_fd, before.name, attempts + 1)
        except (OSError, NotRegularError):
            return None
        finally:
            self._patience.spend(time.monotonic() - began)
        self._reader.store_pending(found.result)
        return _with_earlier_reason(found.node, before)

    def capture_stream(self, name: bytes, fd: int, st: os.stat_result) -> Node:
        """Return the node of a file that is read from a pipe to its end."""
        reading = self._reader.read_stream(fd)
        self._reader.store_pending(reading)
        node = _make_node(name, st, (), reading, CaptureState.STABLE, racy=True)
        return replace(node, mode=0o600, kind=NodeType.FILE, nlink=1, extra=None)

    def _capture_further(self, dir_fd: int, name: bytes, best: _Found, took_s: float) -> _Found:
        """Make the attempts that are left and return the best result, the newest of equal ones."""
        pause_s = FIRST_PAUSE_S
        made = 1
        while made < self._attempts:
            self._patience.record(best.result.size, took_s)
            wait_s = 0.0 if best.replaced else pause_s
            if not self._patience.can_spend(wait_s + took_s):
                break
            if wait_s:
                self._pause(wait_s)
                pause_s *= 2
            began = time.monotonic()
            try:
                found = self._attempt(dir_fd, name, made + 1)
            except OSError:
                break
            finally:
                took_s = time.monotonic() - began
                self._patience.spend(wait_s + took_s)
            made += 1
            if found.node.state <= best.node.state:
                node = _with_earlier_reason(found.node, best.node)
                best = _Found(node, found.result, found.replaced)
            if best.node.state != CaptureState.CHANGED and not best.replaced:
                return best
        return _Found(_with_attempts(best.node, made), best.result)

    def _attempt(self, dir_fd: int, name: bytes, attempt: int) -> _Found:
        try:
            fd = open_file(dir_fd, name)
        except OSError as error:
            if error.errno in _LIKE_ANOTHER_KIND:
                raise NotRegularError(name) from error
            raise
        try:
            began_ns = time.time_ns()
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise NotRegularError(name)
            if self._freezer.should_clone(before, began_ns):
                found = self._attempt_reflinked(dir_fd, fd, name, attempt)
                if found is not None:
                    return found
            young_ns = began_ns - _DIRTY_NS
            if before.st_ctime_ns > young_ns or before.st_mtime_ns > young_ns:
                _clean_pages(fd)
                before = os.fstat(fd)
            xattrs = read_xattrs(fd)
            reading = self._reader.read(fd, before)
            after = os.fstat(fd)
            if reading.size == before.st_size and _is_same(before, after):
                if not _is_racy(before, began_ns):
                    node = _make_node(name, before, xattrs, reading, CaptureState.STABLE, False)
                    if attempt > 1:
                        node = _with(node, ChangeReason.NONE, attempt, None)
                    return _Found(node, reading)
                return self._verify_by_reread(
                    fd, name, before, after, reading, attempt, ChangeReason.NONE
                )
            return self._on_unstable(dir_fd, fd, name, before, after, reading, attempt)
        finally:
            os.close(fd)

    def _attempt_reflinked(
        self,
        dir_fd: int,
        fd: int,
        name: bytes,
        attempt: int,
        reason: ChangeReason = ChangeReason.NONE,
    ) -> _Found | None:
        """Capture from a clone, or return None where there can be none.

        The content is what the file was at one instant. Its metadata were the same before and after,
        or are those from before and not trusted: a change behind that instant moves them further.
        """
        for tries in range(_FREEZE_TRIES):
            began_ns = time.time_ns()
            before = os.fstat(fd)
            xattrs = read_xattrs(fd)
            clone = self._freezer.clone(dir_fd, fd, before)
            if clone is None:
                return None
            try:
                held_still = _is_same(before, os.fstat(fd))
                if held_still or tries == _FREEZE_TRIES - 1:
                    reading = self._reader.read(clone, os.fstat(clone))
                    racy = not held_still or _is_racy(before, began_ns)
                    node = _make_node(name, before, xattrs, reading, CaptureState.STABLE, racy)
                    return _Found(_with(node, reason, attempt, None), reading)
            finally:
                os.close(clone)
        return None

    def _on_unstable(
        self,
        dir_fd: int,
        fd: int,
        name: bytes,
        before: os.stat_result,
        after: os.stat_result,
        reading: ReadResult,
        attempt: int,
    ) -> _Found:
        """Say what a reading is worth that did not find the file as it had been."""
        reason = _check_name(dir_fd, name, after)
        if reason == ChangeReason.NONE:
            found = self._attempt_reflinked(
                dir_fd, fd, name, attempt + 1, _difference(before, after, reading.size)
            )
            if found is not None:
                return found
        return self._verify_by_reread(fd, name, before, after, reading, attempt, reason)

    def _verify_by_reread(
        self,
        fd: int,
        name: bytes,
        before: os.stat_result,
        after: os.stat_result,
        reading: ReadResult,
        attempt: int,
        reason: ChangeReason,
    ) -> _Found:
        """Let a witness say what a reading is worth; the metadata are those between the two reads.

        They are not trusted as unchanged by the next backup: a store to a mapped page that is dirty
        already moves no timestamp.
        """
        xattrs = read_xattrs(fd)
        again = reason == ChangeReason.REPLACED
        observed = None
        try:
            seen = verify_read(fd, reading.size)
        except OSError:
            state, reason = CaptureState.CHANGED, ChangeReason.READ_ERROR
        else:
            equal = seen.prefix == reading.digest
            if equal and seen.size == reading.size:
                state = CaptureState.STABLE
            elif equal and seen.size > reading.size:
                state, reason, observed = CaptureState.APPENDED, ChangeReason.GREW, seen.observed
            else:
                state, observed = CaptureState.CHANGED, seen.observed
                if reason == ChangeReason.NONE:
                    reason = _classify(before, reading.size, seen.size)
        node = _make_node(name, after, xattrs, reading, state, racy=True)
        return _Found(_with(node, reason, attempt, observed), reading, again)


def _is_same(before: os.stat_result, after: os.stat_result) -> bool:
    return (
        before.st_ctime_ns == after.st_ctime_ns
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_size == after.st_size
        and before.st_ino == after.st_ino
        and before.st_dev == after.st_dev
    )


def _is_racy(st: os.stat_result, began_ns: int) -> bool:
    """Tell whether a later change could leave the timestamps as they are."""
    ctime_ns, mtime_ns = st.st_ctime_ns, st.st_mtime_ns
    whole_seconds = mtime_ns % 1_000_000_000 == 0 and ctime_ns % 1_000_000_000 == 0
    grain_ns = _COARSE_NS if whole_seconds else _TICK_NS
    return ctime_ns > began_ns - grain_ns or abs(mtime_ns - began_ns) < grain_ns


def _check_name(dir_fd: int, name: bytes, after: os.stat_result) -> ChangeReason:
    """Tell whether the name still means the file that was read: NONE, REPLACED or VANISHED.

    Raises NotRegularError where it means something that is not a regular file.
    """
    try:
        now = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return ChangeReason.VANISHED
    except OSError:
        return ChangeReason.NONE
    if not stat.S_ISREG(now.st_mode):
        raise NotRegularError(name)
    return ChangeReason.NONE if os.path.samestat(now, after) else ChangeReason.REPLACED


def _difference(before: os.stat_result, after: os.stat_result, read_bytes: int) -> ChangeReason:
    """Tell from metadata alone what happened to a file."""
    if after.st_size < before.st_size or read_bytes < before.st_size:
        return ChangeReason.SHRANK
    if after.st_size > before.st_size:
        return ChangeReason.GREW
    return ChangeReason.NONE if after.st_mtime_ns == before.st_mtime_ns else ChangeReason.REWRITTEN


def _classify(before: os.stat_result, read_bytes: int, seen_bytes: int) -> ChangeReason:
    """Tell what happened to a file of which two reads saw different bytes."""
    if seen_bytes < read_bytes or read_bytes < before.st_size:
        return ChangeReason.SHRANK
    return ChangeReason.GREW if seen_bytes > read_bytes else ChangeReason.REWRITTEN


def _clean_pages(fd: int) -> None:
    """Have a file's dirty pages written, so that the next store to any of them moves the timestamps.

    A store through a mapping does that only when it makes a page dirty: a page that is so already
    could be changed while it is read, and nothing would tell. Nothing is waited for but writes that
    are on their way.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    import ctypes  # it is slow to load, and many a backup reads nothing that is so young

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


def _make_node(
    name: bytes,
    st: os.stat_result,
    xattrs: Xattrs,
    reading: ReadResult,
    state: CaptureState,
    racy: bool,
) -> Node:
    return Node(
        name,
        NodeType.FILE,
        stat.S_IMODE(st.st_mode),
        st.st_uid,
        st.st_gid,
        clamp_time_ns(st.st_mtime_ns),
        clamp_time_ns(st.st_ctime_ns),
        st.st_ino,
        st.st_nlink or 1,  # it has lost its last name since it was opened
        reading.size,
        state,
        racy,
        reading.content,
        reading.levels,
        reading.captured,
        None,
        make_extra(st, xattrs, NodeType.FILE) if xattrs or st.st_nlink > 1 else None,
    )


def _with(node: Node, reason: ChangeReason, attempts: int, observed: bytes | None) -> Node:
    """Return the node with the evidence, where there is any: one simple attempt leaves none."""
    if reason == ChangeReason.NONE and attempts == 1:
        return node
    extra = node.extra or NodeExtra()
    return replace(node, extra=replace(extra, capture=Capture(reason, attempts, observed)))


def _with_earlier_reason(node: Node, earlier: Node) -> Node:
    """Return the node with the reason why the attempt before it was not enough, if it has none."""
    now, then = capture_of(node), capture_of(earlier)
    if now is None or now.reason != ChangeReason.NONE or then is None:
        return node
    reason = (
        ChangeReason.REPLACED if then.reason == ChangeReason.VANISHED else ChangeReason(then.reason)
    )
    return _with(node, reason, now.attempts, now.observed)


def _with_attempts(node: Node, attempts: int) -> Node:
    capture = capture_of(node)
    assert capture is not None
    return _with(node, ChangeReason(capture.reason), attempts, capture.observed)
