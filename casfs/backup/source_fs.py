"""Access the source file system by directory descriptor: open entries, read metadata, list directories.

Below a source, no function looks up a path of several components or follows a symlink. A directory that is
renamed or replaced during the walk therefore cannot lead the walk out of the source.

A `Handle` is a descriptor of this process, or one of a process that reads a mount which may never answer
(`source_process`). The functions of `ACTIONS` are carried out where the descriptor is. Those that every file
needs are written out: the wrapper of the others takes as long as the system call.
"""

from __future__ import annotations

import errno
import functools
import itertools
import operator
import os
import stat
import time
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from casfs.format.node_types import TYPES_BY_MODE_BITS
from casfs.format.tree import Node, NodeExtra, NodeType

_TYPE_BITS = 0o170000

Xattrs = tuple[tuple[bytes, bytes], ...]

_NO_XATTRS = frozenset([errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES, errno.ENOENT])
"""Errors that count as "no xattrs"; every other error is reported."""

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_FILE_FLAGS_WITHOUT_ATIME = _FILE_FLAGS | os.O_NOATIME

_MAX_XATTRS_BYTES = 4 * 1024 * 1024
"""Limit of one entry's xattrs, names and values together: a node must fit into a tree blob."""

_EARLIEST_NS, _LATEST_NS = -(1 << 63), (1 << 63) - 1
"""Some file systems (tmpfs, XFS with bigtime) have times outside the range of 64-bit nanoseconds."""

_FIRST_LEASE_PAUSE_S = 0.01
_LAST_LEASE_PAUSE_S = 3.0
"""Pauses double from the first to the last: about five seconds in total."""


_SYNC_FILE_RANGE_WRITE = 1 | 2  # SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE

AT_FDCWD = -100
"""The working directory, in the place of a directory's descriptor (fcntl.h)."""


class RemoteHandle(Protocol):
    """A descriptor of another process, which carries out the functions of `ACTIONS` on it."""

    def call(self, action: str, *arguments: object) -> Any:
        """Return the result; a new descriptor is a RemoteHandle too. Raise OSError."""

    @property
    def is_dead(self) -> bool:
        """Whether the process was given up: every further call fails."""


Handle = int | RemoteHandle

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

ACTIONS: dict[str, Callable[..., Any]] = {}
"""By name, the functions that another process carries out on its descriptors."""

OPENING = frozenset(["open_once", "open_directory", "open_path"])
"""Those that return a new descriptor."""


