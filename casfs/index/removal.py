"""Remove packs from the index, with the locations of their blobs, in transactions of bounded memory.

1. The packs are noted as leaving. From then on none of their blobs counts as stored, and no process adds a
   location in them.
2. The locations in them are removed, a part of the index in each transaction.
3. The packs are removed, and with them the notes.

A small index takes one transaction for all of it. A process that dies in between leaves the notes, and a
later one removes the rest. Other processes may read, add and remove meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from casfs.format.pack import PackRef
from casfs.index.lmdb_env import Database, LmdbEnv, Transaction
from casfs.index.schema import (
    LEAVING,
    LOCATION_PACK,
    MARKED,
    ORDINAL,
    PARTIAL,
    REMOVED,
    UNPLACED,
    UNPUBLISHED,
    UNVERIFIED,
    Tables,
)

_ROWS_AT_ONCE = 100_000
"""The most locations that one transaction looks at.

They lie on some thousand pages of 4 KiB in the order of the digests, and each page from which one is removed
stays in memory until the commit.
"""

_READ_AT_ONCE = 10_000

_PACKS_AT_ONCE = 2048
"""The most packs that one transaction notes or removes; each touches a few pages of its own."""


@dataclass(frozen=True, slots=True)
class PackRemoval:
    """The removal of some packs, by their ordinals.

    `is_lost` means that snapshots may need them. With `needs_delta` the next index delta names them as
    removed.
    """

    env: LmdbEnv
    tables: Tables
    packs: Mapping[int, PackRef]
    is_lost: bool
    needs_delta: bool

    def run(self) -> bool:
        """Remove the packs; return whether all of them still had their ordinals.

        Change nothing if one of them does not have it at the beginning. A pack that another process removes
        meanwhile is left out.
        """
        if self.env.read(self._fits):
            return self.env.write(self._remove_at_once)
        if not self.env.read(self._has_all):
            return False
        parts = list(self._parts())
        for part in parts:
            self.env.write(functools.partial(self._begin, part=part))
        for db in (self.tables.blobs, self.tables.copies):
            if db is not None:
                self._remove_locations(db)
        ended = [self.env.write(functools.partial(self._end, part=part)) for part in parts]
        return all(ended)

    def _parts(self) -> list[list[int]]:
        rest = iter(sorted(self.packs))
        return list(iter(lambda: list(islice(rest, _PACKS_AT_ONCE)), []))

    def _fits(self, txn: Transaction) -> bool:
        """Return whether one transaction may do all of it."""
        dbs = [db for db in (self.tables.blobs, self.tables.copies) if db is not None]
        rows = sum(int(txn.stat(db=db)["entries"]) for db in dbs)
        return len(self.packs) <= _PACKS_AT_ONCE and rows <= _ROWS_AT_ONCE

    def _remove_at_once(self, txn: Transaction) -> bool:
        if not self._has_all(txn):
            return False
        ordinals = list(self.packs)
        self._note(txn, ordinals)
        for db in (self.tables.blobs, self.tables.copies):
            if db is not None:
                self._remove_part(txn, db, None, int(txn.stat(db=db)["entries"]))
        return self._end(txn, ordinals)

    def _has(self, txn: Transaction, ordinal: int) -> bool:
        record = self.tables.pack_of(txn, ordinal)
        return record is not None and record.pack.id == self.packs[ordinal].id

    def _has_all(self, txn: Transaction) -> bool:
        return all(self._has(txn, ordinal) for ordinal in self.packs)

    def _begin(self, txn: Transaction, part: Sequence[int]) -> None:
        """Note some packs as leaving; what other processes know of the index is out of date from now on."""
        self._note(txn, [ordinal for ordinal in part if self._has(txn, ordinal)])
        self._count(txn)

    def _note(self, txn: Transaction, ordinals: Sequence[int]) -> None:
        self.tables.put_set(txn, LEAVING, self.tables.get_set(txn, LEAVING) | set(ordinals))
        for ordinal in ordinals:
            # A process that adds the rest of a pack stops.
            txn.delete(PARTIAL + self.packs[ordinal].id, db=self.tables.meta)

    def _remove_locations(self, db: Database) -> None:
        after: bytes | None = None
        while True:
            remove = functools.partial(self._remove_part, db=db, after=after, most=_ROWS_AT_ONCE)
            after = self.env.write(remove)
            if after is None:
                return

    def _remove_part(
        self, txn: Transaction, db: Database, after: bytes | None, most: int
    ) -> bytes | None:
        """Remove the locations in the packs among the next rows; return the last key, None at the end."""
        gone = {LOCATION_PACK.pack(ordinal) for ordinal in self.packs}
        untrusted = self.tables.untrusted(txn)
        while most > 0:
            rows = self.tables.rows(txn, after, min(most, _READ_AT_ONCE), db)
            if not rows:
                return None
            for key, value in rows:
                if value[: LOCATION_PACK.size] not in gone:
                    continue
                if db is self.tables.blobs:
                    self.tables.replace_by_copy(txn, key, value, untrusted)
                else:
                    txn.delete(key, db=db)
            after = rows[-1][0]
            most -= len(rows)
        return after

    def _end(self, txn: Transaction, part: Sequence[int]) -> bool:
        """Remove some packs in which no blob is located any more; return whether all were there."""
        tables = self.tables
        there = [ordinal for ordinal in part if self._has(txn, ordinal)]
        for ordinal in there:
            pack, number = self.packs[ordinal].id, ORDINAL.pack(ordinal)
            txn.delete(number, db=tables.packs)
            for key in (b"pack" + pack, PARTIAL + pack, UNPUBLISHED + number, UNPLACED + number):
                txn.delete(key, db=tables.meta)
            tables.set_claimed(txn, ordinal, False)
            if self.needs_delta:
                txn.put(REMOVED + pack, b"", db=tables.meta)
        for name in (MARKED, UNVERIFIED, LEAVING):
            before = tables.get_set(txn, name)
            if not before.isdisjoint(there):
                tables.put_set(txn, name, before.difference(there))
        self._count(txn)
        return len(there) == len(part)

    def _count(self, txn: Transaction) -> None:
        self.tables.count_removal(txn)
        if self.is_lost:
            self.tables.count_loss(txn)
