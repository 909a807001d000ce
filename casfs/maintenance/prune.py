"""Prune: free the blobs that no snapshot needs, while backups and mounts run (FORMAT.md, "Prune").

1. Mark: set a bit for every blob that a snapshot needs.
2. Mark for removal: name in a durable notice the packs without needed blobs, and the packs with too much
   unneeded data. A process that opens the repository later does not count their blobs as stored.
3. Repack: copy the needed blobs of the second kind of pack into new packs.
4. Remove: delete a pack under notice when no snapshot needs it, every process that was writing when the
   notice was published has ended, and every process that was reading then has ended or the notice is
   older than the margin.

A prune that is interrupted anywhere leaves unneeded packs or a notice, and the next prune continues from
there. Where data that decides what is needed cannot be read, nothing is removed. One thread only.
"""

from __future__ import annotations

import logging
import time

from msgspec.structs import replace

from casfs.digest import Digest, SnapshotId
from casfs.errors import (
    CasfsError,
    IndexDamagedError,
    IndexUnusableError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    StorageError,
)
from casfs.index.schema import Location, PackRecord
from casfs.maintenance.evacuate import Evacuator, copy_needed_blobs
from casfs.maintenance.pack_usage import measure_usage
from casfs.maintenance.prune_plan import (
    DEFAULT_MARGIN_S,
    PackUsage,
    PruneOptions,
    PrunePlan,
    packs_to_repack,
    packs_with_room,
    unneeded_packs,
)
from casfs.maintenance.prune_result import (
    IndexReplacedError,
    NeededBlobsUnknownError,
    PruneResult,
    SnapshotClosedError,
)
from casfs.maintenance.unneeded_sessions import remove_unneeded_sessions
from casfs.monitor import Monitor, Unit
from casfs.repository.deltas import REPLACED_MARGIN_MS
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.remote_writers import is_shared, require_no_remote_writers
from casfs.repository.repository import Repository
from casfs.storage.locks import LockMode, LockRecord
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import (
    RemovalNotice,
    notices_of,
    publish_notice,
    read_notices,
    replace_notice,
)

log = logging.getLogger(__name__)


