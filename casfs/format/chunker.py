"""Content-defined chunking: FastCDC 2020 through pyfastcdc.

Only pyfastcdc's compiled form is used, because the fallback is about 200 times slower. It always runs on
private buffers and never on a mapped source. Golden tests pin the cut points: other cut points would
deduplicate with nothing that a repository holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyfastcdc.cy import FastCDC

from casfs.format.config import ChunkerConfig

ReadInto = Callable[[memoryview], int]
"""Fills a buffer from its start and returns the number of bytes; 0 means the end of the stream."""


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
        for chunk in self._cutter.cut_stream(_Stream(read_into)):
            yield bytes(chunk.data)

    def _cut_buffered(self, read_into: ReadInto, most_bytes: int) -> Iterator[bytes]:
        data = memoryview(bytearray(most_bytes))
        size = 0
        while size < most_bytes and (count := read_into(data[size:])):
            size += count
        if size:
            for chunk in self._cutter.cut_buf(data[:size]):
                yield bytes(chunk.data)


class _Stream:
    def __init__(self, read_into: ReadInto) -> None:
        self.readinto = read_into
