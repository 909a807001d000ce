"""The file system that is restored into: entries by directory descriptor, never through a symlink.

A regular file gets its name only when all of it is written; until then it has a temporary one beside.
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

_NOT_MINE = frozenset([errno.EPERM, errno.EACCES, errno.ENOTSUP])
"""What a user who is not root cannot set is left, as `cp -a` leaves it."""


def open_root(target: bytes) -> tuple[int, int | None]:
    """Open the folder to restore into, made when it is not there, as `open_writable` does."""
    os.makedirs(target, exist_ok=True)
    return _open_writable(None, target, os.stat(target), follow=True)


def open_writable(fd: int, name: bytes, st: os.stat_result) -> tuple[int, int | None]:
    """Open a directory of the target to make entries in it; raises OSError for a symlink.

    One that its owner may not write into, as a restore before may have left it, gets that right. Then its
    mode comes with the descriptor, for `close_restoring_mode` to give it back where it gets no other.
    """
    return _open_writable(fd, name, st, follow=False)


def close_restoring_mode(fd: int, mode: int | None) -> None:
    """Close a directory, with the mode that it had where one is given."""
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
    # By a descriptor: the name may be that of a symlink by now.
    path_fd = os.open(name, os.O_PATH | flags, dir_fd=dir_fd)
    try:
        try:
            os.chmod(b"/proc/self/fd/%d" % path_fd, mode | stat.S_IRWXU)
        except OSError as error:
            if error.errno not in _NOT_MINE:
                raise
            return os.open(name, os.O_RDONLY | flags, dir_fd=dir_fd), None
        return os.open(b"/proc/self/fd/%d" % path_fd, os.O_RDONLY | os.O_CLOEXEC), mode
    finally:
        os.close(path_fd)


def open_if_exists(fd: int | None, name: bytes) -> int:
    """Open a directory to see what is in it, or return -1 where that cannot be seen."""
    try:
        if fd is not None:
            return open_subdir(fd, name)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def require_empty(fd: int, name: bytes) -> None:
    """Raise OSError for a directory that has something in it."""
    opened = open_subdir(fd, name)
    try:
        if os.listdir(opened):
            raise OSError(errno.ENOTEMPTY, "a directory that is not empty is in its place")
    finally:
        os.close(opened)


def open_subdir(fd: int, name: bytes) -> int:
    """Open a directory of the target; raises OSError for a symlink."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=fd)


def entry_stat(fd: int, name: bytes) -> os.stat_result | None:
    """Return what is known of an entry, or None where there is none."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def make_directory(fd: int, name: bytes) -> int:
    """Make a directory that only its owner enters until its metadata are set, and open it."""
    os.mkdir(name, 0o700, dir_fd=fd)
    return open_subdir(fd, name)


def remove(fd: int, name: bytes, st: os.stat_result) -> None:
    """Remove an entry and all below it, following no symlink."""
    if not stat.S_ISDIR(st.st_mode):
        os.unlink(name, dir_fd=fd)
        return
    try:
        shutil.rmtree(name, dir_fd=fd)
    except PermissionError:
        _unprotect(fd, name)
        for _, below, _, opened in os.fwalk(name, dir_fd=fd):
            for entry in below:
                _unprotect(opened, entry)
        shutil.rmtree(name, dir_fd=fd)


def _unprotect(fd: int, name: bytes) -> None:
    """Give its owner the right to empty a directory; anything else is left alone."""
    st = entry_stat(fd, name)
    if st is not None and stat.S_ISDIR(st.st_mode):
        os.close(open_writable(fd, name, st)[0])


def unlink_quietly(fd: int, name: bytes) -> None:
    """Remove an entry that may not be there."""
    try:
        os.unlink(name, dir_fd=fd)
    except OSError:
        pass


def temporary_name() -> bytes:
    """Return a name that nothing in the target has."""
    return b"%s%s-%x" % (TEMPORARY_PREFIX, _own_mark(), next(_serial))


@functools.cache
def _own_mark() -> bytes:
    return secrets.token_hex(8).encode()


def create_file(fd: int, name: bytes) -> int:
    """Create a file in a directory and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=fd)


def make_special(fd: int, name: bytes, node: Node) -> None:
    """Make a symlink, FIFO, socket or device."""
    if node.kind == NodeType.SYMLINK:
        os.symlink(node.content, name, dir_fd=fd)
    elif node.kind == NodeType.FIFO:
        os.mkfifo(name, 0o600, dir_fd=fd)
    else:
        device = node.extra.rdev if node.extra is not None else 0
        os.mknod(name, NODE_TYPES[NodeType(node.kind)].mode_bits | 0o600, device, dir_fd=fd)


def set_metadata(fd: int, name: bytes, node: Node, open_fd: int | None) -> list[str]:
    """Set owner, mode, xattrs and times of an entry; return what could not be set.

    `open_fd` is the entry's own descriptor where it has one (files and directories). The order
    matters: chown drops setuid bits and file capabilities, a write-protected file takes no xattrs
    from its owner, and everything moves the times.
    """
    failed: list[str] = []
    mode = node.mode
    where: int | bytes = open_fd if open_fd is not None else b"/proc/self/fd/%d/%s" % (fd, name)
    follow = open_fd is not None
    root = os.geteuid() == 0
    try:
        _set_owner(fd, name, open_fd, node.uid, node.gid)
    except OSError as error:
        if root or error.errno not in _NOT_MINE:
            failed.append(f"owner: {error.strerror}")
        # Whoever runs a setuid program must not become another user than the one who made it so.
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
        # A new directory may have inherited a default ACL; an old entry may have had more than this.
        if os.fsencode(text) not in wanted and not text.startswith("security.selinux"):
            try:
                os.removexattr(where, text, follow_symlinks=follow)
            except OSError as error:
                if root or error.errno not in _NOT_MINE:
                    failed.append(f"xattr {text}: {error.strerror}")
    for name, value in wanted.items():
        try:
            os.setxattr(where, name, value, follow_symlinks=follow)
        except OSError as error:
            if root or error.errno not in _NOT_MINE:
                failed.append(f"xattr {name.decode(errors='replace')}: {error.strerror}")
