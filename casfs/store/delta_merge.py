"""Merge index deltas: what many small ones say goes into few large ones, and what no delta says is added.

The caller has compared the index with a listing of the packs. The last delta that a merge writes names those
that it replaces. They are deleted once the margin has passed since, so that a host that listed them can still
read them; a host that is slower lists again. A merge that is interrupted leaves deltas that say the same
twice, and the next merge continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from casfs.digest import PackId
from casfs.errors import CasfsError, DeltaError, StorageError
from casfs.format.delta import (
    MAX_REPLACED,
    REPLACED_BYTES,
    DeltaBuilder,
    DeltaName,
    DeltaPack,
)
from casfs.index.bitmap import Bitmap
from casfs.index.delta_notes import DeltaNote, DeltaNotes
from casfs.store.blob_store import BlobStore
from casfs.store.delta_publisher import FUTURE_MS, TARGET_DELTA_BYTES, DeltaPublisher
from casfs.store.delta_sync import DeltaSync

log = logging.getLogger(__name__)

SMALL_DELTA_BYTES = 8 * 1024 * 1024
"""A smaller delta is merged with others."""

_LIVE_SHARE = 0.75
"""A delta with fewer packs that still exist is merged."""


@dataclass(slots=True)
class MergeResult:
    """Counts of a merge: deltas written and replaced, and earlier ones deleted."""

    written: int = 0
    replaced: int = 0
    deleted: int = 0


class DeltaMerger:
    """Merges the deltas of one open store; use each instance once."""

    def __init__(
        self,
        store: BlobStore,
        sync: DeltaSync,
        publisher: DeltaPublisher,
        now_ms: Callable[[], int],
        small_bytes: int = SMALL_DELTA_BYTES,
        most_bytes: int = TARGET_DELTA_BYTES,
    ) -> None:
        self._store = store
        self._sync = sync
        self._publisher = publisher
        self._now_ms = now_ms
        self._small_bytes = small_bytes
        self._most_bytes = most_bytes
        self._notes = DeltaNotes(store.index)
        self._result = MergeResult()
        self._builder = DeltaBuilder()
        self._room_bytes = most_bytes

    def merge(
        self, margin_ms: int, *, is_everything: bool = True, from_packs: bool = False
    ) -> MergeResult:
        """Merge small deltas, publish packs that none names, and delete what was replaced `margin_ms` ago.

        `is_everything` means that the index has every pack that the storage listed. With `from_packs` every
        delta is replaced by the directories of the packs. Raise StorageError.
        """
        # A rebuild of the index has forgotten the deltas.
        listed = self._sync.sync(learn=False).listed
        notes = self._notes.all()
        live = {name for name in listed if name not in notes or not notes[name].replaced_ms}
        going = self._candidates({name: listed[name] for name in live}, notes, from_packs)
        done = self._notes.covered(live - going.keys())
        named = self._notes.covered(live)
        records = self._store.index.packs()
        if (
            len(going) > 1
            or any(going.values())
            or any(record.ordinal not in named for record in records)
        ):
            replaced = sorted(going.keys() | (listed.keys() - live))[:MAX_REPLACED]
            self._begin(len(replaced))
            if not from_packs:
                readable = [name for name in sorted(going, reverse=True) if name in replaced]
                self._copy(readable, listed, done, keeps_removed=bool(live - going.keys()))
            rest = [record for record in records if record.ordinal not in done]
            for pack in self._publisher.read_packs(rest):
                self._add(pack)
            self._builder.replaced += replaced
            self._builder.is_complete = is_everything and not self._publisher.has_left_out
            self._write()
            self._result.replaced = len(going)
        self._delete_replaced(margin_ms)
        return self._result

    def _candidates(
        self, live: dict[DeltaName, int], notes: dict[DeltaName, DeltaNote], from_packs: bool
    ) -> dict[DeltaName, bool]:
        """Return the deltas to replace, and for each whether it is replaced even if it is the only one."""
        found = {}
        existing = self._notes.existing_packs()
        for name, size in live.items():
            note = notes.get(name)
            if note is None or note.is_closed:
                continue
            must = from_packs or note.is_unusable or self._is_future(name)
            must = must or existing.get(name, 0) < note.packs * _LIVE_SHARE
            if must or size < self._small_bytes:
                found[name] = must
        return found

    def _is_future(self, name: DeltaName) -> bool:
        return name.time_ms > self._now_ms() + FUTURE_MS

    def _begin(self, replaced: int) -> None:
        self._room_bytes = self._most_bytes - replaced * REPLACED_BYTES

    def _copy(
        self,
        names: list[DeltaName],
        sizes: dict[DeltaName, int],
        done: Bitmap,
        keeps_removed: bool,
    ) -> None:
        """Write the packs that some deltas name, and that still exist, into new ones, the newest first."""
        for _, delta in self._sync.reader.read_all(iter(names), sizes):
            if isinstance(delta, CasfsError):
                continue
            try:
                for pack in delta.packs():
                    for record in self._notes.records([pack.pack.id]):
                        is_same = (record.pack, record.pack_bytes) == (pack.pack, pack.pack_bytes)
                        if is_same and done.add(record.ordinal):
                            self._add(pack)
            except DeltaError as error:
                log.warning("%s; the directories of the packs are read", error)
            if keeps_removed:
                # A delta that stays may name these packs as stored.
                existing = {ref.id for ref in self._notes.find(delta.removed).values()}
                for removed in delta.removed:
                    if removed not in existing:
                        self._add_removed(removed)

    def _add(self, pack: DeltaPack) -> None:
        if not self._builder.has_room(len(pack.entries), self._room_bytes):
            self._write()
        self._builder.add(pack)

    def _add_removed(self, pack: PackId) -> None:
        if not self._builder.has_room(0, self._room_bytes):
            self._write()
        self._builder.removed.append(pack)

    def _write(self) -> None:
        builder, self._builder = self._builder, DeltaBuilder()
        self._publisher.write(builder)
        self._result.written += 1

    def _delete_replaced(self, margin_ms: int) -> None:
        """Delete the deltas that were replaced longer ago than the margin, and forget them."""
        deleted = []
        now_ms = self._now_ms()
        for name, note in self._notes.all().items():
            if note.replaced_ms and now_ms - note.replaced_ms >= margin_ms:
                try:
                    self._store.storage.delete(str(name))
                except StorageError as error:
                    log.info("%s; a later prune deletes it", error)
                    continue
                deleted.append(name)
        if deleted:
            self._notes.finish({}, gone=deleted)
        self._result.deleted = len(deleted)
