"""The packs that a snapshot relies on: all of them, and without reading what another one covers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from casfs.backup.relied_packs import ReliedPacks
from casfs.format.tree import TreeRef
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.repository import Repository
from tests.support.builders import RepositoryFixture


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for folder in ("a", "b/c", "b/d"):
        (source / folder).mkdir(parents=True)
        for number in range(3):
            seed = f"{folder}{number}"
            (source / folder / str(number)).write_bytes(random.Random(seed).randbytes(500))
    (source / "large").write_bytes(random.Random("large").randbytes(9_000_000))
    return source


def ref_of(repo: RepositoryFixture, source: Path) -> TreeRef:
    _, snapshot = repo.back_up(source)
    assert snapshot.root.tree is not None
    return snapshot.root.tree


def all_packs(repository: Repository) -> set[int]:
    return {record.ordinal for record in repository.store.index.packs()}


def needed_by_walking(repository: Repository, ref: TreeRef) -> set[int]:
    """Return the packs by another way: every blob of the index that the tree needs."""
    needed = NeededBlobs(repository)
    for _, snapshot in repository.snapshots.iterate():
        if snapshot.root.tree == ref:
            needed.add(snapshot.root)
    return {
        location.pack
        for _, location in repository.store.index.blobs()
        if location.ordinal in needed.blobs
    }


def test_all_packs_of_a_tree_are_found_and_no_others(repo: RepositoryFixture, source: Path) -> None:
    first = ref_of(repo, source)
    (source / "b/c/1").write_bytes(b"changed")
    (source / "large").unlink()
    second = ref_of(repo, source)
    with repo.reading() as repository:
        for ref in (first, second):
            relied = ReliedPacks(repository, all_packs(repository))
            relied.add(ref)
            assert relied.found == needed_by_walking(repository, ref)


def test_only_packs_in_doubt_are_found(repo: RepositoryFixture, source: Path) -> None:
    ref = ref_of(repo, source)
    with repo.reading() as repository:
        doubtful = set(sorted(all_packs(repository))[:1])
        relied = ReliedPacks(repository, doubtful)
        relied.add(ref)
        assert relied.found == doubtful
        assert relied.is_complete
        none = ReliedPacks(repository, set())
        none.add(ref)
        assert none.found == set()


def test_what_another_snapshot_covers_is_neither_found_nor_read(
    repo: RepositoryFixture, source: Path
) -> None:
    first = ref_of(repo, source)
    (source / "b/c/1").write_bytes(b"changed")
    second = ref_of(repo, source)
    with repo.reading() as repository:
        before = needed_by_walking(repository, first)
        relied = ReliedPacks(repository, all_packs(repository))
        relied.add(second, first)
        new = needed_by_walking(repository, second) - before
        assert new <= relied.found
        assert relied.found | before >= needed_by_walking(repository, second)
        same = ReliedPacks(repository, all_packs(repository))
        reads: list[object] = []
        same._trees._read = reads.append  # type: ignore[assignment]
        same.add(second, second)
        assert same.found == set()
        assert reads == []


def test_a_moved_directory_is_found_although_the_other_snapshot_has_it_elsewhere(
    repo: RepositoryFixture, source: Path
) -> None:
    first = ref_of(repo, source)
    (source / "a").rename(source / "z")
    (source / "b/c/0").rename(source / "b/c/9")
    second = ref_of(repo, source)
    with repo.reading() as repository:
        relied = ReliedPacks(repository, all_packs(repository))
        relied.add(second, first)
        assert relied.found == needed_by_walking(repository, second)
