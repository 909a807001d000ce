"""A repository: made once, opened by anybody, and readable whatever became of its index."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.digest import SnapshotId, digest_of
from casfs.errors import (
    AmbiguousIdError,
    ExistsError,
    FormatError,
    IndexUnusableError,
    IntegrityError,
    LockedError,
    NotFoundError,
    StorageError,
    UsageError,
)
from casfs.format.codec import BlobKind
from casfs.format.config import decode_config, encode_config, new_config
from casfs.format.snapshot import Snapshot
from casfs.paths import parse_snapshot_path
from casfs.repository.opening import create_repository, open_for_reading, open_for_writing
from casfs.user_dirs import cached_index_dir, file_system_type, index_dir
from tests.support.builders import Keeper, file
from tests.support.stores import add_pack, child, flip, hear, make_pack, pack_paths


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory of a user of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestRepositoryCreation:
    def test_create_lays_out_the_folders_and_a_readme(self, keeper: Keeper) -> None:
        assert sorted(os.listdir(keeper.root)) == [
            *(
                "README",
                "condemned",
                "config",
                "index",
                "locks",
                "packs",
                "reserve",
                "snapshots",
                "tmp",
            )
        ]
        assert "casfs repository" in (keeper.root / "README").read_text()
        assert stat.S_IMODE(keeper.root.stat().st_mode) == 0o700
        with keeper.reading() as repository:
            assert list(repository.snapshots.iterate()) == []
            written = decode_config((keeper.root / "config").read_bytes(), "")
            assert repository.config == written

    def test_create_accepts_an_empty_folder_or_makes_it_with_its_parents(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        first = create_repository(tmp_path / "empty")
        second = create_repository(tmp_path / "not" / "there" / "yet")
        assert first.id != second.id

    def test_create_refuses_an_existing_repository_and_changes_nothing(
        self, keeper: Keeper
    ) -> None:
        before = (keeper.root / "config").read_bytes()
        with pytest.raises(ExistsError, match="already"):
            create_repository(keeper.root)
        assert (keeper.root / "config").read_bytes() == before

    def test_create_refuses_a_full_folder_and_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "note").touch()
        (tmp_path / "file").touch()
        for place in ("full", "file", "file/below"):
            with pytest.raises(ExistsError):
                create_repository(tmp_path / place)
        assert os.listdir(tmp_path / "full") == ["note"]

    def test_create_on_a_failing_disk_is_a_storage_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(StorageError, match="No space left"):
            create_repository(tmp_path / "repository")


class TestRepositoryOpening:
    def test_open_without_a_repository_raises_not_found(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for place in ("none", "", "file"):
            with pytest.raises(NotFoundError):
                open_for_reading(tmp_path / place)
            with pytest.raises(NotFoundError):
                open_for_writing(tmp_path / place, "backup")

    def test_open_refuses_another_format_before_it_writes_anything(self, keeper: Keeper) -> None:
        config = (keeper.root / "config").read_bytes()
        (keeper.root / "config").write_bytes(config.replace(b"format 1", b"format 2"))
        with pytest.raises(FormatError, match="format 2"):
            open_for_reading(keeper.root)
        with pytest.raises(FormatError, match="format 2"):
            open_for_writing(keeper.root, "backup")
        assert os.listdir(keeper.root / "locks") == []

    def test_open_refuses_a_damaged_configuration(self, keeper: Keeper) -> None:
        flip(keeper.root / "config", 60)
        with pytest.raises(IntegrityError, match="restore it from a copy"):
            open_for_reading(keeper.root)

    def test_open_for_writing_holds_a_lock_until_it_is_closed(self, keeper: Keeper) -> None:
        with keeper.writing():
            (lock,) = (keeper.root / "locks").iterdir()
            assert json.loads(lock.read_text())["verb"] == "test"
        assert list((keeper.root / "locks").iterdir()) == []

    def test_open_for_reading_takes_no_lock(self, keeper: Keeper) -> None:
        with keeper.reading():
            assert list((keeper.root / "locks").iterdir()) == []

    def test_a_failed_open_leaves_neither_a_lock_nor_an_open_index(
        self, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(store: object, *_: object) -> None:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr("casfs.store.blob_store.BlobStore.reconcile", fail)
            with pytest.raises(StorageError, match="cannot open"):
                keeper.writing()
        assert list((keeper.root / "locks").iterdir()) == []
        with keeper.writing() as repository:
            assert repository.snapshots.ids() == []

    def test_opening_for_writing_removes_what_a_dead_writer_left(self, keeper: Keeper) -> None:
        (keeper.root / "tmp" / "0123456789abcdef.3").write_bytes(b"half a pack")
        (keeper.root / "locks" / "0123456789abcdef").write_bytes(b"{}")
        with keeper.reading():
            assert len(os.listdir(keeper.root / "tmp")) == 1
        with keeper.writing():
            assert os.listdir(keeper.root / "tmp") == []
            assert len(os.listdir(keeper.root / "locks")) == 1

    def test_opening_twice_in_one_process_is_an_error_and_no_crash(self, keeper: Keeper) -> None:
        with keeper.writing(), pytest.raises(IndexUnusableError, match="already open"):
            keeper.writing()
        assert os.listdir(keeper.root / "locks") == []


HOLDER = """
import sys
from pathlib import Path
from casfs.repository.opening import open_for_maintenance
from casfs.storage.locks import LockMode

