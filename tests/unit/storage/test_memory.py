"""The storage in memory keeps the contract, by itself and inside of what wraps a storage."""

from __future__ import annotations

import pytest

from casfs.storage.base import Storage
from casfs.storage.limits import LimitedStorage, RateLimit
from casfs.storage.memory import MemoryStorage
from casfs.storage.retry import Retrier, RetryingStorage, RetryPolicy
from tests.support.storage_double import RecordingStorage

from .contract import StorageContract


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage()


class TestRecordingStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return RecordingStorage(MemoryStorage())


class TestWrappedStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        limit = RateLimit(1 << 30)
        limited = LimitedStorage(MemoryStorage(), upload=limit, download=limit)
        return RetryingStorage(limited, Retrier(RetryPolicy()))


def test_the_clock_of_a_memory_storage_can_be_set() -> None:
    now_ns = 5_000_000_000
    storage = MemoryStorage(now_ns=lambda: now_ns)
    storage.create("packs/aa", b"1")
    now_ns += 1
    storage.write("packs/aa", b"2")
    assert storage.mtime_ns("packs/aa") == 5_000_000_001
