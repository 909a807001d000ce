"""A full disk ends a command clearly, and nothing that was there is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.comparing import tree_differences
from tests.support.mounts import small_disk

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("superuser")


def test_a_full_disk_ends_a_backup_clearly_and_loses_nothing(
    casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    heavy = tmp_path / "heavy"
    heavy.mkdir()
    with (heavy / "random").open("wb") as file:
        for _ in range(96):
            file.write(os.urandom(MIB))
    with small_disk(tmp_path, 64 * MIB) as disk:
        small = casfs.at(disk / "repository").init()
        kept = small.backup(source)["id"]
        for _ in range(2):
            result = small.run("backup", heavy, expect=1)
            assert "no space left" in result.complaint.lower(), result
            assert len(result.complaints) == 1, result
        reported = small.json("backup", heavy, expect=1)
        assert reported.one("error")["exit"] == 1
        assert reported.of_type("snapshot") == []
        assert small.json("snapshots").one("snapshot")["id"] == kept
        assert small.json("check", "--read-data").one("summary")["ok"] is True
        small.run("restore", "latest", "--target", tmp_path / "target")
        restored = tmp_path / "target" / str(source).lstrip("/")
        assert tree_differences(source, restored) == []
        # What did not come to an end takes no room: something small fits again.
        (source / "one more").write_bytes(os.urandom(MIB))
        small.backup(source)
        assert small.json("check", "--read-data").one("summary")["ok"] is True


def test_a_full_disk_to_the_last_byte_still_lets_everything_be_read(
    casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path, 32 * MIB) as disk:
        small = casfs.at(disk / "repository").init()
        small.backup(source)
        _fill(disk / "ballast")
        result = small.run("backup", tmp_path / "home", expect=1)
        assert "no space left" in result.complaint.lower(), result
        small.run("snapshots")
        small.run("ls", "latest")
        assert small.json("check", "--read-data").one("summary")["ok"] is True
        small.run("restore", "latest", "--target", tmp_path / "target")
        restored = tmp_path / "target" / str(source).lstrip("/")
        assert tree_differences(source, restored) == []
        (disk / "ballast").unlink()
        small.backup(source)
        assert small.json("check", "--read-data").one("summary")["ok"] is True


def test_a_full_disk_ends_init_clearly_and_init_can_be_tried_again(
    casfs: Casfs, tmp_path: Path
) -> None:
    with small_disk(tmp_path, 16 * MIB) as disk:
        _fill(disk / "ballast")
        small = casfs.at(disk / "repository")
        result = small.run("init", expect=1)
        assert "no space left" in result.complaint.lower(), result
        (disk / "ballast").unlink()
        small.init()


def test_a_full_disk_ends_a_restore_clearly_and_leaves_no_half_file(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    (source / "big").write_bytes(os.urandom(24 * MIB))
    repository.backup(source)
    with small_disk(tmp_path, 16 * MIB) as disk:
        result = repository.run("restore", "latest", "--target", disk / "target", expect=1)
        assert "no space left" in result.complaint.lower(), result
        restored = disk / "target" / str(source).lstrip("/")
        assert f"{restored / 'big'}: " in result.complaint
        assert not (restored / "big").exists()
        for file in restored.rglob("*"):
            if file.is_file() and not file.is_symlink():
                original = source / file.relative_to(restored)
                assert file.read_bytes() == original.read_bytes()


def _fill(ballast: Path) -> None:
    """Write until nothing more fits, not even one byte."""
    handle = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    os.write(handle, bytes(size))
            except OSError as error:
                assert "No space left" in str(error)
        os.fsync(handle)
    finally:
        os.close(handle)


def test_a_full_disk_to_the_last_byte_is_freed_by_forgetting_and_pruning(
    casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path, 64 * MIB) as disk:
        small = casfs.at(disk / "repository").init()
        (source / "bulk").write_bytes(os.urandom(12 * MIB))
        small.backup(source)
        (source / "bulk").unlink()
        (source / "other").write_bytes(os.urandom(4 * MIB))
        small.backup(source)
        _fill(disk / "ballast")
        small.run("backup", tmp_path / "home", expect=1)
        small.run("forget", "--keep-last", "1")
        _fill(disk / "more ballast")
        assert small.json("prune").one("prune")["freed_bytes"] > 10 * MIB
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 8 * MIB
        assert small.json("check", "--read-data").one("summary")["ok"] is True
        small.run("restore", f"latest:{source}", "--target", tmp_path / "target")
        assert tree_differences(source, tmp_path / "target") == []
        small.backup(source)
        assert (disk / "repository" / "reserve").stat().st_size == MIB
