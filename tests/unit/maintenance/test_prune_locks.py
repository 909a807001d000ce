"""A prune beside object lock: locked packs stay, and what snapshots need is locked again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from casfs.errors import StorageDeniedError
from casfs.maintenance.lock_check import check_locks
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import PruneResult
from casfs.maintenance.shared_prune import SharedPruner
from casfs.monitor import RecordingMonitor
from casfs.repository.lock_policy import set_policy
from casfs.repository.object_locks import lock_end_s
from casfs.repository.opening import OpenOptions, open_for_maintenance
from casfs.repository.place import read_config
from tests.support.locked_repository import (
    DAY_S,
    LOCK_S,
    PERIOD_S,
    START_S,
    LockedRepository,
    locked_repository,
)
from tests.support.storage_double import Call


@pytest.fixture
def repo(monkeypatch: pytest.MonkeyPatch, own_home: Path, tmp_path: Path) -> LockedRepository:
    found = locked_repository(monkeypatch, tmp_path / "source")
    (found.source / "other").write_bytes(random.Random(2).randbytes(3000))
    return found


def prune(repo: LockedRepository, **options: object) -> PruneResult:
    with open_for_maintenance(repo.place, "prune", OpenOptions(sync=False)) as repository:
        pruner = SharedPruner(repository, PruneOptions(**options), RecordingMonitor())  # type: ignore[arg-type]
        plan = pruner.plan()
        return pruner.estimate(plan) if options.get("dry_run") else pruner.execute(plan)


def forget_first_of_two(repo: LockedRepository) -> set[str]:
    """Back up two sources, forget the first snapshot, and return the packs that only it needed."""
    first = repo.back_up("other")
    unneeded = repo.packs()
    repo.back_up("file")
    assert first.snapshot_id is not None
    with repo.open() as repository:
        repository.snapshots.delete(first.snapshot_id)
    return unneeded


def test_a_pack_whose_lock_has_not_ended_stays_and_is_no_error(repo: LockedRepository) -> None:
    unneeded = forget_first_of_two(repo)
    for dry_run in (True, False):
        result = prune(repo, dry_run=dry_run)
        assert result.locked_packs == len(unneeded)
        assert result.locked_bytes == sum(repo.memory.size(name) for name in unneeded)
        assert result.locked_until_s == lock_end_s(START_S, LOCK_S)
        assert (result.marked_packs, result.removed_packs) == (0, 0)
    assert list(repo.memory.list("condemned")) == []
    # A writer goes on to rely on it.
    before = repo.packs()
    again = repo.back_up("other")
    assert again.snapshot.stats.new_blobs == 0
    assert repo.packs() == before


def test_a_pack_goes_when_its_lock_has_ended(repo: LockedRepository) -> None:
    unneeded = forget_first_of_two(repo)
    needed = repo.packs() - unneeded
    repo.now_s = lock_end_s(START_S, LOCK_S) + 1
    marked = prune(repo)
    assert (marked.locked_packs, marked.marked_packs) == (0, len(unneeded))
    repo.now_s += 2 * 3600
    removed = prune(repo)
    assert removed.removed_packs == len(unneeded)
    assert repo.packs() == needed
    assert {repo.until_s(name) for name in needed} == {lock_end_s(repo.now_s, LOCK_S)}


def test_a_pack_that_was_locked_after_it_was_marked_stays(repo: LockedRepository) -> None:
    unneeded = forget_first_of_two(repo)
    repo.now_s = lock_end_s(START_S, LOCK_S) + 1
    prune(repo)
    for name in unneeded:
        repo.memory.bucket.lock(name, repo.now_s + DAY_S)
    repo.now_s += 2 * 3600
    result = prune(repo)
    assert (result.removed_packs, result.locked_packs) == (0, len(unneeded))
    assert unneeded <= repo.packs()


def test_snapshots_that_stay_are_locked_again_with_what_they_need(repo: LockedRepository) -> None:
    done = repo.back_up()
    assert done.snapshot_id is not None
    repo.now_s += PERIOD_S
    prune(repo)
    end_s = lock_end_s(repo.now_s, LOCK_S)
    with repo.read() as repository:
        report = check_locks(repository, RecordingMonitor(), repo.now_s)
    assert report is not None
    assert report.snapshots == {done.snapshot_id: end_s}
    assert report.short == []
    repo.locked()
    prune(repo)
    assert repo.locked() == []  # once a period


def test_packs_that_are_repacked_into_are_locked(repo: LockedRepository) -> None:
    repo.back_up()
    repo.now_s = lock_end_s(START_S, LOCK_S) + 1
    before = repo.packs()
    result = prune(repo, repack_all=True)
    assert result.repacked_packs == len(before)
    new = repo.packs() - before
    assert new
    assert {repo.until_s(name) for name in new} == {lock_end_s(repo.now_s, LOCK_S)}


def test_a_locked_pack_is_not_repacked(repo: LockedRepository) -> None:
    repo.back_up()
    before = repo.packs()
    result = prune(repo, repack_all=True)
    assert (result.repacked_packs, result.locked_packs) == (0, len(before))
    assert repo.packs() == before


def test_a_default_lock_of_the_bucket_holds_packs_without_a_policy(
    repo: LockedRepository,
) -> None:
    set_policy(repo.storage, read_config(repo.place), 0, None)
    repo.memory.bucket.default_lock_s = DAY_S
    unneeded = forget_first_of_two(repo)
    result = prune(repo)
    assert result.locked_packs == len(unneeded)
    assert result.locked_until_s == START_S + DAY_S
    repo.now_s += DAY_S
    assert prune(repo).marked_packs == len(unneeded)


def test_a_prune_that_cannot_lock_says_so_and_goes_on(
    repo: LockedRepository, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(call: Call) -> BaseException:
        return StorageDeniedError("lock", call.name, PermissionError(13, "not allowed"))

    repo.back_up()
    repo.now_s += PERIOD_S
    repo.fail(denied, "packs/")
    repo.fail(denied, "meta/")
    assert prune(repo).snapshots == 1
    assert "objects that snapshots need could not be locked" in caplog.text
