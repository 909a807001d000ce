"""Prune: free what no snapshot needs, beside backups and mounts of any process (FORMAT.md, "Prune").

Mark: a bit for every blob that a snapshot needs. Condemn: packs that hold nothing needed, and those of
which too much is not needed, are named in a durable object; who opens the repository from then on does
not take their blobs for stored. Repack: what is needed of the latter goes into new packs. Remove: a
condemned pack goes when all who were writing when it was condemned have ended and no snapshot needs it,
and, where somebody was reading then, when that one has ended or the condemnation is old enough.

Interrupted anywhere it leaves packs that are not needed, or a condemnation, which the next prune takes up.
Where anything cannot be read that says what is needed, nothing is removed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import (
    BlobError,
    CasfsError,
    IndexDamagedError,
    IndexUnusableError,
    IntegrityError,
    NotFoundError,
)
from casfs.format.codec import BlobKind
from casfs.format.pack import BLOB_HEADER, ENTRY, HEADER, SESSION_HEADER, TRAILER, parse_session
from casfs.index.schema import Location, PackRecord
from casfs.maintenance.evacuate import Evacuator
from casfs.monitor import Monitor
from casfs.repository.repository import Repository
from casfs.repository.used_blobs import UsedBlobs
from casfs.storage.locks import LockMode, LockRecord
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import (
    RemovalNotice,
    publish_notice,
    read_notices,
    replace_notice,
)
from casfs.store.writer import PACK_BLOBS

log = logging.getLogger(__name__)


def remove_unneeded_sessions(repository: Repository) -> int:
    """Remove the sessions that no pack and no snapshot names; returns how many those were.

    Where anything cannot be read, or another process writes, none is removed.
    """
    encryption = repository.config.encryption
    if encryption is None:
        return 0
    from casfs.crypto.session_files import remove_session, session_ids

    storage = repository.store.storage
    listed = session_ids(storage)
    if any(lock.mode != LockMode.READER for lock in repository.other_locks().values()):
        return 0
    needed = {bytes.fromhex(encryption.session)}
    try:
        for pack, _ in repository.store.stored_packs():
            head = storage.read(pack_name(pack), 0, SESSION_HEADER)
            needed.add(parse_session(pack, head)[0])
        for snapshot_id in repository.snapshot_ids():
            envelope = repository.envelope(snapshot_id)
            if envelope is not None:
                needed.add(envelope.session)
    except CasfsError as error:
        log.info("no session is removed: %s", error)
        return 0
    gone = [session_id for session_id in listed if session_id not in needed]
    for session_id in gone:
        remove_session(storage, session_id)
    return len(gone)


log = logging.getLogger(__name__)

DEFAULT_UNUSED_SHARE = 0.25
"""Packs of which more is not needed are packed anew: that bounds what is kept in vain to a third."""

DEFAULT_MARGIN_S = 86_400
"""How long packs stay for the sake of readers that were there when they were condemned."""

_SMALL_PACK_BYTES = 8 * 1024 * 1024
_MANY_SMALL_PACKS = 16
"""So many small packs, as many small backups leave them, are packed into larger ones.

