"""A little disk space that is kept back, so that a full disk can still be freed.

To forget and to prune one must write a lock, a condemnation and some pages of the index before anything
goes. Where the disk is full the reserve is given up for that, and taken again when there is room.
"""

from __future__ import annotations

import os
from pathlib import Path

RESERVE_FILE = "reserve"
RESERVE_BYTES = 1024 * 1024
_LEAST_BYTES = 128 * 1024
_SCARCE = 4


def take_reserve(root: Path) -> None:
    """Set the space aside in a repository's folder, as much of it as there is; raises nothing."""
    path = root / RESERVE_FILE
    size = RESERVE_BYTES
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return
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


def give_up_reserve(root: Path) -> None:
    """Free the space where there is hardly any other; raises nothing."""
    try:
        if _free_bytes(root) < _SCARCE * RESERVE_BYTES:
            (root / RESERVE_FILE).unlink(missing_ok=True)
    except OSError:
        return


def _free_bytes(root: Path) -> int:
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize
