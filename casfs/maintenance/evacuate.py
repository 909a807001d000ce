"""Evacuate needed blobs: copy them out of packs that go, and rewrite damaged ones from intact duplicates.

Two concurrent backups may store a blob twice, and the index names one of the copies. If that copy is damaged,
the pack with the only intact copy looks unneeded to prune.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from casfs.digest import Digest, short_id
from casfs.errors import BlobError, CasfsError, NotFoundError
from casfs.format.codec import BlobKind
from casfs.format.pack import PackEntry
from casfs.index.schema import Location, PackRecord
from casfs.monitor import Monitor, Unit
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.repository import Repository

log = logging.getLogger(__name__)


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
        damaged = {}
        unreadable = set()
        for ordinal in sorted(ordinals):
            record = records[ordinal]
            try:
                entries = self._store.entries(record.pack)
            except NotFoundError:
                continue
            except CasfsError as error:
                log.warning(
                    "pack %s, which seems unneeded, cannot be read: %s",
                    short_id(record.pack.id),
                    error,
                )
                unreadable.add(ordinal)
                continue
            for entry in entries:
                location = self._store.index.lookup(entry.digest)
                if (
                    location is None
                    or location.pack == ordinal
                    or location.pack not in records
                    or location.ordinal not in self._needed.blobs
                ):
                    continue
                try:
                    self._store.read_at(entry.digest, location)
                except BlobError:
                    damaged[entry.digest] = location
        if damaged:
            self.rewrite_damaged(damaged)
        return unreadable if unreadable and self._is_any_needed_blob_lost() else set()

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
    writer = repository.writer()
    try:
        for record in records:
            entries = store.entries(record.pack)
            counted = -1
            for entry in sorted(entries, key=PackEntry.place):
                location = store.index.lookup(entry.digest)
                if (
                    location is None
                    or location.pack != record.ordinal
                    or location.ordinal not in needed.blobs
                ):
                    continue
                try:
                    plain = store.read(entry.digest)
                except BlobError as error:
                    log.warning("%s; the pack is kept", error)
                    store.index.mark_blobs(record.ordinal, [entry.digest])
                    continue
                writer.put(BlobKind(location.kind), entry.digest, plain)
                if entry.offset != counted:  # the blobs of a group are read at once
                    progress.read_bytes(entry.stored_bytes)
                    counted = entry.offset
            copied.packs += 1
            copied.pack_bytes += record.pack_bytes
            progress.items += 1
            progress.finish_file(record.pack_bytes)
        copied.new_bytes = writer.finish().new_stored_bytes
    finally:
        writer.close()
    return copied
