"""The source of the remote benchmark: large files, and a folder of 1,000 small ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from bench.content import TextStream, random_blocks

SMALL_FILES = 1000
_SMALL_BYTES = (500, 20_000)
_LARGE_FILES = 8
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """The folder; `half` are the files whose removal leaves about half of the bytes."""

    folder: Path
    one: Path
    small: Path
    half: tuple[Path, ...]
    total_bytes: int


def make_source(folder: Path, total_bytes: int) -> Source:
    """Fill a folder with about `total_bytes`: half prose, half bytes that do not compress."""
    small = folder / "small"
    small.mkdir(parents=True)
    rng = random.Random("small files")
    text = TextStream("small files")
    written = 0
    for number in range(SMALL_FILES):
        data = text.take(rng.randint(*_SMALL_BYTES))
        (small / f"{number:04}.txt").write_bytes(data)
        written += len(data)
    each = max((total_bytes - written) // _LARGE_FILES, _MIB)
    large = [folder / f"large {number}" for number in range(_LARGE_FILES)]
    for number, path in enumerate(large):
        with path.open("wb") as file:
            if number % 2:
                for block in random_blocks(path.name, each):
                    file.write(block)
            else:
                prose = TextStream(path.name)
                for begin in range(0, each, _MIB):
                    file.write(prose.take(min(_MIB, each - begin)))
        written += each
    return Source(folder, small / "0500.txt", small, tuple(large[::2]), written)
