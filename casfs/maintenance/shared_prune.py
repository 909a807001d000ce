"""Prune a repository to which hosts write over a network, where no locks show who is at work.

A run does three things, and waits for nothing:

- It publishes a removal notice of the packs that no snapshot and no draft needs. From then on no writer
  relies on them: each looks at the notices just before it publishes its snapshot.
- It drops drafts that are abandoned (`casfs.maintenance.drafts`); a later run removes their data.
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
from collections.abc import Iterable, Iterator, Mapping, Set

from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import CasfsError, NotFoundError, StorageError
from casfs.format.pack import PackRef
from casfs.index.schema import Location, PackRecord
from casfs.maintenance.drafts import ABANDONED_NS, abandoned_drafts, list_drafts
from casfs.maintenance.evacuate import copy_needed_blobs
from casfs.maintenance.pack_usage import measure_usage
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_locks import extend_locks, held_packs
from casfs.maintenance.prune_plan import (
    PackUsage,
    PruneOptions,
    PrunePlan,
    packs_to_repack,
    packs_with_room,
    unneeded_packs,
)
from casfs.maintenance.prune_result import IndexReplacedError, PruneResult
from casfs.maintenance.prune_waits import Margin, WaitingPacks, packs_in_flight, waiting_packs
from casfs.maintenance.shared_marking import SharedMarking
from casfs.monitor import Monitor, Unit
from casfs.repository.presence import (
    PresentProcess,
    old_presence_objects,
    present_processes,
)
from casfs.repository.remote_writers import is_shared
from casfs.repository.repository import Repository
from casfs.repository.snapshot_listing import DRAFTS
from casfs.storage.concurrency import begin, in_order
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import encode_notice, list_notices, notices_of

log = logging.getLogger(__name__)

_NS = 1_000_000_000
_OLD_PRESENCE_NS = 86_400 * _NS
"""A presence object that was not refreshed for this long is deleted."""


class OtherPruneError(CasfsError):
    """Another prune removed packs that this one was about to read."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place

    def __str__(self) -> str:
        return f"another prune of {self.place} ran at the same time; run `casfs prune` again for the rest"


