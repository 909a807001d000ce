"""What a walk will want next, fetched before it is asked for, so that programs seldom wait for a disk.

Programs walk directories in the order of their entries, which is the order of the numbers. Where one of
them had to wait, somebody goes ahead of it in the background: trees are read and decoded into the cache
of pieces, a bounded number ahead; of files, the kernel is asked to read what is stored of the next ones.
Where nobody waits nothing is done, and a wrong guess costs a little reading.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice, pairwise

from casfs.digest import Digest
from casfs.format.tree import Node, NodeType
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.inodes import Numbering
from casfs_mount.tree_cache import TreeCache

_DIRECTORIES = 64
"""How many directories are read at a time; the next as many when a walk has come to their middle."""

_FILES = 64
_FILE_BYTES = 8 * 1024 * 1024
"""How many files, or stored bytes of files, are asked for at a time."""

_NEVER = 1 << 63


class Prefetcher:
    """Goes ahead of walks through one snapshot.

    `looked` and `opened` are called for every directory and file that is read, by the thread that must
    not wait; the rest happens in errands, one at a time of each kind.
    """

    def __init__(
        self, numbers: Numbering, pieces: TreeCache, blobs: BlobReader, errands: BackgroundPool
    ) -> None:
        self._numbers = numbers
        self._pieces = pieces
        self._blobs = blobs
        self._errands = errands
        self._walking = threading.Lock()
        self._walk: Iterator[int] | None = None
        self._begin = self._middle = self._end = -1
        self._fetching = threading.Lock()
        self._next_file = -1
        self._fetched = -1, range(0)

    def on_readdir(self, number: int, waited: bool) -> None:
        """Tell that a directory is listed, and whether that has to wait."""
        if self._begin <= number <= self._end:
            if number >= self._middle:
                middle, self._middle = self._middle, _NEVER
                if not self._errands.submit(lambda: self._go_on(None)):
                    self._middle = middle
        elif waited:
            self._errands.submit(lambda: self._go_on(number))

    def on_open(self, number: int, waited: bool) -> None:
        """Tell that a file is read from its beginning, and whether that has to wait."""
        if waited or number == self._next_file:
            self._errands.submit(lambda: self._fetch_files(number))

    def _go_on(self, start: int | None) -> None:
        """Read some more directories, those that follow `start` when it is a new walk."""
        if not self._walking.acquire(blocking=False):
            return
        try:
            if start is not None:
                self._walk = _directories_after(self._numbers, self._pieces, self._blobs, start)
                self._begin = self._end = start
            if self._walk is None:
                return
            self._middle = _NEVER
            read = list(islice(self._walk, _DIRECTORIES))
            if len(read) < _DIRECTORIES:
                self._walk = None
            elif read:
                self._middle = read[len(read) // 2]
            self._end = max([self._end, *read])
        finally:
            self._walking.release()

    def _fetch_files(self, number: int) -> None:
        """Ask for the files that follow one in its directory."""
        if not self._fetching.acquire(blocking=False):
            return
        try:
            way = self._numbers.path_to(number)
            if len(way) < 2:
                return
            above, directory = way[-2]
            if self._fetched[0] == above and number in self._fetched[1]:
                # The walk has come to the middle of what was fetched.
                start = self._fetched[1][-1]
            else:
                start = number
            fetched = [number]
            size = 0
            for beside, node, _ in self._numbers.entries(above, directory, start - above):
                if node.kind == NodeType.FILE and node.content:
                    fetched.append(beside)
                    size += self._blobs.prefetch(Digest(node.content[8:40]))
                if size >= _FILE_BYTES or len(fetched) > _FILES:
                    break
            self._fetched = above, range(number, fetched[-1] + 1)
            self._next_file = fetched[len(fetched) // 2] if len(fetched) > 1 else -1
        finally:
            self._fetching.release()


def _directories_after(
    numbers: Numbering, pieces: TreeCache, blobs: BlobReader, start: int
) -> Iterator[int]:
    """Yield the numbers of the directories behind one, in the order of a walk, each after reading it.

    What is in the directory comes first, then what follows it beside it, then what follows its parent.
    """
    way = numbers.path_to(start)
    stack = [_entries_after(numbers, *way[-1], 0)]
    for (above, parent), (below, _) in pairwise(way):
        stack.insert(-1, _entries_after(numbers, above, parent, below - above))
    while stack:
        for number, node in stack[-1]:
            if node.tree is None:
                continue
            if not pieces.holds(node.tree):
                pieces.get(node.tree)
            yield number
            _ask_for_directories(numbers, number, node, pieces, blobs)
            stack.append(_entries_after(numbers, number, node, 0))
            break
        else:
            stack.pop()


def _entries_after(
    numbers: Numbering, number: int, directory: Node, place: int
) -> Iterator[tuple[int, Node]]:
    return ((number, node) for number, node, _ in numbers.entries(number, directory, place))


def _ask_for_directories(
    numbers: Numbering, number: int, directory: Node, pieces: TreeCache, blobs: BlobReader
) -> None:
    """Have the kernel read the trees of a directory's first directories all at once."""
    below = (node.tree for _, node, _ in numbers.entries(number, directory) if node.tree)
    for tree in islice(below, _DIRECTORIES):
        if not pieces.holds(tree):
            blobs.prefetch(Digest(tree.digest))
