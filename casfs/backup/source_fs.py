"""Access the source file system by directory descriptor: open entries, read metadata, list directories.

Below a source, no function looks up a path of several components or follows a symlink. A directory that is
renamed or replaced during the walk therefore cannot lead the walk out of the source.
"""

from __future__ import annotations

import errno
import itertools
import operator
import os
import stat
import time
from collections.abc import Callable
from typing import NamedTuple

from casfs.format.node_types import TYPES_BY_MODE_BITS
from casfs.format.tree import Node, NodeExtra, NodeType

_TYPE_BITS = 0o170000

Xattrs = tuple[tuple[bytes, bytes], ...]

_NO_XATTRS = frozenset([errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES, errno.ENOENT])
"""Errors that count as "no xattrs"; every other error is reported."""

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_noatime = os.O_NOATIME

_MAX_XATTRS_BYTES = 4 * 1024 * 1024
"""Limit of one entry's xattrs, names and values together: a node must fit into a tree blob."""

_EARLIEST_NS, _LATEST_NS = -(1 << 63), (1 << 63) - 1
"""Some file systems (tmpfs, XFS with bigtime) have times outside the range of 64-bit nanoseconds."""

_FIRST_LEASE_PAUSE_S = 0.01
_LAST_LEASE_PAUSE_S = 3.0
"""Pauses double from the first to the last: about five seconds in total."""


def node_type(st: os.stat_result) -> NodeType | None:
    """Return the type of an entry, or None for a type that casfs cannot store."""
    return TYPES_BY_MODE_BITS.get(st.st_mode & _TYPE_BITS)


MayWait = Callable[[int, float], bool]
"""Whether to wait some seconds for a lease on a file of a user, given by number."""


def _always(_uid: int, _seconds: float) -> bool:
    """Return that waiting is allowed."""
    return True


def open_file(dir_fd: int, name: bytes, may_wait: MayWait = _always) -> int:
    """Open an entry for reading, without following a symlink, blocking on a FIFO or changing the atime.

    Waits up to five seconds for another process to release a lease on the file, while `may_wait` allows it.
    Raises OSError.
    """
    try:
        return os.open(name, _FILE_FLAGS | _noatime, dir_fd=dir_fd)
    except (PermissionError, BlockingIOError):
        return _open_with_retries(dir_fd, name, may_wait)


def _open_with_retries(dir_fd: int, name: bytes, may_wait: MayWait) -> int:
    pause_s = _FIRST_LEASE_PAUSE_S
    while True:
        try:
            try:
                return os.open(name, _FILE_FLAGS | _noatime, dir_fd=dir_fd)
            except PermissionError:
                # O_NOATIME is reserved to the file's owner; without it the open may be permitted.
                return os.open(name, _FILE_FLAGS, dir_fd=dir_fd)
        except BlockingIOError:
            # Another process holds a lease, as Samba does for its clients. The failed open made the
            # kernel ask that process to release it.
            if pause_s > _LAST_LEASE_PAUSE_S:
                raise
            owner = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_uid
            if not may_wait(owner, pause_s):
                raise
            time.sleep(pause_s)
            pause_s *= 2


def open_directory(dir_fd: int | None, name: bytes, follow: bool = False) -> int:
    """Open a directory and return its descriptor, which the caller closes; raise OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    return os.open(name, flags, dir_fd=dir_fd)


def list_names(fd: int) -> list[bytes]:
    """Return the names in an open directory, each once, sorted as bytes.

    A directory in which entries are renamed while it is listed may list one of them twice.
    """
    try:
        names = os.listdir(b"/proc/self/fd/%d" % fd)
    except FileNotFoundError:
        names = [os.fsencode(name) for name in os.listdir(fd)]  # no /proc; costs twice the memory
    names.sort()
    if any(map(operator.eq, names, itertools.islice(names, 1, None))):
        names = [name for name, _ in itertools.groupby(names)]
    return names


class ReadXattrs(NamedTuple):
    """The xattrs of an entry that could be read, sorted by name, and why some may be missing."""

    xattrs: Xattrs
    error: OSError | None = None


_WITHOUT_XATTRS = ReadXattrs(())


def read_xattrs(where: int | bytes) -> ReadXattrs:
    """Return the readable xattrs of an open file or of the entry at a path. Raise nothing.

    POSIX ACLs and file capabilities are xattrs too. A value that this user may not read is no error. An
    xattr with which all of them would exceed 4 MiB is one, and so is every other failure.
    """
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        return ReadXattrs((), None if error.errno in _NO_XATTRS else error)
    if not names:
        return _WITHOUT_XATTRS
    found: dict[bytes, bytes] = {}
    total_bytes = 0
    problem: OSError | None = None
    for name in names:
        try:
            value = os.getxattr(where, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                problem = problem or error
            continue
        total_bytes += len(name) + len(value)
        if total_bytes > _MAX_XATTRS_BYTES:
            problem = OSError(
                errno.E2BIG,
                f"its extended attributes exceed {_MAX_XATTRS_BYTES >> 20} MiB in total",
            )
            break
        found[os.fsencode(name)] = value
    return ReadXattrs(tuple(sorted(found.items())), problem)


def proc_fd_path(dir_fd: int, name: bytes) -> bytes:
    """Return a path to an entry, for system calls that take no directory descriptor."""
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)


def clamp_time_ns(time_ns: int) -> int:
    """Return the time clamped to the range of a node: the years 1677 to 2262."""
    if _EARLIEST_NS <= time_ns <= _LATEST_NS:
        return time_ns
    return max(_EARLIEST_NS, min(time_ns, _LATEST_NS))


def make_extra(st: os.stat_result, xattrs: Xattrs, kind: NodeType) -> NodeExtra | None:
    """Return the rarely used fields of a node (xattrs, device numbers), or None where all are empty."""
    device = st.st_dev if st.st_nlink > 1 and kind != NodeType.DIRECTORY else 0
    rdev = st.st_rdev if kind in (NodeType.CHARACTER_DEVICE, NodeType.BLOCK_DEVICE) else 0
    if not (xattrs or device or rdev):
        return None
    return NodeExtra(xattrs, rdev, device)


def make_node(
    name: bytes, st: os.stat_result, kind: NodeType, xattrs: Xattrs, content: bytes = b""
) -> Node:
    """Return the node of an entry other than a regular file; the caller adds the tree of a directory."""
    return Node(
        name,
        kind,
        stat.S_IMODE(st.st_mode),
        st.st_uid,
        st.st_gid,
        clamp_time_ns(st.st_mtime_ns),
        clamp_time_ns(st.st_ctime_ns),
        st.st_ino,
        st.st_nlink,
        size=len(content),
        content=content,
        extra=make_extra(st, xattrs, kind),
    )
