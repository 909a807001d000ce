"""Bring the index up to date with the index deltas in the storage.

A host reads the deltas that its index has not seen, from the newest to the oldest: the newest delta that
names a pack decides whether the pack exists, and where two disagree, the storage does. No delta is believed:
readers recompute every digest, `verify_packs` looks at the packs in the storage before a writer counts a blob
in them as stored, and `casfs.store.claims` reads a blob before a writer relies on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from casfs.digest import PackId
from casfs.errors import (
    CasfsError,
    DeltaError,
    KeyMissingError,
    NotFoundError,
)
from casfs.format.delta import (
    Delta,
    DeltaName,
    DeltaPack,
)
from casfs.format.key_derivation import Sessions
from casfs.format.pack import PackRef
from casfs.index.delta_notes import DeltaNote, DeltaNotes, Doubt
from casfs.index.index import Index
from casfs.index.schema import Row
from casfs.storage.base import Storage
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.delta_reader import DeltaReader, list_deltas

log = logging.getLogger(__name__)

_MOST_REQUESTS = 16
_ROWS_IN_MEMORY = 100_000
_PACKS_AT_ONCE = 512
_ENTRIES_AT_ONCE = 16_384
_MOST_LOOKS = 100
"""Up to so many packs are looked at one by one; for more, a listing of all packs takes fewer requests."""

_MOST_LISTINGS = 2
_MOST_TRIES = 3


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The result of a sync; `listed` are the deltas of its listing, with their sizes.

    `is_complete` means that the deltas name every pack, but for those of sessions that are running or were
    interrupted. `removed` are the packs that it removed from the index. `unusable` deltas are damaged; their
    packs are found by a listing only.
    """

    is_complete: bool = False
    applied: int = 0
    removed: frozenset[PackRef] = frozenset()
    unusable: int = 0
    listed: dict[DeltaName, int] = field(default_factory=dict)


class DeltaSync:
    """Applies deltas to the index of a store. In an encrypted repository `sessions` provides the keys.

    Without `can_read` no delta can be decrypted: none is read, and each counts as one that may have removed
    any pack. One thread uses it.
    """

    def __init__(
        self, store: BlobStore, sessions: Sessions | None = None, can_read: bool = True
    ) -> None:
        self._store = store
        self._storage: Storage = store.storage
        self._can_read = can_read
        self.reader = DeltaReader(store.storage, sessions)

    @property
    def _index(self) -> Index:
        return self._store.index

    @property
    def _notes(self) -> DeltaNotes:
        return DeltaNotes(self._store.index)

    def is_current(self) -> bool:
        """Return whether the index has seen every delta, and these name every pack. One listing."""
        if not self._index.is_current():
            return False
        listed, notes = list_deltas(self._storage), self._notes.all()
        return self._is_complete(listed, notes) and not _unseen(listed, notes, self._can_read)

    def sync(
        self,
        learn: bool = True,
        list_ahead: Callable[[], dict[DeltaName, int]] | None = None,
    ) -> SyncResult:
        """Apply the deltas that the index has not seen; the index can be written.

        Without `learn`, only note which packs of the index they name: the index is kept in agreement with the
        packs in another way. `list_ahead` returns a listing that the caller has begun.
        """
        result = SyncResult()
        for _ in range(_MOST_TRIES):
            listed = list_ahead() if list_ahead is not None else list_deltas(self._storage)
            list_ahead = None
            run = _Run(self._store, self.reader, listed, learn=learn, can_read=self._can_read)
            vanished = run.apply()
            result = SyncResult(
                self._is_complete(listed, self._notes.all()),
                result.applied + run.applied,
                result.removed | run.removed,
                result.unusable + run.unusable,
                listed,
            )
            if not vanished:
                break
            # A merge replaced it; the delta that the merge wrote is in the next listing.
        return result

    def verify_packs(self, ignored: Set[int] = frozenset()) -> frozenset[PackRef]:
        """Look at the packs that only deltas name, except `ignored` ones (ordinals).

        Return those that the storage lacks. They, and those of another size, are removed from the index.
        Raise StorageError.
        """
        records = [one for one in self._notes.unverified() if one.ordinal not in ignored]
        if not records:
            return frozenset()
        sizes = self._sizes({record.pack for record in records})
        good = {one.ordinal for one in records if sizes.get(one.pack) == one.pack_bytes}
        bad = {one.ordinal: one.pack for one in records if one.ordinal not in good}
        self._notes.mark_verified(good)
        if bad:
            log.warning(
                "%d packs that index deltas name are missing or differ in size; their blobs do not count as "
                "stored",
                len(bad),
            )
            self._index.remove_packs(bad, lost=True)
            self._store.add_packs([(pack, sizes[pack]) for pack in bad.values() if pack in sizes])
        return frozenset(pack for pack in bad.values() if pack not in sizes)

    def _sizes(self, wanted: set[PackRef]) -> dict[PackRef, int]:
        """Return the size in the storage of each of the packs that exist.

        Many packs are listed. One that a first listing lacks may have been stored after its place in it, so
        it is looked at, or many are listed again: a forged delta that names many packs costs no request each.
        """
        found: dict[PackRef, int] = {}
        for _ in range(_MOST_LISTINGS):
            if len(wanted) - len(found) > _MOST_LOOKS:
                found |= {pack: size for pack, size in self._store.stored_packs() if pack in wanted}
        unlisted = wanted - found.keys()
        if len(unlisted) > _MOST_LOOKS:
            return found
        requests = max(1, min(self._storage.capabilities.parallel_requests, _MOST_REQUESTS))
        with ThreadPoolExecutor(requests, "casfs-packs") as pool:
            for pack, looked in zip(unlisted, pool.map(self._size, unlisted), strict=True):
                if looked is not None:
                    found[pack] = looked
        return found

    def _size(self, pack: PackRef) -> int | None:
        try:
            return self._storage.size(pack_name(pack))
        except NotFoundError:
            return None

    def _is_complete(self, listed: dict[DeltaName, int], notes: dict[DeltaName, DeltaNote]) -> bool:
        if not self._can_read and listed:
            # What other hosts stored is of no use to a host that cannot read it.
            return True
        return any(note.is_complete for name, note in notes.items() if name in listed)


