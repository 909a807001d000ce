"""`versions/` in the whole-repository view: links by path, which follow the list of snapshots."""

from __future__ import annotations

import os
import time
from pathlib import Path

import casfs_mount.versions_view
import pytest
from casfs_mount.event_loop_guard import WouldBlock
from casfs_mount.inodes import LISTINGS_END, VERSIONS, StaleError

from casfs.format.tree import NodeType
from tests.support.builders import RepositoryFixture, reference
from tests.unit.mount.test_repository_view import NOON_NS, SECOND_NS, RepositoryViewFixture


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RepositoryFixture:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    repo = RepositoryFixture(tmp_path)
    for n, content in enumerate((b"1", b"1", b"2", b"1")):
        repo.publish({b"d": {b"f": content}, b"other": b"x"}, time_ns=NOON_NS + n * SECOND_NS)
    return repo


FIRST, THIRD = b"2023-11-14T22-13-20", b"2023-11-14T22-13-22"
NINTH = b"2023-11-14T22-13-29"


def test_a_path_lists_a_link_for_each_version(repo: RepositoryFixture) -> None:
    catalogue = RepositoryViewFixture(repo)
    found = catalogue.listed(b"versions", b"d", b"f")
    assert {name: node.content for name, (_, node) in found.items()} == {
        FIRST: b"../../../snapshots/" + FIRST + b"/d/f",
        THIRD: b"../../../snapshots/" + THIRD + b"/d/f",
        b"latest": FIRST,
    }
    assert all(node.kind == NodeType.SYMLINK for _, node in found.values())
    assert list(catalogue.listed(b"versions", b"other")) == [FIRST, b"latest"]
    whole = list(catalogue.listed(b"versions"))
    assert whole == [FIRST, THIRD, b"latest"], "of the whole snapshot"


def test_paths_below_versions_are_reachable_but_not_listed(repo: RepositoryFixture) -> None:
    catalogue = RepositoryViewFixture(repo)
    assert b"d" not in catalogue.listed(b"versions")
    number = catalogue.find(b"versions")
    assert catalogue.view.lookup(number, b"d") is not None
    assert catalogue.view.lookup(number, b"nothing") is None
    link = catalogue.find(b"versions", FIRST)
    assert catalogue.view.lookup(link, b"d") is None
    assert list(catalogue.view.entries(link, 0)) == []


def test_inode_numbers_of_versions_are_stable_and_lead_back(repo: RepositoryFixture) -> None:
    catalogue = RepositoryViewFixture(repo)
    folder = catalogue.find(b"versions", b"d", b"f")
    link = catalogue.find(b"versions", b"d", b"f", FIRST)
    assert VERSIONS <= folder < LISTINGS_END
    assert catalogue.find(b"versions", b"d", b"f") == folder
    view = catalogue.view
    assert view.node(folder).name == b"f"
    assert view.node(link).name == FIRST
    assert view.parent(link) == folder
    assert view.parent(folder) == catalogue.find(b"versions", b"d")
    assert view.parent(catalogue.find(b"versions")) == 1
    assert view.node(catalogue.find(b"versions")).name == b"versions"
    assert not view.is_immutable(folder)


def test_a_listing_of_versions_continues_from_any_position(repo: RepositoryFixture) -> None:
    catalogue = RepositoryViewFixture(repo)
    folder = catalogue.find(b"versions", b"d")
    (_, _, after), (_, _, second), last = catalogue.view.entries(folder, 0)
    assert [entry[1].name for entry in catalogue.view.entries(folder, after)] == [THIRD, b"latest"]
    assert [entry[1].name for entry in catalogue.view.entries(folder, second)] == [b"latest"]
    assert list(catalogue.view.entries(folder, last[2])) == []


def test_new_snapshots_add_versions_and_forgotten_ones_remove_them(repo: RepositoryFixture) -> None:
    catalogue = RepositoryViewFixture(repo)
    link = catalogue.find(b"versions", b"d", b"f", THIRD)
    with repo.reading() as repository:
        third = list(repository.snapshots.iterate())[2][0]

    def change() -> None:
        with repo.writing() as repository:
            repository.snapshots.delete(third)
        repo.publish({b"new": b"n", b"d": {b"f": b"3"}}, time_ns=NOON_NS + 9 * SECOND_NS)

    catalogue.change(change)
    found = catalogue.listed(b"versions", b"d", b"f")
    assert set(found) == {FIRST, NINTH, b"latest"}
    assert found[b"latest"][1].content == NINTH
    assert set(catalogue.listed(b"versions", b"new")) == {NINTH, b"latest"}
    with pytest.raises(StaleError):
        catalogue.view.node(link)


