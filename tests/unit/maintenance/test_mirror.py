"""The mirror: every object is copied and verified, in an order that leaves a repository at every moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.errors import IntegrityError, NotFoundError, RefusedError, StorageError
from casfs.format.config import with_format
from casfs.format.pack import PACK_PREFIXES
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.maintenance.check import Checker
from casfs.maintenance.mirror import MISSING_NAME, Mirror, MirrorResult
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
from casfs.repository.remote_writers import MARK
from casfs.storage.base import Data, ListedObject
from casfs.storage.local import LocalStorage
from casfs.storage.memory import MemoryStorage
from tests.support.builders import RepositoryFixture
from tests.support.storage_double import RecordingStorage
from tests.support.stores import flip, noise, pack_paths

DAY_S = 86_400


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    found = RepositoryFixture(tmp_path)
    found.publish({b"a": noise("a", 50_000), b"d": {b"b": noise("b", 70_000)}})
    found.publish({b"a": noise("a", 50_000), b"c": noise("c", 60_000)})
    return found


def mirror(
    source: Path | MemoryStorage,
    destination: Path | MemoryStorage | RecordingStorage,
    delete: bool = False,
    margin_s: float = 0,
    now_s: float = 1e9,
) -> MirrorResult:
    reading, writing = (
        LocalStorage(place, sync=False) if isinstance(place, Path) else place
        for place in (source, destination)
    )
    return Mirror(reading, writing, RecordingMonitor(), now_s=lambda: now_s).run(delete, margin_s)


def names(storage: MemoryStorage) -> list[str]:
    return [name for folder in (*PACK_PREFIXES, "snapshots") for name, _, _ in storage.list(folder)]


def forget_first(repo: RepositoryFixture) -> None:
    """Forget the first snapshot and free what only it needs."""
    options = OpenOptions(sync=False)
    with open_for_maintenance(repo.root, "forget", options) as repository:
        first, _ = next(iter(repository.snapshots.iterate()))
        repository.snapshots.delete(first)
        Pruner(repository, PruneOptions(unused_share=0.0), RecordingMonitor()).prune()


def test_mirror_makes_a_repository_with_everything(repo: RepositoryFixture, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    result = mirror(repo.root, copy)
    assert result.damage == []
    deltas = os.listdir(repo.root / "deltas")
    assert result.copied == len(pack_paths(repo.root)) + len(deltas) + 2
    with open_for_reading(copy) as repository:
        assert len(repository.snapshots.ids()) == 2
        monitor = RecordingMonitor()
        from casfs.maintenance.scrub import PackSelection

        checked = Checker(repository, monitor).check(PackSelection())
        assert checked.damage == []


def test_a_second_mirror_copies_only_what_is_new(repo: RepositoryFixture) -> None:
    copy = MemoryStorage()
    first = mirror(repo.root, copy)
    repo.publish({b"new": noise("new", 40_000)})
    second = mirror(repo.root, copy)
    assert second.present == first.copied
    assert 0 < second.copied <= 3
    assert mirror(repo.root, copy).copied == 0


def test_mirror_does_not_copy_a_damaged_pack_and_reports_it(repo: RepositoryFixture) -> None:
    flip(pack_paths(repo.root)[0], 100)
    copy = MemoryStorage()
    result = mirror(repo.root, copy)
    assert [finding.what for finding in result.damage] == ["pack"]
    assert "digest mismatch" in result.damage[0].message
    assert pack_paths(repo.root)[0].name not in "".join(names(copy))
    assert len([name for name in names(copy) if name.startswith("snapshots/")]) == 2


def test_an_intact_copy_stays_when_the_source_is_damaged_later(repo: RepositoryFixture) -> None:
    copy = MemoryStorage()
    mirror(repo.root, copy)
    before = {name: copy.read(name) for name in names(copy)}
    for path in pack_paths(repo.root):
        flip(path, 100)
    mirror(repo.root, copy, delete=True)
    assert {name: copy.read(name) for name in names(copy)} == before


def test_mirror_refuses_a_destination_with_another_repository(
    repo: RepositoryFixture, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    another = RepositoryFixture(other)
    before = sorted(path for path in another.root.rglob("*") if path.is_file())
    with pytest.raises(RefusedError, match="name another destination"):
        mirror(repo.root, another.root)
    assert sorted(path for path in another.root.rglob("*") if path.is_file()) == before


def test_mirror_refuses_a_destination_with_packs_and_no_configuration(
    repo: RepositoryFixture,
) -> None:
    copy = MemoryStorage()
    copy.create("packs/ab/abcd", b"something")
    with pytest.raises(RefusedError, match="no configuration"):
        mirror(repo.root, copy)


def test_mirror_refuses_a_source_without_a_repository() -> None:
    with pytest.raises(NotFoundError):
        mirror(MemoryStorage(), MemoryStorage())


class TestDelete:
    def test_without_delete_the_destination_keeps_everything(self, repo: RepositoryFixture) -> None:
        copy = MemoryStorage()
        mirror(repo.root, copy)
        before = set(names(copy))
        forget_first(repo)
        mirror(repo.root, copy)
        assert before <= set(names(copy))

    def test_delete_waits_for_the_margin_and_then_removes(self, repo: RepositoryFixture) -> None:
        copy = MemoryStorage()
        mirror(repo.root, copy)
        forget_first(repo)
        first = mirror(repo.root, copy, delete=True, margin_s=7 * DAY_S, now_s=1e9)
        assert (first.deleted, first.pending > 0) == (0, True)
        early = mirror(repo.root, copy, delete=True, margin_s=7 * DAY_S, now_s=1e9 + 6 * DAY_S)
        assert (early.deleted, early.pending) == (0, first.pending)
        late = mirror(repo.root, copy, delete=True, margin_s=7 * DAY_S, now_s=1e9 + 7 * DAY_S)
        assert (late.deleted, late.pending) == (first.pending, 0)
        source = LocalStorage(repo.root)
        there = [
            name for folder in (*PACK_PREFIXES, "snapshots") for name, _, _ in source.list(folder)
        ]
        assert sorted(names(copy)) == sorted(there)

    def test_what_comes_back_at_the_source_is_kept(self, repo: RepositoryFixture) -> None:
        copy = MemoryStorage()
        mirror(repo.root, copy)
        pack = pack_paths(repo.root)[0]
        data = pack.read_bytes()
        pack.unlink()
        assert mirror(repo.root, copy, delete=True, margin_s=DAY_S).pending == 1
        pack.write_bytes(data)
        assert mirror(repo.root, copy, delete=True, margin_s=DAY_S).pending == 0
        pack.unlink()
        late = mirror(repo.root, copy, delete=True, margin_s=DAY_S, now_s=1e9 + 2 * DAY_S)
        assert (late.deleted, late.pending) == (0, 1)

    def test_nothing_is_deleted_where_an_object_could_not_be_copied(
        self, repo: RepositoryFixture
    ) -> None:
        copy = MemoryStorage()
        mirror(repo.root, copy)
        forget_first(repo)
        repo.publish({b"new": noise("new", 40_000)})
        flip(sorted(pack_paths(repo.root), key=lambda path: path.stat().st_mtime_ns)[-1], 100)
        before = set(names(copy))
        result = mirror(repo.root, copy, delete=True)
        assert result.damage != []
        assert result.deleted == 0
        assert before <= set(names(copy))

    def test_a_damaged_record_of_missing_objects_ends_the_mirror(
        self, repo: RepositoryFixture
    ) -> None:
        copy = MemoryStorage()
        mirror(repo.root, copy)
        copy.write(MISSING_NAME, b"{")
        before = names(copy)
        with pytest.raises(IntegrityError, match="delete it"):
            mirror(repo.root, copy, delete=True)
        assert names(copy) == before


class _Failing(MemoryStorage):
    """A storage that fails at its n-th change."""

    def __init__(self, changes: int) -> None:
        super().__init__()
        self._left = changes

    def create(self, name: str, data: Data) -> None:
        self._left -= 1
        if self._left < 0:
            raise StorageError("write", name, OSError("the disk is full"))
        super().create(name, data)


def test_a_mirror_that_ends_anywhere_leaves_only_snapshots_with_their_packs(
    repo: RepositoryFixture,
) -> None:
    source = LocalStorage(repo.root)
    packs = {name for prefix in PACK_PREFIXES for name, _, _ in source.list(prefix)}
    failed = 0
    for changes in range(len(packs) + 4):
        copy = _Failing(changes)
        try:
            mirror(repo.root, copy)
        except StorageError:
            failed += 1
        found = names(copy)
        if any(name.startswith("snapshots/") for name in found):
            assert packs <= set(found)
    assert failed > len(packs)


class _Pruned(MemoryStorage):
    """A source from which a pack vanishes after it was listed, as a prune removes it."""

    def __init__(self, other: MemoryStorage, replacement: tuple[str, bytes]) -> None:
        super().__init__()
        self._objects = dict(other._objects)
        self._replacement: tuple[str, bytes] | None = replacement

    def list(self, prefix: str) -> Iterator[ListedObject]:
        found = list(super().list(prefix))
        if found and prefix in PACK_PREFIXES and self._replacement is not None:
            name, data = self._replacement
            self._replacement = None
            self.create(name, data)
            self.delete(found[0].name)
        yield from found


def test_packs_that_a_prune_stored_meanwhile_are_copied(repo: RepositoryFixture) -> None:
    from casfs.digest import digest_of

    whole = MemoryStorage()
    mirror(repo.root, whole)
    data = b"a pack that a prune stored"
    name = digest_of(data).hex()
    source = _Pruned(whole, (f"packs/{name[:2]}/{name}", data))
    copy = MemoryStorage()
    assert mirror(source, copy).damage == []
    assert f"packs/{name[:2]}/{name}" in names(copy)


def test_mirror_follows_an_upgrade_of_the_source(repo: RepositoryFixture) -> None:
    copy = MemoryStorage()
    config = repo.root / "config"
    config.write_bytes(with_format(config.read_bytes(), OLDEST_FORMAT))
    mirror(repo.root, copy)
    assert copy.read("config") == config.read_bytes()
    config.write_bytes(with_format(config.read_bytes(), NEWEST_FORMAT))
    mirror(repo.root, copy)
    assert copy.read("config") == config.read_bytes()


def test_mirror_keeps_the_newer_format_of_a_destination(repo: RepositoryFixture) -> None:
    copy = MemoryStorage()
    config = repo.root / "config"
    newer = with_format(config.read_bytes(), NEWEST_FORMAT)
    copy.write("config", newer)
    config.write_bytes(with_format(newer, OLDEST_FORMAT))
    mirror(repo.root, copy)
    assert copy.read("config") == newer


def test_a_second_mirror_asks_for_pages_of_names_and_not_for_each_object(
    repo: RepositoryFixture,
) -> None:
    copy = RecordingStorage(MemoryStorage())
    mirror(repo.root, copy)
    copy.calls.clear()
    result = mirror(repo.root, copy)
    assert result.present > 2
    assert copy.methods().count("size") == 1  # the mark of remote writers
    assert copy.methods().count("list") <= 6


class _PrunedDestination(MemoryStorage):
    """A destination of which a prune removes the packs just before the first snapshot arrives."""

    removed: tuple[str, ...] = ()

    def create(self, name: str, data: Data) -> None:
        if name.startswith("snapshots/") and not self.removed:
            self.removed = tuple(names(self))
            for pack in self.removed:
                self.delete(pack)
        super().create(name, data)


def test_packs_that_a_prune_of_the_destination_removes_before_their_snapshots_are_copied_again(
    repo: RepositoryFixture,
) -> None:
    copy = _PrunedDestination()
    mirror(repo.root, copy)
    assert copy.removed
    assert set(names(copy)) == {
        found.name
        for folder in (*PACK_PREFIXES, "snapshots")
        for found in LocalStorage(repo.root).list(folder)
    }


def test_a_destination_without_locks_is_marked_before_its_first_pack(
    repo: RepositoryFixture,
) -> None:
    copy = RecordingStorage(MemoryStorage())
    mirror(repo.root, copy)
    stored = [call.name for call in copy.calls if call.method in ("create", "commit")]
    packs = [n for n, name in enumerate(stored) if name.startswith(PACK_PREFIXES)]
    assert stored.index(MARK) < min(packs)
