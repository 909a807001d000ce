"""Blob writer: a producer hands over blobs; background threads deduplicate, compress and pack them.

Each writer runs a thread that deduplicates and packs, two that compress a batch each, and one that commits
full packs; several commit at the same time where packs travel a distance. Batches are packed in the order of
`put`, whichever is compressed first. The layout decides which blobs share a payload or a pack: data go into
one open pack, and trees and content lists into another where the repository separates metadata.
`_commit_packs` is the only place with the order of durable steps: pack data, the pack's name, the index.
`finish()` returns only when everything that was put is durable and indexed. The next `put` or `finish` raises
an error of any thread. The queues between the threads hold few batches, and few packs are committed at a
time, so memory is bounded.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from casfs.digest import Digest, PackId
from casfs.errors import BlobError
from casfs.format.codec import ENCRYPTED, MAX_PLAIN_BYTES, BlobKind
from casfs.format.pack import (
    BLOB_HEADER,
    ENCRYPTED_KIND,
    METADATA_KINDS,
    PackEntry,
    PackRef,
    encode_end,
    encode_header,
    encode_record_header,
    encode_session_header,
)
from casfs.storage.base import ObjectWriter
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.claims import ClaimVerifier
from casfs.store.layout import FORMAT_1, NewBlob, NewRecord, PackLayout, encode_records

if TYPE_CHECKING:
    from casfs.format.cipher import PackCipher
    from casfs.format.key_derivation import WriteSession

log = logging.getLogger(__name__)

PACK_BYTES = 64 * 1024 * 1024
"""A pack is finished at this size: large enough for few files and syncs, small enough to move."""

FIRST_PACK_BYTES = 8 * 1024 * 1024
"""The size of the first data pack over a distance; each further one is twice as large, up to PACK_BYTES. So
the line is used soon, and a pack is full before the one before it has been sent."""

META_PACK_BYTES = 16 * 1024 * 1024
"""A metadata pack is finished at this size: a reader's cache keeps it whole, and two packs may be open."""

PACK_BLOBS = 32_768
"""A pack is also finished at this many blobs, as a check holds several directories in memory."""

_PACK_PLAIN_BYTES = 32 * 1024**3
"""A pack is finished at this size of its plaintext, too: a scan of a damaged pack decodes only so much."""

_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOBS = 512
_QUEUED_BATCHES = 2
_COMPRESSING_THREADS = 2
_COMPRESSED_AHEAD = _COMPRESSING_THREADS + 1
"""Batches that are being compressed or wait to be packed: one more than threads, so that no thread idles."""

_POLL_S = 0.02
"""How often the packer checks whether a batch is compressed while the producer sends none."""

_LESS_URGENT = 5
"""Niceness of the compression threads, so that the threads that feed them get a core first."""

_BUFFER_BYTES = 1024 * 1024

