"""Evacuate needed blobs: copy them out of packs that go, and rewrite damaged ones from intact duplicates.

Two concurrent backups may store a blob twice, and the index names one of the copies. If that copy is damaged,
the pack with the only intact copy looks unneeded to prune.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from casfs.digest import Digest, short_id
from casfs.errors import BlobError, CasfsError, NotFoundError
from casfs.format.codec import BlobKind
from casfs.format.pack import PackEntry
from casfs.index.schema import Location, PackRecord
from casfs.monitor import Monitor, Unit
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.repository import Repository
from casfs.storage.concurrency import in_order
from casfs.store.batch_read import read_in_place
from casfs.store.blob_store import BlobStore

log = logging.getLogger(__name__)

_DIRECTORIES_AHEAD = 8
"""How many directories of remote packs are in memory at a time, each of a few MiB at most."""

_ASKED_AT_ONCE = 4096
"""The most blobs that are looked up in one transaction."""


class Evacuator:
    """Rewrite damaged blobs of a repository open for writing; snapshots need the blobs in `needed`."""

    def __init__(self, repository: Repository, needed: NeededBlobs) -> None:
        self._repository = repository
        self._store = repository.store
        self._needed = needed

    def save_last_copies(self, records: Mapping[int, PackRecord], ordinals: Set[int]) -> set[int]:
        """Rewrite needed blobs whose last intact copy is in a pack to remove; return the packs to keep.

        `ordinals` are the packs to remove, `records` the packs that existed before this prune wrote any;
        packs written since are not read again. A pack is kept if it cannot be read and may hold the last
        copy of a needed blob.
        """
        leaving = [records[ordinal] for ordinal in sorted(ordinals)]
        unreadable: set[int] = set()
        damaged = {}
        with closing(
            read_in_place(self._store, self._other_copies(records, leaving, unreadable))
        ) as runs:
            for run, plains in runs:
                for digest, location in run.blobs:
                    if digest in plains:
                        continue
                    try:
                        self._store.read_at(digest, location)
                    except BlobError:
                        damaged[digest] = location
        if damaged:
            self.rewrite_damaged(damaged)
        return unreadable if unreadable and self._is_any_needed_blob_lost() else set()

    def _other_copies(
        self,
        records: Mapping[int, PackRecord],
        leaving: Sequence[PackRecord],
        unreadable: set[int],
    ) -> Iterator[tuple[Digest, Location]]:
        """Yield the places in other packs of the needed blobs that packs to remove hold, pack by pack.

        Add the packs that cannot be read to `unreadable`.
        """

        def read(record: PackRecord) -> list[PackEntry] | CasfsError:
            try:
                return self._store.entries(record.pack)
            except CasfsError as error:
                return error

        with closing(
            in_order(self._store.storage, read, leaving, _DIRECTORIES_AHEAD)
        ) as directories:
            for record, entries in zip(leaving, directories, strict=True):
                if isinstance(entries, NotFoundError):
                    continue
                if isinstance(entries, CasfsError):
                    log.warning(
                        "pack %s, which seems unneeded, cannot be read: %s",
                        short_id(record.pack.id),
                        entries,
                    )
                    unreadable.add(record.ordinal)
                    continue
                elsewhere = {
                    digest: at
                    for digest, at in _located(self._store, entries)
                    if at.pack != record.ordinal
                    and at.pack in records
                    and at.ordinal in self._needed.blobs
                }
                yield from sorted(elsewhere.items(), key=lambda copy: copy[1][:2])

    def _is_any_needed_blob_lost(self) -> bool:
        """Return whether a needed blob has no readable copy. Reads every needed blob."""
        for digest, location in self._store.index.blobs():
            if location.ordinal in self._needed.blobs:
                try:
                    self._store.read(digest)
                except CasfsError as error:
                    log.warning("%s; unreadable packs are kept, they may hold it", error)
                    return True
        return False

    def rewrite_damaged(self, damaged: Mapping[Digest, Location]) -> bool:
        """Rewrite damaged blobs from intact duplicates; return whether any blob was rewritten.

        The duplicate may be in a pack that no snapshot needs.
        """
        found = False
        writer = self._repository.writer()
        try:
            for digest, location in damaged.items():
                try:
                    plain = self._store.read(digest)
                except CasfsError:
                    continue
                if not location.is_damaged:
                    self._store.index.mark_blobs(location.pack, [digest])
                writer.put(BlobKind(location.kind), digest, plain)
                found = True
            writer.finish()
        finally:
            writer.close()
        self._store.found_elsewhere.clear()
        return found


@dataclass(slots=True)
class CopiedBlobs:
    """Counts of packs whose needed blobs were copied, and the bytes of the new copies."""

    packs: int = 0
    pack_bytes: int = 0
    new_bytes: int = 0


def copy_needed_blobs(
    repository: Repository,
    needed: NeededBlobs,
    records: Sequence[PackRecord],
    monitor: Monitor,
    stage: str = "repacking",
) -> CopiedBlobs:
    """Copy the needed blobs of packs, which are marked for removal in the index, into new packs.

    A damaged blob is marked as such and not copied, so its pack stays needed.
    """
    store = repository.store
    progress = monitor.progress
    total_bytes = sum(record.pack_bytes for record in records)
    progress.begin(stage, Unit.PACKS, total_items=len(records), total_bytes=total_bytes)
    copied = CopiedBlobs()
    waiting = deque(records)

    def finish_packs_before(ordinal: int | None) -> None:
        while waiting and waiting[0].ordinal != ordinal:
            record = waiting.popleft()
            copied.packs += 1
            copied.pack_bytes += record.pack_bytes
            progress.items += 1
            progress.finish_file(record.pack_bytes)

    writer = repository.writer()
    try:
        with closing(read_in_place(store, _needed_blobs(store, needed, records))) as runs:
            for run, plains in runs:
                finish_packs_before(run.pack)
                counted = -1
                for digest, location in run.blobs:
                    try:
                        plain = plains[digest] if digest in plains else store.read(digest)
                    except BlobError as error:
                        log.warning("%s; the pack is kept", error)
                        store.index.mark_blobs(run.pack, [digest])
                        continue
                    writer.put(BlobKind(location.kind), digest, plain)
                    if location.offset != counted:  # the blobs of a group are read at once
                        progress.read_bytes(location.stored_bytes)
                        counted = location.offset
        finish_packs_before(None)
        copied.new_bytes = writer.finish().new_stored_bytes
    finally:
        writer.close()
    return copied


def _needed_blobs(
    store: BlobStore, needed: NeededBlobs, records: Sequence[PackRecord]
) -> Iterator[tuple[Digest, Location]]:
    """Yield the needed blobs that the index has in these packs, by their places."""
    read = in_order(
        store.storage, lambda record: store.entries(record.pack), records, _DIRECTORIES_AHEAD
    )
    with closing(read) as directories:
        for record, entries in zip(records, directories, strict=True):
            yield from {
                digest: at
                for digest, at in _located(store, entries)
                if at.pack == record.ordinal and at.ordinal in needed.blobs
            }.items()


def _located(store: BlobStore, entries: Iterable[PackEntry]) -> Iterator[tuple[Digest, Location]]:
    """Yield the blobs of a pack that the index has, here or elsewhere, by their places in the pack."""
    in_place = iter(sorted(entries, key=PackEntry.place))
    while digests := [entry.digest for entry in islice(in_place, _ASKED_AT_ONCE)]:
        for digest, at in zip(digests, store.index.lookup_many(digests), strict=True):
            if at is not None:
                yield digest, at
