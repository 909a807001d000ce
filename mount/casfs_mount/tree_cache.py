"""A cache of decoded trees: pages of directories, with the position of each entry.

A position counts nodes from the start of the page: an entry takes one, and one more for each node below
it. Inode numbers and positions in listings are sums of these positions (see `casfs_mount.inodes`). Safe
to share between threads; `casfs_mount.blob_reader` decides whether a miss may be read now.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from casfs.digest import Digest
from casfs.errors import TreeError
from casfs.format.tree import Leaf, Node, TreeRef, decode_piece, subtree_count
from casfs.trees.reader import Read
from casfs_mount.clock_cache import ClockCache

DEFAULT_CACHE_BYTES = 8 * 1024 * 1024

_ENTRY_BYTES = 420
"""Memory of a decoded entry, beside the bytes that it was decoded from; an estimate."""

_WRONG_COUNT = "the number of entries below a tree differs from the number recorded for it"


class TreePage:
    """The entries of a leaf, or the parts of a branch, with their positions.

    `starts` has the position of each entry or part and, at the end, the number of all nodes. `nodes` is
    None in a branch, `parts` in a leaf. `firsts` has the names of the entries, or the first name of each
    part.
    """

    __slots__ = ("firsts", "nodes", "parts", "starts", "weight")

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
            # Inode numbers would collide, so a tree with a wrong summary is not shown.
            raise TreeError(_WRONG_COUNT)
        self.weight = len(data) + _ENTRY_BYTES * len(counts)

    def index_of_position(self, position: int) -> int:
        """Return the index of the entry or part that contains a position."""
        return bisect_right(self.starts, position, 0, len(self.starts) - 1) - 1

    def index_of_name(self, name: bytes) -> int:
        """Return the index of the last entry or part whose first name is not after `name`, else -1."""
        return bisect_right(self.firsts, name) - 1


class TreeCache:
    """Verified tree pages by digest, in a bounded number of bytes."""

    def __init__(self, read: Read, limit_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._read = read
        self._pages: ClockCache[TreePage] = ClockCache(limit_bytes)

    @property
    def cached_bytes(self) -> int:
        """The bytes that the cache takes now, an estimate."""
        return self._pages.cached_bytes

    def get(self, ref: TreeRef) -> TreePage:
        """Return the page of a tree; raise WouldBlock, TreeError and what `read` raises."""
        page = self._pages.get(ref.digest)
        if page is None:
            page = TreePage(ref, self._read(Digest(ref.digest)))
            self._pages.add(ref.digest, page, page.weight)
        elif page.starts[-1] != ref.nodes:
            raise TreeError(_WRONG_COUNT)
        return page

    def holds(self, ref: TreeRef) -> bool:
        """Return whether `get` would return at once."""
        return self._pages.holds(ref.digest)
