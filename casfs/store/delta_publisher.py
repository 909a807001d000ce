"""Publish index deltas: what this process, and an interrupted one of this machine, stored and removed.

A delta is published after its packs are durable and indexed, and before the snapshot that needs them. The
entries of the packs that this process stores are kept in memory up to a size; a long session publishes
several deltas. Threads may share the publisher.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from casfs.errors import CasfsError, NotFoundError
from casfs.format.delta import DeltaBuilder, DeltaName, DeltaPack
from casfs.format.key_derivation import WriteSession
from casfs.format.pack import PackEntry, PackRef
from casfs.index.delta_notes import DeltaNote, DeltaNotes
from casfs.index.schema import IndexedPack, PackRecord
from casfs.store.blob_store import BlobStore

log = logging.getLogger(__name__)

FUTURE_MS = 86_400_000
"""A delta whose time is later than now by more has no honest name."""

SESSION_DELTA_BYTES = 8 * 1024 * 1024
"""A session publishes a delta when its entries reach this size, so that they take little memory."""

TARGET_DELTA_BYTES = 16 * 1024 * 1024
"""The size up to which deltas are filled that a merge writes, or that name packs which are read again.

A process has a few of them in memory.
"""


class DeltaPublisher:
    """Publishes deltas for one open store; `session` returns the write session of an encrypted repository.

    `now_ms` is the storage's clock in milliseconds since 1970. `is_alone` returns whether no other process of
    this machine writes: the packs that only the index knows then belong to a process that died.
    `has_left_out` is set once `read_packs` left out a pack of which the index does not have every entry.
    """

    def __init__(
        self,
        store: BlobStore,
        session: Callable[[], WriteSession] | None,
        now_ms: Callable[[], int],
        is_alone: Callable[[], bool] = lambda: True,
        session_bytes: int = SESSION_DELTA_BYTES,
    ) -> None:
        self._store = store
        self._session = session
        self.now_ms = now_ms
        self._is_alone = is_alone
        self._session_bytes = session_bytes
        self._lock = threading.Lock()
        self._builder = DeltaBuilder()
        self._last_ms = 0
        self.has_left_out = False

    def add(self, packs: Iterable[IndexedPack]) -> None:
        """Take packs that are durable and indexed; publish a delta when many entries wait."""
        with self._lock:
            for pack, pack_bytes, entries in packs:
                self._builder.add(DeltaPack(pack, pack_bytes, entries))
            if self._builder.size_bytes >= self._session_bytes:
                self._write_own()

    def has_news(self) -> bool:
        """Return whether anything was stored or removed that no delta names yet."""
        notes = DeltaNotes(self._store.index)
        return bool(self._builder.packs or notes.unpublished() or notes.removed())

    def publish(self, everything: bool = False) -> list[DeltaName]:
        """Publish what no delta names yet; return the names of the new deltas.

        With `everything` the index is known to contain every pack of the storage: all packs that no delta
        names are published, and the last delta is complete. Raise StorageError.
        """
        notes = DeltaNotes(self._store.index)
        with self._lock:
            written = []
            self._builder.removed += notes.removed()
            own = set(self._builder.packs)
            if everything:
                covered = notes.covered()
                records = [r for r in self._store.index.packs() if r.ordinal not in covered]
            else:
                records = notes.unpublished() if self._is_alone() else []
            rest = self._with_known_entries(one for one in records if one.pack.id not in own)
            for pack in self.read_packs(rest):
                if not self._builder.has_room(len(pack.entries), TARGET_DELTA_BYTES):
                    written.append(self._write_own())
                self._builder.add(pack)
            self._builder.is_complete = everything and not self.has_left_out
            if self._builder.packs or self._builder.removed or everything:
                written.append(self._write_own())
            return written

    def _with_known_entries(self, records: Iterable[PackRecord]) -> list[PackRecord]:
        """Return the packs whose entries can be read, here or in the index; the others are left out.

        A process without an identity cannot read what an earlier process stored, and the index has no places.
        A process with an identity publishes them later.
        """
        found = list(records)
        if not self._store.index.omits_places or not found:
            return found
        unplaced = {record.ordinal for record in self._store.index.unplaced_packs()}
        known = [record for record in found if record.ordinal not in unplaced]
        self.has_left_out |= len(known) < len(found)
        return known

    def write(self, builder: DeltaBuilder) -> DeltaName:
        """Store a delta durably and note it; its name is later than that of every delta in the index."""
        now_ms = self.now_ms()
        notes = DeltaNotes(self._store.index)
        known_ms = [name.time_ms for name in notes.all() if name.time_ms < now_ms + FUTURE_MS]
        self._last_ms = max(now_ms, self._last_ms + 1, *(time_ms + 1 for time_ms in known_ms))
        session = self._session() if self._session is not None else None
        name, data = builder.encode(self._last_ms, session)
        self._store.storage.create(str(name), data)
        ordinals = list(notes.find(builder.packs))
        note = DeltaNote(len(builder.packs), builder.is_complete)
        replaced = {one: (DeltaNote(replaced_ms=name.time_ms), ()) for one in builder.replaced}
        notes.finish({name: (note, ordinals), **replaced}, removed=builder.removed)
        return name

    def _write_own(self) -> DeltaName:
        builder, self._builder = self._builder, DeltaBuilder()
        try:
            return self.write(builder)
        except BaseException:
            # What it names stays noted as unpublished.
            log.debug("an index delta was not published")
            raise

    def read_packs(self, records: list[PackRecord]) -> Iterator[DeltaPack]:
        """Yield packs with their entries, read from their directories, else from the index."""
        closed = []
        wanted = {record.pack: record.pack_bytes for record in records}
        for pack, pack_bytes, entries in self._store.directories(wanted.items()):
            if isinstance(entries, NotFoundError):
                continue
            if isinstance(entries, CasfsError):
                closed.append(pack)
                continue
            yield DeltaPack(pack, pack_bytes, entries)
        if closed:
            yield from self._from_index(closed, records)

    def _from_index(self, packs: list[PackRef], records: list[PackRecord]) -> Iterator[DeltaPack]:
        """Yield packs whose directories cannot be read, with the entries that the index has.

        A pack of which the index lacks entries, or has damaged ones, is left out: a delta names whole packs.
        """
        by_ordinal = {record.ordinal: record for record in records if record.pack in set(packs)}
        found: dict[int, list[PackEntry]] = {ordinal: [] for ordinal in by_ordinal}
        index = self._store.index
        for digest, at in itertools.chain(index.blobs(), index.further_locations()):
            if at.pack in found and at.has_place and not at.is_damaged:
                found[at.pack].append(at.in_pack(digest))
        for ordinal, entries in found.items():
            record = by_ordinal[ordinal]
            entries.sort(key=PackEntry.place)
            if len(entries) == record.blobs:
                yield DeltaPack(record.pack, record.pack_bytes, entries)
            else:
                self.has_left_out = True
