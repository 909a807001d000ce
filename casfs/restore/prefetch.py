"""Reading ahead: blobs of a tree, read and verified by another thread just before they are asked for.

A restore goes through a tree in the order in which a backup went through it, which is the order in the
packs. So another thread goes the same way first, and hands over batches of what it has read, each with the
path that it had come to. Two batches wait at most, so that memory is bounded. What it cannot read it leaves
out: who asks for that reads it himself, and meets the error in its place.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.format.tree import Node, NodeType
from casfs.paths import split
from casfs.repository.repository import Repository
from casfs.store.batch_read import read_batch
from casfs.trees.content import EXTENT, HOLE, check_chunk_length
from casfs.trees.reader import TreeReader

_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOBS = 256
_WAITING_BATCHES = 2
_POLL_S = 0.005


@dataclass(slots=True)
class _Batch:
    """Blobs by digest, and the path of the entry that the last of them is for (None: that of no other)."""

    last: list[bytes] | None = field(default_factory=list)
    blobs: dict[Digest, bytes] = field(default_factory=dict)


class Prefetcher:
    """Read blobs of the tree at `path`, for one thread that goes through it in order.

    `path` is where that thread is; it says so as it goes. To be closed, or used in a `with` block.
    """

    def __init__(self, repository: Repository, path: bytes, root: Node) -> None:
        self.path = path
        self._store = repository.store
        self._batch = _Batch()
        self._batches: queue.Queue[_Batch] = queue.Queue(_WAITING_BATCHES)
        self._stopped = False
        scout = _TreeScanner(repository, path, root)
        self._thread = threading.Thread(
            target=self._run, args=(scout,), name="casfs-readahead", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, digest: Digest) -> bytes:
        """Return a blob's verified plaintext; raises BlobError when it is missing or damaged."""
        plain = self._batch.blobs.get(digest)
        if plain is not None:
            return plain
        here = split(self.path)
        while self._batch.last is not None and self._batch.last <= here:
            self._batch = self._batches.get()
            plain = self._batch.blobs.get(digest)
            if plain is not None:
                return plain
        return self._store.read(digest)

    def close(self) -> None:
        """Stop reading."""
        self._stopped = True
        self._batch = _Batch(None)
        while self._thread.is_alive():
            with suppress(queue.Empty):  # it may be waiting for room
                self._batches.get_nowait()
            self._thread.join(_POLL_S)

    def _run(self, scout: _TreeScanner) -> None:
        try:
            for batch in scout.batches():
                if self._stopped:
                    return
                self._batches.put(batch)
        finally:
            if not self._stopped:
                self._batches.put(_Batch(None))


class _TreeScanner:
    """Goes through a tree, reads what is in it, and makes batches."""

    def __init__(self, repository: Repository, path: bytes, root: Node) -> None:
        self._repository = repository
        self._store = repository.store
        self._path = path
        self._trees = TreeReader(self._read_tree)
        self._entries: Iterator[tuple[bytes, Node]] = (
            self._trees.walk(root, path) if root.tree is not None else iter([(path, root)])
        )
        self._read: dict[Digest, bytes] = {}
        self._wanted: dict[Digest, int] = {}
        self._bytes = 0

    def batches(self) -> Iterator[_Batch]:
        """Yield what was read, up to the first tree that cannot be."""
        here = self._path
        while True:
            try:
                path, node = next(self._entries, (None, None))
            except CasfsError:
                break  # it is told of by who comes to it
            if path is None or node is None:
                break
            if self._is_full():
                yield self._end(here)
            here = path
            if node.kind != NodeType.FILE or node.nlink > 1:
                continue
            for digest, size in self._chunks(node):
                if self._is_full():
                    yield self._end(here)
                if digest not in self._wanted:
                    self._wanted[digest] = size
                    self._bytes += size
        yield self._end(here)

    def _is_full(self) -> bool:
        return self._bytes >= _BATCH_BYTES or len(self._wanted) >= _BATCH_BLOBS

    def _end(self, path: bytes) -> _Batch:
        blobs = self._read
        if self._wanted:
            blobs |= read_batch(self._store, self._wanted)
        self._read, self._wanted, self._bytes = {}, {}, 0
        return _Batch(split(path), blobs)

    def _chunks(self, node: Node) -> Iterator[tuple[Digest, int]]:
        content = node.content
        if len(content) == EXTENT.size and not node.levels and content[8:] != HOLE:
            yield Digest(content[8:]), node.size
            return
        try:
            for extent in self._repository.content(node).extents():
                if extent.digest is not None:
                    check_chunk_length(extent)
                    yield extent.digest, extent.length
        except CasfsError:
            return

    def _read_tree(self, digest: Digest) -> bytes:
        plain = self._read.get(digest)
        if plain is None:
            plain = self._store.read_at(digest, self._store.locate(digest))
            self._read[digest] = plain
            self._bytes += len(plain)
        return plain
