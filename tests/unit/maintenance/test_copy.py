"""Copying snapshots into another repository, rewriting them without a path, and storing packs again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.errors import IntegrityError
from casfs.format.tree import Node
from casfs.maintenance.check import Checker
from casfs.maintenance.copy import CopiedSnapshot, SnapshotCopier
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.rewrite import RewrittenSnapshot, rewrite_snapshot
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.repository import Repository
from tests.support.builders import RepositoryFixture
from tests.support.far import FarRepository
from tests.support.stores import flip, noise, pack_paths

UNSYNCED = OpenOptions(sync=False)


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    (tmp_path / "one").mkdir()
    return RepositoryFixture(tmp_path / "one")


@pytest.fixture
def other(tmp_path: Path) -> RepositoryFixture:
    (tmp_path / "two").mkdir()
    return RepositoryFixture(tmp_path / "two")


def copy_all(repo: RepositoryFixture, other: RepositoryFixture) -> list[CopiedSnapshot]:
    with (
        open_for_reading(repo.root) as source,
        open_for_writing(other.root, "copy", UNSYNCED) as destination,
    ):
        copier = SnapshotCopier(source, destination, RecordingMonitor())
        return [copier.copy(*found) for found in source.snapshots.iterate()]


def contents(repository: Repository) -> list[list[tuple[bytes, int, bytes | None]]]:
    """Return paths, sizes and bytes of all entries of all snapshots."""
    found = []
    for _, snapshot in repository.snapshots.iterate():
        entries = []
        for path, node in repository.trees.walk(snapshot.root):
            data = None
            if node.tree is None:
                data = b"".join(
                    repository.store.read(extent.digest) if extent.digest else bytes(extent.length)
                    for extent in repository.content(node).extents()
                )
            entries.append((path, node.size, data))
        found.append(entries)
    return found


def assert_intact(repo: RepositoryFixture) -> None:
    with open_for_reading(repo.root) as repository:
        assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []


class TestCopy:
    def test_copies_hold_the_same_entries_and_bytes(
        self, repo: RepositoryFixture, other: RepositoryFixture
    ) -> None:
        repo.publish({b"a": noise("a", 3_000_000), b"d": {b"b": b"small", b"empty": b""}})
        repo.publish({b"a": noise("a", 3_000_000), b"d": {b"b": b"small"}, b"new": b"1"})
        copied = copy_all(repo, other)
        assert [found.was_there for found in copied] == [False, False]
        with open_for_reading(repo.root) as source, open_for_reading(other.root) as destination:
            assert contents(source) == contents(destination)
            times = [[s.time_ns for _, s in r.snapshots.iterate()] for r in (source, destination)]
            assert times[0] == times[1]
        assert_intact(other)

    def test_a_second_copy_finds_the_first(
        self, repo: RepositoryFixture, other: RepositoryFixture
    ) -> None:
        repo.publish({b"a": b"1"})
        (first,) = copy_all(repo, other)
        (second,) = copy_all(repo, other)
        assert second.was_there and second.new_id == first.new_id

    def test_a_copy_deduplicates_with_what_the_other_repository_has(
        self, repo: RepositoryFixture, other: RepositoryFixture
    ) -> None:
        repo.publish({b"a": noise("a", 3_000_000)})
        copy_all(repo, other)
        repo.publish({b"moved": {b"a": noise("a", 3_000_000)}})
        assert copy_all(repo, other)[1].stored_bytes < 10_000

    def test_holes_stay_holes(
        self, repo: RepositoryFixture, other: RepositoryFixture, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        with open(source / "sparse", "wb") as file:
            file.write(noise("begin", 200_000))
            file.truncate(50 << 20)
            file.seek(40 << 20)
            file.write(b"end")
        repo.back_up(source)
        copy_all(repo, other)

        def node(repository: Repository) -> Node:
            ((_, snapshot),) = repository.snapshots.iterate()
            (found,) = [n for _, n in repository.trees.walk(snapshot.root) if n.name == b"sparse"]
            return found

        with open_for_reading(repo.root) as first, open_for_reading(other.root) as second:
            assert node(first).content == node(second).content
            assert node(second).size == 50 << 20

    def test_a_damaged_file_ends_the_copy_and_publishes_nothing(
        self, repo: RepositoryFixture, other: RepositoryFixture
    ) -> None:
        repo.publish({b"a": noise("a", 100_000), b"b": noise("b", 100_000)})
        for path in pack_paths(repo.root):
            flip(path, 2000)
        with pytest.raises(IntegrityError):
            copy_all(repo, other)
        with open_for_reading(other.root) as destination:
            assert destination.snapshots.ids() == []


def rewrite(
    repo: RepositoryFixture, *patterns: bytes, dry_run: bool = False
) -> list[RewrittenSnapshot]:
    with open_for_maintenance(repo.root, "rewrite", UNSYNCED) as repository:
        exclude = [parse_pattern(text) for text in patterns]
        return [
            rewrite_snapshot(repository, *found, exclude, RecordingMonitor(), dry_run)
            for found in list(repository.snapshots.iterate())
        ]


class TestRewrite:
    def test_matching_entries_are_gone_and_everything_else_stays(
        self, repo: RepositoryFixture
    ) -> None:
        repo.publish({b"keep": b"1", b"secret": b"2", b"d": {b"secret": b"3", b"other": b"4"}})
        (found,) = rewrite(repo, b"secret")
        assert found.new_id is not None
        assert found.removed == [b"d/secret", b"secret"]
        with open_for_reading(repo.root) as repository:
            assert repository.snapshots.ids() == [found.new_id]
            (entries,) = contents(repository)
            assert [path for path, _, _ in entries] == [b"d", b"d/other", b"keep"]
        assert_intact(repo)

    def test_a_directory_goes_with_all_that_is_in_it(self, repo: RepositoryFixture) -> None:
        repo.publish({b"d": {b"a": b"1", b"e": {b"b": b"2"}}, b"x": b"3"})
        (found,) = rewrite(repo, b"/d/")
        assert found.removed == [b"d"]
        with open_for_reading(repo.root) as repository:
            assert [path for path, _, _ in contents(repository)[0]] == [b"x"]

    def test_a_snapshot_without_a_match_is_not_touched(self, repo: RepositoryFixture) -> None:
        repo.publish({b"a": b"1"})
        before = sorted(os.listdir(repo.root / "snapshots"))
        (found,) = rewrite(repo, b"nothing")
        assert (found.new_id, found.removed) == (None, [])
        assert sorted(os.listdir(repo.root / "snapshots")) == before

    def test_a_dry_run_lists_and_changes_nothing(self, repo: RepositoryFixture) -> None:
        repo.publish({b"a": b"1", b"b": b"2"})
        before = {path: path.read_bytes() for path in (repo.root / "snapshots").iterdir()}
        (found,) = rewrite(repo, b"b", dry_run=True)
        assert (found.new_id, found.removed) == (None, [b"b"])
        assert {path: path.read_bytes() for path in (repo.root / "snapshots").iterdir()} == before

    def test_a_prune_then_frees_what_was_left_out(self, repo: RepositoryFixture) -> None:
        repo.publish({b"keep": noise("keep", 50_000), b"big": noise("big", 2_000_000)})
        rewrite(repo, b"big")
        with open_for_maintenance(repo.root, "prune", UNSYNCED) as repository:
            Pruner(repository, PruneOptions(unused_share=0.0), RecordingMonitor()).prune()
        assert sum(path.stat().st_size for path in pack_paths(repo.root)) < 100_000
        assert_intact(repo)


def test_packs_are_stored_again_at_another_level_and_hold_the_same(repo: RepositoryFixture) -> None:
    text = b"".join(b"line %d of a text that compresses\n" % n for n in range(60_000))
    repo.publish({b"text": text})
    with open_for_reading(repo.root) as repository:
        before = contents(repository)
    size = sum(path.stat().st_size for path in pack_paths(repo.root))
    options = OpenOptions(sync=False, level=19)
    with open_for_maintenance(repo.root, "recompress", options) as repository:
        result = Pruner(repository, PruneOptions(repack_all=True), RecordingMonitor()).prune()
    assert result.repacked_packs > 0
    assert sum(path.stat().st_size for path in pack_paths(repo.root)) < size
    with open_for_reading(repo.root) as repository:
        assert contents(repository) == before
    assert_intact(repo)


def test_a_copy_from_a_remote_place_gathers_its_reads_and_reads_nothing_twice(
    other: RepositoryFixture, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    (source / "old").mkdir(parents=True)
    for number in range(200):
        (source / "old" / f"{number:03}").write_bytes(noise(f"{number}", 5000))
    far = FarRepository.create(monkeypatch)
    far.back_up(source)
    (source / "new").write_bytes(noise("new", 5000))
    far.back_up(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another cache"))
    with far.reading() as reading, open_for_writing(other.root, "copy", UNSYNCED) as writing:
        copier = SnapshotCopier(reading, writing, RecordingMonitor())
        asked = []
        for found in reading.snapshots.iterate():
            far.requests()
            copier.copy(*found)
            asked.append(far.requests().count("read packs"))
        # One range for all files of the first snapshot, one for the new file of the second.
        assert asked == [1, 1]
        assert contents(writing) == contents(reading)
