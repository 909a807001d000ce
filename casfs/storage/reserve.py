"""Space that a local repository keeps free for the prune of a full disk.

A prune writes before it frees space, which a full disk does not let it do. So the repository has a file that
is allocated while there is room, and removed when there is almost none.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

RESERVE_FILE = "reserve"
RESERVE_BYTES = 1024 * 1024
_LEAST_BYTES = 128 * 1024
_SCARCE = 4


def allocate_reserve(root: Path) -> None:
    """Allocate the reserve in a repository's folder, as much as fits; raise nothing."""
    size = RESERVE_BYTES
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fd = _open_reserve(folder)
    except OSError:
        return
    finally:
        os.close(folder)
    try:
        there = os.fstat(fd).st_size
        while size > there and size >= _LEAST_BYTES:
            try:
                os.posix_fallocate(fd, 0, size)
                return
            except OSError:
                os.ftruncate(fd, there)
                size //= 2
    except OSError:
        return
    finally:
        os.close(fd)


def _open_reserve(folder: int) -> int:
    """Open the reserve of this user, or create it; raise OSError where another entry has its name."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(RESERVE_FILE, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    except FileExistsError:
        fd = os.open(RESERVE_FILE, flags, dir_fd=folder)
    st = os.fstat(fd)
    if stat.S_ISREG(st.st_mode) and st.st_nlink == 1 and st.st_size <= RESERVE_BYTES:
        return fd
    os.close(fd)
    raise OSError(errno.EEXIST, "another file has the name of the reserve")


def release_reserve(root: Path) -> None:
    """Free the reserve if the file system is almost full; raise nothing."""
    try:
        if _free_bytes(root) < _SCARCE * RESERVE_BYTES:
            (root / RESERVE_FILE).unlink(missing_ok=True)
    except OSError:
        return


def _free_bytes(root: Path) -> int:
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize
