"""Scrub: compare the packs with the index, and their bytes with every digest recorded for them.

Two threads read; the calling thread gathers their findings and is the only one that changes the result
and the index. The index records when a pack was verified as a whole. Damaged blobs are marked in the index,
so that no backup counts them as stored: a backup that reads the data again stores it again, which restores
older snapshots too.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

from blake3 import blake3

from casfs.digest import Digest, PackId, SnapshotId
from casfs.errors import (
    BlobError,
    CasfsError,
    KeyMissingError,
    NotFoundError,
    PackError,
    StorageError,
)
from casfs.format.codec import ENCRYPTED
from casfs.format.group import group_bytes
from casfs.format.pack import (
    BLOB_HEADER,
    ENCRYPTED_KIND,
    TRAILER,
    PackEntry,
    PackRef,
    parse_record_header,
)
from casfs.index.schema import Location, PackRecord
from casfs.monitor import Monitor, Unit
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name

_WINDOW_BYTES = 8 * 1024 * 1024
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOBS = 512
_LOOKUP_BATCH = 4096
_THREADS = 2
_MOST_THREADS = 4
"""Packs that are read at the same time: of a local repository, and of one at a distance."""

_REFUSED = frozenset([errno.EACCES, errno.EPERM])
_MAX_UNKNOWN = 100_000
_SAVE_INTERVAL_S = 5.0
"""How often the verified packs are recorded durably; an interruption loses at most this much work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A damaged, missing or inconsistent object.

    `what` is the kind of object: "pack", "blob", "index", "delta", "session", "snapshot", "tree" or "file".
    Fields that do not apply are None. `ranges` are the lost ranges of a file: begin and end in bytes.
    """

    what: str
    message: str
    pack: PackId | None = None
    blob: Digest | None = None
    snapshot: SnapshotId | None = None
    path: bytes | None = None
    ranges: tuple[tuple[int, int], ...] = ()


def directory_digest(entries: Iterable[PackEntry]) -> bytes:
    """Return 16 bytes that identify the entries of a pack, in any order."""
    hasher = blake3()
    for e in sorted(entries, key=PackEntry.place):
        hasher.update(e.pack())
        hasher.update(e.offset.to_bytes(8, "little"))
    return hasher.digest(16)


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
            return pack, [], [Finding("pack", _reason(error), pack.id)]
        except KeyMissingError:
            raise
        except CasfsError as error:
            damage = [Finding("pack", _reason(error), pack.id)]
            if is_refused(error):
                if pack.id not in self.result.unreadable_packs:
                    self.result.unreadable_packs.add(pack.id)
                    self.result.unreadable += damage
                return pack, [], []
        try:
            return pack, self._store.salvage_directory(pack, pack_bytes), damage
        except CasfsError as unreadable:
            return pack, [], [*damage, Finding("pack", _reason(unreadable), pack.id)]

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
        damage: list[Finding] = []
        whole = blake3()
        reader = _PackReader(self._repository, pack, whole, self._monitor.progress.add_bytes)
        try:
            for batch in _batches(sorted(entries, key=PackEntry.place)):
                wanted: list[tuple[PackEntry, bytes]] = []
                for blobs in batch:
                    entry = blobs[0]
                    begin = max(entry.offset - BLOB_HEADER.size, 0)
                    record = reader.read(begin, entry.offset - begin + entry.stored_bytes)
                    payload = record[entry.offset - begin :]
                    wanted += [(blob, payload) for blob in blobs]
                    if not _has_header(record, blobs):
                        message = f"the header of its record at byte {begin} is damaged"
                        damage.append(Finding("pack", message, pack.id))
                damage += self._verify(pack, wanted)
            reader.read(pack_bytes - TRAILER.size, TRAILER.size)
        except CasfsError as error:
            damage = [
                Finding("pack", _reason(error), pack.id),
                *self._read_one_by_one(pack, entries),
            ]
            return _Read(entries, damage, False, reader.done_bytes)
        if whole.digest() != pack.id:
            damage.append(Finding("pack", "digest mismatch", pack.id))
        return _Read(entries, damage, not (damage or reported), reader.done_bytes)

    def _verify(self, pack: PackRef, wanted: list[tuple[PackEntry, bytes]]) -> Iterator[Finding]:
        """Yield a finding for each damaged blob among entries whose payloads were read."""
        plains = self._store.decode_many(pack, wanted)
        for (entry, payload), plain in zip(wanted, plains, strict=True):
            if plain is None:
                try:
                    self._store.decode(pack, entry, payload)
                except BlobError as error:
                    yield Finding("blob", error.reason, pack.id, entry.digest)

    def _read_one_by_one(self, pack: PackRef, entries: list[PackEntry]) -> Iterator[Finding]:
        """Yield a finding for each damaged blob of a pack that cannot be read from start to end.

        A group is read once for all its blobs: a bad sector may take a disk many seconds.
        """
        for (offset, stored_bytes), found in groupby(
            sorted(entries, key=PackEntry.place), lambda entry: (entry.offset, entry.stored_bytes)
        ):
            blobs = list(found)
            try:
                payload = self._store.bulk_storage.read(pack_name(pack), offset, stored_bytes)
                yield from list(self._verify(pack, [(entry, payload) for entry in blobs]))
            except CasfsError as error:
                for entry in blobs:
                    yield Finding("blob", str(error), pack.id, entry.digest)


def _has_header(record: bytes, blobs: list[PackEntry]) -> bool:
    """Return whether a record begins with the header that the directory entries of its blobs stand for."""
    entry = blobs[0]
    plain_bytes = entry.plain_bytes
    if entry.is_grouped:
        plain_bytes = group_bytes([blob.plain_bytes for blob in blobs])
    expected = (entry.kind, entry.codec, entry.stored_bytes, plain_bytes)
    if entry.codec & ENCRYPTED:
        # The rest is encrypted with the payload.
        expected = (ENCRYPTED_KIND, ENCRYPTED, entry.stored_bytes, 0)
    return parse_record_header(record) == expected


def is_refused(error: CasfsError) -> bool:
    """Return whether an object could not be read because this user has no permission to read it."""
    return isinstance(error, StorageError) and error.cause.errno in _REFUSED


def _batches(entries: list[PackEntry]) -> Iterator[list[list[PackEntry]]]:
    """Yield runs of records, bounded in number and bytes, that are in memory at the same time.

    A record is the list of the entries of its blobs.
    """
    batch: list[list[PackEntry]] = []
    plain_bytes = stored_bytes = 0
    for entry in entries:
        if batch and entry.shares_group(batch[-1][-1]):
            batch[-1].append(entry)
        else:
            # A payload that is much larger than its blob is damaged, and takes memory all the same.
            most_bytes = max(plain_bytes + entry.plain_bytes, stored_bytes + entry.stored_bytes)
            if most_bytes > _BATCH_BYTES or len(batch) >= _BATCH_BLOBS:
                if batch:
                    yield batch
                batch, plain_bytes, stored_bytes = [], 0, 0
            batch.append([entry])
            stored_bytes += entry.stored_bytes
        plain_bytes += entry.plain_bytes
    if batch:
        yield batch


class _PackReader:
    """Read a pack from start to end in windows, and hash every byte on the way.

    `on_bytes` is called with the size of each window; `done_bytes` is their sum.
    """

    def __init__(
        self,
        repository: Repository,
        pack: PackRef,
        whole: blake3,
        on_bytes: Callable[[int], None],
    ) -> None:
        self.done_bytes = 0
        self._on_bytes = on_bytes
        self._storage = repository.store.bulk_storage
        self._name = pack_name(pack)
        self._pack = pack
        self._whole = whole
        self._begin = 0
        self._data = b""

    def read(self, offset: int, size: int) -> bytes:
        """Return a range that begins at or after the end of the previous one; hash the gap too.

        Raises PackError where the pack ends before the range does.
        """
        while offset + size > self._begin + len(self._data):
            keep = self._data[max(offset - self._begin, 0) :]
            end = self._begin + len(self._data)
            more = self._storage.read(self._name, end, max(_WINDOW_BYTES, size))
            if not more:
                raise PackError(self._pack.id, "it ends before its last blob")
            self._whole.update(more)
            self.done_bytes += len(more)
            self._on_bytes(len(more))
            self._data = keep + more
            self._begin = end - len(keep)
        start = offset - self._begin
        return self._data[start : start + size]


def _share_of(packs: Iterable[PackRef], share: float) -> Iterator[PackRef]:
    """Yield the packs of a share: the same packs for the same share, evenly spread."""
    limit = int(share * 2**64)
    return (pack for pack in packs if int.from_bytes(pack.id[:8], "big") < limit)


def _reason(error: CasfsError) -> str:
    return error.reason if isinstance(error, PackError) else str(error)
