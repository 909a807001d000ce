"""Freezing: an unnamed clone of a file, which is read in its place while the file goes on changing.

Where files can share their extents (XFS, btrfs), FICLONE copies none of them and holds the locks that
writers need: the clone is what the file was at one instant, dirty and mapped pages included. It is made
with O_TMPFILE in the directory of the source itself, so it is on the same file system, subvolume and
mount; it never has a name, moves no timestamp of the source or the directory, and is gone when it is
closed, however the process ends. One thread.

A clone costs 50 to 90 µs, which is as much as all else that a small file costs, and makes what is
overwritten meanwhile move to other blocks. So with `auto` only those files are cloned at once that
will probably change while they are read; any other is cloned when it did.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from enum import StrEnum

from casfs.errors import ReflinkError

log = logging.getLogger(__name__)

_FICLONE = 0x40049409
_FS_IOC_GETFLAGS = 0x80006601 | struct.calcsize("l") << 16
_FS_IOC_SETFLAGS = 0x40006602 | struct.calcsize("l") << 16
_FS_NOCOW_FL = 0x00800000
_FLAGS = struct.Struct("=Ixxxx")  # an int, although the numbers of the calls say long

_NEVER = frozenset([errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EISDIR])
"""What a file system answers that knows no clones or no unnamed files; others are one file's case."""

_FRESH_NS = 20_000_000
_HOT_NS_PER_BYTE = 500
"""A hundred times the time that reading takes at 200 MB/s: who wrote so recently may well do so again."""


class Freeze(StrEnum):
    """Whether files are read from clones."""

    AUTO = "auto"
    NEVER = "never"
    REQUIRE = "require"


class Reflinker:
    """Clone the files of one backup, as far as their file systems can."""

    def __init__(self, mode: Freeze = Freeze.AUTO) -> None:
        self._mode = mode
        self._is_auto = mode == Freeze.AUTO
        self._without: set[int] = set()

    def should_clone(self, st: os.stat_result, now_ns: int) -> bool:
        """Tell whether a file is to be cloned before it is read at all."""
        if self._is_auto:
            hot_ns = now_ns - _FRESH_NS - st.st_size * _HOT_NS_PER_BYTE
            is_hot = st.st_mtime_ns > hot_ns or st.st_ctime_ns > hot_ns
            return is_hot and st.st_dev not in self._without
        # Of an empty file nothing is read; its size was taken at one instant.
        return self._mode == Freeze.REQUIRE and st.st_size > 0

    def clone(self, dir_fd: int, fd: int, st: os.stat_result) -> int | None:
        """Return a descriptor of a clone, which the caller closes, or None where there can be none.

        `dir_fd` is the directory that the file is in, `st` its metadata. Raises ReflinkError
        instead of returning None where clones are required.
        """
        if self._mode == Freeze.NEVER:
            return None
        if self._mode == Freeze.AUTO and not self._is_sensible(fd, st):
            return None
        try:
            return _clone(dir_fd, fd)
        except OSError as error:
            if self._mode == Freeze.REQUIRE:
                raise ReflinkError(error.errno, error.strerror) from error
            if error.errno in _NEVER:
                self._without.add(st.st_dev)
                log.info("the file system %d cannot clone files", st.st_dev)
            return None

    def _is_sensible(self, fd: int, st: os.stat_result) -> bool:
        """Tell whether a clone may be tried: while it lives, who overwrites the file needs new blocks."""
        if st.st_dev in self._without:
            return False
        try:
            disk = os.fstatvfs(fd)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize > st.st_size


def _clone(dir_fd: int, fd: int) -> int:
    clone = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        try:
            fcntl.ioctl(clone, _FICLONE, fd)
        except OSError as error:
            if error.errno != errno.EINVAL or not _share_nocow(fd, clone):
                raise
            fcntl.ioctl(clone, _FICLONE, fd)
    except BaseException:
        os.close(clone)
        raise
    return clone


def _share_nocow(fd: int, clone: int) -> bool:
    """Give the clone the source's NOCOW flag; btrfs clones only between files that agree in it."""
    try:
        wanted = _flags(fd) & _FS_NOCOW_FL
        flags = _flags(clone)
        if flags & _FS_NOCOW_FL == wanted:
            return False
        fcntl.ioctl(clone, _FS_IOC_SETFLAGS, _FLAGS.pack(flags & ~_FS_NOCOW_FL | wanted))
    except OSError:
        return False
    return True


def _flags(fd: int) -> int:
    found: int = _FLAGS.unpack(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(_FLAGS.size)))[0]
    return found
