"""The FUSE request handlers: inode numbers and names in, attributes and bytes out.

All handlers run on the event-loop thread. A handler first asks the view there; on WouldBlock it repeats
the call on a worker thread (see `casfs_mount.event_loop_guard`). Every exception becomes an errno, since
any other exception would end the mount; `trio.Cancelled` passes through. No handler takes time or memory
proportional to the snapshot.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio

from casfs.errors import CasfsError
from casfs.format.tree import Node
from casfs_mount.attributes import Attributes
from casfs_mount.damage_log import UnreadableError
from casfs_mount.directory_listing import DirectoryLister
from casfs_mount.event_loop_guard import WouldBlock
from casfs_mount.file_reader import Readable
from casfs_mount.idle_reader import IdleReader
from casfs_mount.inodes import HARD_LINKS, HardLinks, StaleError
from casfs_mount.logged_name import LoggedName
from casfs_mount.page_cache import PageCache, StorePages
from casfs_mount.view import VIRTUAL_XATTRS, RefusedError, View

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_BLOCK_BYTES = 4096
_READ_BUFFER_BYTES = 1024 * 1024

_LOOKUP_THREADS = 4
_READ_THREADS = 8


@dataclass(frozen=True, slots=True)
class DisplayOptions:
    """`owner` replaces the owner (uid, gid) of every entry; `kernel_cache` lets the kernel cache data."""

    owner: tuple[int, int] | None = None
    kernel_cache: bool = True


def errors_as_errno(
    handler: Callable[Concatenate[FileSystem, int, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[FileSystem, int, P], Coroutine[Any, Any, T]]:
    """Decorate a handler: raise each of its exceptions as an errno. Its first argument is an inode number."""

    async def translate(self: FileSystem, number: int, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, number, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(number, error)) from None

    functools.update_wrapper(translate, handler)
    return translate


class FileSystem(pyfuse3.Operations):
    """The request handlers of one mount."""

    supports_dot_lookup = True

    def __init__(
        self, view: View, display: DisplayOptions, store_pages: StorePages | None = None
    ) -> None:
        super().__init__()
        self._view = view
        self._display = display
        # Without ACLs the kernel need not ask for them before it permits an access.
        self.enable_acl = self._has_xattrs = view.may_have_xattrs()
        self._pages = PageCache(store_pages if display.kernel_cache else None)
        self.idle_reader = IdleReader(view.decode_files_after, view.decode_directories_after)
        self._links = HardLinks()
        self._handles = itertools.count(1)
        self._open: dict[int, tuple[Readable, int]] = {}
        self._attributes = Attributes(display.owner, view.range_start)
        self._lister = DirectoryLister(view, self._attributes, self._links)
        self._buffer = memoryview(bytearray(_READ_BUFFER_BYTES))
        self._lookup_limiter = trio.CapacityLimiter(_LOOKUP_THREADS)
        self._read_limiter = trio.CapacityLimiter(_READ_THREADS)

    @errors_as_errno
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name in a directory; in a snapshot, the kernel caches that a name does not exist."""
        parent = self._position_of(parent_inode)
        try:
            found = self._find(parent, name)
        except WouldBlock:
            found = await self._in_thread(self._find, parent, name)
        is_immutable = self._view.is_immutable(parent)
        attributes = self._attributes
        if found is None:
            if not is_immutable:
                raise pyfuse3.FUSEError(errno.ENOENT)
            attributes.entry.st_ino = 0
        else:
            number = attributes.fill(*found)
            if number >= HARD_LINKS:
                self._links.remember(number, found[0])
        attributes.set_timeout(is_immutable)
        return attributes.entry

    @errors_as_errno
    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a node."""
        position = self._position_of(inode)
        try:
            node = self._view.node(position)
        except WouldBlock:
            node = await self._in_thread(self._view.node, position)
        self._attributes.fill(position, node)
        self._attributes.set_timeout(self._view.is_immutable(position))
        return self._attributes.entry

    @errors_as_errno
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return the target of a symbolic link."""
        position = self._position_of(inode)
        try:
            return self._view.node(position).content
        except WouldBlock:
            return (await self._in_thread(self._view.node, position)).content

    @errors_as_errno
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Return the directory's inode number as the handle, which needs no table of open directories."""
        return inode

    async def releasedir(self, fh: int) -> None:
        """Do nothing: a directory handle owns no resource."""

    @errors_as_errno
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the entries of a directory from a position on, as many as fit into the reply."""
        try:
            self._lister.reply(fh, self._lister.list(fh, start_id), token)
            if start_id == 0:
                self._view.on_readdir(fh, False)
        except WouldBlock:
            self._view.on_readdir(fh, True)
            gathered = await self._in_thread(self._lister.gather, fh, start_id)
            self._lister.reply(fh, gathered, token)
        if start_id == 0:
            self.idle_reader.on_readdir(fh)

    @errors_as_errno
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file for reading."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND):
            raise pyfuse3.FUSEError(errno.EROFS)
        position = self._position_of(inode)
        try:
            reader = self._view.open(position)
        except WouldBlock:
            reader = await self._in_thread(self._view.open, position)
        handle = next(self._handles)
        self._open[handle] = reader, inode
        kept = self._display.kernel_cache and not reader.streamed
        if self._pages.on_open(position, inode, reader):
            self._view.on_open(position, False)
            self.idle_reader.on_open(position)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), direct_io=not kept, keep_cache=kept)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return verified bytes; if any part of the range is damaged, fail with EIO."""
        reader, inode = self._open[fh]
        try:
            if off == 0:
                self._pages.on_read(self._position_of(inode))
            try:
                parts = reader.read(off, size)
                if off == 0:
                    self._view.on_open(self._position_of(inode), False)
            except WouldBlock:
                if off == 0:
                    self._view.on_open(self._position_of(inode), True)
                parts = await trio.to_thread.run_sync(
                    reader.read, off, size, abandon_on_cancel=True, limiter=self._read_limiter
                )
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(inode, error)) from None
        if len(parts) == 1:
            return parts[0]  # type: ignore[return-value]  # pyfuse3 accepts a memoryview too
        return self._joined(parts)  # type: ignore[return-value]

    def _joined(self, parts: list[memoryview]) -> memoryview:
        """Copy the parts into one buffer, which the next call reuses; pyfuse3 copies it at once."""
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
        _, inode = self._open.pop(fh, (None, 0))
        self._pages.on_release(inode)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Remove hard links that the kernel forgot from their table; there is no other table."""
        for inode, times in inode_list:
            if inode >= HARD_LINKS:
                self._links.forget(inode, times)

    @errors_as_errno
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return an extended attribute of a file, or what casfs knows of it."""
        if not (self._has_xattrs or name.startswith(VIRTUAL_XATTRS)):
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        position = self._position_of(inode)
        try:
            value = self._view.xattr(position, name)
        except WouldBlock:
            value = await self._in_thread(self._view.xattr, position, name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @errors_as_errno
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """List the file's own extended attributes; those of casfs stay hidden from `cp -a` and rsync.

        Where no file has any, ENOSYS lets the kernel answer all further requests itself, with EOPNOTSUPP.
        """
        if not self._has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        position = self._position_of(inode)
        try:
            return self._view.xattr_names(position)
        except WouldBlock:
            return await self._in_thread(self._view.xattr_names, position)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the total size and the number of entries; no space is free."""
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
        """Return whether no worker thread is busy with a request."""
        return self._lookup_limiter.borrowed_tokens == 0 and self._read_limiter.borrowed_tokens == 0

    def errno_of(self, inode: int, error: Exception) -> int:
        """Return the errno for an error, and record the error in the log or the list of damage."""
        if isinstance(error, UnreadableError):
            return errno.EIO
        if isinstance(error, StaleError):
            return errno.ESTALE
        if isinstance(error, RefusedError):
            return error.errno
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        try:
            position = self._position_of(inode)
            if isinstance(error, CasfsError):
                self._view.damage(position, error)
            else:
                name = LoggedName(self._view.describe(position))
                log.error("%s: %s", name, LoggedName(error), exc_info=error)
        except Exception:
            log.exception("an error could not be recorded: %r", error)
        return errno.EIO

    def _position_of(self, number: int) -> int:
        return self._links.position(number) if number >= HARD_LINKS else number

    async def _in_thread(self, ask: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(
            ask, *args, abandon_on_cancel=True, limiter=self._lookup_limiter
        )

    def _find(self, parent: int, name: bytes) -> tuple[int, Node] | None:
        if name == b"." or name == b"..":
            number = parent if name == b"." else self._view.parent(parent)
            return number, self._view.node(number)
        return self._view.lookup(parent, name)