with open_for_maintenance(Path(sys.argv[1]), "prune", mode=LockMode.EXCLUSIVE):
    print("open", flush=True)
    sys.stdin.readline()
"""


def test_an_exclusive_writer_excludes_other_writers_and_no_reader(keeper: Keeper) -> None:
    keeper.publish({b"f": b"1"})
    with child(HOLDER, keeper.root) as process:
        assert hear(process) == "open"
        with pytest.raises(LockedError, match=f"prune on .*, process {process.pid}"):
            keeper.writing()
        with keeper.reading() as repository:
            assert len(list(repository.snapshots.iterate())) == 1
    with keeper.writing() as repository:
        assert len(list(repository.snapshots.iterate())) == 1


class TestIndexRecovery:
    """Reading finds every pack, whatever became of the index."""

    CONTENT = b"the content of a file"

    @pytest.fixture
    def snapshot_id(self, keeper: Keeper) -> SnapshotId:
        with keeper.writing() as repository:
            writer = repository.writer()
            writer.put(BlobKind.DATA, digest_of(self.CONTENT), self.CONTENT)
            writer.finish()
        return keeper.publish({b"f": file(b"", self.CONTENT)})[0]

    def read(self, keeper: Keeper) -> bytes:
        with keeper.reading() as repository:
            _, _, _, node = repository.snapshots.resolve_path("latest:f")
            (extent,) = repository.content(node).extents()
            assert extent.digest is not None
            return repository.store.read(extent.digest)

    def test_a_deleted_index_is_rebuilt(self, keeper: Keeper, snapshot_id: SnapshotId) -> None:
        shutil.rmtree(keeper.root / "index")
        assert self.read(keeper) == self.CONTENT
        assert (keeper.root / "index" / "data.mdb").exists()

    def test_an_index_that_lacks_a_pack_is_brought_up_to_date(
        self, keeper: Keeper, snapshot_id: SnapshotId
    ) -> None:
        data, _ = make_pack([b"sealed just before a crash"])
        pack = add_pack(keeper.root, data)
        with keeper.reading() as repository:
            assert repository.store.read(digest_of(b"sealed just before a crash"))
            assert pack in {record.pack for record in repository.store.index.packs()}

    @pytest.mark.parametrize("writing", [False, True])
    def test_an_index_file_of_junk_is_rebuilt(
        self, keeper: Keeper, snapshot_id: SnapshotId, cache: Path, writing: bool
    ) -> None:
        (keeper.root / "index" / "data.mdb").write_bytes(b"junk" * 10_000)
        if writing:
            keeper.writing().close()
        assert self.read(keeper) == self.CONTENT
        assert not list(cache.rglob("data.mdb"))

    def test_a_lost_pack_costs_only_the_blobs_in_it(
        self, keeper: Keeper, snapshot_id: SnapshotId
    ) -> None:
        (path,) = [path for path in pack_paths(keeper.root) if self.CONTENT in path.read_bytes()]
        path.unlink()
        with keeper.reading() as repository:
            ((_, snapshot),) = repository.snapshots.iterate()
            assert snapshot.root.tree is not None
            assert [node.name for node in repository.trees.nodes(snapshot.root.tree)] == [b"f"]
            with pytest.raises(IntegrityError, match="its pack is missing"):
                repository.store.read(digest_of(self.CONTENT))

    def test_the_index_of_a_network_file_system_is_in_the_cache(
        self, keeper: Keeper, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert index_dir(keeper.root, "ab" * 32) == keeper.root / "index"
        for kind in ("nfs4", "cifs", "fuse.sshfs", "9p"):
            monkeypatch.setattr("casfs.user_dirs.file_system_type", lambda path, k=kind: k)
            assert index_dir(keeper.root, "ab" * 32) == cache / "casfs" / ("ab" * 16) / "index"
        keeper.publish({b"f": b"1"})
        assert len(list(cache.rglob("data.mdb"))) == 1

    def test_the_type_of_a_file_system_is_known(self, tmp_path: Path) -> None:
        assert file_system_type(Path("/proc")) == "proc"
        assert file_system_type(tmp_path)

    def test_each_repository_has_its_own_index_in_the_cache(self, cache: Path) -> None:
        assert cached_index_dir("ab" * 32) != cached_index_dir("cd" * 32)


class TestSnapshotList:
    @pytest.fixture
    def four(self, keeper: Keeper) -> list[SnapshotId]:
        """Ids by time; they were published in another order."""
        ids = {time: keeper.publish({b"f": b"1"}, time_ns=time)[0] for time in (3, 1, 2, 4)}
        return [ids[time] for time in sorted(ids)]

    def test_snapshots_are_listed_from_the_oldest_to_the_newest(
        self, keeper: Keeper, four: list[SnapshotId]
    ) -> None:
        with keeper.reading() as repository:
            assert [s.time_ns for _, s in repository.snapshots.iterate()] == [1, 2, 3, 4]
            assert repository.snapshots.resolve("latest")[1].time_ns == 4

    def test_damaged_snapshots_are_left_out_and_named(
        self, keeper: Keeper, four: list[SnapshotId], caplog: pytest.LogCaptureFixture
    ) -> None:
        flip(keeper.root / "snapshots" / four[0].hex(), 40)
        with keeper.reading() as repository:
            assert [s.time_ns for _, s in repository.snapshots.iterate()] == [2, 3, 4]
            with pytest.raises(IntegrityError):
                repository.snapshots.load(four[0])
        assert four[0].hex()[:12] in caplog.text
        assert "casfs check" in caplog.text

    def test_snapshots_that_vanish_during_a_listing_are_left_out(
        self, keeper: Keeper, four: list[SnapshotId], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with keeper.reading() as repository:
            ids = repository.snapshots.ids()
            monkeypatch.setattr(repository.snapshots, "ids", lambda: ids)
            (keeper.root / "snapshots" / four[0].hex()).unlink()
            assert len(list(repository.snapshots.iterate())) == 3

    def test_foreign_files_are_not_listed_as_snapshots(
        self, keeper: Keeper, four: list[SnapshotId]
    ) -> None:
        for name in ("note.txt", "A" * 64, "a" * 63, "g" * 64):
            (keeper.root / "snapshots" / name).touch()
        with keeper.reading() as repository:
            assert len(repository.snapshots.ids()) == 4

    def test_a_snapshot_is_found_by_any_unique_prefix(
        self, keeper: Keeper, four: list[SnapshotId]
    ) -> None:
        with keeper.reading() as repository:
            for snapshot_id in four:
                text = snapshot_id.hex()
                assert repository.snapshots.resolve(text)[0] == snapshot_id
                assert repository.snapshots.resolve(text[:20])[0] == snapshot_id
                assert repository.snapshots.resolve(text[:20].upper())[0] == snapshot_id

    @pytest.mark.parametrize("name", ["", "zz", "latest2", "../config", "0" * 65])
    def test_an_unknown_snapshot_is_not_found(
        self, keeper: Keeper, four: list[SnapshotId], name: str
    ) -> None:
        with keeper.reading() as repository, pytest.raises(NotFoundError, match="no snapshot"):
            repository.snapshots.resolve(name)

    def test_an_ambiguous_prefix_names_all_its_snapshots(self, keeper: Keeper) -> None:
        names = ["ab" + "0" * 62, "ab" + "1" * 62]
        for name in names:
            (keeper.root / "snapshots" / name).touch()
        with keeper.reading() as repository, pytest.raises(AmbiguousIdError) as caught:
            repository.snapshots.resolve("ab")
        assert caught.value.matches == names
        assert "2 snapshots (ab0000000000, ab1111111111)" in str(caught.value)

    def test_an_empty_repository_has_no_latest_snapshot(self, keeper: Keeper) -> None:
        with keeper.reading() as repository, pytest.raises(NotFoundError, match="no snapshots yet"):
            repository.snapshots.resolve("latest")

    def test_a_deleted_snapshot_cannot_be_loaded(
        self, keeper: Keeper, four: list[SnapshotId]
    ) -> None:
        with keeper.writing() as repository:
            repository.snapshots.delete(four[0])
            repository.snapshots.delete(four[0])
            with pytest.raises(NotFoundError):
                repository.snapshots.load(four[0])


class TestSnapshotPath:
    def test_a_snapshot_path_leads_into_a_snapshot(self, keeper: Keeper) -> None:
        snapshot_id, _ = keeper.publish({b"a": {b"b:c": b"1", b"\xff": b"2"}})
        with keeper.reading() as repository:
            for spec, path in (
                ("latest", b""),
                ("latest:", b""),
                ("latest:/", b""),
                ("latest:a/b:c", b"a/b:c"),
                ("latest:/a//./b:c/", b"a/b:c"),
                (f"{snapshot_id.hex()[:8]}:a/\udcff", b"a/\xff"),
            ):
                assert repository.snapshots.resolve_path(spec)[2] == path
            with pytest.raises(NotFoundError, match="has no"):
                repository.snapshots.resolve_path("latest:a/none")
            with pytest.raises(UsageError, match=r"no \.\."):
                repository.snapshots.resolve_path("latest:a/../a")

    @pytest.mark.parametrize(
        ("text", "path"),
        [("", b""), ("/", b""), ("a", b"a"), ("//a/.//b/", b"a/b"), ("...", b"...")],
    )
    def test_a_snapshot_path_is_normalized(self, text: str, path: bytes) -> None:
        assert parse_snapshot_path(text) == path


class TestCompleteness:
    def test_a_published_snapshot_is_marked_complete(self, keeper: Keeper) -> None:
        snapshot_id, snapshot = keeper.publish({b"f": b"1"})
        with keeper.writing() as repository:
            assert repository.store.index.is_complete(snapshot_id)
            unsure = repository.snapshots.publish(_with_time(snapshot, 9), complete=False)
            assert not repository.store.index.is_complete(unsure)

    def test_a_snapshot_is_not_marked_complete_after_a_loss_by_another_process(
        self, keeper: Keeper
    ) -> None:
        _, snapshot = keeper.publish({b"f": b"1"})
        with keeper.writing() as repository:
            # What another process does that finds a pack missing.
            repository.store.rebuild()
            snapshot_id = repository.snapshots.publish(_with_time(snapshot, 9))
            assert not repository.store.index.is_complete(snapshot_id)


def _with_time(snapshot: Snapshot, time_ns: int) -> Snapshot:
    import msgspec

    return msgspec.structs.replace(snapshot, time_ns=time_ns)


READER = """
import os
import sys
from pathlib import Path
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.errors import CasfsError
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_reading

