"""Files of a real disk that change at an exact read: holes, mappings, links and many directories."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.backup import source_fs
from casfs.format.tree import CaptureState, ChangeReason, Node, capture_of, captured_digest
from tests.support.capturing import BackupFixture, PublishedBackup
from tests.support.read_hooks import Reads
from tests.support.scripted_source import content

pytestmark = pytest.mark.usefixtures("no_pauses")

MIB = 1 << 20
PAGE = mmap.PAGESIZE


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def settle(*files: Path) -> None:
    """Wait until the clock has passed the files' timestamps, so that none is too young to be trusted."""
    newest = max(file.stat().st_ctime_ns for file in files)
    while time.time_ns() < newest + 60_000_000:
        time.sleep(0.01)


def found(node: Node) -> tuple[CaptureState, ChangeReason, int]:
    """Return state, reason and attempts."""
    evidence = capture_of(node)
    if evidence is None:
        return CaptureState(node.state), ChangeReason.NONE, 1
    return CaptureState(node.state), ChangeReason(evidence.reason), evidence.attempts


def write_at(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


class TestSparseFile:
    """Data, a hole of 5 MiB, data, and a hole of 1 MiB at the end."""

    HEAD, GAP, TAIL, END = 300_000 // PAGE * PAGE, 5 * MIB, 300_000 // PAGE * PAGE, MIB

    @pytest.fixture
    def sparse(self, source: Path) -> Path:
        file = source / "sparse"
        with file.open("wb") as opened:
            opened.write(content("head", self.HEAD))
            opened.seek(self.GAP, os.SEEK_CUR)
            opened.write(content("tail", self.TAIL))
            opened.truncate(opened.tell() + self.END)
        assert file.stat().st_blocks * 512 < MIB, "this file system knows no holes"
        settle(file)
        return file

    def last_read(self, reads: Reads, backups: BackupFixture, sparse: Path) -> int:
        """Return the number of the last read of an undisturbed capture."""
        reads.watch(sparse, lambda _: None)
        backups.back_up(sparse, use_parent=False)
        return reads.count(sparse)

    @pytest.mark.parametrize("when", ["before", "between", "last", "witness"])
    @pytest.mark.parametrize(
        "change", ["fill the gap", "punch the head", "cut in the gap", "cut in the end", "append"]
    )
    def test_a_changing_sparse_file_is_restored_as_it_was_at_one_moment(
        self,
        reads: Reads,
        backups: BackupFixture,
        tmp_path: Path,
        sparse: Path,
        change: str,
        when: str,
    ) -> None:
        old, size = sparse.read_bytes(), sparse.stat().st_size
        last = self.last_read(reads, backups, sparse)
        number = {"before": 1, "between": last // 2 + 1, "last": last, "witness": last + 1}[when]

        def act() -> None:
            if change == "fill the gap":
                write_at(sparse, self.HEAD + 2 * MIB, content("filled", 200_000))
            elif change == "punch the head":
                punch(sparse, PAGE, 20 * PAGE)
            elif change == "append":
                write_at(sparse, size, b"more")
            else:
                gap = change == "cut in the gap"
                os.truncate(sparse, self.HEAD + MIB if gap else size - MIB // 2)

        def act_at(count: int) -> None:
            if when == "witness" and count == last:
                sparse.touch()
            if count == number:
                act()

        reads.watch(sparse, act_at)
        backup = backups.back_up(sparse, use_parent=False)
        node = backup.file(sparse)
        now = sparse.read_bytes()
        restored = backup.restore(tmp_path / "target") / sparse.relative_to("/")
        data = restored.read_bytes()
        if change == "append":
            held_still = when == "witness"
            assert node.state == (CaptureState.STABLE if held_still else CaptureState.APPENDED)
            assert data == old
        else:
            assert node.state == CaptureState.STABLE
            assert data in (old, now)
        assert backup.flagged == 0
        assert restored.stat().st_blocks * 512 < 2 * MIB, "its holes are no longer holes"
        backups.assert_is_intact()

    def test_a_sparse_file_that_changes_at_every_read_is_flagged(
        self, reads: Reads, backups: BackupFixture, sparse: Path
    ) -> None:
        def fill(count: int) -> None:
            write_at(sparse, self.HEAD + 2 * MIB, content(f"filled {count}", 200_000))
            write_at(sparse, 0, content(f"head {count}", 1000))

        reads.watch(sparse, fill)
        backup = backups.back_up(sparse)
        state, reason, attempts = found(backup.file(sparse))
        assert (state, reason, attempts) == (CaptureState.CHANGED, ChangeReason.REWRITTEN, 4)
        assert (backup.flagged, backup.exit) == (1, 4)
        backups.assert_is_intact()


def punch(file: Path, offset: int, length: int) -> None:
    """Make a hole in a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_and_punch = 1 | 2
    with file.open("r+b") as opened:
        done = libc.fallocate(
            opened.fileno(),
            keep_size_and_punch,
            ctypes.c_int64(offset),
            ctypes.c_int64(length),
        )
    assert done == 0, os.strerror(ctypes.get_errno())


@dataclass(frozen=True, slots=True)
class Mapped:
    file: Path
    pages: mmap.mmap

    def store(self, text: bytes) -> None:
        """Write to the first and to the last page."""
        self.pages[: len(text)] = text
        self.pages[-len(text) :] = text


@contextmanager
def mapping(file: Path) -> Iterator[Mapped]:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as pages:
        yield Mapped(file, pages)


def kind_of_disk(folder: Path) -> str:
    """Return the kind of the file system that a folder is on."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[2] == wanted:
            return after.split(" ")[0]
    return "unknown"


class TestMappedFile:
    """A store to a page that is dirty already moves no timestamp: the pages have to be clean first."""

    @pytest.fixture
    def mapped(self, source: Path) -> Iterator[Mapped]:
        if kind_of_disk(source) == "tmpfs":
            pytest.skip("tmpfs never stamps a file for a store through a mapping")
        file = source / "mapped"
        file.write_bytes(content("old", MIB))
        with mapping(file) as found:
            found.pages.flush()
            yield found

    @pytest.mark.parametrize("pages", ["clean", "dirty"])
    def test_a_mapped_file_stored_to_between_reads_is_captured_again(
        self, reads: Reads, backups: BackupFixture, tmp_path: Path, mapped: Mapped, pages: str
    ) -> None:
        if pages == "dirty":
            mapped.store(b"dirty")
        settle(mapped.file)
        times = mapped.file.stat().st_ctime_ns
        reads.before(mapped.file, 5, lambda: mapped.store(b"changed"))
        backup = backups.back_up(mapped.file)
        assert mapped.file.stat().st_ctime_ns > times
        assert found(backup.file(mapped.file)) == (CaptureState.STABLE, ChangeReason.REWRITTEN, 2)
        restored = backup.restore(tmp_path / "target") / mapped.file.relative_to("/")
        assert restored.read_bytes() == bytes(mapped.pages)

    def test_a_mapped_file_with_dirty_pages_would_hide_a_mixture(
        self, reads: Reads, backups: BackupFixture, mapped: Mapped, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Shows that the test above tests what it says, on this kernel and file system."""
        monkeypatch.setattr(source_fs, "start_writeback", lambda fd: None)
        mapped.store(b"dirty")
        settle(mapped.file)
        reads.before(mapped.file, 5, lambda: mapped.store(b"changed"))
        node = backups.back_up(mapped.file).file(mapped.file)
        assert found(node) == (CaptureState.STABLE, ChangeReason.NONE, 1)

    def test_a_mapped_file_stored_to_at_every_read_is_flagged(
        self, reads: Reads, backups: BackupFixture, mapped: Mapped
    ) -> None:
        settle(mapped.file)
        reads.watch(mapped.file, lambda count: mapped.store(b"%08d" % count))
        backup = backups.back_up(mapped.file)
        assert found(backup.file(mapped.file)) == (CaptureState.CHANGED, ChangeReason.REWRITTEN, 4)
        assert backup.exit == 4

    def test_a_mapped_file_stored_to_after_its_capture_is_read_by_the_next_backup(
        self, backups: BackupFixture, mapped: Mapped
    ) -> None:
        mapped.store(b"dirty")
        settle(mapped.file)
        first = backups.back_up(mapped.file)
        assert found(first.file(mapped.file)) == (CaptureState.STABLE, ChangeReason.NONE, 1)
        mapped.store(b"later")
        second = backups.back_up(mapped.file)
        assert second.result.snapshot.stats.unchanged == 0
        nodes = first.file(mapped.file), second.file(mapped.file)
        assert captured_digest(nodes[0]) != captured_digest(nodes[1])


def restless(reads: Reads, file: Path, readings: int) -> None:
    """Rewrite a file in the middle of its next reads, witness reads included."""

    def act(count: int) -> None:
        steps = -(-file.stat().st_size // (64 * 1024))
        if count % steps == 3 and count // steps < readings:
            write_at(file, 0, content(f"version {count}", 1000))
            write_at(file, file.stat().st_size - 1000, content(f"version {count}", 1000))

    reads.watch(file, act)


class TestFinalRetryOnDisk:
    """Three attempts with a witness each are six readings; the seventh is the last look."""

    def make(self, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / name
        file.write_bytes(content(str(file), 5 * 64 * 1024 + 300_000 % 64))
        return file

    def assert_is_as_now(self, backup: PublishedBackup, restored: Path, file: Path) -> None:
        assert found(backup.file(file)) == (CaptureState.STABLE, ChangeReason.REWRITTEN, 4)
        assert (restored / file.relative_to("/")).read_bytes() == file.read_bytes()

    def test_the_final_retry_rewrites_only_the_trees_above_the_files(
        self, reads: Reads, backups: BackupFixture, tmp_path: Path, source: Path
    ) -> None:
        files = [
            self.make(source / "a" / "deep" / "way" / "down", "file"),
            self.make(source / "a" / "deep", "file"),
            self.make(source / "b", "file"),
        ]
        calm = self.make(source / "calm", "file")
        never = self.make(source / "z", "never")
        settle(*files, calm, never)
        for file in files:
            restless(reads, file, 6)
        restless(reads, never, 100)
        backup = backups.back_up(source)
        restored = backup.restore(tmp_path / "target")
        for file in files:
            self.assert_is_as_now(backup, restored, file)
        assert found(backup.file(calm)) == (CaptureState.STABLE, ChangeReason.NONE, 1)
        assert found(backup.file(never)) == (CaptureState.CHANGED, ChangeReason.REWRITTEN, 4)
        assert backup.flagged == 1
        assert backup.file(source / "a").tree is not None
        flagged = {
            name: tree.flagged
            for name in "abz"
            if (tree := backup.file(source / name).tree) is not None
        }
        assert flagged == {"a": 0, "b": 0, "z": 1}
        backups.assert_is_intact()

    def test_the_final_retry_finds_files_of_several_sources(
        self,
        reads: Reads,
        backups: BackupFixture,
        tmp_path: Path,
        source: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        files = [
            self.make(source / "one", "file"),
            self.make(source / "two" / "three", "file"),
            self.make(source / "two" / "named", "file"),
        ]
        settle(*files)
        for file in files:
            restless(reads, file, 6)
        monkeypatch.chdir(source)
        backup = backups.back_up(Path("one"), Path("two/three"), Path("two/named/file"))
        for file in files:
            relative = Path(file.relative_to(source))
            assert found(backup.file(relative)) == (CaptureState.STABLE, ChangeReason.REWRITTEN, 4)
        restored = backup.restore(tmp_path / "target")
        for file in files:
            assert (restored / file.relative_to(source)).read_bytes() == file.read_bytes()
        assert backup.flagged == 0

    def test_the_final_retry_finds_a_file_in_a_split_directory(
        self, reads: Reads, backups: BackupFixture, tmp_path: Path, source: Path
    ) -> None:
        for number in range(6000):
            (source / f"entry {number:05d}").touch()
        file = self.make(source, "entry 03000 and a half")
        settle(file)
        restless(reads, file, 6)
        backup = backups.back_up(source)
        node = backup.file(source)
        assert node.tree is not None and node.tree.nodes == 6001
        assert backups.repository.trees.unsplit_entries(node.tree) is None, "it was not split"
        self.assert_is_as_now(backup, backup.restore(tmp_path / "target"), file)
        backups.assert_is_intact()

    def test_the_final_retry_captures_all_names_of_a_file_alike(
        self, reads: Reads, backups: BackupFixture, tmp_path: Path, source: Path
    ) -> None:
        file = self.make(source / "a", "name")
        other = source / "b" / "other name"
        other.parent.mkdir()
        other.hardlink_to(file)
        settle(file)
        restless(reads, file, 12)
        backup = backups.back_up(source)
        assert backup.flagged == 0
        nodes = backup.file(file), backup.file(other)
        assert captured_digest(nodes[0]) == captured_digest(nodes[1])
        restored = backup.restore(tmp_path / "target")
        names = [restored / path.relative_to("/") for path in (file, other)]
        assert names[0].samefile(names[1])
        assert names[0].read_bytes() == file.read_bytes()

    def test_the_final_retry_skips_a_directory_that_was_replaced(
        self, reads: Reads, backups: BackupFixture, source: Path
    ) -> None:
        file = self.make(source / "folder", "file")
        last = self.make(source, "later")
        settle(file, last)
        restless(reads, file, 6)

        def replace_the_folder() -> None:
            (source / "folder").rename(source / "zzz")
            self.make(source / "folder", "file")

        reads.before(last, 1, replace_the_folder)
        backup = backups.back_up(source)
        assert found(backup.file(file)) == (CaptureState.CHANGED, ChangeReason.REWRITTEN, 3)
        assert backup.exit == 4


class TestRemovedNames:
    def test_a_directory_removed_around_an_open_file_loses_nothing_that_was_read(
        self, reads: Reads, backups: BackupFixture, source: Path
    ) -> None:
        file = source / "folder" / "file"
        file.parent.mkdir()
        file.write_bytes(content("old", 300_000))
        settle(file)

        def remove() -> None:
            file.unlink()
            file.parent.rmdir()

        reads.before(file, 2, remove)
        backup = backups.back_up(source)
        assert found(backup.file(file)) == (CaptureState.STABLE, ChangeReason.VANISHED, 1)
        assert backup.file(file).nlink == 1
        assert backup.exit == 0
        assert backup.result.snapshot.stats.vanished == 1

    def test_a_file_that_loses_a_name_is_stable_under_the_other(
        self, reads: Reads, backups: BackupFixture, source: Path
    ) -> None:
        file = source / "file"
        file.write_bytes(content("old", 300_000))
        (source / "zzz").hardlink_to(file)
        settle(file)
        reads.before(file, 2, (source / "zzz").unlink)
        backup = backups.back_up(source)
        node = backup.file(file)
        assert (found(node), node.nlink) == ((CaptureState.STABLE, ChangeReason.NONE, 1), 1)
        assert backup.result.snapshot.stats.vanished == 1, "the other name is gone"

    def test_a_leased_file_is_read_after_the_lease_is_released(
        self, backups: BackupFixture, source: Path
    ) -> None:
        """Samba takes such leases; opening without waiting is refused until they are given back."""
        file = source / "leased"
        file.write_bytes(b"leased")
        command = [sys.executable, "-c", HOLD_A_LEASE, str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            backup = backups.back_up(source)
            assert holder.wait(60) == 0, "no process asked for it back"
        assert backup.exit == 0
        assert backup.file(file).size == 6


HOLD_A_LEASE = """
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
asked = signal.sigtimedwait([signal.SIGIO], 50)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
sys.exit(asked is None)
"""
