"""The cache in front of a remote storage: what it spares, and what it never keeps."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casfs.digest import digest_of
from casfs.errors import NotFoundError, StorageUnavailableError
from casfs.storage.caching import MAX_KEPT_READ_BYTES, CachingStorage
from casfs.storage.cell_folder import CELL_BYTES, CellFolder
from casfs.storage.memory import MemoryStorage
from tests.support.storage_double import Call, Failure, RecordingStorage, Script
from tests.support.stores import noise
from tests.support.waiting import wait_until

from .contract import StorageContract

MIB = 1 << 20
PACK = "packs/ab/abcd"
META = "meta/ab/abcd"


class Far:
    """A recorded storage, and caches in front of it that share a folder, as several processes do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inner = MemoryStorage()
        self.recorded = RecordingStorage(self.inner, Script())

    def cache(self) -> CachingStorage:
        return CachingStorage(self.recorded, CellFolder(self.folder, 64 * MIB))

    @property
    def reads(self) -> int:
        return self.recorded.methods().count("read")


@pytest.fixture
def far(tmp_path: Path) -> Far:
    return Far(tmp_path / "objects")


class TestCachingContract(StorageContract):
    """A cache keeps the contract of every storage."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> CachingStorage:
        return CachingStorage(MemoryStorage(), CellFolder(tmp_path / "objects", 64 * MIB))


class TestDataPacks:
    @pytest.mark.parametrize("size", [CELL_BYTES * 3, CELL_BYTES * 3 + 1, CELL_BYTES * 3 - 1, 10])
    def test_every_range_is_that_of_the_object(self, far: Far, size: int) -> None:
        data = noise("a", size)
        far.inner.create(PACK, data)
        for cache in (far.cache(), far.cache()):
            for offset in (0, 1, CELL_BYTES - 1, CELL_BYTES, 2 * CELL_BYTES + 5, size - 1, size):
                for length in (1, 5, CELL_BYTES, CELL_BYTES + 1, 2 * CELL_BYTES, MIB):
                    assert cache.read(PACK, offset, length) == data[offset : offset + length]

    def test_what_was_read_once_needs_no_request(self, far: Far) -> None:
        far.inner.create(PACK, noise("a", MIB))
        far.cache().read(PACK, 1000, 50)
        assert far.reads == 1
        far.cache().read(PACK, 100_000, 5000)
        assert far.reads == 1

    def test_missing_cells_that_lie_together_are_one_request(self, far: Far) -> None:
        far.inner.create(PACK, noise("a", 4 * MIB))
        far.cache().read(PACK, 0, 3 * MIB)
        assert far.reads == 1
        cache = far.cache()
        cache.read(PACK, 0, 4 * MIB)
        assert far.reads == 2

    def test_long_reads_are_not_kept(self, far: Far) -> None:
        far.inner.create(PACK, noise("a", 8 * MIB))
        for _ in range(2):
            far.cache().read(PACK, 0, MAX_KEPT_READ_BYTES + 1)
        assert far.reads == 2
        assert not far.folder.exists()

    def test_a_damaged_cell_costs_a_request_and_gives_the_right_bytes(self, far: Far) -> None:
        data = noise("a", 1000)
        far.inner.create(PACK, data)
        far.cache().read(PACK, 0, 10)
        (path,) = far.folder.glob("??/*")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert far.cache().read(PACK, 0, 1000) == data
        assert far.reads == 2

    def test_a_missing_object_is_not_found_each_time(self, far: Far) -> None:
        cache = far.cache()
        for _ in range(2):
            with pytest.raises(NotFoundError):
                cache.read(PACK, 0, 10)
        far.inner.create(PACK, b"now")
        assert cache.read(PACK, 0, 10) == b"now"

    def test_a_failed_read_is_not_kept(self, far: Far) -> None:
        far.inner.create(PACK, b"data")
        far.recorded.script.failures.append(Failure(lambda call: call.method == "read"))
        cache = far.cache()
        with pytest.raises(StorageUnavailableError):
            cache.read(PACK, 0, 4)
        assert cache.read(PACK, 0, 4) == b"data"

    def test_forgotten_bytes_are_requested_again(self, far: Far) -> None:
        far.inner.write(PACK, b"wrong bytes")
        cache = far.cache()
        assert cache.read(PACK, 0, 11) == b"wrong bytes"
        far.inner.write(PACK, b"right bytes")
        assert cache.forget(PACK)
        assert not cache.forget(PACK)
        assert cache.read(PACK, 0, 11) == b"right bytes"

    def test_several_threads_that_want_a_cell_make_one_request(self, far: Far) -> None:
        far.inner.create(PACK, noise("a", MIB))
        go = threading.Event()

        def held_back(call: Call) -> None:
            assert go.wait(60)

        far.recorded.script.before = held_back
        cache = far.cache()
        with ThreadPoolExecutor(5) as pool:
            running = [pool.submit(cache.read, PACK, 1000, 10 + n) for n in range(5)]
            wait_until(lambda: far.reads >= 1, "a thread asks")
            go.set()
            assert [len(one.result(60)) for one in running] == [10, 11, 12, 13, 14]
        assert far.reads == 1


class TestReadAhead:
    def test_a_prefetched_range_is_in_memory(self, far: Far) -> None:
        data = noise("a", MIB)
        far.inner.create(PACK, data)
        cache = far.cache()
        assert cache.read_nonblocking(PACK, 5, 300_000) is None
        cache.prefetch(PACK, 5, 300_000)
        wait_until(
            lambda: cache.read_nonblocking(PACK, 5, 300_000) is not None, "the range is fetched"
        )
        assert cache.read_nonblocking(PACK, 5, 300_000) == data[5:300_005]
        assert far.reads == 1
        cache.close()

    def test_a_range_beyond_the_end_is_not_in_memory(self, far: Far) -> None:
        far.inner.create(PACK, b"short")
        cache = far.cache()
        cache.read(PACK, 0, 5)
        assert cache.read_nonblocking(PACK, 0, 5) == b"short"
        assert cache.read_nonblocking(PACK, 0, 6) is None

    def test_a_prefetch_that_fails_is_silent(self, far: Far) -> None:
        cache = far.cache()
        cache.prefetch(PACK, 0, 10)
        wait_until(lambda: far.reads == 1, "the range was requested")
        cache.close()


class TestMetadataPacks:
    def test_few_requests_fetch_a_metadata_pack_whole(self, far: Far) -> None:
        data = noise("a", 12 * MIB + 5)
        far.inner.create(META, data)
        cache = far.cache()
        for offset in range(len(data) - 100, 0, -30_000):
            assert cache.read(META, offset, 100) == data[offset : offset + 100]
        assert far.reads <= 7
        before = far.reads
        again = far.cache()
        for offset in range(0, len(data), 100_000):
            assert again.read(META, offset, 100) == data[offset : offset + 100]
        assert far.reads == before

    def test_a_written_metadata_pack_needs_no_request(self, far: Far) -> None:
        data = noise("a", 2 * MIB)
        writer = far.cache().open_writer(in_memory=False)
        writer.append(data)
        writer.commit(META)
        assert far.inner.read(META) == data
        assert far.cache().read(META, MIB, 5000) == data[MIB : MIB + 5000]
        assert far.reads == 0

    def test_a_written_data_pack_is_not_kept(self, far: Far) -> None:
        writer = far.cache().open_writer(in_memory=True)
        writer.append(noise("a", MIB))
        writer.commit(PACK)
        assert not far.folder.exists()


class TestSnapshots:
    @pytest.mark.parametrize("size", [100, CELL_BYTES, 2 * CELL_BYTES + 7])
    def test_a_snapshot_is_read_once(self, far: Far, size: int) -> None:
        data = noise("snapshot", size)
        name = f"snapshots/{digest_of(data).hex()}"
        far.inner.create(name, data)
        for _ in range(3):
            assert far.cache().read(name, 0, 16 * MIB) == data
        assert far.reads == 1

    def test_wrong_bytes_are_not_kept(self, far: Far) -> None:
        data = noise("snapshot", 100)
        name = f"snapshots/{digest_of(data).hex()}"
        far.inner.write(name, b"wrong")
        assert far.cache().read(name, 0, 16 * MIB) == b"wrong"
        assert far.reads == 2
        far.inner.write(name, data)
        assert far.cache().read(name, 0, 16 * MIB) == data

    def test_a_single_wrong_answer_does_no_harm(self, far: Far) -> None:
        data = noise("snapshot", 100)
        name = f"snapshots/{digest_of(data).hex()}"
        far.inner.write(name, b"wrong")

        def heal(call: Call) -> None:
            if far.reads == 2:
                far.inner.write(name, data)

        far.recorded.script.before = heal
        assert far.cache().read(name, 0, 16 * MIB) == data

    def test_a_created_snapshot_needs_no_request_and_a_deleted_one_is_gone(self, far: Far) -> None:
        data = noise("snapshot", 100)
        name = f"snapshots/{digest_of(data).hex()}"
        cache = far.cache()
        cache.create(name, data)
        assert far.cache().read(name, 0, 16 * MIB) == data
        assert far.reads == 0
        cache.delete(name)
        with pytest.raises(NotFoundError):
            far.cache().read(name, 0, 16 * MIB)
        assert list(far.folder.glob("??/*")) == []


@pytest.mark.parametrize("name", ["config", "recipients", "sessions/ab/x", "condemned/ab"])
def test_other_objects_are_always_requested(far: Far, name: str) -> None:
    far.inner.write(name, b"data")
    for _ in range(2):
        assert far.cache().read(name, 0, 100) == b"data"
    assert far.reads == 2
    assert not far.folder.exists()
