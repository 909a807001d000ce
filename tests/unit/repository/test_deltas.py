"""Index deltas of an open repository: their order among the durable steps, and opening by them alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import SnapshotId, digest_of
from casfs.errors import IndexUnusableError, StorageError, StorageUnavailableError
from casfs.format.codec import BlobKind
from casfs.format.delta import DeltaBuilder, DeltaName, DeltaPack, parse_name
from casfs.index.index import DATA_FILE, Index
from casfs.maintenance.check import Checker
from casfs.maintenance.mirror import Mirror
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.repair import repair_index
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.place import RemotePlace
from casfs.repository.repository import Repository
from casfs.repository.upgrade import upgrade_repository
from casfs.storage.base import Storage
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode
from casfs.storage.url import parse_address
from tests.support.encryption import OTHER, RECIPIENT, unlock, unlock_other
from tests.support.storage_double import Call, Failure, RecordingStorage
from tests.support.stores import noise


class Hosts:
    """Machines with homes of their own, and one remote place."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = RemotePlace(parse_address("s3://bucket/r"))
        self._folder = folder
        self._monkeypatch = monkeypatch

    def use(self, name: str) -> None:
        """Let this process be the machine of this name from now on."""
        home = self._folder / name
        home.mkdir(exist_ok=True)
        self._monkeypatch.setenv("HOME", str(home))
        self._monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        self._monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: RecordingStorage) -> Hosts:
    found = Hosts(tmp_path, monkeypatch)
    found.use("one")
    return found


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a relative path: of an absolute one, the folders above change while other tests run."""
    monkeypatch.chdir(tmp_path)
    folder = Path("source")
    folder.mkdir()
    for number in range(5):
        (folder / f"file{number}").write_bytes(noise(f"file {number}", 5000))
    return folder


DEFAULTS = OpenOptions()


def back_up(place: Path | RemotePlace, source: Path, options: OpenOptions = DEFAULTS) -> SnapshotId:
    with open_for_writing(place, "backup", options) as repository:
        chosen = BackupOptions(paths=(os.fsencode(source),), host="here", patience_s=0)
        found = run_backup(repository, chosen, RecordingMonitor()).snapshot_id
    assert found is not None
    return found


def calls(memory: RecordingStorage, *methods: str) -> list[str]:
    return [call.name for call in memory.calls if call.method in methods]


def folders(names: list[str]) -> list[str]:
    """Return the folders of objects in order, each once in a row."""
    found: list[str] = []
    for name in names:
        folder = name.partition("/")[0]
        if not found or found[-1] != folder:
            found.append(folder)
    return found


def deltas_in(storage: Storage) -> list[DeltaName]:
    found = [parse_name(item.name) for item in storage.list("deltas")]
    return [name for name in found if name is not None]


def stored_packs(storage: Storage) -> list[str]:
    return [item.name for prefix in ("packs", "meta") for item in storage.list(prefix)]


def packs_of(repository: Repository) -> set[bytes]:
    return {record.pack.id for record in repository.store.index.packs()}


class TestRemote:
    def test_a_backup_publishes_its_delta_after_its_packs_and_before_its_snapshot(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, format_=2)
        memory.calls.clear()
        back_up(hosts.place, source)
        order = [
            one
            for one in folders(calls(memory, "commit", "create"))
            if one in ("packs", "meta", "deltas", "snapshots")
        ]
        assert set(order[:-2]) == {"packs", "meta"}
        assert order[-2:] == ["deltas", "snapshots"]

    def test_another_host_opens_by_deltas_without_a_look_at_the_packs(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, format_=2)
        back_up(hosts.place, source)
        hosts.use("two")
        memory.calls.clear()
        with open_for_reading(hosts.place) as repository:
            assert len(packs_of(repository)) == 2
            assert not [name for name in calls(memory, "list") if name in ("packs", "meta")]
            assert not [name for name in calls(memory, "read") if name.startswith("packs")]
            for snapshot_id, snapshot in repository.snapshots.iterate():
                assert repository.trees.resolve(snapshot.root, os.fsencode(source))
                assert snapshot_id

    def test_an_unchanged_backup_lists_the_deltas_and_stores_none(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, format_=2)
        for _ in range(2):
            back_up(hosts.place, source)
        before = deltas_in(memory.inner)
        memory.calls.clear()
        back_up(hosts.place, source)
        # The opening, and the looks before and after the snapshot appears.
        assert calls(memory, "list").count("deltas") == 3
        assert deltas_in(memory.inner) == before

    def test_the_first_delta_names_the_packs_of_a_repository_of_format_1(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, format_=1)
        back_up(hosts.place, source)
        assert deltas_in(memory.inner) == []
        upgrade_repository(hosts.place)
        place = RemotePlace(hosts.place.address)
        (source / "more").write_bytes(noise("more", 1000))
        back_up(place, source)
        hosts.use("two")
        memory.calls.clear()
        with open_for_reading(RemotePlace(hosts.place.address)) as repository:
            assert len(packs_of(repository)) == 3
        assert not [name for name in calls(memory, "list") if name in ("packs", "meta")]

    def test_an_index_that_cannot_be_written_is_used_as_it_is(
        self,
        hosts: Hosts,
        memory: RecordingStorage,
        source: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        create_repository(hosts.place, format_=2)
        back_up(hosts.place, source)
        with open_for_reading(hosts.place) as repository:
            folder = repository.store.index.path
            known = packs_of(repository)
        hosts.use("two")
        (source / "more").write_bytes(noise("more", 1000))
        back_up(hosts.place, source)
        hosts.use("one")
        real = Index.__init__

        def refuse(self: Index, path: Path, readonly: bool = False, **options: object) -> None:
            if not readonly:
                raise IndexUnusableError(f"cannot open the index {path}: Read-only file system")
            real(self, path, readonly)

        monkeypatch.setattr(Index, "__init__", refuse)
        with open_for_reading(hosts.place) as repository:
            assert repository.store.index.readonly
            assert packs_of(repository) == known
            digest = digest_of(noise("more", 1000))
            assert repository.store.read(digest) == noise("more", 1000)
        assert "found slowly" in caplog.text
        assert (folder / DATA_FILE).exists()

    def test_a_storage_that_does_not_answer_while_the_delta_is_stored_publishes_no_snapshot(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, format_=2)
        memory.script.failures.append(
            Failure(lambda call: call.method == "create" and call.name.startswith("deltas"))
        )
        with pytest.raises(StorageUnavailableError):
            back_up(hosts.place, source)
        assert list(memory.inner.list("snapshots")) == []
        back_up(hosts.place, source)
        hosts.use("two")
        with open_for_reading(hosts.place) as repository:
            assert len(list(repository.snapshots.iterate())) == 1
            assert len(packs_of(repository)) == len(stored_packs(memory.inner))

    @pytest.mark.parametrize("cause", ["unavailable", "broken"])
    def test_an_opening_survives_or_reports_each_request_that_fails_once(
        self, hosts: Hosts, memory: RecordingStorage, source: Path, cause: str
    ) -> None:
        create_repository(hosts.place, format_=2)
        for number in range(3):
            (source / f"new{number}").write_bytes(noise(f"new {number}", 1000))
            back_up(hosts.place, source)
        hosts.use("undisturbed")
        memory.calls.clear()
        with open_for_reading(hosts.place) as repository:
            expected = packs_of(repository)
        total = len(memory.calls)
        for failing in range(total):
            hosts.use(f"{cause} {failing}")
            counted = iter(range(10_000))

            def applies(call: Call, counted: object = counted, failing: int = failing) -> bool:
                return next(counted) == failing  # type: ignore[call-overload, no-any-return]

            memory.script.failures[:] = [Failure(applies)]
            if cause == "broken":
                memory.script.failures[0].error = lambda call: StorageError(
                    "read", call.name, OSError(5, "Input/output error")
                )
            try:
                with open_for_reading(hosts.place) as repository:
                    assert packs_of(repository) == expected
            except (StorageError, StorageUnavailableError):
                pass
            memory.script.failures.clear()
            with open_for_reading(hosts.place) as repository:
                assert packs_of(repository) == expected
                assert repository.store.index.partial_packs() == []


class TestLocal:
    @pytest.fixture
    def root(self, tmp_path: Path, own_home: Path) -> Path:
        create_repository(tmp_path / "repository", format_=2)
        return tmp_path / "repository"

    def test_a_backup_publishes_its_delta_before_its_snapshot(
        self, root: Path, source: Path
    ) -> None:
        steps: list[str] = []
        back_up(root, source, OpenOptions(on_step=steps.append))
        renamed = [step.partition(" ")[2] for step in steps if step.startswith("rename ")]
        assert set(renamed[:-2]) == {"packs", "meta"}
        assert renamed[-2:] == ["deltas", "snapshots"]
        assert steps.index("rename deltas") > max(
            n for n, step in enumerate(steps) if step in ("done packs", "done meta")
        )

    def test_a_repository_of_format_1_gets_no_delta(self, tmp_path: Path, source: Path) -> None:
        create_repository(tmp_path / "old", format_=1)
        back_up(tmp_path / "old", source)
        with open_for_maintenance(tmp_path / "old", "prune") as repository:
            Pruner(repository, PruneOptions(), RecordingMonitor()).prune()
        assert not (tmp_path / "old" / "deltas").exists()

    def test_a_prune_publishes_removals_before_it_deletes_packs_and_merges(
        self, root: Path, source: Path
    ) -> None:
        ids = []
        for number in range(4):
            (source / "file0").write_bytes(noise(f"version {number}", 5000))
            ids.append(back_up(root, source))
        storage = LocalStorage(root)
        assert len(deltas_in(storage)) == 4
        steps: list[str] = []
        with open_for_maintenance(root, "prune", OpenOptions(on_step=steps.append)) as repository:
            for snapshot_id in ids[:3]:
                repository.snapshots.delete(snapshot_id)
            Pruner(repository, PruneOptions(), RecordingMonitor()).prune()
            expected = packs_of(repository)
        removals = [n for n, step in enumerate(steps) if step.startswith("unlink ")]
        first_pack = min(n for n in removals if steps[n] in ("unlink packs", "unlink meta"))
        assert steps.index("rename deltas") < first_pack
        assert len(deltas_in(storage)) == 1
        with open_for_maintenance(root, "repair", mode=LockMode.EXCLUSIVE) as repository:
            (delta,) = deltas_in(storage)
            parsed = repository.delta_sync.reader.read(delta, storage.size(str(delta)))
            assert {pack.pack.id for pack in parsed.packs()} == expected  # type: ignore[union-attr]

    def test_repair_index_writes_the_deltas_again(self, root: Path, source: Path) -> None:
        for number in range(3):
            (source / "file0").write_bytes(noise(f"version {number}", 5000))
            back_up(root, source)
        storage = LocalStorage(root)
        forged = deltas_in(storage)[1]
        (root / str(forged)).write_bytes(b"damaged")
        with open_for_reading(root, may_write_index=True) as repository:
            found = Checker(repository, RecordingMonitor()).check().damage
            assert [finding.what for finding in found] == ["delta"]
            assert "digest mismatch; run `casfs repair index`" in found[0].message
        with open_for_maintenance(root, "repair index", mode=LockMode.EXCLUSIVE) as repository:
            repair_index(repository, RecordingMonitor())
            expected = packs_of(repository)
        with open_for_reading(root, may_write_index=True) as repository:
            assert Checker(repository, RecordingMonitor()).check().damage == []
            newest = deltas_in(storage)[-1]
            parsed = repository.delta_sync.reader.read(newest, storage.size(str(newest)))
            assert {pack.pack.id for pack in parsed.packs()} == expected  # type: ignore[union-attr]

    def test_check_reports_a_delta_that_contradicts_a_pack(self, root: Path, source: Path) -> None:
        back_up(root, source)
        with open_for_reading(root) as repository:
            record = repository.store.index.packs()[0]
        builder = DeltaBuilder()
        builder.add(DeltaPack(record.pack, record.pack_bytes, []))
        name, data = builder.encode(1)
        LocalStorage(root).write(str(name), data)
        with open_for_reading(root, may_write_index=True) as repository:
            (found,) = Checker(repository, RecordingMonitor()).check().damage
        assert "contradicts the directory" in found.message and found.pack == record.pack.id

    def test_a_mirror_carries_the_deltas(
        self, root: Path, source: Path, memory: RecordingStorage, hosts: Hosts
    ) -> None:
        create_repository(root.with_name("source repository"), format_=2)
        other = root.with_name("source repository")
        back_up(other, source)
        Mirror(LocalStorage(other), memory, RecordingMonitor()).run()
        assert deltas_in(memory.inner) == deltas_in(LocalStorage(other))
        hosts.use("far away")
        memory.calls.clear()
        with open_for_reading(hosts.place) as repository:
            assert len(packs_of(repository)) == 2
        assert not [name for name in calls(memory, "list") if name in ("packs", "meta")]


class TestEncrypted:
    def test_hosts_with_keys_share_deltas_and_others_look_at_the_packs(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, [RECIPIENT], format_=2)
        back_up(hosts.place, source, OpenOptions(unlock=unlock))
        assert all(
            bytes(digest_of((source / "file0").read_bytes())) not in memory.inner.read(str(name))
            for name in deltas_in(memory.inner)
        )
        hosts.use("reader")
        memory.calls.clear()
        with open_for_reading(hosts.place, OpenOptions(unlock=unlock)) as repository:
            assert len(packs_of(repository)) == 2
        assert not [name for name in calls(memory, "list") if name in ("packs", "meta")]
        hosts.use("write-only")
        closed = OpenOptions(allow_no_identity=True)
        for expected in (0, 5):
            with open_for_writing(hosts.place, "backup", closed) as repository:
                chosen = BackupOptions(paths=(os.fsencode(source),), host="w", patience_s=0)
                found = run_backup(repository, chosen, RecordingMonitor()).snapshot
                assert found.stats.unchanged == expected
                assert len(packs_of(repository)) >= 2
        hosts.use("reader")
        with open_for_reading(hosts.place, OpenOptions(unlock=unlock)) as repository:
            assert len(packs_of(repository)) == len(stored_packs(memory.inner))

    def test_a_write_only_host_learns_that_its_packs_are_gone(
        self, hosts: Hosts, memory: RecordingStorage, source: Path
    ) -> None:
        create_repository(hosts.place, [RECIPIENT], format_=2)
        hosts.use("write-only")
        closed = OpenOptions(allow_no_identity=True)
        back_up(hosts.place, source, closed)
        for name in stored_packs(memory.inner):
            memory.inner.delete(name)
        hosts.use("owner")
        with open_for_writing(hosts.place, "prune", OpenOptions(unlock=unlock)) as repository:
            writer = repository.writer()
            writer.put(BlobKind.DATA, repository.codec.digest(b"new"), b"new")
            writer.finish()
            assert repository.deltas is not None
            repository.deltas.publish()
        hosts.use("write-only")
        with open_for_writing(hosts.place, "backup", closed) as repository:
            assert packs_of(repository) == set()

    def test_the_session_of_a_delta_is_kept_by_a_prune(
        self, tmp_path: Path, own_home: Path, source: Path
    ) -> None:
        root = tmp_path / "repository"
        create_repository(root, [RECIPIENT, OTHER], format_=2)
        options = OpenOptions(unlock=unlock)
        ids = []
        for number in range(3):
            (source / "file0").write_bytes(noise(f"version {number}", 5000))
            ids.append(back_up(root, source, options))
        with open_for_maintenance(root, "prune", options) as repository:
            for snapshot_id in ids[:2]:
                repository.snapshots.delete(snapshot_id)
            Pruner(repository, PruneOptions(), RecordingMonitor()).prune()
        with open_for_reading(root, OpenOptions(unlock=unlock_other)) as repository:
            storage = repository.store.storage
            for name in deltas_in(storage):
                found = repository.delta_sync.reader.read(name, storage.size(str(name)))
                assert not isinstance(found, Exception)
