"""Prune a repository to which hosts write over a network, where no locks show who is at work.

A run does two things, and waits for nothing:

- It publishes a removal notice of the packs that no snapshot and no draft needs. From then on no writer
  relies on them: each looks at the notices just before it publishes its snapshot.
- It removes the packs of notices that are older than the margin, after it has listed the drafts and the
  snapshots again and marked what they need. A needed blob in such a pack is first copied into a new pack. A
  pack under notice is never taken out of the notice, because another prune may be about to delete it.

Of two prunes that run at once, each relies for a needed blob only on packs that had no notice when it began
to delete, and deletes only packs whose notice it saw before that. So the last copy of a blob stays. A run
that dies anywhere, or whose requests take effect late, leaves unneeded packs or notices to the next run.
One thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import (
    BlobError,
    CasfsError,
    IntegrityError,
    NotFoundError,
    StorageError,
)
from casfs.index.schema import Location, PackRecord
from casfs.maintenance.evacuate import Evacuator, copy_needed_blobs
from casfs.maintenance.pack_usage import measure_usage
from casfs.maintenance.prune import (
    IndexReplacedError,
    NeededBlobsUnknownError,
    Pruner,
    PruneResult,
)
from casfs.maintenance.prune_locks import extend_locks, held_packs
from casfs.maintenance.prune_plan import (
    DEFAULT_MARGIN_S,
    SHARED_MARGIN_S,
    PackUsage,
    PruneOptions,
    PrunePlan,
    packs_to_repack,
    unneeded_packs,
)
from casfs.monitor import Monitor, Unit
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.presence import PresentProcess, present_processes
from casfs.repository.remote_writers import is_shared
from casfs.repository.repository import Repository
from casfs.repository.snapshots import DRAFTS, SNAPSHOTS
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import (
    ListedNotice,
    RemovalNotice,
    encode_notice,
    list_notices,
)

log = logging.getLogger(__name__)

_NS = 1_000_000_000
_OLD_PRESENCE_NS = 86_400 * _NS
"""A presence object that was not refreshed for this long is deleted."""

_LONGEST_WRITER_NS = 7 * 86_400 * _NS
"""Packs that are older are marked for removal, whatever presence objects say of who may have stored them."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """The packs under notice (ordinals): those to remove now, and until when the others stay."""

    removable: frozenset[int]
    pending: dict[int, int]


class OtherPruneError(CasfsError):
    """Another prune removed packs that this one was about to read."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place

    def __str__(self) -> str:
        return f"another prune of {self.place} ran at the same time; run `casfs prune` again for the rest"


