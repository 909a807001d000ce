"""An open repository, as passed to every command. `casfs.repository.opening` opens it.

A repository belongs to the process that opened it. Threads may read blobs concurrently (`BlobStore`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from casfs.crypto.opening import make_ciphers, make_codec
from casfs.errors import (
    CasfsError,
    IndexUnusableError,
)
from casfs.format.config import (
    RepositoryConfig,
)
from casfs.format.tree import Node, TreeRef
from casfs.index.index import Index
from casfs.index.schema import PackRecord
from casfs.repository.activity import Activity
from casfs.repository.index_opening import close_index, has_deltas, make_delta_sync
from casfs.repository.place import LocalPlace, Place, RemotePlace
from casfs.repository.snapshots import SnapshotStore
from casfs.storage.base import Storage
from casfs.storage.clock import StorageClock
from casfs.storage.concurrency import begin
from casfs.storage.locks import LockMode, LockRecord
from casfs.storage.reserve import allocate_reserve
from casfs.store.blob_store import BlobStore
from casfs.trees.reader import TreeReader

if TYPE_CHECKING:
    # Each is imported by the method that needs it: a list of snapshots needs none of them.
    from casfs.crypto.key_manager import KeyManager
    from casfs.format.chunker import Chunker
    from casfs.repository.deltas import Deltas
    from casfs.store.claims import ClaimVerifier
    from casfs.store.delta_sync import DeltaSync
    from casfs.store.writer import BlobWriter
    from casfs.trees.content import ContentReader, Put
    from casfs.trees.writer import TreeWriter

log = logging.getLogger(__name__)


class Repository:
    """An open repository. `close` it, or use it in a `with` block.

    `loss_epoch` is the index's count of losses of entries when the repository was opened for writing, 0 for a
    reader. `deltas` is None for a reader, and where the repository has no index deltas.
    """

    def __init__(
        self,
        place: Place,
        config: RepositoryConfig,
        storage: Storage,
        index: Index,
        level: int,
        activity: Activity,
        key_manager: KeyManager | None = None,
    ) -> None:
        self.place = place
        self.config = config
        self.key_manager = key_manager
        self.codec = make_codec(level, key_manager)
        self.store = BlobStore(storage, index, self.codec, make_ciphers(storage, key_manager))
        self.trees = TreeReader(self.store.read)
        self._activity = activity
        self._endings: list[Callable[[], None]] = []
        self.loss_epoch = index.loss_epoch() if activity.is_writer else 0
        self.snapshots = SnapshotStore(
            storage, self.codec, index, self.trees, key_manager, self.loss_epoch
        )
        self.deltas = self._make_deltas() if config.has_deltas and activity.is_writer else None
        if self.deltas is not None:
            self.store.deltas = self.deltas.publisher
            self.snapshots.before_publish = self.deltas.publish

    def _make_deltas(self) -> Deltas:
        from casfs.repository.deltas import Deltas
        from casfs.store.delta_publisher import DeltaPublisher

        publisher = DeltaPublisher(
            self.store,
            self.key_manager.session if self.key_manager is not None else None,
            lambda: self.clock.now_ns() // 1_000_000,
            lambda: all(lock.mode == LockMode.READER for lock in self.other_locks().values()),
        )
        learns = has_deltas(self.place, self.config)
        return Deltas(self.store, self.delta_sync, publisher, learns)

    @property
    def delta_sync(self) -> DeltaSync:
        """The sync of index deltas, with the keys of this process."""
        return make_delta_sync(self.store, make_ciphers(self.store.storage, self.key_manager))

    @cached_property
    def claims(self) -> ClaimVerifier:
        """The verifier of data that other machines stored, before a writer relies on it."""
        from casfs.store.claims import ClaimVerifier

        return ClaimVerifier(self.store)

    def close(self) -> None:
        """Close the index, record which packs were read completely, and release the lock."""
        storage = self.store.storage
        verified = self._verified_packs()
        close_index(self.store.index)
        self._record_verified(verified)
        is_writer = self._activity.is_writer
        self._activity.end()
        for wait in self._endings:
            wait()
        storage.close()
        if is_writer and isinstance(self.place, LocalPlace):
            allocate_reserve(self.place.root)

    def finish_in_background(self, call: Callable[[], None]) -> None:
        """Begin a call that raises nothing and that nothing waits for before `close`.

        Where requests do not travel a distance, it is made at once.
        """
        if self.store.storage.capabilities.parallel_requests <= 1:
            call()
            return
        self._endings.append(begin(self.store.storage, call))

    def _verified_packs(self) -> list[PackRecord]:
        """Return the packs whose directory and blobs were all verified where they are stored.

        What is read of a remote place may come from a cache, and a directory costs requests: only a check
        verifies packs there.
        """
        if self.store.verified.is_empty() or isinstance(self.place, RemotePlace):
            return []
        try:
            found = self.store.verified.complete_packs(self.store.index.packs())
            for record in found:
                self.store.read_directory(record.pack, record.pack_bytes)
        except CasfsError:
            return []
        return found

    def _record_verified(self, packs: list[PackRecord]) -> None:
        if not packs:
            return
        try:
            index = Index(self.store.index.path)
            try:
                # The index may have been rebuilt meanwhile, with other ordinals. A damaged pack may still
                # have intact blobs: it keeps its mark, so that a prune replaces it.
                current = {one.ordinal: one.pack for one in index.packs() if not one.is_damaged}
                same = [one.ordinal for one in packs if current.get(one.ordinal) == one.pack]
                index.mark_verified(same, int(time.time()))
            finally:
                close_index(index)
        except IndexUnusableError as error:
            log.info("cannot record the verified packs: %s", error)

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def clock(self) -> StorageClock:
        """The clock of the storage; a writer waits until it is set."""
        self._activity.wait_for_clock()
        return self._activity.clock

    @property
    def presence_name(self) -> str | None:
        """The name of this process's presence object, None where it has none."""
        presence = self._activity.presence
        return presence.name if presence is not None else None

    @property
    def lacks_identity(self) -> bool:
        """Whether the repository is encrypted and no identity was given."""
        return self.key_manager is not None and not self.key_manager.can_read

    def chunker(self) -> Chunker:
        """Return a chunker with the repository's parameters, for use by one thread."""
        from casfs.format.chunker import make_chunker

        config = self.config.chunker
        domain = self.key_manager.domain if self.key_manager is not None else None
        if domain is None:
            return make_chunker(config)
        seeded = msgspec.structs.replace(config, seed=domain.chunker_seed)
        return make_chunker(seeded, domain.chunker_key)

    @property
    def tree_seed(self) -> int:
        """The start value of the CRC-32 that splits large directories."""
        if self.key_manager is not None and self.key_manager.domain is not None:
            return self.key_manager.domain.tree_seed
        return self.config.tree_seed

    def writer(self, dry_run: bool = False, spool_in_memory: bool = False) -> BlobWriter:
        """Return a writer of blobs; the repository must be open for writing."""
        from casfs.store.layout import FORMAT_1, FORMAT_2
        from casfs.store.writer import BlobWriter

        return BlobWriter(
            self.store,
            dry_run=dry_run,
            spool_in_memory=spool_in_memory,
            session=self.key_manager.session if self.key_manager is not None else None,
            layout=FORMAT_2 if self.config.separates_metadata else FORMAT_1,
            claims=self.claims,
        )

    def tree_writer(
        self,
        put: Put,
        previous: TreeRef | None = None,
        previous_single: list[Node] | None = None,
    ) -> TreeWriter:
        """Return a writer of one directory's tree in the repository's format; see `TreeWriter`."""
        from casfs.trees.writer import TreeWriter

        return TreeWriter(
            put,
            self.codec.digest,
            self.tree_seed,
            previous,
            previous_single,
            counts_xattrs=self.config.counts_xattrs,
        )

    @property
    def has_keyed_digests(self) -> bool:
        """Whether the digests of blobs are keyed, so that none is that of a file."""
        return self.key_manager is not None

    def content(self, node: Node) -> ContentReader:
        """Return the reader of a regular file's content list."""
        from casfs.trees.content import ContentReader

        return ContentReader(node.content, node.levels, self.store.read)

    def other_locks(self) -> dict[str, LockRecord]:
        """Return the locks that other living processes hold, by name."""
        own = self._activity.lock.name if self._activity.lock is not None else None
        live = self.place.locks(self.config).reap()
        return {name: record for name, record in live.items() if name != own}

    def is_alone(self) -> bool:
        """Return whether no other process with a lock writes."""
        return all(lock.mode == LockMode.READER for lock in self.other_locks().values())
