"""Prefetch the blobs of a tree: other threads read and verify them just before a walk needs them.

A restore or a copy walks a tree in the order of the backup, which is the order of the blobs in the packs. A
second thread walks the tree first and queues batches of blobs, each with the path that it had reached. It
reads the blobs of a local repository itself. Where requests travel a distance, the batches are larger and a
pool of threads reads them, each range of a pack with one request, several at the same time. The number of
queued batches is limited, so memory is bounded. Blobs that cannot be read are missing from the batches: the
walk reads them itself and gets the error at the right entry.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.paths import join, split
from casfs.repository.repository import Repository
from casfs.store.batch_read import ReadPlan, plan_reads, read_run
from casfs.store.blob_store import BlobStore
from casfs.trees.content import EXTENT, HOLE, check_chunk_length
from casfs.trees.reader import TreeReader
from casfs.trees.walk import Children, Page, walk_pages

log = logging.getLogger(__name__)

_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class _Limits:
    """The plaintext bytes and the number of blobs of a batch, and the number of batches that are queued."""

    batch_bytes: int
    batch_blobs: int
    queued_batches: int


_NEAR = _Limits(2 * 1024 * 1024, 256, 2)
_FAR = _Limits(8 * 1024 * 1024, 4096, 3)
"""Up to five batches are being read, queued or used: 40 MiB, enough for 1 Gbit/s at 300 ms."""


@dataclass(slots=True)
class _Batch:
    """Blobs by digest, and the path of the entry of the last blob; `last` is None in the final batch.

    `reads` are the reads of further blobs that are still running.
    """

    last: list[bytes] | None = field(default_factory=list)
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    reads: list[Future[dict[Digest, bytes]]] = field(default_factory=list)

    def get(self, digest: Digest) -> bytes | None:
        """Return a blob, or None; wait for the reads of the batch."""
        while self.reads:
            self.blobs |= self.reads.pop(0).result()
        return self.blobs.get(digest)


class Prefetcher:
    """Prefetch the blobs of the tree at `path`, for one thread that walks it in order.

    The walk does not enter the directories whose trees `skips` accepts.
    The walking thread sets `path` to its current entry. Close the prefetcher, or use it in a `with` block.
    """

    def __init__(
        self,
        repository: Repository,
        path: bytes,
        root: Node,
        skips: Callable[[TreeRef], bool] = lambda _: False,
    ) -> None:
        self.path = path
        self._store = repository.store
        self._batch = _Batch()
        self._reads = _Reads(repository.store)
        self._batches: queue.Queue[_Batch] = queue.Queue(self._reads.limits.queued_batches)
        self._stopped = False
        scanner = _TreeScanner(repository, (path, root), skips, lambda: self._stopped, self._reads)
        self._thread = threading.Thread(
            target=self._run, args=(scanner,), name="casfs-prefetch", daemon=True
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
        """Return the verified plaintext of a blob; raise BlobError where it is missing or damaged."""
        plain = self._batch.get(digest)
        if plain is not None:
            return plain
        here = split(self.path)
        while self._batch.last is not None and self._batch.last <= here:
            self._batch = self._batches.get()
            plain = self._batch.get(digest)
            if plain is not None:
                return plain
        return self._store.read(digest)

    def close(self) -> None:
        """Stop and join the threads."""
        self._stopped = True
        self._batch = _Batch(None)
        while self._thread.is_alive():
            with suppress(queue.Empty):  # the thread may be waiting for room in the queue
                self._batches.get_nowait()
            self._thread.join(_POLL_S)
        self._reads.close()

    def _run(self, scanner: _TreeScanner) -> None:
        try:
            for batch in scanner.batches():
                if self._stopped:
                    return
                self._batches.put(batch)
        except Exception as error:
            # The walk reads the rest itself, and gets the error at the right entry.
            log.debug("nothing more is prefetched: %s", error)
        finally:
            if not self._stopped:
                self._batches.put(_Batch(None))


class _Reads:
    """Read the blobs of batches: in the calling thread, or over a distance in several threads."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._plan = ReadPlan.of(store.storage)
        self._pool: ThreadPoolExecutor | None = None
        self.limits = _NEAR
        if self._plan.parallel_reads > 1:
            self.limits = _FAR
            self._pool = ThreadPoolExecutor(self._plan.parallel_reads, "casfs-prefetch-reads")

    def add(self, batch: _Batch, wanted: Mapping[Digest, int]) -> None:
        """Read the wanted blobs into a batch, or start to; `wanted` has their sizes in bytes."""
        for run in plan_reads(self._store, wanted, self._plan):
            if self._pool is not None:
                batch.reads.append(self._pool.submit(read_run, self._store, run))
            else:
                batch.blobs |= read_run(self._store, run)

    def close(self) -> None:
        """Wait for the running reads; drop the others."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class _TreeScanner:
    """Walk a tree, and make batches of its blobs."""

    def __init__(
        self,
        repository: Repository,
        start: tuple[bytes, Node],
        skips: Callable[[TreeRef], bool],
        is_stopped: Callable[[], bool],
        reads: _Reads,
    ) -> None:
        self._reads = reads
        self._repository = repository
        self._store = repository.store
        self._is_stopped = is_stopped
        self._path, root = start
        self._trees = TreeReader(self._read_tree)
        self._entries: Iterator[tuple[bytes, Node]] = (
            self._walk(self._path, root.tree, skips)
            if root.tree is not None
            else iter([(self._path, root)])
        )
        self._read: dict[Digest, bytes] = {}
        self._wanted: dict[Digest, int] = {}
        self._bytes = 0

    def _walk(
        self, path: bytes, ref: TreeRef, skips: Callable[[TreeRef], bool]
    ) -> Iterator[tuple[bytes, Node]]:
        def read(page: Page) -> Children | None:
            return None if skips(page.ref) else self._trees.children(page.ref)

        for page, node in walk_pages(path, ref, read):
            yield join(page.path, node.name), node

    def batches(self) -> Iterator[_Batch]:
        """Yield batches of blobs, up to the first tree that cannot be read."""
        here = self._path
        # A hostile tree may have more directories than a command can read, and no file to put into a batch.
        while not self._is_stopped():
            try:
                path, node = next(self._entries, (None, None))
            except CasfsError:
                break  # the walk reports it when it reaches the entry
            if path is None or node is None:
                break
            if self._is_full():
                yield self._finish_batch(here)
            here = path
            if node.kind != NodeType.FILE or node.nlink > 1:
                continue
            for digest, size in self._chunks(node):
                if self._is_full():
                    yield self._finish_batch(here)
                if digest not in self._wanted:
                    self._wanted[digest] = size
                    self._bytes += size
        yield self._finish_batch(here)

    def _is_full(self) -> bool:
        limits = self._reads.limits
        return self._bytes >= limits.batch_bytes or len(self._wanted) >= limits.batch_blobs

    def _finish_batch(self, path: bytes) -> _Batch:
        batch = _Batch(split(path), self._read)
        if self._wanted:
            self._reads.add(batch, self._wanted)
        self._read, self._wanted, self._bytes = {}, {}, 0
        return batch

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
