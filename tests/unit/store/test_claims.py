"""The verification of what other machines say that they stored: what is read, and what cannot be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from casfs.digest import Digest
from casfs.format.pack import TRAILER
from casfs.index.schema import PackRecord
from casfs.store.blob_store import pack_name
from casfs.store.claims import ClaimVerifier
from tests.support.hosts import Host, OpenHost, Place
from tests.support.storage_double import Call, Failure, RecordingStorage
from tests.support.stores import noise

BLOBS = [noise(f"blob {n}", 100_000) for n in range(30)]


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def storage(place: Place, tmp_path: Path) -> RecordingStorage:
    """What the second host sees of a place in which the first one has stored the blobs in one pack."""
    Host(place, tmp_path / "one").back_up(BLOBS)
    return RecordingStorage(place.storage)


@pytest.fixture
def second(place: Place, storage: RecordingStorage, tmp_path: Path) -> Host:
    return Host(place, tmp_path / "two", storage=storage)


def digests(host: OpenHost, plains: list[bytes] = BLOBS) -> list[Digest]:
    return [host.store.codec.digest(plain) for plain in plains]


def reads(storage: RecordingStorage) -> list[Call]:
    return [call for call in storage.calls if call.method == "read" and "packs/" in call.name]


def damage(place: Place, record: PackRecord, offset: int) -> None:
    """Change a byte of a pack in the storage; a negative offset counts from its end."""
    name = pack_name(record.pack)
    data = bytearray(place.storage.read(name, 0, record.pack_bytes))
    data[offset] ^= 1
    place.storage.write(name, bytes(data))


@pytest.mark.parametrize("requests", [1, 8])
def test_a_pack_is_verified_as_a_whole_from_an_eighth_on(
    second: Host, storage: RecordingStorage, requests: int
) -> None:
    storage.script.parallel_requests = requests
    with second.open() as host:
        claims = ClaimVerifier(host.store)
        storage.calls.clear()
        for n in range(3):
            assert claims.are_stored(digests(host)[n : n + 1]) == [True]
            assert sum(call.size for call in reads(storage)) == (n + 1) * 100_000
        assert claims.are_stored(digests(host)[3:4]) == [True]
        storage.calls.clear()
        assert all(claims.are_stored(digests(host)))
        assert reads(storage) == []


def test_the_next_process_reads_nothing_that_was_verified(
    second: Host, storage: RecordingStorage
) -> None:
    with second.open() as host:
        assert host.put(BLOBS[:2]) == 0
    storage.calls.clear()
    with second.open() as host:
        assert host.put(BLOBS[:2]) == 0
        assert reads(storage) == []
        assert host.put(BLOBS[2:3]) == 0
        assert [call.size for call in reads(storage)] == [100_000]


def test_a_pack_that_cannot_be_read_is_not_called_false_and_its_blobs_are_stored_again(
    second: Host, storage: RecordingStorage
) -> None:
    with second.open() as host:
        claims = ClaimVerifier(host.store)
        storage.script.failures = [Failure(lambda call: call.method == "read", times=1)]
        assert claims.are_stored(digests(host)[:1]) == [False]
        assert claims.false_packs == {}
        assert claims.are_stored(digests(host)[:1]) == [True]


def test_intact_blobs_of_a_pack_with_a_damaged_directory_are_relied_on(
    place: Place, second: Host, storage: RecordingStorage
) -> None:
    with second.open() as host:
        (record,) = host.index.packs()
        damage(place, record, -TRAILER.size - 10)
        assert host.put(BLOBS) == 0


def test_damaged_blobs_of_another_machine_are_stored_again_and_found_in_the_new_pack(
    place: Place, second: Host, storage: RecordingStorage
) -> None:
    with second.open() as host:
        (record,) = host.index.packs()
        location = host.index.lookup(digests(host)[5])
        assert location is not None
        damage(place, record, location.offset + 7)
        assert host.put(BLOBS) == 1
        assert host.read(BLOBS[5]) == BLOBS[5]
        moved = host.index.lookup(digests(host)[5])
        assert moved is not None and moved.pack != location.pack
        (marked,) = [one for one in host.index.packs() if one.has_false_claim]
        assert marked == dataclasses.replace(record, is_damaged=True, has_false_claim=True)


def test_a_mark_of_an_intact_blob_keeps_that_it_was_verified(
    second: Host, storage: RecordingStorage
) -> None:
    with second.open() as host:
        assert host.put(BLOBS[:1]) == 0
        (digest,) = digests(host, BLOBS[:1])
        location = host.index.lookup(digest)
        assert location is not None
        host.index.mark_blobs(location.pack, [digest])
        assert not host.has(BLOBS[0])
        host.index.mark_blobs(location.pack, (), [digest])
        storage.calls.clear()
        assert host.put(BLOBS[:1]) == 0
        assert reads(storage) == []


def test_what_a_rebuild_of_the_index_finds_again_stays_this_machines_own(
    place: Place, storage: RecordingStorage, tmp_path: Path
) -> None:
    own = Host(place, tmp_path / "one", storage=storage)
    with own.open() as host:
        host.store.rebuild()
        storage.calls.clear()
        assert host.put(BLOBS) == 0
        assert reads(storage) == []
        assert host.index.claims(digests(host)) == {}
