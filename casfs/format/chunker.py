"""Content-defined chunking: FastCDC 2020 through pyfastcdc.

Only pyfastcdc's compiled form is used, because the fallback is about 200 times slower. It always runs on
private buffers and never on a mapped source. Golden tests pin the cut points: other cut points would
deduplicate with nothing that a repository holds.

In an encrypted repository of format 2 the cut points also depend on a key. FastCDC's seed would not do: the
sizes of stored blobs reveal the cut points of a known file, every cut point reveals some bits of the seed,
and the seed then predicts the sizes of all known files. So FastCDC cuts small pieces without a secret, and a
keyed hash of the bytes before each end of a piece decides whether the chunk ends there (FORMAT.md, "Chunks").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
from blake3 import blake3
from pyfastcdc.cy import FastCDC

from casfs.format.config import KEYED_CHUNKER, ChunkerConfig

ReadInto = Callable[[memoryview], int]
"""Fills a buffer from its start and returns the number of bytes; 0 means the end of the stream."""


PIECES = 8
"""A keyed chunk has about this many pieces: each is a place where it may end."""

WINDOW_BYTES = 64
"""The bytes before an end of a piece that decide, as many as FastCDC's own hash depends on."""

EARLY_ODDS, LATE_ODDS = 14, 4
"""One of so many ends of pieces ends the chunk, below and from the average size on.

As in FastCDC's normalized chunking, two odds make the sizes vary less. Of random data the mean is 1.24 times
the nominal average, as without a key.
"""


def make_chunker(config: ChunkerConfig, key: bytes | None = None) -> Chunker:
    """Return the chunker for a repository's parameters; `key` is the 32 bytes that a keyed one needs."""
    if config.algorithm != KEYED_CHUNKER:
        return Chunker(config)
    if key is None:
        raise ValueError("a keyed chunker needs its key")
    return KeyedChunker(config, key)


class Chunker:
    """Cuts streams with one repository's parameters; used by one thread at a time."""

    def __init__(self, config: ChunkerConfig) -> None:
        self.min_bytes = config.min_bytes
        self._buffered_bytes = 2 * config.max_bytes
        self._cutter = FastCDC(
            config.avg_bytes,
            min_size=config.min_bytes,
            max_size=config.max_bytes,
            normalized_chunking=config.normalization,
            seed=config.seed,
        )

    def cut(self, read_into: ReadInto, most_bytes: int | None = None) -> Iterator[bytes]:
        """Yield the chunks of a stream, each a private copy that the caller may keep.

        `most_bytes` bounds the stream's length where the caller knows it. A short stream is read into one
        buffer, because the stream interface allocates and clears two maximal chunks for every stream.
        """
        if most_bytes is not None and most_bytes <= self._buffered_bytes:
            yield from self._cut_buffered(read_into, most_bytes)
            return
        yield from self._joined(chunk.data for chunk in self._cutter.cut_stream(_Stream(read_into)))

    def _cut_buffered(self, read_into: ReadInto, most_bytes: int) -> Iterator[bytes]:
        data = memoryview(bytearray(most_bytes))
        size = 0
        while size < most_bytes and (count := read_into(data[size:])):
            size += count
        if size:
            yield from self._joined(chunk.data for chunk in self._cutter.cut_buf(data[:size]))

    def _joined(self, pieces: Iterator[memoryview]) -> Iterator[bytes]:
        """Yield the chunks that FastCDC's pieces form; a piece is valid until the next one is taken."""
        return map(bytes, pieces)


class KeyedChunker(Chunker):
    """Cuts streams at those ends of FastCDC's pieces that a key chooses; used by one thread at a time."""

    def __init__(self, config: ChunkerConfig, key: bytes) -> None:
        piece_bytes = config.avg_bytes // PIECES
        most_piece_bytes = 2 * piece_bytes
        super().__init__(
            msgspec.structs.replace(
                config,
                min_bytes=piece_bytes // 4,
                avg_bytes=piece_bytes,
                max_bytes=most_piece_bytes,
                seed=0,
            )
        )
        self.min_bytes = config.min_bytes
        self._buffered_bytes = 2 * config.max_bytes
        self._avg_bytes = config.avg_bytes
        self._full_bytes = config.max_bytes - most_piece_bytes
        self._key = key

    def _joined(self, pieces: Iterator[memoryview]) -> Iterator[bytes]:
        chunk = bytearray()
        for piece in pieces:
            chunk += piece
            if self._ends(chunk):
                yield bytes(chunk)
                chunk.clear()
        if chunk:
            yield bytes(chunk)

    def _ends(self, chunk: bytearray) -> bool:
        """Return whether a chunk ends after the pieces that it has."""
        size = len(chunk)
        if size > self._full_bytes:
            return True
        if size < self.min_bytes:
            return False
        value = int.from_bytes(blake3(chunk[-WINDOW_BYTES:], key=self._key).digest(4), "little")
        return value % (EARLY_ODDS if size < self._avg_bytes else LATE_ODDS) == 0


class _Stream:
    def __init__(self, read_into: ReadInto) -> None:
        self.readinto = read_into
