"""The index's databases and their rows. Every function works inside a transaction that the caller owns."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import NamedTuple

from casfs.digest import PackId
from casfs.format.pack import PackEntry, PackRef
from casfs.index.lmdb_env import LmdbEnv, Transaction

LOCATION = struct.Struct("<IIIIIBBH")
assert LOCATION.size == 24
PACK = struct.Struct("<32sQIIQ")
assert PACK.size == 56

DAMAGED = 1
"""The flag of a blob or a pack whose stored data are damaged."""

METADATA = 2
"""The flag of a metadata pack."""

IndexedPack = tuple[PackRef, int, list[PackEntry]]
"""A pack, its size in bytes, and its entries."""


class Location(NamedTuple):
    """Location of a blob's payload: `pack` is the pack's ordinal, `offset` counts bytes from its start."""

    pack: int
    offset: int
    stored_bytes: int
    plain_bytes: int
    ordinal: int
    kind: int
    codec: int
    flags: int = 0

    @property
    def is_damaged(self) -> bool:
        """Whether the data were found damaged."""
        return bool(self.flags & DAMAGED)

    def matches(self, entry: PackEntry) -> bool:
        """Return whether this location agrees with an entry of the pack's directory."""
        recorded = (entry.offset, entry.stored_bytes, entry.plain_bytes)
        return (self.offset, self.stored_bytes, self.plain_bytes) == recorded


@dataclass(frozen=True, slots=True)
class PackRecord:
    """The index's record of a pack.

    `verified_s` is the time at which all its bytes were last verified (seconds since 1970, 0: never).
    `is_damaged` means that its bytes did not match its name.
    """

    ordinal: int
    pack: PackRef
    pack_bytes: int
    blobs: int
    verified_s: int
    is_damaged: bool = False


ORDINAL = struct.Struct(">I")
_REMOVALS = struct.Struct("<Q")
COUNTERS = struct.Struct("<QQQ")
_MARKED_ITEM = struct.Struct("<I")


