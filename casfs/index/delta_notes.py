"""What the index knows of the index deltas: which it has applied, and which packs are in none yet.

A delta is applied in three steps: `register` records its packs as partial, `put_rows` adds their blobs, and
`finish` completes the packs and notes the delta. A process that dies between two of them leaves partial packs
and no note, so the next one applies the delta again. Two processes may apply the same delta at the same time.

A pack that only a delta names is *unverified*: none of its blobs counts as stored before `mark_verified`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import NamedTuple

from casfs.digest import PackId
from casfs.format.delta import DeltaName, DeltaPack, parse_key
from casfs.format.pack import PackRef
from casfs.index.bitmap import Bitmap
from casfs.index.index import Index
from casfs.index.lmdb_env import Transaction
from casfs.index.schema import (
    ORDINAL,
    PARTIAL,
    REMOVED,
    UNPUBLISHED,
    UNVERIFIED,
    PackRecord,
    Row,
)

_DELTA = b"delta"
_NOTE = struct.Struct("<B3xIQ")
assert _NOTE.size == 16
_ITEM = struct.Struct("<I")
_HIDDEN = b"hidden"
_COUNT = struct.Struct("<Q")

_COMPLETE = 1
_UNUSABLE = 2
_CLOSED = 4

_ROWS_AT_ONCE = 8192


class DeltaNote(NamedTuple):
    """What the index noted of a delta that it has seen.

    `packs` is the number of packs that it names, `replaced_ms` the time of the delta that replaces it, 0
    without any. An `is_unusable` delta cannot be parsed, and of an `is_closed` one this machine lacks the
    keys; neither was applied.
    """

    packs: int = 0
    is_complete: bool = False
    is_unusable: bool = False
    is_closed: bool = False
    replaced_ms: int = 0


class Doubt(Enum):
    """Which packs become unverified when deltas are noted."""

    NONE = 0
    UNCOVERED = 1
    """Those of other hosts that no delta names any more, as a merge may have dropped their removal."""

    UNCOVERED_OR_OWN = 2
    """Also those of this host that no delta names yet, as a merge has dropped removals."""

    ALL = 3
    """All, as a delta that cannot be read may have removed any."""


class Registered(NamedTuple):
    """A pack's ordinal, whether its blobs are to be added, and whether the index had it before."""

    ordinal: int
    needs_rows: bool
    was_known: bool


