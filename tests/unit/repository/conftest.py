"""What several tests of repositories open."""

from __future__ import annotations

import pytest

from casfs.storage.base import Storage
from casfs.storage.memory import MemoryStorage
from tests.support.storage_double import RecordingStorage


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> RecordingStorage:
    """What every remote place of the test opens."""
    storage = RecordingStorage(MemoryStorage("s3://bucket/r"))

    def open_it(*arguments: object) -> Storage:
        return storage

    monkeypatch.setattr("casfs.storage.remote.open_storage", open_it)
    return storage
