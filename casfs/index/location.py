"""What the index keeps: where a blob is, and what is known of a pack (FORMAT.md, "Index")."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from casfs.digest import PackId
from casfs.format.pack import PackEntry

LOCATION = struct.Struct("<IIIIIBBH")
assert LOCATION.size == 24
PACK = struct.Struct("<32sQIIQ")
assert PACK.size == 56

BAD = 1
"""The flag of a blob or a pack whose data were found damaged."""

IndexedPack = tuple[PackId, int, list[PackEntry]]
"""A pack's name, its size in bytes, and its entries."""


class Location(NamedTuple):
    """Where a blob's payload is: `pack` is the pack's ordinal, `offset` in bytes from its start."""

    pack: int
    offset: int
    stored_bytes: int
    plain_bytes: int
    ordinal: int
    kind: int
    codec: int
    flags: int = 0

    @property
    def is_bad(self) -> bool:
        """Tell whether the data were found damaged."""
        return bool(self.flags & BAD)

    def is_of(self, entry: PackEntry) -> bool:
        """Tell whether this is the place that the directory of the pack tells."""
        told = (entry.offset, entry.stored_bytes, entry.plain_bytes)
        return (self.offset, self.stored_bytes, self.plain_bytes) == told


@dataclass(frozen=True, slots=True)
class PackRecord:
    """What the index knows of a pack; `verified_s` is when all its bytes were last verified (0: never).

    `is_damaged` says that its bytes were found not to be what its name says.
    """

    ordinal: int
    pack: PackId
    pack_bytes: int
    blobs: int
    verified_s: int
    is_damaged: bool = False