class DeltaNotes:
    """The notes in one index. Every method owns its transaction."""

    def __init__(self, index: Index) -> None:
        self._env = index.environment
        self._tables = index.tables

    def all(self) -> dict[DeltaName, DeltaNote]:
        """Return every note."""
        return self._env.read(lambda txn: {name: note for name, note, _ in self._notes(txn)})

    def covered(self, names: AbstractSet[DeltaName] | None = None) -> Bitmap:
        """Return the ordinals of the packs that some deltas name, or all deltas that none replaces."""
        return self._env.read(lambda txn: self._covered(txn, names))

    def _covered(self, txn: Transaction, names: AbstractSet[DeltaName] | None) -> Bitmap:
        found = Bitmap()
        for name, note, ordinals in self._notes(txn):
            if name in names if names is not None else not note.replaced_ms:
                for (ordinal,) in _ITEM.iter_unpack(ordinals):
                    found.add(ordinal)
        return found

    def register(
        self, packs: Sequence[DeltaPack], skip: AbstractSet[PackId] = frozenset()
    ) -> list[Registered | None]:
        """Record packs without their blobs, as unverified, claimed and partial; None for one in `skip`."""

        def change(txn: Transaction) -> list[Registered | None]:
            found: list[Registered | None] = []
            fresh = set()
            for pack in packs:
                if pack.pack.id in skip:
                    found.append(None)
                    continue
                key = PARTIAL + pack.pack.id
                known = self._tables.ordinal_of(txn, pack.pack.id)
                if known is not None:
                    needs_rows = txn.get(key, db=self._tables.meta) is not None
                    if needs_rows:
                        # Even if this machine stored it, the rest of its entries come from the delta.
                        self._tables.set_claimed(txn, known, True)
                    found.append(Registered(known, needs_rows, True))
                    continue
                ordinal = self._tables.put_pack(txn, pack.pack, pack.pack_bytes, len(pack.entries))
                assert ordinal is not None
                txn.put(key, b"", db=self._tables.meta)
                self._tables.set_claimed(txn, ordinal, True)
                fresh.add(ordinal)
                found.append(Registered(ordinal, True, False))
            if fresh:
                before = self._tables.get_set(txn, UNVERIFIED)
                self._tables.put_set(txn, UNVERIFIED, before | fresh)
            return found

        return self._env.write(change)

    def put_rows(self, rows: Sequence[Row], packs: dict[int, PackId]) -> None:
        """Add blobs, sorted by digest, of packs that are partial; `packs` names them by ordinal.

        The blobs of a pack that another process has completed, or removed, meanwhile are left out.
        """

        def change(txn: Transaction, part: Sequence[Row]) -> None:
            partial = {
                ordinal
                for ordinal in {row[1] for row in part}
                if txn.get(PARTIAL + packs[ordinal], db=self._tables.meta) is not None
            }
            # An unverified location is as good as another for a reader.
            marked = self._tables.marked_for_removal(txn)
            self._tables.put_rows(txn, (row for row in part if row[1] in partial), marked)

        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[begin : begin + _ROWS_AT_ONCE]
            self._env.write(lambda txn, part=part: change(txn, part))  # type: ignore[misc]

    def finish(
        self,
        notes: Mapping[DeltaName, tuple[DeltaNote, Sequence[int]]],
        complete: Iterable[PackId] = (),
        removed: Iterable[PackId] = (),
        gone: Iterable[DeltaName] = (),
        doubt: Doubt = Doubt.NONE,
        hides_removals: bool = False,
    ) -> None:
        """Note deltas with the ordinals of their packs, and complete the packs that `register` recorded.

        The packs, and the `removed` ones, are published from now on. The notes of deltas that are `gone` are
        dropped. What `doubt` says is marked as unverified in the same transaction. `hides_removals` counts
        for `hidden_removals`.
        """

        def change(txn: Transaction) -> None:
            for pack in complete:
                txn.delete(PARTIAL + pack, db=self._tables.meta)
            for pack in removed:
                txn.delete(REMOVED + pack, db=self._tables.meta)
            for name in gone:
                txn.delete(_key(name), db=self._tables.meta)
            for name, (note, ordinals) in notes.items():
                self._put_note(txn, name, note, ordinals)
            if hides_removals:
                count = self._hidden(txn) + 1
                txn.put(_HIDDEN, _COUNT.pack(count), db=self._tables.meta)
            if doubt != Doubt.NONE:
                before = self._tables.get_set(txn, UNVERIFIED)
                doubted = self._doubted(txn, doubt)
                self._tables.put_set(txn, UNVERIFIED, before | doubted)

        self._env.write(change)

    def _put_note(
        self, txn: Transaction, name: DeltaName, note: DeltaNote, ordinals: Sequence[int]
    ) -> None:
        before = txn.get(_key(name), db=self._tables.meta)
        if before is not None and note.replaced_ms and not ordinals:
            # Only the replacement is news.
            flags, packs, _ = _NOTE.unpack_from(before)
            value = _NOTE.pack(flags, packs, note.replaced_ms) + bytes(before[_NOTE.size :])
        else:
            value = _encode(note, ordinals)
        txn.put(_key(name), value, db=self._tables.meta)
        for ordinal in ordinals:
            txn.delete(UNPUBLISHED + ORDINAL.pack(ordinal), db=self._tables.meta)

    def _doubted(self, txn: Transaction, doubt: Doubt) -> set[int]:
        ordinals = {record.ordinal for record in self._tables.all_packs(txn)}
        if doubt == Doubt.ALL:
            return ordinals
        if doubt == Doubt.UNCOVERED:
            own = self._tables.meta_suffixes(txn, UNPUBLISHED)
            ordinals -= {ORDINAL.unpack(key)[0] for key in own}
        covered = self._covered(txn, None)
        return {ordinal for ordinal in ordinals if ordinal not in covered}

    def hidden_removals(self) -> int:
        """Return how often a process of this machine saw that a merge may have dropped a removal."""
        return self._env.read(self._hidden)

    def _hidden(self, txn: Transaction) -> int:
        value = txn.get(_HIDDEN, db=self._tables.meta)
        return int(_COUNT.unpack(value)[0]) if value is not None else 0

    def doubt_all(self) -> None:
        """Mark every pack as unverified."""

        def change(txn: Transaction) -> None:
            self._tables.put_set(txn, UNVERIFIED, self._doubted(txn, Doubt.ALL))

        self._env.write(change)

    def unpublished(self) -> list[PackRecord]:
        """Return the packs that no delta names yet, as far as this host's index has noted."""

        def ask(txn: Transaction) -> list[PackRecord]:
            found = []
            for key in self._tables.meta_suffixes(txn, UNPUBLISHED):
                record = self._tables.pack_of(txn, ORDINAL.unpack(key)[0])
                if record is not None:
                    found.append(record)
            return found

        return self._env.read(ask)

    def removed(self) -> list[PackId]:
        """Return the packs that this host removed and that no delta names as removed yet."""
        found = self._env.read(lambda txn: self._tables.meta_suffixes(txn, REMOVED))
        return [PackId(name) for name in found]

    def unverified(self) -> list[PackRecord]:
        """Return the packs that a delta named and that this host has not seen in the storage."""

        def ask(txn: Transaction) -> list[PackRecord]:
            found = sorted(self._tables.get_set(txn, UNVERIFIED))
            records = (self._tables.pack_of(txn, ordinal) for ordinal in found)
            return [record for record in records if record is not None]

        return self._env.read(ask)

    def mark_verified(self, ordinals: AbstractSet[int]) -> None:
        """Record that packs were seen in the storage with the size that the index has."""

        def change(txn: Transaction) -> None:
            before = self._tables.get_set(txn, UNVERIFIED)
            self._tables.put_set(txn, UNVERIFIED, before - ordinals)

        if ordinals:
            self._env.write(change)

    def find(self, packs: Iterable[PackId]) -> dict[int, PackRef]:
        """Return those packs that are in the index, by ordinal."""
        return {record.ordinal: record.pack for record in self.records(packs)}

    def records(self, packs: Iterable[PackId]) -> list[PackRecord]:
        """Return the records of those packs that are in the index."""

        def ask(txn: Transaction) -> list[PackRecord]:
            found = []
            for pack in packs:
                ordinal = self._tables.ordinal_of(txn, pack)
                record = self._tables.pack_of(txn, ordinal) if ordinal is not None else None
                if record is not None:
                    found.append(record)
            return found

        return self._env.read(ask)

    def existing_packs(self) -> dict[DeltaName, int]:
        """Return for each noted delta how many of the packs that it names are in the index."""

        def ask(txn: Transaction) -> dict[DeltaName, int]:
            return {
                name: sum(
                    self._tables.has_ordinal(txn, ordinal)
                    for (ordinal,) in _ITEM.iter_unpack(ordinals)
                )
                for name, _, ordinals in self._notes(txn)
            }

        return self._env.read(ask)

    def named_later(self, ordinals: AbstractSet[int], name: DeltaName) -> set[int]:
        """Return those packs that a noted delta later than `name` names."""

        def ask(txn: Transaction) -> set[int]:
            found: set[int] = set()
            for noted, _, packs in self._notes(txn):
                if noted > name:
                    found |= {n for (n,) in _ITEM.iter_unpack(packs)} & ordinals
            return found

        return self._env.read(ask)

    def _notes(self, txn: Transaction) -> Iterable[tuple[DeltaName, DeltaNote, bytes]]:
        cursor = txn.cursor(db=self._tables.meta)
        more = cursor.set_range(_DELTA)
        while more and (key := bytes(cursor.key())).startswith(_DELTA):
            name = parse_key(key[len(_DELTA) :].decode())
            value = bytes(cursor.value())
            flags, packs, replaced_ms = _NOTE.unpack_from(value)
            note = DeltaNote(
                packs,
                bool(flags & _COMPLETE),
                bool(flags & _UNUSABLE),
                bool(flags & _CLOSED),
                replaced_ms,
            )
            if name is not None:
                yield name, note, value[_NOTE.size :]
            more = cursor.next()


def _key(name: DeltaName) -> bytes:
    return _DELTA + name.key.encode()


def _encode(note: DeltaNote, ordinals: Sequence[int]) -> bytes:
    flags = _COMPLETE * note.is_complete | _UNUSABLE * note.is_unusable | _CLOSED * note.is_closed
    head = _NOTE.pack(flags, note.packs, note.replaced_ms)
    return head + b"".join(map(_ITEM.pack, sorted(set(ordinals))))
