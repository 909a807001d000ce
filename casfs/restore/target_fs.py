"""Access the target file system by directory descriptor, and never through a symlink.

A regular file gets its name after all of it is written; until then it has a temporary name in the same
directory.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import secrets
import shutil
import stat

from casfs.format.node_types import NODE_TYPES
from casfs.format.tree import Node, NodeType

TEMPORARY_PREFIX = b".casfs-restore-"

_serial = itertools.count()

_NOT_PERMITTED_ERRNOS = frozenset([errno.EPERM, errno.EACCES, errno.ENOTSUP])
"""Metadata that an ordinary user has no permission to set are skipped, as `cp -a` does."""


def open_root(target: bytes) -> tuple[int, int | None]:
    """Open the target folder as `open_writable` does; create it where it does not exist."""
    os.makedirs(target, exist_ok=True)
    return _open_writable(None, target, os.stat(target), follow=True)


def open_writable(fd: int, name: bytes, st: os.stat_result) -> tuple[int, int | None]:
    """Open a directory of the target to create entries in it; raise OSError for a symlink.

    Where the owner has no write permission, as after an earlier restore, the function grants it and returns
    the original mode with the descriptor, for `close_restoring_mode`; else it returns None for the mode.
    """
    return _open_writable(fd, name, st, follow=False)


def close_restoring_mode(fd: int, mode: int | None) -> None:
    """Close a directory, after its mode is set back to `mode` (None: unchanged)."""
    try:
        if mode is not None:
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _open_writable(
    dir_fd: int | None, name: bytes, st: os.stat_result, follow: bool
) -> tuple[int, int | None]:
    flags = os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    mode = stat.S_IMODE(st.st_mode)
    rights = os.R_OK | os.W_OK | os.X_OK
    if mode & stat.S_IRWXU == stat.S_IRWXU or os.access(name, rights, dir_fd=dir_fd):
        return os.open(name, os.O_RDONLY | flags, dir_fd=dir_fd), None
    # By a descriptor: another process may have replaced the directory by a symlink.
    path_fd = os.open(name, os.O_PATH | flags, dir_fd=dir_fd)
    try:
        try:
            os.chmod(b"/proc/self/fd/%d" % path_fd, mode | stat.S_IRWXU)
        except OSError as error:
            if error.errno not in _NOT_PERMITTED_ERRNOS:
                raise
            return os.open(name, os.O_RDONLY | flags, dir_fd=dir_fd), None
        return os.open(b"/proc/self/fd/%d" % path_fd, os.O_RDONLY | os.O_CLOEXEC), mode
    finally:
        os.close(path_fd)


def open_if_exists(fd: int | None, name: bytes) -> int:
    """Open a directory for listing, or return -1 where that fails."""
    try:
        if fd is not None:
            return open_subdir(fd, name)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def require_empty(fd: int, name: bytes) -> None:
    """Raise OSError for a directory that is not empty."""
    opened = open_subdir(fd, name)
    try:
        if os.listdir(opened):
            raise OSError(errno.ENOTEMPTY, "a non-empty directory is in its place")
    finally:
        os.close(opened)


def open_subdir(fd: int, name: bytes) -> int:
    """Open a directory of the target; raise OSError for a symlink."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=fd)


def entry_stat(fd: int, name: bytes) -> os.stat_result | None:
    """Return the `lstat` result of an entry, or None where it does not exist."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def make_directory(fd: int, name: bytes) -> int:
    """Create and open a directory that only its owner can enter until its metadata are set."""
    os.mkdir(name, 0o700, dir_fd=fd)
    return open_subdir(fd, name)


def remove(fd: int, name: bytes, st: os.stat_result) -> None:
    """Remove an entry and everything below it, without following symlinks."""
    if not stat.S_ISDIR(st.st_mode):
        os.unlink(name, dir_fd=fd)
        return
    try:
        shutil.rmtree(name, dir_fd=fd)
    except PermissionError:
        _make_removable(fd, name)
        for _, below, _, opened in os.fwalk(name, dir_fd=fd):
            for entry in below:
                _make_removable(opened, entry)
        shutil.rmtree(name, dir_fd=fd)


def _make_removable(fd: int, name: bytes) -> None:
    """Grant the owner of a directory write permission on it; ignore other entries."""
    st = entry_stat(fd, name)
    if st is not None and stat.S_ISDIR(st.st_mode):
        os.close(open_writable(fd, name, st)[0])


def unlink_quietly(fd: int, name: bytes) -> None:
    """Remove an entry, and ignore errors."""
    try:
        os.unlink(name, dir_fd=fd)
    except OSError:
        pass


def temporary_name() -> bytes:
    """Return a name that is unique in the target."""
    return b"%s%s-%x" % (TEMPORARY_PREFIX, _process_token(), next(_serial))


@functools.cache
def _process_token() -> bytes:
    return secrets.token_hex(8).encode()


def create_file(fd: int, name: bytes) -> int:
    """Create a file in a directory and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=fd)


