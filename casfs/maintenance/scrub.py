"""Scrub: packs against the index, and their bytes against every digest there is of them.

Two threads read; what they find is gathered by the one that asked. When a pack was read as a whole and is
sound, that is remembered with the index, and a blob that is damaged is marked there, so that no backup
takes it for stored: seen again in a source it is stored anew, which heals older snapshots.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

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
from casfs.format.codec import Encoded
from casfs.format.pack import TRAILER, PackEntry
from casfs.index.schema import Location, PackRecord
from casfs.monitor import Monitor
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name

_WINDOW_BYTES = 8 * 1024 * 1024
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOBS = 512
_ASKED_AT_ONCE = 4096
_THREADS = 2
_REFUSED = frozenset([errno.EACCES, errno.EPERM])
_MOST_UNKNOWN = 100_000
_NOTED_AFTER_S = 5.0
"""How often what was verified is made durable: what an interruption may cost."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    `what` is "pack", "blob", "index", "session", "snapshot", "tree" or "file"; fields that do not apply are
    None. `ranges` are begin and end in bytes of what a file has lost.
    """

    what: str
    message: str
    pack: PackId | None = None
    blob: Digest | None = None
    snapshot: SnapshotId | None = None
    path: bytes | None = None
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PackSelection:
    """Which packs are read: a share (0 to 1) of them, those last verified before so many seconds.

    The longest unverified come first; after `max_duration_s` no other is begun.
    """

    share: float = 1.0
    older_than_s: float | None = None
    max_duration_s: float | None = None


@dataclass(slots=True)
class ScrubResult:
    """What was read and found: packs, blobs, bytes; `left` were to be read and time did not allow it.

    `bad` are blobs of which no sound copy was found, with the pack that should hold each; `unknown` are
    those that packs hold and the index does not name.
    """

    packs: int = 0
    packs_read: int = 0
    packs_left: int = 0
    blobs_read: int = 0
    read_bytes: int = 0
    damage: list[Finding] = field(default_factory=list)
    damaged: dict[Digest, PackId] = field(default_factory=dict)
    unknown: dict[Digest, PackId] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Read:
    """What reading a pack has shown."""

    entries: list[PackEntry]
    damage: list[Finding]
    is_intact: bool


class Scrubber:
    """Check the packs of one repository; used once. What is found goes into `result`."""

    def __init__(self, repository: Repository, result: ScrubResult, monitor: Monitor) -> None:
        self.result = result
        self._repository = repository
        self._store = repository.store
        self._report = result.damage.append
        self._monitor = monitor
        self._ordinals: dict[int, PackId] = {}
        self._by_name: dict[PackId, int] = {}
        self._verified: list[int] = []
        # Packs that are not as they were stored, with the blobs that were found in them all the same.
        self._broken: dict[int, set[Digest]] = {}
        self._closed: set[PackId] = set()
        self._noted_at = time.monotonic()

    def scrub(self, choice: PackSelection | None) -> None:
        """Compare every pack with the index, and read those that are chosen (None: none of them)."""
        # A backup may be running: what the index names first is in the storage by the time of the
        # listing, and what is found beyond that is newer than this check.
        entries_before = self._store.index.blob_count()
        records = self._store.index.packs()
        stored = dict(self._store.stored_packs())
        found_before = self._damage_of_records(records, stored)
        self.result.packs = len(stored)
        indexed = 0
        sound = not found_before
        with ThreadPoolExecutor(_THREADS, "casfs-check") as pool:
            for pack, entries, damage in self._directories(pool, sorted(stored.items())):
                sound &= not damage
                self.result.damage += damage
                if damage:
                    self._mark_damaged(pack)
                ordinal = self._by_name.get(pack)
                if ordinal is not None:
                    indexed += self._compare_index(pack, entries)
                    if damage or ordinal in self._broken:
                        self._broken[ordinal] = {entry.digest for entry in entries}
            if choice is not None:
                self._read_selected(pool, stored, choice)
        self._mark_unfound()
        self._look_elsewhere()
        unchanged = records == self._store.index.packs()
        if indexed < entries_before and sound and unchanged:
            message = "it has entries that no pack holds; casfs repair index rebuilds it"
            self._report(Finding("index", message))

    def _damage_of_records(self, records: list[PackRecord], stored: dict[PackId, int]) -> bool:
        """Compare the index's list of packs with what is stored; tell whether anything was wrong."""
        wrong = False
        for record in records:
            if record.pack not in stored and self._is_gone(record.ordinal):
                continue
            self._ordinals[record.ordinal] = record.pack
            self._by_name[record.pack] = record.ordinal
            if record.pack not in stored:
                message = "the index names it, but it is missing"
            elif stored[record.pack] != record.pack_bytes:
                message = (
                    f"it has {stored[record.pack]} bytes where {record.pack_bytes} were stored"
                )
            else:
                continue
            wrong = True
            self._broken[record.ordinal] = set()
            self._report(Finding("pack", message, pack=record.pack))
        return wrong

    def _is_gone(self, ordinal: int) -> bool:
        """Tell whether a prune has removed a pack from the index meanwhile."""
        return all(record.ordinal != ordinal for record in self._store.index.packs())

    def _is_removed(self, pack: PackId) -> bool:
        """Tell whether a prune has removed a pack that was in the storage when this check began."""
        ordinal = self._by_name.get(pack)
        if ordinal is not None:
            return self._is_gone(ordinal)
        return all(name != pack for name, _ in self._store.stored_packs())

    def _directories(
        self, pool: ThreadPoolExecutor, jobs: list[tuple[PackId, int]]
    ) -> Iterator[tuple[PackId, list[PackEntry], list[Finding]]]:
        """Yield what `_check_directory` finds, in order and few ahead: many would fill the memory."""
        running: deque[Future[tuple[PackId, list[PackEntry], list[Finding]]]] = deque()
        for job in jobs:
            running.append(pool.submit(self._check_directory, job))
            if len(running) > 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _check_directory(
        self, job: tuple[PackId, int]
    ) -> tuple[PackId, list[PackEntry], list[Finding]]:
        pack, pack_bytes = job
        try:
            return pack, self._store.read_directory(pack, pack_bytes), []
        except NotFoundError as error:
            if self._is_removed(pack):
                return pack, [], []
            return pack, [], [Finding("pack", _reason(error), pack)]
        except KeyMissingError:
            raise
        except CasfsError as error:
            damage = [Finding("pack", _reason(error), pack)]
            if isinstance(error, StorageError) and error.cause.errno in _REFUSED:
                self._closed.add(pack)
        try:
            return pack, self._store.salvage_directory(pack, pack_bytes), damage
        except CasfsError as unreadable:
            return pack, [], [*damage, Finding("pack", _reason(unreadable), pack)]

    def _compare_index(self, pack: PackId, entries: list[PackEntry]) -> int:
        """Compare a pack's directory with the index; return how many index entries point into it."""
        count = 0
        for entry, location in self._located(entries):
            if location is None:
                self._note_unknown(pack, entry.digest)
            elif self._ordinals.get(location.pack) == pack:
                count += 1
                if not location.matches(entry):
                    message = "it names another place for the blob than its pack does"
                    self._report(Finding("index", message, pack, entry.digest))
                if location.is_damaged:
                    self.result.damaged[entry.digest] = pack
        return count

    def _located(self, entries: list[PackEntry]) -> Iterator[tuple[PackEntry, Location | None]]:
        """Yield entries with what the index says of each, which is asked for some thousands at a time."""
        for begin in range(0, len(entries), _ASKED_AT_ONCE):
            some = entries[begin : begin + _ASKED_AT_ONCE]
            yield from zip(
                some, self._store.index.lookup_many([entry.digest for entry in some]), strict=True
            )

    def _note_unknown(self, pack: PackId, digest: Digest) -> None:
        """Keep in mind a stored blob that the index does not know.

        That is no damage by itself. Where two backups stored a blob at the same time, the index names one
        of its packs; when nobody needs it any more and that pack is removed, the other may stay.
        """
        if len(self.result.unknown) < _MOST_UNKNOWN:
            self.result.unknown[digest] = pack

    def _read_selected(
        self, pool: ThreadPoolExecutor, stored: dict[PackId, int], choice: PackSelection
    ) -> None:
        wanted = self._select_packs(stored, choice)
        self._monitor.progress.total_bytes = sum(stored[pack] for pack in wanted)
        began = time.monotonic()
        rest = iter(wanted)
        running: list[tuple[PackId, Future[_Read]]] = []
        try:
            while True:
                late = (
                    choice.max_duration_s is not None
                    and time.monotonic() - began >= choice.max_duration_s
                )
                # One pack more than there are threads, so that none of them waits.
                while not late and len(running) <= _THREADS:
                    pack = next(rest, None)
                    if pack is None:
                        break
                    running.append((pack, pool.submit(self._read_pack, pack, stored[pack])))
                if not running:
                    break
                pack, future = running.pop(0)
                self._gather(pack, stored[pack], future.result())
        finally:
            for _, future in running:
                future.cancel()
            self._note_verified()
        self.result.packs_left = sum(1 for _ in rest)

    def _select_packs(self, stored: dict[PackId, int], choice: PackSelection) -> list[PackId]:
        """Return the packs to read, the longest unverified first."""
        verified = {record.pack: record.verified_s for record in self._store.index.packs()}
        packs = sorted(_share_of(stored, choice.share), key=lambda pack: verified.get(pack, 0))
        if choice.older_than_s is not None:
            limit = time.time() - choice.older_than_s
            packs = [pack for pack in packs if verified.get(pack, 0) <= limit]
        return packs

    def _gather(self, pack: PackId, pack_bytes: int, read: _Read) -> None:
        entries, damage = read.entries, read.damage
        ordinal = self._by_name.get(pack)
        if damage and self._is_removed(pack):
            return
        self.result.damage += damage
        self.result.packs_read += 1
        self.result.read_bytes += pack_bytes
        self.result.blobs_read += len(entries)
        self._monitor.progress.done_bytes += pack_bytes
        if ordinal is None:
            return
        bad = {found.blob for found in damage if found.blob is not None}
        if read.is_intact:
            self._verified.append(ordinal)
        else:
            self._broken.setdefault(ordinal, {entry.digest for entry in entries})
            if damage:
                self._mark_damaged(pack)
        for digest in bad:
            location = self._store.index.lookup(digest)
            # Of a blob that two packs hold, only the copy that the index names is read.
            if location is not None and location.pack == ordinal:
                self.result.damaged[digest] = pack
        sound = [
            e.digest for e in entries if e.digest in self.result.damaged and e.digest not in bad
        ]
        for digest in sound:
            del self.result.damaged[digest]
        if (bad or sound) and not self._store.index.readonly:
            self._store.index.mark_blobs(ordinal, bad, sound)
        if time.monotonic() - self._noted_at > _NOTED_AFTER_S:
            self._note_verified()

    def _mark_damaged(self, pack: PackId) -> None:
        """Have the next prune pack anew what is needed of a pack."""
        ordinal = self._by_name.get(pack)
        writable = not self._store.index.readonly and pack not in self._closed
        if ordinal is not None and writable:
            self._store.index.mark_damaged([ordinal])

    def _mark_unfound(self) -> None:
        """Mark the blobs that a broken pack should hold and that were not found in it.

        Where this process may not read a pack, that is no reason to distrust it for good.
        """
        if not self._broken:
            return
        unfound: dict[int, list[Digest]] = {}
        for digest, location in self._store.index.blobs():
            found = self._broken.get(location.pack)
            if found is not None and digest not in found:
                unfound.setdefault(location.pack, []).append(digest)
        for ordinal, digests in unfound.items():
            if self._is_gone(ordinal):
                continue
            pack = self._ordinals[ordinal]
            self.result.damaged.update(dict.fromkeys(digests, pack))
            if pack not in self._closed and not self._store.index.readonly:
                self._store.index.mark_blobs(ordinal, digests)

    def _look_elsewhere(self) -> None:
        """Find which damaged blobs another pack has, as every reader does: those are not lost."""
        for digest in list(self.result.damaged):
            try:
                self._store.read(digest)
            except CasfsError:
                continue
            del self.result.damaged[digest]

    def _note_verified(self) -> None:
        if self._verified and not self._store.index.readonly:
            self._store.index.mark_verified(self._verified, int(time.time()))
        self._verified = []
        self._noted_at = time.monotonic()

    def _read_pack(self, pack: PackId, pack_bytes: int) -> _Read:
        """Recompute the digest of a pack and of every blob in it, in one pass."""
        # What is wrong with the directory was told already.
        _, entries, told = self._check_directory((pack, pack_bytes))
        if told and not entries:
            return _Read(entries, [], False)
        damage: list[Finding] = []
        whole = blake3()
        reader = _PackReader(self._repository, pack, whole)
        try:
            for batch in _batches(sorted(entries, key=lambda entry: entry.offset)):
                payloads = [reader.read(entry.offset, entry.stored_bytes) for entry in batch]
                damage += self._verify(pack, batch, payloads)
            reader.read(pack_bytes - TRAILER.size, TRAILER.size)
        except CasfsError as error:
            damage = [Finding("pack", _reason(error), pack), *self._read_one_by_one(pack, entries)]
            return _Read(entries, damage, False)
        if whole.digest() != pack:
            damage.append(Finding("pack", "its bytes do not have the digest that names it", pack))
        return _Read(entries, damage, not (damage or told))

    def _verify(
        self, pack: PackId, entries: list[PackEntry], payloads: list[bytes]
    ) -> Iterator[Finding]:
        """Yield which blobs are damaged among those that were read."""
        encoded = [
            Encoded(entry.digest, entry.offset, entry.codec, payload, entry.plain_bytes)
            for entry, payload in zip(entries, payloads, strict=True)
        ]
        plains = self._store.decode_many(pack, encoded)
        for entry, payload, plain in zip(entries, payloads, plains, strict=True):
            if plain is None:
                try:
                    self._store.decode(pack, entry, payload)
                except BlobError as error:
                    yield Finding("blob", error.reason, pack, entry.digest)

    def _read_one_by_one(self, pack: PackId, entries: list[PackEntry]) -> Iterator[Finding]:
        """Yield which blobs are damaged in a pack that cannot be read from its beginning to its end."""
        for entry in entries:
            try:
                self._store.read_entry(pack, entry)
            except BlobError as error:
                yield Finding("blob", error.reason, pack, entry.digest)
            except CasfsError as error:
                yield Finding("blob", str(error), pack, entry.digest)


