"""The blob store: verified reads by digest, and reconciliation of the index with the stored packs.

Threads may read concurrently. Every returned plaintext has had its digest recomputed.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from casfs.digest import DIGEST_BYTES, Digest, PackId
from casfs.errors import (
    BlobError,
    CasfsError,
    IndexUnusableError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    PackError,
    SessionError,
    StorageError,
)
from casfs.format.codec import ENCRYPTED, TAG_BYTES, BlobCodec
from casfs.format.group import MAX_GROUP_BYTES, Group
from casfs.format.pack import (
    BLOB_HEADER,
    DATA_PREFIX,
    HEADER,
    MAX_PACK_BYTES,
    META_PREFIX,
    PACK_PREFIXES,
    TRAILER,
    PackEntry,
    PackRef,
    parse_directory,
    parse_header,
    parse_trailer,
)
from casfs.index.index import Index
from casfs.index.schema import IndexedPack, Location
from casfs.storage.base import ListedObject, Storage
from casfs.storage.caching import CachingStorage
from casfs.storage.concurrency import begin, in_order
from casfs.store.duplicates import Duplicates
from casfs.store.groups import GroupCache
from casfs.store.pending_removal import TooManyNoticesError, packs_pending_removal
from casfs.store.verified_packs import VerifiedPacks

if TYPE_CHECKING:
    # Each is imported by the function that needs it: reading from an intact local repository needs none.
    from casfs.monitor import Progress
    from casfs.store.cipher import PackCiphers

log = logging.getLogger(__name__)

_MAX_FOUND_ELSEWHERE = 100_000

_SEARCH_INTERVAL_S = 60.0
"""How long a search for packs that the index lacks remains valid."""

_DIRECTORIES_AHEAD = 8
"""How many directories of remote packs are in memory at a time, each of a few MiB at most."""

_LISTED_AHEAD = 1000
"""How many entries of one listing are in memory while another one is read: a page."""

_TAIL_BYTES = 64 * 1024
"""What is read of the end of a remote pack at once: the trailer, and the directory of most packs."""

_PREFETCH_BYTES = 4 * 1024 * 1024
_PREFETCH_GAP_BYTES = 64 * 1024
"""The largest range of a pack that is requested ahead at once, and the largest gap between blobs in it."""

_MOST_DIRECTORIES = 4
"""How many directories are in memory of packs of whose blobs the index has no places; some MiB each."""

_OWN_LIMITS = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOMEM])
"""Read errors that come from this process's limits, not from the disk."""


def pack_name(pack: PackRef) -> str:
    """Return the storage name of a pack. No other function builds one."""
    text = pack.id.hex()
    return f"{META_PREFIX if pack.is_meta else DATA_PREFIX}/{text[:2]}/{text}"


def parse_pack_name(name: str) -> PackRef | None:
    """Return the pack that a storage name stands for, or None where it is not that of a pack."""
    prefix, _, rest = name.partition("/")
    try:
        pack = PackRef(PackId(bytes.fromhex(rest.rpartition("/")[2])), prefix == META_PREFIX)
    except ValueError:
        return None
    return pack if len(pack.id) == DIGEST_BYTES and pack_name(pack) == name else None


class PackLog(Protocol):
    """Takes note of packs that this process has stored; see `DeltaPublisher`."""

    def add(self, packs: Iterable[IndexedPack]) -> None:
        """Take packs that are durable and indexed."""


