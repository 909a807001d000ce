"""Targets that hold other things, merge names, make no links or nest deeply: nothing is lost in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casfs.monitor import Problem, ProblemKind, RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.restore import temporary_entries
from casfs.restore.entry_writer import Overwrite
from casfs.restore.restorer import RestoreOptions, Restorer, RestoreResult
from tests.support.capturing import BackupFixture, PublishedBackup
from tests.support.loop_devices import fresh_disk
from tests.support.mounts import tmpfs


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did and reported."""

    result: RestoreResult
    problems: list[Problem]
    deleted: list[bytes]


def restore(found: PublishedBackup, target: Path, path: str = "", **options: Any) -> Restored:
    """Restore as the command does: the paths of the snapshot are the sources."""
    monitor = RecordingMonitor()
    deleted: list[bytes] = []
    snapshot = found.result.snapshot
    restorer = Restorer(
        found.repository,
        RestoreOptions(sources=snapshot.paths, **options),
        monitor,
        on_deleted=deleted.append,
    )
    node = found.repository.trees.resolve(snapshot.root, os.fsencode(path))
    assert node is not None
    with_root = bool(path) or snapshot.paths in ((b".",), (b"/",))
    result = restorer.restore(os.fsencode(path), node, os.fsencode(target), with_root)
    return Restored(result, monitor.problems, deleted)


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with documents, which are backed up, and photos, which are not."""
    top = tmp_path / "top"
    (top / "documents/old").mkdir(parents=True)
    (top / "documents/letter").write_text("kept")
    (top / "photos").mkdir()
    (top / "photos/cat").write_text("never backed up")
    monkeypatch.chdir(top)
    return top


class TestDelete:
    def test_restore_deletes_nothing_beside_a_source(
        self, backups: BackupFixture, top: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        (top / "documents/new").write_text("since then")
        (top / "documents/folder").mkdir()
        dry = restore(found, top, delete=True, dry_run=True)
        assert sorted(dry.deleted) == [b"documents/folder/", b"documents/new"]
        done = restore(found, top, delete=True)
        assert sorted(done.deleted) == sorted(dry.deleted) and done.result.deleted == 2
        assert (top / "photos/cat").read_text() == "never backed up"
        assert sorted(os.listdir(top / "documents")) == ["letter", "old"]

    def test_restore_of_an_absolute_source_deletes_nothing_above_it(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        found = backups.back_up(top / "documents")
        copy = tmp_path / "root"
        beside = copy / str(tmp_path).lstrip("/") / "usr"
        beside.mkdir(parents=True)
        (beside / "program").touch()
        done = restore(found, copy, delete=True)
        assert done.deleted == [] and (beside / "program").exists()
        for above in (str(tmp_path).lstrip("/"), str(top).lstrip("/")):
            assert restore(found, copy / above, above, delete=True).deleted == []

    def test_restore_deletes_nothing_on_another_file_system(
        self, backups: BackupFixture, top: Path
    ) -> None:
        (top / "documents/mounted").mkdir()
        found = backups.back_up(Path("documents"))
        (top / "documents/extra/inside").mkdir(parents=True)
        with (
            tmpfs(top / "documents/mounted") as first,
            tmpfs(top / "documents/extra/inside") as second,
        ):
            for mounted in (first, second):
                (mounted / "other").write_text("of another file system")
            done = restore(found, top, delete=True)
            for mounted in (first, second):
                assert (mounted / "other").read_text() == "of another file system"
        assert [problem.path for problem in done.problems] == [b"documents/extra"]
        assert "another file system" in done.problems[0].message
        assert done.deleted == []

    def test_restore_lists_a_folder_that_it_replaces_by_a_file(
        self, backups: BackupFixture, top: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        (top / "documents/letter").unlink()
        (top / "documents/letter/inside").mkdir(parents=True)
        done = restore(found, top, delete=True)
        assert done.deleted == [b"documents/letter/"]
        assert (top / "documents/letter").read_text() == "kept"

    def test_restore_keeps_excluded_entries_in_directories_that_the_snapshot_lacks(
        self, backups: BackupFixture, top: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        new = top / "documents/new"
        for name in ("a.log", "a.txt", "deep/b.log", "deep/b.txt", "gone/c.txt", "logs/d.txt"):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(name)
        os.symlink("a.log", new / "link")
        (new / "deep").chmod(0o550)
        exclude = (parse_pattern(b"*.log"), parse_pattern(b"logs/"))
        dry = restore(found, top, delete=True, exclude=exclude, dry_run=True)
        assert (new / "gone/c.txt").exists()
        done = restore(found, top, delete=True, exclude=exclude)
        below = [b"a.txt", b"deep/b.txt", b"gone/", b"gone/c.txt", b"link"]
        assert sorted(done.deleted) == [b"documents/new/" + path for path in below]
        assert sorted(dry.deleted) == sorted(done.deleted)
        left = sorted(str(path.relative_to(new)) for path in new.rglob("*") if not path.is_dir())
        assert left == ["a.log", "deep/b.log", "logs/d.txt"]
        assert (new / "deep").stat().st_mode & 0o777 == 0o550
        assert done.result.deleted == len(below)

    def test_restore_replaces_no_directory_that_holds_excluded_entries(
        self, backups: BackupFixture, top: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        (top / "documents/letter").unlink()
        (top / "documents/letter/inside").mkdir(parents=True)
        (top / "documents/letter/inside/a.log").touch()
        exclude = (parse_pattern(b"*.log"),)
        for dry_run in (True, False):
            done = restore(found, top, delete=True, exclude=exclude, dry_run=dry_run)
            assert [problem.path for problem in done.problems] == [b"documents/letter"]
            assert "excluded" in done.problems[0].message
            assert done.deleted == [] and done.result.failed == 1
        assert (top / "documents/letter/inside/a.log").exists()

    def test_restore_keeps_other_file_systems_beside_excluded_entries(
        self, backups: BackupFixture, top: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        (top / "documents/extra/inside").mkdir(parents=True)
        (top / "documents/extra/file").touch()
        with tmpfs(top / "documents/extra/inside") as mounted:
            (mounted / "other").touch()
            exclude = (parse_pattern(b"*.log"),)
            done = restore(found, top, delete=True, exclude=exclude)
            assert (mounted / "other").exists()
        assert done.deleted == [b"documents/extra/file"]

    @pytest.mark.parametrize("depth", [1, 3000])
    def test_restore_deletes_directories_however_deep(
        self, backups: BackupFixture, top: Path, depth: int
    ) -> None:
        found = backups.back_up(Path("documents"))
        fd = os.open(top / "documents", os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("d" * 9, 0o500, dir_fd=fd)
            above, fd = fd, os.open("d" * 9, os.O_RDONLY, dir_fd=fd)
            os.close(above)
        os.close(fd)
        done = restore(found, top, delete=True)
        assert done.deleted == [b"documents/" + b"d" * 9 + b"/"] and done.problems == []
        assert sorted(os.listdir(top / "documents")) == ["letter", "old"]

    def test_restore_creates_a_target_however_deep(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        target = Path(*["d"] * 1500)
        restore(found, target)
        assert (target / "documents/letter").read_text() == "kept"
        subprocess.run(["rm", "-r", "d"], check=True)  # pytest cannot


class TestUntouchedDirectories:
    def test_restore_of_one_file_leaves_the_target_as_it_is(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        os.chmod(top / "documents", 0o711)
        found = backups.back_up(Path("documents"))
        target = tmp_path / "target"
        target.mkdir(mode=0o750)
        os.utime(target, ns=(5, 5))
        restore(found, target, "documents", include=(parse_pattern(b"letter"),))
        assert (target / "letter").exists()
        assert target.stat().st_mode & 0o777 == 0o750

    def test_directories_that_only_lead_to_a_source_keep_their_metadata(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        found = backups.back_up(top / "documents")
        copy = tmp_path / "root"
        above = copy / str(top).lstrip("/")
        above.mkdir(parents=True)
        os.chmod(above, 0o701)
        os.chmod(above.parent, 0o702)
        restore(found, copy)
        assert (above / "documents/letter").exists()
        assert above.stat().st_mode & 0o777 == 0o701
        assert above.parent.stat().st_mode & 0o777 == 0o702

    def test_restore_that_overwrites_nothing_leaves_existing_directories_as_they_are(
        self, backups: BackupFixture, top: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        (top / "documents/letter").unlink()
        os.chmod(top / "documents", 0o705)
        restore(found, top, overwrite=Overwrite.NEVER)
        assert (top / "documents/letter").read_text() == "kept"
        assert (top / "documents").stat().st_mode & 0o777 == 0o705

    def test_restore_if_changed_keeps_the_ctime_of_everything_unchanged(
        self, backups: BackupFixture, top: Path
    ) -> None:
        os.symlink("letter", "documents/link")
        os.mkfifo("documents/fifo")
        os.link("documents/letter", "documents/other name")
        os.setxattr("documents/letter", "user.a", b"b")
        found = backups.back_up(Path("documents"))
        paths = [top / "documents", *(top / "documents").iterdir()]
        before = [(path.lstat().st_ctime_ns, path.lstat().st_ino) for path in paths]
        restore(found, top, overwrite=Overwrite.IF_CHANGED)
        assert [(path.lstat().st_ctime_ns, path.lstat().st_ino) for path in paths] == before


class TestMergedNames:
    def test_a_name_that_the_target_takes_for_another_is_refused_and_reported(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        for name in ("File", "file", "FILE"):
            (top / "documents" / name).write_text(name)
        for name in ("Folder", "folder"):
            (top / "documents" / name).mkdir()
            (top / "documents" / name / "inside").write_text(name)
        found = backups.back_up(Path("documents"))
        with fresh_disk(tmp_path, "exfat", 64 << 20) as disk:
            done = restore(found, disk, verify=True)
            refused = {
                problem.path for problem in done.problems if problem.kind == ProblemKind.UNREADABLE
            }
            assert refused == {b"documents/File", b"documents/file", b"documents/folder"}
            assert done.result.failed == 3
            assert (disk / "documents/file").read_text() == "FILE"
            assert (disk / "documents/folder/inside").read_text() == "Folder"
            assert (disk / "documents/letter").read_text() == "kept"

    def test_restore_with_delete_keeps_a_file_that_the_target_shows_under_another_case(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        (top / "documents/Name").write_text("restored")
        found = backups.back_up(Path("documents"))
        with fresh_disk(tmp_path, "exfat", 64 << 20) as disk:
            (disk / "documents").mkdir()
            (disk / "documents/NAME").write_text("old")
            done = restore(found, disk, delete=True)
            assert done.deleted == []
            assert (disk / "documents/Name").read_text() == "restored"

    def test_names_that_differ_in_case_are_all_restored_where_the_target_tells_them_apart(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        for name in ("File", "file", "FILE", "e\u0301", "\u00e9"):
            (top / "documents" / name).write_text(name)
        found = backups.back_up(Path("documents"))
        done = restore(found, tmp_path / "target")
        assert done.problems == []
        for name in ("File", "file", "FILE", "e\u0301", "\u00e9"):
            assert (tmp_path / "target/documents" / name).read_text() == name


class TestHardLinks:
    def test_names_beyond_the_longest_path_are_restored_as_hard_links(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        fd = os.open(top / "documents", os.O_RDONLY)
        for _ in range(25):
            os.mkdir("d" * 200, dir_fd=fd)
            above, fd = fd, os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
            os.close(above)
        os.close(os.open("one", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.link("one", "two", src_dir_fd=fd, dst_dir_fd=fd)
        os.close(fd)
        found = backups.back_up(Path("documents"))
        target = tmp_path / "target"
        done = restore(found, target)
        assert done.problems == []
        fd = os.open(target / "documents", os.O_RDONLY)
        for _ in range(25):
            above, fd = fd, os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
            os.close(above)
        stats = [os.stat(name, dir_fd=fd) for name in ("one", "two")]
        os.close(fd)
        assert os.path.samestat(*stats) and stats[0].st_nlink == 2

    def test_a_link_that_the_target_cannot_make_is_reported_and_copied(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        os.link("documents/letter", "documents/other name")
        found = backups.back_up(Path("documents"))
        with fresh_disk(tmp_path, "exfat", 64 << 20) as disk:
            done = restore(found, disk)
            (problem,) = [p for p in done.problems if "hard link" in p.message]
            assert problem.path == b"documents/other name"
            assert (disk / "documents/letter").read_text() == "kept"
            assert (disk / "documents/other name").read_text() == "kept"


class TestAbandonedFiles:
    def _temporary(self) -> bytes:
        """Return a temporary name of a process that has ended."""
        program = (
            "from casfs.restore.temporary_entries import temporary_name; "
            "print(temporary_name().decode())"
        )
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        return done.stdout.strip()

    def test_files_that_a_killed_restore_left_are_removed_by_the_next_one(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        target = tmp_path / "target"
        restore(found, target)
        left = [
            target / os.fsdecode(self._temporary()),
            target / "documents" / os.fsdecode(self._temporary()),
        ]
        for path in left:
            path.write_text("half a file")
        done = restore(found, target, delete=True)
        assert not any(path.exists() for path in left)
        assert done.deleted == [] and done.problems == []

    def test_files_of_a_restore_that_is_at_work_are_kept(
        self, backups: BackupFixture, top: Path, tmp_path: Path
    ) -> None:
        found = backups.back_up(Path("documents"))
        target = tmp_path / "target"
        restore(found, target)
        kept = [
            temporary_entries.temporary_name(),
            temporary_entries.TEMPORARY_PREFIX + b"1" * 16 + b"-1-1-1",
        ]
        for name in kept:
            (target / "documents" / os.fsdecode(name)).write_text("being written")
        assert restore(found, target, delete=True).deleted == []
        for name in kept:
            assert (target / "documents" / os.fsdecode(name)).exists()
