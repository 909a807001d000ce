"""What a walk will want next: asked of the kernel before it is needed, so that nobody waits for it.

Programs walk directories in the order of their entries, which is the order of the numbers. When one of
them had to wait for a disk, the stored bytes of what follows are brought into memory in the background.
Nothing is decoded here, and a wrong guess costs a little reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from casfs.digest import Digest
from casfs.tree import Kind, Node
from mount.blobs import Blobs
from mount.inode import Numbering
from mount.pieces import PieceCache

_MAX_DIRECTORIES = 64
_MAX_FILES = 64
_MAX_FILE_BYTES = 8 * 1024 * 1024
_MAX_ENTRIES = 4096
"""Entries that are looked through for directories; more would cost more than waiting for them."""


class Foresight:
    """Prepares for walks through one snapshot; what was prepared is not prepared again."""

    def __init__(self, numbers: Numbering, pieces: PieceCache, blobs: Blobs) -> None:
        self._numbers = numbers
        self._pieces = pieces
        self._blobs = blobs
        # The numbers of directories and of files that the last guess covered.
        self._directories = range(0)
        self._files = range(0)

    def prepare(self, number: int) -> None:
        """Prepare for a walk that goes on behind a directory or a file; reads trees, so it may wait."""
        if number in self._directories or number in self._files:
            return
        way = self._numbers.way(number)
        last = number
        if way[-1][1].kind == Kind.DIRECTORY:
            wanted = (found for found in _following(self._numbers, way) if found[1].tree)
            for below, node in islice(wanted, _MAX_DIRECTORIES):
                last = below
                if node.tree is not None and not self._pieces.holds(node.tree):
                    self._blobs.prefetch(Digest(node.tree.digest))
            self._directories = range(number, last + 1)
        elif len(way) > 1:
            size = 0
            for beside, node in islice(_after(self._numbers, *way[-2], number), _MAX_FILES):
                last = beside
                if node.kind == Kind.FILE and node.content:
                    size += self._blobs.prefetch(Digest(node.content[8:40]))
                    if size >= _MAX_FILE_BYTES:
                        break
            self._files = range(number, last + 1)


def _following(numbers: Numbering, way: list[tuple[int, Node]]) -> Iterator[tuple[int, Node]]:
    """Yield what is in a directory, what follows it beside it, what follows its parent, and so on."""
    number, node = way[-1]
    for below, child, _ in islice(numbers.entries(number, node), _MAX_ENTRIES):
        yield below, child
    for (above, parent), (last, _) in zip(way[-2::-1], way[:0:-1], strict=True):
        yield from _after(numbers, above, parent, last)


def _after(numbers: Numbering, above: int, parent: Node, child: int) -> Iterator[tuple[int, Node]]:
    """Yield the entries of a directory that follow one of them."""
    following = numbers.entries(above, parent, child - above)
    return ((number, node) for number, node, _ in islice(following, _MAX_ENTRIES))
