"""A repository in a bucket that locks, in memory, and a host that backs up into it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.backup.stability import is_racy
from casfs.crypto.recipients import Recipient
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.lock_policy import own_domain, set_policy
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.place import RemotePlace, read_config
from casfs.repository.repository import Repository
from casfs.storage.base import Storage
from casfs.storage.url import parse_address
from tests.support.storage_double import Call, Failure, RecordingStorage
from tests.support.versioned_memory import VersionedMemoryStorage
from tests.support.waiting import wait_until

DAY_S = 86_400
LOCK_S = 40 * DAY_S
PERIOD_S = 10 * DAY_S
START_S = 2_000_000_000


@dataclass
class LockedRepository:
    """A host, a repository in a bucket that locks, and the clock of the storage."""

    source: Path
    now_s: int = START_S
    memory: VersionedMemoryStorage = field(init=False)
    storage: RecordingStorage = field(init=False)
    place: RemotePlace = field(init=False)

    def __post_init__(self) -> None:
        self.memory = VersionedMemoryStorage(
            "s3://bucket/r", now_ns=lambda: self.now_s * 1_000_000_000
        )
        self.storage = RecordingStorage(self.memory)
        self.place = RemotePlace(parse_address("s3://bucket/r"))

    def back_up(self, *names: str, **options: object) -> BackupResult:
        # The next backup trusts no file whose times are those of this moment.
        wait_until(
            lambda: (
                not any(is_racy(path.lstat(), time.time_ns()) for path in self.source.rglob("*"))
            ),
            "files older than a tick of the clock",
        )
        # Relative paths: the folders above the source belong to the whole machine and change at any time.
        paths = tuple(name.encode() for name in names) or (b".",)
        open_options = OpenOptions(sync=False, allow_no_identity=True)
        with open_for_writing(self.place, "backup", open_options) as repository:
            return run_backup(repository, BackupOptions(paths, **options), RecordingMonitor())  # type: ignore[arg-type]

    def locked(self) -> list[str]:
        """Return the objects for which a lock was asked since the last call."""
        names = [call.name for call in self.storage.calls if call.method == "lock"]
        self.storage.calls.clear()
        return names

    def until_s(self, name: str) -> int:
        return self.memory.bucket.locked_until_s(name) or 0

    def packs(self) -> set[str]:
        return {entry.name for folder in ("packs", "meta") for entry in self.memory.list(folder)}

    def open(self) -> Repository:
        """Open it for writing."""
        return open_for_writing(self.place, "test", OpenOptions(sync=False))

    def read(self) -> Repository:
        """Open it for reading."""
        return open_for_reading(self.place)

    def fail(self, error: Callable[[Call], BaseException], prefix: str, times: int = 1) -> None:
        self.storage.script.failures.append(
            Failure(
                lambda call: call.method == "lock" and call.name.startswith(prefix), error, times
            )
        )


def locked_repository(
    monkeypatch: pytest.MonkeyPatch, source: Path, recipients: Sequence[Recipient] = ()
) -> LockedRepository:
    """Create a repository with a lock policy; every remote place of the test is the same storage."""
    source.mkdir()
    (source / "file").write_bytes(random.Random(1).randbytes(1000))
    found = LockedRepository(source)

    def open_it(*arguments: object) -> Storage:
        return found.storage

    monkeypatch.setattr("casfs.storage.remote.open_storage", open_it)
    monkeypatch.chdir(source)
    create_repository(found.place, recipients)
    config = read_config(found.place)
    set_policy(found.storage, config, LOCK_S, own_domain(config))
    found.storage.calls.clear()
    return found
