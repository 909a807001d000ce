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

from casfs.tree import Kind, Node

TEMPORARY_PREFIX = b".casfs-restore-"

_serial = itertools.count()

_NOT_MINE = frozenset([errno.EPERM, errno.EACCES, errno.ENOTSUP])
"""What a user who is not root cannot set is left, as `cp -a` leaves it."""


def open_root(target: bytes) -> int:
    """Open the folder to restore into; it is made when it is not there."""
    os.makedirs(target, exist_ok=True)
    return os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_below(fd: int, name: bytes) -> int:
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
    return open_below(fd, name)


def remove(fd: int, name: bytes, st: os.stat_result) -> None:
    """Remove an entry and all below it, following no symlink."""
    if stat.S_ISDIR(st.st_mode):
        shutil.rmtree(name, dir_fd=fd)
    else:
        os.unlink(name, dir_fd=fd)


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
    if node.kind == Kind.SYMLINK:
        os.symlink(node.content, name, dir_fd=fd)
    elif node.kind == Kind.FIFO:
        os.mkfifo(name, 0o600, dir_fd=fd)
    else:
        types = {
            Kind.SOCKET: stat.S_IFSOCK,
            Kind.CHARACTER_DEVICE: stat.S_IFCHR,
            Kind.BLOCK_DEVICE: stat.S_IFBLK,
        }
        device = node.extra.rdev if node.extra is not None else 0
        os.mknod(name, types[Kind(node.kind)] | 0o600, device, dir_fd=fd)


def set_metadata(fd: int, name: bytes, node: Node, open_fd: int | None) -> list[str]:
    """Set owner, mode, xattrs and times of an entry; return what could not be set.

    `open_fd` is the entry's own descriptor where it has one (files and directories). The order
    matters: chown drops setuid bits and file capabilities, a write-protected file takes no xattrs
    from its owner, and everything moves the times.
    """
    failed: list[str] = []
    where: int | bytes = open_fd if open_fd is not None else b"/proc/self/fd/%d/%s" % (fd, name)
    follow = open_fd is not None
    root = os.geteuid() == 0
    try:
        if open_fd is not None:
            os.fchown(open_fd, node.uid, node.gid)
        else:
            os.chown(name, node.uid, node.gid, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if root or error.errno not in _NOT_MINE:
            failed.append(f"owner: {error.strerror}")
    _set_xattrs(where, follow, node, root, failed)
    try:
        if open_fd is not None:
            os.fchmod(open_fd, node.mode)
        elif node.kind != Kind.SYMLINK:
            os.chmod(name, node.mode, dir_fd=fd)
    except OSError as error:
        failed.append(f"mode: {error.strerror}")
    try:
        times = (node.mtime_ns, node.mtime_ns)
        if open_fd is not None:
            os.utime(open_fd, ns=times)
        else:
            os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False)
    except (OSError, OverflowError) as error:
        failed.append(f"time: {error}")
    return failed


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
