"""A cache with a bounded weight, whose entries are evicted by the clock algorithm.

The clock ("second chance", Corbató 1968) approximates least-recently-used: a hit only sets a flag, so
that `get` takes no lock. Eviction looks at the oldest entry: one that was used since it was last looked
at goes to the end of the queue, any other is removed.

Safe to share between threads: `get` and `holds` are single dictionary operations, `add` holds a lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("used", "value", "weight")

    def __init__(self, value: V, weight: int) -> None:
        self.value = value
        self.weight = weight
        self.used = False


class ClockCache(Generic[V]):
    """Values by key; the sum of their weights in bytes stays below a limit.

    The entry that was added last always stays, even if it alone is heavier than the limit.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.cached_bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry[V]] = OrderedDict()

    def get(self, key: bytes) -> V | None:
        """Return the value of a key and mark it as used; return None if it is not cached."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = True
        return entry.value

    def holds(self, key: bytes) -> bool:
        """Return whether a key is cached, without marking it as used."""
        return key in self._entries

    def add(self, key: bytes, value: V, weight: int) -> None:
        """Add a value that takes `weight` bytes and evict others; a key that is cached stays as it is."""
        with self._lock:
            if key in self._entries:
                return
            added = self._entries[key] = _Entry(value, weight)
            self.cached_bytes += weight
            while self.cached_bytes > self.limit_bytes and len(self._entries) > 1:
                oldest, candidate = self._entries.popitem(last=False)
                if candidate.used or candidate is added:
                    candidate.used = False
                    self._entries[oldest] = candidate
                else:
                    self.cached_bytes -= candidate.weight

    def __len__(self) -> int:
        return len(self._entries)