class Tables:
    """The databases `blobs`, `packs` and `meta` of an environment."""

    def __init__(self, env: LmdbEnv) -> None:
        self.blobs = env.database(b"blobs")
        self.packs = env.database(b"packs")
        self.meta = env.database(b"meta")
        self._marked_value = b""
        self._marked: frozenset[int] = frozenset()

    def all_packs(self, txn: Transaction) -> list[PackRecord]:
        """Return every pack in the order of the ordinals."""
        records = []
        for key, value in txn.cursor(db=self.packs):
            pack, pack_bytes, blobs, flags, verified_s = PACK.unpack(value)
            ordinal = ORDINAL.unpack(key)[0]
            is_damaged = bool(flags & DAMAGED)
            ref = pack_ref(pack, flags)
            record = PackRecord(ordinal, ref, pack_bytes, blobs, verified_s, is_damaged)
            records.append(record)
        return records

    def rows(self, txn: Transaction, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        """Return up to `limit` rows of `blobs` that follow a digest, as stored."""
        cursor = txn.cursor(db=self.blobs)
        found = cursor.first() if after is None else cursor.set_range(after)
        if found and after is not None and cursor.key() == after:
            found = cursor.next()
        rows: list[tuple[bytes, bytes]] = []
        while found and len(rows) < limit:
            rows.append((bytes(cursor.key()), bytes(cursor.value())))
            found = cursor.next()
        return rows

    def put_pack(
        self,
        txn: Transaction,
        pack: PackRef,
        pack_bytes: int,
        blobs: int,
        known: PackRecord | None = None,
    ) -> int | None:
        """Record a pack without its blobs; return its ordinal, or None if the pack is already recorded."""
        if not txn.put(b"pack" + pack.id, b"", overwrite=False, db=self.meta):
            return None
        ordinal, next_blob, losses = self.counters(txn)
        is_damaged = known is not None and known.is_damaged
        verified_s = known.verified_s if known is not None else 0
        flags = DAMAGED * is_damaged | METADATA * pack.is_meta
        value = PACK.pack(pack.id, pack_bytes, blobs, flags, verified_s)
        txn.put(ORDINAL.pack(ordinal), value, db=self.packs)
        self.set_counters(txn, ordinal + 1, next_blob, losses)
        return ordinal

    def put_blobs(
        self,
        txn: Transaction,
        ordinal: int,
        entries: list[PackEntry],
        marked: Set[int],
        bad: Set[bytes] = frozenset(),
    ) -> None:
        """Record blobs as located in a pack, except those that count as stored elsewhere.

        Blobs in `bad` are recorded as damaged in this pack.
        """
        next_pack, next_blob, losses = self.counters(txn)
        blobs, pack_location = self.blobs, LOCATION.pack
        for digest, offset, stored_bytes, plain_bytes, kind, codec in entries:
            flags = DAMAGED if digest in bad else 0
            place = (ordinal, offset, stored_bytes, plain_bytes)
            location = pack_location(*place, next_blob, kind, codec, flags)
            if txn.put(digest, location, overwrite=False, db=blobs):
                next_blob += 1
                continue
            existing = txn.get(digest, db=blobs)
            if not flags and not counts_as_stored(existing, marked):
                fields = LOCATION.unpack(existing or b"")
                if fields[0] != ordinal:
                    location = pack_location(*place, fields[4], kind, codec, 0)
                    txn.put(digest, location, db=blobs)
        self.set_counters(txn, next_pack, next_blob, losses)

    def mark_for_removal(self, txn: Transaction, ordinals: Iterable[int]) -> None:
        """Replace the set of packs that are marked for removal."""
        value = b"".join(map(_MARKED_ITEM.pack, sorted(ordinals)))
        txn.put(b"condemned", value, db=self.meta)

    def marked_for_removal(self, txn: Transaction) -> frozenset[int]:
        """Return the ordinals of the packs that are marked for removal."""
        value = bytes(txn.get(b"condemned", db=self.meta) or b"")
        if value != self._marked_value:
            found = frozenset(number for (number,) in _MARKED_ITEM.iter_unpack(value))
            self._marked, self._marked_value = found, value
            return found
        return self._marked

    def meta_suffixes(self, txn: Transaction, prefix: bytes) -> list[bytes]:
        """Return the remainders of the keys of `meta` that begin with a prefix."""
        cursor = txn.cursor(db=self.meta)
        found = []
        more = cursor.set_range(prefix)
        while more and (key := bytes(cursor.key())).startswith(prefix):
            found.append(key[len(prefix) :])
            more = cursor.next()
        return found

    def count_loss(self, txn: Transaction) -> None:
        """Increment the count of losses of entries."""
        next_pack, next_blob, losses = self.counters(txn)
        self.set_counters(txn, next_pack, next_blob, losses + 1)

    def removals(self, txn: Transaction) -> int:
        """Return the count of removals of unneeded packs."""
        value = txn.get(b"removals", db=self.meta)
        return int(_REMOVALS.unpack(value)[0]) if value is not None else 0

    def count_removal(self, txn: Transaction) -> None:
        """Increment the count of removals of unneeded packs."""
        txn.put(b"removals", _REMOVALS.pack(self.removals(txn) + 1), db=self.meta)

    def counters(self, txn: Transaction) -> tuple[int, int, int]:
        """Return the next pack ordinal, the next blob ordinal, and the count of losses."""
        value = txn.get(b"counters", db=self.meta)
        return COUNTERS.unpack(value) if value is not None else (0, 0, 0)

    def set_counters(self, txn: Transaction, next_pack: int, next_blob: int, losses: int) -> None:
        """Store the values that `counters` returns."""
        txn.put(b"counters", COUNTERS.pack(next_pack, next_blob, losses), db=self.meta)


def pack_ref(name: bytes, flags: int) -> PackRef:
    """Return the pack of a record in `packs`, from its name and its flags."""
    return PackRef(PackId(name), bool(flags & METADATA))


def counts_as_stored(value: bytes | memoryview | None, marked: Set[int]) -> bool:
    """Return whether a row of `blobs` is of an intact blob in a pack that is not marked for removal."""
    return value is not None and value[-2] == 0 and LOCATION.unpack(value)[0] not in marked
