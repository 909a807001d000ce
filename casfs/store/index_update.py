"""Bring the index into agreement with the storage when a repository is opened: by deltas, or by the packs.

A local place is compared with its packs. A remote place is opened by deltas alone once they name every pack;
otherwise its packs are listed, and the directories of those that the index lacks are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from casfs.storage.concurrency import begin
from casfs.store.blob_store import BlobStore
from casfs.store.pending_removal import packs_pending_removal

if TYPE_CHECKING:
    from casfs.store.delta_sync import DeltaSync


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How an opener wants its index.

    A writer (`is_writer`) counts blobs as stored, so it looks at every pack that only deltas name.
    `lists_packs` compares the index with a listing of the packs in any case. For `keep_missing` see
    `BlobStore.reconcile`.
    """

    is_writer: bool = False
    lists_packs: bool = False
    keep_missing: bool = False


def update_index(
    store: BlobStore,
    deltas: DeltaSync | None,
    options: UpdateOptions,
    is_alone: Callable[[], bool] = lambda: True,
) -> None:
    """Bring the index of a store up to date.

    `deltas` is None where the index is compared with the packs only. `is_alone` returns whether no other
    process of this machine writes.
    """
    store.needs_notices = options.is_writer
    has_finished = store.index.has_leaving_packs() and is_alone()
    if has_finished:
        store.index.finish_removals()
    if deltas is not None:
        if not store.index.is_current():
            store.index.rebuild(tuple)
        # Whichever is listed first: what this misses is found by the last look before a snapshot appears.
        pending = None
        if options.is_writer and not options.lists_packs:
            pending = begin(store.storage, lambda: packs_pending_removal(store.storage))
        result = deltas.sync()
        lists_packs = (
            options.lists_packs
            or not result.is_complete
            or bool(result.unusable)
            or has_finished
            or (bool(store.index.partial_packs()) and is_alone())
        )
        if not lists_packs:
            if pending is not None:
                deltas.verify_packs()
                store.apply_notices(is_alone, pending)
            return
    store.reconcile(is_alone, options.keep_missing)
