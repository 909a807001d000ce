"""Prefetch for directory walks and for reads of many files, so that programs seldom wait for a disk.

Programs such as find and grep walk directories in the order of their entries, which is the order of the
inode numbers. When a request of such a walk had to wait, background tasks read ahead of the walk, a bounded
number of bytes. While no request waits, nothing is prefetched. A wrong guess costs a few reads.

- Trees from a remote place are decoded into the tree cache in the order of the walk. From a disk, the kernel
  is asked for the part of the pack where the waited tree lies, most of which the walk will need. To decode
  these trees ahead as well gains nothing: that thread and the event loop share one interpreter.
- For files, the stored bytes of the next ones are requested: from the kernel, or from a remote place, where
  those that lie together come with one request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice

from casfs.digest import Digest
from casfs.format.tree import Node, NodeType
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.inodes import Numbering
from casfs_mount.tree_cache import TreeCache
from casfs_mount.tree_walk import directories_after

_DIRECTORIES = 64
"""Directories read at a time; the next batch starts when the walk reaches the middle of this one."""

_FILE_BYTES = 8 * 1024 * 1024
"""The bytes of files requested at a time; `BlobReader.files_ahead` limits the number of the files."""

_NEVER = 1 << 63


class Prefetcher:
    """Reads ahead of walks through one snapshot.

    The event-loop thread calls `on_readdir` and `on_open` for every directory and file that is read. The
    work is done in background tasks, one at a time for directories and one for files.
    """

    def __init__(
        self,
        numbering: Numbering,
        tree_cache: TreeCache,
        blobs: BlobReader,
        background: BackgroundPool,
    ) -> None:
        self._numbering = numbering
        self._tree_cache = tree_cache
        self._blobs = blobs
        self._background = background
        self._walk_lock = threading.Lock()
        self._walk: Iterator[int] | None = None
        self._begin = self._middle = self._end = -1
        self._fetch_lock = threading.Lock()
        self._next_file = -1
        self._fetched = -1, range(0)

    def on_readdir(self, number: int, waited: bool) -> None:
        """Note that a directory is listed; `waited`: the request has to wait for a disk."""
        if not self._blobs.is_far:
            if waited:
                self._background.submit(lambda: self._request_trees(number))
        elif self._begin <= number <= self._end:
            if number >= self._middle:
                middle, self._middle = self._middle, _NEVER
                if not self._background.submit(lambda: self._read_directories(None)):
                    self._middle = middle
        elif waited:
            self._background.submit(lambda: self._read_directories(number))

    def on_open(self, number: int, waited: bool) -> None:
        """Note that a file is read from its beginning; `waited`: the request has to wait for a disk."""
        if waited or number == self._next_file:
            self._background.submit(lambda: self._fetch_files(number))

    def _request_trees(self, number: int) -> None:
        """Request the tree of a directory and what lies around it."""
        tree = self._numbering.node(number).tree
        if tree is not None:
            self._blobs.prefetch_around(Digest(tree.digest))

    def _read_directories(self, start: int | None) -> None:
        """Read the next batch of directories; with `start`, begin a new walk after that number."""
        if not self._walk_lock.acquire(blocking=False):
            return
        try:
            if start is not None:
                self._walk = self._directories_after(start)
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
            self._walk_lock.release()

    def _directories_after(self, start: int) -> Iterator[int]:
        """Yield the numbers of the directories of a walk; request the trees in each before going on."""
        for number, node in directories_after(self._numbering, self._tree_cache, start):
            yield number
            _prefetch_directories(self._numbering, number, node, self._tree_cache, self._blobs)

    def _fetch_files(self, number: int) -> None:
        """Prefetch the files that follow the file `number` in its directory."""
        if not self._fetch_lock.acquire(blocking=False):
            return
        try:
            way = self._numbering.path_to(number)
            if len(way) < 2:
                return
            above, directory = way[-2]
            if self._fetched[0] == above and number in self._fetched[1]:
                # The walk has reached the middle of the last batch.
                start = self._fetched[1][-1]
            else:
                start = number
            fetched = [number]
            chunks: list[Digest] = []
            size = 0
            most_files = self._blobs.files_ahead
            for beside, node, _ in self._numbering.entries(above, directory, start - above):
                if node.kind == NodeType.FILE and node.content:
                    fetched.append(beside)
                    chunks.append(Digest(node.content[8:40]))
                    size += int.from_bytes(node.content[:8], "little")
                if size >= _FILE_BYTES or len(fetched) > most_files:
                    break
            self._blobs.prefetch(chunks)
            self._fetched = above, range(number, fetched[-1] + 1)
            self._next_file = fetched[len(fetched) // 2] if len(fetched) > 1 else -1
        finally:
            self._fetch_lock.release()


def _prefetch_directories(
    numbering: Numbering, number: int, directory: Node, tree_cache: TreeCache, blobs: BlobReader
) -> None:
    """Request the trees of a directory's first subdirectories, all at once."""
    below = (node.tree for _, node, _ in numbering.entries(number, directory) if node.tree)
    missing = [tree for tree in islice(below, _DIRECTORIES) if not tree_cache.holds(tree)]
    blobs.prefetch([Digest(tree.digest) for tree in missing])