class Pruner:
    """Prune one repository that is open for writing under the maintenance lock.

    Use each instance for one prune.
    """

    def __init__(self, repository: Repository, options: PruneOptions, monitor: Monitor) -> None:
        self.result = PruneResult()
        self._repository = repository
        self._storage = repository.store.storage
        self._index = repository.store.index
        self._options = options
        self._monitor = monitor
        self._needed = NeededBlobs(repository)
        self._evacuator = Evacuator(repository, self._needed)
        self._marked: set[SnapshotId] = set()
        self._locks: dict[str, LockRecord] = {}
        self._records: dict[int, PackRecord] = {}
        self._in_flight: dict[int, str] = {}
        self._removed: set[int] = set()
        self._damaged: dict[Digest, Location] = {}

    def prune(self) -> PruneResult:
        """Plan and execute a prune.

        Raises IntegrityError, and removes nothing, where a tree or content list of a snapshot is damaged.
        """
        return self.execute(self.plan())

    def plan(self) -> PrunePlan:
        """Decide which packs go and which are repacked; change nothing.

        Raises IntegrityError where a tree or content list of a snapshot is damaged.
        """
        self._locks = self._repository.other_locks()
        # Read before anything is marked by ordinal: a rebuilt index shows by different ordinals.
        self._records = {record.ordinal: record for record in self._index.packs()}
        self.result.packs = len(self._records)
        self._monitor.progress.begin("finding needed data", Unit.ENTRIES)
        self._mark()
        return self._make_plan(self._pack_usage())

    def execute(self, plan: PrunePlan) -> PruneResult:
        """Mark for removal, repack and remove what a plan of this instance says."""
        if self._damaged and self._evacuator.rewrite_damaged(self._damaged):
            plan = self._make_plan(self._pack_usage())
        # Removal before repacking: removal needs no free space, and the disk may be full.
        waiting = self._remove_unneeded(set(plan.unneeded))
        if plan.repacked:
            self._repack_and_remove(set(plan.repacked), waiting)
        self._index.keep_complete(set(self._repository.snapshots.ids()))
        self._merge_deltas()
        remove_unneeded_sessions(self._repository)
        return self.result

    def estimate(self, plan: PrunePlan) -> PruneResult:
        """Return the result that a plan would have, as far as it is known before."""
        result = self.result
        result.repacked_packs = len(plan.repacked)
        result.repacked_bytes = plan.repacked_bytes
        result.new_bytes = plan.new_bytes
        result.removed_packs = plan.removed_packs
        result.removed_bytes = plan.removed_bytes
        return result

    def _make_plan(self, usage: dict[int, PackUsage]) -> PrunePlan:
        unneeded = unneeded_packs(self._records, usage)
        repacked = packs_to_repack(self._records, usage, self._options)
        in_flight = self._written_since(unneeded | repacked)
        self._in_flight = in_flight
        going = in_flight.keys()
        unneeded, repacked = packs_with_room(
            unneeded - going, repacked - going, self._options.most_marked
        )
        return PrunePlan(self._records, usage, unneeded, repacked, in_flight)

    def _remove_unneeded(self, unneeded: set[int]) -> set[int]:
        """Mark packs for removal and remove those that no process uses; return the others."""
        self._mark_for_removal(unneeded)
        kept = self._evacuator.save_last_copies(self._records, unneeded)
        return unneeded - self._remove(self._recheck(unneeded) - kept)

    def _repack_and_remove(self, repacked: set[int], waiting: set[int]) -> None:
        """Copy the needed blobs of packs into new packs, and remove the packs where possible.

        `waiting` are the packs that are marked for removal already.
        """
        self._mark_for_removal(repacked | waiting)
        try:
            self._repack(repacked)
        except BaseException:
            self._unmark(waiting)
            raise
        kept = self._evacuator.save_last_copies(self._records, repacked | waiting)
        self._remove(self._recheck(repacked | waiting) - kept)

    def _unmark(self, waiting: set[int]) -> None:
        """Undo the removal marks of a failed repack; `waiting` stays marked."""
        try:
            self._mark_for_removal(waiting)
        except CasfsError as error:
            log.warning("%s; the next prune continues from here", error)

    def _mark(self) -> None:
        """Mark the blobs of all snapshots that are not marked yet.

        A snapshot that vanishes meanwhile may have been replaced, so the list is read again until it
        has no new entry.
        """
        while new := set(self._repository.snapshots.ids()) - self._marked:
            for snapshot_id in sorted(new):
                try:
                    self._needed.add(
                        self._repository.snapshots.load(snapshot_id).root, self._count_entry
                    )
                except NotFoundError:
                    continue
                except KeyMissingError as error:
                    raise SnapshotClosedError(snapshot_id, error) from error
                except IntegrityError as error:
                    raise NeededBlobsUnknownError(snapshot_id, error) from error
                finally:
                    self._marked.add(snapshot_id)
                self.result.snapshots += 1
                if not self._repository.snapshots.provenance.is_from_trusted_writer(snapshot_id):
                    self.result.unproven += 1

    def _count_entry(self, folder: bytes) -> None:
        progress = self._monitor.progress
        progress.items += 1
        progress.path = folder

    def _pack_usage(self) -> dict[int, PackUsage]:
        """Return the usage of each pack with needed blobs, by ordinal."""
        found = measure_usage(self._repository, self._needed, self._require_same_index)
        self._damaged = found.damaged
        self.result.needed_blobs = found.needed_blobs
        self.result.unneeded_blobs = found.unneeded_blobs
        return found.usage

    def _pending(self) -> dict[int, RemovalNotice]:
        """Return the packs that are marked for removal, with the notice of each."""
        by_name = {record.pack: ordinal for ordinal, record in self._records.items()}
        return {
            by_name[pack]: notice
            for notice in read_notices(self._storage).values()
            for pack in notice.pack_refs()
            if pack in by_name
        }

    def _written_since(self, ordinals: frozenset[int]) -> dict[int, str]:
        """Return the packs that a running backup may have written, each with the name of a lock.

        Marking them for removal would be safe, but their blobs would not count as stored until the next
        prune.
        """
        writers = {n: lock for n, lock in self._locks.items() if lock.mode != LockMode.READER}
        if not writers:
            return {}
        oldest = min(writers, key=lambda name: writers[name].since_ns)
        in_flight = {}
        for ordinal in ordinals - self._pending().keys():
            try:
                written_ns = self._storage.mtime_ns(pack_name(self._records[ordinal].pack))
            except NotFoundError:
                continue
            if written_ns >= writers[oldest].since_ns:
                in_flight[ordinal] = oldest
        return in_flight

    def _mark_for_removal(self, ordinals: set[int]) -> None:
        """Publish which packs are going to be removed, then record which processes may use them.

        Replaces the set of packs that all earlier notices name.
        """
        self._require_same_index()
        packs = {self._records[ordinal].pack for ordinal in ordinals}
        fresh = set(packs)
        for name, notice in read_notices(self._storage).items():
            fresh -= notice.pack_refs()
            replace_notice(self._storage, name, notice.only(packs))
        for notice in notices_of(int(time.time()), fresh):
            publish_notice(self._storage, notice)
        self._index.mark_for_removal(ordinals)
        # Read after publishing: a process that locks later sees the notice.
        locks = self._repository.other_locks()
        readers = tuple(sorted(n for n, lock in locks.items() if lock.mode == LockMode.READER))
        writers = tuple(sorted(locks.keys() - set(readers)))
        for name, notice in read_notices(self._storage).items():
            if notice.writers is None:
                with_holders = replace(notice, writers=writers, readers=readers)
                replace_notice(self._storage, name, with_holders)

    def _repack(self, chosen: set[int]) -> None:
        """Copy the needed blobs of packs into new packs."""
        records = [self._records[ordinal] for ordinal in sorted(chosen)]
        copied = copy_needed_blobs(self._repository, self._needed, records, self._monitor)
        self.result.repacked_packs += copied.packs
        self.result.repacked_bytes += copied.pack_bytes
        self.result.new_bytes = copied.new_bytes

    def _recheck(self, candidates: set[int]) -> set[int]:
        """Return the packs among `candidates` that can be removed now; unmark those needed again.

        The locks are read before the snapshots: a writer that was active when a pack was marked, and holds
        no lock any more, has published its snapshot.
        """
        locks = self._repository.other_locks()
        self._mark()
        self._require_same_index()
        unneeded = candidates - self._pack_usage().keys()
        notices = self._pending()
        removable = set()
        waited_for = set(self._in_flight.values())
        self.result.waiting_packs = len(self._in_flight)
        self.result.waiting_bytes = sum(self._records[n].pack_bytes for n in self._in_flight)
        for ordinal in unneeded:
            notice = notices.get(ordinal)
            holders = self._holders(notice, locks) if notice is not None else set(locks)
            if not holders and notice is not None:
                removable.add(ordinal)
                continue
            waited_for |= holders
            self.result.waiting_packs += 1
            self.result.waiting_bytes += self._records[ordinal].pack_bytes
        self.result.waited_for = sorted(waited_for)
        if unneeded != candidates:
            self._mark_for_removal(unneeded)
        return removable

    def _holders(self, notice: RemovalNotice, locks: dict[str, LockRecord]) -> set[str]:
        """Return the names of the locks whose processes may still use the packs of a notice."""
        if notice.writers is None:
            return set(locks)
        holders = locks.keys() & set(notice.writers)
        margin_s = self._options.margin_s
        if time.time() - notice.time_s < (DEFAULT_MARGIN_S if margin_s is None else margin_s):
            holders |= locks.keys() & set(notice.readers)
        return holders

    def _remove(self, ordinals: set[int]) -> set[int]:
        """Remove packs from the index, then from the storage, then from the notices; return them."""
        if not ordinals:
            return ordinals
        # Asked after the packs were marked: a host that writes over a network from now on sees the marks.
        require_no_remote_writers(self._storage)
        packs = {ordinal: self._records[ordinal].pack for ordinal in sorted(ordinals)}
        try:
            same = self._index.remove_packs(packs)
        except IndexDamagedError:
            raise  # the pack records read from it may be wrong as well
        except IndexUnusableError as error:
            # On a full disk the index update needs the space that the packs take. If this process is
            # killed before the index is updated, the next opener notices that the packs are missing.
            log.warning("%s; the packs are removed first", error)
            self._require_same_index()
            self._unlink(ordinals)
            self._removed |= ordinals
            self._index.remove_packs(packs)
        else:
            if not same:
                raise IndexReplacedError
            self._removed |= ordinals
            self._publish_removals()
            self._unlink(ordinals)
        removed = set(packs.values())
        for name, notice in read_notices(self._storage).items():
            pending = notice.pack_refs()
            if not pending.isdisjoint(removed):
                replace_notice(self._storage, name, notice.only(pending - removed))
        return ordinals

    def _publish_removals(self) -> None:
        """Publish a delta before packs are deleted, so that a host that relies on them learns of it.

        Only hosts that write over a network rely on deltas. Elsewhere a disk that is too full for the delta
        must not keep packs from being deleted; a later delta names them.
        """
        if self._repository.deltas is None:
            return
        try:
            self._repository.deltas.publish()
        except StorageError as error:
            if is_shared(self._storage):
                raise
            log.warning("%s; the packs are removed all the same", error)

    def _merge_deltas(self) -> None:
        if self._repository.deltas is None:
            return
        margin_ms = REPLACED_MARGIN_MS if is_shared(self._storage) else 0
        try:
            self._repository.deltas.merge(margin_ms)
        except StorageError as error:
            log.warning("%s; the next prune merges the index deltas", error)

    def _require_same_index(self) -> None:
        """Raise where another process has rebuilt the index, which makes all ordinals meaningless.

        Another process rebuilds the index when a pack vanishes that this prune did not remove.
        """
        current = {record.ordinal: record.pack for record in self._index.packs()}
        for ordinal, record in self._records.items():
            if ordinal not in self._removed and current.get(ordinal) != record.pack:
                raise IndexReplacedError

    def _unlink(self, ordinals: set[int]) -> None:
        progress = self._monitor.progress
        progress.begin("removing packs", Unit.PACKS, total_items=len(ordinals))
        for ordinal in sorted(ordinals):
            record = self._records[ordinal]
            self._storage.delete(pack_name(record.pack))
            progress.items += 1
            self.result.removed_packs += 1
            self.result.removed_bytes += record.pack_bytes
