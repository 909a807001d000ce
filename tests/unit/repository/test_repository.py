"""A repository: created once, opened by every command, and readable whatever became of its index."""

from __future__ import annotations

import json
import os
import re
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
from casfs.repository.creation import create_repository
from casfs.repository.opening import open_for_reading, open_for_writing
from casfs.user_dirs import cached_index_dir, file_system_type, index_dir
from tests.support.builders import RepositoryFixture, file
from tests.support.stores import add_pack, child, flip, make_pack, pack_paths, read_line


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory of a user of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestRepositoryCreation:
    def test_create_lays_out_the_folders_and_a_readme(self, repo: RepositoryFixture) -> None:
        assert sorted(os.listdir(repo.root)) == [
            *(
                "README",
                "condemned",
                "config",
                "deltas",
                "index",
                "locks",
                "meta",
                "packs",
                "reserve",
                "snapshots",
                "tmp",
            )
        ]
        assert "casfs repository" in (repo.root / "README").read_text()
        assert stat.S_IMODE(repo.root.stat().st_mode) == 0o700
        with repo.reading() as repository:
            assert list(repository.snapshots.iterate()) == []
            written = decode_config((repo.root / "config").read_bytes(), "")
            assert repository.config == written

    def test_create_accepts_an_empty_folder_or_makes_it_with_its_parents(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        first = create_repository(tmp_path / "empty")
        second = create_repository(tmp_path / "not" / "there" / "yet")
        assert first.id != second.id

    def test_create_refuses_an_existing_repository_and_changes_nothing(
        self, repo: RepositoryFixture
    ) -> None:
        before = (repo.root / "config").read_bytes()
        with pytest.raises(ExistsError, match="already"):
            create_repository(repo.root)
        assert (repo.root / "config").read_bytes() == before

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

    def test_open_refuses_another_format_before_it_writes_anything(
        self, repo: RepositoryFixture
    ) -> None:
        config = (repo.root / "config").read_bytes()
        (repo.root / "config").write_bytes(re.sub(b"format [12]", b"format 3", config))
        with pytest.raises(FormatError, match="format 3"):
            open_for_reading(repo.root)
        with pytest.raises(FormatError, match="format 3"):
            open_for_writing(repo.root, "backup")
        assert os.listdir(repo.root / "locks") == []

    def test_open_refuses_a_damaged_configuration(self, repo: RepositoryFixture) -> None:
        flip(repo.root / "config", 60)
        with pytest.raises(IntegrityError, match="restore it from a copy"):
            open_for_reading(repo.root)

    def test_open_for_writing_holds_a_lock_until_it_is_closed(
        self, repo: RepositoryFixture
    ) -> None:
        with repo.writing():
            (lock,) = (repo.root / "locks").iterdir()
            assert json.loads(lock.read_text())["verb"] == "test"
        assert list((repo.root / "locks").iterdir()) == []

    def test_open_for_reading_takes_no_lock(self, repo: RepositoryFixture) -> None:
        with repo.reading():
            assert list((repo.root / "locks").iterdir()) == []

    def test_a_failed_open_leaves_neither_a_lock_nor_an_open_index(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(store: object, *_: object) -> None:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr("casfs.store.blob_store.BlobStore.reconcile", fail)
            with pytest.raises(StorageError, match="cannot open"):
                repo.writing()
        assert list((repo.root / "locks").iterdir()) == []
        with repo.writing() as repository:
            assert repository.snapshots.ids() == []

    def test_opening_for_writing_removes_what_a_dead_writer_left(
        self, repo: RepositoryFixture
    ) -> None:
        (repo.root / "tmp" / "0123456789abcdef.3").write_bytes(b"half a pack")
        (repo.root / "locks" / "0123456789abcdef").write_bytes(b"{}")
        with repo.reading():
            assert len(os.listdir(repo.root / "tmp")) == 1
        with repo.writing():
            assert os.listdir(repo.root / "tmp") == []
            assert len(os.listdir(repo.root / "locks")) == 1

    def test_opening_twice_in_one_process_is_an_error_and_no_crash(
        self, repo: RepositoryFixture
    ) -> None:
        with repo.writing(), pytest.raises(IndexUnusableError, match="already open"):
            repo.writing()
        assert os.listdir(repo.root / "locks") == []


HOLDER = """
import sys
from pathlib import Path
from casfs.repository.opening import open_for_maintenance
from casfs.storage.locks import LockMode

with open_for_maintenance(Path(sys.argv[1]), "prune", mode=LockMode.EXCLUSIVE):
    print("open", flush=True)
    sys.stdin.readline()
"""


def test_an_exclusive_writer_excludes_other_writers_and_no_reader(repo: RepositoryFixture) -> None:
    repo.publish({b"f": b"1"})
    with child(HOLDER, repo.root) as process:
        assert read_line(process) == "open"
        with pytest.raises(LockedError, match=f"prune on .*, process {process.pid}"):
            repo.writing()
        with repo.reading() as repository:
            assert len(list(repository.snapshots.iterate())) == 1
    with repo.writing() as repository:
        assert len(list(repository.snapshots.iterate())) == 1


class TestIndexRecovery:
    """Reading finds every pack, whatever became of the index."""

    CONTENT = b"the content of a file"

    @pytest.fixture
    def snapshot_id(self, repo: RepositoryFixture) -> SnapshotId:
        with repo.writing() as repository:
            writer = repository.writer()
            writer.put(BlobKind.DATA, digest_of(self.CONTENT), self.CONTENT)
            writer.finish()
        return repo.publish({b"f": file(b"", self.CONTENT)})[0]

    def read(self, repo: RepositoryFixture) -> bytes:
        with repo.reading() as repository:
            _, _, _, node = repository.snapshots.resolve_path("latest:f")
            (extent,) = repository.content(node).extents()
            assert extent.digest is not None
            return repository.store.read(extent.digest)

    def test_a_deleted_index_is_rebuilt(
        self, repo: RepositoryFixture, snapshot_id: SnapshotId
    ) -> None:
        shutil.rmtree(repo.root / "index")
        assert self.read(repo) == self.CONTENT
        assert (repo.root / "index" / "data.mdb").exists()

    def test_an_index_that_lacks_a_pack_is_brought_up_to_date(
        self, repo: RepositoryFixture, snapshot_id: SnapshotId
    ) -> None:
        data, _ = make_pack([b"sealed just before a crash"])
        pack = add_pack(repo.root, data)
        with repo.reading() as repository:
            assert repository.store.read(digest_of(b"sealed just before a crash"))
            assert pack in {record.pack for record in repository.store.index.packs()}

    @pytest.mark.parametrize("writing", [False, True])
    def test_an_index_file_of_junk_is_rebuilt(
        self, repo: RepositoryFixture, snapshot_id: SnapshotId, cache: Path, writing: bool
    ) -> None:
        (repo.root / "index" / "data.mdb").write_bytes(b"junk" * 10_000)
        if writing:
            repo.writing().close()
        assert self.read(repo) == self.CONTENT
        assert not list(cache.rglob("data.mdb"))

    def test_a_lost_pack_costs_only_the_blobs_in_it(
        self, repo: RepositoryFixture, snapshot_id: SnapshotId
    ) -> None:
        (path,) = [path for path in pack_paths(repo.root) if self.CONTENT in path.read_bytes()]
        path.unlink()
        with repo.reading() as repository:
            ((_, snapshot),) = repository.snapshots.iterate()
            assert snapshot.root.tree is not None
            assert [node.name for node in repository.trees.nodes(snapshot.root.tree)] == [b"f"]
            with pytest.raises(IntegrityError, match="its pack is missing"):
                repository.store.read(digest_of(self.CONTENT))

    def test_the_index_of_a_network_file_system_is_in_the_cache(
        self, repo: RepositoryFixture, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert index_dir(repo.root, "ab" * 32) == repo.root / "index"
        for kind in ("nfs4", "cifs", "fuse.sshfs", "9p"):
            monkeypatch.setattr("casfs.user_dirs.file_system_type", lambda path, k=kind: k)
            assert index_dir(repo.root, "ab" * 32) == cache / "casfs" / ("ab" * 16) / "index"
        repo.publish({b"f": b"1"})
        assert len(list(cache.rglob("data.mdb"))) == 1

    def test_the_type_of_a_file_system_is_known(self, tmp_path: Path) -> None:
        assert file_system_type(Path("/proc")) == "proc"
        assert file_system_type(tmp_path)

    def test_each_repository_has_its_own_index_in_the_cache(self, cache: Path) -> None:
        assert cached_index_dir("ab" * 32) != cached_index_dir("cd" * 32)


class TestSnapshotList:
    @pytest.fixture
    def four(self, repo: RepositoryFixture) -> list[SnapshotId]:
        """Ids by time; they were published in another order."""
        ids = {time: repo.publish({b"f": b"1"}, time_ns=time)[0] for time in (3, 1, 2, 4)}
        return [ids[time] for time in sorted(ids)]

    def test_snapshots_are_listed_from_the_oldest_to_the_newest(
        self, repo: RepositoryFixture, four: list[SnapshotId]
    ) -> None:
        with repo.reading() as repository:
            assert [s.time_ns for _, s in repository.snapshots.iterate()] == [1, 2, 3, 4]
            assert repository.snapshots.resolve("latest")[1].time_ns == 4

    def test_damaged_snapshots_are_left_out_and_named(
        self, repo: RepositoryFixture, four: list[SnapshotId], caplog: pytest.LogCaptureFixture
    ) -> None:
        flip(repo.root / "snapshots" / four[0].hex(), 40)
        with repo.reading() as repository:
            assert [s.time_ns for _, s in repository.snapshots.iterate()] == [2, 3, 4]
            with pytest.raises(IntegrityError):
                repository.snapshots.load(four[0])
        assert four[0].hex()[:12] in caplog.text
        assert "casfs check" in caplog.text

    def test_snapshots_that_vanish_during_a_listing_are_left_out(
        self, repo: RepositoryFixture, four: list[SnapshotId], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with repo.reading() as repository:
            ids = repository.snapshots.ids()
            monkeypatch.setattr(repository.snapshots, "ids", lambda: ids)
            (repo.root / "snapshots" / four[0].hex()).unlink()
            assert len(list(repository.snapshots.iterate())) == 3

    def test_foreign_files_are_not_listed_as_snapshots(
        self, repo: RepositoryFixture, four: list[SnapshotId]
    ) -> None:
        for name in ("note.txt", "A" * 64, "a" * 63, "g" * 64):
            (repo.root / "snapshots" / name).touch()
        with repo.reading() as repository:
            assert len(repository.snapshots.ids()) == 4

    def test_a_snapshot_is_found_by_any_unique_prefix(
        self, repo: RepositoryFixture, four: list[SnapshotId]
    ) -> None:
        with repo.reading() as repository:
            for snapshot_id in four:
                text = snapshot_id.hex()
                assert repository.snapshots.resolve(text)[0] == snapshot_id
                assert repository.snapshots.resolve(text[:20])[0] == snapshot_id
                assert repository.snapshots.resolve(text[:20].upper())[0] == snapshot_id

    @pytest.mark.parametrize("name", ["", "zz", "latest2", "../config", "0" * 65])
    def test_an_unknown_snapshot_is_not_found(
        self, repo: RepositoryFixture, four: list[SnapshotId], name: str
    ) -> None:
        with repo.reading() as repository, pytest.raises(NotFoundError, match="no snapshot"):
            repository.snapshots.resolve(name)

    def test_an_ambiguous_prefix_names_all_its_snapshots(self, repo: RepositoryFixture) -> None:
        names = ["ab" + "0" * 62, "ab" + "1" * 62]
        for name in names:
            (repo.root / "snapshots" / name).touch()
        with repo.reading() as repository, pytest.raises(AmbiguousIdError) as caught:
            repository.snapshots.resolve("ab")
        assert caught.value.matches == names
        assert "2 snapshots (ab0000000000, ab1111111111)" in str(caught.value)

    def test_an_empty_repository_has_no_latest_snapshot(self, repo: RepositoryFixture) -> None:
        with repo.reading() as repository, pytest.raises(NotFoundError, match="has no snapshots"):
            repository.snapshots.resolve("latest")

    def test_a_deleted_snapshot_cannot_be_loaded(
        self, repo: RepositoryFixture, four: list[SnapshotId]
    ) -> None:
        with repo.writing() as repository:
            repository.snapshots.delete(four[0])
            repository.snapshots.delete(four[0])
            with pytest.raises(NotFoundError):
                repository.snapshots.load(four[0])


class TestSnapshotPath:
    def test_a_snapshot_path_leads_into_a_snapshot(self, repo: RepositoryFixture) -> None:
        snapshot_id, _ = repo.publish({b"a": {b"b:c": b"1", b"\xff": b"2"}})
        with repo.reading() as repository:
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
            with pytest.raises(UsageError, match=r"contains '\.\.'"):
                repository.snapshots.resolve_path("latest:a/../a")

    @pytest.mark.parametrize(
        ("text", "path"),
        [("", b""), ("/", b""), ("a", b"a"), ("//a/.//b/", b"a/b"), ("...", b"...")],
    )
    def test_a_snapshot_path_is_normalized(self, text: str, path: bytes) -> None:
        assert parse_snapshot_path(text) == path


class TestCompleteness:
    def test_a_published_snapshot_is_marked_complete(self, repo: RepositoryFixture) -> None:
        snapshot_id, snapshot = repo.publish({b"f": b"1"})
        with repo.writing() as repository:
            assert repository.store.index.is_complete(snapshot_id)
            unsure = repository.snapshots.publish(_with_time(snapshot, 9), complete=False)
            assert not repository.store.index.is_complete(unsure)

    def test_a_snapshot_is_not_marked_complete_after_a_loss_by_another_process(
        self, repo: RepositoryFixture
    ) -> None:
        _, snapshot = repo.publish({b"f": b"1"})
        with repo.writing() as repository:
            # What another process does that finds a pack missing.
            repository.store.rebuild()
            snapshot_id = repository.snapshots.publish(_with_time(snapshot, 9))
            assert not repository.store.index.is_complete(snapshot_id)


def _with_time(snapshot: Snapshot, time_ns: int) -> Snapshot:
    import msgspec

    return msgspec.structs.replace(snapshot, time_ns=time_ns)


READER = """
import os
import re
import sys
import tempfile
from pathlib import Path
import lmdb
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.errors import CasfsError
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_reading

os.environ["XDG_CACHE_HOME"] = os.environ["XDG_STATE_HOME"] = sys.argv[2]
# From now on all is imported, since the interpreter may lie where another user cannot go. lmdb imports a
# part of itself when it opens an environment.
with tempfile.TemporaryDirectory() as folder:
    lmdb.open(folder).close()
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
    def shared(self) -> Iterator[RepositoryFixture]:
        """A repository in a folder that every user may enter, unlike pytest's own."""
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            repo = RepositoryFixture(Path(folder))
            repo.publish({b"d": {b"f": b""}})
            yield repo

    def open_to_all(self, repo: RepositoryFixture) -> None:
        for path in (repo.root, *repo.root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

    def read(self, repo: RepositoryFixture, cache: Path) -> str:
        with child(READER, repo.root, cache) as process:
            return read_line(process)

    def own_cache(self, repo: RepositoryFixture) -> Path:
        cache = repo.root.parent / "cache"
        cache.mkdir()
        os.chown(cache, 65534, 65534)
        return cache

    def test_a_read_only_user_reads_with_the_existing_index_of_root(
        self, shared: RepositoryFixture
    ) -> None:
        self.open_to_all(shared)
        before = sorted(os.listdir(shared.root / "index"))
        assert self.read(shared, Path("/nonexistent")) == "read 1 3 0"
        assert sorted(os.listdir(shared.root / "index")) == before

    @pytest.mark.parametrize("index", ["deleted", "behind", "hidden"])
    def test_a_read_only_user_builds_an_index_where_none_of_its_own_exists(
        self, shared: RepositoryFixture, index: str
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
        self, shared: RepositoryFixture
    ) -> None:
        shutil.rmtree(shared.root / "index")
        self.open_to_all(shared)
        printed = self.read(shared, Path("/nonexistent"))
        assert printed.startswith("StorageError cannot create an index in the folder /nonexistent")

    def test_a_user_without_read_access_gets_a_clear_error(self, shared: RepositoryFixture) -> None:
        shared.root.chmod(0o700)
        assert self.read(shared, Path("/nonexistent")).startswith("StorageDeniedError cannot read")


def test_a_copied_configuration_names_the_same_repository(repo: RepositoryFixture) -> None:
    config = new_config("2026-01-01T00:00:00Z")
    (repo.root / "config").write_bytes(encode_config(config))
    with repo.reading() as repository:
        assert repository.config.id == config.id


def test_an_init_that_fails_beside_another_leaves_that_one_alone(tmp_path: Path) -> None:
    """Both find the folder empty; the one that comes later to make the first folder removes nothing."""
    root = tmp_path / "repository"
    root.mkdir()
    real = Path.iterdir

    def first_the_other(path: Path) -> Iterator[Path]:
        found = list(real(path))
        if path == root and not found:
            (root / "packs").mkdir()
            (root / "config").write_bytes(b"of the other")
        return iter(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", first_the_other)
        with pytest.raises(ExistsError):
            create_repository(root)
    assert sorted(os.listdir(root)) == ["config", "packs"]