def make_special(fd: int, name: bytes, node: Node) -> None:
    """Create a symlink, FIFO, socket or device."""
    if node.kind == NodeType.SYMLINK:
        os.symlink(node.content, name, dir_fd=fd)
    elif node.kind == NodeType.FIFO:
        os.mkfifo(name, 0o600, dir_fd=fd)
    else:
        device = node.extra.rdev if node.extra is not None else 0
        os.mknod(name, NODE_TYPES[NodeType(node.kind)].mode_bits | 0o600, device, dir_fd=fd)


def set_metadata(fd: int, name: bytes, node: Node, open_fd: int | None) -> list[str]:
    """Set owner, xattrs, mode and times of an entry; return a message for each failure.

    `open_fd` is the entry's own descriptor (files and directories), or None. The order matters: chown
    clears setuid bits and file capabilities, the owner cannot set xattrs of a write-protected file, and
    every change updates the times.
    """
    failed: list[str] = []
    mode = node.mode
    where: int | bytes = open_fd if open_fd is not None else b"/proc/self/fd/%d/%s" % (fd, name)
    follow = open_fd is not None
    root = os.geteuid() == 0
    try:
        _set_owner(fd, name, open_fd, node.uid, node.gid)
    except OSError as error:
        if root or error.errno not in _NOT_PERMITTED_ERRNOS:
            failed.append(f"owner: {error.strerror}")
        # A setuid program must not run as a user other than the one who made it setuid.
        mode &= ~stat.S_ISUID
        try:
            _set_owner(fd, name, open_fd, -1, node.gid)
        except OSError:
            mode &= ~stat.S_ISGID
    _set_xattrs(where, follow, node, root, failed)
    try:
        if open_fd is not None:
            os.fchmod(open_fd, mode)
        elif node.kind != NodeType.SYMLINK:
            os.chmod(name, mode, dir_fd=fd)
    except OSError as error:
        failed.append(f"mode: {error.strerror}")
    try:
        times = (node.mtime_ns, node.mtime_ns)
        if open_fd is not None:
            os.utime(open_fd, ns=times)
        else:
            os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        failed.append(f"time: {error.strerror}")
    except OverflowError as error:
        failed.append(f"time: {error}")
    return failed


def _set_owner(fd: int, name: bytes, open_fd: int | None, uid: int, gid: int) -> None:
    if open_fd is not None:
        os.fchown(open_fd, uid, gid)
    else:
        os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)


def _set_xattrs(
    where: int | bytes, follow: bool, node: Node, root: bool, failed: list[str]
) -> None:
    wanted = dict(node.extra.xattrs) if node.extra is not None else {}
    try:
        present = os.listxattr(where, follow_symlinks=follow)
    except OSError:
        present = []
    for text in present:
        # A new directory may inherit a default ACL; an existing entry may have other xattrs.
        if os.fsencode(text) not in wanted and not text.startswith("security.selinux"):
            try:
                os.removexattr(where, text, follow_symlinks=follow)
            except OSError as error:
                if root or error.errno not in _NOT_PERMITTED_ERRNOS:
                    failed.append(f"xattr {text}: {error.strerror}")
    for name, value in wanted.items():
        try:
            os.setxattr(where, name, value, follow_symlinks=follow)
        except OSError as error:
            if root or error.errno not in _NOT_PERMITTED_ERRNOS:
                failed.append(f"xattr {name.decode(errors='replace')}: {error.strerror}")
