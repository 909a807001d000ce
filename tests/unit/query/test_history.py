"""Versions differ by digest, and only trees on the way to the path are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from casfs.cli.app import casfs
from casfs.digest import Digest, SnapshotId
from casfs.errors import BlobError, IntegrityError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import NodeType, replace
from casfs.query.history import path_history
from casfs.trees.reader import TreeReader
from tests.support.builders import (
    Plan,
    RepositoryFixture,
    TreeFixture,
    entry,
    file,
    flagged,
    reference,
)


def snapshots(trees: TreeFixture, *plans: Plan) -> list[tuple[SnapshotId, Snapshot]]:
    return [
        (
            SnapshotId(bytes([n]) * 32),
            Snapshot(trees.build(plan), time_ns=n, host="here", user="me", paths=(b".",)),
        )
        for n, plan in enumerate(plans)
    ]


def versions(trees: TreeFixture, path: bytes, *plans: Plan) -> list[list[int]]:
    """Return the numbers of the plans that have each version of a path."""
    failures: list[IntegrityError] = []
    found = path_history(
        trees.reader, snapshots(trees, *plans), path, lambda _, error: failures.append(error)
    )
    assert failures == []
    return [[snapshot.time_ns for _, snapshot in version.snapshots] for version in found]


def test_each_content_of_a_file_is_a_version_with_the_snapshots_that_have_it() -> None:
    plans: list[Plan] = [{b"d": {b"f": content}} for content in (b"1", b"1", b"2", b"1", b"3")]
    assert versions(TreeFixture(), b"d/f", *plans) == [[0, 1, 3], [2], [4]]


def test_snapshots_without_the_path_have_no_part() -> None:
    plans: list[Plan] = [{}, {b"d": b"a file"}, {b"d": {b"f": b"1"}}, {b"d": {}}]
    assert versions(TreeFixture(), b"d/f", *plans) == [[2]]
    assert versions(TreeFixture(), b"nothing/at/all", *plans) == []


def test_times_and_owners_make_no_version_of_a_file_and_do_of_a_directory() -> None:
    one = file(b"f", b"same")
    other = replace(one, mtime_ns=5, uid=7, mode=0o600, inode=9)
    plans: list[Plan] = [{b"d": {b"f": one}}, {b"d": {b"f": other}}]
    assert versions(TreeFixture(), b"d/f", *plans) == [[0, 1]]
    assert versions(TreeFixture(), b"d", *plans) == [[0], [1]]


def test_the_state_of_a_capture_makes_a_version() -> None:
    one = file(b"f", b"same")
    assert versions(TreeFixture(), b"f", {b"f": one}, {b"f": flagged(one)}) == [[0], [1]]


def test_links_devices_and_kinds_are_different_versions() -> None:
    plans: list[Plan] = [
        {b"x": entry(b"", NodeType.SYMLINK, content=b"a")},
        {b"x": entry(b"", NodeType.SYMLINK, content=b"b")},
        {b"x": entry(b"", NodeType.FIFO)},
        {b"x": entry(b"", NodeType.SYMLINK, content=b"a")},
    ]
    assert versions(TreeFixture(), b"x", *plans) == [[0, 3], [1], [2]]


def test_a_directory_is_compared_and_not_read() -> None:
    trees = TreeFixture()
    plans: list[Plan] = [{b"above": {b"d": {b"f": b"%d" % n}}} for n in (1, 1, 2)]
    found = snapshots(trees, *plans)
    below = [trees.reader.resolve(snapshot.root, b"above/d") for _, snapshot in found]
    trees.reads.clear()
    assert len(path_history(trees.reader, found, b"above/d", lambda *_: None)) == 2
    assert not {reference(node) for node in below if node is not None} & set(trees.reads)


def test_equal_trees_on_the_way_are_read_once_for_all_snapshots() -> None:
    trees = TreeFixture()
    found = snapshots(trees, *[{b"a": {b"b": {b"f": b"1"}}, b"n": b"%d" % n} for n in range(50)])
    trees.reads.clear()
    assert len(path_history(trees.reader, found, b"a/b/f", lambda *_: None)) == 1
    assert len(trees.reads) == 50 + 2, "the roots differ, what is below them does not"


def test_a_damaged_path_is_reported_and_the_other_snapshots_are_given() -> None:
    trees = TreeFixture()
    found = snapshots(trees, {b"d": {b"f": b"1"}}, {b"d": {b"f": b"2"}})
    lost = trees.reader.resolve(found[0][1].root, b"d")
    assert lost is not None

    def damaged(digest: Digest) -> bytes:
        if digest == reference(lost):
            raise BlobError(digest, "it is damaged")
        return trees.read(digest)

    reader = TreeReader(damaged)
    failures: list[SnapshotId] = []
    versions = path_history(reader, found, b"d/f", lambda i, _: failures.append(i))
    assert failures == [found[0][0]]
    assert [version.snapshots[0][0] for version in versions] == [found[1][0]]


class TestLogCommand:
    @pytest.fixture
    def repo(self, tmp_path: Path) -> RepositoryFixture:
        repo = RepositoryFixture(tmp_path)
        for n, (content, host) in enumerate([(b"1", "a"), (b"1", "a"), (b"22", "a"), (b"3", "b")]):
            repo.publish({b"d": {b"f": content}}, host=host, time_ns=n * 10**9)
        return repo

    def run(self, repo: RepositoryFixture, *arguments: str, expect: int = 0) -> str:
        done = CliRunner().invoke(
            casfs, ["log", "--repo", str(repo.root), *arguments], standalone_mode=False
        )
        if done.exception is not None:
            raise done.exception
        assert done.return_value == expect
        return done.stdout

    def test_log_prints_a_table_for_people(self, repo: RepositoryFixture) -> None:
        head, *rows = self.run(repo, "latest:d/f", "--all-hosts").splitlines()
        assert head.split()[:4] == ["snapshot", "first", "last", "count"]
        assert [row.split()[5:8] for row in rows] == [
            ["2", "1", "B"],
            ["1", "2", "B"],
            ["1", "1", "B"],
        ]

    def test_log_prints_a_json_object_for_each_version(self, repo: RepositoryFixture) -> None:
        with repo.reading() as repository:
            ids = [snapshot_id.hex() for snapshot_id, _ in repository.snapshots.iterate()]
        lines = self.run(repo, "--json", f"{ids[0]}:/d/f").splitlines()
        first, second = (json.loads(line) for line in lines)
        assert first["type"] == second["type"] == "version"
        assert (first["first"], first["last"]) == (ids[0], ids[1])
        assert first["snapshot_ids"] == ids[:2]
        assert (second["snapshot_ids"], second["size"], second["path"]) == ([ids[2]], 2, "d/f")
        assert second["hosts"] == ["a"]

    def test_log_searches_only_snapshots_of_the_same_host(self, repo: RepositoryFixture) -> None:
        assert len(self.run(repo, "latest:d").splitlines()) == 1 + 1
        assert len(self.run(repo, "--all-hosts", "latest:d").splitlines()) == 1 + 3

    def test_log_of_a_path_in_no_snapshot_is_an_error(self, repo: RepositoryFixture) -> None:
        with pytest.raises(Exception, match="no snapshot has d/nothing; 1"):
            self.run(repo, "latest:d/nothing")

    def test_log_reports_a_damaged_snapshot(self, repo: RepositoryFixture) -> None:
        with repo.reading() as repository:
            found = list(repository.snapshots.iterate())
        repo.damage(reference(found[2][1].root))
        lines = self.run(repo, f"{found[0][0].hex()}:d/f", expect=5).splitlines()
        assert len(lines) == 1 + 1
