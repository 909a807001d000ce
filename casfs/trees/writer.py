"""Directory writer: takes entries sorted by name and stores one tree, split if it is large.

The names determine where a piece ends, so that one new file rewrites one piece. Memory holds one leaf and the
references of unfinished branches, whatever the size of the directory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from casfs.digest import Digest
from casfs.errors import TreeError
from casfs.format.codec import BlobKind
from casfs.format.tree import (
    MAX_FILE_BYTES,
    MAX_PIECE_LEVELS,
    Branch,
    Leaf,
    Node,
    PieceRef,
    TreeRef,
    encode_leaf,
    encode_node,
    encode_piece,
    subtree_summary,
    sum_of_counts,
    xattr_count,
)
from casfs.trees.content import Put
from casfs.trees.reader import StoredLeaf

PIECE_MIN_ENTRIES = 1024
PIECE_MAX_ENTRIES = 8192
PIECE_MAX_BYTES = 4 * 1024 * 1024
_PIECE_MASK = 0x7FF
"""A name whose seeded CRC-32 ends in eleven zero bits ends a piece: on average about 3,000 entries."""


@dataclass(frozen=True, slots=True)
class TreeSplit:
    """Where the tree of a directory is split; the defaults are those of the format.

    Writers of a repository use the defaults: with other numbers an unchanged directory has another tree.
    """

    min_entries: int = PIECE_MIN_ENTRIES
    max_entries: int = PIECE_MAX_ENTRIES
    mask: int = _PIECE_MASK
    max_levels: int = MAX_PIECE_LEVELS


FORMAT_SPLIT = TreeSplit()


class TreeWriter:
    """Builds the tree of one directory; used by one thread.

    `previous` is the tree of the same directory in the parent snapshot and `previous_single` its entries if
    it is not split. If the entries equal these, `finish` returns `previous` and encodes nothing. With
    `counts_xattrs`, as in format 2, the references count the entries with extended attributes; the tree of a
    `previous` that does not is stored again, which stores what it refers to with a count.
    """

    def __init__(
        self,
        put: Put,
        digest: Callable[[bytes], Digest],
        seed: int,
        previous: TreeRef | None = None,
        previous_single: list[Node] | None = None,
        *,
        counts_xattrs: bool = False,
        split: TreeSplit = FORMAT_SPLIT,
    ) -> None:
        self._counts_xattrs = counts_xattrs
        self._split = split
        self._min_entries = split.min_entries
        self._put = put
        self._digest = digest
        self._seed = seed
        self._previous = previous
        self._previous_nodes = previous_single
        self._nodes: list[Node] = []
        self._encoded: list[bytes] | None = None
        self._encoded_bytes = 0
        self._last = b""
        self._find_leaf: Callable[[bytes], StoredLeaf | None] | None = None
        self._leaf: StoredLeaf | None = None
        self._compared = 0
        self._levels: list[list[PieceRef]] = []
        self._name_bytes: list[int] = []
        self.entries = 0

    def reuse_leaves(self, find_leaf: Callable[[bytes], StoredLeaf | None]) -> None:
        """Keep the leaves of a split previous tree whose entries are added unchanged, and encode only others.

        `find_leaf` returns the leaf that begins with a name, while its entries are being added.
        """
        if self._previous is not None:
            self._find_leaf = find_leaf

    def add(self, node: Node) -> None:
        """Append an entry; raise TreeError unless its name is greater than that of the entry before."""
        if node.name <= self._last:
            raise TreeError(f"the entry {node.name!r} comes after {self._last!r}")
        self._last = node.name
        self.entries += 1
        nodes = self._nodes
        nodes.append(node)
        if len(nodes) < self._min_entries and (node.extra is None or not node.extra.xattrs):
            return
        if self._ends_piece(node):
            self._flush()

    def finish(self) -> TreeRef:
        """Store the remaining pieces and return the directory's tree."""
        if not self._levels:
            if self._previous is not None and self._is_previous():
                return self._previous
            return self._store_leaf()
        if self._nodes:
            self._flush()
        level = 0
        while level < len(self._levels) - 1 or len(self._levels[level]) > 1:
            if self._levels[level]:
                self._flush_branch(level)
            level += 1
        return self._levels[level][0].tree

    def _is_previous(self) -> bool:
        if self._counts_xattrs and self._previous is not None and self._previous.xattrs is None:
            return False
        # Unchanged entries are identical objects, so the comparison rarely reads their fields.
        return self._previous_nodes == self._nodes

    def _previous_leaf(self) -> StoredLeaf | None:
        """Return the leaf of the previous tree that begins with the entries of this piece, or None.

        Where a piece ends follows from its entries and the seed, so it does not end before that leaf does.
        The leaf of another seed, from before a removal of a recipient, is kept as it is. Kept entries are
        identical objects, so the comparison rarely reads their fields.
        """
        nodes, begin, end = self._nodes, self._compared, len(self._nodes)
        if self._find_leaf is None or not nodes:
            return None
        if begin == 0:
            self._leaf = self._find_leaf(nodes[0].name)
        self._compared = end
        leaf = self._leaf
        if leaf is not None and (
            end > len(leaf.nodes)
            or (self._counts_xattrs and leaf.ref.xattrs is None)
            or nodes[begin:] != leaf.nodes[begin:end]
        ):
            self._leaf = leaf = None
        return leaf

    def _ends_piece(self, node: Node) -> bool:
        leaf = self._previous_leaf()
        if leaf is not None and len(self._nodes) < len(leaf.nodes):
            return False
        if leaf is not None and not leaf.is_last:
            return True
        # The end of the directory ended the last leaf, whether or not the piece ends there.
        # Large xattrs can fill a piece with few entries, so encoded sizes count from the first such entry.
        if self._encoded is None:
            self._encoded = []
        for unencoded in self._nodes[len(self._encoded) :]:
            self._encoded.append(encode_node(unencoded))
            self._encoded_bytes += len(self._encoded[-1])
        if len(self._nodes) >= self._split.max_entries or self._encoded_bytes >= PIECE_MAX_BYTES:
            return True
        return (
            len(self._nodes) >= self._min_entries
            and zlib.crc32(node.name, self._seed) & self._split.mask == 0
        )

    def _flush(self) -> None:
        first = self._nodes[0].name
        self._append(0, PieceRef(first, self._store_leaf()))

    def _store_leaf(self) -> TreeRef:
        leaf = self._previous_leaf()
        self._leaf, self._compared = None, 0
        if leaf is not None and len(leaf.nodes) == len(self._nodes):
            self._nodes, self._encoded, self._encoded_bytes = [], None, 0
            return leaf.ref
        nodes, encoded = self._nodes, self._encoded
        if encoded is not None and len(encoded) == len(nodes):
            data = encode_leaf(encoded)
        else:
            data = encode_piece(Leaf(nodes))
        self._nodes, self._encoded, self._encoded_bytes = [], None, 0
        xattrs = xattr_count(nodes) if self._counts_xattrs else None
        return self._store(data, *subtree_summary(nodes), xattrs)

    def _append(self, level: int, piece: PieceRef) -> None:
        if level == len(self._levels):
            if level >= self._split.max_levels:
                raise TreeError("a directory has more entries than the format can hold")
            self._levels.append([])
            self._name_bytes.append(0)
        pieces = self._levels[level]
        pieces.append(piece)
        self._name_bytes[level] += len(piece.first)
        is_full = (
            len(pieces) >= self._split.max_entries or self._name_bytes[level] >= PIECE_MAX_BYTES
        )
        ends = zlib.crc32(piece.first, self._seed ^ (level + 1)) & self._split.mask == 0
        if is_full or (ends and len(pieces) >= self._min_entries):
            self._flush_branch(level)

    def _flush_branch(self, level: int) -> None:
        pieces, self._levels[level] = self._levels[level], []
        self._name_bytes[level] = 0
        trees = [piece.tree for piece in pieces]
        ref = self._store(
            encode_piece(Branch(pieces)),
            sum(tree.nodes for tree in trees),
            min(sum(tree.total_bytes for tree in trees), MAX_FILE_BYTES),
            sum(tree.flagged for tree in trees),
            sum_of_counts(tree.xattrs for tree in trees),
        )
        self._append(level + 1, PieceRef(pieces[0].first, ref))

    def _store(
        self, data: bytes, nodes: int, size: int, flagged: int, xattrs: int | None
    ) -> TreeRef:
        digest = self._digest(data)
        self._put(BlobKind.TREE, digest, data)
        return TreeRef(digest, nodes, size, flagged, xattrs)
