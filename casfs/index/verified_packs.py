"""Which packs a process has verified as a whole by reading all their blobs, one after another.

A restore or a mount that came by every blob of a pack has done for it what a check does, and the record of
when packs were last verified may say so. Safe to share between threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from casfs.index.bitmap import Bitmap
from casfs.index.location import Location, PackRecord


class Coverage:
    """The blobs that were read and verified: one bit for each, and a count for each pack."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blobs = Bitmap()
        self._counts: dict[int, int] = {}

    def note(self, location: Location) -> None:
        """Take note of a blob that was read from its place and had its digest."""
        with self._lock:
            if self._blobs.add(location.ordinal):
                self._counts[location.pack] = self._counts.get(location.pack, 0) + 1

    def is_empty(self) -> bool:
        """Tell whether no blob was read yet."""
        return not self._counts

    def of(self, packs: Iterable[PackRecord]) -> list[PackRecord]:
        """Return those of the packs of which every blob was noted.

        A pack with a blob that is read from another pack is not among them.
        """
        with self._lock:
            counts = dict(self._counts)
        return [pack for pack in packs if counts.get(pack.ordinal, 0) >= pack.blobs > 0]
