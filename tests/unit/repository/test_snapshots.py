"""Changing tags: a snapshot with another id and the same content, and never two of them listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.digest import SnapshotId
from casfs.repository.opening import OpenOptions, open_for_writing
from tests.support.builders import Keeper


class Crash(BaseException):
    """What stops a process at once."""


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path)


def listed(keeper: Keeper) -> list[tuple[str, ...]]:
    with keeper.reading() as repository:
        return [snapshot.tags for _, snapshot in repository.snapshots.iterate()]


def tag(keeper: Keeper, snapshot_id: SnapshotId, *tags: str) -> SnapshotId:
    with keeper.writing() as repository:
        return repository.snapshots.retag(
            snapshot_id, repository.snapshots.load(snapshot_id), tags
        )[0]


def tag_and_crash(
    keeper: Keeper, snapshot_id: SnapshotId, *tags: str, before: str = "unlink"
) -> None:
    """Change tags in a process that is stopped before a durable step."""

    def on_step(step: str) -> None:
        if step.startswith(before):
            raise Crash

    with (
        pytest.raises(Crash),
        open_for_writing(
            keeper.root, "tag", OpenOptions(sync=False, on_step=on_step)
        ) as repository,
    ):
        repository.snapshots.retag(snapshot_id, repository.snapshots.load(snapshot_id), tags)


def test_a_retagged_snapshot_replaces_the_old_one(keeper: Keeper) -> None:
    first, snapshot = keeper.publish({b"f": b"1"}, tags=("a",))
    second = tag(keeper, first, "b", "c")
    with keeper.reading() as repository:
        assert repository.snapshots.ids() == [second]
        now = repository.snapshots.load(second)
    assert (now.tags, now.replaces) == (("b", "c"), first)
    assert (now.root, now.time_ns, now.host) == (snapshot.root, snapshot.time_ns, snapshot.host)


def test_equal_tags_change_nothing(keeper: Keeper) -> None:
    first, _ = keeper.publish({}, tags=("a",))
    assert tag(keeper, first, "a") == first
    with keeper.reading() as repository:
        assert repository.snapshots.ids() == [first]


@pytest.mark.parametrize("complete", [True, False])
def test_a_retagged_snapshot_keeps_its_completeness(keeper: Keeper, complete: bool) -> None:
    first, _ = keeper.publish({b"f": b"1"})
    with keeper.writing() as repository:
        if not complete:
            repository.store.rebuild()
    second = tag(keeper, first, "a")
    with keeper.reading() as repository:
        assert repository.store.index.is_complete(second) is complete


class TestRetagCrash:
    def test_a_crash_before_the_old_snapshot_is_removed_lists_the_new_one(
        self, keeper: Keeper
    ) -> None:
        first, _ = keeper.publish({b"f": b"1"}, tags=("old",))
        tag_and_crash(keeper, first, "new")
        with keeper.reading() as repository:
            assert len(repository.snapshots.ids()) == 2
        assert listed(keeper) == [("new",)]

    @pytest.mark.parametrize("before", ["data", "rename"])
    def test_a_crash_before_the_new_snapshot_is_published_leaves_the_old_one(
        self, keeper: Keeper, before: str
    ) -> None:
        first, _ = keeper.publish({b"f": b"1"}, tags=("old",))
        tag_and_crash(keeper, first, "new", before=before)
        assert listed(keeper) == [("old",)]

    def test_the_next_retag_repairs_a_crash_and_the_first_snapshot_never_returns(
        self, keeper: Keeper
    ) -> None:
        first, _ = keeper.publish({b"f": b"1"}, tags=("old",))
        tag_and_crash(keeper, first, "new")
        with keeper.reading() as repository:
            ((second, _),) = repository.snapshots.iterate()
        third = tag(keeper, second, "newer")
        assert listed(keeper) == [("newer",)]
        with keeper.reading() as repository:
            assert repository.snapshots.ids() == [third]

    def test_repeated_crashes_still_list_one_snapshot(self, keeper: Keeper) -> None:
        first, _ = keeper.publish({b"f": b"1"}, tags=("0",))
        for number in range(1, 4):
            tag_and_crash(keeper, first, f"{number}")
            with keeper.reading() as repository:
                ((first, _),) = repository.snapshots.iterate()
            assert listed(keeper) == [(f"{number}",)]
