"""Real file systems on loop devices, and a writer that never stops."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20
SHUTDOWN = 0x8004587D
"""The ioctl by which ext4 and XFS stop at once, as if the power had failed."""

_MAKE = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q", "-m", "0"],
    "ntfs": ["mkntfs", "-q", "-F", "-Q"],
    "exfat": ["mkfs.exfat"],
}

_MOUNT = {"ntfs": ["ntfs-3g"], "exfat": ["mount", "-t", "exfat-fuse", "-o", "loop"]}
"""What mounts an image through FUSE; the kernel mounts the others."""


@contextmanager
def fresh_disk(folder: Path, kind: str, size: int = 512 * MIB) -> Iterator[Path]:
    """Mount an empty file system of a kind; mount and loop device are gone afterwards."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it mounts a disk")
    mount = _MOUNT.get(kind, ["mount", "-o", "loop"])
    helper = "mount.exfat-fuse" if kind == "exfat" else mount[0]
    for program in (_MAKE[kind][0], helper):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    image, at = folder / f"{kind}.img", folder / kind
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*_MAKE[kind], str(image)], check=True, capture_output=True)
    mounted = subprocess.run([*mount, str(image), str(at)], capture_output=True, text=True)
    assert mounted.returncode == 0, mounted.stderr
    try:
        yield at
    finally:
        for command in (["umount", str(at)], ["umount", "-l", str(at)]):
            if os.path.ismount(at):
                subprocess.run(command, capture_output=True, check=False)
        _wait_until_detached(image)
        image.unlink()


def _wait_until_detached(image: Path) -> None:
    end = time.monotonic() + 60
    while True:
        shown = subprocess.run(["losetup", "-j", str(image)], capture_output=True, check=True)
        if not shown.stdout.strip():
            return
        assert time.monotonic() < end, f"the loop device of {image} is not free"
        time.sleep(0.05)


_WRITER = """
import itertools, os, struct, sys, time
fd, size, pause_s = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2]), float(sys.argv[3])
for generation in itertools.count(2):
    try:
        os.pwrite(fd, struct.pack("<Q", generation) * (size // 8), 0)
    except OSError:
        pass  # the disk is full
    if generation == 3:
        print("writing", flush=True)
    if pause_s:
        time.sleep(pause_s * (generation % 8))
"""


@contextmanager
def endless_writer(file: Path, size: int, pause_s: float = 0.0) -> Iterator[None]:
    """Run a process that rewrites a file over and over, in place and each time with one call.

    All 8-byte words of the file are the number of the generation. Between two of them are up to
    seven pauses.
    """
    file.write_bytes((1).to_bytes(8, "little") * (size // 8))
    command = [sys.executable, "-c", _WRITER, str(file), str(size), str(pause_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            yield
            assert writer.poll() is None, "the writer stopped by itself"
        finally:
            writer.kill()


def generations(data: bytes) -> set[bytes]:
    """Return the generations that a capture of such a file holds."""
    return {data[place : place + 8] for place in range(0, len(data), 512)}


class LosableDisk:
    """A small file system on a loop device that can lose its power, and get it back."""

    def __init__(self, device: str, at: Path) -> None:
        self._device = device
        self.at = at

    def lose_power(self, flush_log: bool) -> None:
        """Stop the file system at once; nothing more comes to its disk."""
        folder = os.open(self.at, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", 1 if flush_log else 2))
        finally:
            os.close(folder)

    def write_back(self) -> None:
        """Flush everything written so far to the disk."""
        subprocess.run(["sync", "--file-system", str(self.at)], check=True)

    def mount(self) -> None:
        subprocess.run(["mount", self._device, str(self.at)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.at)], check=True)


def require_disks() -> None:
    """Skip a test that mounts disks where that cannot be done; under CASFS_REQUIRE_FUSE=1 it fails."""
    problem = None
    if os.geteuid() != 0:
        problem = "it mounts disks, which needs root"
    elif not os.path.exists("/dev/loop-control"):
        problem = "it mounts disks, and there are no loop devices"
    if problem is None:
        return
    if os.environ.get("CASFS_REQUIRE_FUSE") == "1":
        pytest.fail(f"CASFS_REQUIRE_FUSE=1, and {problem}", pytrace=False)
    pytest.skip(problem)


@contextmanager
def losable_disk(folder: Path, kind: str, size: int = 320 * MIB) -> Iterator[LosableDisk]:
    """Mount an empty file system that can lose its power; all of it is gone afterwards."""
    require_disks()
    image, at = folder / f"{kind}.img", folder / kind
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*_MAKE[kind], str(image)], check=True, capture_output=True)
    attached = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    )
    disk = LosableDisk(attached.stdout.strip(), at)
    try:
        disk.mount()
        yield disk
    finally:
        for command in (["umount", str(at)], ["umount", "-l", str(at)]):
            if os.path.ismount(at):
                subprocess.run(command, capture_output=True, check=False)
        subprocess.run(["losetup", "--detach", attached.stdout.strip()], check=True)
        _wait_until_detached(image)
        image.unlink()
