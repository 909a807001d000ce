"""Sets of ordinals as bitmaps: one bit for each number up to the largest member."""

from __future__ import annotations

import threading
from collections.abc import Iterable

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


class Bitmap:
    """A set of numbers from 0 on, with one bit for each up to the largest member; used by one thread."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, ordinal: int) -> bool:
        """Add a number to the set; return whether it was new."""
        place, bit = ordinal >> 3, 1 << (ordinal & 7)
        bits = self._bits
        if place >= len(bits):
            bits.extend(bytes(max(place + 1 - len(bits), len(bits))))
        if bits[place] & bit:
            return False
        bits[place] |= bit
        return True

    def __contains__(self, ordinal: int) -> bool:
        place = ordinal >> 3
        return place < len(self._bits) and bool(self._bits[place] & 1 << (ordinal & 7))
