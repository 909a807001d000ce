"""Blobs that lie together come with one read, several reads at the same time over a distance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.digest import Digest, digest_of
from casfs.format.codec import Codec
from casfs.index.schema import Location
from casfs.store.batch_read import BlobRun, ReadPlan, gather_reads, plan_reads, read_run
from casfs.store.blob_store import BlobStore, pack_name
from tests.support.stores import flip, noise, open_store, store_blobs

KIB = 1 << 10
BLOB_BYTES = 10 * KIB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    """Two packs: one of 20 blobs, one of 5."""
    with open_store(tmp_path) as opened:
        store_blobs(opened, [noise(f"a {number}", BLOB_BYTES) for number in range(20)])
        store_blobs(opened, [noise(f"b {number}", BLOB_BYTES) for number in range(5)])
        yield opened


def wanted(*labels: str) -> dict[Digest, int]:
    return {digest_of(noise(label, BLOB_BYTES)): BLOB_BYTES for label in labels}


def planned(store: BlobStore, plan: ReadPlan, *labels: str) -> list[BlobRun]:
    return list(plan_reads(store, wanted(*labels), plan))


def test_adjacent_blobs_of_a_pack_are_one_read(store: BlobStore) -> None:
    labels = [f"a {number}" for number in range(20)] + [f"b {number}" for number in range(5)]
    runs = planned(store, ReadPlan(0x1000, 1 << 20, 1), *reversed(labels))
    assert [len(run.blobs) for run in runs] == [20, 5]
    assert [read_run(store, run) for run in runs] == [
        {digest_of(noise(label, BLOB_BYTES)): noise(label, BLOB_BYTES) for label in group}
        for group in (labels[:20], labels[20:])
    ]


def test_a_gap_is_read_with_the_rest_where_it_is_small(store: BlobStore) -> None:
    labels = ("a 0", "a 2", "a 9")
    assert len(planned(store, ReadPlan(11 * KIB, 1 << 20, 1), *labels)) == 2
    assert len(planned(store, ReadPlan(5 * KIB, 1 << 20, 1), *labels)) == 3
    (run,) = planned(store, ReadPlan(100 * KIB, 1 << 20, 1), *labels)
    assert run.size >= 9 * BLOB_BYTES
    assert list(read_run(store, run)) == list(wanted(*labels))


def test_overlapping_locations_take_no_more_memory_than_a_read() -> None:
    """Each machine that writes can publish a delta with such locations."""
    plan = ReadPlan(KIB, 64 * KIB, 1)
    found = [
        (digest_of(b"%d" % number), Location(0, 80, 60 * KIB + number, 1, number, 1, 0))
        for number in range(50)
    ]
    for run in gather_reads(found, plan):
        taken = run.payloads(run.blobs, memoryview(bytes(run.size)))
        assert sum(len(payload) for _, payload in taken) <= plan.read_bytes


def test_blobs_at_one_place_of_a_group_share_its_payload() -> None:
    group = int(Codec.GROUP)
    found = [
        (digest_of(b"%d" % number), Location(0, 80, 60 * KIB, 1, number, 1, group))
        for number in range(50)
    ]
    (run,) = gather_reads(found, ReadPlan(KIB, 64 * KIB, 1))
    taken = run.payloads(run.blobs, memoryview(bytes(run.size)))
    assert len(taken) == 50 and len({id(payload) for _, payload in taken}) == 1


def test_no_read_is_larger_than_the_plan_allows(store: BlobStore) -> None:
    runs = planned(store, ReadPlan(KIB, 45 * KIB, 1), *[f"a {number}" for number in range(20)])
    assert [len(run.blobs) for run in runs] == [4] * 5
    assert all(run.size <= 45 * KIB for run in runs)


def test_a_blob_larger_than_a_read_is_read_alone(store: BlobStore) -> None:
    runs = planned(store, ReadPlan(KIB, 5 * KIB, 1), "a 0", "a 1")
    assert [len(run.blobs) for run in runs] == [1, 1]


def test_unknown_blobs_and_wrong_sizes_are_left_out(store: BlobStore) -> None:
    found = wanted("a 0") | {digest_of(b"unknown"): 7, digest_of(noise("a 1", BLOB_BYTES)): 7}
    (run,) = plan_reads(store, found, ReadPlan.of(store.storage))
    assert [digest for digest, _ in run.blobs] == [digest_of(noise("a 0", BLOB_BYTES))]


def test_a_damaged_blob_is_left_out_and_a_pack_that_was_cut_off_leaves_out_all(
    store: BlobStore, tmp_path: Path
) -> None:
    at = store.locate(digest_of(noise("a 3", BLOB_BYTES)))
    path = tmp_path / pack_name(store.index.pack_ref(at.pack))
    flip(path, at.offset + 100)
    (run,) = planned(store, ReadPlan(KIB, 1 << 20, 1), "a 2", "a 3", "a 4")
    assert list(read_run(store, run)) == list(wanted("a 2", "a 4"))
    os.truncate(path, 100)
    assert read_run(store, run) == {}


def test_a_read_of_the_next_pack_covers_only_the_blobs_that_are_wanted_of_it() -> None:
    plan = ReadPlan(KIB, 64 * KIB, 1)
    places = [(0, 900 * KIB), (1, 80), (1, 40 * KIB), (1, 200 * KIB), (2, 100 * KIB)]
    found = [
        (digest_of(b"%d" % number), Location(pack, offset, BLOB_BYTES, 1, 0, 1, 0))
        for number, (pack, offset) in enumerate(places)
    ]
    runs = [(run.pack, run.begin, run.size) for run in gather_reads(found, plan)]
    assert runs == [(pack, offset, BLOB_BYTES) for pack, offset in places]
