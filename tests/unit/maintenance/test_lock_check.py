"""Check reports until when snapshots are locked, and which packs are locked for less long."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from casfs.errors import StorageDeniedError, StorageUnavailableError
from casfs.maintenance.lock_check import LockReport, ShortLock, check_locks
from casfs.monitor import RecordingMonitor
from casfs.repository.lock_dates import held_until_s, lock_ends_s, locking_bucket
from casfs.repository.object_locks import lock_end_s
from casfs.storage.memory import MemoryStorage
from tests.support.locked_repository import (
    DAY_S,
    LOCK_S,
    PERIOD_S,
    START_S,
    LockedRepository,
    locked_repository,
)
from tests.support.storage_double import Call, Failure, RecordingStorage
from tests.support.versioned_memory import VersionedMemoryStorage


@pytest.fixture
def repo(monkeypatch: pytest.MonkeyPatch, own_home: Path, tmp_path: Path) -> LockedRepository:
    return locked_repository(monkeypatch, tmp_path / "source")


def report_of(repo: LockedRepository) -> LockReport:
    with repo.read() as repository:
        report = check_locks(repository, RecordingMonitor(), repo.now_s)
    assert report is not None
    return report


def test_every_snapshot_is_reported_with_the_end_of_its_lock(repo: LockedRepository) -> None:
    first = repo.back_up()
    repo.now_s += PERIOD_S
    second = repo.back_up()
    end_s = lock_end_s(START_S, LOCK_S)
    assert first.snapshot_id is not None and second.snapshot_id is not None
    report = report_of(repo)
    assert report.snapshots == {first.snapshot_id: end_s, second.snapshot_id: end_s + PERIOD_S}
    assert report.short == []


def test_a_lock_that_has_ended_and_a_missing_one_are_reported_as_none(
    repo: LockedRepository,
) -> None:
    first = repo.back_up()
    repo.now_s += 100 * DAY_S
    repo.memory.bucket.may_lock = False
    second = repo.back_up()
    assert first.snapshot_id is not None and second.snapshot_id is not None
    assert report_of(repo).snapshots == {first.snapshot_id: None, second.snapshot_id: None}


def test_a_pack_that_is_locked_for_less_long_than_its_snapshot_is_found(
    repo: LockedRepository,
) -> None:
    (repo.source / "other").write_bytes(random.Random(2).randbytes(1000))
    first = repo.back_up()
    repo.now_s += PERIOD_S
    before = {name: repo.until_s(name) for name in repo.packs()}
    # A host with a wrong idea of what is locked, such as a forged cache, extends no pack.
    with repo.open() as repository:
        from casfs.repository.object_locks import ObjectLocks

        end_s = lock_end_s(repo.now_s, LOCK_S)
        locks = ObjectLocks(repo.memory.bucket, repository.store.index, end_s)
        locks._remember(sorted(before))
    second = repo.back_up()
    assert first.snapshot_id is not None and second.snapshot_id is not None
    report = report_of(repo)
    assert report.snapshots[second.snapshot_id] == end_s
    assert set(report.short) == {
        ShortLock(second.snapshot_id, end_s, name, until_s) for name, until_s in before.items()
    }


def test_a_pack_without_a_lock_is_found(repo: LockedRepository) -> None:
    done = repo.back_up()
    assert done.snapshot_id is not None
    name = sorted(repo.packs())[0]
    repo.memory.bucket._locks.pop(repo.memory.bucket._newest(name).version)
    assert [(one.pack, one.until_s) for one in report_of(repo).short] == [(name, None)]


def test_a_place_without_locks_has_no_report(own_home: Path) -> None:
    assert locking_bucket(MemoryStorage()) is None
    assert locking_bucket(VersionedMemoryStorage(can_lock=False)) is None
    assert held_until_s(MemoryStorage(), ["packs/a"], 0) == {}


def test_the_ends_of_many_locks_are_asked_and_errors_are_raised() -> None:
    memory = VersionedMemoryStorage(now_ns=lambda: START_S * 1_000_000_000)
    names = [f"packs/{number:04x}" for number in range(2500)]
    for number, name in enumerate(names):
        memory.create(name, b"1")
        if number % 2:
            memory.bucket.lock(name, START_S + number)
    storage = RecordingStorage(memory)
    assert storage.bucket is not None
    ends = lock_ends_s(storage.bucket, [*names, "packs/gone"])
    assert ends == {name: START_S + n for n, name in enumerate(names) if n % 2}
    held = held_until_s(storage, names, START_S + 1250)
    assert held == {name: end_s for name, end_s in ends.items() if end_s > START_S + 1250}
    storage.script.failures.append(Failure(lambda call: call.method == "locked_until_s"))
    with pytest.raises(StorageUnavailableError):
        lock_ends_s(storage.bucket, names)


def test_credentials_that_may_not_ask_for_the_settings_may_still_ask_for_locks() -> None:
    memory = VersionedMemoryStorage()
    memory.create("packs/a", b"1")
    memory.bucket.lock("packs/a", 2_000_000_000)
    storage = RecordingStorage(memory)

    def denied(call: Call) -> BaseException:
        return StorageDeniedError("ask", call.name, PermissionError(13, "no"))

    storage.script.failures.append(Failure(lambda call: call.method == "settings", denied))
    assert held_until_s(storage, ["packs/a"], 0) == {"packs/a": 2_000_000_000}
