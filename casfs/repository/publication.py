"""Publish a snapshot where other hosts may remove packs at any time (FORMAT.md).

1. Store the snapshot as a **draft**; over a distance the index delta of this process is published meanwhile.
   From now on no prune removes a blob that the snapshot needs, unless its removal notice is older than the
   draft.
2. The **last look**: list the removal notices, then learn what was removed: by the index deltas, or by a
   listing of the packs where there are none. Store again every blob whose pack is marked for removal or gone,
   and look again, until a look finds nothing. Where a snapshot with the same root is seen to exist after the
   draft was stored, both are listed at the same time.
3. Store the snapshot under its name, and look once more.
4. Delete the draft where that is allowed. A prune deletes it otherwise.

A prune first publishes its notice and then, before it deletes a pack, lists the drafts and the snapshots. So
the writer sees the notice or the prune sees the draft, however long either of them takes and however late a
request takes effect. A draft is gone only where a prune took its writer for dead, long after the margin: so a
writer that slept during the look stores the draft again and looks again. One thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import (
    BlobError,
    CasfsError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    PacksRemovedError,
    PublicationUnknownError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.format.codec import BlobKind
from casfs.format.pack import PackRef
from casfs.format.tree import Node
from casfs.index.schema import Location
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.remote_writers import is_shared
from casfs.repository.repository import Repository
from casfs.repository.snapshot_listing import DRAFTS, SNAPSHOTS
from casfs.storage.clock import elapsed_ns
from casfs.storage.concurrency import begin
from casfs.store.blob_store import pack_name
from casfs.store.delta_reader import list_deltas
from casfs.store.pending_removal import ListedNotice, list_notices

log = logging.getLogger(__name__)

MARGIN_NS = 3_600_000_000_000
"""How long a pack stays at least after a prune has marked it for removal, where prunes see no locks."""

_MOST_LOOKS = 10


@dataclass(frozen=True, slots=True)
class _Known:
    """The state of the index in which the blobs that a snapshot needs are known to be stored.

    `marked` are the packs (ordinals) that the snapshot does not rely on, because they were marked for removal
    already. `counters` change when entries are lost or packs removed.
    """

    marked: frozenset[int]
    counters: tuple[int, int]


class SnapshotPublisher:
    """Publish snapshots of a repository that is open for writing.

    `has_checked_marks` says that a writer stores again what was in packs that were marked for removal when
    the repository was opened, so that its snapshots do not rely on them.
    """

    def __init__(
        self,
        repository: Repository,
        has_checked_marks: bool,
        elapsed_ns: Callable[[], int] = elapsed_ns,
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._storage = repository.store.storage
        self._elapsed_ns = elapsed_ns
        self._notices: dict[str, ListedNotice] = {}
        self._known = (
            self._distrust_marked()
            if has_checked_marks
            else _Known(frozenset(), self._state().counters)
        )

    def publish(
        self,
        snapshot_id: SnapshotId,
        data: bytes,
        root: Node,
        copy_of: SnapshotId | None,
        unchanged_since: SnapshotId | None,
    ) -> None:
        """Store a snapshot all of whose blobs stay.

        `copy_of` is an existing snapshot with the same root. So is `unchanged_since`, which may have been
        forgotten since the caller found it. Raise StorageError, and PacksRemovedError where blobs are lost;
        nothing is published then.
        """
        name, draft = f"{SNAPSHOTS}/{snapshot_id.hex()}", f"{DRAFTS}/{snapshot_id.hex()}"
        if not is_shared(self._storage):
            self._repository.snapshots.before_publish()
            self._storage.create(name, data)
            if is_shared(self._storage):
                self._look_once_more(snapshot_id, root, self._known)
            return
        began_ns = self._elapsed_ns()
        self._store_draft(draft, data)
        try:
            known = self._known
            while True:
                # The blobs of an existing snapshot stay as long as it exists: its root needs no look.
                if copy_of is None:
                    known = self._look_beside(unchanged_since, root, known)
                if self._elapsed_ns() - began_ns <= MARGIN_NS // 2:
                    break
                began_ns = self._elapsed_ns()
                # A prune drops the draft of a writer that it takes for dead.
                self._storage.create(draft, data)
            self._repository.snapshots.before_publish()
        except BaseException:
            self._try_delete(draft)
            raise
        # From here on a failure leaves the draft, because the snapshot may yet appear.
        try:
            self._storage.create(name, data)
        except StorageUnavailableError as error:
            raise PublicationUnknownError(error) from error
        if copy_of is None or not self._exists(copy_of):
            self._look_once_more(snapshot_id, root, known, unchanged_since)
        self._repository.finish_in_background(lambda: self._try_delete(draft))

    def _store_draft(self, draft: str, data: bytes) -> None:
        """Store a draft and publish what this process stored; neither needs the other."""
        store_draft = begin(self._storage, lambda: self._storage.create(draft, data))
        try:
            self._repository.snapshots.before_publish()
        except BaseException:
            if self._storage.capabilities.parallel_requests > 1:
                with suppress(CasfsError):
                    store_draft()
                    self._try_delete(draft)
            raise
        store_draft()

    def before_deletion(self, snapshot_id: SnapshotId) -> None:
        """Delete the draft of a snapshot that is going to be deleted: alone it would keep the data."""
        if is_shared(self._storage):
            self._storage.delete(f"{DRAFTS}/{snapshot_id.hex()}")

    def begin_again(self) -> None:
        """Take the present state of the index as known, before the caller stores everything again."""
        self._known = self._distrust_marked()

    def _distrust_marked(self) -> _Known:
        """Return the state of the index; the packs marked in it count as marked in this process to its end.

        Other processes of this machine share the index, and may remove a mark whose notice is still there.
        """
        known = self._state()
        self._store.index.distrust(known.marked)
        return known

    def _state(self) -> _Known:
        index = self._store.index
        return _Known(index.marked_for_removal(), (index.loss_epoch(), index.removals()))

    def _look_once_more(
        self,
        snapshot_id: SnapshotId,
        root: Node,
        known: _Known,
        unchanged_since: SnapshotId | None = None,
    ) -> None:
        """Look again after publication; withdraw a snapshot whose blobs are lost."""
        try:
            self._look_beside(unchanged_since, root, known)
            self._repository.snapshots.before_publish()
        except PacksRemovedError:
            self._storage.delete(f"{SNAPSHOTS}/{snapshot_id.hex()}")
            self._try_delete(f"{DRAFTS}/{snapshot_id.hex()}")
            raise
        except (StorageError, StorageUnavailableError) as error:
            log.warning(
                "snapshot %s is published; what it needs could not be looked at once more: %s",
                short_id(snapshot_id),
                error,
            )

    def _look_beside(self, unchanged_since: SnapshotId | None, root: Node, known: _Known) -> _Known:
        """Look, over a distance in one round trip where an existing snapshot has the same root.

        The blobs of a snapshot stay as long as it exists. While it does, the order in which a look lists does
        not matter. Where it is gone, look in order.
        """
        if unchanged_since is None or self._storage.capabilities.parallel_requests <= 1:
            return self._look(root, known)
        exists = begin(self._storage, lambda: self._exists(unchanged_since))
        known = self._look(root, known, at_once=True)
        return known if exists() else self._look(root, known)

    def _look(self, root: Node, known: _Known, at_once: bool = False) -> _Known:
        """Store again what the root needs and other hosts remove, until a look finds nothing new.

        With `at_once`, list notices and deltas at the same time. Return the state of the index in which
        nothing that the root needs is removed.
        """
        for _ in range(_MOST_LOOKS):
            if self._is_unchanged(known, at_once):
                return known
            known = self._distrust_marked()
            self._restore(root, known.marked)
        raise PacksRemovedError(self._storage.url, "packs are removed again and again")

    def _is_unchanged(self, known: _Known, at_once: bool) -> bool:
        """Return whether no pack was marked for removal or removed since `known`; update the index."""
        index = self._store.index
        # The notices first: the delta that names a pack as removed comes before the pack's deletion, and the
        # deletion of the notice comes last.
        deltas = self._repository.deltas
        learns = deltas is not None and deltas.learns
        list_ahead = None
        if at_once and learns:
            list_ahead = begin(self._storage, lambda: list_deltas(self._storage))
        self._notices = list_notices(self._storage, self._notices)
        if deltas is not None and learns:
            deltas.learn_removals(list_ahead)
        else:
            self._remove_missing()
        pending = {pack for listed in self._notices.values() for pack in listed.notice.pack_refs()}
        if pending:
            marked = {one.ordinal for one in index.packs() if one.pack in pending}
            index.change_marked(marked - index.marked_for_removal(), frozenset())
        state = self._state()
        return state.marked <= known.marked and state.counters == known.counters

    def _remove_missing(self) -> None:
        """Remove from the index the packs that the storage lacks; raise StorageError."""
        # The records before the listing: what is in the index then is in the storage, so it is listed.
        records = self._store.index.packs()
        stored = {pack for pack, _ in self._store.stored_packs()}
        gone = {
            one.ordinal: one.pack
            for one in records
            if one.pack not in stored and self._is_gone(one.pack)
        }
        if gone:
            self._store.index.remove_packs(gone, lost=True)

    def _is_gone(self, pack: PackRef) -> bool:
        """Return whether the storage lacks a pack that was not listed; raise StorageError."""
        try:
            self._storage.size(pack_name(pack))
        except NotFoundError:
            return True
        return False

    def _restore(self, root: Node, marked: frozenset[int]) -> None:
        """Store again the blobs that the root needs and that are in marked packs.

        Raise PacksRemovedError where a blob cannot be found or read.
        """
        writer = self._repository.writer()
        restored = 0

        def restore(digest: Digest, location: Location) -> None:
            nonlocal restored
            if location.pack in marked:
                plain = self._store.read(digest)
                self._require_own_domain(digest, plain)
                writer.put(BlobKind(location.kind), digest, plain)
                restored += 1

        try:
            NeededBlobs(self._repository, on_blob=restore).add(root)
            writer.finish()
        except (IntegrityError, KeyMissingError, NotFoundError) as error:
            raise PacksRemovedError(self._storage.url, str(error)) from error
        finally:
            writer.close()
        if restored:
            log.info("%d blobs were stored again, since a prune removes their packs", restored)

    def _require_own_domain(self, digest: Digest, plain: bytes) -> None:
        """Raise BlobError for a blob whose digest this writer's session cannot verify."""
        keys = self._repository.key_manager
        if keys is not None:
            session = keys.session()
            domain = session.domains[session.domain_of(digest, plain)]
            if blake3(plain, key=domain.digest_key).digest() != digest:
                raise BlobError(digest, "it belongs to the dedup domain of another writer")

    def _exists(self, snapshot_id: SnapshotId) -> bool:
        """Return whether a snapshot is there, False where that may not be asked; raise StorageError."""
        try:
            return self._storage.size(f"{SNAPSHOTS}/{snapshot_id.hex()}") >= 0
        except (NotFoundError, StorageDeniedError):
            return False

    def _try_delete(self, name: str) -> None:
        try:
            self._storage.delete(name)
        except CasfsError as error:
            log.debug("%s stays until a prune: %s", name, error)
