"""Look up entries in the parent snapshot, and decide whether they are unchanged.

The parent snapshot is the only cache of unchanged files, except on a write-only host. The backup reads
everything again below a directory whose parent tree is damaged.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator

from casfs.errors import IntegrityError
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.trees.reader import StoredLeaf, TreeReader

_FILE, _DIRECTORY = NodeType.FILE, NodeType.DIRECTORY

log = logging.getLogger(__name__)


class ParentCursor:
    """A cursor over the entries of one directory of the parent snapshot, in order of their names.

    `ref` is None without a usable parent tree; `single` are all entries of a directory that is not split.
    """

    def __init__(self, trees: TreeReader, ref: TreeRef | None) -> None:
        self.ref = ref
        self.single: list[Node] | None = None
        self._nodes: Iterator[Node] = iter(())
        # The entry after the one that was matched may be in the next leaf already.
        self._leaves: deque[StoredLeaf] = deque(maxlen=2)
        try:
            self.single = None if ref is None else trees.unsplit_entries(ref)
        except IntegrityError as error:
            self._stop(error)
        if self.single is not None:
            self._nodes = iter(self.single)
        elif self.ref is not None:
            self._nodes = self._split_entries(trees, self.ref)
        self._next = self._advance()

    def match(self, name: bytes) -> Node | None:
        """Return the entry of this name, or None. Call it with names in increasing order."""
        node = self._next
        while node is not None and node.name < name:
            node = self._advance()
        if node is not None and node.name == name:
            self._next = self._advance()
            return node
        self._next = node
        return None

    def leaf_from(self, first: bytes) -> StoredLeaf | None:
        """Return the leaf of a split directory that begins with a name, if `match` has just read it."""
        for leaf in self._leaves:
            if leaf.nodes and leaf.nodes[0].name == first:
                return leaf
        return None

    def _split_entries(self, trees: TreeReader, ref: TreeRef) -> Iterator[Node]:
        for leaf in trees.stored_leaves(ref):
            self._leaves.append(leaf)
            yield from leaf.nodes

    def _advance(self) -> Node | None:
        try:
            return next(self._nodes, None)
        except IntegrityError as error:
            self._stop(error)
            return None

    def _stop(self, error: IntegrityError) -> None:
        log.warning("the parent snapshot is damaged; the files are read again: %s", error)
        self.ref = None
        self._nodes = iter(())


def is_unchanged(node: Node, st: os.stat_result, kind: NodeType | None) -> bool:
    """Return whether an entry's metadata equal those of a node that is trusted to describe its content.

    Nodes that are racy, and files in the states `appended` and `changed`, are never trusted.
    """
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
