"""Capture one regular file: read it, and collect the evidence of whether it changed meanwhile.

FORMAT.md ("Trees") defines the states. A capture is `stable` when the metadata of the descriptor are
equal before and after it and too old to hide a change, when a second read (the witness read) saw the same
bytes, or when a reflink clone was read. One thread.

Chunks of a file larger than one chunk are stored while it is read, because memory is bounded. A smaller
file is in memory as a whole, so its only blob stays pending in the ReadResult until an attempt is
accepted, and rejected attempts at it store nothing. Rejected attempts at a large file may leave blobs that
no tree refers to; prune removes them.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import NamedTuple

from casfs.backup import source_fs
from casfs.backup.allowance import Allowances
from casfs.backup.reflink import Reflinker
from casfs.backup.source_fs import Handle, Xattrs, clamp_time_ns, make_extra, open_file, xattrs_of
from casfs.backup.source_reader import ReadResult, SourceReader, verify_read
from casfs.backup.stability import (
    RetryBudget,
    classify_by_metadata,
    classify_by_reread,
    is_racy,
    is_same,
)
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
"""The pause before the second attempt. It doubles before each further one: bursts of writing can end."""

_DIRTY_NS = 600_000_000_000
"""Files that changed within ten minutes may have dirty pages; the kernel writes them back after 35 s."""

_REFLINK_TRIES = 3
_FILE, _STABLE, _CHANGED = map(int, (NodeType.FILE, CaptureState.STABLE, CaptureState.CHANGED))
"""Plain integers, for every file: they are compared and encoded faster than members of an Enum."""

_NOT_REGULAR_ERRNOS = frozenset([errno.ELOOP, errno.ENXIO])
"""The errors of opening a symlink with O_NOFOLLOW, and of opening a socket."""


class _Attempt(NamedTuple):
    """The result of one attempt; `replaced` is set where the name now refers to another file."""

    node: Node
    result: ReadResult
    replaced: bool = False
    xattr_error: OSError | None = None


def _ignore(_: object) -> None:
    """Do nothing about an error or the progress."""


def _do_nothing() -> None:
    """Do nothing before an attempt."""


class Capturer:
    """Capture the files of one backup. Used by one thread.

    `attempts` is the limit for one file, `budget` the time for all files together, `allowances` what the
    files of each owner may cost. `pause` sleeps for the given seconds. `abandoned_bytes` counts what was
    stored of attempts that no node refers to; chunks that several attempts have in common count as often.
    `on_attempt` is called before each attempt, `on_reread` with the bytes of each read of a witness read.
    """

    def __init__(
        self,
        reader: SourceReader,
        reflinker: Reflinker,
        budget: RetryBudget,
        attempts: int = DEFAULT_ATTEMPTS,
        pause: Callable[[float], None] = time.sleep,
        allowances: Allowances | None = None,
        on_attempt: Callable[[], None] = _do_nothing,
        on_reread: Callable[[int], None] = _ignore,
    ) -> None:
        self._on_attempt = on_attempt
        self._on_reread = on_reread
        self._allowances = allowances or Allowances()
        self._reader = reader
        self._reflinker = reflinker
        self._budget = budget
        self._attempts = max(attempts, 1)
        self._pause = pause
        self.abandoned_bytes = 0

    def capture(
        self, above: Handle, name: bytes, on_xattr_error: Callable[[OSError], None] = _ignore
    ) -> Node:
        """Return the node of a regular file, after its content went to the `put` of the reader.

        `on_xattr_error` is called where not all xattrs could be read; the next backup does not trust the
        file as unchanged then.

        Raises NotRegularError where the name no longer refers to a regular file, and OSError where the
        file has vanished or cannot be read.
        """
        began = time.monotonic()
        found = self._attempt(above, name, 1)
        if found.replaced or found.node.state == _CHANGED:
            found = self._capture_further(above, name, found, time.monotonic() - began)
        self._reader.store_pending(found.result)
        if found.xattr_error is not None:
            on_xattr_error(found.xattr_error)
        return found.node

    def capture_again(self, above: Handle, before: Node) -> Node | None:
        """Capture a file in state `changed` again, at the end of a backup.

        Returns None where the budget is spent, or the file has vanished or cannot be read.
        """
        capture = capture_of(before)
        attempts = capture.attempts if capture is not None else 0
        if not self._budget.can_spend(self._budget.estimate(before.size)):
            return None
        began = time.monotonic()
        try:
            found = self._attempt(above, before.name, attempts + 1)
        except (OSError, NotRegularError):
            return None
        finally:
            self._budget.spend(time.monotonic() - began)
        self._reader.store_pending(found.result)
        self.abandoned_bytes += before.size
        return _with_earlier_reason(found.node, before)

    def _abandon(self, attempt: _Attempt) -> None:
        # What is pending was not stored.
        if attempt.result.pending is None:
            self.abandoned_bytes += attempt.result.size

    def capture_stream(self, name: bytes, fd: int, st: os.stat_result) -> Node:
        """Return the node of a file whose content is read from a pipe until its end."""
        reading = self._reader.read_stream(fd)
        self._reader.store_pending(reading)
        node = _make_node(name, st, (), reading, CaptureState.STABLE, racy=True)
        return replace(node, mode=0o600, kind=NodeType.FILE, nlink=1, extra=None)

    def _capture_further(
        self, above: Handle, name: bytes, best: _Attempt, took_s: float
    ) -> _Attempt:
        """Make the remaining attempts; return the best result, and of equal results the newest."""
        pause_s = FIRST_PAUSE_S
        made = 1
        while made < self._attempts:
            self._budget.record(best.result.size, took_s)
            wait_s = 0.0 if best.replaced else pause_s
            if not self._budget.can_spend(wait_s + took_s):
                break
            if wait_s:
                self._pause(wait_s)
                pause_s *= 2
            began = time.monotonic()
            try:
                found = self._attempt(above, name, made + 1)
            except OSError:
                break
            finally:
                took_s = time.monotonic() - began
                self._budget.spend(wait_s + took_s)
            made += 1
            self._abandon(best if found.node.state <= best.node.state else found)
            if found.node.state <= best.node.state:
                node = _with_earlier_reason(found.node, best.node)
                best = found._replace(node=node)
            if best.node.state != CaptureState.CHANGED and not best.replaced:
                return best
        return best._replace(node=_with_attempts(best.node, made), replaced=False)

    def _attempt(self, above: Handle, name: bytes, attempt: int) -> _Attempt:
        """Open and read a file once: from a clone where that is due, else directly."""
        self._on_attempt()
        try:
            fd = open_file(above, name, self._allowances.may_wait)
        except OSError as error:
            if error.errno in _NOT_REGULAR_ERRNOS:
                raise NotRegularError(name) from error
            raise
        try:
            began_ns = time.time_ns()
            before = source_fs.stat_open(fd)
            if not stat.S_ISREG(before.st_mode):
                raise NotRegularError(name)
            if self._reflinker.should_clone(before, began_ns):
                found = self._attempt_reflinked(above, fd, name, attempt)
                if found is not None:
                    return found
            dirty_since_ns = began_ns - _DIRTY_NS
            if before.st_ctime_ns > dirty_since_ns or before.st_mtime_ns > dirty_since_ns:
                source_fs.start_writeback(fd)
                before = source_fs.stat_open(fd)
            xattrs, xattr_error = xattrs_of(fd)
            reading = self._reader.read(fd, before)
            after = source_fs.stat_open(fd)
            if reading.size == before.st_size and is_same(before, after):
                if not is_racy(before, began_ns):
                    racy = xattr_error is not None
                    node = _make_node(name, before, xattrs, reading, _STABLE, racy)
                    if attempt > 1:
                        node = _with(node, ChangeReason.NONE, attempt, None)
                    return _Attempt(node, reading, xattr_error=xattr_error)
                return self._verify_by_reread(
                    fd, name, before, after, reading, attempt, ChangeReason.NONE
                )
            return self._on_unstable(above, fd, name, before, after, reading, attempt)
        finally:
            source_fs.close(fd)

    def _attempt_reflinked(
        self,
        above: Handle,
        fd: Handle,
        name: bytes,
        attempt: int,
        reason: ChangeReason = ChangeReason.NONE,
    ) -> _Attempt | None:
        """Capture from a reflink clone; return None where the file cannot be cloned.

        The clone has the content of one instant. Where the metadata differ before and after cloning, the
        node gets the earlier ones and is racy, so that the next backup does not trust them.
        """
        for tries in range(_REFLINK_TRIES):
            began_ns = time.time_ns()
            before = source_fs.stat_open(fd)
            xattrs, xattr_error = xattrs_of(fd)
            clone = self._reflinker.clone(above, fd, before)
            if clone is None:
                return None
            try:
                is_unmodified = is_same(before, source_fs.stat_open(fd))
                if is_unmodified or tries == _REFLINK_TRIES - 1:
                    reading = self._reader.read(clone, os.fstat(clone))
                    racy = not is_unmodified or is_racy(before, began_ns) or xattr_error is not None
                    node = _make_node(name, before, xattrs, reading, CaptureState.STABLE, racy)
                    node = _with(node, reason, attempt, None)
                    return _Attempt(node, reading, xattr_error=xattr_error)
            finally:
                os.close(clone)
        return None

    def _on_unstable(
        self,
        above: Handle,
        fd: Handle,
        name: bytes,
        before: os.stat_result,
        after: os.stat_result,
        reading: ReadResult,
        attempt: int,
    ) -> _Attempt:
        """Return the result of a read during which the metadata changed: from a clone, or by rereading."""
        reason = _check_name(above, name, after)
        if reason == ChangeReason.NONE:
            found = self._attempt_reflinked(
                above, fd, name, attempt + 1, classify_by_metadata(before, after, reading.size)
            )
            if found is not None:
                return found
        return self._verify_by_reread(fd, name, before, after, reading, attempt, reason)

    def _verify_by_reread(
        self,
        fd: Handle,
        name: bytes,
        before: os.stat_result,
        after: os.stat_result,
        reading: ReadResult,
        attempt: int,
        reason: ChangeReason,
    ) -> _Attempt:
        """Decide the state of a read by a second read (the witness read).

        The node gets the metadata from between the two reads and is racy: a store to a mapped page that is
        already dirty updates no timestamp, so the next backup must not trust them.
        """
        xattrs, xattr_error = xattrs_of(fd)
        replaced = reason == ChangeReason.REPLACED
        observed = None
        try:
            reread = verify_read(fd, reading.size, self._allowances.take_hole, self._on_reread)
        except OSError:
            state, reason = CaptureState.CHANGED, ChangeReason.READ_ERROR
        else:
            equal = reread.prefix == reading.digest
            if equal and reread.size == reading.size:
                state = CaptureState.STABLE
            elif equal and reread.size > reading.size:
                state, reason, observed = CaptureState.APPENDED, ChangeReason.GREW, reread.observed
            else:
                state, observed = CaptureState.CHANGED, reread.observed
                if reason == ChangeReason.NONE:
                    reason = classify_by_reread(before, reading.size, reread.size)
        node = _make_node(name, after, xattrs, reading, state, racy=True)
        return _Attempt(_with(node, reason, attempt, observed), reading, replaced, xattr_error)


def _check_name(above: Handle, name: bytes, after: os.stat_result) -> ChangeReason:
    """Return NONE where the name still refers to the file that was read, else REPLACED or VANISHED.

    Raises NotRegularError where it refers to an entry that is no regular file.
    """
    try:
        now = source_fs.stat_entry(above, name)
    except FileNotFoundError:
        return ChangeReason.VANISHED
    except OSError:
        return ChangeReason.NONE
    if not stat.S_ISREG(now.st_mode):
        raise NotRegularError(name)
    return ChangeReason.NONE if os.path.samestat(now, after) else ChangeReason.REPLACED


def _make_node(
    name: bytes,
    st: os.stat_result,
    xattrs: Xattrs,
    reading: ReadResult,
    state: int,
    racy: bool,
) -> Node:
    return Node(
        name,
        _FILE,
        st.st_mode & 0o7777,
        st.st_uid,
        st.st_gid,
        clamp_time_ns(st.st_mtime_ns),
        clamp_time_ns(st.st_ctime_ns),
        st.st_ino,
        st.st_nlink or 1,  # 0 where the last name was removed after the open
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
    """Return the node with a capture record, or unchanged after a single attempt without a change."""
    if reason == ChangeReason.NONE and attempts == 1:
        return node
    extra = node.extra or NodeExtra()
    return replace(node, extra=replace(extra, capture=Capture(reason, attempts, observed)))


def _with_earlier_reason(node: Node, earlier: Node) -> Node:
    """Return the node with the reason of the earlier attempt, where it has no reason of its own."""
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
