"""Batch reads of blobs: sorted by pack and offset, adjacent blobs in one read, decoded together.

For a single blob the interpreter's overhead exceeds the cost of the read and of the decompression, and over a
distance the round trip exceeds both; a batch pays them once. The reads of a batch may run in parallel.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.format.pack import PackEntry
from casfs.index.schema import Location
from casfs.storage.base import Storage
from casfs.storage.concurrency import in_order
from casfs.store.blob_store import BlobStore, pack_name

log = logging.getLogger(__name__)

_THREADS = 2

_MIB = 1024 * 1024

_NEAR_GAP_BYTES = 64 * 1024
_BATCH_BYTES = 4 * _MIB
_BATCH_BLOBS = 4096
_AHEAD_RUNS = 8
"""Eight reads of 4 MiB carry 1 Gbit/s over a round trip of 250 ms."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How blobs are gathered into reads.

    `gap_bytes` is the largest gap between two blobs that one read covers; beyond it a second read costs less.
    `read_bytes` is the largest read, `parallel_reads` the number of reads at the same time.
    """

    gap_bytes: int
    read_bytes: int
    parallel_reads: int

    @staticmethod
    def of(storage: Storage) -> ReadPlan:
        """Return the plan for a storage: over a distance fewer, larger, and parallel reads."""
        requests = storage.capabilities.parallel_requests
        if requests == 1:
            return ReadPlan(_NEAR_GAP_BYTES, 4 * _MIB, 1)
        return ReadPlan(512 * 1024, 8 * _MIB, min(requests, 4))


@dataclass(frozen=True, slots=True)
class BlobRun:
    """Blobs of one pack, by offset, that one read covers: `size` bytes from `begin` on."""

    pack: int
    begin: int
    size: int
    blobs: list[tuple[Digest, Location]]

    def payloads(
        self, blobs: Sequence[tuple[Digest, Location]], data: memoryview
    ) -> list[tuple[PackEntry, bytes]]:
        """Return some of the blobs as stored, from the bytes that were read."""
        found: list[tuple[PackEntry, bytes]] = []
        for digest, at in blobs:
            entry = at.in_pack(digest)
            if found and _is_same_payload(entry, found[-1][0]):
                payload = found[-1][1]
            else:
                begin = at.offset - self.begin
                payload = bytes(data[begin : begin + at.stored_bytes])
            found.append((entry, payload))
        return found


def plan_reads(store: BlobStore, wanted: Mapping[Digest, int], plan: ReadPlan) -> Iterator[BlobRun]:
    """Yield the reads that return the wanted blobs.

    `wanted` maps each digest to its plaintext size in bytes; a blob of another size is omitted.
    """
    digests = list(wanted)
    found = [
        (digest, at)
        for digest, at in zip(digests, store.index.lookup_many(digests), strict=True)
        if at is not None and at.plain_bytes == wanted[digest]
    ]
    return gather_reads(found, plan)


def gather_reads(found: Iterable[tuple[Digest, Location]], plan: ReadPlan) -> Iterator[BlobRun]:
    """Yield the reads that return the blobs at some locations.

    The payloads of a read take no more memory than the read, although locations that others wrote may
    overlap.
    """
    blobs: list[tuple[Digest, Location]] = []
    pack = begin = end = -1
    payloads_bytes = 0
    for digest, at in sorted(found, key=_place):
        last = at.offset + at.stored_bytes
        is_shared = bool(blobs) and at.pack == pack and _is_same_payload(at, blobs[-1][1])
        more_bytes = 0 if is_shared else at.stored_bytes
        is_near = at.offset <= end + plan.gap_bytes and last <= begin + plan.read_bytes
        has_room = payloads_bytes + more_bytes <= plan.read_bytes
        if blobs and not is_shared and not (at.pack == pack and is_near and has_room):
            yield BlobRun(pack, begin, end - begin, blobs)
            blobs = []
        if not blobs:
            pack, begin, end, payloads_bytes = at.pack, at.offset, last, 0
        blobs.append((digest, at))
        payloads_bytes += more_bytes
        end = max(end, last)
    if blobs:
        yield BlobRun(pack, begin, end - begin, blobs)


def _is_same_payload(one: PackEntry | Location, before: PackEntry | Location) -> bool:
    """Return whether two blobs of a pack have their stored bytes in common."""
    return (one.offset, one.stored_bytes) == (before.offset, before.stored_bytes)


def _place(blob: tuple[Digest, Location]) -> tuple[int, int, int]:
    at = blob[1]
    return at.pack, at.offset, at.position


def read_run(store: BlobStore, run: BlobRun) -> dict[Digest, bytes]:
    """Return the verified plaintexts of the blobs of a run that are intact; nothing if the read fails.

    For an omitted blob, `BlobStore.read` finds another copy or raises the reason.
    """
    plains: dict[Digest, bytes] = {}
    try:
        pack = store.index.pack_ref(run.pack)
        # What was read of metadata is in the cache; data would displace more useful data there.
        storage = store.storage if pack.is_meta else store.bulk_storage
        data = memoryview(storage.read(pack_name(pack), run.begin, run.size))
        decoded = store.decode_many(pack, run.payloads(run.blobs, data), _THREADS)
    except CasfsError as error:
        log.debug("%d blobs cannot be read at once: %s", len(run.blobs), error)
        return plains
    for plain, (digest, at) in zip(decoded, run.blobs, strict=True):
        if plain is not None:
            store.verified.mark(at)
            plains[digest] = plain
    return plains


def read_in_place(
    store: BlobStore, found: Iterable[tuple[Digest, Location]]
) -> Generator[tuple[BlobRun, dict[Digest, bytes]], None, None]:
    """Yield runs of the blobs at some locations, each with what `read_run` returns for it.

    `found` lists the blobs of a pack one after the other, by place. Over a distance several runs are read
    ahead. They take `_AHEAD_RUNS` times `_BATCH_BYTES` of memory, and more only for blobs that are larger.
    """
    plan = ReadPlan(_NEAR_GAP_BYTES, _BATCH_BYTES, 1)
    runs = (run for batch in _batches(found) for run in gather_reads(batch, plan))
    return in_order(store.storage, lambda run: (run, read_run(store, run)), runs, _AHEAD_RUNS)


def _batches(found: Iterable[tuple[Digest, Location]]) -> Iterator[list[tuple[Digest, Location]]]:
    """Yield the blobs of one pack in batches of limited plaintext; those of a group are in the same batch."""
    batch: list[tuple[Digest, Location]] = []
    batch_bytes = 0
    for digest, at in found:
        if batch:
            before = batch[-1][1]
            is_same_group = at.is_grouped and _is_same_payload(at, before)
            is_full = batch_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_BLOBS
            if at.pack != before.pack or (is_full and not is_same_group):
                yield batch
                batch, batch_bytes = [], 0
        batch.append((digest, at))
        batch_bytes += at.plain_bytes
    if batch:
        yield batch
