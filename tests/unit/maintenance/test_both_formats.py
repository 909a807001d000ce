"""The life of a repository in each format, and of one that was upgraded in the middle of it."""

from __future__ import annotations

import os
import shutil
from enum import Enum
from pathlib import Path

import pytest

from casfs.digest import Digest, SnapshotId
from casfs.format.codec import BlobKind
from casfs.format.tree import NodeType
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.maintenance import prune_plan
from casfs.maintenance.check import Checker
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import PruneResult
from casfs.maintenance.repair import SnapshotRepairer, repair_index
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance
from casfs.repository.upgrade import upgrade_repository
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.locks import LockMode
from tests.support.builders import RepositoryFixture
from tests.support.stores import noise, pack_paths, pack_ref

KIB = 1 << 10
OPTIONS = OpenOptions(sync=False)


class Life(Enum):
    """How a repository came to its format."""

    FORMAT_1 = "format 1"
    FORMAT_2 = "format 2"
    UPGRADED = "upgraded"


class Aging:
    """A repository with backups of a source; an upgrade comes after the first of them."""

    def __init__(self, folder: Path, life: Life) -> None:
        self.life = life
        self.source = folder / "source"
        for name in ("a", "b/c"):
            (self.source / name).mkdir(parents=True)
            for number in range(5):
                (self.source / name / str(number)).write_bytes(noise(f"{name} {number}", 30 * KIB))
        os.setxattr(self.source / "a" / "1", "user.note", b"kept")
        newest = life == Life.FORMAT_2
        self.repo = RepositoryFixture(folder, NEWEST_FORMAT if newest else OLDEST_FORMAT)
        self.first = self.back_up()
        if life == Life.UPGRADED:
            assert upgrade_repository(self.repo.root).is_changed
        shutil.rmtree(self.source / "b")
        (self.source / "a" / "1").write_bytes(noise("changed", 31 * KIB))
        self.second = self.back_up()

    @property
    def root(self) -> Path:
        return self.repo.root

    def back_up(self) -> SnapshotId:
        return self.repo.back_up(self.source)[0]

    def restored(self, folder: Path, snapshot_id: SnapshotId) -> dict[str, bytes]:
        with self.repo.reading() as repository:
            root = repository.snapshots.load(snapshot_id).root
            result = Restorer(repository, RestoreOptions(), RecordingMonitor()).restore(
                b"", root, bytes(folder), with_root=True
            )
        assert (result.damaged, result.failed) == (0, 0)
        base = folder / self.source.relative_to("/")
        return {
            str(path.relative_to(base)): path.read_bytes()
            for path in base.rglob("*")
            if path.is_file()
        }

    def prune(self, **options: object) -> PruneResult:
        with open_for_maintenance(self.root, "prune", OPTIONS) as repository:
            chosen = PruneOptions(**options)  # type: ignore[arg-type]
            return Pruner(repository, chosen, RecordingMonitor()).prune()

    def must_be_intact(self) -> None:
        with self.repo.reading() as repository:
            assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []

    def kinds(self) -> set[tuple[bool, BlobKind]]:
        """Return which kinds of blobs lie in data packs (False) and in metadata packs (True)."""
        with self.repo.reading() as repository:
            return {
                (pack.is_meta, BlobKind(entry.kind))
                for pack, size in repository.store.stored_packs()
                for entry in repository.store.read_directory(pack, size)
            }


@pytest.fixture(params=list(Life), ids=lambda life: life.value)
def aging(request: pytest.FixtureRequest, tmp_path: Path) -> Aging:
    return Aging(tmp_path, request.param)


MIXED = {(False, BlobKind.DATA), (False, BlobKind.TREE)}
APART = {(False, BlobKind.DATA), (True, BlobKind.TREE)}
KINDS = {Life.FORMAT_1: MIXED, Life.FORMAT_2: APART, Life.UPGRADED: MIXED | APART}


def test_every_backup_restores_and_lies_in_the_packs_of_its_format(
    aging: Aging, tmp_path: Path
) -> None:
    assert aging.kinds() == KINDS[aging.life]
    aging.must_be_intact()
    expected = {
        f"{name}/{number}": noise(f"{name} {number}", 30 * KIB)
        for name in ("a", "b/c")
        for number in range(5)
    }
    assert aging.restored(tmp_path / "1", aging.first) == expected
    shown = {path: data for path, data in expected.items() if path.startswith("a/")}
    assert aging.restored(tmp_path / "2", aging.second) == shown | {
        "a/1": noise("changed", 31 * KIB)
    }