def test_the_latest_version_of_a_path_is_never_one_from_the_future(repo: RepositoryFixture) -> None:
    repo.publish({b"d": {b"f": b"future"}}, time_ns=time.time_ns() + 3600 * SECOND_NS)
    repo.publish({b"only": b"future"}, time_ns=time.time_ns() + 7200 * SECOND_NS)
    catalogue = RepositoryViewFixture(repo)
    assert catalogue.listed(b"versions", b"d", b"f")[b"latest"][1].content == FIRST
    only = catalogue.listed(b"versions", b"only")
    assert only.keys() - {b"latest"} == {only[b"latest"][1].content}


def test_an_entry_of_the_name_latest_is_reachable_below_versions(repo: RepositoryFixture) -> None:
    repo.publish({b"d": {b"latest": b"a file"}}, time_ns=NOON_NS + 9 * SECOND_NS)
    catalogue = RepositoryViewFixture(repo)
    assert b"latest" not in catalogue.listed(b"versions", b"d")
    assert set(catalogue.listed(b"versions", b"d", b"latest")) == {NINTH, b"latest"}


def test_a_path_of_a_forgotten_snapshot_is_no_longer_found(repo: RepositoryFixture) -> None:
    repo.publish({b"passing": b"p"}, time_ns=NOON_NS + 9 * SECOND_NS)
    catalogue = RepositoryViewFixture(repo)
    number = catalogue.find(b"versions")
    assert catalogue.view.lookup(number, b"passing") is not None
    with repo.reading() as repository:
        last = list(repository.snapshots.iterate())[-1][0]

    def change() -> None:
        with repo.writing() as repository:
            repository.snapshots.delete(last)

    catalogue.change(change)
    assert catalogue.view.lookup(number, b"passing") is None


def test_the_event_loop_thread_does_not_search_for_versions(repo: RepositoryFixture) -> None:
    catalogue = RepositoryViewFixture(repo)
    number = catalogue.find(b"versions")
    found = catalogue.find(b"versions", b"d")
    assert len(list(catalogue.view.entries(found, 0))) == 3
    catalogue.context.guard.bind()
    assert len(list(catalogue.view.entries(found, 0))) == 3
    assert catalogue.view.lookup(number, b"d") is not None
    with pytest.raises(WouldBlock):
        catalogue.view.lookup(number, b"other")


def test_the_versions_view_remembers_a_bounded_number_of_paths(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(casfs_mount.versions_view, "_MAX_NUMBERS", 4)
    catalogue = RepositoryViewFixture(repo)
    old = catalogue.find(b"versions", b"other")
    catalogue.find(b"versions", b"d", b"f", FIRST)
    catalogue.find(b"versions", b"d", b"f", THIRD)
    with pytest.raises(StaleError):
        catalogue.view.node(old)
    again = catalogue.find(b"versions", b"other")
    assert catalogue.view.node(again).name == b"other"


@pytest.mark.expect_errors("casfs_mount.versions_view")
def test_a_damaged_snapshot_is_logged_and_versions_of_the_others_are_shown(
    repo: RepositoryFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with repo.reading() as repository:
        roots = [snapshot.root for _, snapshot in repository.snapshots.iterate()]
    repo.damage(reference(roots[2]))
    catalogue = RepositoryViewFixture(repo)
    assert list(catalogue.listed(b"versions", b"d", b"f")) == [FIRST, b"latest"]
    assert list(catalogue.listed(b"versions", b"d")) == [FIRST, b"latest"]
    assert caplog.text.count("digest mismatch") == 1


def test_only_the_owner_of_the_mount_can_enter_versions(repo: RepositoryFixture) -> None:
    """Below it are names of directories that another user of the mount may not enter."""
    catalogue = RepositoryViewFixture(repo)
    node = catalogue.view.node(catalogue.find(b"versions"))
    assert (node.mode, node.uid) == (0o500, os.getuid())
