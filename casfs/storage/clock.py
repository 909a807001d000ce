"""The clock of a storage, as the times of objects that this process has just written show it.

Every margin that several machines rely on is measured by this clock, because the clocks of the machines may
differ. Between two observations it advances with the time since the machine started, which counts the time
that the machine was suspended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from casfs.storage.base import Storage

log = logging.getLogger(__name__)

MOST_OFFSET_S = 60
"""A machine whose clock differs by more gets a warning."""

_NS = 1_000_000_000


def elapsed_ns() -> int:
    """Return the nanoseconds since this machine started, including the time that it was suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class StorageClock:
    """The clock of one storage; threads may share it.

    Until an object was observed, it is the clock of this machine.
    """

    def __init__(
        self,
        storage: Storage,
        wall_ns: Callable[[], int] = time.time_ns,
        elapsed_ns: Callable[[], int] = elapsed_ns,
    ) -> None:
        self._storage = storage
        self._wall_ns = wall_ns
        self._elapsed_ns = elapsed_ns
        self._lock = threading.Lock()
        self._base_ns: int | None = None
        self._warned = False

    def create(self, name: str, data: bytes, on_stored: Callable[[], None] = lambda: None) -> int:
        """Create an object and set the clock by its time; return that time.

        Call `on_stored` once the object is stored, before its time is asked for. Warn once where this
        machine's clock differs from it by more than MOST_OFFSET_S. Raise StorageError.
        """
        return self._set(name, lambda: self._storage.create(name, data), on_stored)

    def write(self, name: str, data: bytes, on_stored: Callable[[], None] = lambda: None) -> int:
        """Write or replace an object and set the clock by its time, as `create` does."""
        return self._set(name, lambda: self._storage.write(name, data), on_stored)

    def now_ns(self) -> int:
        """Return the time: nanoseconds since 1970, never later than the storage's own clock would say."""
        with self._lock:
            if self._base_ns is None:
                return self._wall_ns()
            return self._base_ns + self._elapsed_ns()

    def _set(self, name: str, store: Callable[[], None], on_stored: Callable[[], None]) -> int:
        before_ns = self._wall_ns()
        store()
        # The storage took its time before this moment, so the result is never ahead of it.
        stored_ns, after_ns = self._elapsed_ns(), self._wall_ns()
        on_stored()
        mtime_ns = self._storage.mtime_ns(name)
        with self._lock:
            self._base_ns = mtime_ns - stored_ns
        self._warn(mtime_ns, before_ns, after_ns)
        return mtime_ns

    def _warn(self, mtime_ns: int, before_ns: int, after_ns: int) -> None:
        offset_s = max(mtime_ns - after_ns, before_ns - mtime_ns) / _NS
        if offset_s > MOST_OFFSET_S and not self._warned:
            self._warned = True
            log.warning(
                "this machine's clock and that of %s differ by %.0f s; set it right (timedatectl)",
                self._storage.url,
                offset_s,
            )
