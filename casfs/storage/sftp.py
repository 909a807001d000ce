"""A storage on a machine that is reached by SSH: SFTP through the user's own `ssh`.

An object is uploaded below `uploads/`, synced, and linked to its name: OpenSSH's `hardlink@openssh.com` fails
where the name exists. Then its folder is synced, by opening it as a file: SFTP has no other way. A
connection that ended is made again by the next call; `retry.RetryingStorage` makes that call.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
import stat
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from casfs.errors import (
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.storage.base import (
    MAX_WHOLE_READ_BYTES,
    Capabilities,
    Data,
    ListedObject,
    is_name,
    size_conflict,
)
from casfs.storage.buffered_writer import BufferedWriter
from casfs.storage.counting import RequestCounter, RequestKind
from casfs.storage.sftp_channel import (
    Pending,
    Reader,
    Reply,
    Request,
    SftpChannel,
    Status,
    StatusError,
    pack_string,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

UPLOADS = "uploads"
"""The folder of objects that have no name yet.

The first upload of a process removes the remains of uploads that were interrupted more than a day before."""

_STALE_NS = 24 * 3600 * 1_000_000_000
_READ, _WRITE, _CREATE, _EXCLUSIVE = 0x01, 0x02, 0x08, 0x20
_NO_ATTRIBUTES = struct.pack(">I", 0)
_PERMISSIONS = 0x04
_FILE_MODE = struct.pack(">II", _PERMISSIONS, 0o600)
_FOLDER_MODE = struct.pack(">II", _PERMISSIONS, 0o700)

_SAFE_CHUNK_BYTES = 32 * 1024
_MOST_CHUNK_BYTES = 255 * 1024
_WINDOW = 64
"""Requests of one transfer on their way: with the largest chunks 16 MiB, enough for 1 Gbit/s at 130 ms."""

_FOLDERS_AT_ONCE = 16
_PACK_PATH = re.compile(r"/(?:packs|meta)/[0-9a-f]{2}/[0-9a-f]+$")
"""The path of a pack, which is write-once."""

_OPEN_FILES = 16

HARDLINK = "hardlink@openssh.com"
POSIX_RENAME = "posix-rename@openssh.com"
FSYNC = "fsync@openssh.com"
_LIMITS = "limits@openssh.com"
_STATVFS = "statvfs@openssh.com"


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of a file that the server sent; None for each that it left out."""

    size: int | None
    mode: int | None
    mtime_s: int | None


Entries = list[tuple[str, Attributes]]
Objects = list[ListedObject]


