"""The previous snapshot: what it tells of a directory, and whether an entry is still what it tells.

It is the cache of what is unchanged; there is no other. Where it is damaged it is not asked further.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from casfs.errors import IntegrityError
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.trees.reader import TreeReader

_FILE, _DIRECTORY = NodeType.FILE, NodeType.DIRECTORY

log = logging.getLogger(__name__)


class ParentCursor:
    """The entries of one directory in the previous snapshot, taken in order of their names."""

    def __init__(self, trees: TreeReader, ref: TreeRef | None) -> None:
        self.ref = ref
        self.single: list[Node] | None = None
        self._nodes: Iterator[Node] = iter(())
        try:
            self.single = None if ref is None else trees.unsplit_entries(ref)
        except IntegrityError as error:
            self._give_up(error)
        if self.single is not None:
            self._nodes = iter(self.single)
        elif self.ref is not None:
            self._nodes = trees.nodes(self.ref)
        self._next = self._advance()

    def match(self, name: bytes) -> Node | None:
        """Return the entry of this name, or None; names are asked for in increasing order."""
        node = self._next
        while node is not None and node.name < name:
            node = self._advance()
        if node is not None and node.name == name:
            self._next = self._advance()
            return node
        self._next = node
        return None

    def _advance(self) -> Node | None:
        try:
            return next(self._nodes, None)
        except IntegrityError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: IntegrityError) -> None:
        log.warning("the previous snapshot is damaged, what is there is read again: %s", error)
        self.ref = None
        self._nodes = iter(())


def is_unchanged(node: Node, st: os.stat_result, kind: NodeType | None) -> bool:
    """Tell whether an entry's metadata are those of a node that may be trusted to tell its content."""
    return (
        node.mtime_ns == st.st_mtime_ns
        and node.ctime_ns == st.st_ctime_ns
        and node.inode == st.st_ino
        and node.kind == kind
        and not node.racy
        and (kind is not _FILE or (node.size == st.st_size and not node.state))
        and node.nlink == st.st_nlink
        and (node.nlink == 1 or kind is _DIRECTORY or _has_device(node, st))
        and node.uid == st.st_uid
        and node.mode == st.st_mode & 0o7777
    )


def _has_device(node: Node, st: os.stat_result) -> bool:
    return node.extra is not None and node.extra.device == st.st_dev
