"""FUSE requests, answered from a view: numbers and nodes in, attributes and bytes out.

All handlers run on the event loop's thread. What is cached is answered there; what has to be read is
asked again on a worker thread. Whatever goes wrong becomes an errno, since an exception of any other
kind would end the mount; `trio.Cancelled` passes through. Nothing here is proportional to a snapshot.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio

from casfs.errors import CasfsError
from casfs.format.node_types import MODE_BITS
from casfs.format.tree import Node, NodeType, hard_link_key
from casfs_mount.damage_log import UnreadableError
from casfs_mount.event_loop_guard import WouldBlock
from casfs_mount.file_reader import Readable
from casfs_mount.inodes import HARD_LINKS, HardLinks, StaleError, hard_link_number
from casfs_mount.view import RefusedError, View, allocated_bytes

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LASTING_S = 10_000_000.0
"""What a snapshot holds never changes, so the kernel may keep it as long as it likes."""

PASSING_S = 1.0
"""How long the kernel may keep what changes when snapshots come and go."""

_BLOCK_BYTES = 4096
_PREFERRED_BYTES = 128 * 1024
"""st_blksize: what programs read at once; larger ones cost them memory for every small file."""

_USUAL_READ_BYTES = 1024 * 1024

_LISTED_NAME_BYTES = 1024
"""FUSE_NAME_MAX of most kernels, which refuse a whole listing for one longer name."""

_GATHERED = 256
"""Entries that a worker thread collects of a directory that is not cached; the next call has more."""

_LOOKING_THREADS = 4
_READING_THREADS = 8

Entry = tuple[bytes, int, Node, int]
"""Name, number by position, node and the position after it."""


@dataclass(frozen=True, slots=True)
class DisplayOptions:
    """How things are shown: `owner` (user, group) of everything, and whether the kernel keeps data."""

    owner: tuple[int, int] | None = None
    kernel_cache: bool = True


def guarded(
    handler: Callable[Concatenate[FileSystem, int, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[FileSystem, int, P], Coroutine[Any, Any, T]]:
    """Turn whatever a handler raises into an errno; its first argument is an inode number."""

    async def guard(self: FileSystem, number: int, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, number, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(number, error)) from None

    functools.update_wrapper(guard, handler)
    return guard


class FileSystem(pyfuse3.Operations):
    """The request handlers of one mount."""

    supports_dot_lookup = True
    enable_acl = True

    def __init__(self, view: View, showing: DisplayOptions) -> None:
        super().__init__()
        self._view = view
        self._showing = showing
        self._links = HardLinks()
        self._handles = itertools.count(1)
        self._open: dict[int, tuple[Readable, int]] = {}
        # Replies copy the attributes at once, so that one object serves all of them.
        self._entry = pyfuse3.EntryAttributes()
        self._entry.st_blksize = _PREFERRED_BYTES
        self._buffer = memoryview(bytearray(_USUAL_READ_BYTES))
        self._looking = trio.CapacityLimiter(_LOOKING_THREADS)
        self._reading = trio.CapacityLimiter(_READING_THREADS)

    @guarded
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name; that it is not there is told in a way that the kernel remembers."""
        parent = self._place(parent_inode)
        try:
            found = self._find(parent, name)
        except WouldBlock:
            found = await self._in_thread(self._find, parent, name)
        timeout = LASTING_S if self._view.is_immutable(parent) else PASSING_S
        entry = self._entry
        if found is None:
            if timeout < LASTING_S:
                raise pyfuse3.FUSEError(errno.ENOENT)
            entry.st_ino = 0
        else:
            number = self._fill(*found)
            if number >= HARD_LINKS:
                self._links.remember(number, found[0])
        entry.entry_timeout = entry.attr_timeout = timeout
        return entry

    @guarded
    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        """Describe a node."""
        place = self._place(inode)
        try:
            node = self._view.node(place)
        except WouldBlock:
            node = await self._in_thread(self._view.node, place)
        self._fill(place, node)
        entry = self._entry
        entry.attr_timeout = LASTING_S if self._view.is_immutable(place) else PASSING_S
        return entry

    @guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return where a symbolic link leads."""
        place = self._place(inode)
        try:
            return self._view.node(place).content
        except WouldBlock:
            return (await self._in_thread(self._view.node, place)).content

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Return the directory's own number as the handle, so that nothing has to be kept."""
        return inode

    async def releasedir(self, fh: int) -> None:
        """Do nothing: a directory's handle holds nothing."""

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from a position on, as much as fits in the reply."""
        try:
            self._list(fh, self._entries(fh, start_id), token)
            if start_id == 0:
                self._view.on_readdir(fh, False)
        except WouldBlock:
            self._view.on_readdir(fh, True)
            gathered = await self._in_thread(self._gather, fh, start_id)
            self._list(fh, gathered, token)

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file for reading."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND):
            raise pyfuse3.FUSEError(errno.EROFS)
        place = self._place(inode)
        try:
            reader = self._view.open(place)
        except WouldBlock:
            reader = await self._in_thread(self._view.open, place)
        handle = next(self._handles)
        self._open[handle] = reader, inode
        kept = self._showing.kernel_cache and not reader.streamed
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), direct_io=not kept, keep_cache=kept)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return verified bytes; a range of which any part is damaged is EIO."""
        reader, inode = self._open[fh]
        try:
            try:
                parts = reader.read(off, size)
                if off == 0:
                    self._view.on_open(self._place(inode), False)
            except WouldBlock:
                if off == 0:
                    self._view.on_open(self._place(inode), True)
                parts = await trio.to_thread.run_sync(
                    reader.read, off, size, abandon_on_cancel=True, limiter=self._reading
                )
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(inode, error)) from None
        if len(parts) == 1:
            return parts[0]  # type: ignore[return-value]  # a memoryview does as well
        return self._joined(parts)  # type: ignore[return-value]

    def _joined(self, parts: list[memoryview]) -> memoryview:
        """Return the parts in one buffer, which the next call uses again: replies copy it at once."""
        size = sum(map(len, parts))
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        at = 0
        for part in parts:
            self._buffer[at : at + len(part)] = part
            at += len(part)
        return self._buffer[:size]

    async def release(self, fh: int) -> None:
        """Close a file."""
        self._open.pop(fh, None)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Let go of hard links that the kernel does not know any more; nothing else is kept."""
        for inode, times in inode_list:
            if inode >= HARD_LINKS:
                self._links.forget(inode, times)

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return an extended attribute of a file, or what casfs knows of it."""
        place = self._place(inode)
        try:
            value = self._view.xattr(place, name)
        except WouldBlock:
            value = await self._in_thread(self._view.xattr, place, name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """List the file's own extended attributes and no others."""
        place = self._place(inode)
        try:
            return self._view.xattr_names(place)
        except WouldBlock:
            return await self._in_thread(self._view.xattr_names, place)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Tell the size of what is shown; nothing is free."""
        try:
            try:
                size, nodes = self._view.statfs_totals()
            except WouldBlock:
                size, nodes = await self._in_thread(self._view.statfs_totals)
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(pyfuse3.ROOT_INODE, error)) from None
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = _BLOCK_BYTES
        found.f_blocks = -(-size // _BLOCK_BYTES)
        found.f_files = nodes
        found.f_namemax = 255
        return found

    async def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise pyfuse3.FUSEError(errno.EROFS)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = create = _refuse
    write = setxattr = removexattr = _refuse

    def is_idle(self) -> bool:
        """Tell whether no worker thread is still busy with a request."""
        return self._looking.borrowed_tokens == 0 and self._reading.borrowed_tokens == 0

    def errno_of(self, inode: int, error: Exception) -> int:
        """Return what a program is told about an error, and tell the rest to the log."""
        if isinstance(error, UnreadableError):
            return errno.EIO
        if isinstance(error, StaleError):
            return errno.ESTALE
        if isinstance(error, RefusedError):
            return error.errno
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        try:
            place = self._place(inode)
            if isinstance(error, CasfsError):
                self._view.damage(place, error)
            else:
                log.error("%s: %s", self._view.describe(place), error, exc_info=error)
        except Exception:
            log.exception("an error could not be told: %r", error)
        return errno.EIO

    def _place(self, number: int) -> int:
        return self._links.place(number) if number >= HARD_LINKS else number

    async def _in_thread(self, ask: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(
            ask, *args, abandon_on_cancel=True, limiter=self._looking
        )

    def _find(self, parent: int, name: bytes) -> tuple[int, Node] | None:
        if name == b"." or name == b"..":
            number = parent if name == b"." else self._view.parent(parent)
            return number, self._view.node(number)
        return self._view.lookup(parent, name)

    def _gather(self, directory: int, start: int) -> list[Entry]:
        return list(itertools.islice(self._entries(directory, start), _GATHERED))

    def _entries(self, directory: int, start: int) -> Iterator[Entry]:
        """Yield entries from a position: 0 is `.`, 1 is `..`, the others follow in their places."""
        view = self._view
        entries = view.entries(directory, max(start - 2, 0))
        # Whether anything has to be waited for shows before the first reply.
        first = next(entries, None)
        if start == 0:
            yield b".", directory, view.node(directory), 1
        if start <= 1:
            above = view.parent(directory)
            yield b"..", above, view.node(above), 2
        if first is not None:
            number, node, after = first
            yield node.name, number, node, after + 2
        for number, node, after in entries:
            yield node.name, number, node, after + 2

    def _list(
        self, directory: int, entries: Iterator[Entry] | list[Entry], token: pyfuse3.ReaddirToken
    ) -> None:
        entry = self._entry
        timeout = LASTING_S if self._view.is_immutable(directory) else PASSING_S
        entry.entry_timeout = entry.attr_timeout = timeout
        fill, reply = self._fill, pyfuse3.readdir_reply
        replied = False
        try:
            for name, place, node, after in entries:
                if len(name) > _LISTED_NAME_BYTES:
                    log.warning(
                        "%s holds a name of %d bytes, which the kernel cannot list; restore it with "
                        "casfs restore, or read it with casfs dump",
                        self._view.describe(directory),
                        len(name),
                    )
                    continue
                number = fill(place, node)
                if not reply(token, name, entry, after):
                    return
                replied = True
                if number >= HARD_LINKS:
                    self._links.remember(number, place)
        except (WouldBlock, CasfsError):
            # What was found is given; the next call begins where this one failed.
            if not replied:
                raise

    def _fill(self, place: int, node: Node) -> int:
        """Put a node's attributes into the common object and return its inode number."""
        entry = self._entry
        kind = node.kind
        number = place
        rdev = 0
        extra = node.extra
        if extra is not None:
            rdev = extra.rdev
            key = hard_link_key(node) if node.nlink > 1 else None
            if key is not None:
                number = hard_link_number(self._view.range_start(place), key)
        entry.st_ino = pyfuse3.InodeT(number)
        entry.st_mode = pyfuse3.ModeT(MODE_BITS[kind] | node.mode)
        entry.st_nlink = node.nlink
        if self._showing.owner is None:
            entry.st_uid = node.uid
            entry.st_gid = node.gid
        else:
            entry.st_uid, entry.st_gid = self._showing.owner
        entry.st_rdev = rdev
        entry.st_size = node.size
        entry.st_blocks = (allocated_bytes(node) + 511) >> 9 if kind == NodeType.FILE else 0
        mtime_ns = node.mtime_ns
        entry.st_mtime_ns = mtime_ns
        entry.st_atime_ns = mtime_ns
        entry.st_ctime_ns = node.ctime_ns
        return number
