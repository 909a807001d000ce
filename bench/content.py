"""Deterministic file contents: prose-like text, and bytes that do not compress.

The text is drawn word by word from a vocabulary with the frequencies of a natural language. It contains
repeated phrases and random bytes, so that zstd compresses it two to three times. It has no period: no long
part of it occurs twice.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from functools import cache
from itertools import accumulate

ALPHABET = b"etaoinshrdlucmfwypvbgkqjxz"
WORDS = 20_000
PHRASES = 12_000
TABLE_SIZE = 1 << 16
DRAWS = 64 * 1024
RANDOM_SHARE = 0.12
BLOCK_BYTES = 1 << 20


class TextStream:
    """A text without end; the same seed gives the same bytes on every machine."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._table = _vocabulary()
        self._ready = b""
        self._offset = 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        parts = []
        while size > 0:
            if self._offset == len(self._ready):
                self._ready = self._draw()
                self._offset = 0
            part = self._ready[self._offset : self._offset + size]
            self._offset += len(part)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _draw(self) -> bytes:
        table = self._table
        draws = array("H", self._rng.randbytes(2 * DRAWS))
        text = b"".join([table[each] for each in draws])
        return text + self._rng.randbytes(int(len(text) * RANDOM_SHARE))


@cache
def _vocabulary() -> tuple[bytes, ...]:
    rng = random.Random("vocabulary")
    words = []
    for _ in range(WORDS):
        length = 2 + min(int(rng.expovariate(0.3)), 14)
        letters = (ALPHABET[min(int(rng.expovariate(0.2)), 25)] for _ in range(length))
        words.append(bytes(letters) + b" ")
    weights = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))
    phrases = [b"".join(rng.choices(words, cum_weights=weights, k=4)) for _ in range(PHRASES)]
    singles = rng.choices(words, cum_weights=weights, k=TABLE_SIZE - PHRASES)
    return (*phrases, *singles)


def random_blocks(seed: str, size: int) -> Iterator[bytes]:
    """Yield `size` incompressible bytes in blocks of at most a mebibyte."""
    rng = random.Random(seed)
    for start in range(0, size, BLOCK_BYTES):
        yield rng.randbytes(min(BLOCK_BYTES, size - start))
