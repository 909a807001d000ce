"""Sets of ordinals as bitmaps: one bit for each number up to the largest member."""

from __future__ import annotations


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