_MAX_UPLOADS = 4
_MAX_UPLOAD_BYTES = 2 * PACK_BYTES
"""Limits of the packs that are on their way at the same time. While the answer for one pack travels, the line
carries the next; a third full pack would add to the memory and not to the speed."""

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
        self._in_memory = spool_in_memory
        self._pack_bytes = pack_bytes
        self._layout = layout
        self._batch: Batch = []
        self._batch_bytes = 0
        self._queue: queue.Queue[Batch | None] = queue.Queue(_QUEUED_BATCHES)
        self._error: BaseException | None = None
        self._closed = False
        self._packer = threading.Thread(target=self._run, name="casfs-packer", daemon=True)
        self._packer.start()

    def put(self, kind: BlobKind, digest: Digest, plain: bytes) -> None:
        """Queue a blob. `digest` was computed from this buffer, which the caller must not change.

        Raise BlobError for a blob that is larger than readers accept.
        """
        if len(plain) > MAX_PLAIN_BYTES:
            raise BlobError(digest, f"its {len(plain)} bytes are more than a blob may have")
        self._batch.append((kind, digest, plain))
        self._batch_bytes += len(plain)
        if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_BLOBS:
            self._send()

    def finish(self) -> WriteStats:
        """Wait until everything that was put is durable and indexed. The writer cannot be used afterwards."""
        if self._batch:
            self._send()
        self._queue.put(None)
        self._packer.join()
        self._closed = True
        self._raise_error()
        return self.stats

    def close(self) -> None:
        """Stop all threads. Finished packs stay; an unfinished pack is dropped."""
        if self._closed:
            return
        self._closed = True
        if self._error is None:
            self._error = InterruptedError("the writer was closed before it was finished")
        self._queue.put(None)
        self._packer.join()

    def _send(self) -> None:
        self._raise_error()
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._queue.put(batch)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        with (
            ThreadPoolExecutor(_MAX_UPLOADS, "casfs-committer") as committer,
            ThreadPoolExecutor(
                _COMPRESSING_THREADS, "casfs-compressor", initializer=_lower_priority
            ) as compressors,
        ):
            packer = _Packer(self, committer, compressors)
            try:
                while (batch := self._next(packer)) is not None:
                    if self._error is None:
                        try:
                            packer.store(batch)
                        except BaseException as error:  # handed to the producer
                            self._error = error
                if self._error is None:
                    packer.finish()
            except BaseException as error:  # handed to the producer
                self._error = error
            finally:
                try:
                    packer.discard()
                except Exception as error:  # no thread prints a traceback
                    log.debug("an unfinished pack cannot be discarded: %s", error)

    def _next(self, packer: _Packer) -> Batch | None:
        """Return the next batch; while none is queued, pack the batches that are compressed."""
        while self._error is None and packer.has_pending:
            is_ready = packer.oldest_done
            with suppress(queue.Empty):
                return self._queue.get(timeout=0 if is_ready else _POLL_S)
            if is_ready:
                try:
                    packer.pack_oldest()
                except (
                    BaseException
                ) as error:  # handed to the producer, whose batches are still taken
                    self._error = error
        return self._queue.get()


def _lower_priority() -> None:
    """Lower the priority of the calling thread only."""
    thread = threading.get_native_id()
    try:
        nice = os.getpriority(os.PRIO_PROCESS, thread) + _LESS_URGENT
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    except OSError:
        return  # not permitted: the threads work at normal priority


