"""One parser under test, and the bounds of what a single input may cost."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casfs.errors import CasfsError

REAL = Path(__file__).parents[1] / "data"
"""The frozen repositories, from whose objects the seeds are taken."""

_LONGEST_S = 1.0
_LONGEST_S_PER_BYTE = 20e-6
_MOST_MEMORY_BYTES = 64 << 20
_MOST_MEMORY_PER_BYTE = 128


@dataclass(frozen=True, slots=True)
class Target:
    """A parser of bytes that others wrote.

    `parse` returns, or raises one of the documented `errors`; it asserts what holds for what it parsed. Each
    input of a target costs about `cost` times that of an ordinary one, so it gets fewer.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...] = (CasfsError,)
    cost: int = 1
    max_bytes: int = 4096

    def accepts(self, data: bytes) -> bool:
        """Parse an input and return whether it is valid; raise whatever is not a documented error.

        Raise TimeoutError for an input that takes more processor time than its size allows.
        """
        began = time.process_time()
        try:
            self.parse(data)
        except self.errors:
            return False
        finally:
            took_s = time.process_time() - began
            if took_s > _LONGEST_S + _LONGEST_S_PER_BYTE * len(data):
                raise TimeoutError(f"{self.name}: {len(data)} bytes took {took_s:.1f} s")
        return True

    def accepts_in_bounded_memory(self, data: bytes) -> bool:
        """Do the same, and raise MemoryError for an input that takes more memory than its size allows."""
        tracemalloc.start()
        try:
            return self.accepts(data)
        finally:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            if peak_bytes > _MOST_MEMORY_BYTES + _MOST_MEMORY_PER_BYTE * len(data):
                raise MemoryError(f"{self.name}: {len(data)} bytes took {peak_bytes >> 20} MiB")


def real_objects(*patterns: str, most_bytes: int = 1 << 15) -> list[bytes]:
    """Return the first bytes of the files of the frozen repositories that match any of the patterns."""
    found = []
    for pattern in patterns:
        for path in sorted(REAL.glob(pattern)):
            if path.is_file():
                with open(path, "rb") as file:
                    found.append(file.read(most_bytes))
    assert found, patterns
    return found


def text_of(data: bytes) -> str:
    """Return the text that the shell or a file passes on for these bytes: Python's escapes for the rest."""
    return data.decode("utf-8", "surrogateescape")
