"""Upload and download rate limits for a storage.

An object is sent as a whole, so the limit holds for the average over several objects: an upload first sleeps
for as long as its bytes take at the limit, a download sleeps afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from casfs.storage.base import Data, ObjectWriter, Storage
from casfs.storage.bucket import Bucket
from casfs.storage.wrapper import BucketWrapper, StorageWrapper, WriterWrapper

_BURST_S = 1.0
"""Unused capacity of this many seconds may be used later."""


class RateLimit:
    """A token bucket of bytes, shared by any number of threads."""

    def __init__(
        self,
        bytes_per_s: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s <= 0:
            raise ValueError("a rate limit must be at least one byte per second")
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = bytes_per_s * _BURST_S
        self._filled_at = clock()

    def take(self, size: int) -> None:
        """Block until `size` bytes may be transferred. A transfer larger than the bucket leaves a debt."""
        with self._lock:
            now = self._clock()
            refilled = self._tokens + (now - self._filled_at) * self._rate
            self._tokens = min(refilled, self._rate * _BURST_S) - size
            self._filled_at = now
            wait_s = -self._tokens / self._rate
        if wait_s > 0:
            self._sleep(wait_s)


class LimitedStorage(StorageWrapper):
    """A storage whose reads and writes keep to two rate limits."""

    def __init__(
        self, inner: Storage, upload: RateLimit | None = None, download: RateLimit | None = None
    ) -> None:
        super().__init__(inner)
        self._upload = upload
        self._download = download

    @property
    def bucket(self) -> Bucket | None:
        """The versions and locks of the inner storage; reads of versions keep to the limit."""
        bucket = self.inner.bucket
        if bucket is None or self._download is None:
            return bucket
        return _LimitedBucket(bucket, self._download)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes, after a sleep of as long as they take at the limit."""
        data = self.inner.read(name, offset, size)
        if self._download is not None:
            self._download.take(len(data))
        return data

    def write(self, name: str, data: Data) -> None:
        """Store an object, replacing one of the same name."""
        self._take_upload(len(data))
        self.inner.write(name, data)

    def create(self, name: str, data: Data) -> None:
        """Store an object unless there is one of the same name."""
        self._take_upload(len(data))
        self.inner.create(name, data)

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Begin an object."""
        return _LimitedWriter(self, self.inner.open_writer(in_memory))

    def _take_upload(self, size: int) -> None:
        if self._upload is not None:
            self._upload.take(size)


class _LimitedBucket(BucketWrapper):
    """A bucket whose reads of versions keep to a rate limit."""

    def __init__(self, inner: Bucket, download: RateLimit) -> None:
        super().__init__(inner)
        self._download = download

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        """Return a range of a version, after a sleep of as long as it takes at the limit."""
        data = self.inner.read_version(name, version, offset, size)
        self._download.take(len(data))
        return data


class _LimitedWriter(WriterWrapper):
    """A writer that waits for its bytes' share of the limit before it sends them."""

    def __init__(self, storage: LimitedStorage, inner: ObjectWriter) -> None:
        super().__init__(inner)
        self._storage = storage

    def commit(self, name: str) -> None:
        """Make the bytes durable under a name."""
        self._storage._take_upload(self.written_bytes)
        self.inner.commit(name)
