"""Operations on the files of an SFTP server, over one channel that any thread may use.

A transfer has many requests on their way, so that it does not wait for the round trip of each. Packs stay
open for later reads.
"""

from __future__ import annotations

import re
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from casfs.errors import StorageError, StorageUnavailableError
from casfs.storage.base import Data
from casfs.storage.sftp_channel import PendingReply, SftpChannel
from casfs.storage.sftp_protocol import (
    CREATE,
    EXCLUSIVE,
    FILE_MODE,
    FOLDER_MODE,
    FSYNC,
    HARDLINK,
    LIMITS,
    NO_ATTRIBUTES,
    POSIX_RENAME,
    READ,
    STATVFS,
    WRITE,
    Attributes,
    Entries,
    Reader,
    Reply,
    Request,
    Status,
    StatusError,
    pack_string,
    parse_attributes,
    parse_names,
)

T = TypeVar("T")

_SAFE_CHUNK_BYTES = 32 * 1024
_MOST_CHUNK_BYTES = 255 * 1024
_WINDOW = 64
"""Requests of one transfer on their way: with the largest chunks 16 MiB, enough for 1 Gbit/s at 130 ms."""

_PACK_PATH = re.compile(r"/(?:packs|meta)/[0-9a-f]{2}/[0-9a-f]+$")
"""The path of a pack, which is write-once."""

_OPEN_FILES = 16


