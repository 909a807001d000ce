"""The filter of snapshots, and `latest` narrowed by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.errors import NotFoundError
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS, SnapshotFilter
from tests.support.builders import RepositoryFixture


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


def test_an_empty_filter_accepts_every_snapshot(repo: RepositoryFixture) -> None:
    _, snapshot = repo.publish({})
    assert ALL_SNAPSHOTS.is_empty()
    assert ALL_SNAPSHOTS.accepts(snapshot)
    assert not SnapshotFilter(paths=(b"/x",)).is_empty()


@pytest.mark.parametrize(
    ("choice", "accepted"),
    [
        (SnapshotFilter(hosts=("here", "there")), True),
        (SnapshotFilter(hosts=("there",)), False),
        (SnapshotFilter(tags=(frozenset("a"),)), True),
        (SnapshotFilter(tags=(frozenset("ac"), frozenset("ab"))), True),
        (SnapshotFilter(tags=(frozenset("ac"),)), False),
        (SnapshotFilter(paths=(b"/p/", b"/q")), True),
        (SnapshotFilter(paths=(b"/p", b"/r")), False),
        (SnapshotFilter(("here",), (frozenset("c"),)), False),
    ],
)
def test_a_snapshot_needs_one_host_all_tags_of_one_set_and_every_path(
    repo: RepositoryFixture, choice: SnapshotFilter, accepted: bool
) -> None:
    _, snapshot = repo.publish({}, host="here", tags=("a", "b"), paths=(b"/p", b"/q"))
    assert choice.accepts(snapshot) is accepted


def test_latest_is_the_newest_snapshot_that_the_filter_accepts(repo: RepositoryFixture) -> None:
    old, _ = repo.publish({}, host="here", time_ns=1)
    new, _ = repo.publish({}, host="there", time_ns=2)
    with repo.reading() as repository:
        assert repository.snapshots.resolve("latest")[0] == new
        assert repository.snapshots.resolve("latest", SnapshotFilter(hosts=("here",)))[0] == old
        assert repository.snapshots.resolve(new.hex(), SnapshotFilter(hosts=("here",)))[0] == new
        with pytest.raises(NotFoundError, match="no snapshot matches"):
            repository.snapshots.resolve("latest", SnapshotFilter(hosts=("nowhere",)))