class SharedPruner:
    """Prune one repository that is open for writing; use each instance for one prune."""

    def __init__(
        self,
        repository: Repository,
        options: PruneOptions,
        monitor: Monitor,
        abandoned_ns: int = ABANDONED_NS,
    ) -> None:
        self.result = PruneResult()
        self._repository = repository
        self._snapshots = repository.snapshots
        self._store = repository.store
        self._storage = repository.store.storage
        self._index = repository.store.index
        self._options = options
        self._abandoned_ns = abandoned_ns
        self._monitor = monitor
        self._margin = Margin.of(options.margin_s)
        self._marking = SharedMarking(repository, monitor)
        self._processes: dict[str, PresentProcess] = {}
        self._damaged: dict[Digest, Location] = {}
        self._waiting = WaitingPacks(frozenset(), {})
        self._abandoned: dict[SnapshotId, int] = {}
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
        list_processes = begin(self._storage, self._other_processes)
        # A pack is removed only if the first listing has its notice. A needed blob is relied on only in a
        # pack without a notice in the second one.
        first = list_notices(self._storage, refuse_damaged=True)
        self._marking.notices = list_notices(self._storage, first, refuse_damaged=True)
        self._processes = list_processes()
        self._monitor.progress.begin("finding needed data", Unit.ENTRIES)
        self._mark()
        self._waiting = waiting_packs(
            self._marking.notices,
            first,
            {record.pack: ordinal for ordinal, record in self._marking.records.items()},
            self._processes.values(),
            self._margin,
            self._now_ns,
        )
        drafts = self._marking.drafts
        before_ns = self._now_ns - self._abandoned_ns
        abandoned = abandoned_drafts(drafts, self._processes.values(), before_ns)
        self._abandoned = {draft: drafts[draft] for draft in abandoned}
        self.result.packs = len(self._marking.records)
        return self._make_plan()

    def execute(self, plan: PrunePlan) -> PruneResult:
        """Do what a plan of this instance says; raises OtherPruneError."""
        try:
            return self._execute(plan)
        except NotFoundError as error:
            raise OtherPruneError(self._storage.url) from error

    def _execute(self, plan: PrunePlan) -> PruneResult:
        if self._damaged and self._marking.evacuator.rewrite_damaged(self._damaged):
            plan = self._make_plan()
        self._remove_settled()
        self._repack(plan.repacked)
        self._publish_deltas()
        self._publish_notice(set(plan.unneeded | plan.repacked))
        self._remove_old_objects()
        self._index.keep_complete(set(self._marking.published))
        self._merge_deltas()
        self._extend_locks()
        self._count_waiting()
        return self.result

    def _extend_locks(self) -> None:
        """Lock what the snapshots need for as long as the lock policy says."""

        def needed() -> list[PackRecord]:
            usage = self._pack_usage()
            return [record for record in self._index.packs() if record.ordinal in usage]

        kept = extend_locks(self._repository, needed, self._marking.published)
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
        result.dropped_drafts = len(self._abandoned)
        if plan.removed_packs:
            result.removable_ns = self._now_ns + self._margin.least_ns
        self._count_waiting()
        return result

    def _other_processes(self) -> dict[str, PresentProcess]:
        """Return the other processes that have been seen lately."""
        own = self._repository.presence_name
        return {
            name: process
            for name, process in present_processes(self._storage).items()
            if name != own and not process.is_stale(self._now_ns)
        }

    def _mark(self) -> None:
        """Mark what appeared since the last time, and count it."""
        self._marking.mark()
        self.result.snapshots = self._marking.snapshots
        self.result.unproven = self._marking.unproven
        self.result.drafts = len(self._marking.drafts)

    def _make_plan(self) -> PrunePlan:
        usage = self._pack_usage()
        packs = {
            n: one
            for n, one in self._marking.records.items()
            if n not in self._marking.under_notice
        }
        usage = {n: one for n, one in usage.items() if n in packs}
        unneeded = unneeded_packs(packs, usage)
        repacked = packs_to_repack(packs, usage, self._options)
        in_flight = packs_in_flight(
            self._storage, self._marking.records, unneeded | repacked, self._processes, self._now_ns
        )
        self.result.in_flight_packs = len(in_flight)
        self.result.in_flight_bytes = self._pack_bytes(in_flight.keys())
        self._hold(packs, (unneeded | repacked) - in_flight.keys())
        staying = in_flight.keys() | self._held.keys()
        room = self._options.most_marked - len(self._marking.under_notice)
        unneeded, repacked = packs_with_room(unneeded - staying, repacked - staying, room)
        return PrunePlan(packs, usage, unneeded, repacked, in_flight)

    def _hold(self, packs: Mapping[int, PackRecord], ordinals: frozenset[int]) -> None:
        """Keep the packs whose locks have not ended, and count them."""
        self._held |= held_packs(self._repository, packs, ordinals)
        held = self._held.keys() & self._marking.records.keys()
        self.result.locked_packs = len(held)
        self.result.locked_bytes = self._pack_bytes(held)
        self.result.locked_until_s = max(self._held.values(), default=0)

    def _pack_usage(self) -> dict[int, PackUsage]:
        """Return the usage of each pack with needed blobs, by ordinal, packs under notice included."""
        found = measure_usage(self._repository, self._marking.needed, self._require_same_index)
        self._damaged = found.damaged
        self.result.needed_blobs = found.needed_blobs
        self.result.unneeded_blobs = found.unneeded_blobs
        return found.usage

    def _remove_settled(self) -> None:
        """Remove the packs whose notices are old enough, after their needed blobs were copied."""
        if not self._waiting.removable:
            return
        self._mark()
        rescued = sorted(self._removable() & self._pack_usage().keys())
        if rescued:
            records = [self._marking.records[ordinal] for ordinal in rescued]
            copied = copy_needed_blobs(
                self._repository,
                self._marking.needed,
                records,
                self._monitor,
                "copying needed data",
            )
            self.result.new_bytes += copied.new_bytes
        kept = self._marking.evacuator.save_last_copies(self._marking.records, self._removable())
        # What was published since the last list, and what could not be copied, keeps its pack.
        self._mark()
        self._require_same_index()
        ordinals = self._removable() - kept - self._pack_usage().keys()
        self._hold(self._marking.records, ordinals)
        if ordinals := ordinals - self._held.keys():
            self._remove(ordinals)

    def _removable(self) -> frozenset[int]:
        """Return the packs to remove that another prune has not removed meanwhile."""
        return self._waiting.removable & self._marking.records.keys()

    def _remove(self, ordinals: frozenset[int]) -> None:
        """Remove packs from the index, publish that, and delete them."""
        if not self._index.remove_packs({n: self._marking.records[n].pack for n in ordinals}):
            raise IndexReplacedError
        self._publish_deltas()
        progress = self._monitor.progress
        progress.begin("removing packs", Unit.PACKS, total_items=len(ordinals))
        records = [self._marking.records.pop(ordinal) for ordinal in sorted(ordinals)]
        self._marking.under_notice -= ordinals
        names = (pack_name(record.pack) for record in records)
        for record, _ in zip(records, self._delete(names), strict=True):
            progress.items += 1
            self.result.removed_packs += 1
            self.result.removed_bytes += record.pack_bytes

    def _delete(self, names: Iterable[str]) -> Iterator[None]:
        """Delete objects in order, over a distance several at a time; yield once for each."""
        return in_order(self._storage, self._storage.delete, names)

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
        self._marking.repacked = set(chosen)
        self._index.change_marked(chosen, frozenset())
        try:
            records = [self._marking.records[ordinal] for ordinal in sorted(chosen)]
            copied = copy_needed_blobs(
                self._repository, self._marking.needed, records, self._monitor
            )
        except BaseException:
            self._marking.repacked = set()
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
        ordinals &= self._marking.records.keys()
        if not ordinals:
            return
        self._require_same_index()
        packs = [self._marking.records[ordinal].pack for ordinal in ordinals]
        until_ns = 0
        for notice in notices_of(self._now_ns // _NS, packs):
            mtime_ns = self._repository.clock.create(*encode_notice(notice))
            until_ns = mtime_ns + self._margin.least_ns
        self._index.change_marked(ordinals, frozenset())
        self.result.marked_packs = len(ordinals)
        self.result.marked_bytes = self._pack_bytes(ordinals)
        self.result.removable_ns = until_ns

    def _count_waiting(self) -> None:
        """Count what stays until a later prune."""
        waiting = self._waiting.pending.keys() & self._marking.records.keys()
        if not self._options.dry_run:
            waiting |= self._removable()
        self.result.waiting_packs = len(waiting) + self.result.marked_packs
        self.result.waiting_bytes = self._pack_bytes(waiting) + self.result.marked_bytes
        times = [self._waiting.pending.get(ordinal, 0) for ordinal in waiting]
        self.result.removable_ns = max([self.result.removable_ns, *times])

    def _remove_old_objects(self) -> None:
        """Delete the notices of removed packs, drafts that are done or abandoned, and old presence objects.

        A pack that is gone never comes back, since names are never used again. What an abandoned draft needs
        was marked by this prune: the next one finds it unneeded, and removes it after a margin.
        """
        before_ns = self._now_ns - _OLD_PRESENCE_NS
        list_stored = begin(self._storage, self._stored_under_notice)
        list_remaining = begin(self._storage, lambda: list_drafts(self._storage))
        old = old_presence_objects(self._storage, before_ns)
        stored = list_stored()
        old += [
            name
            for name, listed in self._marking.notices.items()
            if stored.isdisjoint(listed.notice.pack_refs())
        ]
        for draft, mtime_ns in list_remaining().items():
            if draft in self._marking.published:
                old.append(f"{DRAFTS}/{draft.hex()}")
            elif self._abandoned.get(draft) == mtime_ns:
                log.info("draft %s is abandoned; it is dropped", short_id(draft))
                old.append(f"{DRAFTS}/{draft.hex()}")
                self.result.dropped_drafts += 1
        for _ in self._delete(old):
            continue

    def _stored_under_notice(self) -> set[PackRef]:
        """Return the packs that exist, or none where there is no notice to compare them with."""
        return {pack for pack, _ in self._store.stored_packs()} if self._marking.notices else set()

    def _pack_bytes(self, ordinals: Set[int]) -> int:
        return sum(self._marking.records[ordinal].pack_bytes for ordinal in ordinals)

    def _require_same_index(self) -> None:
        """Raise where another process of this machine has rebuilt the index, which changes all ordinals."""
        current = {record.ordinal: record.pack for record in self._index.packs()}
        for ordinal, record in self._marking.records.items():
            if current.get(ordinal) != record.pack:
                raise IndexReplacedError


def new_pruner(
    repository: Repository, options: PruneOptions, monitor: Monitor
) -> Pruner | SharedPruner:
    """Return the pruner of a repository: by its locks, or by the rules for places without locks."""
    kind = SharedPruner if is_shared(repository.store.storage) else Pruner
    return kind(repository, options, monitor)