class SftpConnection:
    """Operations on paths of the server over one channel. Raises StatusError."""

    def __init__(self, channel: SftpChannel) -> None:
        self.channel = channel
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._read_bytes = self._write_bytes = _SAFE_CHUNK_BYTES
        if LIMITS in channel.extensions:
            self._use_limits()

    def _use_limits(self) -> None:
        try:
            fields = Reader(self.channel.extended(LIMITS).result(Reply.EXTENDED_REPLY))
            _, most_read, most_write = fields.u64(), fields.u64(), fields.u64()
        except (StatusError, ValueError):
            return
        self._read_bytes = min(most_read or _SAFE_CHUNK_BYTES, _MOST_CHUNK_BYTES)
        self._write_bytes = min(most_write or _SAFE_CHUNK_BYTES, _MOST_CHUNK_BYTES)

    def stat(self, path: str) -> Attributes:
        """Return a file's attributes."""
        reply = self.channel.request(Request.STAT, pack_string(path)).result(Reply.ATTRS)
        return self._parsed(lambda: parse_attributes(Reader(reply)))

    def fstat(self, handle: bytes) -> Attributes:
        """Return the attributes of an open file."""
        reply = self.channel.request(Request.FSTAT, pack_string(handle)).result(Reply.ATTRS)
        return self._parsed(lambda: parse_attributes(Reader(reply)))

    def _parsed(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except ValueError as error:
            raise self.channel.broken() from error

    def open(self, path: str, flags: int, attributes: bytes = NO_ATTRIBUTES) -> bytes:
        """Return the handle of a file."""
        pending = self.channel.request(
            Request.OPEN, pack_string(path), struct.pack(">I", flags), attributes
        )
        return self._handle(pending)

    def _handle(self, pending: PendingReply) -> bytes:
        reply = pending.result(Reply.HANDLE)
        return self._parsed(lambda: Reader(reply).string())

    def close_handle(self, handle: bytes) -> PendingReply:
        """Close a handle; the answer may be awaited."""
        return self.channel.request(Request.CLOSE, pack_string(handle))

    @contextmanager
    def open_file(self, path: str) -> Iterator[bytes]:
        """Yield the handle of a file that is open for reading; the file stays open for later reads."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                file.users += 1
        if file is None:
            file = self._keep(path, _OpenFile(self.open(path, READ)))
        try:
            yield file.handle
        finally:
            self._leave(file)

    def _keep(self, path: str, file: _OpenFile) -> _OpenFile:
        unused: list[_OpenFile] = []
        with self._lock:
            # Only what is immutable is kept: the configuration may be replaced behind a handle.
            if _PACK_PATH.search(path) and path not in self._files:
                self._files[path] = file
                while len(self._files) > _OPEN_FILES:
                    _, oldest = self._files.popitem(last=False)
                    oldest.is_kept = False
                    if not oldest.users:
                        unused.append(oldest)
            else:
                file.is_kept = False
        for one in unused:
            self.close_handle(one.handle)
        return file

    def _leave(self, file: _OpenFile) -> None:
        with self._lock:
            file.users -= 1
            is_unused = not file.is_kept and not file.users
        if is_unused and self.channel.is_open:
            self.close_handle(file.handle)

    def _forget(self, path: str) -> None:
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                return
            file.is_kept = False
            is_unused = not file.users
        if is_unused:
            self.close_handle(file.handle)

    def read(self, handle: bytes, offset: int, size: int) -> bytes:
        """Return a range of an open file, up to its end."""
        name = pack_string(handle)
        end = offset + size
        data = bytearray()
        waiting: deque[tuple[int, PendingReply]] = deque()
        at = offset
        while at < end or waiting:
            while at < end and len(waiting) < _WINDOW:
                wanted = min(self._read_bytes, end - at)
                fields = struct.pack(">QI", at, wanted)
                waiting.append((wanted, self.channel.request(Request.READ, name, fields)))
                at += wanted
            wanted, pending = waiting.popleft()
            try:
                piece = self._data(pending, wanted)
            except StatusError as error:
                if error.status != Status.EOF:
                    raise
                break
            data += piece
            while len(piece) < wanted:  # a server may give less than it was asked for
                wanted -= len(piece)
                fields = struct.pack(">QI", offset + len(data), wanted)
                try:
                    piece = self._data(self.channel.request(Request.READ, name, fields), wanted)
                except StatusError as error:
                    if error.status != Status.EOF:
                        raise
                    return bytes(data)
                data += piece
        return bytes(data)

    def _data(self, pending: PendingReply, wanted: int) -> bytes:
        reply = pending.result(Reply.DATA)
        piece = self._parsed(lambda: Reader(reply).string())
        if not 0 < len(piece) <= wanted:
            raise self.channel.broken()
        return piece

    def write_file(self, path: str, data: Data) -> None:
        """Write a new file and make its bytes durable."""
        handle = self.open(path, WRITE | CREATE | EXCLUSIVE, FILE_MODE)
        name = pack_string(handle)
        waiting: deque[PendingReply] = deque()
        try:
            with memoryview(data) as view:
                for at in range(0, len(view), self._write_bytes):
                    with view[at : at + self._write_bytes] as piece:
                        fields = struct.pack(">QI", at, len(piece))
                        waiting.append(
                            self.channel.request(Request.WRITE, name, fields, data=piece)
                        )
                    if len(waiting) >= _WINDOW:
                        waiting.popleft().result(Reply.STATUS)
            if FSYNC in self.channel.extensions:
                waiting.append(self.channel.extended(FSYNC, name))
            while waiting:
                waiting.popleft().result(Reply.STATUS)
        finally:
            closing = self.close_handle(handle) if self.channel.is_open else None
        if closing is not None:
            closing.result(Reply.STATUS)

    def link(self, upload: str, path: str) -> None:
        """Link an uploaded file to its name; if the name is taken, raise StatusError with FAILURE."""
        if HARDLINK in self.channel.extensions:
            try:
                self.channel.extended(HARDLINK, pack_string(upload), pack_string(path)).result(
                    Reply.STATUS
                )
                return
            except StatusError as error:
                if error.status not in (Status.FAILURE, Status.OP_UNSUPPORTED):
                    raise
        # A file system without links, or a server without the extension. RENAME refuses a taken name.
        self.channel.request(Request.RENAME, pack_string(upload), pack_string(path)).result(
            Reply.STATUS
        )

    def replace(self, upload: str, path: str) -> None:
        """Rename an uploaded file to its name, and replace a file that has the name."""
        self._forget(path)
        if POSIX_RENAME in self.channel.extensions:
            self.channel.extended(POSIX_RENAME, pack_string(upload), pack_string(path)).result(
                Reply.STATUS
            )
        else:
            self.channel.request(Request.RENAME, pack_string(upload), pack_string(path)).result(
                Reply.STATUS
            )

    def remove(self, path: str) -> None:
        """Remove a file."""
        self._forget(path)
        self.channel.request(Request.REMOVE, pack_string(path)).result(Reply.STATUS)

    def remove_quietly(self, path: str) -> None:
        """Remove a file that may not exist; a connection that has ended is left alone."""
        if self.channel.is_open:
            try:
                self.remove(path)
            except (StatusError, StorageError, StorageUnavailableError):
                return

    def read_folder(self, path: str) -> Entries:
        """Return the entries of a folder, but for `.` and `..`."""
        handle = self._handle(self.channel.request(Request.OPENDIR, pack_string(path)))
        found: Entries = []
        try:
            while True:
                try:
                    reply = self.channel.request(Request.READDIR, pack_string(handle)).result(
                        Reply.NAME
                    )
                except StatusError as error:
                    if error.status != Status.EOF:
                        raise
                    return found
                found += self._parsed(lambda reply=reply: parse_names(reply))  # type: ignore[misc]
        finally:
            if self.channel.is_open:
                self.close_handle(handle)

    def make_folders(self, path: str) -> None:
        """Make a folder, and those above it that are missing."""
        missing = [path]
        while True:
            try:
                self._make_folder(missing[-1])
            except StatusError as error:
                above = parent_path(missing[-1])
                if error.status != Status.NO_SUCH_FILE or above in ("", "/"):
                    raise
                missing.append(above)
            else:
                break
        for folder in reversed(missing[:-1]):
            self._make_folder(folder)

    def _make_folder(self, path: str) -> None:
        try:
            self.channel.request(Request.MKDIR, pack_string(path), FOLDER_MODE).result(Reply.STATUS)
        except StatusError as error:
            if error.status != Status.FAILURE:
                raise
            return  # it is there
        self.sync_folder(parent_path(path))

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable, where the server can: it opens the folder as a file."""
        if FSYNC not in self.channel.extensions:
            return
        try:
            handle = self.open(path or "/", READ)
        except StatusError:
            return
        syncing = self.channel.extended(FSYNC, pack_string(handle))
        self.close_handle(handle)
        try:
            syncing.result(Reply.STATUS)
        except StatusError:
            return  # a file system that cannot sync a folder

    def is_full(self, path: str) -> bool:
        """Return whether the disk of a folder has no room left."""
        if STATVFS not in self.channel.extensions:
            return False
        try:
            reply = self.channel.extended(STATVFS, pack_string(path)).result(Reply.EXTENDED_REPLY)
            fields = Reader(reply)
            block_bytes = [fields.u64(), fields.u64()][1]
            available = [fields.u64(), fields.u64(), fields.u64()][2]
        except (StatusError, ValueError):
            return False
        return available * block_bytes < 1024 * 1024


@dataclass(slots=True)
class _OpenFile:
    handle: bytes
    users: int = 1
    is_kept: bool = True


def parent_path(path: str) -> str:
    """Return the path of the folder that a path is in."""
    return path.rpartition("/")[0]
