"""Decoded trees, cached: a piece of a directory with the places of its entries in number order.

A place is counted in nodes from the start of the piece: an entry takes one and as many as there are
below it. Places are what inode numbers and listing positions are made of (see `casfs_mount.inodes`). Safe to
share between threads; what is not cached is read as `casfs_mount.blob_reader` allows.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate

from casfs.digest import Digest
from casfs.errors import TreeError
from casfs.format.tree import Leaf, Node, TreeRef, decode_piece, subtree_count
from casfs.trees.reader import Read

DEFAULT_CACHE_BYTES = 32 * 1024 * 1024

_ENTRY_BYTES = 420
"""What a decoded entry takes beside the bytes that it was decoded from, about."""


class TreePage:
    """The entries of a leaf or the pieces of a branch, and where each begins.

    `starts` has the place of each and, last, the number of nodes in all. `nodes` is None in a branch,
    `parts` in a leaf; `firsts` are the names that the entries have or the parts begin with.
    """

    __slots__ = ("firsts", "nodes", "parts", "starts", "used", "weight")

    def __init__(self, ref: TreeRef, data: bytes) -> None:
        decoded = decode_piece(data)
        self.nodes: list[Node] | None = None
        self.parts: list[TreeRef] | None = None
        if isinstance(decoded, Leaf):
            self.nodes = decoded.nodes
            self.firsts = [node.name for node in decoded.nodes]
            counts = [subtree_count(node) for node in decoded.nodes]
        else:
            self.parts = [piece.tree for piece in decoded.pieces]
            self.firsts = [piece.first for piece in decoded.pieces]
            counts = [tree.nodes for tree in self.parts]
        self.starts = list(accumulate(counts, initial=0))
        if self.starts[-1] != ref.nodes:
            # Numbers would collide, so a tree that lies about what is below it is not shown.
            raise TreeError("a tree does not hold as many entries as is recorded for it")
        self.used = False
        self.weight = len(data) + _ENTRY_BYTES * len(counts)

    def index_of_position(self, place: int) -> int:
        """Return which entry or part holds a place."""
        return bisect_right(self.starts, place, 0, len(self.starts) - 1) - 1

    def index_of_name(self, name: bytes) -> int:
        """Return the last entry or part that does not begin after `name`, -1 where there is none."""
        return bisect_right(self.firsts, name) - 1


class TreeCache:
    """Verified pieces by digest, in a bounded number of bytes."""

    def __init__(self, read: Read, limit_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._read = read
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._pieces: OrderedDict[bytes, TreePage] = OrderedDict()
        self.cached_bytes = 0

    def get(self, ref: TreeRef) -> TreePage:
        """Return a tree's piece; raises WouldBlock, TreeError and whatever reading raises."""
        piece = self._pieces.get(ref.digest)
        if piece is None:
            piece = TreePage(ref, self._read(Digest(ref.digest)))
            self._keep(ref.digest, piece)
            return piece
        if piece.starts[-1] != ref.nodes:
            raise TreeError("a tree does not hold as many entries as is recorded for it")
        piece.used = True
        return piece

    def holds(self, ref: TreeRef) -> bool:
        """Tell whether `get` would answer at once."""
        return ref.digest in self._pieces

    def _keep(self, digest: bytes, piece: TreePage) -> None:
        with self._lock:
            if digest in self._pieces:
                return
            self._pieces[digest] = piece
            self.cached_bytes += piece.weight
            # The clock: what was used since it was last considered gets another round.
            while self.cached_bytes > self._limit and len(self._pieces) > 1:
                oldest, candidate = self._pieces.popitem(last=False)
                if candidate.used or candidate is piece:
                    candidate.used = False
                    self._pieces[oldest] = candidate
                else:
                    self.cached_bytes -= candidate.weight
