"""Access the target file system by directory descriptor, and never through a symlink.

A regular file gets its name after all of it is written; until then it has a temporary name in the same
directory.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import os
import re
import secrets
import stat
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from casfs.digest import digest_of
from casfs.format.node_types import NODE_TYPES
from casfs.format.tree import Node, NodeType
from casfs.paths import join
from casfs.user_dirs import unmapped_users

TEMPORARY_PREFIX = b".casfs-restore-"

_serial = itertools.count()

_ABANDONED_S = 86_400

_ENTER = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40
"""As in Linux."""

_FS_IOC_GETFLAGS = 0x80086601
_FS_CASEFOLD_FL = 0x40000000

NOT_PERMITTED_ERRNOS = frozenset([errno.EPERM, errno.EACCES, errno.ENOTSUP])


def open_root(target: bytes) -> tuple[int, int | None, bool]:
    """Open the target folder as `open_writable` does, and return whether it was created.

    Raise OSError where a symlink of another user leads to a folder that is not that user's.
    """
    missing: list[bytes] = []
    above = target
    while above and not os.path.lexists(above):
        missing.append(os.path.basename(above.rstrip(b"/")))
        above = os.path.dirname(above.rstrip(b"/"))
    opened = _follow(above)
    try:
        for name in reversed(missing):
            try:
                os.mkdir(name, dir_fd=opened)
            except FileExistsError:
                pass  # another process created it, or it is `..`
            below = os.open(name, _ENTER | os.O_DIRECTORY, dir_fd=opened)
            os.close(opened)
            opened = below
        return *_open_writable(opened, b".", os.fstat(opened)), bool(missing)
    finally:
        os.close(opened)


def _follow(path: bytes) -> int:
    """Open a directory by a path with symlinks, for `dir_fd`; raise OSError as `open_root` does.

    The kernel follows such a link only in sticky folders that everybody can write: it compares the owners in
    the same way.
    """
    trusted = (os.geteuid(), 0, *unmapped_users())
    foreign: set[int] = set()
    names = path.split(b"/")[::-1]
    opened = os.open(b"/" if path.startswith(b"/") else b".", os.O_PATH | os.O_CLOEXEC)
    links = 0
    try:
        while names:
            name = names.pop()
            if not name:
                continue
            below = os.open(name, _ENTER, dir_fd=opened)
            st = os.fstat(below)
            if not stat.S_ISLNK(st.st_mode):
                os.close(opened)
                opened = below
                continue
            try:
                leads_to = os.readlink(b"", dir_fd=below)
            finally:
                os.close(below)
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, "too many symbolic links", path)
            if st.st_uid not in trusted:
                foreign.add(st.st_uid)
            if leads_to.startswith(b"/"):
                os.close(opened)
                opened = os.open(b"/", os.O_PATH | os.O_CLOEXEC)
            names += leads_to.split(b"/")[::-1]
        if foreign - {os.fstat(opened).st_uid}:
            raise OSError(
                errno.EPERM,
                "a symbolic link of another user leads to a folder that is not that user's; name the folder "
                "itself if it is meant",
                path,
            )
    except BaseException:
        os.close(opened)
        raise
    return opened


def open_writable(fd: int, name: bytes, st: os.stat_result) -> tuple[int, int | None]:
    """Open a directory of the target to create entries in it; raise OSError for a symlink.

    Where the owner has no write permission, as after an earlier restore, the function grants it and returns
    the original mode with the descriptor, for `close_restoring_mode`; else it returns None for the mode.
    """
    return _open_writable(fd, name, st)


def close_restoring_mode(fd: int, mode: int | None) -> None:
    """Close a directory, after its mode is set back to `mode` (None: unchanged)."""
    try:
        if mode is not None:
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _open_writable(dir_fd: int, name: bytes, st: os.stat_result) -> tuple[int, int | None]:
    flags = os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    mode = stat.S_IMODE(st.st_mode)
    rights = os.R_OK | os.W_OK | os.X_OK
    if mode & stat.S_IRWXU == stat.S_IRWXU or os.access(name, rights, dir_fd=dir_fd):
        return os.open(name, os.O_RDONLY | flags, dir_fd=dir_fd), None
    # By a descriptor: another process may have replaced the directory by a symlink.
    path_fd = os.open(name, os.O_PATH | flags, dir_fd=dir_fd)
    try:
        try:
            mode = stat.S_IMODE(os.fstat(path_fd).st_mode)
            os.chmod(b"/proc/self/fd/%d" % path_fd, mode | stat.S_IRWXU)
        except OSError as error:
            if error.errno not in NOT_PERMITTED_ERRNOS:
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


def is_fresh(fd: int) -> bool:
    """Return whether only this user can reach what is created in a new directory, and it inherits nothing.

    A default ACL, or another rule of the directory, would give its new files xattrs.
    """
    st = os.fstat(fd)
    if st.st_uid != os.geteuid() or st.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return False
    try:
        return not any(text.startswith("system.") for text in os.listxattr(fd))
    except OSError:
        return False


def remove(fd: int, name: bytes, st: os.stat_result) -> None:
    """Remove an entry and everything below it, however deep, without following symlinks.

    Raise OSError for a directory with another file system in it, which stays.
    """
    if not stat.S_ISDIR(st.st_mode):
        os.unlink(name, dir_fd=fd)
        return
    device = os.fstat(fd).st_dev
    # Descriptors are not kept on the way down: there may be more levels than a process may open files.
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
    # As in `remove`, descriptors are not kept on the way down.
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


def unlink_quietly(fd: int, name: bytes) -> None:
    """Remove an entry, and ignore errors."""
    try:
        os.unlink(name, dir_fd=fd)
    except OSError:
        pass


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
    with os.scandir(fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if name.startswith(TEMPORARY_PREFIX) and _is_abandoned(fd, name):
                if entry.is_dir(follow_symlinks=False):
                    _remove_abandoned_directory(fd, name)
                else:
                    unlink_quietly(fd, name)


def _remove_abandoned_directory(fd: int, name: bytes) -> None:
    try:
        opened = open_subdir(fd, name)
        try:
            remove_abandoned(opened)
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


def open_parent(fd: int, path: bytes) -> tuple[int, bytes]:
    """Open the directory of the entry at a path below an open one; return it with the entry's name.

    Each name is looked up by itself, so a path may be longer than one system call accepts, and no symlink
    is followed.
    """
    *above, name = path.split(b"/")
    opened = os.dup(fd)
    try:
        for step in above:
            below = os.open(
                step, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened
            )
            os.close(opened)
            opened = below
    except BaseException:
        os.close(opened)
        raise
    return opened, name


def merges_names(fd: int, known: dict[int, bool]) -> bool:
    """Return whether a directory treats names that differ in case or normalization as one name.

    `known` caches the answer for each device during one restore.
    """
    if _has_casefold_flag(fd):
        return True
    device = os.fstat(fd).st_dev
    found = known.get(device)
    if found is None:
        found = known[device] = _probe_merging(fd)
    return found


def _has_casefold_flag(fd: int) -> bool:
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return False
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _FS_CASEFOLD_FL)


def _probe_merging(fd: int) -> bool:
    plain = temporary_name()
    for name in (plain + "-é".encode(), plain):
        try:
            os.close(create_file(fd, name))
        except OSError:
            continue  # a file system that refuses some bytes, or a directory without write permission
        try:
            text = name.decode()
            others = {text.upper(), unicodedata.normalize("NFD", text)} - {text}
            return any(entry_stat(fd, other.encode()) is not None for other in others)
        finally:
            unlink_quietly(fd, name)
    return False


def fold_name(name: bytes) -> str:
    """Return a key that is equal for all names that some file system may treat as one name.

    The key ignores case, normalization, and dots and spaces at the end. A particular file system may still
    distinguish names with equal keys.
    """
    text = unicodedata.normalize("NFD", name.decode("utf-8", "surrogateescape"))
    return unicodedata.normalize("NFD", text.casefold()).rstrip(" .")


_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def create_file(fd: int, name: bytes, mode: int = 0o600) -> int:
    """Create a file in a directory and return its descriptor."""
    return os.open(name, _CREATE, mode, dir_fd=fd)


def make_special(fd: int, name: bytes, node: Node) -> None:
    """Create a symlink, FIFO, socket or device."""
    if node.kind == NodeType.SYMLINK:
        os.symlink(node.content, name, dir_fd=fd)
    elif node.kind == NodeType.FIFO:
        os.mkfifo(name, 0o600, dir_fd=fd)
    else:
        device = node.extra.rdev if node.extra is not None else 0
        os.mknod(name, NODE_TYPES[NodeType(node.kind)].mode_bits | 0o600, device, dir_fd=fd)
