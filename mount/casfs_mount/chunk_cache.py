"""A cache of verified chunks in a bounded number of bytes; concurrent readers share one decode.

Every chunk was verified when it was decoded. Safe to share between threads; the event-loop thread gets
WouldBlock where it would have to wait.
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
from casfs_mount.clock_cache import ClockCache
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock

DEFAULT_CACHE_BYTES = 24 * 1024 * 1024

_CHUNK_OVERHEAD_BYTES = 256
_FAILURE_S = 2.0
"""How long a failure is cached: the kernel asks again for every page of a chunk that failed."""

_MAX_FAILURES = 1024

_SMALL_AHEAD = 16
"""Small files that are decoded ahead of a walk and not cached: each is read once, or not at all."""


class ChunkCache:
    """Verified plaintexts of blobs by digest."""

    def __init__(
        self,
        read: Callable[[Digest], bytes],
        guard: EventLoopGuard,
        background: BackgroundPool,
        limit_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._read = read
        self._guard = guard
        self._background = background
        self._lock = threading.Lock()
        self._chunks: ClockCache[bytes] = ClockCache(limit_bytes)
        self._loading: dict[bytes, Future[bytes]] = {}
        self._failures: OrderedDict[bytes, tuple[CasfsError, float]] = OrderedDict()
        self._small_ahead: OrderedDict[bytes, bytes] = OrderedDict()

    @property
    def limit_bytes(self) -> int:
        """The bytes that the cache may take."""
        return self._chunks.limit_bytes

    @property
    def cached_bytes(self) -> int:
        """The bytes that the cache takes now."""
        return self._chunks.cached_bytes

    def get(self, digest: bytes, keep: bool = True) -> bytes:
        """Return a blob's plaintext; raise WouldBlock, BlobError and the errors of the storage.

        With `keep=False` it is not cached: for a file read as a whole, which the kernel caches itself.
        """
        cached = self._chunks.get(digest)
        if cached is None:
            cached = self._small_ahead.get(digest)
        if cached is not None:
            return cached
        if self._failures:
            self._raise_recent_failure(digest)
        if self._guard.may_block():
            return self._load(digest, keep)
        if digest in self._loading:
            raise WouldBlock
        data = self._read(Digest(digest))
        if keep:
            self._keep(digest, data)
        return data

    def holds(self, digest: bytes) -> bool:
        """Return whether `get` would return data at once."""
        return self._chunks.holds(digest) or digest in self._small_ahead

    def decode_ahead(self, digest: bytes) -> None:
        """Decode a small blob that will soon be read once; raise what `get` raises.

        Used only by the event-loop thread.
        """
        if self.holds(digest):
            return
        self._small_ahead[digest] = self.get(digest, keep=False)
        if len(self._small_ahead) > _SMALL_AHEAD:
            self._small_ahead.popitem(last=False)

    def prefetch(self, digest: bytes) -> None:
        """Cache a blob in the background; return at once. If the queue is full, do nothing."""
        is_known = self._chunks.holds(digest) or digest in self._loading
        if not (is_known or digest in self._failures):
            self._background.submit(lambda: self._load_ahead(digest))

    def _load_ahead(self, digest: bytes) -> None:
        if not self._chunks.holds(digest):
            self._load(digest, True)

    def _load(self, digest: bytes, keep: bool) -> bytes:
        own: Future[bytes] = Future()
        with self._lock:
            cached = self._chunks.get(digest)
            if cached is not None:
                return cached
            loading = self._loading.setdefault(digest, own)
        if loading is not own:
            return loading.result()
        try:
            data = self._read(Digest(digest))
        except BaseException as error:
            with self._lock:
                del self._loading[digest]
                if isinstance(error, CasfsError):
                    self._failures[digest] = error, self._clock() + _FAILURE_S
                    while len(self._failures) > _MAX_FAILURES:
                        self._failures.popitem(last=False)
            own.set_exception(error)
            raise
        with self._lock:
            del self._loading[digest]
            if keep:
                self._keep(digest, data)
        own.set_result(data)
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
        self._chunks.add(digest, data, len(data) + _CHUNK_OVERHEAD_BYTES)
