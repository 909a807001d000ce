"""A file system with one file of zeros: the cost of FUSE and pyfuse3 without any work.

Its reads are answered from one buffer in the event loop, so that no backup program's mount on
this machine can be expected to be faster. Runs in the foreground until it is unmounted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pyfuse3
import trio

FILE_NAME = b"zeros"
FILE_INODE = pyfuse3.InodeT(2)
READ_AHEAD_KIB = 1024
LONG_S = 3600.0


class TrivialFileSystem(pyfuse3.Operations):
    """A root directory with one file."""

    supports_dot_lookup = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._zeros = memoryview(bytes(1 << 20))

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        """Describe the root or the file."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        directory = inode == pyfuse3.ROOT_INODE
        mode = stat.S_IFDIR | 0o555 if directory else stat.S_IFREG | 0o444
        entry.st_mode = pyfuse3.ModeT(mode)
        entry.st_size = 0 if directory else self._size
        entry.attr_timeout = entry.entry_timeout = LONG_S
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the file."""
        if parent_inode != pyfuse3.ROOT_INODE or name != FILE_NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE, ctx)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open the file, whose pages the kernel may keep."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    # pyfuse3 takes any buffer, although it declares bytes; a view spares a copy.
    async def read(  # type: ignore[override]
        self, fh: pyfuse3.FileHandleT, off: int, size: int
    ) -> memoryview:
        """Return zeros."""
        return self._zeros[: max(0, min(size, self._size - off))]


def raise_read_ahead(mountpoint: str) -> None:
    """Raise the kernel's read-ahead; without root it stays at its default."""
    device = os.stat(mountpoint).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if os.access(setting, os.W_OK):
        setting.write_text(f"{READ_AHEAD_KIB}\n", encoding="ascii")


async def serve(mountpoint: str) -> None:
    """Serve until unmounted."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.to_thread.run_sync(raise_read_ahead, mountpoint)


def main(mountpoint: str, size: int) -> None:
    """Mount, serve, unmount."""
    options = {*pyfuse3.default_options, "fsname=trivial", "ro"}
    pyfuse3.init(TrivialFileSystem(size), mountpoint, options)
    try:
        trio.run(serve, mountpoint)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
