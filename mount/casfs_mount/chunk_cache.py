"""Decoded chunks, cached in a bounded number of bytes: one decode per chunk, however many ask at once.

Every chunk was verified when it was decoded. Safe to share between threads; a thread that must not
wait gets WouldBlock.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs_mount.background import BackgroundPool
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock

DEFAULT_CACHE_BYTES = 64 * 1024 * 1024

_CHUNK_OVERHEAD_BYTES = 256
_FAILURE_S = 2.0
"""How long a failure is remembered: the kernel asks again for every page of a chunk that failed."""

_MAX_FAILURES = 1024


class ChunkCache:
    """Verified plaintexts of blobs by digest."""

    def __init__(
        self,
        read: Callable[[Digest], bytes],
        waiting: EventLoopGuard,
        errands: BackgroundPool,
        limit_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._read = read
        self._waiting = waiting
        self._errands = errands
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()
        self._loading: dict[bytes, Future[bytes]] = {}
        self._failures: OrderedDict[bytes, tuple[CasfsError, float]] = OrderedDict()
        self.cached_bytes = 0

    def get(self, digest: bytes, keep: bool = True) -> bytes:
        """Return a blob's plaintext; raises WouldBlock, BlobError and what the storage raises.

        Without `keep` it is not cached: for what is given as a whole and so is in the kernel's cache.
        """
        chunk = self._chunks.get(digest)
        if chunk is not None:
            chunk.used = True
            return chunk.data
        if self._failures:
            self._raise_recent_failure(digest)
        if self._waiting.may_block():
            return self._load(digest, keep)
        if digest in self._loading:
            raise WouldBlock
        data = self._read(Digest(digest))
        if keep:
            with self._lock:
                if digest not in self._chunks:
                    self._keep(digest, data)
        return data

    def holds(self, digest: bytes) -> bool:
        """Tell whether `get` would answer at once with data."""
        return digest in self._chunks

    def read_ahead(self, digest: bytes) -> None:
        """Ask for a blob to be cached soon; returns at once and may do nothing."""
        if not (digest in self._chunks or digest in self._loading or digest in self._failures):
            self._errands.submit(lambda: self._load_ahead(digest))

    def _load_ahead(self, digest: bytes) -> None:
        if digest not in self._chunks:
            self._load(digest, True)

    def _load(self, digest: bytes, keep: bool) -> bytes:
        mine: Future[bytes] = Future()
        with self._lock:
            chunk = self._chunks.get(digest)
            if chunk is not None:
                return chunk.data
            theirs = self._loading.setdefault(digest, mine)
        if theirs is not mine:
            return theirs.result()
        try:
            data = self._read(Digest(digest))
        except BaseException as error:
            with self._lock:
                del self._loading[digest]
                if isinstance(error, CasfsError):
                    self._failures[digest] = error, self._clock() + _FAILURE_S
                    while len(self._failures) > _MAX_FAILURES:
                        self._failures.popitem(last=False)
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[digest]
            if keep:
                self._keep(digest, data)
        mine.set_result(data)
        return data

    def _raise_recent_failure(self, digest: bytes) -> None:
        failure = self._failures.get(digest)
        if failure is None:
            return
        error, until = failure
        if self._clock() < until:
            raise error
        with self._lock:
            self._failures.pop(digest, None)

    def _keep(self, digest: bytes, data: bytes) -> None:
        chunk = self._chunks[digest] = _Chunk(data)
        self.cached_bytes += len(data) + _CHUNK_OVERHEAD_BYTES
        # The clock: what was used since it was last considered gets another round.
        while self.cached_bytes > self.limit_bytes and len(self._chunks) > 1:
            oldest, candidate = self._chunks.popitem(last=False)
            if candidate.used or candidate is chunk:
                candidate.used = False
                self._chunks[oldest] = candidate
            else:
                self.cached_bytes -= len(candidate.data) + _CHUNK_OVERHEAD_BYTES


class _Chunk:
    __slots__ = ("data", "used")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.used = False
