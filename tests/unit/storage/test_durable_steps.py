"""The order of a backup's durable steps, and what is left when it is stopped at any of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.format.snapshot import SnapshotStats
from casfs.format.versions import OLDEST_FORMAT
from casfs.maintenance.check import Checker, CheckResult
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.repository import Repository
from casfs.storage.local import LocalWriter
from casfs.storage.locks import RepositoryLock
from casfs.store import pack_builder
from casfs.store import writer as writer_module
from casfs.store.writer import BlobWriter
from tests.support.stores import child, noise, pack_paths, read_line, write_line

KIB = 1 << 10
FILES = 24
FILE_BYTES = 12 * KIB


class Crash(BaseException):
    """What stops a process at once."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A repository with one snapshot of a source that has grown since."""

    root: Path
    source: Path

    def back_up(self, on_step: Callable[[str], None] | None = None) -> SnapshotStats:
        with open_for_writing(
            self.root, "backup", OpenOptions(sync=False, on_step=on_step)
        ) as repository:
            options = BackupOptions((bytes(self.source),), host="here")
            return run_backup(repository, options, RecordingMonitor()).snapshot.stats

    def listed(self) -> list[str]:
        with open_for_reading(self.root) as repository:
            return [snapshot_id.hex() for snapshot_id, _ in repository.snapshots.iterate()]

    def check(self) -> CheckResult:
        with open_for_reading(self.root) as repository:
            return Checker(repository, RecordingMonitor()).check(PackSelection())


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packs of a few files, so that one backup has many of them."""

    def writer(
        self: Repository, dry_run: bool = False, spool_in_memory: bool = False
    ) -> BlobWriter:
        return BlobWriter(self.store, dry_run, spool_in_memory, pack_bytes=64 * KIB)

    monkeypatch.setattr(Repository, "writer", writer)
    monkeypatch.setattr(pack_builder, "_BUFFER_BYTES", 4 * KIB)
    monkeypatch.setattr(writer_module, "_BATCH_BYTES", 32 * KIB)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    found = Scene(tmp_path / "repository", tmp_path / "source")
    # The writer above stores packs of one kind. Crashes in format 2 are in tests/fault/test_crash_matrix.py.
    create_repository(found.root, format_=OLDEST_FORMAT)
    for number in range(256):
        # A new folder would be a step of its own, and the packs' names are never the same twice.
        (found.root / "packs" / f"{number:02x}").mkdir()
    (found.source / "old").mkdir(parents=True)
    (found.source / "old" / "file").write_bytes(noise("old", 30 * KIB))
    found.back_up()
    for number in range(FILES):
        (found.source / f"{number:02}").write_bytes(noise(f"new {number}", FILE_BYTES))
    return found


class Return:
    """Bring a repository back to what it was: packs and snapshots are never changed, only added."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = self._present()
        self._index = root.with_name("index as it was")
        shutil.copytree(root / "index", self._index)

    def __call__(self) -> None:
        for path in self._present() - self._files:
            path.unlink()
        shutil.rmtree(self._root / "index")
        shutil.copytree(self._index, self._root / "index")

    def _present(self) -> set[Path]:
        return {
            path
            for folder in ("packs", "snapshots", "tmp", "locks")
            for path in (self._root / folder).rglob("*")
            if path.is_file()
        }


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave what a killed process leaves: temporary files, and a lock without a holder."""

    def forget(spool: LocalWriter) -> None:
        if spool._fd >= 0:
            os.close(spool._fd)
            spool._fd = -1

    def drop(lock: RepositoryLock) -> None:
        if lock._fd >= 0:
            os.close(lock._fd)
            lock._fd = -1

    with monkeypatch.context() as patch:
        patch.setattr(LocalWriter, "discard", forget)
        patch.setattr(RepositoryLock, "release", drop)
        yield


def steps_of(scene: Scene) -> list[str]:
    """Run a backup to its end and return its durable steps."""
    steps: list[str] = []
    scene.back_up(steps.append)
    return steps


def test_a_snapshot_is_published_last_and_every_pack_before_its_index_entries(scene: Scene) -> None:
    steps = steps_of(scene)
    assert steps[-6:] == [
        *("commit index", "done index", "data snapshots", "rename snapshots"),
        *("folder snapshots", "done snapshots"),
    ]
    packs = steps[:-6]
    assert packs.count("commit index") == packs.count("rename packs") >= 4
    while packs:
        end = packs.index("done index") + 1
        one, packs = packs[:end], packs[end:]
        assert one == [
            *("data packs", "rename packs", "folder packs", "done packs"),
            *("commit index", "done index"),
        ]


@pytest.mark.slow
def test_a_backup_that_is_stopped_at_any_step_leaves_nothing_to_repair(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_back = Return(scene.root)
    steps = steps_of(scene)
    whole = scene.listed()
    go_back()
    # Counted with the old snapshot as parent, as it is for each of the others below. Trees do not
    # count: those of the folders above the source change when another process writes there.
    all_new = scene.back_up().new_plain_bytes // FILE_BYTES
    reused = []
    for stop in range(len(steps)):
        go_back()
        left = iter(range(stop))

        def on_step(step: str, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Crash

        with dying(monkeypatch), pytest.raises(Crash):
            scene.back_up(on_step)
        assert len(os.listdir(scene.root / "locks")) == 1
        listed = scene.listed()
        published = steps[stop] in ("folder snapshots", "done snapshots")
        assert len(listed) == 1 + published, steps[stop]
        assert listed[0] == whole[0]
        assert scene.check().damage == [], steps[stop]
        stats = scene.back_up()
        reused.append(all_new - stats.new_plain_bytes // FILE_BYTES)
        assert scene.check().damage == []
        assert len(scene.listed()) == len(listed) + 1
        assert os.listdir(scene.root / "tmp") == []
        assert os.listdir(scene.root / "locks") == []
    assert reused == sorted(reused)
    assert reused[0] == 0
    assert reused[-4] >= FILES


def test_a_backup_after_a_stopped_one_stores_only_what_was_not_finished(
    scene: Scene,
) -> None:
    sealed = 0

    def on_step(step: str) -> None:
        nonlocal sealed
        sealed += step == "rename packs"
        if sealed == 4 and step == "data packs":
            raise Crash

    with pytest.raises(Crash):
        scene.back_up(on_step)
    stored = {path: path.stat().st_mtime_ns for path in pack_paths(scene.root)}
    assert len(stored) == 1 + 4
    stats = scene.back_up()
    assert stats.new_plain_bytes < FILES * FILE_BYTES
    assert stored.items() <= {p: p.stat().st_mtime_ns for p in pack_paths(scene.root)}.items()


BACKUP = """
import sys
from pathlib import Path
from casfs.backup.run import BackupOptions, run_backup
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_writing

