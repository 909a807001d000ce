"""Set metadata and create links of target entries where no other user can exchange their names.

Another user may own a directory of the target, and can then replace a new entry between two system calls. So
an entry that is reached by its name is created in a directory that only this user can change, and its
metadata are set through a descriptor of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from casfs.restore.target_fs import create_file, open_parent, open_subdir, unlink_quietly
from casfs.restore.temporary_entries import temporary_name

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class FileIdentity(NamedTuple):
    """The identity of a restored file, which differs from that of a later file with the same inode number."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identify(st: os.stat_result) -> FileIdentity:
    """Return the identity of the file that a `stat` result describes."""
    return FileIdentity(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)


def is_private(fd: int) -> bool:
    """Return whether only this user (and root) can add and replace names in an open directory."""
    st = os.fstat(fd)
    return st.st_uid == os.geteuid() and not st.st_mode & _WRITABLE_BY_OTHERS


@contextmanager
def private_directory(fd: int) -> Iterator[int]:
    """Yield the descriptor of a directory for temporary entries, on the file system of the directory `fd`.

    It is `fd` itself where that is private, else a new directory in it of mode 0700, which is removed at the
    end. On a file system that does not record this user as the owner of what it creates (SSHFS, CIFS), it is
    `fd`. Raises OSError, also where another user exchanged the new one.
    """
    if is_private(fd):
        yield fd
        return
    name = temporary_name()
    os.mkdir(name, 0o700, dir_fd=fd)
    try:
        opened = open_subdir(fd, name)
        try:
            is_usable = is_private(opened)
            if not is_usable and _records_owners(fd):
                raise OSError(errno.ESTALE, "another user exchanged the folder for a new entry")
            yield opened if is_usable else fd
        finally:
            os.close(opened)
    finally:
        try:
            os.rmdir(name, dir_fd=fd)
        except OSError:
            pass  # another user has moved it


def _records_owners(fd: int) -> bool:
    """Return whether a new file in a directory belongs to this user, as the new file's descriptor shows."""
    name = temporary_name()
    opened = create_file(fd, name)
    try:
        return is_private(opened)
    finally:
        os.close(opened)
        unlink_quietly(fd, name)


def link_inode(fd: int, path: bytes, identity: FileIdentity, new_fd: int, new_name: bytes) -> None:
    """Link the file at a path below the directory `fd` to a new name in the directory `new_fd`.

    Raise OSError where the path no longer leads to `identity`, without following a symlink.
    """
    above, name = open_parent(fd, path)
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    finally:
        os.close(above)
    try:
        if identify(os.fstat(found)) != identity:
            raise OSError(errno.ESTALE, "its first name refers to another file now")
        # Python calls linkat(), which alone follows the link in /proc, only with a directory descriptor.
        os.link(b"/proc/self/fd/%d" % found, new_name, dst_dir_fd=new_fd, follow_symlinks=True)
    finally:
        os.close(found)
