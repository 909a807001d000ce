"""Hosts for tests: each has an index of its own, and all share one storage and one clock."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from casfs.digest import Digest
from casfs.format.codec import BlobCodec, BlobKind
from casfs.format.delta import DeltaName
from casfs.format.key_derivation import Sessions, WriteSession
from casfs.format.pack import PackRef
from casfs.index.delta_notes import DeltaNotes
from casfs.index.index import Index
from casfs.storage.base import Storage
from casfs.storage.memory import MemoryStorage
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.cipher import PackCiphers
from casfs.store.delta_merge import DeltaMerger, MergeResult
from casfs.store.delta_publisher import DeltaPublisher
from casfs.store.delta_reader import list_deltas
from casfs.store.delta_sync import DeltaSync
from casfs.store.index_update import UpdateOptions, update_index
from casfs.store.layout import FORMAT_2
from casfs.store.writer import BlobWriter

WRITER = UpdateOptions(is_writer=True)
READER = UpdateOptions()
MAINTENANCE = UpdateOptions(is_writer=True, lists_packs=True)


@dataclass
class Place:
    """What the hosts share: a storage, and a clock that advances by a second with each look."""

    storage: Storage = field(default_factory=MemoryStorage)
    ticks: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def now_ms(self) -> int:
        return 1_000_000_000_000 + 1000 * next(self.ticks)

    def deltas(self) -> list[DeltaName]:
        return sorted(list_deltas(self.storage))


class Host:
    """A machine with an index in a folder; `skew_ms` is by how much its idea of the clock is off."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        skew_ms: int = 0,
        sessions: Sessions | None = None,
        session: WriteSession | None = None,
        can_read: bool = True,
        storage: Storage | None = None,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        self.place = place
        self.folder = folder
        self.skew_ms = skew_ms
        self.storage = storage if storage is not None else place.storage
        self._sessions = sessions
        self._session = session
        self._can_read = can_read
        self._on_step = on_step

    def now_ms(self) -> int:
        return self.place.now_ms() + self.skew_ms

    @contextmanager
    def open(self, options: UpdateOptions = WRITER) -> Iterator[OpenHost]:
        """Open the index and bring it up to date."""
        index = Index(self.folder, on_step=self._on_step, sync=False)
        index.tracks_deltas = True
        try:
            ciphers = (
                PackCiphers(self.storage, self._sessions) if self._sessions is not None else None
            )
            key = self._session.domains[0].digest_key if self._session is not None else None
            store = BlobStore(self.storage, index, BlobCodec(3, digest_key=key), ciphers)
            sync = DeltaSync(store, self._sessions, self._can_read)
            session = self._session
            publisher = DeltaPublisher(
                store, None if session is None else (lambda: session), self.now_ms
            )
            update_index(store, sync, options)
            store.deltas = publisher
            yield OpenHost(self, store, sync, publisher, session)
        finally:
            index.close()

    def back_up(self, *packs: Iterable[bytes]) -> None:
        """Store each group of blobs in a pack of its own, and publish a delta."""
        with self.open() as host:
            for plains in packs:
                host.put(plains)
            host.publish()

    def lose_index(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class OpenHost:
    """An open store of a host."""

    host: Host
    store: BlobStore
    sync: DeltaSync
    publisher: DeltaPublisher
    session: WriteSession | None

    @property
    def index(self) -> Index:
        return self.store.index

    @property
    def notes(self) -> DeltaNotes:
        return DeltaNotes(self.store.index)

    def put(self, plains: Iterable[bytes], pack_bytes: int = 1 << 26) -> int:
        """Store blobs durably and indexed, without a delta; return how many were new."""
        session = self.session
        writer = BlobWriter(
            self.store,
            pack_bytes=pack_bytes,
            session=None if session is None else (lambda: session),
            layout=FORMAT_2,
        )
        try:
            for plain in plains:
                writer.put(BlobKind.DATA, self.store.codec.digest(plain), plain)
            return writer.finish().new_blobs
        finally:
            writer.close()

    def publish(self) -> list[DeltaName]:
        """Publish what was stored; everything, where no complete delta is known."""
        is_complete = any(note.is_complete for note in self.notes.all().values())
        return self.publisher.publish(everything=not is_complete and self.store.index.has_all_packs)

    def remove(self, packs: Iterable[PackRef]) -> None:
        """Remove packs as a prune does: from the index, by a delta, then from the storage."""
        wanted = set(packs)
        going = {one.ordinal: one.pack for one in self.index.packs() if one.pack in wanted}
        assert self.index.remove_packs(going)
        self.publish()
        for pack in going.values():
            self.store.storage.delete(pack_name(pack))

    def merge(self, margin_ms: int = 0, from_packs: bool = False, **sizes: int) -> MergeResult:
        merger = DeltaMerger(self.store, self.sync, self.publisher, self.host.now_ms, **sizes)
        return merger.merge(
            margin_ms, is_everything=self.store.index.has_all_packs, from_packs=from_packs
        )

    def packs(self) -> set[PackRef]:
        return {record.pack for record in self.index.packs()}

    def has(self, plain: bytes) -> bool:
        """Return whether a blob counts as stored."""
        return self.index.are_stored([self.store.codec.digest(plain)])[0]

    def read(self, plain: bytes) -> bytes:
        return self.store.read(self.store.codec.digest(plain))


def locations(index: Index) -> dict[Digest, tuple[PackRef, int, int, int, int, int, int]]:
    """Return every blob of an index with its pack, offset, sizes, kind, codec and position in a group."""
    packs = {record.ordinal: record.pack for record in index.packs()}
    return {digest: (packs[at.pack], *at.in_pack(digest)[1:]) for digest, at in index.blobs()}


Place_ = tuple[PackRef, int, int, int, int, int, int]


def directories(place: Place, folder: Path) -> dict[Digest, set[Place_]]:
    """Return every blob of the storage with all its places, as the directories of the packs say."""
    index = Index(folder, sync=False)
    try:
        store = BlobStore(place.storage, index, BlobCodec(3))
        found: dict[Digest, set[Place_]] = {}
        for pack, size in store.stored_packs():
            for entry in store.read_directory(pack, size):
                found.setdefault(entry.digest, set()).add((pack, *entry[1:]))
        return found
    finally:
        index.close()
        shutil.rmtree(folder)


def require_as_rebuilt(host: OpenHost, expected: dict[Digest, set[Place_]]) -> None:
    """Require that an index is what a rebuild from the packs would give, but for which copy it names."""
    found = locations(host.index)
    assert found.keys() == expected.keys()
    assert all(place in expected[digest] for digest, place in found.items())
    packs = {place[0] for places in expected.values() for place in places}
    assert host.packs() == packs
    assert host.index.partial_packs() == []
    assert host.notes.unverified() == []


def require_truthful(host: OpenHost) -> None:
    """Require that every blob that counts as stored is intact where the index says, without any search."""
    digests = [digest for digest, _ in host.index.blobs()]
    for digest, is_stored in zip(digests, host.index.are_stored(digests), strict=True):
        location = host.index.lookup(digest)
        assert location is not None
        if is_stored:
            host.store.read_at(digest, location)