with open_for_writing(Path(sys.argv[1]), "backup", OpenOptions(sync=False)) as repository:
    print("open", flush=True)
    sys.stdin.readline()
    options = BackupOptions((sys.argv[2].encode(),), host=sys.argv[3])
    run_backup(repository, options, RecordingMonitor())
print("done", flush=True)
"""


def test_two_concurrent_backups_both_publish_complete_snapshots(
    scene: Scene, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(scene.source, other)
    (other / "own").write_bytes(noise("own", 300 * KIB))
    with (
        child(BACKUP, scene.root, scene.source, "first") as first,
        child(BACKUP, scene.root, other, "second") as second,
    ):
        assert (read_line(first), read_line(second)) == ("open", "open")
        assert len(os.listdir(scene.root / "locks")) == 2
        write_line(first)
        write_line(second)
        assert (read_line(first), read_line(second)) == ("done", "done")
    result = scene.check()
    assert result.damage == []
    assert result.snapshots == 3
    with open_for_reading(scene.root) as repository:
        hosts = {snapshot.host for _, snapshot in repository.snapshots.iterate()}
        assert hosts == {"here", "first", "second"}
    assert os.listdir(scene.root / "tmp") == []


def test_a_new_writer_keeps_the_temporary_files_of_a_running_one(
    scene: Scene, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"small")
    with child(BACKUP, scene.root, other, "second") as second:
        assert read_line(second) == "open"
        (lock,) = (scene.root / "locks").iterdir()
        temporary = scene.root / "tmp" / f"{lock.name}.99"
        temporary.write_bytes(b"half a pack of the other")
        scene.back_up()
        assert temporary.exists()
        write_line(second)
        assert read_line(second) == "done"
    scene.back_up()
    assert not temporary.exists()
    assert scene.check().damage == []
