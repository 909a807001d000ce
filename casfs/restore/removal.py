"""Remove directories of the target with everything below them, however deep, and follow no symlink.

Descriptors are not kept on the way down: there may be more levels than a process may open files. On the way
up, a directory that was moved meanwhile is noticed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from casfs.paths import join
from casfs.restore.target_fs import close_restoring_mode, open_subdir, open_writable


def remove(fd: int, name: bytes, st: os.stat_result) -> None:
    """Remove an entry and everything below it, however deep, without following symlinks.

    Raise OSError for a directory with another file system in it, which stays.
    """
    if not stat.S_ISDIR(st.st_mode):
        os.unlink(name, dir_fd=fd)
        return
    device = os.fstat(fd).st_dev
    steps: list[tuple[bytes, os.stat_result, list[bytes]]] = []
    above = os.dup(fd)
    try:
        below: list[bytes] = [name]
        while True:
            if below:
                name = below.pop()
                st = os.stat(name, dir_fd=above, follow_symlinks=False)
                if st.st_dev != device:
                    raise OSError(
                        errno.EXDEV, "another file system is mounted in it, which is kept"
                    )
                opened, _ = open_writable(above, name, st)
                steps.append((name, os.fstat(above), below))
                os.close(above)
                above = opened
                below = _unlink_all_but_directories(above)
                continue
            name, parent, below = steps.pop()
            opened = open_subdir(above, b"..")
            os.close(above)
            above = opened
            if not os.path.samestat(os.fstat(above), parent):
                raise OSError(errno.ESTALE, "it was moved while it was removed")
            os.rmdir(name, dir_fd=above)
            if not steps:
                return
    finally:
        os.close(above)


def _unlink_all_but_directories(fd: int) -> list[bytes]:
    """Remove the entries of a directory that are not directories; return the names of those that are."""
    directories = []
    with os.scandir(fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                directories.append(name)
            else:
                os.unlink(name, dir_fd=fd)
    return directories


@dataclass(slots=True)
class _Removal:
    """A directory that `remove_except` is in.

    `parent` identifies the directory above it, `mode` is its original mode where it was made writable.
    """

    name: bytes
    path: bytes
    pending: list[bytes]
    parent: os.stat_result | None = None
    mode: int | None = None
    is_kept: bool = False


def remove_except(
    fd: int,
    name: bytes,
    keeps: Callable[[bytes, bool], bool],
    on_removed: Callable[[bytes], None],
    dry_run: bool,
) -> bool:
    """Remove a directory except the entries that `keeps` names; return whether it is gone.

    An entry that is kept stays with everything below it, and so do the directories above it and everything on
    another file system. `keeps` gets a path that begins with `name`, and whether it is a directory, from the
    top down. `on_removed` gets the path of each removed entry; that of a directory ends in a slash. A dry run
    removes nothing and calls both in the same way.
    """
    device = os.fstat(fd).st_dev
    current = top = _Removal(b"", b"", [name])
    steps: list[_Removal] = []
    opened = os.dup(fd)
    try:
        while True:
            if current.pending:
                child = current.pending.pop()
                st = os.stat(child, dir_fd=opened, follow_symlinks=False)
                if st.st_dev != device:
                    current.is_kept = True
                    continue
                entered = _Removal(child, join(current.path, child), [], os.fstat(opened))
                if dry_run:
                    below = open_subdir(opened, child)
                else:
                    below, entered.mode = open_writable(opened, child, st)
                os.close(opened)
                opened = below
                steps.append(current)
                current = entered
                _remove_entries(opened, current, keeps, on_removed, dry_run)
                continue
            if not steps:
                return not top.is_kept
            above = open_subdir(opened, b"..")
            close_restoring_mode(opened, current.mode if current.is_kept else None)
            opened = above
            assert current.parent is not None
            if not os.path.samestat(os.fstat(opened), current.parent):
                raise OSError(errno.ESTALE, "it was moved while it was removed")
            if current.is_kept:
                steps[-1].is_kept = True
            else:
                if not dry_run:
                    os.rmdir(current.name, dir_fd=opened)
                on_removed(current.path + b"/")
            current = steps.pop()
    finally:
        os.close(opened)


def _remove_entries(
    fd: int,
    directory: _Removal,
    keeps: Callable[[bytes, bool], bool],
    on_removed: Callable[[bytes], None],
    dry_run: bool,
) -> None:
    """Remove the entries of a directory that are not directories, and note the directories."""
    with os.scandir(fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            path = join(directory.path, name)
            is_directory = entry.is_dir(follow_symlinks=False)
            if keeps(path, is_directory):
                directory.is_kept = True
            elif is_directory:
                directory.pending.append(name)
            else:
                if not dry_run:
                    os.unlink(name, dir_fd=fd)
                on_removed(path)