os.environ["XDG_CACHE_HOME"] = sys.argv[2]
# By now all is imported: the interpreter may lie where another user cannot go.
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    with open_for_reading(Path(sys.argv[1])) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
        print("read", result.snapshots, result.blobs_read, len(result.damage), flush=True)
except CasfsError as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")
class TestReadOnlyUser:
    """One who may read a repository and not write it can do all that reading is."""

    @pytest.fixture
    def shared(self) -> Iterator[Keeper]:
        """A repository in a folder that everybody may pass, as pytest's own is not."""
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            keeper = Keeper(Path(folder))
            keeper.publish({b"d": {b"f": b""}})
            yield keeper

    def open_to_all(self, keeper: Keeper) -> None:
        for path in (keeper.root, *keeper.root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

    def read(self, keeper: Keeper, cache: Path) -> str:
        with child(READER, keeper.root, cache) as process:
            return hear(process)

    def own_cache(self, keeper: Keeper) -> Path:
        cache = keeper.root.parent / "cache"
        cache.mkdir()
        os.chown(cache, 65534, 65534)
        return cache

    def test_a_read_only_user_reads_with_the_existing_index(self, shared: Keeper) -> None:
        self.open_to_all(shared)
        before = sorted(os.listdir(shared.root / "index"))
        assert self.read(shared, Path("/nonexistent")) == "read 1 3 0"
        assert sorted(os.listdir(shared.root / "index")) == before

    @pytest.mark.parametrize("index", ["deleted", "behind", "hidden"])
    def test_a_read_only_user_builds_an_index_where_none_can_be_used(
        self, shared: Keeper, index: str
    ) -> None:
        if index == "deleted":
            shutil.rmtree(shared.root / "index")
        elif index == "behind":
            add_pack(shared.root, make_pack([b"not in the index"])[0])
        self.open_to_all(shared)
        if index == "hidden":
            (shared.root / "index").chmod(0o700)
        cache = self.own_cache(shared)
        assert self.read(shared, cache) == f"read 1 {4 if index == 'behind' else 3} 0"
        assert len(list(cache.rglob("data.mdb"))) == 1

    def test_a_read_only_user_without_a_cache_folder_gets_a_clear_error(
        self, shared: Keeper
    ) -> None:
        shutil.rmtree(shared.root / "index")
        self.open_to_all(shared)
        said = self.read(shared, Path("/nonexistent"))
        assert said.startswith("StorageError cannot make an index in the folder /nonexistent")

    def test_a_user_without_read_access_gets_a_clear_error(self, shared: Keeper) -> None:
        shared.root.chmod(0o700)
        assert self.read(shared, Path("/nonexistent")).startswith("StorageError cannot read")


def test_a_copied_configuration_names_the_same_repository(keeper: Keeper) -> None:
    config = new_config("2026-01-01T00:00:00Z")
    (keeper.root / "config").write_bytes(encode_config(config))
    with keeper.reading() as repository:
        assert repository.config.id == config.id
