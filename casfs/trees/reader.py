"""Directory reader: presents a tree, split or not, as one sorted list of entries.

Pieces are read on demand; memory holds only the pieces on one path from the root piece to a leaf. Every
function raises TreeError for data that break the format's rules, and passes on the errors of `read`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from casfs.digest import Digest
from casfs.errors import TreeError
from casfs.format.tree import (
    MAX_PIECE_LEVELS,
    CaptureState,
    Leaf,
    Node,
    NodeType,
    TreeRef,
    decode_piece,
)
from casfs.paths import join
from casfs.trees.walk import Children, Page, walk_pages


def is_flagged(node: Node) -> bool:
    """Return whether an entry is a file in state `changed`: its captured content may be a mixture."""
    return node.kind == NodeType.FILE and node.state == CaptureState.CHANGED


def flagged_files(trees: TreeReader, root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    """Yield the flagged files at or below `root`, which is at `path`, in order with their paths.

    Raise BlobError and TreeError where a tree on the way is damaged.
    """
    if root.tree is None:
        if is_flagged(root):
            yield path, root
        return
    if not root.tree.flagged:
        return

    def read(page: Page) -> Children | None:
        return trees.children(page.ref) if page.ref.flagged else None

    for page, node in walk_pages(path, root.tree, read):
        if is_flagged(node):
            yield join(page.path, node.name), node


def flagged_below(node: Node) -> int:
    """Return the number of flagged files in an entry's subtree; nothing is read."""
    ref: TreeRef | None = node.tree
    return int(is_flagged(node)) if ref is None else ref.flagged


class StoredLeaf(NamedTuple):
    """A leaf of a directory's tree; `is_last` is set where no leaf follows."""

    ref: TreeRef
    nodes: list[Node]
    is_last: bool


Read = Callable[[Digest], bytes]
"""Returns the verified bytes of a tree blob."""


class TreeReader:
    """Reads the trees of one repository."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def piece(self, ref: TreeRef) -> list[Node] | list[tuple[bytes, TreeRef]]:
        """Return the entries of a leaf or the pieces of a branch."""
        piece = decode_piece(self._read(Digest(ref.digest)))
        if isinstance(piece, Leaf):
            return piece.nodes
        return [(part.first, part.tree) for part in piece.pieces]

    def children(self, ref: TreeRef) -> Children:
        """Return the entries of a tree blob, or the pages of a split directory."""
        piece = decode_piece(self._read(Digest(ref.digest)))
        return piece.nodes if isinstance(piece, Leaf) else [part.tree for part in piece.pieces]

    def nodes(self, ref: TreeRef, after: bytes = b"") -> Iterator[Node]:
        """Yield a directory's entries with names greater than `after`, in order."""
        for leaf in self.leaves(ref, after):
            for node in leaf:
                if node.name > after:
                    yield node

    def leaves(self, ref: TreeRef, after: bytes = b"") -> Iterator[list[Node]]:
        """Yield the leaves that may contain names greater than `after`, in order."""
        return (leaf.nodes for leaf in self.stored_leaves(ref, after))

    def stored_leaves(self, ref: TreeRef, after: bytes = b"") -> Iterator[StoredLeaf]:
        """Yield the leaves that may contain names greater than `after`, in order, with their references."""
        last = b""
        for leaf in self._leaves(ref, after, MAX_PIECE_LEVELS, True):
            if leaf.nodes:
                if leaf.nodes[0].name <= last:
                    raise TreeError("the pieces of a split directory are not in order")
                last = leaf.nodes[-1].name
            yield leaf

    def _leaves(
        self, ref: TreeRef, after: bytes, levels: int, is_last: bool
    ) -> Iterator[StoredLeaf]:
        piece = decode_piece(self._read(Digest(ref.digest)))
        if isinstance(piece, Leaf):
            yield StoredLeaf(ref, piece.nodes, is_last)
            return
        if levels == 0:
            raise TreeError("a directory is split more often than the format allows")
        firsts = [part.first for part in piece.pieces]
        for part in piece.pieces[max(bisect_right(firsts, after) - 1, 0) :]:
            ends = is_last and part is piece.pieces[-1]
            yield from self._leaves(part.tree, after, levels - 1, ends)

    def unsplit_entries(self, ref: TreeRef) -> list[Node] | None:
        """Return the entries of a directory that is not split, None for a split one."""
        piece = decode_piece(self._read(Digest(ref.digest)))
        return piece.nodes if isinstance(piece, Leaf) else None

    def lookup(self, ref: TreeRef, name: bytes) -> Node | None:
        """Return a directory's entry with that name, or None."""
        for _ in range(MAX_PIECE_LEVELS + 1):
            piece = decode_piece(self._read(Digest(ref.digest)))
            if isinstance(piece, Leaf):
                nodes = piece.nodes
                place = bisect_right(nodes, name, key=lambda node: node.name) - 1
                return nodes[place] if place >= 0 and nodes[place].name == name else None
            place = bisect_right(piece.pieces, name, key=lambda part: part.first) - 1
            if place < 0:
                return None
            ref = piece.pieces[place].tree
        raise TreeError("a directory is split more often than the format allows")

    def resolve(self, root: Node, path: bytes) -> Node | None:
        """Return the entry at a path below `root` (b"" is the root itself), or None.

        Symlinks are not followed.
        """
        node = root
        for name in path.split(b"/"):
            if not name:
                continue
            if node.tree is None:
                return None
            found = self.lookup(node.tree, name)
            if found is None:
                return None
            node = found
        return node

    def walk(self, root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """Yield every entry below `root` with its path, each directory before its entries."""
        if root.tree is None:
            return
        for page, node in walk_pages(path, root.tree, lambda page: self.children(page.ref)):
            yield join(page.path, node.name), node
