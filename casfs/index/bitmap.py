"""Sets of ordinals: one bit for each number up to the greatest, whatever the number of members."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from casfs.index.schema import Location, PackRecord


class VerifiedPacks:
    """The blobs that were read and verified: one bit for each, and a count for each pack."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blobs = Bitmap()
        self._counts: dict[int, int] = {}

    def mark(self, location: Location) -> None:
        """Take note of a blob that was read from its place and had its digest."""
        with self._lock:
            if self._blobs.add(location.ordinal):
                self._counts[location.pack] = self._counts.get(location.pack, 0) + 1

    def is_empty(self) -> bool:
        """Tell whether no blob was read yet."""
        return not self._counts

    def complete_packs(self, packs: Iterable[PackRecord]) -> list[PackRecord]:
        """Return those of the packs of which every blob was noted.

        A pack with a blob that is read from another pack is not among them.
        """
        with self._lock:
            counts = dict(self._counts)
        return [pack for pack in packs if counts.get(pack.ordinal, 0) >= pack.blobs > 0]


class Bitmap:
    """A set of numbers from 0 on that takes one bit for each up to the greatest; one thread."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, ordinal: int) -> bool:
        """Put a number into the set; tell whether it was new."""
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
