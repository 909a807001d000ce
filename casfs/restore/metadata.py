"""Set the metadata of restored entries, each through a descriptor of the entry itself.

Another process may exchange the name of an entry at any moment, so every change goes to a descriptor. The
order matters: chown clears setuid bits and file capabilities, the owner cannot set xattrs of a
write-protected file, and every change updates the times. What is already as it should be is left alone: a
call for each value costs more than a look at it, and an unchanged entry keeps its ctime.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial

from casfs.format.node_types import NODE_TYPES
from casfs.format.tree import Node, NodeType
from casfs.restore.target_fs import NOT_PERMITTED_ERRNOS

_SYMLINK = int(NodeType.SYMLINK)


def require_same(fd: int, st: os.stat_result) -> None:
    """Raise OSError if an open entry is not the one that `st` describes, or was changed since.

    The inode number alone does not show it: a new file may get that of a deleted one.
    """
    now = os.fstat(fd)
    if not os.path.samestat(now, st) or now.st_ctime_ns != st.st_ctime_ns:
        raise _replaced()


def open_entry(fd: int, name: bytes, node: Node) -> int:
    """Return an O_PATH descriptor of an entry that has the type of `node`; raise OSError for another type."""
    opened = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    wanted = NODE_TYPES[NodeType(node.kind)].mode_bits
    if stat.S_IFMT(os.fstat(opened).st_mode) != wanted:
        os.close(opened)
        raise _replaced()
    return opened


def _replaced() -> OSError:
    return OSError(errno.ESTALE, "another process replaced it while it was restored")


def set_metadata(fd: int, node: Node, inherits: bool = True) -> list[str]:
    """Set owner, xattrs, mode and times of an open file or directory; return a message for each failure.

    Without `inherits` the entry is new and cannot have xattrs, so that it is not asked for them.
    """
    return _set_metadata(fd, node, inherits)


def set_entry_metadata(
    fd: int, name: bytes, node: Node, known: os.stat_result | None = None
) -> list[str]:
    """Set the metadata of an entry that is opened by its name, as `set_metadata` does.

    Raise OSError where it does not have the type of the node, or is not the entry of `known`.
    """
    opened = open_entry(fd, name, node)
    try:
        if known is not None:
            require_same(opened, known)
        # The link in /proc leads to the entry itself, also where that is a symlink.
        return _set_metadata(b"/proc/self/fd/%d" % opened, node, True)
    finally:
        os.close(opened)


def _set_metadata(where: int | bytes, node: Node, inherits: bool) -> list[str]:
    failed: list[str] = []
    mode = node.mode
    st = os.stat(where)
    is_changed = False
    if st.st_uid != node.uid or st.st_gid != node.gid:
        is_changed = True
        mode = _set_owner(where, node, failed)
    if inherits or node.extra is not None:
        is_changed = _set_xattrs(where, node, inherits, failed, st.st_mode) or is_changed
    if is_changed:
        st = os.stat(where)  # the owner and an ACL may have changed the mode
    try:
        if st.st_mode & 0o7777 != mode and node.kind != _SYMLINK:
            os.chmod(where, mode)
    except OSError as error:
        failed.append(f"mode: {error.strerror}")
    if st.st_mtime_ns == node.mtime_ns:
        return failed
    try:
        os.utime(where, ns=(node.mtime_ns, node.mtime_ns))
    except OSError as error:
        failed.append(f"time: {error.strerror}")
    except OverflowError as error:
        failed.append(f"time: {error}")
    return failed


def _set_owner(where: int | bytes, node: Node, failed: list[str]) -> int:
    """Set owner and group as far as this user may, and return the mode that the entry may have then."""
    mode = node.mode
    try:
        os.chown(where, node.uid, node.gid)
    except OSError as error:
        if _is_failure(error):
            failed.append(f"owner: {error.strerror}")
        # A setuid program must not run as a user other than the one who made it setuid.
        mode &= ~stat.S_ISUID
        try:
            os.chown(where, -1, node.gid)
        except OSError:
            mode &= ~stat.S_ISGID
    return mode


def _set_xattrs(
    where: int | bytes, node: Node, inherits: bool, failed: list[str], mode: int
) -> bool:
    """Set the xattrs of an entry, remove others, and return whether that may have changed the entry.

    `mode` is the one that it has. A file that its owner may not write is writable meanwhile.
    """
    wanted = dict(node.extra.xattrs) if node.extra is not None else {}
    present: list[str] = []
    if inherits:
        try:
            present = os.listxattr(where)
        except OSError:
            pass  # a file system without xattrs
    is_changed = False
    for text in present:
        # A new directory may inherit a default ACL; an existing entry may have other xattrs.
        if os.fsencode(text) not in wanted and not text.startswith("security.selinux"):
            is_changed = True
            try:
                _while_writable(where, mode, partial(os.removexattr, where, text))
            except OSError as error:
                if _is_failure(error):
                    failed.append(f"xattr {text}: {error.strerror}")
    held = {os.fsencode(text) for text in present}
    for name, value in wanted.items():
        try:
            if name in held and os.getxattr(where, name) == value:
                continue
        except OSError:
            pass  # it may be written by those who may not read it
        is_changed = True
        try:
            _while_writable(where, mode, partial(os.setxattr, where, name, value))
        except OSError as error:
            if _is_failure(error):
                failed.append(f"xattr {name.decode(errors='replace')}: {error.strerror}")
    return is_changed


def _while_writable(where: int | bytes, mode: int, change: Callable[[], None]) -> None:
    """Make a change of an entry with this mode; raise its OSError.

    The owner cannot change the xattrs of a write-protected file: it may write to it during the change.
    """
    try:
        change()
        return
    except PermissionError:
        if mode & stat.S_IWUSR or stat.S_ISLNK(mode):
            raise
    os.chmod(where, stat.S_IMODE(mode) & 0o777 | stat.S_IWUSR)
    try:
        change()
    finally:
        os.chmod(where, stat.S_IMODE(mode) & 0o777)


def _is_failure(error: OSError) -> bool:
    """Return whether an error is reported.

    Metadata that an ordinary user has no permission to set are skipped, as `cp -a` does.
    """
    return os.geteuid() == 0 or error.errno not in NOT_PERMITTED_ERRNOS
