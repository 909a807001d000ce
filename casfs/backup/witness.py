"""The witness: a second read of an open file, digests only, that says what a capture is worth.

Where both reads saw the same bytes, every byte was the same before and behind the moment between them:
at that moment the file was what was captured, unless something was changed and changed back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from blake3 import blake3

from casfs.backup.source_reader import data_ranges
from casfs.digest import Digest, update_zeros

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a witness saw: the digest of the beginning that was captured, of all, and the size of all."""

    prefix: Digest
    observed: Digest
    size: int


def digest_again(fd: int, captured_bytes: int) -> Testimony:
    """Read an open file again, no further than the size that it has now."""
    end = os.fstat(fd).st_size
    witness = _Witness(captured_bytes)
    for begin, data_end in data_ranges(fd, end):
        witness.skip(begin)
        while witness.done < data_end:
            stop = witness.next_stop(data_end)
            data = os.pread(fd, min(stop - witness.done, _READ_BYTES), witness.done)
            if not data:
                return witness.testimony()
            witness.see(data)
    witness.skip(min(end, os.fstat(fd).st_size))
    return witness.testimony()


class _Witness:
    """Digests over the bytes from the beginning, told apart where the captured ones end."""

    def __init__(self, captured_bytes: int) -> None:
        self.done = 0
        self._captured_bytes = captured_bytes
        self._whole = blake3()
        self._prefix: Digest | None = None
        self._mark()

    def next_stop(self, end: int) -> int:
        """Return how far one step may go: up to `end`, and not across the end of what was captured."""
        return self._captured_bytes if self.done < self._captured_bytes < end else end

    def see(self, data: bytes) -> None:
        self._whole.update(data)
        self.done += len(data)
        self._mark()

    def skip(self, end: int) -> None:
        """See the zeros of a hole that ends at `end`."""
        while self.done < end:
            stop = self.next_stop(end)
            update_zeros(self._whole, stop - self.done)
            self.done = stop
            self._mark()

    def testimony(self) -> Testimony:
        observed = Digest(self._whole.digest())
        return Testimony(self._prefix or observed, observed, self.done)

    def _mark(self) -> None:
        if self.done == self._captured_bytes:
            self._prefix = Digest(self._whole.digest())
