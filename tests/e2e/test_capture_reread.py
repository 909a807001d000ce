"""Rot on a real disk: bytes that go bad behind the back of the file system, and `backup --reread`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3

from tests.e2e.test_incremental import settle
from tests.support.cli import Casfs
from tests.support.loop_devices import MIB, fresh_disk

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("disks")]

GOOD = b"a very good sentence that stands nowhere else on this disk"


@dataclass(frozen=True, slots=True)
class RottingDisk:
    folder: Path
    image: Path

    def rot(self) -> None:
        """Change a byte of the file where it lies on the disk."""
        device = subprocess.run(
            ["findmnt", "-no", "SOURCE", str(self.folder)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        subprocess.run(["umount", str(self.folder)], check=True)
        data = self.image.read_bytes()
        assert data.count(GOOD) == 1
        with self.image.open("r+b") as disk:
            disk.seek(data.index(GOOD))
            disk.write(GOOD.replace(b"good", b"goad"))
        assert device.startswith("/dev/loop")
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[RottingDisk]:
    with fresh_disk(tmp_path, "ext4", 32 * MIB) as folder:
        (folder / "sound").write_bytes(b"sound")
        (folder / "sentence").write_bytes(b"x" * 50_000 + GOOD)
        settle(folder)
        os.sync()
        yield RottingDisk(folder, tmp_path / "ext4.img")


def test_silent_corruption_is_found_only_by_rereading_and_both_versions_are_kept(
    repository: Casfs, disk: RottingDisk, tmp_path: Path
) -> None:
    first = repository.backup(disk.folder)
    before = (disk.folder / "sentence").stat()
    disk.rot()
    after = (disk.folder / "sentence").stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
        *(before.st_size, before.st_mtime_ns),
        before.st_ctime_ns,
    )
    blind = repository.backup(disk.folder)
    assert (blind["unchanged"], blind["silently_changed"]) == (2, 0)

    result = repository.json("backup", "--reread", disk.folder, expect=4)
    (problem,) = result.of_type("problem")
    assert problem["kind"] == "silently changed"
    assert problem["path"].endswith("/sentence")
    rotten = (disk.folder / "sentence").read_bytes()
    assert b"goad" in rotten
    assert problem["captured"] == blake3(rotten).hexdigest()
    assert problem["previous"] == blake3(b"x" * 50_000 + GOOD).hexdigest()
    snapshot = result.one("snapshot")
    found = (snapshot["unchanged"], snapshot["silently_changed"], snapshot["flagged"])
    assert found == (1, 1, 0)

    place = (disk.folder / "sentence").relative_to("/")
    for identity, expected in ((first["id"], GOOD), (snapshot["id"], b"goad")):
        target = tmp_path / identity[:8]
        repository.run("restore", identity, "--target", target)
        assert expected in (target / place).read_bytes()
    repository.backup("--reread", disk.folder)


def test_a_reread_prints_silent_changes_and_changed_ok_accepts_them(
    repository: Casfs, disk: RottingDisk
) -> None:
    repository.backup(disk.folder)
    disk.rot()
    dry = repository.run("backup", "--reread", "--dry-run", disk.folder, expect=4)
    assert "sentence" in dry.complaint
    result = repository.run("backup", "--reread", "--changed-ok", disk.folder)
    (sentence,) = result.complaints
    assert "sentence" in sentence and "size, mtime and ctime" in sentence
    assert "1 file changed although" in result.text