class SharedPruner:
    """Prune one repository that is open for writing; use each instance for one prune."""

    def __init__(self, repository: Repository, options: PruneOptions, monitor: Monitor) -> None:
        self.result = PruneResult()
        self._repository = repository
        self._snapshots = repository.snapshots
        self._store = repository.store
        self._storage = repository.store.storage
        self._index = repository.store.index
        self._options = options
        self._monitor = monitor
        self._needed = NeededBlobs(repository)
        self._evacuator = Evacuator(repository, self._needed)
        self._marked: set[SnapshotId] = set()
        self._marked_in: tuple[int, int] | None = None
        self._published: set[SnapshotId] = set()
        self._drafts: set[SnapshotId] = set()
        self._notices: dict[str, ListedNotice] = {}
        self._processes: dict[str, PresentProcess] = {}
        self._records: dict[int, PackRecord] = {}
        self._under_notice: set[int] = set()
        self._repacked: set[int] = set()
        self._damaged: dict[Digest, Location] = {}
        self._waiting = _Waiting(frozenset(), {})
        self._held: dict[int, int] = {}
        self._now_ns = 0

    def prune(self) -> PruneResult:
        """Plan and execute a prune; raises as `plan` does."""
        return self.execute(self.plan())

    def plan(self) -> PrunePlan:
        """Decide which packs are marked for removal, which are removed and which repacked.

        Change nothing but this machine's index. Raises IntegrityError where a tree or content list of a
        snapshot, a draft or a removal notice is damaged, and StorageError where a listing fails.
        """
        self._now_ns = self._repository.clock.now_ns()
        self._processes = self._other_processes()
        # A pack is removed only if the first listing has its notice. A needed blob is relied on only in a
        # pack without a notice in the second one.
        first = list_notices(self._storage, refuse_damaged=True)
        self._notices = list_notices(self._storage, first, refuse_damaged=True)
        self._monitor.progress.begin("finding needed data", Unit.ENTRIES)
        self._mark()
        self._waiting = self._settle(first)
        self.result.packs = len(self._records)
        return self._make_plan()

    def execute(self, plan: PrunePlan) -> PruneResult:
        """Do what a plan of this instance says; raises OtherPruneError."""
        try:
            return self._execute(plan)
        except NotFoundError as error:
            raise OtherPruneError(self._storage.url) from error

    def _execute(self, plan: PrunePlan) -> PruneResult:
        if self._damaged and self._evacuator.rewrite_damaged(self._damaged):
            plan = self._make_plan()
        self._remove_settled()
        self._repack(plan.repacked)
        self._publish_deltas()
        self._publish_notice(set(plan.unneeded | plan.repacked))
        self._remove_old_objects()
        self._index.keep_complete(set(self._published))
        self._merge_deltas()
        self._extend_locks()
        self._count_waiting()
        return self.result

    def _extend_locks(self) -> None:
        """Lock what the snapshots need for as long as the lock policy says."""

        def needed() -> list[PackRecord]:
            usage = self._pack_usage()
            return [record for record in self._index.packs() if record.ordinal in usage]

        kept = extend_locks(self._repository, needed, self._published)
        if kept is not None and kept.error is not None:
            log.warning(
                "%d objects that snapshots need could not be locked: %s",
                kept.not_locked,
                kept.error,
            )

    def estimate(self, plan: PrunePlan) -> PruneResult:
        """Return the result that a plan would have, as far as it is known before."""
        result = self.result
        result.repacked_packs = len(plan.repacked)
        result.repacked_bytes = plan.repacked_bytes
        result.new_bytes = plan.new_bytes
        result.removed_packs = len(self._waiting.removable)
        result.removed_bytes = self._pack_bytes(self._waiting.removable)
        result.marked_packs, result.marked_bytes = plan.removed_packs, plan.removed_bytes
        if plan.removed_packs:
            result.removable_ns = self._now_ns + self._margin_ns
        self._count_waiting()
        return result

    @property
    def _margin_ns(self) -> int:
        margin_s = self._options.margin_s
        return int((SHARED_MARGIN_S if margin_s is None else margin_s) * _NS)

    def _other_processes(self) -> dict[str, PresentProcess]:
        """Return the other processes that have been seen lately."""
        own = self._repository.presence_name
        return {
            name: process
            for name, process in present_processes(self._storage).items()
            if name != own and not process.is_stale(self._now_ns)
        }

    def _settle(self, first: dict[str, ListedNotice]) -> _Waiting:
        """Decide which of the packs under notice may be removed now."""
        by_name = {record.pack: ordinal for ordinal, record in self._records.items()}
        long_ns = DEFAULT_MARGIN_S * _NS if self._options.margin_s is None else self._margin_ns
        removable, pending = set(), {}
        for name, (mtime_ns, notice) in self._notices.items():
            is_used = any(
                process.record.since_ns <= mtime_ns for process in self._processes.values()
            )
            until_ns = mtime_ns + (max(long_ns, self._margin_ns) if is_used else self._margin_ns)
            for pack in notice.pack_refs():
                ordinal = by_name.get(pack)
                if ordinal is None:
                    continue
                if name in first and until_ns <= self._now_ns:
                    removable.add(ordinal)
                else:
                    pending[ordinal] = until_ns
        return _Waiting(
            frozenset(removable), {n: t for n, t in pending.items() if n not in removable}
        )

    def _mark(self) -> None:
        """Mark what the snapshots and drafts need that are not marked yet.

        The index is synced after they were listed, so that it has their packs. The drafts are listed before
        the snapshots, because a draft is deleted after its snapshot appears. The lists are read until they
        have no new entry: a replaced snapshot may vanish while they are read.
        """
        is_first = True
        while True:
            drafts = set(self._snapshots.ids(DRAFTS))
            published = set(self._snapshots.ids())
            self._drafts, self._published = drafts - published, published
            new = (drafts | published) - self._marked
            if not new and not is_first:
                break
            self._sync_index()
            if self._has_lost_entries():
                self._forget_marks()
                new = drafts | published
            for snapshot_id in sorted(new & published):
                self._mark_snapshot(snapshot_id)
            for snapshot_id in sorted(new - published):
                self._mark_draft(snapshot_id)
            self._marked |= new
            is_first = False
        self.result.drafts = len(self._drafts)

    def _sync_index(self) -> None:
        """Bring the index into agreement with the packs, and mark in it the packs under notice."""
        self._store.reconcile(self._repository.is_alone)
        self._records = {record.ordinal: record for record in self._index.packs()}
        pending = {pack for listed in self._notices.values() for pack in listed.notice.pack_refs()}
        self._under_notice = {n for n, record in self._records.items() if record.pack in pending}
        # Marks are only added: a writer of this machine may have seen a notice that this prune has not.
        marks = self._under_notice | self._repacked
        self._index.change_marked(marks - self._index.marked_for_removal(), frozenset())

    def _has_lost_entries(self) -> bool:
        """Return whether blobs may have other ordinals than when the marking began."""
        state = (self._index.loss_epoch(), self._index.removals())
        before, self._marked_in = self._marked_in, state
        return before is not None and before != state

    def _forget_marks(self) -> None:
        """Begin the marking again, after another prune removed packs from which blobs were located."""
        self._needed = NeededBlobs(self._repository)
        self._evacuator = Evacuator(self._repository, self._needed)
        self._marked = set()
        self.result.snapshots = self.result.unproven = 0

    def _mark_snapshot(self, snapshot_id: SnapshotId) -> None:
        try:
            self._needed.add(self._snapshots.load(snapshot_id).root, self._count_entry)
        except NotFoundError:
            return
        except IntegrityError as error:
            if not self._exists(snapshot_id):
                return  # forgotten, and another prune removed what it needed
            raise NeededBlobsUnknownError(snapshot_id, error) from error
        self.result.snapshots += 1
        if not self._snapshots.is_from_trusted_writer(snapshot_id):
            self.result.unproven += 1

    def _mark_draft(self, snapshot_id: SnapshotId) -> None:
        """Mark what a draft needs.

        A draft with a missing blob protects nothing: its writer has not had a successful last look yet, and
        will see every notice that this prune sees.
        """
        try:
            self._needed.add(self._snapshots.load(snapshot_id, DRAFTS).root, self._count_entry)
        except NotFoundError:
            return
        except BlobError as error:
            if self._index.lookup(Digest(error.digest)) is not None or not self._has_all_packs():
                raise NeededBlobsUnknownError(snapshot_id, error) from error
            log.info("draft %s is not complete: %s", short_id(snapshot_id), error)
        except IntegrityError as error:
            raise NeededBlobsUnknownError(snapshot_id, error) from error

    def _has_all_packs(self) -> bool:
        """Return whether the index has every pack: it lacks those that this machine cannot read."""
        indexed = {record.pack for record in self._index.packs()}
        return all(pack in indexed for pack, _ in self._store.stored_packs())

    def _exists(self, snapshot_id: SnapshotId) -> bool:
        try:
            return self._storage.size(f"{SNAPSHOTS}/{snapshot_id.hex()}") >= 0
        except NotFoundError:
            return False

    def _count_entry(self, folder: bytes) -> None:
        progress = self._monitor.progress
        progress.items += 1
        progress.path = folder

    def _make_plan(self) -> PrunePlan:
        usage = self._pack_usage()
        packs = {n: one for n, one in self._records.items() if n not in self._under_notice}
        usage = {n: one for n, one in usage.items() if n in packs}
        unneeded = unneeded_packs(packs, usage)
        repacked = packs_to_repack(packs, usage, self._options)
        in_flight = self._written_since(unneeded | repacked)
        self._hold(packs, (unneeded | repacked) - in_flight.keys())
        staying = in_flight.keys() | self._held.keys()
        return PrunePlan(packs, usage, unneeded - staying, repacked - staying, in_flight)

    def _hold(self, packs: Mapping[int, PackRecord], ordinals: frozenset[int]) -> None:
        """Keep the packs whose locks have not ended, and count them."""
        self._held |= held_packs(self._repository, packs, ordinals)
        held = self._held.keys() & self._records.keys()
        self.result.locked_packs = len(held)
        self.result.locked_bytes = self._pack_bytes(held)
        self.result.locked_until_s = max(self._held.values(), default=0)

    def _pack_usage(self) -> dict[int, PackUsage]:
        """Return the usage of each pack with needed blobs, by ordinal, packs under notice included."""
        found = measure_usage(self._repository, self._needed, self._require_same_index)
        self._damaged = found.damaged
        self.result.needed_blobs = found.needed_blobs
        self.result.unneeded_blobs = found.unneeded_blobs
        return found.usage

    def _written_since(self, ordinals: frozenset[int]) -> dict[int, str]:
        """Return the packs that a writer seen lately may have written, each with the name of its object.

        To mark them for removal would be safe, but the writer would have to store their blobs again.
        """
        writers = {
            name: process.record.since_ns
            for name, process in self._processes.items()
            if process.record.mode != LockMode.READER
        }
        if not writers:
            return {}
        oldest = min(writers, key=lambda name: writers[name])
        # The time is what the object says: a forged one must not keep everything for good.
        since_ns = max(writers[oldest], self._now_ns - _LONGEST_WRITER_NS)
        in_flight = {}
        for ordinal in ordinals:
            try:
                written_ns = self._storage.mtime_ns(pack_name(self._records[ordinal].pack))
            except NotFoundError:
                continue
            if written_ns >= since_ns:
                in_flight[ordinal] = oldest
        return in_flight

    def _remove_settled(self) -> None:
        """Remove the packs whose notices are old enough, after their needed blobs were copied."""
        if not self._waiting.removable:
            return
        self._mark()
        rescued = sorted(self._removable() & self._pack_usage().keys())
        if rescued:
            records = [self._records[ordinal] for ordinal in rescued]
            copied = copy_needed_blobs(
                self._repository, self._needed, records, self._monitor, "copying needed data"
            )
            self.result.new_bytes += copied.new_bytes
        kept = self._evacuator.save_last_copies(self._records, self._removable())
        # What was published since the last list, and what could not be copied, keeps its pack.
        self._mark()
        self._require_same_index()
        ordinals = self._removable() - kept - self._pack_usage().keys()
        self._hold(self._records, ordinals)
        if ordinals := ordinals - self._held.keys():
            self._remove(ordinals)

    def _removable(self) -> frozenset[int]:
        """Return the packs to remove that another prune has not removed meanwhile."""
        return self._waiting.removable & self._records.keys()

    def _remove(self, ordinals: frozenset[int]) -> None:
        """Remove packs from the index, publish that, and delete them."""
        if not self._index.remove_packs({n: self._records[n].pack for n in ordinals}):
            raise IndexReplacedError
        self._publish_deltas()
        progress = self._monitor.progress
        progress.begin("removing packs", Unit.PACKS, total_items=len(ordinals))
        for ordinal in sorted(ordinals):
            record = self._records.pop(ordinal)
            self._under_notice.discard(ordinal)
            self._storage.delete(pack_name(record.pack))
            progress.items += 1
            self.result.removed_packs += 1
            self.result.removed_bytes += record.pack_bytes

    def _publish_deltas(self) -> None:
        """Publish what this prune stored and removes, before other hosts see the effect."""
        if self._repository.deltas is not None:
            self._repository.deltas.publish()

    def _merge_deltas(self) -> None:
        if self._repository.deltas is not None:
            try:
                self._repository.deltas.merge()
            except StorageError as error:
                log.warning("%s; the next prune merges the index deltas", error)

    def _repack(self, chosen: frozenset[int]) -> None:
        """Copy the needed blobs of packs into new packs; the notice of the old ones follows."""
        if not chosen:
            return
        self._require_same_index()
        self._repacked = set(chosen)
        self._index.change_marked(chosen, frozenset())
        try:
            records = [self._records[ordinal] for ordinal in sorted(chosen)]
            copied = copy_needed_blobs(self._repository, self._needed, records, self._monitor)
        except BaseException:
            self._repacked = set()
            try:
                self._index.change_marked(frozenset(), chosen)
            except CasfsError as error:
                log.warning("%s; the next prune continues from here", error)
            raise
        self.result.repacked_packs += copied.packs
        self.result.repacked_bytes += copied.pack_bytes
        self.result.new_bytes += copied.new_bytes

    def _publish_notice(self, ordinals: set[int]) -> None:
        """Publish which packs are going to be removed."""
        ordinals &= self._records.keys()
        if not ordinals:
            return
        self._require_same_index()
        packs = [self._records[ordinal].pack for ordinal in ordinals]
        notice = RemovalNotice.of(self._now_ns // _NS, packs)
        mtime_ns = self._repository.clock.create(*encode_notice(notice))
        self._index.change_marked(ordinals, frozenset())
        until_ns = mtime_ns + self._margin_ns
        self.result.marked_packs = len(ordinals)
        self.result.marked_bytes = self._pack_bytes(ordinals)
        self.result.removable_ns = until_ns

    def _count_waiting(self) -> None:
        """Count what stays until a later prune."""
        waiting = self._waiting.pending.keys() & self._records.keys()
        if not self._options.dry_run:
            waiting |= self._removable()
        self.result.waiting_packs = len(waiting) + self.result.marked_packs
        self.result.waiting_bytes = self._pack_bytes(waiting) + self.result.marked_bytes
        times = [self._waiting.pending.get(ordinal, 0) for ordinal in waiting]
        self.result.removable_ns = max([self.result.removable_ns, *times])

    def _remove_old_objects(self) -> None:
        """Delete the notices of removed packs, the drafts of published snapshots, and old presence objects.

        A pack that is gone never comes back, since names are never used again.
        """
        stored = {pack for pack, _ in self._store.stored_packs()} if self._notices else set()
        old = [
            name
            for name, listed in self._notices.items()
            if stored.isdisjoint(listed.notice.pack_refs())
        ]
        old += [
            f"{DRAFTS}/{one.hex()}" for one in self._snapshots.ids(DRAFTS) if one in self._published
        ]
        old += [
            name
            for name, process in present_processes(self._storage).items()
            if self._now_ns - process.seen_ns > _OLD_PRESENCE_NS
        ]
        for name in old:
            self._storage.delete(name)

    def _pack_bytes(self, ordinals: set[int] | frozenset[int]) -> int:
        return sum(self._records[ordinal].pack_bytes for ordinal in ordinals)

    def _require_same_index(self) -> None:
        """Raise where another process of this machine has rebuilt the index, which changes all ordinals."""
        current = {record.ordinal: record.pack for record in self._index.packs()}
        for ordinal, record in self._records.items():
            if current.get(ordinal) != record.pack:
                raise IndexReplacedError


def new_pruner(
    repository: Repository, options: PruneOptions, monitor: Monitor
) -> Pruner | SharedPruner:
    """Return what prunes a repository: by its locks, or by the rules for places without locks."""
    kind = SharedPruner if is_shared(repository.store.storage) else Pruner
    return kind(repository, options, monitor)