class BlobStore:
    """The blobs of one repository, found through its index.

    In an encrypted repository `ciphers` decrypts the packs.

    `salvaged` holds the packs whose directory was damaged at the last update of the index, and `unreadable`
    the packs that could not be read then. `found_elsewhere` holds the blobs that were read from another copy
    because the copy that the index names is damaged. `verified` records which blobs were read and verified.
    `bulk_storage` is for reads that no cache should keep: long ones, and those that examine the storage.
    `deltas` is given every pack that this process stores.
    `is_shared` is set where hosts write over a network, so that locks do not show who writes or prunes.
    `needs_notices` is unset for a reader, which too many removal notices must not stop.
    """

    def __init__(
        self,
        storage: Storage,
        index: Index,
        codec: BlobCodec,
        ciphers: PackCiphers | None = None,
    ) -> None:
        self.storage = storage
        self._cache = storage if isinstance(storage, CachingStorage) else None
        self.bulk_storage = self._cache.inner if self._cache is not None else storage
        self.codec = codec
        self._ciphers = ciphers
        self.is_shared = not storage.capabilities.holds_locks
        self.needs_notices = True
        self.verified = VerifiedPacks()
        self.salvaged: set[PackRef] = set()
        self.unreadable: set[PackRef] = set()
        self.found_elsewhere: set[Digest] = set()
        self.deltas: PackLog | None = None
        self._left_out = False
        self._search_lock = threading.Lock()
        self._searched_s: float | None = None
        self._groups = GroupCache()
        self._places_lock = threading.Lock()
        self._places: dict[PackRef, dict[Digest, PackEntry]] = {}
        self.use_index(index)
        self._old_entries: dict[PackRef, list[PackEntry]] = {}

    def use_index(self, index: Index) -> None:
        """Look up blobs in this index from now on."""
        self.index = index
        self._duplicates = Duplicates(index, self.stored_packs, self.entries)

    def locate(self, digest: Digest) -> Location:
        """Return the location of a blob; raise BlobError when no pack of the storage holds it.

        Where the index is synced by deltas, packs that none names are looked for, as `read` does.
        """
        location = self.index.lookup(digest)
        if location is None:
            self._find_new_packs()
            location = self.index.lookup(digest)
        if location is None:
            raise _missing(digest)
        return location

    def read(self, digest: Digest) -> bytes:
        """Return a blob's verified plaintext; raise BlobError when it is missing or damaged.

        If the index is wrong or outdated, or names a damaged copy, return an intact copy from another place.
        """
        location = self.index.lookup(digest)
        try:
            if location is None:
                raise _missing(digest)
            return self.read_at(digest, location)
        except BlobError as error:
            return self._read_elsewhere(digest, location, error)

    def _read_elsewhere(self, digest: Digest, location: Location | None, error: BlobError) -> bytes:
        # A prune may have moved the blob between the two steps; then the index has the new location.
        moved = self.index.lookup(digest)
        if moved in (None, location) and (location is None or _is_pack_missing(error)):
            self._find_new_packs()
            moved = self.index.lookup(digest)
        if moved is not None and moved != location:
            try:
                return self.read_at(digest, moved)
            except BlobError as also:
                error = also
        for copy in self.index.copies(digest):
            try:
                plain = self.read_at(digest, copy)
            except (BlobError, StorageError):
                continue
            self._note_elsewhere(digest)
            return plain
        for pack, entry in self._duplicates.find(digest):
            try:
                plain = self.read_entry(pack, entry)
            except (BlobError, NotFoundError, StorageError):
                continue
            self._note_elsewhere(digest)
            return plain
        raise error

    def _note_elsewhere(self, digest: Digest) -> None:
        if len(self.found_elsewhere) < _MAX_FOUND_ELSEWHERE:
            self.found_elsewhere.add(digest)

    def _find_new_packs(self) -> None:
        """Add packs to the index that it lacks, at most once a minute.

        Where the index is synced by deltas, one may be lost, or a prune may have moved blobs since.
        """
        if self.index.readonly or not self.index.tracks_deltas:
            return
        with self._search_lock:
            now = time.monotonic()
            if self._searched_s is not None and now - self._searched_s < _SEARCH_INTERVAL_S:
                return
            self._searched_s = now
            known = {record.pack.id for record in self.index.packs()}
            new = [found for found in self.stored_packs() if found[0].id not in known]
            if new:
                log.info("%d packs are in the storage and not in the index; adding them", len(new))
                self.add_packs(new)

    def read_entry(self, pack: PackRef, entry: PackEntry) -> bytes:
        """Return the verified plaintext of one copy of a blob, whether or not the index names that copy.

        Raise BlobError, NotFoundError and StorageError.
        """
        payload = self.storage.read(pack_name(pack), entry.offset, entry.stored_bytes)
        return self.decode(pack, entry, payload)

    def decode(self, pack: PackRef, entry: PackEntry, payload: bytes) -> bytes:
        """Return the verified plaintext of a payload that was read from its place in a pack.

        Raise BlobError; in an encrypted repository also the errors of `PackCiphers.for_pack`.
        """
        if entry.is_grouped:
            group = self._open_group(pack, entry, payload)
            return group.blob(entry.digest, entry.position, entry.plain_bytes)
        digest, plain_bytes = entry.digest, entry.plain_bytes
        if self._ciphers is None:
            return self.codec.decode(digest, entry.codec, payload, plain_bytes)
        cipher = self._ciphers.for_pack(pack.id, pack_name(pack))
        inner = cipher.decrypt(digest, entry.offset, payload)
        if (inner.codec | ENCRYPTED, inner.plain_bytes) != (entry.codec, plain_bytes):
            raise BlobError(digest, "its encrypted codec and size do not match the recorded ones")
        return self.codec.decode(
            digest, inner.codec, inner.payload, plain_bytes, cipher.digest_key(inner)
        )

    def _open_group(self, pack: PackRef, entry: PackEntry, payload: bytes) -> Group:
        """Return the group that a payload holds; `entry` is of one of its blobs."""
        digest = entry.digest
        if self._ciphers is None:
            return self.codec.open_group(digest, payload)
        cipher = self._ciphers.for_pack(pack.id, pack_name(pack))
        inner = cipher.decrypt(digest, entry.offset, payload)
        if inner.codec | ENCRYPTED != entry.codec:
            raise BlobError(digest, "its encrypted codec does not match the recorded one")
        key = cipher.digest_key(inner)
        return self.codec.open_group(digest, inner.payload, inner.plain_bytes, key)

    def decode_many(
        self, pack: PackRef, wanted: Sequence[tuple[PackEntry, bytes]], threads: int = 1
    ) -> list[bytes | None]:
        """Return the verified plaintexts of blobs of one pack with their payloads, None for each damaged one.

        A group is decoded once for blobs that follow one another. Raise PackError where nothing of the pack
        can be decrypted.
        """
        if self._ciphers is None:
            encoded = [entry.encoded(payload) for entry, payload in wanted]
            return self.codec.decode_many(encoded, threads)
        plains: list[bytes | None] = []
        at, group = -1, None
        for entry, payload in wanted:
            try:
                if not entry.is_grouped:
                    plains.append(self.decode(pack, entry, payload))
                    continue
                if entry.offset != at:
                    at, group = entry.offset, None
                    group = self._open_group(pack, entry, payload)
                plains.append(
                    group.blob(entry.digest, entry.position, entry.plain_bytes) if group else None
                )
            except BlobError:
                plains.append(None)
        return plains

    def read_at(self, digest: Digest, location: Location) -> bytes:
        """Return the verified plaintext of a blob at a location from an earlier lookup.

        Raise BlobError when the blob is missing or damaged, StorageError when this process or the network
        failed.
        """
        try:
            return self._read_at(digest, location)
        except BlobError as error:
            # The storage may have given wrong bytes once, and the cache kept them.
            pack = error.pack
            if (
                self._cache is None
                or pack is None
                or not self._cache.forget(pack_name(self.index.pack_ref(location.pack)))
            ):
                raise
            return self._read_at(digest, location)

    def _read_at(self, digest: Digest, location: Location) -> bytes:
        try:
            pack = self.index.pack_ref(location.pack)
        except IndexUnusableError as error:
            raise BlobError(digest, "the index refers to an unknown pack") from error
        if not location.has_place:
            location = self._place(digest, location, pack)
        plain = self._from_cache(digest, location, pack)
        if plain is not None:
            return plain
        try:
            payload = self.storage.read(pack_name(pack), location.offset, location.stored_bytes)
        except NotFoundError as error:
            raise BlobError(digest, "its pack is missing", pack.id) from error
        except StorageError as error:
            if error.cause.errno in _OWN_LIMITS:
                raise
            raise BlobError(
                digest, f"its pack cannot be read: {error.cause.strerror}", pack.id
            ) from error
        if len(payload) != location.stored_bytes:
            raise BlobError(digest, "its pack is too short to hold it", pack.id)
        try:
            return self._decode_and_cache(digest, location, pack, payload)
        except BlobError as error:
            raise BlobError(digest, error.reason, pack.id) from error
        except PackError as error:
            raise BlobError(digest, f"its pack is damaged: {error.reason}", pack.id) from error

    def _place(self, digest: Digest, location: Location, pack: PackRef) -> Location:
        """Return a location with the place that the pack's directory gives, as the index has none.

        Raise BlobError.
        """
        with self._places_lock:
            places = self._places.get(pack)
            if places is None:
                try:
                    places = {entry.digest: entry for entry in self.entries(pack)}
                except NotFoundError as error:
                    raise BlobError(digest, "its pack is missing", pack.id) from error
                except IntegrityError as error:
                    raise BlobError(digest, f"its pack is damaged: {error}", pack.id) from error
                if len(self._places) >= _MOST_DIRECTORIES:
                    del self._places[next(iter(self._places))]
                self._places[pack] = places
        entry = places.get(digest)
        if entry is None:
            raise BlobError(digest, "the directory of its pack does not name it", pack.id)
        return location.at_place(entry)

    def place_blobs(self) -> None:
        """Record in the index the places that a process without an identity left out, where keys allow it."""
        records = {record.pack: record for record in self.index.unplaced_packs()}
        found = self._indexed((pack, record.pack_bytes) for pack, record in records.items())
        for pack, _, entries in found:
            self.index.place_blobs(records[pack].ordinal, entries)

    def _from_cache(self, digest: Digest, location: Location, pack: PackRef) -> bytes | None:
        """Return the verified plaintext of a blob whose group is cached, else None."""
        if not location.is_grouped:
            return None
        group = self._groups.get(pack.id, location.offset)
        if group is None:
            return None
        try:
            plain = group.blob(digest, location.position, location.plain_bytes)
        except BlobError:
            # The storage may have given wrong bytes once.
            self._groups.drop(pack.id, location.offset)
            return None
        self.verified.mark(location)
        return plain

    def _decode_and_cache(
        self, digest: Digest, location: Location, pack: PackRef, payload: bytes
    ) -> bytes:
        entry = location.in_pack(digest)
        if location.is_grouped:
            group = self._open_group(pack, entry, payload)
            plain = group.blob(digest, location.position, location.plain_bytes)
            self._groups.put(pack.id, location.offset, group)
        else:
            plain = self.decode(pack, entry, payload)
        self.verified.mark(location)
        return plain

    def read_nonblocking(self, digest: Digest, max_stored_bytes: int) -> bytes | None:
        """Return a small blob's verified plaintext if no step would block, else None.

        A group, whose size the format bounds, may be larger: its other blobs come with it. None also means
        missing or damaged; `read` raises the reason.
        """
        location = self.index.lookup(digest)
        if location is None or not location.has_place:
            return None
        pack = self.index.pack_ref(location.pack)
        plain = self._from_cache(digest, location, pack)
        max_bytes = MAX_GROUP_BYTES if location.is_grouped else max_stored_bytes
        if plain is not None or location.stored_bytes > max_bytes:
            return plain
        name = pack_name(pack)
        if self._ciphers is not None and not self._ciphers.is_cached(name):
            return None  # decrypting its session would block
        payload = self.storage.read_nonblocking(name, location.offset, location.stored_bytes)
        if payload is None:
            return None
        try:
            return self._decode_and_cache(digest, location, pack, payload)
        except CasfsError:
            return None

    def prefetch(self, digests: Sequence[Digest]) -> int:
        """Start to load the stored bytes of blobs into memory, and return their number.

        The bytes of blobs that lie together are loaded with one request.
        """
        found = [
            at for at in self.index.lookup_many(list(digests)) if at is not None and at.has_place
        ]
        found.sort(key=lambda at: (at.pack, at.offset))
        runs: list[tuple[int, int, int]] = []
        for at in found:
            end = at.offset + at.stored_bytes
            pack, begin, before = runs[-1] if runs else (-1, 0, 0)
            is_near = at.offset - before <= _PREFETCH_GAP_BYTES and end - begin <= _PREFETCH_BYTES
            if pack == at.pack and is_near:
                runs[-1] = (pack, begin, max(end, before))
            else:
                runs.append((at.pack, at.offset, end))
        for pack, begin, end in runs:
            self.storage.prefetch(pack_name(self.index.pack_ref(pack)), begin, end - begin)
        return sum(end - begin for _, begin, end in runs)

    def stored_packs(self) -> Iterator[tuple[PackRef, int]]:
        """Yield every pack in the storage, of both kinds, with its size in bytes."""
        for name, size, _ in self._listed_packs():
            pack = parse_pack_name(name)
            if pack is None:
                log.warning("%s is not a casfs pack; ignored", name)
                continue
            yield pack, size

    def _listed_packs(self) -> Iterator[ListedObject]:
        """Yield the objects in the folders of both kinds of packs; over a distance, list both at once."""
        data, meta = (iter(self.storage.list(prefix)) for prefix in PACK_PREFIXES)
        first_of_meta = begin(self.storage, lambda: list(islice(meta, _LISTED_AHEAD)))
        yield from data
        yield from first_of_meta()
        yield from meta

    def read_directory(self, pack: PackRef, pack_bytes: int) -> list[PackEntry]:
        """Return a pack's entries from its directory; raise PackError when the directory is damaged."""
        name = pack_name(pack)
        if pack_bytes < HEADER.size + BLOB_HEADER.size + TRAILER.size:
            raise PackError(pack.id, "too short for a pack")
        if pack_bytes > MAX_PACK_BYTES:
            raise PackError(pack.id, "too long for a pack")
        # Over a distance one request for both costs less than two. On a disk the bytes before the directory
        # are left alone, since they may be unreadable where the directory is not.
        guess_bytes = _TAIL_BYTES if self.storage.capabilities.parallel_requests > 1 else 0
        tail_offset = max(0, pack_bytes - max(guess_bytes, TRAILER.size))
        read_tail = begin(
            self.storage,
            lambda: self.bulk_storage.read(name, tail_offset, pack_bytes - tail_offset),
        )
        parse_header(pack.id, self.bulk_storage.read(name, 0, HEADER.size))
        tail = read_tail()
        cipher = self._ciphers.for_pack(pack.id, name) if self._ciphers is not None else None
        overhead = TAG_BYTES if cipher is not None else 0
        trailer = tail[-TRAILER.size :]
        offset, directory_bytes, _, digest = parse_trailer(pack.id, trailer, pack_bytes, overhead)
        if offset >= tail_offset and len(tail) == pack_bytes - tail_offset:
            directory = tail[offset - tail_offset : offset - tail_offset + directory_bytes]
        else:
            directory = self.bulk_storage.read(name, offset, directory_bytes)
        decrypt = cipher.decrypt_directory if cipher is not None else None
        return parse_directory(pack.id, directory, digest, offset - BLOB_HEADER.size, decrypt)

    def entries(self, pack: PackRef, pack_bytes: int | None = None) -> list[PackEntry]:
        """Return a pack's entries from its directory, or by a scan where the directory is damaged.

        `pack_bytes` is the pack's size in the storage, looked up where it is None. Do not pass the size that
        the index records: another pack may have replaced it.
        """
        if pack_bytes is None:
            pack_bytes = self.bulk_storage.size(pack_name(pack))
        try:
            return self.read_directory(pack, pack_bytes)
        except PackError:
            return self.salvage_directory(pack, pack_bytes)

    def salvage_directory(self, pack: PackRef, pack_bytes: int) -> list[PackEntry]:
        """Return entries for the blobs of a pack that a scan of its records finds, within limits."""
        from casfs.store.salvage import salvage_entries

        name = pack_name(pack)
        try:
            cipher = self._ciphers.for_pack(pack.id, name) if self._ciphers is not None else None
        except PackError:
            return []  # without the pack's header no blob can be decrypted

        def read(offset: int, size: int) -> bytes:
            return self.bulk_storage.read(name, offset, size)

        return salvage_entries(pack.id, pack_bytes, read, self.codec, cipher)

    def reconcile(
        self,
        is_alone: Callable[[], bool] = lambda: True,
        keep_missing: bool = False,
        list_pending: Callable[[], set[PackRef]] | None = None,
    ) -> None:
        """Bring the index into agreement with the packs in the storage.

        Packs that a crash left out of the index, wholly or in part, are added from their directories. If the
        index names a missing pack, the index is rebuilt from the packs alone, so that no blob of the missing
        pack counts as stored and duplicates in other packs are found. With `keep_missing` the index keeps
        such a pack, so that a check can report it.

        A prune in another process may be running. It publishes a removal notice before it removes a pack from
        the index, and deletes the pack's file before the notice. So the notices are read after what they are
        compared with, here and in `_add_found_packs`. Unless no other process writes (`is_alone`), a pack
        that has a notice and is not in the index is being removed, and a pack that the index marks for
        removal keeps its mark. `list_pending` returns the packs under notice where the caller lists them.
        """
        stored = dict(self.stored_packs())
        indexed = {record.pack for record in self.index.packs()}
        names = {pack.id for pack in indexed}
        missing = {pack for pack in indexed - stored.keys() if not self.has_pack(pack)}
        if missing and not keep_missing:
            # Other hosts remove packs as a matter of course.
            log.log(
                logging.INFO if self.is_shared else logging.WARNING,
                "%d packs that the index names are missing; their blobs no longer count as stored",
                len(missing),
            )
        if (
            missing
            and not keep_missing
            and (self.index.tracks_copies or any(self._lacks_keys(pack) for pack in stored))
        ):
            # Without its knowledge of copies, the index is rebuilt, to find them. A rebuild would lose the
            # entries of packs for which this machine lacks the keys.
            ordinals = {one.ordinal: one.pack for one in self.index.packs() if one.pack in missing}
            self.index.remove_packs(ordinals, lost=True)
            names -= {pack.id for pack in missing}
            missing = set()
        if (missing and not keep_missing) or not self.index.is_current():
            self.rebuild()
        elif new := sorted(pack for pack in stored if pack.id not in names):
            self._add_found_packs([(pack, stored[pack]) for pack in new], is_alone)
        self._finish_partial_packs(stored, is_alone)
        self._settle_unverified(stored)
        names = {record.pack.id for record in self.index.packs()}
        self.index.has_all_packs = all(pack.id in names for pack in stored)
        self.apply_notices(is_alone, list_pending)

    def apply_notices(
        self,
        is_alone: Callable[[], bool] = lambda: True,
        list_pending: Callable[[], set[PackRef]] | None = None,
    ) -> None:
        """Mark the packs that removal notices name, and no others if no other process writes.

        `list_pending` returns these packs where the caller lists them.
        """
        before = self.index.marked_for_removal()
        pending = list_pending() if list_pending is not None else self._packs_pending_removal()
        if pending or before:
            found = {record.ordinal for record in self.index.packs() if record.pack in pending}
            self.index.change_marked(found - before, before - found if is_alone() else set())

    def _packs_pending_removal(self) -> set[PackRef]:
        """Return the packs that removal notices name; for a reader all packs, if there are too many notices.

        Then no writer of this machine that uses the same index counts a blob as stored.
        """
        try:
            return packs_pending_removal(self.storage)
        except TooManyNoticesError as error:
            if self.needs_notices:
                raise
            log.warning("%s", error)
            return {pack for pack, _ in self.stored_packs()}

    def add_packs(self, packs: list[tuple[PackRef, int]]) -> None:
        """Add packs of the storage to the index from their directories; each comes with its size in bytes."""
        self._add_found_packs(packs, lambda: True)

    def record_packs(self, packs: list[IndexedPack]) -> None:
        """Add packs that this process has stored durably to the index, and note them for the next delta."""
        self.index.add_packs(packs)
        if self.deltas is not None:
            self.deltas.add(packs)

    def _settle_unverified(self, stored: Mapping[PackRef, int]) -> None:
        """Compare the packs that only index deltas name with a listing.

        The size that a delta gives may be wrong; then the pack's directory is read.
        """
        from casfs.index.delta_notes import DeltaNotes

        notes = DeltaNotes(self.index)
        found = {one.ordinal: one for one in notes.unverified() if one.pack in stored}
        good = {n for n, one in found.items() if stored[one.pack] == one.pack_bytes}
        notes.mark_verified(good)
        wrong = {n: one.pack for n, one in found.items() if n not in good}
        if wrong:
            self.index.remove_packs(wrong, lost=True)
            self.add_packs([(pack, stored[pack]) for pack in sorted(wrong.values())])

    def _finish_partial_packs(
        self, stored: Mapping[PackRef, int], is_alone: Callable[[], bool]
    ) -> None:
        """Index the rest of each pack that a process left partly indexed when it died.

        The index drops a pack for which this process lacks the keys: what the process that died did not
        index of it can never be read here, and a delta would name a part of the pack as the whole.
        """
        names = set(self.index.partial_packs())
        if not names or not is_alone():
            return
        partial = [
            record
            for record in self.index.packs()
            if record.pack.id in names and record.pack in stored
        ]
        closed = {one.ordinal: one.pack for one in partial if self._lacks_keys(one.pack)}
        if closed:
            log.info("%d packs were indexed in part; their blobs are stored again", len(closed))
            # The packs stay in the storage, so no delta may name them as removed.
            self.index.remove_packs(closed, lost=True, is_published=True)
        rest = [(one.pack, stored[one.pack]) for one in partial if one.ordinal not in closed]
        for pack, _, entries in self._indexed(rest):
            self.index.finish_partial_pack(pack.id, entries)

    def _add_found_packs(
        self, new: list[tuple[PackRef, int]], is_alone: Callable[[], bool]
    ) -> None:
        """Add packs to the index from their directories, a few in each transaction."""
        rest = iter(new)
        while part := list(islice(rest, self.index.packs_at_once())):
            self._add_found_part(part, is_alone)

    def _add_found_part(self, new: list[tuple[PackRef, int]], is_alone: Callable[[], bool]) -> None:
        pending: set[PackRef] = set()

        def ask() -> set[PackRef]:
            pending.clear()
            pending.update(self._packs_pending_removal())
            return pending

        def packs() -> Iterator[IndexedPack]:
            # Where no lock shows a prune that runs, a pack under notice may stay for long.
            alone = self.is_shared or is_alone()
            return self._indexed(one for one in new if alone or one[0] not in pending)

        self.index.add_found_packs(packs, ask)

    def _lacks_keys(self, pack: PackRef) -> bool:
        """Return whether a pack is encrypted with keys that are not available."""
        try:
            if self._ciphers is not None:
                self._ciphers.for_pack(pack.id, pack_name(pack))
        except KeyMissingError:
            return True
        except CasfsError:
            return False
        return False

    def has_pack(self, pack: PackRef) -> bool:
        """Return whether a pack is in the storage now, as far as that can be known.

        Another writer may have published it since the listing. One that cannot be looked at is not missing.
        """
        try:
            return self.storage.size(pack_name(pack)) >= 0
        except NotFoundError:
            return False
        except StorageError:
            return True

    def rebuild(self, progress: Progress | None = None) -> None:
        """Rebuild the index from the packs alone.

        For a pack with a damaged directory, the old index may know more blobs than a scan finds: its entries
        are kept where the blobs verify.
        """
        from casfs.monitor import Progress, Unit

        progress = progress if progress is not None else Progress()
        progress.begin("looking for damaged packs", Unit.PACKS)
        self._old_entries = self._entries_of_damaged(progress)
        self._left_out = False
        progress.begin("reading packs", Unit.PACKS, total_items=progress.items or None)
        self.index.rebuild(
            lambda: self._indexed(self._counted_packs(progress)),
            self._packs_pending_removal,
        )
        self._old_entries = {}
        self.index.has_all_packs = not self._left_out

    def _counted_packs(self, progress: Progress) -> Iterator[tuple[PackRef, int]]:
        """Yield what `stored_packs` does, and count each pack when the next one is asked for."""
        for pack, pack_bytes in self.stored_packs():
            yield pack, pack_bytes
            progress.items += 1

    def _entries_of_damaged(self, progress: Progress) -> dict[PackRef, list[PackEntry]]:
        """Return the index entries of packs whose directories are damaged."""
        if not self.index.is_current():
            return {}
        damaged = set()
        for pack, pack_bytes in self._counted_packs(progress):
            try:
                self.read_directory(pack, pack_bytes)
            except CasfsError:
                damaged.add(pack)
        names = {one.ordinal: one.pack for one in self.index.packs() if one.pack in damaged}
        entries_by_pack: dict[PackRef, list[PackEntry]] = {}
        for digest, at in self.index.blobs() if names else ():
            if at.pack in names:
                entries_by_pack.setdefault(names[at.pack], []).append(at.in_pack(digest))
        return entries_by_pack

    def _indexed(self, packs: Iterable[tuple[PackRef, int]]) -> Iterator[IndexedPack]:
        for pack, pack_bytes, found in self.directories(packs):
            try:
                entries = self._entries(pack, pack_bytes, found)
            except NotFoundError:
                continue  # a prune removed it after the listing
            except KeyMissingError:
                self._left_out = True
                continue  # only a process with its keys can use its blobs
            except (SessionError, StorageError) as error:
                log.warning("%s; its blobs are not indexed until it can be read", error)
                self.unreadable.add(pack)
                self._left_out = True
                continue
            yield pack, pack_bytes, entries

    def directories(
        self, packs: Iterable[tuple[PackRef, int]]
    ) -> Iterator[tuple[PackRef, int, list[PackEntry] | CasfsError]]:
        """Yield the entries of each pack, or the error of reading them, in the order of the packs.

        Where requests travel a distance several directories are read at a time.
        """
        waiting: deque[tuple[PackRef, int]] = deque()

        def asked() -> Iterator[tuple[PackRef, int]]:
            for one in packs:
                waiting.append(one)
                yield one

        def read(one: tuple[PackRef, int]) -> list[PackEntry] | CasfsError:
            return self._read_directory_or_error(*one)

        for entries in in_order(self.storage, read, asked(), _DIRECTORIES_AHEAD):
            yield *waiting.popleft(), entries

    def _read_directory_or_error(
        self, pack: PackRef, pack_bytes: int
    ) -> list[PackEntry] | CasfsError:
        try:
            return self.read_directory(pack, pack_bytes)
        except CasfsError as error:
            return error

    def _entries(
        self, pack: PackRef, pack_bytes: int, found: list[PackEntry] | CasfsError
    ) -> list[PackEntry]:
        if isinstance(found, PackError):
            log.warning("%s; scanning it for intact blobs", found)
            self.salvaged.add(pack)
            return self._salvaged_entries(pack, pack_bytes)
        if isinstance(found, CasfsError):
            raise found
        return found

    def _salvaged_entries(self, pack: PackRef, pack_bytes: int) -> list[PackEntry]:
        found = self.salvage_directory(pack, pack_bytes)
        digests = {entry.digest for entry in found}
        for entry in self._old_entries.get(pack, ()):
            if entry.digest not in digests:
                try:
                    self.read_entry(pack, entry)
                except CasfsError:
                    continue
                found.append(entry)
        return found


def _is_pack_missing(error: BlobError) -> bool:
    return isinstance(error.__cause__, NotFoundError)


def _missing(digest: Digest) -> BlobError:
    return BlobError(digest, "it is missing: no pack holds it")
