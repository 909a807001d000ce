"""Packs on their way to a remote storage: several at once, few enough for memory, indexed when durable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from casfs.digest import digest_of
from casfs.errors import StorageUnavailableError
from casfs.format.codec import BlobCodec, BlobKind
from casfs.index.index import Index
from casfs.storage.memory import MemoryStorage
from casfs.store import pack_builder
from casfs.store import writer as writer_module
from casfs.store.blob_store import BlobStore
from casfs.store.writer import BlobWriter
from tests.support.storage_double import Call, Failure, RecordingStorage, Script
from tests.support.stores import noise, store_blobs

KIB = 1 << 10
PACK_BYTES = 64 * KIB


class Line:
    """Holds commits back until `open`; records how many were on their way at the same time."""

    def __init__(self, opens_at: int) -> None:
        self.most = self.most_bytes = 0
        self._opens_at = opens_at
        self._on_their_way: list[int] = []
        self._changed = threading.Condition()
        self._is_open = False

    def before(self, call: Call) -> None:
        if call.method != "commit":
            return
        with self._changed:
            self._on_their_way.append(call.size)
            self.most = max(self.most, len(self._on_their_way))
            self.most_bytes = max(self.most_bytes, sum(self._on_their_way))
            self._is_open |= len(self._on_their_way) >= self._opens_at
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_open, 60)
            self._on_their_way.remove(call.size)


@contextmanager
def far_store(tmp_path: Path, script: Script) -> Iterator[tuple[BlobStore, RecordingStorage]]:
    storage = RecordingStorage(MemoryStorage(), script)
    index = Index(tmp_path / "index")
    try:
        yield BlobStore(storage, index, BlobCodec(3)), storage
    finally:
        index.close()


@pytest.fixture
def plains(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Blobs of ten packs."""
    monkeypatch.setattr(pack_builder, "_BUFFER_BYTES", 4 * KIB)
    monkeypatch.setattr(writer_module, "_BATCH_BYTES", 32 * KIB)
    return [noise(f"blob {number}", 10 * KIB) for number in range(70)]


def test_four_packs_travel_at_the_same_time(tmp_path: Path, plains: list[bytes]) -> None:
    line = Line(opens_at=4)
    with far_store(tmp_path, Script(parallel_requests=8, before=line.before)) as (store, _):
        stats = store_blobs(store, plains, pack_bytes=PACK_BYTES)
        assert stats.packs == 10
        assert line.most == 4
        assert [store.read(digest_of(plain)) for plain in plains] == plains


def test_the_bytes_on_their_way_are_bounded(
    tmp_path: Path, plains: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_bytes = 2 * PACK_BYTES + 40 * KIB
    monkeypatch.setattr(pack_builder, "_MAX_UPLOAD_BYTES", limit_bytes)
    line = Line(opens_at=2)
    with far_store(tmp_path, Script(parallel_requests=8, before=line.before)) as (store, _):
        store_blobs(store, plains, pack_bytes=PACK_BYTES)
        assert line.most == 2
        assert line.most_bytes <= limit_bytes


def test_packs_go_one_by_one_to_a_storage_without_distance(
    tmp_path: Path, plains: list[bytes]
) -> None:
    line = Line(opens_at=1)
    with far_store(tmp_path, Script(parallel_requests=1, before=line.before)) as (store, _):
        store_blobs(store, plains, pack_bytes=PACK_BYTES)
        assert line.most == 1


def test_finish_waits_for_every_pack(tmp_path: Path, plains: list[bytes]) -> None:
    released = threading.Event()
    script = Script(parallel_requests=8, before=lambda call: held_back(call))

    def held_back(call: Call) -> None:
        if call.method == "commit":
            assert released.wait(60)

    with far_store(tmp_path, script) as (store, storage):
        writer = BlobWriter(store, pack_bytes=PACK_BYTES)
        for plain in plains[:10]:
            writer.put(BlobKind.DATA, digest_of(plain), plain)
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(writer.finish)
            assert not any(store.index.are_stored(map(digest_of, plains[:10])))
            assert not ending.done()
            released.set()
            assert ending.result(60).packs == 2
        assert all(store.index.are_stored(map(digest_of, plains[:10])))
        assert storage.methods().count("commit") == 2


@pytest.mark.parametrize("number", [1, 3, 10])
def test_a_pack_that_is_not_stored_fails_the_writer_and_is_in_no_index(
    tmp_path: Path, plains: list[bytes], number: int
) -> None:
    seen: list[str] = []

    def applies(call: Call) -> bool:
        if call.method == "commit":
            seen.append(call.name)
        return call.method == "commit" and len(seen) == number

    script = Script([Failure(applies)], parallel_requests=8)
    with far_store(tmp_path, script) as (store, storage):
        with pytest.raises(StorageUnavailableError, match="no answer"):
            store_blobs(store, plains, pack_bytes=PACK_BYTES)
        stored = {name.rpartition("/")[2] for name, _, _ in storage.inner.list("packs")}
        assert seen[number - 1].rpartition("/")[2] not in stored
        assert {record.pack.id.hex() for record in store.index.packs()} == stored
        again = store_blobs(store, plains, pack_bytes=PACK_BYTES)
        assert again.new_blobs < len(plains) or number == 1
        assert [store.read(digest_of(plain)) for plain in plains] == plains