@dataclass(slots=True)
class _Pending:
    """Rows that are in memory and not in the index yet, and the notes of the deltas that they complete."""

    rows: list[Row] = field(default_factory=list)
    packs: dict[int, PackId] = field(default_factory=dict)
    notes: dict[DeltaName, tuple[DeltaNote, Sequence[int]]] = field(default_factory=dict)


class _Run:
    """One pass over the deltas of one listing."""

    def __init__(
        self,
        store: BlobStore,
        reader: DeltaReader,
        listed: dict[DeltaName, int],
        *,
        learn: bool,
        can_read: bool,
    ) -> None:
        self.applied = 0
        self.unusable = 0
        self.removed: frozenset[PackRef] = frozenset()
        self._storage = store.storage
        self._index = store.index
        self._notes = DeltaNotes(store.index)
        self._reader = reader
        self._listed = listed
        self._learn = learn
        self._can_read = can_read
        self._noted = self._notes.all()
        self._replaced: dict[DeltaName, int] = {}
        self._pending = _Pending()
        self._late_notes: dict[DeltaName, tuple[DeltaNote, Sequence[int]]] = {}
        # A pack that a newer delta removed is skipped. One that a newer delta names may be stored again.
        self._gone: set[PackId] = set()
        self._named_again: set[PackId] = set()
        self._first_new: int | None = None
        self._to_remove: dict[int, tuple[PackRef, DeltaName]] = {}
        self._disputed: dict[int, tuple[PackRef, DeltaName]] = {}
        self._hides_removals = False
        self._merge_hides_removals = False

    def apply(self) -> bool:
        """Apply the new deltas; return whether one of them vanished meanwhile."""
        vanished = False
        unseen = _unseen(self._listed, self._noted, self._can_read)
        dropped = [name for name in self._noted if name not in self._listed]
        if not unseen and not dropped:
            return False
        if not self._can_read:
            self._note_closed(unseen)
        else:
            wanted = (name for name in unseen if name not in self._replaced)
            for name, found in self._reader.read_all(wanted, self._listed):
                if name in self._replaced:
                    continue  # it was read ahead
                if isinstance(found, NotFoundError):
                    vanished = True
                elif isinstance(found, KeyMissingError):
                    if name not in self._noted:
                        self._note_closed([name])
                elif isinstance(found, CasfsError):
                    self._note_unusable(name, found)
                else:
                    try:
                        self._apply_one(found)
                    except DeltaError as error:
                        self._note_unusable(name, error)
        for name, time_ms in self._replaced.items():
            self._late_notes[name] = DeltaNote(replaced_ms=time_ms), []
        self._flush()
        if self._learn:
            self._remove_packs()
        self._notes.finish(
            self._late_notes,
            gone=dropped,
            doubt=self._doubt(),
            hides_removals=self._merge_hides_removals,
        )
        return vanished

    def _doubt(self) -> Doubt:
        if not self._learn:
            return Doubt.NONE
        if self._hides_removals:
            return Doubt.ALL
        return Doubt.UNCOVERED_OR_OWN if self._merge_hides_removals else Doubt.UNCOVERED

    def _apply_one(self, delta: Delta) -> None:
        ordinals: list[int] = []
        count = 0
        packs = delta.packs()
        while batch := _take(packs):
            count += len(batch)
            ordinals += self._register(batch) if self._learn else self._known(batch)
        if self._learn:
            self._note_removed(delta)
        # What this host has not seen may have removed packs, and may be gone.
        self._merge_hides_removals |= any(name not in self._noted for name in delta.replaced)
        for name in delta.replaced:
            if name in self._listed and name < delta.name:
                self._replaced[name] = delta.name.time_ms
        # What a removal or a replacement entails comes before the note: the delta is not read again.
        is_plain = not (delta.removed or delta.replaced)
        notes = self._pending.notes if is_plain else self._late_notes
        notes[delta.name] = DeltaNote(count, delta.is_complete), ordinals
        self.applied += 1

    def _known(self, batch: list[DeltaPack]) -> list[int]:
        found = self._notes.find(pack.pack.id for pack in batch)
        return list(found)

    def _register(self, batch: list[DeltaPack]) -> list[int]:
        ordinals = []
        for pack, registered in zip(batch, self._notes.register(batch, self._gone), strict=True):
            if registered is None:
                continue
            ordinal = registered.ordinal
            ordinals.append(ordinal)
            if not registered.was_known:
                self._first_new = ordinal if self._first_new is None else self._first_new
            else:
                self._named_again.add(pack.pack.id)
            if registered.needs_rows:
                self._pending.packs[ordinal] = pack.pack.id
                self._pending.rows += [(e.digest, ordinal, *e[1:], 0) for e in pack.entries]
        if len(self._pending.rows) >= _ROWS_IN_MEMORY:
            self._flush()
        return ordinals

    def _note_removed(self, delta: Delta) -> None:
        removed = set(delta.removed)
        for ordinal, pack in self._notes.find(removed).items():
            is_new = self._first_new is not None and ordinal >= self._first_new
            if is_new or pack.id in self._named_again:
                self._disputed.setdefault(ordinal, (pack, delta.name))
                removed.discard(pack.id)
            else:
                self._to_remove.setdefault(ordinal, (pack, delta.name))
        self._gone |= removed

    def _note_closed(self, names: list[DeltaName]) -> None:
        for name in names:
            self._late_notes[name] = DeltaNote(is_closed=True), []
        self._hides_removals = self._hides_removals or bool(names)

    def _note_unusable(self, name: DeltaName, error: CasfsError) -> None:
        log.warning(
            "%s; the packs that it names are found by a listing (casfs repair index)", error
        )
        self.unusable += 1
        self._hides_removals = True
        self._late_notes[name] = DeltaNote(is_unusable=True), []

    def _flush(self) -> None:
        """Add the rows in memory to the index, then note what they complete."""
        pending, self._pending = self._pending, _Pending()
        pending.rows.sort()
        self._notes.put_rows(pending.rows, pending.packs)
        if pending.packs or pending.notes:
            self._notes.finish(pending.notes, pending.packs.values())

    def _remove_packs(self) -> None:
        """Remove the packs that deltas name as removed, unless they were stored again afterwards."""
        found = self._to_remove
        if found:
            oldest = min(name for _, name in found.values())
            later = self._notes.named_later(found.keys(), oldest)
            self._disputed |= {ordinal: found[ordinal] for ordinal in later}
        going = {ordinal: pack for ordinal, (pack, _) in found.items()}
        for ordinal, (pack, name) in self._disputed.items():
            if self._is_stored_after(pack, name):
                going.pop(ordinal, None)
            else:
                going[ordinal] = pack
        # What no notice named before was not pruned but lost, or this host has not seen the notice: whether
        # its parent snapshots need the pack is unknown.
        is_lost = not going.keys() <= self._index.marked_for_removal()
        if going and not self._index.remove_packs(going, lost=is_lost, is_published=True):
            # Another process of this machine has applied the same delta.
            again = self._notes.find(pack.id for pack in going.values())
            going = {n: pack for n, pack in again.items() if n in going}
            if going:
                self._index.remove_packs(going, lost=is_lost, is_published=True)
        self.removed = frozenset(going.values())

    def _is_stored_after(self, pack: PackRef, name: DeltaName) -> bool:
        """Return whether a pack was stored after the delta that names it as removed, by the storage's times.

        A removal is published before the pack is deleted, so a pack that still exists is no proof.
        """
        try:
            return self._storage.mtime_ns(pack_name(pack)) > self._storage.mtime_ns(str(name))
        except NotFoundError:
            return False


def _take(packs: Iterator[DeltaPack]) -> list[DeltaPack]:
    """Return the next packs of a delta, few enough for one transaction."""
    batch: list[DeltaPack] = []
    entries = 0
    for pack in islice(packs, _PACKS_AT_ONCE):
        batch.append(pack)
        entries += len(pack.entries)
        if entries >= _ENTRIES_AT_ONCE:
            break
    return batch


def _unseen(
    listed: dict[DeltaName, int], notes: dict[DeltaName, DeltaNote], can_read: bool
) -> list[DeltaName]:
    """Return the deltas to apply, the newest first."""
    return [
        name
        for name in sorted(listed, reverse=True)
        if (note := notes.get(name)) is None or (note.is_closed and can_read)
    ]