One that is full of tiny blobs would come out as it is."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """`unused_share` 0 to 1 of a pack from which on it is packed anew; `margin_s` for readers."""

    unused_share: float = DEFAULT_UNUSED_SHARE
    margin_s: float = DEFAULT_MARGIN_S
    dry_run: bool = False


@dataclass(slots=True)
class PruneResult:
    """What was found and done; sizes in bytes of packs.

    `waiting_packs` are condemned and stay for now, for the sake of `waited_for`.
    """

    snapshots: int = 0
    packs: int = 0
    needed_blobs: int = 0
    unneeded_blobs: int = 0
    removed_packs: int = 0
    removed_bytes: int = 0
    repacked_packs: int = 0
    repacked_bytes: int = 0
    new_bytes: int = 0
    waiting_packs: int = 0
    waiting_bytes: int = 0
    waited_for: list[str] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        """Return what the repository is smaller by."""
        return self.removed_bytes - self.new_bytes


@dataclass(slots=True)
class _PackUsage:
    """What is needed of a pack: payloads with their record headers, in bytes."""

    needed_bytes: int = 0
    has_damaged: bool = False


class Pruner:
    """Prune one repository that is open for writing with a lock that tends it; used once."""

    def __init__(self, repository: Repository, options: PruneOptions, monitor: Monitor) -> None:
        self.result = PruneResult()
        self._repository = repository
        self._storage = repository.store.storage
        self._index = repository.store.index
        self._options = options
        self._monitor = monitor
        self._needs = UsedBlobs(repository)
        self._rescuer = Evacuator(repository, self._needs)
        self._marked: set[SnapshotId] = set()
        self._records: dict[int, PackRecord] = {}
        self._in_flight: dict[int, str] = {}
        self._removed: set[int] = set()
        self._bad: dict[Digest, Location] = {}

    def prune(self) -> PruneResult:
        """Do it; raises IntegrityError, and removes nothing, where what is needed is damaged."""
        locks = self._repository.other_locks()
        # Before anything is marked by ordinals: what another process makes of the index is seen by them.
        self._records = {record.ordinal: record for record in self._index.packs()}
        self._mark()
        uses = self._pack_usage()
        if self._bad and not self._options.dry_run and self._rescuer.copy_damaged(self._bad):
            uses = self._pack_usage()
        self.result.packs = len(self._records)
        repacked = self._select_repack(uses)
        unneeded = self._records.keys() - uses.keys()
        self._in_flight = self._written_since(unneeded | repacked, locks)
        repacked -= self._in_flight.keys()
        unneeded -= self._in_flight.keys()
        if self._options.dry_run:
            self._estimate(uses, unneeded | repacked, repacked)
            return self.result
        # What needs no room goes first: the disk may be full.
        self._mark_for_removal(unneeded)
        kept = self._rescuer.copy_needed_blobs(self._records, unneeded)
        waiting = unneeded - self._remove(self._recheck(unneeded) - kept)
        if repacked:
            self._mark_for_removal(repacked | waiting)
            try:
                self._repack(repacked)
            except BaseException:
                self._unmark(waiting)
                raise
            kept = self._rescuer.copy_needed_blobs(self._records, repacked | waiting)
            self._remove(self._recheck(repacked | waiting) - kept)
        self._index.keep_complete(set(self._repository.snapshot_ids()))
        remove_unneeded_sessions(self._repository)
        return self.result

    def _unmark(self, waiting: set[int]) -> None:
        """Have only what was condemned before be so, where packing anew has failed."""
        try:
            self._mark_for_removal(waiting)
        except CasfsError as error:
            log.warning("%s; the next prune goes on from here", error)

    def _mark(self) -> None:
        """Mark what snapshots need that were not looked at yet.

        One that goes while it is looked at may have been replaced by another, so the list is read
        again until nothing new is on it.
        """
        while new := set(self._repository.snapshot_ids()) - self._marked:
            for snapshot_id in sorted(new):
                try:
                    self._needs.add(self._repository.load(snapshot_id).root)
                except NotFoundError:
                    continue
                except IntegrityError as error:
                    raise UsedBlobsUnknownError(snapshot_id, error) from error
                finally:
                    self._marked.add(snapshot_id)
                self.result.snapshots += 1
                self._monitor.progress.files += 1

    def _pack_usage(self) -> dict[int, _PackUsage]:
        """Return what is needed of each pack, by ordinal; packs of which nothing is are not in it."""
        uses: dict[int, _PackUsage] = {}
        needed = 0
        total = 0
        self._bad = {}
        elsewhere = self._repository.store.found_elsewhere
        for digest, location in self._index.blobs():
            total += 1
            if location.ordinal in self._needs.blobs:
                if location.is_damaged or digest in elsewhere:
                    self._bad[digest] = location
                needed += 1
                use = uses.setdefault(location.pack, _PackUsage())
                use.needed_bytes += location.stored_bytes + BLOB_HEADER.size
                use.has_damaged |= location.is_damaged
        if needed < self._needs.count:
            self._require_same_index()
            raise IndexUnusableError(
                f"the index lists {needed} of {self._needs.count} blobs that it knew a moment ago, so what "
                "is needed is not known for sure; nothing more was removed (casfs repair index)"
            )
        self.result.needed_blobs = needed
        self.result.unneeded_blobs = total - needed
        return uses

    def _pending(self) -> dict[int, RemovalNotice]:
        """Return the packs that are condemned, with the condemnation of each."""
        by_name = {record.pack: ordinal for ordinal, record in self._records.items()}
        return {
            by_name[pack]: condemnation
            for condemnation in read_notices(self._storage).values()
            for pack in condemnation.pack_ids()
            if pack in by_name
        }

    def _select_repack(self, uses: dict[int, _PackUsage]) -> set[int]:
        """Return the packs whose needed blobs are to be packed anew."""
        chosen, small = set(), set()
        for ordinal, use in uses.items():
            record = self._records.get(ordinal)
            # What is damaged in a pack may be all that is left of it: it stays as it is. Where what is
            # needed is sound, or stored elsewhere by now, nobody needs the damaged pack.
            if record is None or use.has_damaged:
                continue
            unused_bytes = record.pack_bytes - use.needed_bytes - _directory_bytes(record)
            if record.is_damaged or unused_bytes > self._options.unused_share * record.pack_bytes:
                chosen.add(ordinal)
            elif record.pack_bytes < _SMALL_PACK_BYTES and record.blobs < PACK_BLOBS // 2:
                small.add(ordinal)
        return chosen | small if len(small) >= _MANY_SMALL_PACKS else chosen

    def _written_since(self, ordinals: set[int], locks: dict[str, LockRecord]) -> dict[int, str]:
        """Return which packs may be those of a backup that is running, with the name of its lock.

        To condemn them would be safe, but its own data would not be trusted until the next prune.
        """
        writers = {n: lock for n, lock in locks.items() if lock.mode != LockMode.READER}
        if not writers:
            return {}
        first = min(writers, key=lambda name: writers[name].since_ns)
        young = {}
        for ordinal in ordinals - self._pending().keys():
            try:
                written_ns = self._storage.mtime_ns(pack_name(self._records[ordinal].pack))
            except NotFoundError:
                continue
            if written_ns >= writers[first].since_ns:
                young[ordinal] = first
        return young

    def _estimate(self, uses: dict[int, _PackUsage], removed: set[int], repacked: set[int]) -> None:
        result = self.result
        result.repacked_packs = len(repacked)
        result.repacked_bytes = sum(self._records[n].pack_bytes for n in repacked)
        result.new_bytes = sum(uses[n].needed_bytes for n in repacked)
        result.removed_packs = len(removed)
        result.removed_bytes = sum(self._records[n].pack_bytes for n in removed)

    def _mark_for_removal(self, ordinals: set[int]) -> None:
        """Tell everybody which packs are not to be relied on, and learn who may be doing so."""
        self._require_same_index()
        packs = {self._records[ordinal].pack for ordinal in ordinals}
        fresh = set(packs)
        for name, condemnation in read_notices(self._storage).items():
            fresh -= condemnation.pack_ids()
            replace_notice(self._storage, name, condemnation.only(packs))
        if fresh:
            names = tuple(sorted(pack.hex() for pack in fresh))
            publish_notice(self._storage, RemovalNotice(int(time.time()), names))
        self._index.mark_for_removal(ordinals)
        # Only now does everybody who begins to write see it.
        locks = self._repository.other_locks()
        readers = tuple(sorted(n for n, lock in locks.items() if lock.mode == LockMode.READER))
        writers = tuple(sorted(locks.keys() - set(readers)))
        for name, condemnation in read_notices(self._storage).items():
            if condemnation.writers is None:
                asked = replace(condemnation, writers=writers, readers=readers)
                replace_notice(self._storage, name, asked)

    def _repack(self, chosen: set[int]) -> None:
        """Store what is needed of some condemned packs in new ones."""
        store = self._repository.store
        self._monitor.progress.total_bytes = sum(self._records[n].pack_bytes for n in chosen)
        writer = self._repository.writer()
        try:
            for ordinal in sorted(chosen):
                record = self._records[ordinal]
                entries = store.entries(record.pack)
                for entry in sorted(entries, key=lambda entry: entry.offset):
                    location = self._index.lookup(entry.digest)
                    if (
                        location is None
                        or location.pack != ordinal
                        or location.ordinal not in self._needs.blobs
                    ):
                        continue
                    try:
                        plain = store.read(entry.digest)
                    except BlobError as error:
                        # It stays where it is, and its pack with it.
                        log.warning("%s; its pack is not touched", error)
                        self._index.mark_blobs(ordinal, [entry.digest])
                        continue
                    writer.put(BlobKind(location.kind), entry.digest, plain)
                self.result.repacked_packs += 1
                self.result.repacked_bytes += record.pack_bytes
                self._monitor.progress.done_bytes += record.pack_bytes
            stats = writer.finish()
        finally:
            writer.close()
        self.result.new_bytes = stats.new_stored_bytes

    def _recheck(self, candidates: set[int]) -> set[int]:
        """Return which condemned packs may go; what is needed after all is condemned no longer.

        The locks are read before the snapshots: who wrote when a pack was condemned, and does so no
        longer, has published what it will.
        """
        locks = self._repository.other_locks()
        self._mark()
        self._require_same_index()
        unneeded = candidates - self._pack_usage().keys()
        condemnations = self._pending()
        removable = set()
        waited_for = set(self._in_flight.values())
        self.result.waiting_packs = len(self._in_flight)
        self.result.waiting_bytes = sum(self._records[n].pack_bytes for n in self._in_flight)
        for ordinal in unneeded:
            condemnation = condemnations.get(ordinal)
            holders = self._holders(condemnation, locks) if condemnation is not None else set(locks)
            if not holders and condemnation is not None:
                removable.add(ordinal)
                continue
            waited_for |= holders
            self.result.waiting_packs += 1
            self.result.waiting_bytes += self._records[ordinal].pack_bytes
        self.result.waited_for = sorted(waited_for)
        if unneeded != candidates:
            self._mark_for_removal(unneeded)
        return removable

    def _holders(self, condemnation: RemovalNotice, locks: dict[str, LockRecord]) -> set[str]:
        """Return the names of the locks for whose sake the condemned packs stay."""
        if condemnation.writers is None:
            return set(locks)
        holders = locks.keys() & set(condemnation.writers)
        if time.time() - condemnation.time_s < self._options.margin_s:
            holders |= locks.keys() & set(condemnation.readers)
        return holders

    def _remove(self, ordinals: set[int]) -> set[int]:
        """Remove packs from the index, then from the storage, then their condemnation; return them."""
        if not ordinals:
            return ordinals
        packs = {ordinal: self._records[ordinal].pack for ordinal in sorted(ordinals)}
        try:
            same = self._index.remove_packs(packs)
        except IndexDamagedError:
            raise  # what it told of the packs may be wrong as well
        except IndexUnusableError as error:
            # A full disk has no room for that. Without the packs it has; should this end before the
            # index knows it, the next who opens the repository sees that they are gone.
            log.warning("%s; the packs are removed first", error)
            self._require_same_index()
            self._unlink(ordinals)
            self._removed |= ordinals
            self._index.remove_packs(packs)
        else:
            if not same:
                raise _IndexReplacedError
            self._removed |= ordinals
            self._unlink(ordinals)
        removed = set(packs.values())
        for name, condemnation in read_notices(self._storage).items():
            condemned = condemnation.pack_ids()
            if not condemned.isdisjoint(removed):
                replace_notice(self._storage, name, condemnation.only(condemned - removed))
        return ordinals

    def _require_same_index(self) -> None:
        """Raise where another process has built the index anew: all ordinals mean nothing then.

        That happens when a pack vanishes by other hands while this prune runs.
        """
        current = {record.ordinal: record.pack for record in self._index.packs()}
        for ordinal, record in self._records.items():
            if ordinal not in self._removed and current.get(ordinal) != record.pack:
                raise _IndexReplacedError

    def _unlink(self, ordinals: set[int]) -> None:
        for ordinal in sorted(ordinals):
            record = self._records[ordinal]
            self._storage.delete(pack_name(record.pack))
            self.result.removed_packs += 1
            self.result.removed_bytes += record.pack_bytes


class _IndexReplacedError(IndexUnusableError):
    """The index is another one than it was when this prune began."""

    def __str__(self) -> str:
        return "the index was built anew while this prune ran; what is left is for the next prune"


class UsedBlobsUnknownError(IntegrityError):
    """What a snapshot needs cannot be read, so nothing is known to be unneeded."""

    def __init__(self, snapshot_id: SnapshotId, cause: IntegrityError) -> None:
        super().__init__(snapshot_id, cause)
        self.snapshot_id = snapshot_id
        self.cause = cause

    def __str__(self) -> str:
        return (
            f"what snapshot {short_id(self.snapshot_id)} needs is not known for sure: {self.cause}; "
            "nothing was removed (casfs check tells what is lost, casfs repair index finds again what only "
            "the index has lost, a new backup may heal the rest, and casfs repair snapshots gives it up)"
        )


def _directory_bytes(record: PackRecord) -> int:
    """Return what a pack takes besides its blobs."""
    return HEADER.size + BLOB_HEADER.size + record.blobs * ENTRY.size + TRAILER.size
