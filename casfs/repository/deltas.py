"""The index deltas of an open repository: publish what this session did, and merge those of all sessions.

The order of a session is: packs durable and indexed, delta published, snapshot published. The order of a
removal is: packs removed from the index, delta published, packs deleted. So a host that relies on a pack
learns of its removal before the pack is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from casfs.format.delta import DeltaName
from casfs.index.delta_notes import DeltaNotes
from casfs.store.blob_store import BlobStore
from casfs.store.delta_merge import DeltaMerger, MergeResult
from casfs.store.delta_publisher import DeltaPublisher
from casfs.store.delta_sync import DeltaSync

REPLACED_MARGIN_MS = 3_600_000
"""How long a delta stays after a merge has replaced it, for hosts that have listed it and not read it yet."""


class Deltas:
    """The deltas of a repository that is open for writing.

    With `learns` the index is synced by deltas; otherwise by the packs, and deltas only show what others have
    published.
    """

    def __init__(
        self, store: BlobStore, sync: DeltaSync, publisher: DeltaPublisher, learns: bool
    ) -> None:
        self.publisher = publisher
        self.learns = learns
        self._store = store
        self._sync = sync
        self._ignored: set[int] = set()
        self._hidden = self._notes.hidden_removals()

    @property
    def _notes(self) -> DeltaNotes:
        return DeltaNotes(self._store.index)

    def learn_removals(self, list_ahead: Callable[[], dict[DeltaName, int]] | None = None) -> None:
        """Remove from the index the packs that other hosts removed since it was synced; raise StorageError.

        `list_ahead` returns a listing of the deltas that the caller has begun.

        A merge may have dropped the removal of any pack, also of one that this process published after it.
        Then the packs are looked at, or listed if there are many. Packs that are new to the index are not:
        this process does not rely on them until it ends.
        """
        first_new = self._store.index.next_pack()
        self._sync.sync(list_ahead=list_ahead)
        new = {one.ordinal for one in self._notes.unverified() if one.ordinal >= first_new}
        self._store.index.distrust(new)
        self._ignored |= new
        hidden = self._notes.hidden_removals()
        if hidden != self._hidden:
            self._notes.doubt_all()
        self._sync.verify_packs(self._ignored)
        self._hidden = hidden

    def publish(self) -> None:
        """Publish what this session stored and removed, as the last step before its effect is visible.

        The first delta of a repository also names the packs of earlier sessions. Raise StorageError.
        """
        if not self.publisher.has_news():
            return
        if not self.learns:
            self._sync.sync(learn=False)
        is_complete = any(note.is_complete for note in self._notes.all().values())
        self.publisher.publish(everything=not is_complete and self._store.index.has_all_packs)

    def merge(
        self, margin_ms: int = REPLACED_MARGIN_MS, *, from_packs: bool = False
    ) -> MergeResult:
        """Merge small deltas, publish packs that none names, and delete those replaced `margin_ms` ago.

        The caller has compared the index with the packs. With `from_packs` all deltas are replaced by what
        the packs say. Raise StorageError.
        """
        self.publish()
        merger = DeltaMerger(self._store, self._sync, self.publisher, self.publisher.now_ms)
        return merger.merge(
            margin_ms, is_everything=self._store.index.has_all_packs, from_packs=from_packs
        )
