"""Freezing on file systems that can: what is captured while a writer never stops."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup.reflink import Freeze
from casfs.format.tree import CaptureState, ChangeReason, capture_of
from casfs.monitor import ProblemKind
from tests.support.capturing import BackupFixture
from tests.support.loop_devices import MIB, endless_writer, fresh_disk, generations
from tests.support.read_hooks import Reads

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("disks")]

SIZE = 4 * MIB


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    with fresh_disk(tmp_path_factory.mktemp("disks"), request.param) as found:
        yield found


@pytest.fixture
def folder(disk: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    found = disk / f"{abs(hash(request.node.name)):x}"
    found.mkdir()
    yield found
    subprocess.run(["rm", "-rf", str(found)], check=True)


@pytest.mark.parametrize("freeze", [Freeze.AUTO, Freeze.REQUIRE])
def test_a_constantly_written_file_is_captured_as_it_was_at_one_instant(
    backups: BackupFixture, tmp_path: Path, folder: Path, freeze: Freeze
) -> None:
    file = folder / "file"
    seen = set()
    with endless_writer(file, SIZE):
        for number in range(25):
            backup = backups.back_up(folder, freeze=freeze)
            node = backup.file(file)
            assert (node.state, node.size) == (CaptureState.STABLE, SIZE)
            assert (backup.exit, backup.problems) == (0, [])
            restored = backup.restore(tmp_path / str(number)) / file.relative_to("/")
            held = generations(restored.read_bytes())
            assert len(held) == 1, "the clone is a mixture"
            seen |= held
            restored.unlink()
    assert len(seen) > 3, "the writer did not write"
    backups.assert_is_intact()


def test_a_clone_is_never_visible_and_moves_no_timestamp(
    backups: BackupFixture, folder: Path
) -> None:
    file = folder / "file"
    file.write_bytes(b"held" * MIB)
    os.utime(file, ns=(1, 2))
    before = times_of(file), times_of(folder)
    backup = backups.back_up(folder, freeze=Freeze.REQUIRE)
    assert (times_of(file), times_of(folder)) == before
    assert os.listdir(folder) == ["file"]
    node = backup.file(folder)
    assert node.tree is not None
    assert [found.name for found in backups.repository.trees.nodes(node.tree)] == [b"file"]
    assert backup.file(file).mtime_ns == 2


def test_an_old_file_that_changes_during_its_read_is_cloned(
    backups: BackupFixture, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "file"
    file.write_bytes(bytes(MIB))
    monkeypatch.setattr("casfs.backup.reflink.Reflinker.should_clone", lambda *_: False)
    reads = Reads(monkeypatch)

    def rewrite(count: int) -> None:
        file.write_bytes(count.to_bytes(8, "little") * (MIB // 8))

    reads.watch(file, rewrite)
    backup = backups.back_up(folder)
    node = backup.file(file)
    capture = capture_of(node)
    assert capture is not None
    found = (node.state, capture.reason, capture.attempts)
    assert found == (CaptureState.STABLE, ChangeReason.REWRITTEN, 2)
    restored = backup.restore(tmp_path / "target") / file.relative_to("/")
    assert restored.read_bytes() == file.read_bytes()


def test_holes_of_a_clone_are_holes(backups: BackupFixture, tmp_path: Path, folder: Path) -> None:
    file = folder / "file"
    with file.open("wb") as opened:
        opened.write(b"head" * 1000)
        opened.truncate(64 * MIB)
    backup = backups.back_up(folder, freeze=Freeze.REQUIRE)
    node = backup.file(file)
    assert (node.size, node.state) == (64 * MIB, CaptureState.STABLE)
    assert backup.result.snapshot.stats.new_plain_bytes < MIB
    restored = backup.restore(tmp_path / "target") / file.relative_to("/")
    assert restored.stat().st_blocks * 512 < MIB
    assert restored.read_bytes() == file.read_bytes()


def test_a_file_that_btrfs_never_copies_on_write_is_cloned_too(
    backups: BackupFixture, folder: Path
) -> None:
    if "btrfs" not in str(folder):
        pytest.skip("only btrfs has such files")
    file = folder / "file"
    file.touch()
    subprocess.run(["chattr", "+C", str(file)], check=True)
    file.write_bytes(b"database" * 1000)
    backup = backups.back_up(folder, freeze=Freeze.REQUIRE)
    assert (backup.exit, backup.problems) == (0, [])
    assert backup.file(file).size == 8000


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_full_disk_falls_back_quietly(backups: BackupFixture, tmp_path: Path, kind: str) -> None:
    # A disk of its own: btrfs may be full for a while after what filled it is gone.
    with fresh_disk(tmp_path, kind) as disk:
        folder = disk / "folder"
        folder.mkdir()
        file = folder / "file"
        with endless_writer(file, SIZE, 0.001):
            fill(disk / "filler")
            backup = backups.back_up(folder)
        assert backup.result.snapshot.stats.unreadable == 0
        assert backup.file(file).size == SIZE
        assert os.listdir(folder) == ["file"]


def times_of(path: Path) -> tuple[int, ...]:
    """Return the timestamps that a backup must not move; listing a folder moves its access time."""
    found = path.lstat()
    accessed_ns = found.st_atime_ns if path.is_file() else 0
    return found.st_ino, found.st_size, accessed_ns, found.st_mtime_ns, found.st_ctime_ns


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as opened:
        for size in (MIB, 4096):
            try:
                while True:
                    opened.write(bytes(size))
            except OSError:
                continue


def test_a_disk_that_is_mounted_read_only_is_read_without_clones(
    backups: BackupFixture, disk: Path, folder: Path
) -> None:
    file = folder / "file"
    file.write_bytes(b"read only" * 1000)
    subprocess.run(["sync", "-f", str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        auto = backups.back_up(folder)
        require = backups.back_up(folder, freeze=Freeze.REQUIRE, use_parent=False)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert (auto.exit, auto.problems, auto.file(file).size) == (0, [], 9000)
    problem = require.problem(file)
    assert problem is not None and problem.kind == ProblemKind.UNREADABLE
    assert "cloned" in problem.message
    assert require.exit == 3
    assert require.node(file) is None
