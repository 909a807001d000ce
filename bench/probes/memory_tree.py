"""A file system that serves a copy of a tree from memory: the cost of FUSE and pyfuse3 without any work.

Every answer is prepared before the mount and given on the event loop, so that no backup program's mount
through pyfuse3 can be expected to be faster. `--loop trio` uses pyfuse3 as it comes, `--loop casfs` with
casfs's event library. Runs in the foreground until it is unmounted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pyfuse3
import trio
from casfs_mount.event_library import fast_event_library
from casfs_mount.server import raise_read_ahead

LONG_S = 3600.0
BLOCK_BYTES = 128 * 1024
NOTHING = memoryview(b"")


class MemoryTree(pyfuse3.Operations):
    """A tree whose entries have their inode numbers minus one as indexes; the root has the number 1."""

    supports_dot_lookup = False
    enable_acl = True

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._entries: list[pyfuse3.EntryAttributes] = []
        self._content: list[memoryview] = []
        self._names: list[list[tuple[bytes, int]]] = []
        self._children: list[dict[bytes, int]] = []
        self._xattrs: dict[int, dict[bytes, bytes]] = {}
        self._copy(os.fsencode(root))

    def _copy(self, root: bytes) -> None:
        pending = [(root, self._add(root))]
        while pending:
            folder, number = pending.pop()
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name)
                below = self._add(path)
                self._names[number - 1].append((name, below))
                self._children[number - 1][name] = below
                if stat.S_ISDIR(self._entries[below - 1].st_mode):
                    pending.append((path, below))

    def _add(self, path: bytes) -> int:
        status = os.lstat(path)
        number = len(self._entries) + 1
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(number)
        entry.st_mode = pyfuse3.ModeT(status.st_mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = status.st_uid, status.st_gid
        entry.st_rdev = status.st_rdev
        entry.st_size = status.st_size
        entry.st_blocks = status.st_blocks
        entry.st_blksize = BLOCK_BYTES
        entry.st_mtime_ns = entry.st_atime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        entry.attr_timeout = entry.entry_timeout = LONG_S
        self._entries.append(entry)
        self._content.append(_content(path, status.st_mode))
        self._names.append([])
        self._children.append({})
        with contextlib.suppress(OSError):
            found = {
                os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
            }
            if found:
                self._xattrs[number] = found
        return number

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        number = self._children[parent_inode - 1].get(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entries[number - 1]

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        """Return the prepared attributes."""
        return self._entries[inode - 1]

    async def readlink(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileNameT:
        """Return a target."""
        return pyfuse3.FileNameT(bytes(self._content[inode - 1]))

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """Return the inode number as the handle."""
        return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """List a directory."""
        names = self._names[fh - 1]
        for i in range(start_id, len(names)):
            name, number = names[i]
            entry = self._entries[number - 1]
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, i + 1):
                return

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing."""

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open a file, whose pages the kernel may keep."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    # pyfuse3 takes any buffer, although it declares bytes; a view spares a copy.
    async def read(  # type: ignore[override]
        self, fh: pyfuse3.FileHandleT, off: int, size: int
    ) -> memoryview:
        """Return a part of the copied content."""
        return self._content[fh - 1][off : off + size]

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing."""

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Do nothing."""

    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """Return a copied attribute."""
        found = self._xattrs.get(inode)
        if found is None or name not in found:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return found[name]

    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """List the copied attributes."""
        return [pyfuse3.XAttrNameT(name) for name in self._xattrs.get(inode, ())]


def _content(path: bytes, mode: int) -> memoryview:
    if stat.S_ISLNK(mode):
        return memoryview(os.readlink(path))
    if not stat.S_ISREG(mode):
        return NOTHING
    with open(path, "rb") as stream:
        return memoryview(stream.read())


async def serve(mountpoint: str) -> None:
    """Serve until unmounted."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        status = await trio.to_thread.run_sync(os.stat, mountpoint)
        raise_read_ahead(status.st_dev)


def main() -> None:
    """Copy the tree, mount, serve, unmount."""
    parser = argparse.ArgumentParser(description="Serve a copy of a tree from memory.")
    parser.add_argument("--loop", choices=("trio", "casfs"), default="trio")
    parser.add_argument("source", type=Path)
    parser.add_argument("mountpoint")
    options = parser.parse_args()
    tree = MemoryTree(options.source)
    pyfuse3.init(tree, options.mountpoint, {*pyfuse3.default_options, "fsname=memory-tree", "ro"})
    library = (
        fast_event_library(lambda: True) if options.loop == "casfs" else contextlib.nullcontext()
    )
    try:
        with library:
            trio.run(serve, options.mountpoint)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
