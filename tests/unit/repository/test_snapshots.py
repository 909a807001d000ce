"""Changing tags: a snapshot with another id and the same content, and never two of them listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.digest import SnapshotId
from casfs.maintenance.forget import Candidate, forget
from casfs.repository.opening import OpenOptions, open_for_writing
from tests.support.builders import RepositoryFixture


class Crash(BaseException):
    """What stops a process at once."""


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


def listed(repo: RepositoryFixture) -> list[tuple[str, ...]]:
    with repo.reading() as repository:
        return [snapshot.tags for _, snapshot in repository.snapshots.iterate()]


def tag(repo: RepositoryFixture, snapshot_id: SnapshotId, *tags: str) -> SnapshotId:
    with repo.writing() as repository:
        return repository.snapshots.retag(
            snapshot_id, repository.snapshots.load(snapshot_id), tags
        )[0]


def tag_and_crash(
    repo: RepositoryFixture, snapshot_id: SnapshotId, *tags: str, before: str = "unlink"
) -> None:
    """Change tags in a process that is stopped before a durable step."""

    def on_step(step: str) -> None:
        if step.startswith(before):
            raise Crash

    with (
        pytest.raises(Crash),
        open_for_writing(repo.root, "tag", OpenOptions(sync=False, on_step=on_step)) as repository,
    ):
        repository.snapshots.retag(snapshot_id, repository.snapshots.load(snapshot_id), tags)


def test_a_retagged_snapshot_replaces_the_old_one(repo: RepositoryFixture) -> None:
    first, snapshot = repo.publish({b"f": b"1"}, tags=("a",))
    second = tag(repo, first, "b", "c")
    with repo.reading() as repository:
        assert repository.snapshots.ids() == [second]
        now = repository.snapshots.load(second)
    assert (now.tags, now.replaces) == (("b", "c"), first)
    assert (now.root, now.time_ns, now.host) == (snapshot.root, snapshot.time_ns, snapshot.host)


def test_equal_tags_change_nothing(repo: RepositoryFixture) -> None:
    first, _ = repo.publish({}, tags=("a",))
    assert tag(repo, first, "a") == first
    with repo.reading() as repository:
        assert repository.snapshots.ids() == [first]


@pytest.mark.parametrize("complete", [True, False])
def test_a_retagged_snapshot_keeps_its_completeness(
    repo: RepositoryFixture, complete: bool
) -> None:
    first, _ = repo.publish({b"f": b"1"})
    with repo.writing() as repository:
        if not complete:
            repository.store.rebuild()
    second = tag(repo, first, "a")
    with repo.reading() as repository:
        assert repository.store.index.is_complete(second) is complete


class TestRetagCrash:
    def test_a_crash_before_the_old_snapshot_is_removed_lists_the_new_one(
        self, repo: RepositoryFixture
    ) -> None:
        first, _ = repo.publish({b"f": b"1"}, tags=("old",))
        tag_and_crash(repo, first, "new")
        with repo.reading() as repository:
            assert len(repository.snapshots.ids()) == 2
        assert listed(repo) == [("new",)]

    @pytest.mark.parametrize("before", ["data", "rename"])
    def test_a_crash_before_the_new_snapshot_is_published_leaves_the_old_one(
        self, repo: RepositoryFixture, before: str
    ) -> None:
        first, _ = repo.publish({b"f": b"1"}, tags=("old",))
        tag_and_crash(repo, first, "new", before=before)
        assert listed(repo) == [("old",)]

    def test_the_next_retag_repairs_a_crash_and_the_first_snapshot_never_returns(
        self, repo: RepositoryFixture
    ) -> None:
        first, _ = repo.publish({b"f": b"1"}, tags=("old",))
        tag_and_crash(repo, first, "new")
        with repo.reading() as repository:
            ((second, _),) = repository.snapshots.iterate()
        third = tag(repo, second, "newer")
        assert listed(repo) == [("newer",)]
        with repo.reading() as repository:
            assert repository.snapshots.ids() == [third]

    @pytest.mark.parametrize("is_forgotten", [True, False])
    def test_after_two_crashes_no_earlier_version_returns(
        self, repo: RepositoryFixture, is_forgotten: bool
    ) -> None:
        newest, snapshot = repo.publish({b"f": b"1"}, tags=("0",))
        for number in range(1, 3):
            tag_and_crash(repo, newest, f"{number}")
            with repo.reading() as repository:
                ((newest, snapshot),) = repository.snapshots.iterate()
        if is_forgotten:
            with repo.writing() as repository:
                assert forget(repository, [Candidate(newest, snapshot)]) == 1
        else:
            tag(repo, newest, "last")
        with repo.reading() as repository:
            assert len(repository.snapshots.ids()) == (0 if is_forgotten else 1)

    def test_repeated_crashes_still_list_one_snapshot(self, repo: RepositoryFixture) -> None:
        first, _ = repo.publish({b"f": b"1"}, tags=("0",))
        for number in range(1, 4):
            tag_and_crash(repo, first, f"{number}")
            with repo.reading() as repository:
                ((first, _),) = repository.snapshots.iterate()
            assert listed(repo) == [(f"{number}",)]
