"""Read one pack from start to end, and recompute its digest and that of every blob in it.

The memory is bounded by a window of the pack and a batch of decoded blobs. Any thread may do this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from blake3 import blake3

from casfs.errors import BlobError, CasfsError, PackError
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
from casfs.maintenance.findings import Finding, reason_of
from casfs.store.blob_store import BlobStore, pack_name

_WINDOW_BYTES = 8 * 1024 * 1024
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOBS = 512


class PackVerification:
    """The verification of one pack. `on_bytes` is called with the number of bytes of each read."""

    def __init__(self, store: BlobStore, pack: PackRef, on_bytes: Callable[[int], None]) -> None:
        self._store = store
        self._pack = pack
        self._on_bytes = on_bytes

    def verify(self, pack_bytes: int, entries: list[PackEntry]) -> tuple[list[Finding], int]:
        """Return the damage of a pack with these entries, and the bytes that `on_bytes` has got.

        A pack that cannot be read from start to end is read blob by blob.
        """
        damage: list[Finding] = []
        whole = blake3()
        reader = _PackReader(self._store, self._pack, whole, self._on_bytes)
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
                        damage.append(Finding("pack", message, self._pack.id))
                damage += self._verify(wanted)
            reader.read(pack_bytes - TRAILER.size, TRAILER.size)
        except CasfsError as error:
            damage = [
                Finding("pack", reason_of(error), self._pack.id),
                *self._read_one_by_one(entries),
            ]
            return damage, reader.done_bytes
        if whole.digest() != self._pack.id:
            damage.append(Finding("pack", "digest mismatch", self._pack.id))
        return damage, reader.done_bytes

    def _verify(self, wanted: list[tuple[PackEntry, bytes]]) -> Iterator[Finding]:
        """Yield a finding for each damaged blob among entries whose payloads were read."""
        plains = self._store.decode_many(self._pack, wanted)
        for (entry, payload), plain in zip(wanted, plains, strict=True):
            if plain is None:
                try:
                    self._store.decode(self._pack, entry, payload)
                except BlobError as error:
                    yield Finding("blob", error.reason, self._pack.id, entry.digest)

    def _read_one_by_one(self, entries: list[PackEntry]) -> Iterator[Finding]:
        """Yield a finding for each damaged blob of a pack that cannot be read from start to end.

        A group is read once for all its blobs: a bad sector may take a disk many seconds.
        """
        for (offset, stored_bytes), found in groupby(
            sorted(entries, key=PackEntry.place), lambda entry: (entry.offset, entry.stored_bytes)
        ):
            blobs = list(found)
            try:
                payload = self._store.bulk_storage.read(pack_name(self._pack), offset, stored_bytes)
                yield from list(self._verify([(entry, payload) for entry in blobs]))
            except CasfsError as error:
                for entry in blobs:
                    yield Finding("blob", str(error), self._pack.id, entry.digest)


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
        store: BlobStore,
        pack: PackRef,
        whole: blake3,
        on_bytes: Callable[[int], None],
    ) -> None:
        self.done_bytes = 0
        self._on_bytes = on_bytes
        self._storage = store.bulk_storage
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
