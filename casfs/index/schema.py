"""The index's databases and their rows. Every function works inside a transaction that the caller owns."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import NamedTuple

from casfs.digest import Digest, PackId
from casfs.format.pack import PackEntry, PackRef, is_group
from casfs.index.lmdb_env import Database, LmdbEnv, Transaction

LOCATION = struct.Struct("<IIIIIBBBB")
assert LOCATION.size == 24
PACK = struct.Struct("<32sQIIQ")
assert PACK.size == 56

DAMAGED = 1
"""The flag of a blob or a pack whose stored data are damaged."""

METADATA = 2
"""The flag of a metadata pack."""

FALSE_CLAIM = 4
"""The flag of a pack that lacked a blob which another machine said it holds."""

VERIFIED = 2
"""The flag of a blob that this machine found where another machine said it is."""

IndexedPack = tuple[PackRef, int, list[PackEntry]]
"""A pack, its size in bytes, and its entries."""


class Location(NamedTuple):
    """Location of a blob's payload: `pack` is the pack's ordinal, `offset` counts bytes from its start.

    A blob in a group has the offset and the stored bytes of the group, and `position` in it. A machine that
    cannot read what it stores records no place: neither offset, sizes nor position.
    """

    pack: int
    offset: int
    stored_bytes: int
    plain_bytes: int
    ordinal: int
    kind: int
    codec: int
    flags: int = 0
    position: int = 0

    @property
    def is_damaged(self) -> bool:
        """Whether the data were found damaged."""
        return bool(self.flags & DAMAGED)

    @property
    def has_place(self) -> bool:
        """Whether the place in the pack is recorded; if not, only the pack's directory has it."""
        return self.offset != 0

    def at_place(self, entry: PackEntry) -> Location:
        """Return this location with the place that an entry of the pack's directory gives."""
        place = (entry.offset, entry.stored_bytes, entry.plain_bytes)
        kinds = (entry.kind, entry.codec, self.flags, entry.position)
        return Location(self.pack, *place, self.ordinal, *kinds)

    def matches(self, entry: PackEntry) -> bool:
        """Return whether this location agrees with an entry of the pack's directory."""
        recorded = (entry.offset, entry.stored_bytes, entry.plain_bytes, entry.position)
        return (self.offset, self.stored_bytes, self.plain_bytes, self.position) == recorded

    @property
    def is_grouped(self) -> bool:
        """Whether the payload is a group of blobs."""
        return is_group(self.codec)

    def in_pack(self, digest: Digest) -> PackEntry:
        """Return the entry of the pack's directory that this location agrees with."""
        return PackEntry(
            digest,
            self.offset,
            self.stored_bytes,
            self.plain_bytes,
            self.kind,
            self.codec,
            self.position,
        )


@dataclass(frozen=True, slots=True)
class PackRecord:
    """The index's record of a pack.

    `verified_s` is the time at which all its bytes were last verified (seconds since 1970, 0: never).
    `is_damaged` means that its bytes did not match its name, `has_false_claim` that it lacked a blob which
    another machine said it holds.
    """

    ordinal: int
    pack: PackRef
    pack_bytes: int
    blobs: int
    verified_s: int
    is_damaged: bool = False
    has_false_claim: bool = False


ORDINAL = struct.Struct(">I")
_REMOVALS = struct.Struct("<Q")
COUNTERS = struct.Struct("<QQQ")
_MARKED_ITEM = struct.Struct("<I")
LOCATION_PACK = struct.Struct("<I")
MARKED = b"condemned"
"""The key of the packs that are marked for removal."""

UNVERIFIED = b"unverified"
"""The key of the packs that a delta named and that this host has not seen in the storage."""

LEAVING = b"leaving"
"""The key of the packs that a process is removing from the index (`casfs.index.removal`)."""

PARTIAL = b"partial"
UNPUBLISHED = b"unpublished"
REMOVED = b"removed"
"""Prefixes of keys: of a partly indexed pack, and of packs whose addition or removal is in no delta yet."""

CLAIMED = b"claimed"
"""The prefix of the keys of packs whose entries come from a delta or from the pack's directory."""

UNPLACED = b"unplaced"
"""The prefix of the keys of packs of whose blobs no places are recorded."""

_NO_CODEC = 0
"""In place of the codec of a blob without a place."""


