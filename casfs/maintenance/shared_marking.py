"""Mark what the snapshots and drafts of a repository need, while hosts publish and prune over a network.

The marks grow with every round of `mark`: snapshots that appeared since the last round are added, and nothing
is taken away unless another prune removed packs, which begins the marking again. One thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import BlobError, IntegrityError, KeyMissingError, NotFoundError
from casfs.format.pack import PackRef
from casfs.format.snapshot import Snapshot
from casfs.index.schema import PackRecord
from casfs.maintenance.drafts import DraftClosedError, DraftUnreadableError, list_drafts
from casfs.maintenance.evacuate import Evacuator
from casfs.maintenance.prune_result import NeededBlobsUnknownError, SnapshotClosedError
from casfs.monitor import Monitor
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.repository import Repository
from casfs.repository.snapshot_listing import DRAFTS, SNAPSHOTS
from casfs.storage.concurrency import begin
from casfs.store.pending_removal import ListedNotice, list_notices

log = logging.getLogger(__name__)


class SharedMarking:
    """The marks of one prune.

    `notices` are those that the prune has read, `repacked` the packs (ordinals) that it has begun to repack:
    both stay marked for removal in the index. `records` are the packs, by their ordinals, `drafts` those
    without their snapshots with the times of their objects, `published` the snapshots.
    """

    def __init__(self, repository: Repository, monitor: Monitor) -> None:
        self.needed = NeededBlobs(repository)
        self.evacuator = Evacuator(repository, self.needed)
        self.notices: dict[str, ListedNotice] = {}
        self.repacked: set[int] = set()
        self.records: dict[int, PackRecord] = {}
        self.under_notice: set[int] = set()
        self.drafts: dict[SnapshotId, int] = {}
        self.published: set[SnapshotId] = set()
        self.snapshots = 0
        self.unproven = 0
        self._repository = repository
        self._snapshots = repository.snapshots
        self._store = repository.store
        self._index = repository.store.index
        self._monitor = monitor
        self._marked: set[SnapshotId] = set()
        self._marked_in: tuple[int, int] | None = None

    def mark(self) -> None:
        """Mark what the snapshots and drafts need that are not marked yet.

        The index is synced after they were listed, so that it has their packs. Both lists are read at least
        twice, and until they have no new entry, because a replaced snapshot may vanish while they are read.
        A draft is deleted after its snapshot appears. So one that existed before the first reading began is
        in a list of drafts, or its snapshot is in the next list of snapshots, although over a distance both
        lists are read at the same time. Raise NeededBlobsUnknownError.
        """
        is_first = True
        while True:
            list_published = begin(self._store.storage, self._snapshots.ids)
            drafts = list_drafts(self._store.storage)
            self.published = set(list_published())
            self.drafts = {d: t for d, t in drafts.items() if d not in self.published}
            new = (self.drafts.keys() | self.published) - self._marked
            if not new and not is_first:
                break
            self._sync_index()
            if self._has_lost_entries():
                self._begin_again()
                new = self.drafts.keys() | self.published
            for found in self._snapshots.load_each(sorted(new & self.published)):
                self._mark_snapshot(*found)
            for found in self._snapshots.load_each(sorted(new - self.published), DRAFTS):
                self._mark_draft(*found)
            self._marked |= new
            is_first = False

    def _sync_index(self) -> None:
        """Bring the index into agreement with the packs, and mark in it the packs under notice."""
        self._store.reconcile(self._repository.is_alone, list_pending=self._packs_under_notice)
        self.records = {record.ordinal: record for record in self._index.packs()}
        pending = {pack for listed in self.notices.values() for pack in listed.notice.pack_refs()}
        self.under_notice = {n for n, record in self.records.items() if record.pack in pending}
        # Marks are only added: a writer of this machine may have seen a notice that this prune has not.
        marks = self.under_notice | self.repacked
        self._index.change_marked(marks - self._index.marked_for_removal(), frozenset())

    def _packs_under_notice(self) -> set[PackRef]:
        """Return the packs that notices name now, of which this prune need not have read all."""
        found = list_notices(self._store.storage, self.notices)
        return {pack for listed in found.values() for pack in listed.notice.pack_refs()}

    def _has_lost_entries(self) -> bool:
        """Return whether blobs may have other ordinals than when the marking began."""
        state = (self._index.loss_epoch(), self._index.removals())
        before, self._marked_in = self._marked_in, state
        return before is not None and before != state

    def _begin_again(self) -> None:
        """Forget all marks, after another prune removed packs from which blobs were located."""
        self.needed = NeededBlobs(self._repository)
        self.evacuator = Evacuator(self._repository, self.needed)
        self._marked = set()
        self.snapshots = self.unproven = 0

    def _mark_snapshot(self, snapshot_id: SnapshotId, load: Callable[[], Snapshot]) -> None:
        try:
            self.needed.add(load().root, self._count_entry)
        except NotFoundError:
            return
        except KeyMissingError as error:
            raise SnapshotClosedError(snapshot_id, error) from error
        except IntegrityError as error:
            if not self._exists(snapshot_id):
                return  # forgotten, and another prune removed what it needed
            raise NeededBlobsUnknownError(snapshot_id, error) from error
        self.snapshots += 1
        if not self._snapshots.provenance.is_from_trusted_writer(snapshot_id):
            self.unproven += 1

    def _mark_draft(self, snapshot_id: SnapshotId, load: Callable[[], Snapshot]) -> None:
        """Mark what a draft needs.

        A draft with a missing blob protects nothing: its writer has not had a successful last look yet, and
        will see every notice that this prune sees.
        """
        try:
            self.needed.add(load().root, self._count_entry)
        except NotFoundError:
            return
        except BlobError as error:
            if self._index.lookup(Digest(error.digest)) is not None or not self._has_all_packs():
                raise DraftUnreadableError(snapshot_id, error) from error
            log.info("draft %s is not complete: %s", short_id(snapshot_id), error)
        except KeyMissingError as error:
            raise DraftClosedError(snapshot_id, error) from error
        except IntegrityError as error:
            raise DraftUnreadableError(snapshot_id, error) from error

    def _has_all_packs(self) -> bool:
        """Return whether the index has every pack: it lacks those that this machine cannot read."""
        indexed = {record.pack for record in self._index.packs()}
        return all(pack in indexed for pack, _ in self._store.stored_packs())

    def _exists(self, snapshot_id: SnapshotId) -> bool:
        try:
            return self._store.storage.size(f"{SNAPSHOTS}/{snapshot_id.hex()}") >= 0
        except NotFoundError:
            return False

    def _count_entry(self, folder: bytes) -> None:
        progress = self._monitor.progress
        progress.items += 1
        progress.path = folder
