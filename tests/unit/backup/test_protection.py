"""Locks of a new snapshot and of what it needs: which objects, until when, and what happens on failure."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.backup.run import BackupResult
from casfs.digest import SnapshotId
from casfs.errors import (
    CasfsError,
    NotFoundError,
    NotPublishedError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.maintenance.lock_check import check_locks
from casfs.maintenance.repair import SnapshotRepairer
from casfs.maintenance.rewrite import rewrite_snapshot
from casfs.monitor import RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.repository.lock_policy import set_policy
from casfs.repository.object_locks import lock_end_s
from casfs.repository.opening import open_for_maintenance
from casfs.repository.place import RemotePlace, read_config
from tests.support.encryption import RECIPIENT
from tests.support.locked_repository import (
    DAY_S,
    LOCK_S,
    PERIOD_S,
    START_S,
    LockedRepository,
    locked_repository,
)
from tests.support.storage_double import Call, Failure, unavailable


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, own_home: Path, tmp_path: Path) -> LockedRepository:
    return locked_repository(monkeypatch, tmp_path / "source")


def snapshot_name(result: BackupResult) -> str:
    assert result.snapshot_id is not None
    return f"snapshots/{result.snapshot_id.hex()}"


def test_dates_are_rounded_up_to_the_end_of_a_period() -> None:
    for now_s in (START_S, START_S + 1, START_S + PERIOD_S - 1, START_S + PERIOD_S):
        end_s = lock_end_s(now_s, LOCK_S)
        assert LOCK_S < end_s - now_s <= LOCK_S + PERIOD_S
        assert end_s % PERIOD_S == 0
    assert lock_end_s(0, 3660 * DAY_S) <= (3660 + 30) * DAY_S
    assert 1 < lock_end_s(0, 1) <= 2


def test_a_snapshot_and_what_it_needs_are_locked_until_the_same_date(
    bench: LockedRepository,
) -> None:
    result = bench.back_up()
    assert result.protection is not None and result.protection.error is None
    until_s = result.protection.until_s
    assert until_s == lock_end_s(START_S, LOCK_S)
    needed = {*bench.packs(), "config", snapshot_name(result)}
    needed |= {entry.name for entry in bench.memory.list("lock-policies")}
    needed |= {entry.name for entry in bench.memory.list("deltas")}
    assert {name: bench.until_s(name) for name in needed} == dict.fromkeys(needed, until_s)
    assert bench.locked()[-1] == snapshot_name(result)


def test_the_snapshot_is_published_after_what_it_needs_is_locked(bench: LockedRepository) -> None:
    result = bench.back_up()
    order = [
        (call.method, call.name)
        for call in bench.storage.calls
        if call.method == "lock" or call.name.startswith("snapshots/")
    ]
    published = order.index(("create", snapshot_name(result)))
    assert {name for _, name in order[:published]} == bench.packs()
    assert {name for _, name in order[published + 1 : -1]} == key_objects(bench)
    assert order[-1] == ("lock", snapshot_name(result))


def test_within_a_period_only_what_is_new_is_locked(bench: LockedRepository) -> None:
    bench.back_up()
    bench.locked()
    before = bench.packs()
    bench.now_s += 3600
    again = bench.back_up()
    assert [n for n in bench.locked() if not n.startswith("deltas/")] == [snapshot_name(again)]
    (bench.source / "new").write_bytes(random.Random(2).randbytes(1000))
    third = bench.back_up()
    locked = [name for name in bench.locked() if not name.startswith("deltas/")]
    assert set(locked) == {*(bench.packs() - before), snapshot_name(third)}


def test_a_new_period_extends_the_packs_that_the_snapshot_relies_on_and_no_others(
    bench: LockedRepository,
) -> None:
    (bench.source / "other").write_bytes(random.Random(3).randbytes(1000))
    bench.back_up("other")
    unneeded = bench.packs()
    bench.back_up("file")
    first = lock_end_s(START_S, LOCK_S)
    bench.now_s += PERIOD_S
    bench.locked()
    result = bench.back_up("file")
    assert result.protection is not None
    assert result.protection.until_s == first + PERIOD_S
    packs = {name: bench.until_s(name) for name in bench.packs()}
    assert {packs[name] for name in unneeded} == {first}
    assert {packs[name] for name in packs.keys() - unneeded} == {first + PERIOD_S}
    assert len(bench.locked()) == len(set(packs) - unneeded) + len(key_objects(bench)) + 1


def key_objects(bench: LockedRepository) -> set[str]:
    names = {"config"}
    for folder in ("lock-policies", "deltas"):
        names |= {entry.name for entry in bench.memory.list(folder)}
    return names


def test_a_pack_that_no_snapshot_needed_for_long_is_locked_again_when_one_relies_on_it(
    bench: LockedRepository,
) -> None:
    (bench.source / "other").write_bytes(random.Random(3).randbytes(1000))
    bench.back_up("other")
    old = bench.packs()
    bench.now_s += 2 * PERIOD_S
    bench.back_up("file")
    until_s = {bench.until_s(name) for name in old}
    result = bench.back_up("other", "file")
    assert result.protection is not None
    assert until_s == {lock_end_s(START_S, LOCK_S)}
    # The content of `other` is in an old pack; that of its old directory is not needed.
    assert result.protection.until_s in {bench.until_s(name) for name in old}


def test_a_host_that_lost_its_cache_locks_everything_that_it_needs_again(
    bench: LockedRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench.back_up()
    bench.locked()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new cache"))
    bench.back_up()
    assert bench.packs() <= set(bench.locked())


def test_a_dry_run_locks_nothing(bench: LockedRepository) -> None:
    result = bench.back_up(dry_run=True)
    assert result.protection is None
    assert bench.locked() == []


def test_a_repository_without_a_policy_locks_nothing(bench: LockedRepository) -> None:
    set_policy(bench.storage, read_config(bench.place), 0, None)
    bench.locked()
    assert bench.back_up().protection is None
    assert bench.locked() == []


@pytest.mark.parametrize("offset_s", [-400 * DAY_S, 400 * DAY_S])
def test_dates_follow_the_clock_of_the_storage_and_not_that_of_the_machine(
    bench: LockedRepository, offset_s: int
) -> None:
    bench.now_s += offset_s
    result = bench.back_up()
    assert result.protection is not None
    assert result.protection.until_s == lock_end_s(bench.now_s, LOCK_S)


def denied(call: Call) -> CasfsError:
    return StorageDeniedError("lock", call.name, PermissionError(13, "not allowed"))


def broken(call: Call) -> CasfsError:
    return StorageError("lock", call.name, OSError(5, "the server answered 400"))


def missing(call: Call) -> CasfsError:
    return NotFoundError(f"{call.name} does not exist")


@pytest.mark.parametrize("error", [denied, broken, missing])
@pytest.mark.parametrize("prefix", ["packs/", "config", "snapshots/"])
def test_what_cannot_be_locked_is_reported_and_the_snapshot_is_published(
    bench: LockedRepository, error: Callable[[Call], CasfsError], prefix: str
) -> None:
    bench.fail(error, prefix)
    result = bench.back_up()
    assert result.snapshot_id is not None
    with bench.open() as repository:
        assert repository.snapshots.ids() == [result.snapshot_id]
    assert result.protection is not None
    if error is missing and prefix == "config":
        assert result.protection.error is None  # it was there when the backup began
        return
    assert type(result.protection.error) is type(error(Call("lock", "")))
    assert result.protection.not_locked >= 1
    if prefix != "snapshots/":
        # A lock of the snapshot would promise what is not so.
        assert bench.until_s(snapshot_name(result)) == 0
    # The next backup locks what this one could not.
    healed = bench.back_up()
    assert healed.protection is not None and healed.protection.error is None
    assert {bench.until_s(name) for name in bench.packs()} == {healed.protection.until_s}


def test_the_first_refusal_of_the_credentials_ends_the_requests(bench: LockedRepository) -> None:
    bench.memory.bucket.may_lock = False
    result = bench.back_up()
    assert result.protection is not None
    assert isinstance(result.protection.error, StorageDeniedError)
    assert result.protection.not_locked == len(bench.packs()) + len(key_objects(bench)) + 1


def test_a_server_that_does_not_answer_before_the_snapshot_publishes_nothing(
    bench: LockedRepository,
) -> None:
    bench.fail(unavailable, "packs/")
    with pytest.raises(NotPublishedError, match="no answer; nothing was published"):
        bench.back_up()
    assert list(bench.memory.list("snapshots")) == []
    assert bench.back_up().snapshot_id is not None


def test_a_server_that_falls_silent_after_the_snapshot_is_reported(bench: LockedRepository) -> None:
    bench.fail(unavailable, "snapshots/")
    result = bench.back_up()
    assert result.protection is not None
    assert isinstance(result.protection.error, StorageUnavailableError)
    assert result.protection.not_locked == 1
    assert bench.until_s(snapshot_name(result)) == 0


def test_an_answer_that_is_lost_does_no_harm(bench: LockedRepository) -> None:
    bench.storage.script.failures.append(
        Failure(lambda call: call.method == "lock", unavailable, after=True)
    )
    with pytest.raises(NotPublishedError, match="no answer; nothing was published"):
        bench.back_up()
    result = bench.back_up()
    assert result.protection is not None and result.protection.error is None
    assert {bench.until_s(name) for name in bench.packs()} == {result.protection.until_s}


def test_a_lock_that_lasts_longer_stays(bench: LockedRepository) -> None:
    bench.back_up()
    later_s = START_S + 1000 * DAY_S
    for name in bench.packs():
        bench.memory.bucket.lock(name, later_s)
    bench.now_s += PERIOD_S
    bench.back_up()
    assert {bench.until_s(name) for name in bench.packs()} == {later_s}


def test_records_of_ended_locks_are_dropped(bench: LockedRepository) -> None:
    bench.back_up()
    bench.now_s += 60 * DAY_S
    bench.back_up()
    bench.now_s += 60 * DAY_S
    with bench.open() as repository:
        from casfs.backup.protection import Protection

        Protection.begin(repository)
        environment = repository.store.index.environment
        meta = environment.database(b"meta")
        keys = environment.read(lambda txn: [bytes(key) for key, _ in txn.cursor(db=meta)])
    assert [key for key in keys if key.startswith(b"locked")] == []


def test_a_snapshot_is_known_to_be_covered_only_if_all_was_locked(bench: LockedRepository) -> None:
    bench.fail(broken, "packs/")
    first = bench.back_up()
    assert first.snapshot_id is not None
    assert not covers(bench, first.snapshot_id)
    second = bench.back_up()
    assert second.snapshot_id is not None
    assert covers(bench, second.snapshot_id)


def covers(bench: LockedRepository, snapshot_id: SnapshotId) -> bool:
    from casfs.backup.protection import Protection

    with bench.open() as repository:
        protection = Protection.begin(repository)
        assert protection is not None
        return protection._covers(snapshot_id)


def test_a_retagged_snapshot_is_locked_as_long_as_before(bench: LockedRepository) -> None:
    done = bench.back_up()
    assert done.snapshot_id is not None and done.protection is not None
    bench.now_s += PERIOD_S
    with bench.open() as repository:
        new_id, _ = repository.snapshots.retag(
            done.snapshot_id, repository.snapshots.load(done.snapshot_id), ("kept",)
        )
    assert bench.until_s(f"snapshots/{new_id.hex()}") == done.protection.until_s


def test_a_tag_that_cannot_be_locked_is_reported(
    bench: LockedRepository, caplog: pytest.LogCaptureFixture
) -> None:
    done = bench.back_up()
    assert done.snapshot_id is not None
    bench.fail(denied, "snapshots/")
    with bench.open() as repository:
        repository.snapshots.retag(
            done.snapshot_id, repository.snapshots.load(done.snapshot_id), ("kept",)
        )
    assert "is not locked like the one that it replaces" in caplog.text


def test_a_rewritten_snapshot_and_its_packs_are_locked(bench: LockedRepository) -> None:
    (bench.source / "secret").write_bytes(b"secret")
    done = bench.back_up()
    assert done.snapshot_id is not None
    bench.now_s += PERIOD_S
    with bench.open() as repository:
        rewritten = rewrite_snapshot(
            repository,
            done.snapshot_id,
            done.snapshot,
            [parse_pattern(b"secret")],
            RecordingMonitor(),
        )
    assert rewritten.new_id is not None
    until_s = lock_end_s(bench.now_s, LOCK_S)
    assert bench.until_s(f"snapshots/{rewritten.new_id.hex()}") == until_s
    with bench.read() as repository:
        report = check_locks(repository, RecordingMonitor(), bench.now_s)
    assert report is not None and report.short == []


def test_a_repaired_snapshot_and_its_packs_are_locked(bench: LockedRepository) -> None:
    bench.back_up()
    lost = {name for name in bench.packs() if name.startswith("packs/")}
    (bench.source / "kept").write_bytes(random.Random(3).randbytes(1000))
    done = bench.back_up()
    for name in lost:
        bench.memory._objects.pop(name)
    bench.now_s += PERIOD_S
    with open_for_maintenance(bench.place, "repair snapshots") as repository:
        repaired = SnapshotRepairer(repository, RecordingMonitor()).repair().repaired
    (new_id,) = [one.new_id for one in repaired if one.snapshot_id == done.snapshot_id]
    assert new_id is not None
    assert bench.until_s(f"snapshots/{new_id.hex()}") == lock_end_s(bench.now_s, LOCK_S)
    with bench.read() as repository:
        report = check_locks(repository, RecordingMonitor(), bench.now_s)
    assert report is not None and report.short == []


def test_a_rewritten_snapshot_that_cannot_be_locked_is_reported(
    bench: LockedRepository, caplog: pytest.LogCaptureFixture
) -> None:
    (bench.source / "secret").write_bytes(b"secret")
    done = bench.back_up()
    assert done.snapshot_id is not None
    bench.memory.bucket.may_lock = False
    with bench.open() as repository:
        rewrite_snapshot(
            repository,
            done.snapshot_id,
            done.snapshot,
            [parse_pattern(b"secret")],
            RecordingMonitor(),
        )
    assert "is not protected" in caplog.text


def test_a_write_only_host_locks_what_it_stored_and_the_keys(
    monkeypatch: pytest.MonkeyPatch, own_home: Path, tmp_path: Path
) -> None:
    bench = locked_repository(monkeypatch, tmp_path / "source", [RECIPIENT])
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "another machine"))
    bench.place = RemotePlace(bench.place.address)
    bench.back_up()
    bench.now_s += PERIOD_S
    bench.locked()
    result = bench.back_up()
    assert result.protection is not None and result.protection.error is None
    until_s = lock_end_s(bench.now_s, LOCK_S)
    sessions = {entry.name for entry in bench.memory.list("sessions")}
    assert sessions
    needed = bench.packs() | sessions | {"config", "recipients", snapshot_name(result)}
    assert {bench.until_s(name) for name in needed} == {until_s}
