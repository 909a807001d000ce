"""A remote place without a server: objects in memory behind the recording double."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import open_for_reading, open_for_writing
from casfs.repository.place import RemotePlace
from casfs.repository.repository import Repository
from casfs.storage.base import Storage
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import parse_address
from tests.support.storage_double import RecordingStorage, Script


@dataclass(frozen=True, slots=True)
class FarRepository:
    """A repository in a remote place; `storage` records the requests to it.

    The index and the cache are in the home of the test.
    """

    storage: RecordingStorage
    place: RemotePlace

    @staticmethod
    def create(
        monkeypatch: pytest.MonkeyPatch, parallel_requests: int = 8, format_: int = 2
    ) -> FarRepository:
        """Create a repository in what every remote place of the test opens from now on."""
        inner = MemoryStorage("s3://bucket/r")
        storage = RecordingStorage(inner, Script(parallel_requests=parallel_requests))

        def open_it(*arguments: object) -> Storage:
            return storage

        monkeypatch.setattr("casfs.storage.remote.open_storage", open_it)
        create_repository(RemotePlace(parse_address("s3://bucket/r")), format_=format_)
        return FarRepository(storage, RemotePlace(parse_address("s3://bucket/r")))

    def reading(self) -> Repository:
        return open_for_reading(self.place)

    def writing(self) -> Repository:
        return open_for_writing(self.place, "test")

    def back_up(self, *sources: Path) -> BackupResult:
        """Publish a snapshot of the sources."""
        options = BackupOptions(paths=tuple(bytes(source) for source in sources), host="here")
        with open_for_writing(self.place, "backup") as repository:
            return run_backup(repository, options, RecordingMonitor())

    def round_trips(self, act: Callable[[], object], round_trip_s: float = 0.1) -> int:
        """Return how many requests a new process waits for one after the other; without connecting."""
        self.storage.round_trips()
        self.storage.script.round_trip_s = round_trip_s
        # As a process does that has read no configuration yet.
        self.place.config_cache._found = None
        try:
            act()
        finally:
            self.storage.script.round_trip_s = 0.0
        return self.storage.round_trips()

    def requests(self) -> list[str]:
        """Return the methods and the first parts of the names of the requests since the last call.

        An entry of a listing is no request.
        """
        calls = [call for call in self.storage.calls if call.method != "list entry"]
        self.storage.calls.clear()
        return [f"{call.method} {call.name.partition('/')[0]}" for call in calls]