Row = tuple[bytes, int, int, int, int, int, int, int, int]
"""A digest; the ordinal of its pack, offset, stored bytes, plain bytes, kind, codec, position and flags."""


class Tables:
    """The databases `blobs`, `copies`, `packs` and `meta` of an environment.

    With `omits_places` new rows get no places. They would give away the exact sizes of files.
    """

    def __init__(self, env: LmdbEnv) -> None:
        self.omits_places = False
        self.blobs = env.database(b"blobs")
        self.packs = env.database(b"packs")
        self.meta = env.database(b"meta")
        self.copies = env.database_if_any(b"copies")
        self._sets: dict[bytes, tuple[bytes, frozenset[int]]] = {}

    def all_packs(self, txn: Transaction) -> list[PackRecord]:
        """Return every pack in the order of the ordinals."""
        records = []
        for key, value in txn.cursor(db=self.packs):
            records.append(_record(ORDINAL.unpack(key)[0], value))
        return records

    def has_ordinal(self, txn: Transaction, ordinal: int) -> bool:
        """Return whether a pack has this ordinal."""
        return txn.get(ORDINAL.pack(ordinal), db=self.packs) is not None

    def pack_of(self, txn: Transaction, ordinal: int) -> PackRecord | None:
        """Return the record of a pack, None where there is none."""
        value = txn.get(ORDINAL.pack(ordinal), db=self.packs)
        return None if value is None else _record(ordinal, value)

    def rows(
        self, txn: Transaction, after: bytes | None, limit: int, db: Database | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Return up to `limit` rows of `blobs`, or of `db`, that follow a key, as stored."""
        cursor = txn.cursor(db=self.blobs if db is None else db)
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
        ordinal, next_blob, losses = self.counters(txn)
        if not txn.put(b"pack" + pack.id, ORDINAL.pack(ordinal), overwrite=False, db=self.meta):
            return None
        flags = METADATA * pack.is_meta
        if known is not None:
            flags |= DAMAGED * known.is_damaged | FALSE_CLAIM * known.has_false_claim
        verified_s = known.verified_s if known is not None else 0
        value = PACK.pack(pack.id, pack_bytes, blobs, flags, verified_s)
        txn.put(ORDINAL.pack(ordinal), value, db=self.packs)
        if self.omits_places:
            txn.put(UNPLACED + ORDINAL.pack(ordinal), b"", db=self.meta)
        self.set_counters(txn, ordinal + 1, next_blob, losses)
        return ordinal

    def note_unpublished(self, txn: Transaction, ordinal: int, pack: bytes) -> None:
        """Note that a pack, which was added, is in no index delta yet."""
        txn.put(UNPUBLISHED + ORDINAL.pack(ordinal), b"", db=self.meta)
        txn.delete(REMOVED + pack, db=self.meta)

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
        rows = (
            (e.digest, ordinal, *e[1:], DAMAGED if bad and e.digest in bad else 0) for e in entries
        )
        self.put_rows(txn, rows, marked)

    def put_rows(self, txn: Transaction, rows: Iterable[Row], untrusted: Set[int]) -> None:
        """Record blobs at their locations; the location of a blob that counts as stored elsewhere stays.

        What this machine stored takes the place of a claim that was not verified. The locations that the rows
        of `blobs` do not name are recorded in `copies`.
        """
        next_pack, next_blob, losses = self.counters(txn)
        blobs, pack_location = self.blobs, LOCATION.pack
        own: dict[int, bool] = {}
        for (
            digest,
            ordinal,
            offset,
            stored_bytes,
            plain_bytes,
            kind,
            codec,
            position,
            flags,
        ) in rows:
            if self.omits_places:
                offset = stored_bytes = plain_bytes = position = 0
                codec = _NO_CODEC
            place = (ordinal, offset, stored_bytes, plain_bytes)
            location = pack_location(*place, next_blob, kind, codec, flags, position)
            if txn.put(digest, location, overwrite=False, db=blobs):
                next_blob += 1
                continue
            existing = bytes(txn.get(digest, db=blobs) or b"")
            fields = LOCATION.unpack(existing)
            if fields[0] == ordinal:
                continue
            if ordinal not in own:
                own[ordinal] = not self.is_claimed(txn, ordinal)
            is_stored = counts_as_stored(existing, untrusted) and not (
                own[ordinal] and self.is_claim(txn, existing)
            )
            if not flags and not is_stored:
                location = pack_location(*place, fields[4], kind, codec, 0, position)
                txn.put(digest, location, db=blobs)
                self._put_copy(txn, digest, fields[0], existing)
            else:
                self._put_copy(txn, digest, ordinal, location)
        self.set_counters(txn, next_pack, next_blob, losses)

    def _put_copy(self, txn: Transaction, digest: bytes, ordinal: int, location: bytes) -> None:
        if self.copies is not None and ordinal not in self.get_set(txn, LEAVING):
            txn.put(digest + ORDINAL.pack(ordinal), location, db=self.copies)

    def replace_by_copy(
        self, txn: Transaction, digest: bytes, value: bytes, untrusted: Set[int]
    ) -> None:
        """Remove a blob's location, `value`; another known copy of the blob takes its place."""
        copy = self._take_copy(txn, digest, untrusted)
        if copy is None:
            txn.delete(digest, db=self.blobs)
        else:
            fields, ordinal = LOCATION.unpack(copy), LOCATION.unpack(value)[4]
            location = LOCATION.pack(*fields[:4], ordinal, *fields[5:])
            txn.put(digest, location, db=self.blobs)

    def _take_copy(self, txn: Transaction, digest: bytes, marked: Set[int]) -> bytes | None:
        """Remove and return the best copy of a blob: one that counts as stored, if there is any."""
        if self.copies is None:
            return None
        leaving = self.get_set(txn, LEAVING)
        cursor = txn.cursor(db=self.copies)
        found: tuple[bytes, bytes] | None = None
        more = cursor.set_range(digest)
        while more and (key := bytes(cursor.key())).startswith(digest):
            value = bytes(cursor.value())
            is_stored = counts_as_stored(value, marked)
            if is_stored or (found is None and LOCATION.unpack(value)[0] not in leaving):
                found = key, value
                if is_stored:
                    break
            more = cursor.next()
        if found is None:
            return None
        txn.delete(found[0], db=self.copies)
        fields = LOCATION.unpack(found[1])
        record = self.pack_of(txn, fields[0])
        # A check marks only the locations that `blobs` names, so a copy in a damaged pack is suspect.
        flags = DAMAGED if record is None or record.is_damaged else fields[7]
        return LOCATION.pack(*fields[:7], flags, fields[8])

    def copies_of(self, txn: Transaction, digest: bytes) -> list[bytes]:
        """Return the further locations of a blob."""
        found: list[bytes] = []
        if self.copies is not None:
            cursor = txn.cursor(db=self.copies)
            more = cursor.set_range(digest)
            while more and bytes(cursor.key()).startswith(digest):
                found.append(bytes(cursor.value()))
                more = cursor.next()
        return found

    def has_claims(self, txn: Transaction) -> bool:
        """Return whether the entries of any pack are claims of other machines."""
        cursor = txn.cursor(db=self.meta)
        return bool(cursor.set_range(CLAIMED)) and bytes(cursor.key()).startswith(CLAIMED)

    def is_claimed(self, txn: Transaction, ordinal: int) -> bool:
        """Return whether the entries of a pack are claims of another machine."""
        return txn.get(CLAIMED + ORDINAL.pack(ordinal), db=self.meta) is not None

    def is_claim(self, txn: Transaction, value: bytes | memoryview) -> bool:
        """Return whether a row of `blobs` is a claim that this machine has not verified."""
        fields = LOCATION.unpack(value)
        return not fields[7] & VERIFIED and self.is_claimed(txn, fields[0])

    def claimed(self, txn: Transaction) -> set[int]:
        """Return the packs whose entries are claims of other machines."""
        return {ORDINAL.unpack(key)[0] for key in self.meta_suffixes(txn, CLAIMED)}

    def set_claimed(self, txn: Transaction, ordinal: int, is_claimed: bool) -> None:
        """Record whether the entries of a pack are claims of another machine."""
        key = CLAIMED + ORDINAL.pack(ordinal)
        if is_claimed:
            txn.put(key, b"", db=self.meta)
        else:
            txn.delete(key, db=self.meta)

    def unplaced(self, txn: Transaction) -> set[int]:
        """Return the packs of whose blobs no places are recorded."""
        return {ORDINAL.unpack(key)[0] for key in self.meta_suffixes(txn, UNPLACED)}

    def place_blobs(self, txn: Transaction, ordinal: int, entries: Iterable[PackEntry]) -> None:
        """Record the places of the blobs that a pack holds and that have none."""
        number = ORDINAL.pack(ordinal)
        for entry in entries:
            for db, key in ((self.blobs, entry.digest), (self.copies, entry.digest + number)):
                value = txn.get(key, db=db) if db is not None else None
                location = Location(*LOCATION.unpack(value)) if value is not None else None
                if location is not None and location.pack == ordinal and not location.has_place:
                    txn.put(key, LOCATION.pack(*location.at_place(entry)), db=db)

    def drop_places(
        self, txn: Transaction, db: Database, after: bytes | None, limit: int
    ) -> bytes | None:
        """Drop the places in up to `limit` rows of `blobs` or `copies` that follow a key.

        Return the last key, None at the end. Only those of packs that are noted as without places are
        dropped.
        """
        rows = self.rows(txn, after, limit, db)
        unplaced = self.unplaced(txn)
        for key, value in rows:
            at = Location(*LOCATION.unpack(value))
            if at.pack in unplaced and at.has_place:
                row = (at.pack, 0, 0, 0, at.ordinal, at.kind, _NO_CODEC, at.flags, 0)
                txn.put(key, LOCATION.pack(*row), db=db)
        return rows[-1][0] if len(rows) == limit else None

    def ordinal_of(self, txn: Transaction, pack: bytes) -> int | None:
        """Return the ordinal of a pack by its name."""
        value = txn.get(b"pack" + pack, db=self.meta)
        if value is None:
            return None
        if len(value) == ORDINAL.size:
            return int(ORDINAL.unpack(value)[0])
        for key, record in txn.cursor(db=self.packs):  # recorded by an older version
            if bytes(record[:32]) == pack:
                return int(ORDINAL.unpack(key)[0])
        return None

    def mark_for_removal(self, txn: Transaction, ordinals: Iterable[int]) -> None:
        """Replace the set of packs that are marked for removal."""
        self.put_set(txn, MARKED, ordinals)

    def marked_for_removal(self, txn: Transaction) -> frozenset[int]:
        """Return the ordinals of the packs that are marked for removal, or are being removed."""
        return self.get_set(txn, MARKED) | self.get_set(txn, LEAVING)

    def untrusted(self, txn: Transaction) -> frozenset[int]:
        """Return the ordinals of the packs whose blobs do not count as stored."""
        return self.marked_for_removal(txn) | self.get_set(txn, UNVERIFIED)

    def put_set(self, txn: Transaction, key: bytes, ordinals: Iterable[int]) -> None:
        """Replace a set of ordinals that is kept under a key of `meta`."""
        value = b"".join(map(_MARKED_ITEM.pack, sorted(ordinals)))
        txn.put(key, value, db=self.meta)

    def get_set(self, txn: Transaction, key: bytes) -> frozenset[int]:
        """Return a set of ordinals that is kept under a key of `meta`."""
        value = bytes(txn.get(key, db=self.meta) or b"")
        before = self._sets.get(key)
        if before is not None and before[0] == value:
            return before[1]
        found = frozenset(number for (number,) in _MARKED_ITEM.iter_unpack(value))
        self._sets[key] = value, found
        return found

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


def _record(ordinal: int, value: bytes | memoryview) -> PackRecord:
    pack, pack_bytes, blobs, flags, verified_s = PACK.unpack(value)
    ref = pack_ref(pack, flags)
    marks = bool(flags & DAMAGED), bool(flags & FALSE_CLAIM)
    return PackRecord(ordinal, ref, pack_bytes, blobs, verified_s, *marks)


def pack_ref(name: bytes, flags: int) -> PackRef:
    """Return the pack of a record in `packs`, from its name and its flags."""
    return PackRef(PackId(name), bool(flags & METADATA))


def counts_as_stored(value: bytes | memoryview | None, marked: Set[int]) -> bool:
    """Return whether a row of `blobs` is of an intact blob in a pack that is not marked for removal."""
    return value is not None and not value[-2] & DAMAGED and LOCATION.unpack(value)[0] not in marked