def test_a_prune_frees_and_repacks(aging: Aging, tmp_path: Path) -> None:
    before = aging.restored(tmp_path / "1", aging.second)
    with aging.repo.writing() as repository:
        repository.snapshots.delete(aging.first)
    result = aging.prune(unused_share=0.0)
    assert result.freed_bytes > 150 * KIB
    aging.must_be_intact()
    assert aging.restored(tmp_path / "2", aging.second) == before
    again = aging.prune(unused_share=0.0)
    assert (again.removed_packs, again.repacked_packs) == (0, 0)


def test_a_prune_that_repacks_everything_sorts_the_blobs_of_an_upgraded_repository(
    aging: Aging,
) -> None:
    aging.prune(repack_all=True)
    assert aging.kinds() == (MIXED if aging.life == Life.FORMAT_1 else APART)
    aging.must_be_intact()


def test_the_index_is_rebuilt_from_packs_of_both_kinds(aging: Aging) -> None:
    with aging.repo.reading() as repository:
        before = {record.pack: record.blobs for record in repository.store.index.packs()}
    shutil.rmtree(aging.root / "index")
    aging.must_be_intact()
    with open_for_maintenance(aging.root, "repair", OPTIONS, LockMode.EXCLUSIVE) as repository:
        repair_index(repository, RecordingMonitor())
        after = {record.pack: record.blobs for record in repository.store.index.packs()}
    assert (
        after
        == before
        == {pack_ref(path): before[pack_ref(path)] for path in pack_paths(aging.root)}
    )


@pytest.mark.parametrize("what", ["file", "directory"])
def test_damage_is_found_repaired_and_healed_by_the_next_backup(aging: Aging, what: str) -> None:
    with aging.repo.reading() as repository:
        root = repository.snapshots.load(aging.second).root
        found = dict(repository.trees.walk(root))
        path = next(path for path in found if path.endswith(b"a/2" if what == "file" else b"/a"))
        node = found[path]
        digest = node.content[8:] if node.kind == NodeType.FILE else node.tree.digest  # type: ignore[union-attr]
    aging.repo.damage(Digest(digest))
    with aging.repo.writing() as repository:
        damage = Checker(repository, RecordingMonitor()).check(PackSelection()).damage
    damaged = {finding.snapshot for finding in damage if finding.snapshot is not None}
    assert aging.second in damaged
    with open_for_maintenance(aging.root, "repair snapshots", OPTIONS) as repository:
        result = SnapshotRepairer(repository, RecordingMonitor()).repair(PackSelection())
        assert {one.snapshot_id for one in result.repaired} == damaged
    aging.back_up()
    aging.prune()
    aging.must_be_intact()


def test_the_next_backup_after_an_upgrade_counts_the_attributes_below_every_directory(
    aging: Aging,
) -> None:
    aging.back_up()
    known = aging.life != Life.FORMAT_1
    with aging.repo.reading() as repository:
        *_, (_, snapshot) = repository.snapshots.iterate()
        nodes = dict(repository.trees.walk(snapshot.root))
        counts = {path: node.tree.xattrs for path, node in nodes.items() if node.tree is not None}
    # The file was written again, and its attribute stayed.
    assert set(counts.values()) == ({1} if known else {None})
    aging.must_be_intact()


def test_small_packs_are_merged_where_there_are_many_of_a_kind(
    aging: Aging, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        (aging.source / "new").write_bytes(noise(f"new {number}", KIB))
        aging.back_up()
    kinds = [pack_ref(path).is_meta for path in pack_paths(aging.root)]
    meta, data = kinds.count(True), kinds.count(False)
    assert data >= 4
    monkeypatch.setattr(prune_plan, "_MANY_SMALL_PACKS", 6)
    # No kind has so many, even where both together have.
    assert aging.prune(unused_share=1.0).repacked_packs == 0
    monkeypatch.setattr(prune_plan, "_MANY_SMALL_PACKS", 4)
    merged = sum(count for count in (meta, data) if count >= 4)
    assert aging.prune(unused_share=1.0).repacked_packs == merged
    aging.must_be_intact()
