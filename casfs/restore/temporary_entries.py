"""Names of unfinished entries in the target, and the removal of those that killed restores left.

A name identifies the process and the system that chose it, so that the entries of a running restore are kept.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import secrets
import time
from collections.abc import Iterator

from casfs.digest import digest_of
from casfs.restore.target_fs import entry_stat, open_subdir, unlink_quietly

TEMPORARY_PREFIX = b".casfs-restore-"

_serial = itertools.count()

_ABANDONED_S = 86_400


def temporary_name() -> bytes:
    """Return a name that is unique in the target and identifies this process."""
    return b"%s%s-%x" % (TEMPORARY_PREFIX, _process_token(), next(_serial))


_TEMPORARY = re.compile(
    re.escape(TEMPORARY_PREFIX) + rb"([0-9a-f]{16})-([0-9a-f]+)-([0-9a-f]+)-[0-9a-f]+"
)


@functools.cache
def _process_token() -> bytes:
    return b"%s-%x-%x" % (_system_token(), os.getpid(), _start_time(os.getpid()) or 0)


@functools.cache
def _system_token() -> bytes:
    """Return a token of this boot of the system and of its namespace of processes."""
    parts = [_read_or_empty(name) for name in (b"/proc/sys/kernel/random/boot_id",)]
    try:
        parts.append(os.readlink(b"/proc/self/ns/pid"))
    except OSError:
        parts.append(secrets.token_bytes(16))
    return digest_of(b"".join(parts)).hex()[:16].encode()


def _read_or_empty(name: bytes) -> bytes:
    try:
        with open(name, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _start_time(pid: int) -> int | None:
    """Return when a process of this system started, in ticks since the boot; None if it does not exist."""
    fields = _read_or_empty(b"/proc/%d/stat" % pid).rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


def remove_abandoned(fd: int) -> None:
    """Remove the temporary files of killed restores from a directory; ignore errors.

    Files of a process of this system are removed after it has ended. Another system may write to the same
    storage, or may be this system before its last boot: its files are removed a day after their last change.
    """
    for name, is_directory in _abandoned(fd):
        if is_directory:
            _remove_abandoned_directory(fd, name)
        else:
            unlink_quietly(fd, name)


def _abandoned(fd: int) -> Iterator[tuple[bytes, bool]]:
    """Yield the abandoned temporary entries of a directory, and whether each is a directory."""
    with os.scandir(fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if name.startswith(TEMPORARY_PREFIX) and _is_abandoned(fd, name):
                yield name, entry.is_dir(follow_symlinks=False)


def _remove_abandoned_directory(fd: int, name: bytes) -> None:
    """Remove a private directory with its files; a restore makes no directory in it, but others may."""
    try:
        opened = open_subdir(fd, name)
        try:
            for inside, is_directory in _abandoned(opened):
                if not is_directory:
                    unlink_quietly(opened, inside)
        finally:
            os.close(opened)
        os.rmdir(name, dir_fd=fd)
    except OSError:
        pass


def is_temporary(name: bytes) -> bool:
    """Return whether `temporary_name` could have returned a name."""
    return _TEMPORARY.fullmatch(name) is not None


def _is_abandoned(fd: int, name: bytes) -> bool:
    found = _TEMPORARY.fullmatch(name)
    if found is None:
        return False
    if found[1] == _system_token():
        started = _start_time(int(found[2], 16))
        return started is None or started != int(found[3], 16)
    st = entry_stat(fd, name)
    return st is not None and st.st_ctime < time.time() - _ABANDONED_S
