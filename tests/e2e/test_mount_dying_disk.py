"""A mount on a disk that fails or does not answer: only readers of that disk get an errno."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.dying_disk import Disk, build_interposer
from tests.support.mounts import is_mounted, processes_naming
from tests.support.waiting import wait_until

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module")
def interposer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_interposer(tmp_path_factory.mktemp("interposer"))


@pytest.fixture
def disk(repository: Casfs, tmp_path: Path, interposer: Path) -> Iterator[Disk]:
    disk = Disk(repository, tmp_path, interposer)
    try:
        disk.mount()
        assert disk.read("one") == disk.contents["one"]
        yield disk
    finally:
        disk.close()


def test_a_disk_read_error_reaches_the_reader_and_ends_with_the_fault(disk: Disk) -> None:
    disk.be("broken")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            disk.read("two")
    assert disk.read("one") == disk.contents["one"], "what the kernel has it keeps"
    assert sorted(os.listdir(disk.at / "tree")) == ["one", "three", "two"]
    assert "tree/two" in disk.log.read_text()
    disk.recover("broken")

    def is_back() -> bool:
        try:
            return disk.read("two") == disk.contents["two"]
        except OSError:
            return False

    wait_until(is_back, "the file is readable again")


def test_a_reader_that_waits_for_the_disk_delays_no_other(disk: Disk) -> None:
    got: list[bytes] = []
    disk.be("silent")
    readers = [threading.Thread(target=lambda: got.append(disk.read("two"))) for _ in range(12)]
    for reader in readers:
        reader.start()
    wait_until(disk.is_waiting, "a read waits for the disk")
    assert disk.read("one") == disk.contents["one"]
    assert len(os.listdir(disk.at / "tree")) == 3
    assert os.getxattr(disk.at / "tree/three", "user.casfs.capture") == b"stable"
    assert os.statvfs(disk.at).f_files >= 4
    assert got == []
    disk.recover("silent")
    for reader in readers:
        reader.join(60)
    assert got == [disk.contents["two"]] * 12


def test_a_reader_that_waits_for_the_disk_can_be_killed(disk: Disk) -> None:
    disk.be("silent")
    reader = subprocess.Popen(["cat", str(disk.at / "tree/two")], stdout=subprocess.DEVNULL)
    wait_until(disk.is_waiting, "it waits for the disk")
    reader.kill()
    assert reader.wait(60) == -9, "while the disk is still silent"
    assert disk.read("one") == disk.contents["one"]
    disk.recover("silent")
    assert disk.read("two") == disk.contents["two"]


def test_a_signal_ends_the_mount_while_the_disk_is_silent(disk: Disk) -> None:
    disk.be("silent")
    reader = subprocess.Popen(
        ["cat", str(disk.at / "tree/two")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_until(disk.is_waiting, "it waits for the disk")
    os.kill(disk.server, 15)
    wait_until(lambda: not is_mounted(disk.at), "it is unmounted")
    _, printed = reader.communicate(timeout=60)
    assert reader.returncode == 1
    assert printed
    wait_until(lambda: not processes_naming(disk.at), "and the server is gone")
