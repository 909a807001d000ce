"""Verified blobs for a mount: at once where that needs no waiting, otherwise where waiting is allowed.

On the thread that must not wait, small blobs whose bytes the kernel has in memory are decoded on the
spot, which costs a fraction of a trip to another thread. When that turns out to be slow all the same,
because the pages of the index come from a slow disk, it is left alone for a while.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.store.blob_store import BlobStore
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock

_NONBLOCKING_BYTES = 64 * 1024
"""Stored bytes up to which a blob is decoded on the spot: some half a millisecond."""

_SLOW_S = 0.004
_CAUTION = 8
"""How many times the length of a wait goes by until another one is risked."""


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


class BlobReader:
    """The blobs of one repository; safe to share between threads."""

    def __init__(
        self,
        store: BlobStore,
        waiting: EventLoopGuard,
        *,
        clock: Callable[[], float] = time.monotonic,
        major_faults: Callable[[], int] = _major_faults,
    ) -> None:
        self._clock = clock
        self._major_faults = major_faults
        self._store = store
        self._waiting = waiting
        self._cautious_until = 0.0
        self._faults = 0

    def read(self, digest: Digest) -> bytes:
        """Return a blob's verified plaintext.

        Raises WouldBlock, BlobError when it is missing or damaged, and what storage and index raise.
        """
        if self._waiting.may_block():
            return self._store.read(digest)
        began = self._clock()
        if began < self._cautious_until:
            raise WouldBlock
        try:
            data = self._store.read_nonblocking(digest, _NONBLOCKING_BYTES)
        except CasfsError:
            data = None  # the thread that may wait finds out what it is
        ended = self._clock()
        if ended - began > _SLOW_S:
            self._consider_caution(ended, ended - began)
        if data is None:
            raise WouldBlock
        return data

    def _consider_caution(self, now: float, waited: float) -> None:
        """Be careful for a while if it was a disk that took so long, and not another program."""
        faults = self._major_faults()
        if faults > self._faults:
            self._cautious_until = now + _CAUTION * waited
        self._faults = faults

    def prefetch(self, digest: Digest) -> int:
        """Have a blob's stored bytes brought into memory soon; return how many those are."""
        try:
            return self._store.prefetch(digest)
        except CasfsError:
            return 0