class _Packer:
    """State of the packing thread: batches being compressed, the open packs, and those being committed."""

    def __init__(
        self, writer: BlobWriter, committer: ThreadPoolExecutor, compressors: ThreadPoolExecutor
    ) -> None:
        self._store = writer._store
        self._claims = writer._claims
        self._stats = writer.stats
        self._dry_run = writer._dry_run
        self._in_memory = writer._in_memory
        self._session = writer._session
        self._layout = writer._layout
        meta_bytes = min(writer._pack_bytes, META_PACK_BYTES)
        self._pack_bytes = {False: writer._pack_bytes, True: meta_bytes}
        self._compressors = compressors
        self._ahead: deque[tuple[list[NewBlob], Future[list[NewRecord]]]] = deque()
        self._ahead_digests: set[Digest] = set()
        self._committer = committer
        is_far = self._store.storage.capabilities.parallel_requests > 1
        self._max_commits = _MAX_UPLOADS if is_far else 1
        self._next_bytes = FIRST_PACK_BYTES if is_far else writer._pack_bytes
        self._commits: dict[Future[None], list[_OpenPack]] = {}
        self._open: dict[bool, _OpenPack] = {}
        self._dry_run_digests: set[Digest] = set()

    def store(self, batch: Batch) -> None:
        """Start to compress a batch's blobs that are not stored yet; pack an earlier batch if enough wait."""
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
        if len(self._ahead) >= _COMPRESSED_AHEAD:
            self.pack_oldest()

    @property
    def has_pending(self) -> bool:
        """Whether a batch was handed over that is not packed yet."""
        return bool(self._ahead)

    @property
    def oldest_done(self) -> bool:
        """Whether the oldest batch is compressed."""
        return self._ahead[0][1].done()

    def pack_oldest(self) -> None:
        """Wait until the oldest batch is compressed, then pack it."""
        batch, encoding = self._ahead.popleft()
        for record in encoding.result():
            is_meta = self._layout.separates_metadata and record.blobs[0].kind in METADATA_KINDS
            pack = self._open.get(is_meta)
            if pack is None:
                pack = self._open[is_meta] = self._new_pack(is_meta)
            stored_bytes = pack.add(record)
            self._stats.new_blobs += len(record.blobs)
            self._stats.new_plain_bytes += sum(len(blob.plain) for blob in record.blobs)
            self._stats.new_stored_bytes += stored_bytes + BLOB_HEADER.size
            if pack.bytes >= self._full_bytes(is_meta) or pack.has_enough:
                self._finish_packs([pack])
                if not is_meta:
                    self._next_bytes *= 2
        self._ahead_digests.difference_update([blob.digest for blob in batch])

    def _full_bytes(self, is_meta: bool) -> int:
        """Return the size at which the open pack is full."""
        most = self._pack_bytes[is_meta]
        return most if is_meta else min(most, self._next_bytes)

    def finish(self) -> None:
        """Pack the remaining batches, finish the open packs and wait until all packs are durable."""
        while self._ahead:
            self.pack_oldest()
        # Data first: where an interruption leaves one pack, its blobs need no other.
        last = [self._open[is_meta] for is_meta in sorted(self._open)]
        # Over a distance they travel at the same time; on a disk they share the commit of the index.
        for packs in [[pack] for pack in last] if self._max_commits > 1 else [last]:
            self._finish_packs(packs)
        self._wait_for_commits(0, 0)

    def discard(self) -> None:
        """Drop the unpacked batches and the unfinished packs."""
        for _, encoding in self._ahead:
            encoding.cancel()
        self._ahead.clear()
        for pack in self._open.values():
            if pack.spool is not None:
                pack.spool.discard()
        self._open.clear()

    def _domain_of(self, digest: Digest, plain: bytes) -> int:
        """Return the index of the domain that keys a blob's digest, 0 in an unencrypted repository."""
        if self._session is None or self._dry_run:
            return 0
        return self._session().domain_of(digest, plain)

    def _new_pack(self, is_meta: bool) -> _OpenPack:
        if self._dry_run:
            return _OpenPack(None, None, is_meta)
        cipher = None
        if self._session is not None:
            from casfs.format.cipher import PackCipher

            cipher = PackCipher.new(self._session())
        return _OpenPack(self._store.storage.open_writer(self._in_memory), cipher, is_meta)

    def _not_stored(self, batch: Batch) -> Batch:
        unfinished = [self._ahead_digests, self._dry_run_digests]
        unfinished += [pack.digests for pack in self._open.values()]
        unfinished += [pack.digests for packs in self._commits.values() for pack in packs]
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

    def _finish_packs(self, packs: list[_OpenPack]) -> None:
        if not self._dry_run and packs:
            size = sum(pack.bytes for pack in packs)
            self._wait_for_commits(self._max_commits - 1, _MAX_UPLOAD_BYTES - size)
        for pack in packs:
            del self._open[pack.is_meta]
            if self._dry_run:
                # Nothing is stored in a dry run, so only the kept digests identify duplicates.
                self._dry_run_digests |= pack.digests
        if not self._dry_run and packs:
            self._stats.packs += len(packs)
            self._commits[self._committer.submit(_commit_packs, self._store, packs)] = packs

    def _wait_for_commits(self, max_packs: int, max_bytes: int) -> None:
        """Wait until at most so many packs, with at most so many bytes, are being committed.

        Raise the error of a commit that failed.
        """
        while self._commits:
            for commit in [one for one in self._commits if one.done()]:
                del self._commits[commit]
                commit.result()
            on_their_way = sum(pack.bytes for packs in self._commits.values() for pack in packs)
            if len(self._commits) <= max_packs and on_their_way <= max_bytes:
                return
            wait(self._commits, return_when=FIRST_COMPLETED)


