"""Verify what other machines say that their packs hold, before a writer relies on it.

This machine believes its index for the packs that it stored. For a pack that another machine stored, the
index has what an index delta or the pack's directory says: a *claim*. Before a writer skips a blob because
of a claim, the blob is read and its digest recomputed. The index remembers the result for each blob, so a
machine pays once. A blob that is not there no longer counts as stored, so the writer stores it. Where this
process cannot read the pack, a claim counts for nothing, and the writer stores the blob too.

A writer that shares many blobs of a pack shares most of them as a rule. So the first few are read one by one,
and from a share of the pack on the rest is verified at once. Threads may share the verifier.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from casfs.digest import Digest, PackId, short_id
from casfs.errors import CasfsError, PackError
from casfs.format.codec import MAX_PLAIN_BYTES
from casfs.format.group import MAX_GROUP_BYTES
from casfs.format.pack import MAX_STORED_BYTES, PackRef
from casfs.index.delta_notes import DeltaNotes
from casfs.index.schema import Location
from casfs.storage.base import Storage
from casfs.store.batch_read import BlobRun, ReadPlan, gather_reads
from casfs.store.blob_store import BlobStore, pack_name

log = logging.getLogger(__name__)

_WHOLE_SHARE = 1 / 8
"""From this share of its bytes on, a pack is verified as a whole: at most eight times what is needed."""

_SMALL_PACK_BYTES = 1024 * 1024
"""A smaller pack is verified as a whole at once: a second request costs more than its bytes."""

_BATCH_BYTES = 8 * 1024 * 1024
"""The most plaintext that is in memory of one read, but for a single larger blob."""


class ClaimVerifier:
    """Decide which blobs of a store count as stored for a writer.

    `false_packs` are the packs that lacked blobs which other machines said they hold, with their number.
    """

    def __init__(self, store: BlobStore) -> None:
        self.false_packs: dict[PackId, int] = {}
        self._store = store
        self._plan = ReadPlan.of(store.storage)
        self._lock = threading.Lock()
        self._relied_bytes: dict[int, int] = {}
        self._whole: set[int] = set()

    def are_stored(
        self, digests: Sequence[Digest], sizes: Sequence[int] | None = None
    ) -> list[bool]:
        """Return for each digest whether the blob is stored, as far as this machine has seen itself.

        `sizes` are the plaintext sizes in bytes; without them, a claim of any size is verified.
        """
        index = self._store.index
        stored = index.are_stored(digests)
        asked = [digest for digest, is_stored in zip(digests, stored, strict=True) if is_stored]
        if not index.claims(asked):
            return stored
        with self._lock:
            # Another thread may have verified some of them meanwhile.
            claims = index.claims(asked)
            known = dict(zip(digests, sizes, strict=True)) if sizes is not None else {}
            found = self._verify(claims, _of_wrong_size(claims, known))
        return [
            is_stored and (digest in found or digest not in claims)
            for digest, is_stored in zip(digests, stored, strict=True)
        ]

    def _verify(self, claims: Mapping[Digest, Location], wrong: set[Digest]) -> set[Digest]:
        """Return the blobs that are where a claim says; those in `wrong` cannot be."""
        by_pack: dict[int, dict[Digest, Location]] = {}
        for digest, at in claims.items():
            by_pack.setdefault(at.pack, {})[digest] = at
        found: set[Digest] = set()
        for ordinal, wanted in by_pack.items():
            possible = {digest: at for digest, at in wanted.items() if digest not in wrong}
            try:
                places = self._read(ordinal, possible) if possible else {}
            except CasfsError as error:
                # Without the keys, or where the pack is gone or cannot be read, the blobs are stored again.
                log.info("%d blobs that others stored cannot be verified: %s", len(wanted), error)
                continue
            self._settle(ordinal, places, wanted.keys() - places.keys())
            found |= wanted.keys() & places.keys()
        return found

    def _read(
        self, ordinal: int, wanted: Mapping[Digest, Location]
    ) -> dict[Digest, tuple[int, int]]:
        """Return the places of the wanted blobs that a pack holds, and of those read with them."""
        pack = self._store.index.pack_ref(ordinal)
        blobs = dict(wanted)
        if self._is_whole_due(ordinal, pack, wanted.values()):
            for digest, at in self._directory(ordinal, pack):
                blobs.setdefault(digest, at)
        # What was read of metadata is in the cache; data would displace more useful data there.
        storage = self._store.storage if pack.is_meta else self._store.bulk_storage
        found: dict[Digest, tuple[int, int]] = {}
        with ThreadPoolExecutor(self._plan.parallel_reads, "casfs-claims") as pool:
            read = functools.partial(self._read_run, pack, storage)
            for part in pool.map(read, gather_reads(blobs.items(), self._plan)):
                found.update(part)
        return found

    def _is_whole_due(self, ordinal: int, pack: PackRef, wanted: Iterable[Location]) -> bool:
        """Return whether all of a pack is to be verified now, beside the wanted blobs."""
        if ordinal in self._whole:
            return False
        relied_bytes = self._relied_bytes.get(ordinal, 0) + sum(map(_own_bytes, wanted))
        self._relied_bytes[ordinal] = relied_bytes
        # A writer has compared the size in the index with the storage.
        pack_bytes = sum(one.pack_bytes for one in DeltaNotes(self._store.index).records([pack.id]))
        if pack_bytes > _SMALL_PACK_BYTES and relied_bytes < _WHOLE_SHARE * pack_bytes:
            return False
        self._whole.add(ordinal)
        del self._relied_bytes[ordinal]
        return True

    def _directory(self, ordinal: int, pack: PackRef) -> Iterator[tuple[Digest, Location]]:
        """Yield the blobs that the directory of a pack names; none where it is damaged."""
        size = self._store.bulk_storage.size(pack_name(pack))
        try:
            entries = self._store.read_directory(pack, size)
        except PackError as error:
            log.info("%s; only the blobs that are needed of it are verified", error)
            return
        for e in entries:
            place = (ordinal, e.offset, e.stored_bytes, e.plain_bytes)
            yield e.digest, Location(*place, 0, e.kind, e.codec, 0, e.position)

    def _read_run(
        self, pack: PackRef, storage: Storage, run: BlobRun
    ) -> dict[Digest, tuple[int, int]]:
        """Return the places of those blobs of a run that are intact."""
        found = self._decode_run(pack, storage, run)
        if len(found) < len(run.blobs) and storage is not self._store.bulk_storage:
            # The cache may have kept wrong bytes that the storage gave once.
            found = self._decode_run(pack, self._store.bulk_storage, run)
        return found

    def _decode_run(
        self, pack: PackRef, storage: Storage, run: BlobRun
    ) -> dict[Digest, tuple[int, int]]:
        data = memoryview(storage.read(pack_name(pack), run.begin, run.size))
        found: dict[Digest, tuple[int, int]] = {}
        for blobs in _batches(run.blobs):
            try:
                plains = self._store.decode_many(pack, run.payloads(blobs, data))
            except PackError:
                return {}  # nothing of it can be decrypted
            for (digest, at), plain in zip(blobs, plains, strict=True):
                if plain is not None:
                    found[digest] = at.offset, at.position
        return found

    def _settle(
        self, ordinal: int, found: Mapping[Digest, tuple[int, int]], absent: set[Digest]
    ) -> None:
        """Record in the index what a pack holds; report a pack that lacks blobs."""
        self._store.index.settle_claims(ordinal, found, absent)
        if not absent:
            return
        pack = self._store.index.pack_ref(ordinal).id
        if pack not in self.false_packs:
            log.warning(
                "pack %s lacks blobs that another machine or its directory says it holds, or they are "
                "damaged; they are stored again; run `casfs check --read-data`",
                short_id(pack),
            )
        self.false_packs[pack] = self.false_packs.get(pack, 0) + len(absent)


def _own_bytes(at: Location) -> int:
    """Return the stored bytes of a blob, at most its plaintext where it shares them with a group."""
    return min(at.stored_bytes, at.plain_bytes) if at.is_grouped else at.stored_bytes


def _most_stored_bytes(at: Location) -> int:
    """Return the most bytes that an honest payload with a blob has."""
    plain_bytes = MAX_GROUP_BYTES if at.is_grouped else at.plain_bytes
    return plain_bytes + MAX_STORED_BYTES - MAX_PLAIN_BYTES


def _of_wrong_size(claims: Mapping[Digest, Location], sizes: Mapping[Digest, int]) -> set[Digest]:
    """Return the claims that cannot be true, and that could cost more to read than the blob has bytes."""
    return {
        digest
        for digest, at in claims.items()
        if at.plain_bytes != sizes.get(digest, at.plain_bytes)
        or at.stored_bytes > _most_stored_bytes(at)
    }


def _batches(
    blobs: Sequence[tuple[Digest, Location]],
) -> Iterator[Sequence[tuple[Digest, Location]]]:
    """Yield parts of blobs with a bounded size of their plaintext."""
    begin = batch_bytes = 0
    for at in range(len(blobs)):
        plain_bytes = blobs[at][1].plain_bytes
        if at > begin and batch_bytes + plain_bytes > _BATCH_BYTES:
            yield blobs[begin:at]
            begin, batch_bytes = at, 0
        batch_bytes += plain_bytes
    if blobs:
        yield blobs[begin:]
