"""Mounts that are always torn down: of casfs, of a tmpfs, of a small disk in a file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cli import Argument, Casfs
from tests.support.waiting import wait_until


def mount_points() -> set[bytes]:
    """Return the mountpoints. Read the kernel's table and never the mounts, which may hang."""
    table = Path("/proc/self/mountinfo").read_bytes()
    return {_unescape(line.split(b" ")[4]) for line in table.splitlines()}


def _unescape(field: bytes) -> bytes:
    for code, character in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n")):
        field = field.replace(code, character)
    return field.replace(b"\\134", b"\\")


def is_mounted(where: Path) -> bool:
    return os.fsencode(where.parent.resolve() / where.name) in mount_points()


def processes_naming(mountpoint: Path) -> list[int]:
    """Return the casfs processes that serve a mountpoint, by their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(mountpoint) in words and b"mount" in words:
                found.append(int(folder.name))
    return found


def unmount_by_force(where: Path) -> None:
    """Detach a mount whatever its state is; nothing happens where nothing is mounted."""
    for command in (["fusermount3", "-uz"], ["umount", "-l"]):
        if is_mounted(where):
            subprocess.run([*command, str(where)], capture_output=True, check=False)


@contextmanager
def mounted(casfs: Casfs, *arguments: Argument, at: Path) -> Iterator[Path]:
    """Mount with `casfs mount ARGUMENTS AT`; on leaving, `casfs umount` must do its work."""
    at.mkdir(exist_ok=True)
    try:
        casfs.run("mount", *arguments, at)
        assert is_mounted(at), "casfs mount returned before the mount was there"
        yield at
        casfs.run("umount", at)
        assert not is_mounted(at), "casfs umount returned and the mount is still there"
    finally:
        unmount_by_force(at)


@contextmanager
def mount_namespace() -> Iterator[int]:
    """Make a private mount namespace; yield a process that is in it.

    It begins with copies of all mounts. Those of casfs are taken away at once, or servers of other tests
    would live on for them.
    """
    script = "umount -a -t fuse.casfs; echo; read line; umount -a -t fuse.casfs; true"
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert keeper.stdout is not None
    keeper.stdout.readline()
    try:
        yield keeper.pid
    finally:
        keeper.communicate(b"\n")


@contextmanager
def tmpfs(at: Path) -> Iterator[Path]:
    """Mount an empty tmpfs: another file system inside a tree."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "casfs-test", str(at)], check=True)
    try:
        yield at
    finally:
        unmount_by_force(at)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount an ext4 of `size` bytes that is really full when it is full (nothing is reserved)."""
    image, at = folder / "disk.img", folder / "disk"
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], capture_output=True, check=False)
        unmount_by_force(at)
        wait_until(lambda: not _attached(image), f"the loop device of {image} is free")
        image.unlink()


def _attached(image: Path) -> bool:
    shown = subprocess.run(
        ["losetup", "-j", str(image)], capture_output=True, check=True, text=True
    )
    return bool(shown.stdout.strip())
