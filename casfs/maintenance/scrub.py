"""Scrub: compare the packs with the index, and their bytes with every digest recorded for them.

Two threads read; the calling thread gathers their findings and is the only one that changes the result
and the index. The index records when a pack was verified as a whole. Damaged blobs are marked in the index,
so that no backup counts them as stored: a backup that reads the data again stores it again, which restores
older snapshots too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from casfs.digest import Digest, PackId
from casfs.errors import CasfsError, KeyMissingError, NotFoundError
from casfs.format.pack import PackEntry, PackRef
from casfs.index.schema import Location, PackRecord
from casfs.maintenance.delta_check import directory_digest
from casfs.maintenance.findings import Finding, is_refused, reason_of
from casfs.maintenance.pack_verification import PackVerification
from casfs.monitor import Monitor, Unit
from casfs.repository.repository import Repository

_LOOKUP_BATCH = 4096
_THREADS = 2
_MOST_THREADS = 4
"""Packs that are read at the same time: of a local repository, and of one at a distance."""

_MAX_UNKNOWN = 100_000
_SAVE_INTERVAL_S = 5.0
"""How often the verified packs are recorded durably; an interruption loses at most this much work."""


@dataclass(frozen=True, slots=True)
class PackSelection:
    """The packs to read: a share (0 to 1) of them, last verified more than `older_than_s` ago.

    The packs that were verified longest ago come first. No pack is begun after `max_duration_s`.
    """

    share: float = 1.0
    older_than_s: float | None = None
    max_duration_s: float | None = None


@dataclass(slots=True)
class ScrubResult:
    """Counts of the packs, blobs and bytes read, and the findings.

    `packs_left` were selected, but the time ran out. `damaged` are the blobs without an intact copy, each
    with the pack that should hold it. `unknown` are blobs that packs hold and the index lacks. `unreadable`
    are packs that this user has no permission to read, and the directories and files with data in them: they
    were not checked.
    """

    packs: int = 0
    packs_read: int = 0
    packs_left: int = 0
    blobs_read: int = 0
    read_bytes: int = 0
    damage: list[Finding] = field(default_factory=list)
    damaged: dict[Digest, PackId] = field(default_factory=dict)
    unknown: dict[Digest, PackId] = field(default_factory=dict)
    unreadable: list[Finding] = field(default_factory=list)
    unreadable_packs: set[PackId] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Read:
    """The result of reading one pack."""

    entries: list[PackEntry]
    damage: list[Finding]
    is_intact: bool
    counted_bytes: int = 0
    """The bytes that the progress has counted."""


class Scrubber:
    """Check the packs of one repository, and add the findings to `result`.

    Use each instance for one scrub. `directories` gets the size and the `directory_digest` of each pack with
    an intact directory, where the repository has index deltas.
    """

    def __init__(self, repository: Repository, result: ScrubResult, monitor: Monitor) -> None:
        self.result = result
        self._repository = repository
        self._store = repository.store
        self._report = result.damage.append
        self._monitor = monitor
        requests = self._store.storage.capabilities.parallel_requests
        self._threads = _THREADS if requests == 1 else min(requests, _MOST_THREADS)
        self._ordinals: dict[int, PackRef] = {}
        self._by_name: dict[PackRef, int] = {}
        self._verified: list[int] = []
        # Damaged packs, by ordinal, with the blobs that were found in them all the same.
        self._damaged: dict[int, set[Digest]] = {}
        self._saved_at = time.monotonic()
        self.directories: dict[PackRef, tuple[int, bytes]] = {}

    def scrub(self, choice: PackSelection | None) -> None:
        """Compare every pack with the index, and read the packs of `choice` (None: no pack)."""
        # A backup may be running: packs that the index names now are in the storage when it is listed
        # below, and packs beyond those are newer than this check.
        entries_before = self._store.index.blob_count()
        records = self._store.index.packs()
        stored = dict(self._store.stored_packs())
        found_before = self._damage_of_records(records, stored)
        self.result.packs = len(stored)
        indexed = 0
        is_intact = not found_before
        progress = self._monitor.progress
        progress.begin("comparing packs with the index", Unit.PACKS, total_items=len(stored))
        with ThreadPoolExecutor(self._threads, "casfs-check") as pool:
            for pack, entries, damage in self._directories(pool, sorted(stored.items())):
                progress.items += 1
                is_intact &= not damage
                self.result.damage += damage
                if damage:
                    self._mark_damaged(pack)
                elif entries and self._repository.config.has_deltas:
                    # Without entries it was removed meanwhile, or this user may not read it.
                    self.directories[pack] = stored[pack], directory_digest(entries)
                ordinal = self._by_name.get(pack)
                if ordinal is not None:
                    indexed += self._compare_index(pack, entries)
                    if damage or ordinal in self._damaged:
                        self._damaged[ordinal] = {entry.digest for entry in entries}
            if choice is not None:
                self._read_selected(pool, stored, choice)
        self._mark_unfound()
        self._look_elsewhere()
        unchanged = records == self._store.index.packs()
        if (
            indexed < entries_before
            and is_intact
            and unchanged
            and not self.result.unreadable_packs
        ):
            message = "it has entries that no pack holds; run `casfs repair index`"
            self._report(Finding("index", message))

    def _damage_of_records(self, records: list[PackRecord], stored: dict[PackRef, int]) -> bool:
        """Compare the index's list of packs with the storage; return whether any pack differs."""
        any_damage = False
        for record in records:
            if record.pack not in stored and self._is_gone(record.ordinal):
                continue
            self._ordinals[record.ordinal] = record.pack
            self._by_name[record.pack] = record.ordinal
            if record.pack not in stored:
                message = "the index names it, but it is missing"
            elif stored[record.pack] != record.pack_bytes:
                message = (
                    f"size mismatch: {stored[record.pack]} bytes, {record.pack_bytes} were stored"
                )
            else:
                continue
            any_damage = True
            self._damaged[record.ordinal] = set()
            self._report(Finding("pack", message, pack=record.pack.id))
        return any_damage

    def _is_gone(self, ordinal: int) -> bool:
        """Return whether a prune has removed a pack from the index since this check began."""
        return all(record.ordinal != ordinal for record in self._store.index.packs())

    def _is_removed(self, pack: PackRef) -> bool:
        """Return whether a prune has removed a pack from the storage since this check began."""
        ordinal = self._by_name.get(pack)
        if ordinal is not None:
            return self._is_gone(ordinal)
        return all(name != pack for name, _ in self._store.stored_packs())

    def _directories(
        self, pool: ThreadPoolExecutor, jobs: list[tuple[PackRef, int]]
    ) -> Iterator[tuple[PackRef, list[PackEntry], list[Finding]]]:
        """Yield the results of `_check_directory` in order.

        At most as many directories as threads are in memory: the entries of many would fill it.
        """
        running: deque[Future[tuple[PackRef, list[PackEntry], list[Finding]]]] = deque()
        for job in jobs:
            running.append(pool.submit(self._check_directory, job))
            if len(running) >= self._threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _check_directory(
        self, job: tuple[PackRef, int]
    ) -> tuple[PackRef, list[PackEntry], list[Finding]]:
        pack, pack_bytes = job
        try:
            return pack, self._store.read_directory(pack, pack_bytes), []
        except NotFoundError as error:
            if self._is_removed(pack):
                return pack, [], []
            return pack, [], [Finding("pack", reason_of(error), pack.id)]
        except CasfsError as error:
            damage = [Finding("pack", reason_of(error), pack.id)]
            if is_refused(error) or isinstance(error, KeyMissingError):
                if pack.id not in self.result.unreadable_packs:
                    self.result.unreadable_packs.add(pack.id)
                    self.result.unreadable += damage
                return pack, [], []
        try:
            return pack, self._store.salvage_directory(pack, pack_bytes), damage
        except CasfsError as unreadable:
            return pack, [], [*damage, Finding("pack", reason_of(unreadable), pack.id)]

    def _compare_index(self, pack: PackRef, entries: list[PackEntry]) -> int:
        """Compare a pack's directory with the index; return the number of index entries into it."""
        count = 0
        for entry, location in self._located(entries):
            if location is None:
                self._record_unknown(pack, entry.digest)
            elif self._ordinals.get(location.pack) == pack:
                count += 1
                if not location.matches(entry):
                    message = "its location of the blob differs from the pack's directory"
                    self._report(Finding("index", message, pack.id, entry.digest))
                if location.is_damaged:
                    self.result.damaged[entry.digest] = pack.id
        return count

    def _located(self, entries: list[PackEntry]) -> Iterator[tuple[PackEntry, Location | None]]:
        """Yield each entry with its location in the index, looked up in batches."""
        for begin in range(0, len(entries), _LOOKUP_BATCH):
            batch = entries[begin : begin + _LOOKUP_BATCH]
            yield from zip(
                batch, self._store.index.lookup_many([entry.digest for entry in batch]), strict=True
            )

    def _record_unknown(self, pack: PackRef, digest: Digest) -> None:
        """Record a stored blob that the index lacks.

        This is no damage by itself. Where two concurrent backups stored a blob twice, the index names one
        of the two packs; a prune that removes that pack as unneeded may leave the other.
        """
        if len(self.result.unknown) < _MAX_UNKNOWN:
            self.result.unknown[digest] = pack.id

    def _read_selected(
        self, pool: ThreadPoolExecutor, stored: dict[PackRef, int], choice: PackSelection
    ) -> None:
        wanted = self._select_packs(stored, choice)
        self._monitor.progress.begin(
            "reading packs",
            Unit.PACKS,
            total_items=len(wanted),
            total_bytes=sum(stored[pack] for pack in wanted),
        )
        began = time.monotonic()
        rest = iter(wanted)
        running: list[tuple[PackRef, Future[_Read]]] = []
        try:
            while True:
                late = (
                    choice.max_duration_s is not None
                    and time.monotonic() - began >= choice.max_duration_s
                )
                # One pack more than there are threads, so that no thread waits.
                while not late and len(running) <= self._threads:
                    pack = next(rest, None)
                    if pack is None:
                        break
                    running.append((pack, pool.submit(self._read_pack, pack, stored[pack])))
                if not running:
                    break
                pack, future = running.pop(0)
                self._merge(pack, stored[pack], future.result())
        finally:
            for _, future in running:
                future.cancel()
            self._save_verified()
        self.result.packs_left = sum(1 for _ in rest)

    def _select_packs(self, stored: dict[PackRef, int], choice: PackSelection) -> list[PackRef]:
        """Return the packs to read; those verified longest ago come first."""
        verified = {record.pack: record.verified_s for record in self._store.index.packs()}
        packs = sorted(_share_of(stored, choice.share), key=lambda pack: verified.get(pack, 0))
        if choice.older_than_s is not None:
            limit = time.time() - choice.older_than_s
            packs = [pack for pack in packs if verified.get(pack, 0) <= limit]
        return [pack for pack in packs if pack.id not in self.result.unreadable_packs]

    def _merge(self, pack: PackRef, pack_bytes: int, read: _Read) -> None:
        """Add what was read of a pack to the result and to the index."""
        entries, damage = read.entries, read.damage
        ordinal = self._by_name.get(pack)
        if damage and self._is_removed(pack):
            return
        self.result.damage += damage
        self.result.packs_read += 1
        self.result.read_bytes += pack_bytes
        self.result.blobs_read += len(entries)
        self._monitor.progress.items += 1
        self._monitor.progress.add_bytes(pack_bytes - read.counted_bytes)
        if ordinal is None:
            return
        damaged = {finding.blob for finding in damage if finding.blob is not None}
        if read.is_intact:
            self._verified.append(ordinal)
            if not self._store.index.readonly and self._store.index.is_claimed(ordinal):
                self._store.index.settle_claims(ordinal, {e.digest: e.place() for e in entries})
        else:
            self._damaged.setdefault(ordinal, {entry.digest for entry in entries})
            if damage:
                self._mark_damaged(pack)
        for digest in damaged:
            location = self._store.index.lookup(digest)
            # Where two packs hold a blob, readers use only the copy that the index names.
            if location is not None and location.pack == ordinal:
                self.result.damaged[digest] = pack.id
        # A directory, salvaged or foreign, may name a blob twice.
        intact = {
            entry.digest
            for entry in entries
            if entry.digest in self.result.damaged and entry.digest not in damaged
        }
        for digest in intact:
            del self.result.damaged[digest]
        if (damaged or intact) and not self._store.index.readonly:
            self._store.index.mark_blobs(ordinal, damaged, intact)
        if time.monotonic() - self._saved_at > _SAVE_INTERVAL_S:
            self._save_verified()

    def _mark_damaged(self, pack: PackRef) -> None:
        """Mark a pack damaged in the index; the next prune repacks its needed blobs."""
        ordinal = self._by_name.get(pack)
        if ordinal is not None and not self._store.index.readonly:
            self._store.index.mark_damaged([ordinal])

    def _mark_unfound(self) -> None:
        """Mark the blobs that a damaged pack should hold and that were not found in it."""
        if not self._damaged:
            return
        unfound: dict[int, list[Digest]] = {}
        for digest, location in self._store.index.blobs():
            found = self._damaged.get(location.pack)
            if found is not None and digest not in found:
                unfound.setdefault(location.pack, []).append(digest)
        for ordinal, digests in unfound.items():
            if self._is_gone(ordinal):
                continue
            pack = self._ordinals[ordinal]
            self.result.damaged.update(dict.fromkeys(digests, pack.id))
            if not self._store.index.readonly:
                self._store.index.mark_blobs(ordinal, digests)

    def _look_elsewhere(self) -> None:
        """Drop blobs from `damaged` that another pack holds intact: every reader finds them there."""
        for digest in list(self.result.damaged):
            try:
                self._store.read(digest)
            except CasfsError:
                continue
            del self.result.damaged[digest]

    def _save_verified(self) -> None:
        if self._verified and not self._store.index.readonly:
            self._store.index.mark_verified(self._verified, int(time.time()))
        self._verified = []
        self._saved_at = time.monotonic()

    def _read_pack(self, pack: PackRef, pack_bytes: int) -> _Read:
        """Recompute the digest of a pack and of every blob in it, in one pass."""
        # Damage of the directory was reported when the directories were checked.
        _, entries, reported = self._check_directory((pack, pack_bytes))
        if reported and not entries:
            return _Read(entries, [], False)
        damage, read_bytes = PackVerification(
            self._store, pack, self._monitor.progress.add_bytes
        ).verify(pack_bytes, entries)
        return _Read(entries, damage, not (damage or reported), read_bytes)


def _share_of(packs: Iterable[PackRef], share: float) -> Iterator[PackRef]:
    """Yield the packs of a share: the same packs for the same share, evenly spread."""
    limit = int(share * 2**64)
    return (pack for pack in packs if int.from_bytes(pack.id[:8], "big") < limit)
