"""The attributes of entries, as pyfuse3 replies with them."""

from __future__ import annotations

from collections.abc import Callable

import pyfuse3

from casfs.format.node_types import MODE_BITS
from casfs.format.tree import Node, NodeType, hard_link_key
from casfs_mount.inodes import hard_link_number
from casfs_mount.view import allocated_bytes

IMMUTABLE_TIMEOUT_S = 10_000_000.0
"""Snapshots never change, so the kernel may cache their entries and attributes without limit."""

CHANGING_TIMEOUT_S = 1.0
"""How long the kernel may cache what changes when snapshots appear or disappear."""

_FILE = int(NodeType.FILE)
_TYPE_BITS = [MODE_BITS.get(kind, 0) for kind in range(max(NodeType) + 1)]
"""A plain integer and a list, for the attributes of every entry."""

_PREFERRED_BYTES = 128 * 1024
"""st_blksize, the size of programs' reads; a larger one costs them memory for every small file."""


class Attributes:
    """The attributes of one entry at a time, in one object that all replies share.

    pyfuse3 copies them into a reply at once. `owner` (uid, gid) replaces that of every entry. `range_start`
    returns the first number of the range that contains an inode number.
    """

    def __init__(self, owner: tuple[int, int] | None, range_start: Callable[[int], int]) -> None:
        self._owner = owner
        self._range_start = range_start
        self.entry = pyfuse3.EntryAttributes()
        self.entry.st_blksize = _PREFERRED_BYTES

    def set_timeout(self, is_immutable: bool) -> None:
        """Let the kernel cache an entry and its attributes for long, or until they may have changed."""
        entry = self.entry
        timeout_s = IMMUTABLE_TIMEOUT_S if is_immutable else CHANGING_TIMEOUT_S
        entry.entry_timeout = entry.attr_timeout = timeout_s

    def fill(self, position: int, node: Node) -> int:
        """Write a node's attributes into the shared object and return its inode number.

        The number is the position, except for hard links, whose names share a number.
        """
        entry = self.entry
        kind = node.kind
        number = position
        rdev = 0
        extra = node.extra
        if extra is not None:
            rdev = extra.rdev
            key = hard_link_key(node) if node.nlink > 1 else None
            if key is not None:
                number = hard_link_number(self._range_start(position), key)
        # The types of pyfuse3 are for checkers only, and calling them costs as much as setting the field.
        entry.st_ino = number
        entry.st_mode = _TYPE_BITS[kind] | node.mode
        entry.st_nlink = node.nlink
        owner = self._owner
        if owner is None:
            entry.st_uid = node.uid
            entry.st_gid = node.gid
        else:
            entry.st_uid, entry.st_gid = owner
        entry.st_rdev = rdev
        entry.st_size = node.size
        entry.st_blocks = (allocated_bytes(node) + 511) >> 9 if kind == _FILE else 0
        mtime_ns = node.mtime_ns
        entry.st_mtime_ns = mtime_ns
        entry.st_atime_ns = mtime_ns
        entry.st_ctime_ns = node.ctime_ns
        return number
