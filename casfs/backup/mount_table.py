"""Mounts that another machine or program serves: they may never answer, so the walk touches none itself.

A call that waits for such a mount may wait forever, in a state in which even SIGKILL is ignored. The kernel's
table of mounts (proc(5), mountinfo) shows them without touching them. An ordinary user can mount with FUSE at
any moment, so the table is read again whenever it has changed. One thread.
"""

from __future__ import annotations

import os
import re
import select
import stat
from typing import NamedTuple

_TABLE = "/proc/self/mountinfo"

_SERVED_TYPES = frozenset(
    [
        *(
            "9p",
            "afs",
            "autofs",
            "beegfs",
            "ceph",
            "cifs",
            "coda",
            "fuse",
            "fuseblk",
            "gfs2",
            "glusterfs",
        ),
        *("lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs"),
    ]
)
"""File system types whose answers come from a program or another machine; all `fuse.…` are added."""

_MAX_SYMLINKS = 40

_NONE: frozenset[bytes] = frozenset()


def is_served_type(kind: str) -> bool:
    """Return whether a program or another machine answers for file systems of this type."""
    return kind in _SERVED_TYPES or kind.startswith("fuse.")


class _Mount(NamedTuple):
    path: bytes
    kind: str


def parse_table(table: bytes) -> list[_Mount]:
    """Return the mounts of a table; of several mounts at one path the last, which covers the others."""
    found = {}
    for line in table.splitlines():
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        if len(fields) < 5 or not after:
            continue
        path = re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), fields[4])
        found[path] = _Mount(path, after.split(b" ")[0].decode("ascii", "replace"))
    return list(found.values())


def outermost_served(mounts: list[_Mount]) -> frozenset[bytes]:
    """Return the paths of the served mounts that lie in no other one.

    The root is not among them: the program itself would not run where it does not answer.
    """
    outermost: list[bytes] = []
    for path in sorted(one.path for one in mounts if is_served_type(one.kind) and one.path != b"/"):
        if not (outermost and path.startswith(outermost[-1] + b"/")):
            outermost.append(path)
    return frozenset(outermost)


class MountTable:
    """The served mounts that this process sees. Close it at the end."""

    def __init__(self, table: str = _TABLE) -> None:
        self._fd = -1
        self._poll = select.poll()
        self._served: frozenset[bytes] = _NONE
        self._names: dict[tuple[int, int], frozenset[bytes]] = {}
        try:
            self._fd = os.open(table, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # without /proc, all mounts are taken for local
        self._poll.register(self._fd, select.POLLPRI)
        self._read()

    def close(self) -> None:
        """Close the table."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def refresh(self) -> bool:
        """Read the table again if it changed since the last call; return whether it did."""
        if self._fd < 0 or not self._poll.poll(0):
            return False
        self._read()
        return True

    def _read(self) -> None:
        parts = []
        os.lseek(self._fd, 0, os.SEEK_SET)
        while part := os.read(self._fd, 1 << 16):
            parts.append(part)
        self._served = outermost_served(parse_table(b"".join(parts)))
        names: dict[tuple[int, int], set[bytes]] = {}
        for path in self._served:
            above, _, name = path.rpartition(b"/")
            try:
                # Of a directory above all served mounts.
                st = os.stat(above or b"/")
            except OSError:
                continue
            names.setdefault((st.st_dev, st.st_ino), set()).add(name)
        self._names = {key: frozenset(found) for key, found in names.items()}

    def names_in(self, device: int, inode: int) -> frozenset[bytes]:
        """Return the names in a directory on which served mounts are."""
        return self._names.get((device, inode), _NONE)

    def mount_of(self, path: bytes) -> bytes | None:
        """Return the served mount that a path leads into, or None, without touching any.

        Symlinks are followed, also those in the last component.
        """
        if not self._served:
            return None
        pending = _components(os.path.join(os.getcwdb(), path))
        current = b""
        links = 0
        while pending:
            name = pending.pop()
            if name == b"..":
                current = current.rpartition(b"/")[0]
                continue
            inside = current + b"/" + name
            if inside in self._served:
                return inside
            try:
                is_link = stat.S_ISLNK(os.lstat(inside).st_mode)
                target = os.readlink(inside) if is_link else None
            except OSError:
                return None
            if target is None:
                current = inside
                continue
            links += 1
            if links > _MAX_SYMLINKS:
                return None
            pending += _components(target)
            if target.startswith(b"/"):
                current = b""
        return None


def _components(path: bytes) -> list[bytes]:
    """Return the components of a path, the last one first."""
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]
