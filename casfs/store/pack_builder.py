"""The packs of one writer: those that are being filled, and those that are being committed.

`_commit_packs` is the only place with the order of durable steps: pack data, the pack's name, the index. One
thread fills packs; a second one hashes and writes what was filled, so that a slow disk does not hold up the
first. Other threads commit full packs: one at a time on a disk, and several where packs travel a distance.
What waits to be written or is being committed is bounded in number and bytes, and so is memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from blake3 import blake3

from casfs.digest import Digest, PackId
from casfs.format.codec import ENCRYPTED
from casfs.format.pack import (
    BLOB_HEADER,
    ENCRYPTED_KIND,
    PackEntry,
    PackRef,
    encode_end,
    encode_header,
    encode_record_header,
    encode_session_header,
)
from casfs.storage.base import ObjectWriter
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.layout import NewRecord

if TYPE_CHECKING:
    from casfs.format.cipher import PackCipher
    from casfs.format.key_derivation import WriteSession

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

_BUFFER_BYTES = 1024 * 1024
_WAITING_BUFFERS = 4
"""Buffers of a pack that wait to be written."""

_MAX_UPLOADS = 4
_MAX_UPLOAD_BYTES = 2 * PACK_BYTES
"""Limits of the packs that are on their way at the same time. While the answer for one pack travels, the line
carries the next; a third full pack would add to the memory and not to the speed."""


class OpenPacks:
    """The unfinished packs of one writer, at most one of data and one of metadata. Close them.

    With `dry_run` nothing is stored, and the digests of finished packs are kept instead. `finished` counts
    the finished packs.
    """

    def __init__(
        self,
        store: BlobStore,
        pack_bytes: int,
        session: Callable[[], WriteSession] | None,
        dry_run: bool,
        in_memory: bool,
    ) -> None:
        self.finished = 0
        self._store = store
        self._session = session
        self._dry_run = dry_run
        self._in_memory = in_memory
        self._pack_bytes = {False: pack_bytes, True: min(pack_bytes, META_PACK_BYTES)}
        is_far = store.storage.capabilities.parallel_requests > 1
        self._max_commits = _MAX_UPLOADS if is_far else 1
        self._next_bytes = FIRST_PACK_BYTES if is_far else pack_bytes
        self._committer = ThreadPoolExecutor(_MAX_UPLOADS, "casfs-committer")
        self._spooler = ThreadPoolExecutor(1, "casfs-spooler")
        self._commits: dict[Future[None], list[_OpenPack]] = {}
        self._open: dict[bool, _OpenPack] = {}
        self._dry_run_digests: set[Digest] = set()

    def digests(self) -> Iterator[Set[Digest]]:
        """Yield the sets of the blobs that were added and that the index may lack."""
        yield self._dry_run_digests
        for pack in self._open.values():
            yield pack.digests
        for packs in self._commits.values():
            for pack in packs:
                yield pack.digests

    def add(self, record: NewRecord, is_meta: bool) -> int:
        """Append a record to the open pack of metadata or of data; return its payload's stored size in bytes.

        A pack that is full is committed. Raise the error of a commit that failed.
        """
        pack = self._open.get(is_meta)
        if pack is None:
            pack = self._open[is_meta] = self._new_pack(is_meta)
        stored_bytes = pack.add(record)
        if pack.bytes >= self._full_bytes(is_meta) or pack.has_enough:
            self._finish([pack])
            if not is_meta:
                self._next_bytes *= 2
        return stored_bytes

    def finish(self) -> None:
        """Finish the open packs and wait until all packs are durable and indexed."""
        # Data first: where an interruption leaves one pack, its blobs need no other.
        last = [self._open[is_meta] for is_meta in sorted(self._open)]
        # Over a distance they travel at the same time; on a disk they share the commit of the index.
        for packs in [[pack] for pack in last] if self._max_commits > 1 else [last]:
            self._finish(packs)
        self._wait_for_commits(0, 0)

    def close(self) -> None:
        """Drop the unfinished packs, and wait for those that are being committed."""
        for pack in self._open.values():
            pack.discard()
        self._open.clear()
        self._committer.shutdown()
        self._spooler.shutdown()

    def _full_bytes(self, is_meta: bool) -> int:
        """Return the size at which the open pack is full."""
        most = self._pack_bytes[is_meta]
        return most if is_meta else min(most, self._next_bytes)

    def _new_pack(self, is_meta: bool) -> _OpenPack:
        if self._dry_run:
            return _OpenPack(None, None, is_meta, self._spooler)
        cipher = None
        if self._session is not None:
            from casfs.format.cipher import PackCipher

            cipher = PackCipher.new(self._session())
        spool = self._store.storage.open_writer(self._in_memory)
        return _OpenPack(spool, cipher, is_meta, self._spooler)

    def _finish(self, packs: list[_OpenPack]) -> None:
        if not self._dry_run and packs:
            size = sum(pack.bytes for pack in packs)
            self._wait_for_commits(self._max_commits - 1, _MAX_UPLOAD_BYTES - size)
        for pack in packs:
            # Before the commit begins: an interruption must not drop a pack that is being committed.
            del self._open[pack.is_meta]
            if self._dry_run:
                # Nothing is stored in a dry run, so only the kept digests identify duplicates.
                self._dry_run_digests |= pack.digests
        if not self._dry_run and packs:
            self.finished += len(packs)
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
    """A pack that is being filled; the thread of `spooler` hashes it and writes it to `spool`."""

    def __init__(
        self,
        spool: ObjectWriter | None,
        cipher: PackCipher | None,
        is_meta: bool,
        spooler: ThreadPoolExecutor,
    ) -> None:
        self._spool = spool
        self._spooler = spooler
        self._waiting: deque[Future[None]] = deque()
        self.is_meta = is_meta
        self.entries: list[PackEntry] = []
        self.digests: set[Digest] = set()
        self.bytes = 0
        self._plain_bytes = 0
        self._hasher = blake3()
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

    def flush(self) -> None:
        """Let the buffered bytes be hashed and written; raise the error of an earlier write."""
        while self._waiting and (len(self._waiting) >= _WAITING_BUFFERS or self._waiting[0].done()):
            self._waiting.popleft().result()
        data, self._buffer = self._buffer, bytearray()
        self.bytes += len(data)
        self._waiting.append(self._spooler.submit(self._write, data))

    def commit(self, is_taken: Callable[[PackRef], bool], variant: int) -> PackRef:
        """Append directory and trailer, and make the pack durable; return it. No stored pack has its name.

        A pack with the same blobs may exist and be pending removal. The distinct name protects this pack from
        the prune that removes the other. `variant` is the first number that is tried.
        """
        assert self._spool is not None
        self.flush()
        while self._waiting:
            self._waiting.popleft().result()
        encrypt = self._cipher.encrypt_directory if self._cipher is not None else None
        while True:
            end = encode_end(self.entries, self.bytes, encrypt, variant)
            pack = PackRef(PackId(self._hasher.copy().update(end).digest()), self.is_meta)
            if not is_taken(pack):
                break
            variant += 1
        self._spool.append(end)
        self.bytes += len(end)
        self._spool.commit(pack_name(pack))
        return pack

    def discard(self) -> None:
        """Drop what was written; after `commit`, do nothing."""
        for writing in self._waiting:
            writing.cancel()
        wait(self._waiting)
        if self._spool is not None:
            self._spool.discard()

    def _write(self, data: bytearray) -> None:
        self._hasher.update(data)
        if self._spool is not None:
            self._spool.append(data)


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
            # A random name, where other hosts write: no pack ever has the name of one that was removed, so
            # a deletion that takes effect late deletes no later pack.
            variant = int.from_bytes(os.urandom(8), "big") >> 1 if store.is_shared else 0
            ref = pack.commit(is_taken, variant)
            stored.append((ref, pack.bytes, pack.entries))
    finally:
        for pack in packs:
            pack.discard()
    store.record_packs(stored)