def _action(
    function: Callable[Concatenate[int, _Arguments], _Result],
) -> Callable[Concatenate[Handle, _Arguments], _Result]:
    """Let a function on a descriptor also take the handle of another process."""
    name = function.__name__
    ACTIONS[name] = function

    @functools.wraps(function)
    def act(handle: Handle, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if isinstance(handle, int):
            return function(handle, *args, **kwargs)
        found: _Result = handle.call(name, *args)
        return found

    return act


def node_type(st: os.stat_result) -> NodeType | None:
    """Return the type of an entry, or None for a type that casfs cannot store."""
    return TYPES_BY_MODE_BITS.get(st.st_mode & _TYPE_BITS)


MayWait = Callable[[int, float], bool]
"""Whether to wait some seconds for a lease on a file of a user, given by number."""


def _always(_uid: int, _seconds: float) -> bool:
    """Return that waiting is allowed."""
    return True


def open_file(above: Handle, name: bytes, may_wait: MayWait = _always) -> Handle:
    """Open an entry for reading, without following a symlink, blocking on a FIFO or changing the atime.

    Waits up to five seconds for another process to release a lease on the file, while `may_wait` allows it.
    Raises OSError.
    """
    try:
        return open_once(above, name, True)
    except (PermissionError, BlockingIOError):
        return _open_with_retries(above, name, may_wait)


def _open_with_retries(above: Handle, name: bytes, may_wait: MayWait) -> Handle:
    pause_s = _FIRST_LEASE_PAUSE_S
    while True:
        try:
            try:
                return open_once(above, name, True)
            except PermissionError:
                # O_NOATIME is reserved to the file's owner; without it the open may be permitted.
                return open_once(above, name, False)
        except BlockingIOError:
            # Another process holds a lease, as Samba does for its clients. The failed open made the
            # kernel ask that process to release it.
            if pause_s > _LAST_LEASE_PAUSE_S:
                raise
            if not may_wait(stat_entry(above, name).st_uid, pause_s):
                raise
            time.sleep(pause_s)
            pause_s *= 2


def open_once(above: Handle, name: bytes, without_atime: bool) -> Handle:
    """Open an entry as `open_file` does, but wait for no lease."""
    if not isinstance(above, int):
        opened: RemoteHandle = above.call("open_once", name, without_atime)
        return opened
    flags = _FILE_FLAGS_WITHOUT_ATIME if without_atime else _FILE_FLAGS
    return os.open(name, flags, dir_fd=above)


@_action
def open_directory(above: int, name: bytes, follow: bool = False) -> Handle:
    """Open a directory and return its handle, which the caller closes; raise OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    return os.open(name, flags, dir_fd=above)


@_action
def open_path(above: int, name: bytes, follow: bool = False) -> Handle:
    """Open a directory for its metadata only, which needs no permission to read it; raise OSError."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    return os.open(name, flags, dir_fd=above)


def close(fd: Handle) -> None:
    """Close a descriptor."""
    if isinstance(fd, int):
        os.close(fd)
    else:
        fd.call("close")


def stat_open(fd: Handle) -> os.stat_result:
    """Return the metadata of an open entry."""
    if isinstance(fd, int):
        return os.fstat(fd)
    found: os.stat_result = fd.call("stat_open")
    return found


@_action
def stat_entry(above: int, name: bytes, follow: bool = False) -> os.stat_result:
    """Return the metadata of an entry, of a symlink itself unless `follow`; raise OSError."""
    return os.stat(name, dir_fd=above, follow_symlinks=follow)


@_action
def stat_entries(above: int, names: list[bytes]) -> list[os.stat_result | OSError]:
    """Return the metadata of several entries, or the error of each."""
    found: list[os.stat_result | OSError] = []
    for name in names:
        try:
            found.append(os.stat(name, dir_fd=above, follow_symlinks=False))
        except OSError as error:
            found.append(error)
    return found


@_action
def read_link(above: int, name: bytes) -> bytes:
    """Return the target of a symlink; raise OSError."""
    return os.readlink(name, dir_fd=above)


def read_next(fd: Handle, size: int) -> bytes:
    """Return up to `size` bytes from the position of a file."""
    if isinstance(fd, int):
        return os.read(fd, size)
    data: bytes = fd.call("read_next", size)
    return data


@_action
def read_at(fd: int, size: int, offset: int) -> bytes:
    """Return up to `size` bytes at an offset."""
    return os.pread(fd, size, offset)


def read_into(fd: Handle, buffer: memoryview, offset: int) -> int:
    """Read into a buffer at an offset; return the number of bytes."""
    if isinstance(fd, int):
        return os.preadv(fd, [buffer], offset)
    data = read_at(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


@_action
def seek(fd: int, offset: int, whence: int) -> int:
    """Seek as `os.lseek` does."""
    return os.lseek(fd, offset, whence)


@_action
def start_writeback(fd: int) -> None:
    """Start to write a file's dirty pages, so that the next store to any of them updates the timestamps.

    A store through a mapping updates them only when it makes a clean page dirty; a store to a dirty page
    during the read would go unnoticed. Waits only for writes that are already in progress.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    import ctypes  # slow to load, and many backups read no file that changed so recently

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


@_action
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


class EntryName(NamedTuple):
    """An entry that is not open: its name in an open directory."""

    above: Handle
    name: bytes


def xattrs_of(where: Handle | EntryName) -> ReadXattrs:
    """Return the readable xattrs of an open entry, or of an entry by its name, as `read_xattrs` does."""
    if isinstance(where, int):
        return read_xattrs(where)
    if isinstance(where, EntryName):
        return read_entry_xattrs(where.above, where.name)
    found: ReadXattrs = where.call("read_xattrs")
    return found


@_action
def read_entry_xattrs(above: int, name: bytes) -> ReadXattrs:
    """Return the readable xattrs of an entry; `.` is the directory itself, which may be open by O_PATH."""
    return read_xattrs(proc_fd_path(above, name))


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


for _function in (open_once, close, stat_open, read_next, read_xattrs):
    ACTIONS[_function.__name__] = _function


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
