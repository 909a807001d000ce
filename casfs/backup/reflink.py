"""Reflink a file to an unnamed clone, which is read instead of the file while writers change the file.

On file systems that share extents (XFS, btrfs), FICLONE copies no data and holds the locks that writers
need: the clone is the file at one instant, including dirty and mapped pages. The clone is created with
O_TMPFILE in the directory of the source, and so on the same file system, subvolume and mount. It never has a
name, changes no timestamp of the source or the directory, and is freed when it is closed, however the
process ends. One thread.

A clone costs 50 to 90 µs, as much as everything else for a small file, and while it exists, the file system
writes overwritten data to new blocks. With `auto`, therefore, only files that will probably change during
the read are cloned first; other files are cloned after they changed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from enum import StrEnum

from casfs.backup.source_fs import Handle
from casfs.errors import ReflinkError

log = logging.getLogger(__name__)

_FICLONE = 0x40049409
_FS_IOC_GETFLAGS = 0x80006601 | struct.calcsize("l") << 16
_FS_IOC_SETFLAGS = 0x40006602 | struct.calcsize("l") << 16
_FS_NOCOW_FL = 0x00800000
_FLAGS = struct.Struct(
    "=Ixxxx"
)  # the kernel copies an int, although the request numbers encode a long

_UNSUPPORTED_ERRNOS = frozenset([errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EISDIR])
"""The errors of file systems without clones or without O_TMPFILE; other errors concern one file only."""

_FRESH_NS = 20_000_000
_HOT_NS_PER_BYTE = 500
"""A hundred times the reading time at 200 MB/s: a file written within that time may well change again."""


class Freeze(StrEnum):
    """When files are read from clones."""

    AUTO = "auto"
    NEVER = "never"
    REQUIRE = "require"


class Reflinker:
    """Clone the files of one backup, where their file systems support it."""

    def __init__(self, mode: Freeze = Freeze.AUTO) -> None:
        self._mode = mode
        self._is_auto = mode == Freeze.AUTO
        self._unsupported_devices: set[int] = set()

    def should_clone(self, st: os.stat_result, now_ns: int) -> bool:
        """Return whether to clone a file before its first read."""
        if self._is_auto:
            hot_ns = now_ns - _FRESH_NS - st.st_size * _HOT_NS_PER_BYTE
            is_hot = st.st_mtime_ns > hot_ns or st.st_ctime_ns > hot_ns
            return is_hot and st.st_dev not in self._unsupported_devices
        # An empty file has no data to read, and its size was taken at one instant.
        return self._mode == Freeze.REQUIRE and st.st_size > 0

    def clone(self, above: Handle, fd: Handle, st: os.stat_result) -> int | None:
        """Return a descriptor of a clone, which the caller closes, or None where cloning is not possible.

        `above` is the directory of the file, `st` the file's metadata. Raises ReflinkError instead of
        returning None where clones are required.
        """
        if self._mode == Freeze.NEVER:
            return None
        if not (isinstance(above, int) and isinstance(fd, int)):
            # Another process reads the mount: no file system of those types clones files.
            if self._mode == Freeze.REQUIRE:
                raise ReflinkError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return None
        if self._mode == Freeze.AUTO and not self._may_try(fd, st):
            return None
        try:
            return _clone(above, fd)
        except OSError as error:
            if self._mode == Freeze.REQUIRE:
                raise ReflinkError(error.errno, error.strerror) from error
            if error.errno in _UNSUPPORTED_ERRNOS:
                self._unsupported_devices.add(st.st_dev)
                log.info("file system %d cannot clone files; they are read directly", st.st_dev)
            return None

    def _may_try(self, fd: int, st: os.stat_result) -> bool:
        """Return whether the file system may support clones and has room for one.

        While the clone exists, writers that overwrite the file need new blocks, at most the file's size.
        """
        if st.st_dev in self._unsupported_devices:
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
    """Copy the source's NOCOW flag to the clone: btrfs refuses to clone between files that differ in it.

    Returns whether the flag was changed.
    """
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
