"""Access the target file system by directory descriptor, and never through a symlink."""

from __future__ import annotations

import errno
import os
import stat

from casfs.format.node_types import NODE_TYPES
from casfs.format.tree import Node, NodeType
from casfs.user_dirs import unmapped_users

_ENTER = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40
"""As in Linux."""

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
        return *open_writable(opened, b".", os.fstat(opened)), bool(missing)
    finally:
        os.close(opened)


def _follow(path: bytes) -> int:
    """Open a directory by a path with symlinks, for `dir_fd`; raise OSError as `open_root` does.

    The kernel follows such a link only in sticky folders that every user can write: it compares the owners in
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
    flags = os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    mode = stat.S_IMODE(st.st_mode)
    rights = os.R_OK | os.W_OK | os.X_OK
    if mode & stat.S_IRWXU == stat.S_IRWXU or os.access(name, rights, dir_fd=fd):
        return os.open(name, os.O_RDONLY | flags, dir_fd=fd), None
    # By a descriptor: another process may have replaced the directory by a symlink.
    path_fd = os.open(name, os.O_PATH | flags, dir_fd=fd)
    try:
        try:
            mode = stat.S_IMODE(os.fstat(path_fd).st_mode)
            os.chmod(b"/proc/self/fd/%d" % path_fd, mode | stat.S_IRWXU)
        except OSError as error:
            if error.errno not in NOT_PERMITTED_ERRNOS:
                raise
            return os.open(name, os.O_RDONLY | flags, dir_fd=fd), None
        return os.open(b"/proc/self/fd/%d" % path_fd, os.O_RDONLY | os.O_CLOEXEC), mode
    finally:
        os.close(path_fd)


def close_restoring_mode(fd: int, mode: int | None) -> None:
    """Close a directory, after its mode is set back to `mode` (None: unchanged)."""
    try:
        if mode is not None:
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


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


def unlink_quietly(fd: int, name: bytes) -> None:
    """Remove an entry, and ignore errors."""
    try:
        os.unlink(name, dir_fd=fd)
    except OSError:
        pass


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
