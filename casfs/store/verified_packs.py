"""The packs of which a process has read and verified every blob, as its reads show. Threads may share it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from casfs.index.bitmap import Bitmap
from casfs.index.schema import Location, PackRecord


class VerifiedPacks:
    """The blobs that were read and verified: one bit for each, and a count for each pack.

    Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blobs = Bitmap()
        self._counts: dict[int, int] = {}

    def mark(self, location: Location) -> None:
        """Record that a blob was read from its location and verified."""
        with self._lock:
            if self._blobs.add(location.ordinal):
                self._counts[location.pack] = self._counts.get(location.pack, 0) + 1

    def is_empty(self) -> bool:
        """Return whether no blob is recorded yet."""
        return not self._counts

    def complete_packs(self, packs: Iterable[PackRecord]) -> list[PackRecord]:
        """Return those of the packs whose blobs are all recorded.

        A pack is not complete if one of its blobs was read from another pack.
        """
        with self._lock:
            counts = dict(self._counts)
        return [pack for pack in packs if counts.get(pack.ordinal, 0) >= pack.blobs > 0]
