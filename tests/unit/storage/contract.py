"""What every storage does: one suite, run for each back end by a subclass with a fixture `storage`.

The names that these tests use are below prefixes of their own, so that one place can serve them all.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from casfs.errors import NotFoundError, StorageError
from casfs.storage.base import Storage

MIB = 1024 * 1024


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class StorageContract:
    """Tests of the promises in `casfs.storage.base`."""

    def test_an_object_is_read_whole_or_in_ranges(self, storage: Storage) -> None:
        storage.create("snapshots/a", b"0123456789")
        assert storage.read("snapshots/a") == b"0123456789"
        assert storage.read("snapshots/a", 3) == b"3456789"
        assert storage.read("snapshots/a", 3, 4) == b"3456"
        assert storage.read("snapshots/a", 8, 10) == b"89"
        assert storage.size("snapshots/a") == 10

    def test_a_read_at_or_beyond_the_end_returns_no_bytes(self, storage: Storage) -> None:
        storage.create("snapshots/a", b"0123456789")
        assert storage.read("snapshots/a", 10, 5) == b""
        assert storage.read("snapshots/a", 2000, 10) == b""
        assert storage.read("snapshots/a", 10) == b""
        assert storage.read("snapshots/a", 3, 0) == b""

    def test_an_empty_object_is_not_a_missing_one(self, storage: Storage) -> None:
        storage.create("snapshots/empty", b"")
        assert storage.read("snapshots/empty") == b""
        assert storage.read("snapshots/empty", 0, 10) == b""
        assert storage.size("snapshots/empty") == 0
        assert [(one.name, one.size) for one in storage.list("snapshots")] == [
            ("snapshots/empty", 0)
        ]

    def test_a_missing_object_raises_not_found(self, storage: Storage) -> None:
        with pytest.raises(NotFoundError):
            storage.read("snapshots/none")
        with pytest.raises(NotFoundError):
            storage.read("snapshots/none", 3, 4)
        with pytest.raises(NotFoundError):
            storage.size("snapshots/none")
        with pytest.raises(NotFoundError):
            storage.mtime_ns("snapshots/none")
        assert storage.read_nonblocking("snapshots/none", 0, 1) is None
        storage.prefetch("snapshots/none", 0, 1)

    def test_objects_are_listed_by_name_at_any_depth(self, storage: Storage) -> None:
        names = ["packs/loose", "packs/bb/two", "packs/aa/one", "packs/aa/three", "packs/aa0"]
        for name in names:
            storage.create(name, name.encode())
        storage.create("packs2/other", b"x")
        assert [(one.name, one.size) for one in storage.list("packs")] == [
            (name, len(name)) for name in sorted(names)
        ]
        assert [one.name for one in storage.list("packs/aa")] == ["packs/aa/one", "packs/aa/three"]

    def test_a_prefix_without_objects_lists_nothing(self, storage: Storage) -> None:
        storage.create("packs/aa/one", b"1")
        assert list(storage.list("snapshots")) == []
        assert list(storage.list("packs/ab")) == []
        assert list(storage.list("packs/a")) == []

    def test_creating_the_same_object_again_keeps_the_first(self, storage: Storage) -> None:
        storage.create("packs/aa/one", b"first")
        storage.create("packs/aa/one", b"again")
        assert storage.read("packs/aa/one") == b"first"

    def test_creating_an_object_where_another_size_is_is_refused(self, storage: Storage) -> None:
        storage.create("packs/aa/one", b"first")
        with pytest.raises(StorageError, match="5 bytes instead of 6"):
            storage.create("packs/aa/one", b"second")
        assert storage.read("packs/aa/one") == b"first"

    def test_an_overwritten_object_is_replaced_whole(self, storage: Storage) -> None:
        storage.write("config", b"a long first version")
        storage.write("config", b"second")
        assert storage.read("config") == b"second"
        assert storage.size("config") == 6

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_writer_publishes_what_was_appended(self, storage: Storage, in_memory: bool) -> None:
        writer = storage.open_writer(in_memory)
        part = bytearray(b"one")
        writer.append(part)
        part[:] = b"xxx"
        writer.append(memoryview(b"-two-"))
        writer.append(b"")
        writer.append(b"three")
        assert list(storage.list("packs")) == []
        writer.commit("packs/ab/cd")
        writer.discard()
        assert storage.read("packs/ab/cd") == b"one-two-three"
        assert storage.size("packs/ab/cd") == 13

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_discarded_writer_leaves_nothing(self, storage: Storage, in_memory: bool) -> None:
        writer = storage.open_writer(in_memory)
        writer.append(b"something")
        writer.discard()
        writer.discard()
        assert list(storage.list("packs")) == []

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_writer_does_not_replace_an_object(self, storage: Storage, in_memory: bool) -> None:
        storage.create("packs/ab/cd", b"first")
        for data in (b"again", b"another"):
            writer = storage.open_writer(in_memory)
            try:
                writer.append(data)
                if len(data) == 5:
                    writer.commit("packs/ab/cd")
                else:
                    with pytest.raises(StorageError, match="5 bytes instead of 7"):
                        writer.commit("packs/ab/cd")
            finally:
                writer.discard()
        assert storage.read("packs/ab/cd") == b"first"

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_an_empty_writer_publishes_an_empty_object(
        self, storage: Storage, in_memory: bool
    ) -> None:
        writer = storage.open_writer(in_memory)
        writer.commit("packs/ab/empty")
        writer.discard()
        assert storage.size("packs/ab/empty") == 0

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_large_object_comes_back_in_any_range(
        self, storage: Storage, in_memory: bool
    ) -> None:
        data = random_bytes(19 * MIB + 7)
        writer = storage.open_writer(in_memory)
        try:
            for begin in range(0, len(data), 3 * MIB):
                writer.append(data[begin : begin + 3 * MIB])
            writer.commit("packs/ab/large")
        finally:
            writer.discard()
        assert storage.read("packs/ab/large") == data
        assert storage.read("packs/ab/large", MIB - 3, 17 * MIB) == data[MIB - 3 : 18 * MIB - 3]
        assert storage.read("packs/ab/large", 18 * MIB, 5 * MIB) == data[18 * MIB :]
        assert storage.read("packs/ab/large", len(data) - 5) == data[-5:]

    def test_a_deleted_object_is_gone(self, storage: Storage) -> None:
        storage.create("snapshots/a", b"x")
        assert storage.read("snapshots/a") == b"x"
        storage.delete("snapshots/a")
        with pytest.raises(NotFoundError):
            storage.read("snapshots/a")
        assert list(storage.list("snapshots")) == []

    def test_deleting_a_missing_object_is_no_error(self, storage: Storage) -> None:
        storage.delete("snapshots/none")
        storage.delete("nowhere/at/all")

    def test_a_deleted_name_can_be_created_again(self, storage: Storage) -> None:
        storage.create("snapshots/a", b"first")
        storage.delete("snapshots/a")
        storage.create("snapshots/a", b"second")
        assert storage.read("snapshots/a") == b"second"

    def test_an_object_has_the_time_at_which_it_was_written(self, storage: Storage) -> None:
        before_ns = time.time_ns()
        storage.create("snapshots/a", b"x")
        after_ns = time.time_ns()
        (listed,) = storage.list("snapshots")
        for mtime_ns in (storage.mtime_ns("snapshots/a"), listed.mtime_ns):
            # The servers of these tests have this machine's clock, some in whole seconds.
            assert before_ns - 2_000_000_000 <= mtime_ns <= after_ns + 2_000_000_000

    def test_a_nonblocking_read_returns_the_range_or_nothing(self, storage: Storage) -> None:
        storage.create("packs/aa/one", b"0123456789")
        storage.read("packs/aa/one", 0, 10)
        storage.prefetch("packs/aa/one", 0, 10)
        assert storage.read_nonblocking("packs/aa/one", 2, 3) in (None, b"234")
        assert storage.read_nonblocking("packs/aa/one", 8, 3) is None

    def test_threads_may_use_a_storage_at_the_same_time(self, storage: Storage) -> None:
        blocks = [random_bytes(40_000 + i, i) for i in range(24)]

        def write_and_read(i: int) -> bytes:
            writer = storage.open_writer(in_memory=i % 2 == 0)
            try:
                writer.append(blocks[i])
                writer.commit(f"packs/{i % 5:02x}/{i:04x}")
            finally:
                writer.discard()
            return storage.read(f"packs/{i % 5:02x}/{i:04x}")

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(write_and_read, range(24))) == blocks
        assert len(list(storage.list("packs"))) == 24

    def test_one_of_many_concurrent_creations_stays(self, storage: Storage) -> None:
        versions = [bytes([i]) * 1000 for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda data: storage.create("packs/aa/contested", data), versions))
        first = storage.read("packs/aa/contested")
        assert first in versions
        storage.create("packs/aa/contested", bytes(1000))
        assert storage.read("packs/aa/contested") == first

    def test_a_closed_storage_can_be_closed_again(self, storage: Storage) -> None:
        storage.create("packs/aa/one", b"1")
        storage.close()
        storage.close()
