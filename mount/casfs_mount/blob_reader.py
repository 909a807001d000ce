"""Verified blobs for a mount: non-blocking on the event-loop thread, blocking on every other thread.

On the event-loop thread a small blob whose bytes are in the kernel's page cache is decoded at once, which
costs a fraction of a trip to a worker thread. If such a read was slow because pages of the index came
from a slow disk, the event-loop thread makes no further attempt for a while.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.store.blob_store import BlobStore, pack_name
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock

_NONBLOCKING_BYTES = 64 * 1024
"""Blobs of up to this many stored bytes, and groups, are decoded on the event loop, in about 0.5 ms."""

_NEAR_FILES = 512
_FAR_FILES = 1024
"""Where a request takes a round trip, a directory of small files is requested as a whole."""

_BEFORE_BYTES = 1024 * 1024
_AFTER_BYTES = 8 * 1024 * 1024
"""What is requested around a blob of a walk. A backup stores the trees below a directory before its own, and
those of 58,000 files in 4 MB."""

_REPEAT_S = 1.0
"""How long a request around a blob is not repeated. Later, its pages may have been dropped."""

INDEX_PREFETCH_BYTES = 64 * 1024 * 1024
"""An index up to this size is read ahead as a whole, because requests need its pages in random order."""

_SLOW_S = 0.004
_PAUSE_FACTOR = 8
"""After a slow read the event-loop thread makes no attempt for this many times its duration."""


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


class BlobReader:
    """The blobs of one repository; safe to share between threads.

    `is_far` is set where a request takes a round trip. `files_ahead` is the number of small files whose bytes
    are worth requesting ahead at a time.
    """

    def __init__(
        self,
        store: BlobStore,
        guard: EventLoopGuard,
        *,
        clock: Callable[[], float] = time.monotonic,
        major_faults: Callable[[], int] = _major_faults,
    ) -> None:
        self._clock = clock
        self._major_faults = major_faults
        self._store = store
        self.is_far = store.storage.capabilities.parallel_requests > 1
        self.files_ahead = _FAR_FILES if self.is_far else _NEAR_FILES
        self._guard = guard
        self._paused_until = 0.0
        self._faults = 0
        self._requested = -1, 0, 0, 0.0

    def read(self, digest: Digest) -> bytes:
        """Return a blob's verified plaintext.

        Raises WouldBlock, BlobError if it is missing or damaged, and the errors of storage and index.
        """
        if self._guard.may_block():
            return self._store.read(digest)
        began = self._clock()
        if began < self._paused_until:
            raise WouldBlock
        try:
            data = self._store.read_nonblocking(digest, _NONBLOCKING_BYTES)
        except CasfsError:
            data = None  # the worker thread repeats the read and raises the error
        ended = self._clock()
        if ended - began > _SLOW_S:
            self._pause_after_disk_wait(ended, ended - began)
        if data is None:
            raise WouldBlock
        return data

    def _pause_after_disk_wait(self, now: float, waited: float) -> None:
        """Stop attempts for a while if a disk caused the delay, and not another program.

        A major page fault of this thread shows that it waited for a disk.
        """
        faults = self._major_faults()
        if faults > self._faults:
            self._paused_until = now + _PAUSE_FACTOR * waited
        self._faults = faults

    def prefetch(self, digests: Sequence[Digest]) -> int:
        """Request the stored bytes of blobs ahead; return their number, 0 where the index is unusable."""
        try:
            return self._store.prefetch(digests)
        except CasfsError:
            return 0

    def prefetch_around(self, digest: Digest) -> None:
        """Request the stored bytes of a blob with those before and after it in its pack, and the index.

        Do nothing if they were requested a moment ago.
        """
        index = self._store.index
        now = self._clock()
        try:
            location = index.lookup(digest)
            if location is None:
                return
            pack, begin, end, until = self._requested
            if pack == location.pack and begin <= location.offset < end and now < until:
                return
            name = pack_name(index.pack_ref(location.pack))
            begin = max(location.offset - _BEFORE_BYTES, 0)
            end = location.offset + _AFTER_BYTES
            self._requested = location.pack, begin, end, now + _REPEAT_S
            self._store.storage.prefetch(name, begin, end - begin)
            index.prefetch(INDEX_PREFETCH_BYTES)
        except CasfsError:
            return  # a read of the blob reports it