def _batches(entries: list[PackEntry]) -> Iterator[list[PackEntry]]:
    """Yield runs of entries that are decoded together, and held in memory together."""
    batch: list[PackEntry] = []
    batch_bytes = 0
    for entry in entries:
        if batch and (batch_bytes + entry.plain_bytes > _BATCH_BYTES or len(batch) >= _BATCH_BLOBS):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(entry)
        batch_bytes += entry.plain_bytes
    if batch:
        yield batch


class _PackReader:
    """Read a pack from its beginning to its end in windows, hashing all of it on the way."""

    def __init__(self, repository: Repository, pack: PackId, whole: blake3) -> None:
        self._storage = repository.store.storage
        self._name = pack_name(pack)
        self._pack = pack
        self._whole = whole
        self._begin = 0
        self._data = b""

    def read(self, offset: int, size: int) -> bytes:
        """Return a range that lies at or behind the one before; what is between is hashed too."""
        while offset + size > self._begin + len(self._data):
            keep = self._data[max(offset - self._begin, 0) :]
            end = self._begin + len(self._data)
            more = self._storage.read(self._name, end, max(_WINDOW_BYTES, size))
            if not more:
                raise PackError(self._pack, "it ends before its last blob")
            self._whole.update(more)
            self._data = keep + more
            self._begin = end - len(keep)
        start = offset - self._begin
        return self._data[start : start + size]


def _share_of(packs: Iterable[PackId], share: float) -> Iterator[PackId]:
    """Yield the packs of a share: always the same ones for the same share, evenly spread."""
    limit = int(share * 2**64)
    return (pack for pack in packs if int.from_bytes(pack[:8], "big") < limit)


def _reason(error: CasfsError) -> str:
    return error.reason if isinstance(error, PackError) else str(error)