class SftpStorage:
    """Objects in a folder of another machine. `command` runs an SFTP server's other end on its pipes."""

    capabilities = Capabilities(
        creates_exclusively=True,
        reads_ranges=True,
        has_own_clock=True,
        syncs_names=True,
        can_overwrite=True,
        can_delete=True,
        reads_nonblocking=False,
        holds_locks=False,
        parallel_requests=_FOLDERS_AT_ONCE,
    )

    def __init__(
        self,
        url: str,
        folder: str,
        command: Sequence[str],
        counter: RequestCounter | None = None,
    ) -> None:
        self.url = url
        self._folder = folder.rstrip("/")
        self._command = tuple(command)
        self._counter = counter if counter is not None else RequestCounter()
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._is_tidy = False

    @property
    def bucket(self) -> None:
        """A folder keeps no versions."""

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix, sorted by name; several folders are read at a time."""
        entries = self._asked("list", prefix, lambda: self._read_folder(prefix))
        # With the slash that follows their names, folders sort as the names of their objects do.
        entries.sort(key=lambda entry: f"{entry[0]}/" if _is_folder(entry[1]) else entry[0])
        folders = deque(f"{prefix}/{name}" for name, found in entries if _is_folder(found))
        ahead: deque[Future[Objects]] = deque()
        try:
            for name, found in entries:
                if not _is_folder(found):
                    yield _listed(f"{prefix}/{name}", found)
                    continue
                while folders and len(ahead) < _FOLDERS_AT_ONCE:
                    ahead.append(self._threads().submit(self._list_all, folders.popleft()))
                yield from ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _list_all(self, prefix: str) -> Objects:
        entries = self._asked("list", prefix, lambda: self._read_folder(prefix))
        entries.sort(key=lambda entry: f"{entry[0]}/" if _is_folder(entry[1]) else entry[0])
        found: Objects = []
        for name, attributes in entries:
            if _is_folder(attributes):
                found += self._list_all(f"{prefix}/{name}")
            else:
                found.append(_listed(f"{prefix}/{name}", attributes))
        return found

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return self._stat(name).size or 0

    def mtime_ns(self, name: str) -> int:
        """Return when an object was written, in whole seconds."""
        return (self._stat(name).mtime_s or 0) * 1_000_000_000

    def _stat(self, name: str) -> Attributes:
        self._counter.add(RequestKind.STAT)
        return self._asked("read", name, lambda: self._connected().stat(self._path(name)))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""

        def read() -> bytes:
            connection = self._connected()
            with connection.open_file(self._path(name)) as handle:
                wanted = size
                if wanted is None:
                    wanted = max(0, (connection.fstat(handle).size or 0) - offset)
                    if wanted > MAX_WHOLE_READ_BYTES:
                        raise StorageError(
                            "read",
                            f"{self.url}/{name}",
                            OSError(errno.EFBIG, "it is too large to be read as a whole"),
                        )
                return connection.read(handle, offset, wanted)

        self._counter.add(RequestKind.READ)
        data = self._asked("read", name, read)
        self._counter.add(RequestKind.READ, 0, received_bytes=len(data))
        return data

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return None: every read asks the server."""
        return None

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Do nothing: this back end has no cache."""

    def write(self, name: str, data: Data) -> None:
        """Store an object, replacing one of the same name."""
        self._counter.add(RequestKind.OVERWRITE, sent_bytes=len(data))

        def rename(connection: _Connection, upload: str, path: str) -> None:
            connection.replace(upload, path)

        self._asked("write", name, lambda: self._upload(name, data, rename))
        self._tidy_once(name)

    def create(self, name: str, data: Data) -> None:
        """Store an object unless there is one of the same name."""
        self._counter.add(RequestKind.CREATE, sent_bytes=len(data))

        def link(connection: _Connection, upload: str, path: str) -> None:
            try:
                connection.link(upload, path)
            except StatusError as error:
                if error.status != Status.FAILURE:
                    raise
                try:
                    found_bytes = connection.stat(path).size or 0
                except StatusError:
                    raise error from None
                if found_bytes != len(data):
                    raise size_conflict(self.url, name, found_bytes, len(data)) from None

        self._asked("create", name, lambda: self._upload(name, data, link))
        self._tidy_once(name)

    def _upload(
        self, name: str, data: Data, give_name: Callable[[_Connection, str, str], None]
    ) -> None:
        connection = self._connected()
        upload = self._path(f"{UPLOADS}/{secrets.token_hex(16)}")
        path = self._path(name)
        try:
            try:
                connection.write_file(upload, data)
            except StatusError as error:
                if error.status != Status.NO_SUCH_FILE:
                    raise
                connection.make_folders(_parent(upload))
                connection.write_file(upload, data)
            try:
                give_name(connection, upload, path)
            except StatusError as error:
                if error.status != Status.NO_SUCH_FILE:
                    raise
                connection.make_folders(_parent(path))
                give_name(connection, upload, path)
        except StatusError as error:
            if error.status == Status.FAILURE and connection.is_full(self._folder):
                raise StorageError(
                    "write",
                    f"{self.url}/{name}",
                    OSError(errno.ENOSPC, "the server's disk is full"),
                ) from error
            raise
        finally:
            connection.remove_quietly(upload)
        connection.sync_folder(_parent(path))

    def delete(self, name: str) -> None:
        """Remove an object and make its absence durable."""
        self._counter.add(RequestKind.DELETE)

        def delete() -> None:
            connection = self._connected()
            path = self._path(name)
            try:
                connection.remove(path)
            except StatusError as error:
                if error.status != Status.NO_SUCH_FILE:
                    raise
                return
            connection.sync_folder(_parent(path))

        self._asked("delete", name, delete)

    def open_writer(self, in_memory: bool) -> BufferedWriter:
        """Begin an object, which is sent when it is committed."""
        return BufferedWriter(self.create, in_memory)

    def remove_stale_uploads(self, now_ns: int) -> None:
        """Remove the remains of uploads that were interrupted more than a day before `now_ns`.

        `now_ns` is a time of the server's clock, in nanoseconds since 1970. Raise StorageError.
        """
        for name, found in self._asked("list", UPLOADS, lambda: self._read_folder(UPLOADS)):
            if now_ns - (found.mtime_s or 0) * 1_000_000_000 > _STALE_NS:
                self.delete(f"{UPLOADS}/{name}")

    def _tidy_once(self, written: str) -> None:
        """After the first upload, whose time is that of the server's clock, remove stale uploads."""
        with self._lock:
            if self._is_tidy:
                return
            self._is_tidy = True
        try:
            self.remove_stale_uploads(self.mtime_ns(written))
        except (StorageError, StorageUnavailableError, NotFoundError) as error:
            log.info("%s; stale uploads stay", error)

    def close(self) -> None:
        """End the connection; the next call makes another one."""
        with self._lock:
            connection, self._connection = self._connection, None
            pool, self._pool = self._pool, None
        if connection is not None:
            connection.channel.close()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _read_folder(self, prefix: str) -> Entries:
        self._counter.add(RequestKind.LIST)
        try:
            found = self._connected().read_folder(self._path(prefix))
        except StatusError as error:
            if error.status == Status.NO_SUCH_FILE:
                return []
            raise
        return [(name, attributes) for name, attributes in found if is_name(f"{prefix}/{name}")]

    def _connected(self) -> _Connection:
        with self._lock:
            if self._connection is None or not self._connection.channel.is_open:
                if self._connection is not None:
                    self._connection.channel.close()
                self._connection = None
                self._connection = _Connection(SftpChannel(self._command, self.url))
            return self._connection

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_FOLDERS_AT_ONCE, "casfs-sftp")
            return self._pool

    def _asked(self, action: str, name: str, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except StatusError as error:
            where = f"{self.url}/{name}"
            if error.status == Status.NO_SUCH_FILE:
                raise NotFoundError(f"{name} is not in the repository") from error
            if error.status == Status.PERMISSION_DENIED:
                cause = OSError(errno.EACCES, "the server denies it to this user")
                raise StorageDeniedError(action, where, cause) from error
            said = error.message.strip() or f"status {error.status}"
            cause = OSError(errno.EIO, f"the server answered: {said[:200]!a}")
            raise StorageError(action, where, cause) from error


class _Connection:
    """Operations on paths of the server over one channel. Raises StatusError."""

    def __init__(self, channel: SftpChannel) -> None:
        self.channel = channel
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._read_bytes = self._write_bytes = _SAFE_CHUNK_BYTES
        if _LIMITS in channel.extensions:
            self._use_limits()

    def _use_limits(self) -> None:
        try:
            fields = Reader(self.channel.extended(_LIMITS).result(Reply.EXTENDED_REPLY))
            _, most_read, most_write = fields.u64(), fields.u64(), fields.u64()
        except (StatusError, ValueError):
            return
        self._read_bytes = min(most_read or _SAFE_CHUNK_BYTES, _MOST_CHUNK_BYTES)
        self._write_bytes = min(most_write or _SAFE_CHUNK_BYTES, _MOST_CHUNK_BYTES)

    def stat(self, path: str) -> Attributes:
        """Return a file's attributes."""
        reply = self.channel.request(Request.STAT, pack_string(path)).result(Reply.ATTRS)
        return self._parsed(lambda: _attributes(Reader(reply)))

    def fstat(self, handle: bytes) -> Attributes:
        """Return the attributes of an open file."""
        reply = self.channel.request(Request.FSTAT, pack_string(handle)).result(Reply.ATTRS)
        return self._parsed(lambda: _attributes(Reader(reply)))

    def _parsed(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except ValueError as error:
            raise self.channel.broken() from error

    def open(self, path: str, flags: int, attributes: bytes = _NO_ATTRIBUTES) -> bytes:
        """Return the handle of a file."""
        pending = self.channel.request(
            Request.OPEN, pack_string(path), struct.pack(">I", flags), attributes
        )
        return self._handle(pending)

    def _handle(self, pending: Pending) -> bytes:
        reply = pending.result(Reply.HANDLE)
        return self._parsed(lambda: Reader(reply).string())

    def close_handle(self, handle: bytes) -> Pending:
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
            file = self._keep(path, _OpenFile(self.open(path, _READ)))
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
        waiting: deque[tuple[int, Pending]] = deque()
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

    def _data(self, pending: Pending, wanted: int) -> bytes:
        reply = pending.result(Reply.DATA)
        piece = self._parsed(lambda: Reader(reply).string())
        if not 0 < len(piece) <= wanted:
            raise self.channel.broken()
        return piece

    def write_file(self, path: str, data: Data) -> None:
        """Write a new file and make its bytes durable."""
        handle = self.open(path, _WRITE | _CREATE | _EXCLUSIVE, _FILE_MODE)
        name = pack_string(handle)
        waiting: deque[Pending] = deque()
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
                found += self._parsed(lambda reply=reply: _names(reply))  # type: ignore[misc]
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
                above = _parent(missing[-1])
                if error.status != Status.NO_SUCH_FILE or above in ("", "/"):
                    raise
                missing.append(above)
            else:
                break
        for folder in reversed(missing[:-1]):
            self._make_folder(folder)

    def _make_folder(self, path: str) -> None:
        try:
            self.channel.request(Request.MKDIR, pack_string(path), _FOLDER_MODE).result(
                Reply.STATUS
            )
        except StatusError as error:
            if error.status != Status.FAILURE:
                raise
            return  # it is there
        self.sync_folder(_parent(path))

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable, where the server can: it opens the folder as a file."""
        if FSYNC not in self.channel.extensions:
            return
        try:
            handle = self.open(path or "/", _READ)
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
        if _STATVFS not in self.channel.extensions:
            return False
        try:
            reply = self.channel.extended(_STATVFS, pack_string(path)).result(Reply.EXTENDED_REPLY)
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


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _is_folder(found: Attributes) -> bool:
    return found.mode is not None and stat.S_ISDIR(found.mode)


def _listed(name: str, found: Attributes) -> ListedObject:
    return ListedObject(name, found.size or 0, (found.mtime_s or 0) * 1_000_000_000)


def _attributes(fields: Reader) -> Attributes:
    flags = fields.u32()
    size = fields.u64() if flags & 0x01 else None
    if flags & 0x02:
        fields.u64()  # owner and group
    mode = fields.u32() if flags & _PERMISSIONS else None
    mtime_s = None
    if flags & 0x08:
        fields.u32()  # the time of the last access
        mtime_s = fields.u32()
    if flags & 0x80000000:
        for _ in range(fields.u32()):
            fields.string()
            fields.string()
    return Attributes(size, mode, mtime_s)


def _names(reply: bytes) -> Entries:
    fields = Reader(reply)
    found = []
    for _ in range(fields.u32()):
        name = fields.string().decode("ascii", errors="replace")
        fields.string()  # a line as `ls -l` prints it
        attributes = _attributes(fields)
        if name not in (".", ".."):
            found.append((name, attributes))
    return found
