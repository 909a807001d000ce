"""Blob writer: a producer hands over blobs; they are deduplicated, compressed and packed in batches.

The producer's thread looks up and packs batches, and two threads compress one each. A thread of its own for
packing would compete with the producer for the interpreter's lock, and gain little: see
docs/benchmark-notes.md. Batches are packed in the order of `put`, whichever is compressed first. The layout
decides which blobs share a payload or a pack: data go into one open pack, and trees and content lists into
another where the repository separates metadata. `finish()` returns only when everything that was put is
durable and indexed; `pack_builder` has the order of durable steps. The next `put` or `finish` raises an error
of any thread. Few batches wait and few packs are committed at a time, so memory is bounded.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from casfs.digest import Digest
from casfs.errors import BlobError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind
from casfs.format.pack import BLOB_HEADER, METADATA_KINDS
from casfs.store.blob_store import BlobStore
from casfs.store.claims import ClaimVerifier
from casfs.store.layout import FORMAT_1, NewBlob, NewRecord, PackLayout, encode_records
from casfs.store.pack_builder import PACK_BYTES, OpenPacks

if TYPE_CHECKING:
    from casfs.format.key_derivation import WriteSession

_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOBS = 512
_COMPRESSING_THREADS = 2
_BATCHES_AHEAD = 6
"""Batches that are being compressed or wait for it or to be packed, so that neither side soon waits for the
other where some files are small and some large."""

_LESS_URGENT = 5
"""Niceness of the compression threads, so that the thread that feeds them gets a core first."""

Batch = list[tuple[BlobKind, Digest, bytes]]


@dataclass(slots=True)
class WriteStats:
    """Totals of one writer: new blobs, their plaintext bytes and their stored bytes, and finished packs."""

    new_blobs: int = 0
    new_plain_bytes: int = 0
    new_stored_bytes: int = 0
    packs: int = 0


class BlobWriter:
    """Stores blobs. One thread uses it and closes it in a `finally` block.

    With `dry_run` it does everything except write. `spool_in_memory` keeps unfinished packs in memory instead
    of in temporary files. In an encrypted repository it calls `session` when it begins the first pack; the
    returned session is durable. `layout` is that of the repository's format. `claims` verifies what other
    machines stored.
    """

    def __init__(
        self,
        store: BlobStore,
        dry_run: bool = False,
        spool_in_memory: bool = False,
        pack_bytes: int = PACK_BYTES,
        session: Callable[[], WriteSession] | None = None,
        layout: PackLayout = FORMAT_1,
        claims: ClaimVerifier | None = None,
    ) -> None:
        self.stats = WriteStats()
        self._claims = claims if claims is not None else ClaimVerifier(store)
        self._session = session
        self._store = store
        self._dry_run = dry_run
        self._layout = layout
        self._batch: Batch = []
        self._batch_bytes = 0
        self._compressors = ThreadPoolExecutor(
            _COMPRESSING_THREADS, "casfs-compressor", initializer=_lower_priority
        )
        self._ahead: deque[tuple[list[NewBlob], Future[list[NewRecord]]]] = deque()
        self._ahead_digests: set[Digest] = set()
        self._packs = OpenPacks(store, pack_bytes, session, dry_run, spool_in_memory)
        self._error: BaseException | None = None
        self._closed = False

    def put(self, kind: BlobKind, digest: Digest, plain: bytes) -> None:
        """Queue a blob. `digest` was computed from this buffer, which the caller must not change.

        Raise BlobError for a blob that is larger than readers accept.
        """
        if len(plain) > MAX_PLAIN_BYTES:
            raise BlobError(digest, f"its {len(plain)} bytes are more than a blob may have")
        self._batch.append((kind, digest, plain))
        self._batch_bytes += len(plain)
        if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_BLOBS:
            self._do(self._send)

    def finish(self) -> WriteStats:
        """Wait until everything that was put is durable and indexed. The writer cannot be used afterwards."""
        try:
            self._do(self._finish)
        finally:
            self.close()
        return self.stats

    def close(self) -> None:
        """Stop all threads. Finished packs stay; an unfinished pack is dropped."""
        if self._closed:
            return
        self._closed = True
        if self._error is None:
            self._error = InterruptedError("the writer was closed before it was finished")
        self._ahead.clear()
        self._compressors.shutdown(cancel_futures=True)
        self._packs.close()

    def _do(self, step: Callable[[], None]) -> None:
        """Make a step; after one that failed or was interrupted, raise its error and nothing else."""
        if self._error is not None:
            raise self._error
        try:
            step()
        except BaseException as error:
            # What it left behind may be a part of a record.
            self._error = error
            raise

    def _finish(self) -> None:
        if self._batch:
            self._send()
        while self._ahead:
            self._pack_oldest()
        self._packs.finish()
        self.stats.packs = self._packs.finished

    def _send(self) -> None:
        """Start to compress the blobs of the batch that are not stored yet; pack the batches that are ready.

        Wait for the oldest batch where too many would be ahead.
        """
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        fresh = [
            NewBlob(kind, digest, plain, self._domain_of(digest, plain))
            for kind, digest, plain in self._not_stored(batch)
        ]
        if fresh:
            self._ahead_digests.update([blob.digest for blob in fresh])
            encoding = self._compressors.submit(
                encode_records, self._store.codec, fresh, self._layout
            )
            self._ahead.append((fresh, encoding))
        while self._ahead and (len(self._ahead) >= _BATCHES_AHEAD or self._ahead[0][1].done()):
            self._pack_oldest()

    def _not_stored(self, batch: Batch) -> Batch:
        unfinished = [self._ahead_digests, *self._packs.digests()]
        seen: set[Digest] = set()
        candidates: Batch = []
        for blob in batch:
            digest = blob[1]
            if digest in seen or any(digest in those for those in unfinished):
                continue
            seen.add(digest)
            candidates.append(blob)
        digests = [digest for _, digest, _ in candidates]
        if self._dry_run:
            known = self._store.index.are_stored(digests)
        else:
            known = self._claims.are_stored(digests, [len(plain) for _, _, plain in candidates])
        return [blob for blob, is_known in zip(candidates, known, strict=True) if not is_known]

    def _domain_of(self, digest: Digest, plain: bytes) -> int:
        """Return the index of the domain that keys a blob's digest, 0 in an unencrypted repository."""
        if self._session is None or self._dry_run:
            return 0
        return self._session().domain_of(digest, plain)

    def _pack_oldest(self) -> None:
        """Wait until the oldest batch is compressed, then pack it."""
        batch, encoding = self._ahead[0]
        stats = self.stats
        for record in encoding.result():
            is_meta = self._layout.separates_metadata and record.blobs[0].kind in METADATA_KINDS
            stored_bytes = self._packs.add(record, is_meta)
            stats.new_blobs += len(record.blobs)
            stats.new_plain_bytes += sum([len(blob.plain) for blob in record.blobs])
            stats.new_stored_bytes += stored_bytes + BLOB_HEADER.size
        self._ahead.popleft()
        self._ahead_digests.difference_update([blob.digest for blob in batch])


def _lower_priority() -> None:
    """Lower the priority of the calling thread only."""
    thread = threading.get_native_id()
    try:
        nice = os.getpriority(os.PRIO_PROCESS, thread) + _LESS_URGENT
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    except OSError:
        return  # not permitted: the threads work at normal priority