class _OpenPack:
    """A pack that is being filled."""

    def __init__(
        self, spool: ObjectWriter | None, cipher: PackCipher | None, is_meta: bool
    ) -> None:
        self.spool = spool
        self.is_meta = is_meta
        self.entries: list[PackEntry] = []
        self.digests: set[Digest] = set()
        self.bytes = 0
        self._plain_bytes = 0
        self.hasher = blake3()
        self._cipher = cipher
        header = encode_header()
        if cipher is not None:
            header = encode_session_header(cipher.session.id, cipher.salt)
        self._buffer = bytearray(header)

    @property
    def has_enough(self) -> bool:
        """Whether it has as many blobs, or as much plaintext, as a pack is given."""
        return len(self.entries) >= PACK_BLOBS or self._plain_bytes >= _PACK_PLAIN_BYTES

    def add(self, record: NewRecord) -> int:
        """Append one record and return its payload's stored size in bytes."""
        buffer = self._buffer
        offset = self.bytes + len(buffer) + BLOB_HEADER.size
        blobs, used, payload, plain_bytes = record
        codec, kind, domain = int(used), blobs[0].kind, blobs[0].domain
        if self._cipher is None:
            buffer += encode_record_header(kind, codec, len(payload), plain_bytes)
        else:
            payload = self._cipher.encrypt(offset, kind, codec, domain, plain_bytes, payload)
            buffer += encode_record_header(ENCRYPTED_KIND, ENCRYPTED, len(payload), 0)
            codec |= ENCRYPTED
        buffer += payload
        self._plain_bytes += plain_bytes
        for position, blob in enumerate(blobs):
            self.digests.add(blob.digest)
            self.entries.append(
                PackEntry(blob.digest, offset, len(payload), len(blob.plain), kind, codec, position)
            )
        if len(buffer) >= _BUFFER_BYTES:
            self.flush()
        return len(payload)

    def end(self, is_taken: Callable[[PackRef], bool], variant: int = 0) -> PackRef:
        """Append directory and trailer and return the pack, whose name no stored pack has.

        A pack with the same blobs may exist and be pending removal. The distinct name protects this pack from
        the prune that removes the other. `variant` is the first number that is tried.
        """
        self.flush()
        encrypt = self._cipher.encrypt_directory if self._cipher is not None else None
        while True:
            end = encode_end(self.entries, self.bytes, encrypt, variant)
            pack = PackRef(PackId(self.hasher.copy().update(end).digest()), self.is_meta)
            if not is_taken(pack):
                break
            variant += 1
        self._buffer += end
        self.flush()
        return pack

    def flush(self) -> None:
        """Hash the buffered bytes and pass them to the object writer."""
        self.hasher.update(self._buffer)
        if self.spool is not None:
            self.spool.append(self._buffer)
        self.bytes += len(self._buffer)
        self._buffer = bytearray()


def _commit_packs(store: BlobStore, packs: list[_OpenPack]) -> None:
    """Make packs durable, then their names, then their index entries; crash recovery needs this order.

    Where one of the packs fails, the next command that opens the repository adds the others to the index.
    """

    def is_taken(pack: PackRef) -> bool:
        # The index has a name once, so the packs below both prefixes must not share one. A random name is
        # that of no stored pack.
        return store.index.has_pack(pack.id) or (not store.is_shared and store.has_pack(pack))

    stored = []
    try:
        for pack in packs:
            assert pack.spool is not None
            # A random name, where other hosts write: no pack ever has the name of one that was removed, so
            # a deletion that takes effect late deletes no later pack.
            variant = int.from_bytes(os.urandom(8), "big") >> 1 if store.is_shared else 0
            ref = pack.end(is_taken, variant)
            pack.spool.commit(pack_name(ref))
            stored.append((ref, pack.bytes, pack.entries))
    finally:
        for pack in packs:
            assert pack.spool is not None
            pack.spool.discard()
    store.record_packs(stored)
