"""A storage on a machine that is reached by SSH: SFTP through the user's own `ssh`.

An object is uploaded below `uploads/`, synced, and linked to its name: OpenSSH's `hardlink@openssh.com` fails
where the name exists. Then its folder is synced, by opening it as a file: SFTP has no other way. The
next call after the end of a connection makes another one; `retry.RetryingStorage` makes that call.
"""

from __future__ import annotations

import errno
import logging
import secrets
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from casfs.storage.sftp_channel import SftpChannel
from casfs.storage.sftp_connection import SftpConnection, parent_path
from casfs.storage.sftp_protocol import Attributes, Entries, Status, StatusError

T = TypeVar("T")

log = logging.getLogger(__name__)

UPLOADS = "uploads"
"""The folder of objects that have no name yet.

The first upload of a process removes the remains of uploads that were interrupted more than a day before."""

_STALE_NS = 24 * 3600 * 1_000_000_000
_FOLDERS_AT_ONCE = 16
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
        self._connection: SftpConnection | None = None
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

        def rename(connection: SftpConnection, upload: str, path: str) -> None:
            connection.replace(upload, path)

        self._asked("write", name, lambda: self._upload(name, data, rename))
        self._tidy_once(name)

    def create(self, name: str, data: Data) -> None:
        """Store an object unless there is one of the same name."""
        self._counter.add(RequestKind.CREATE, sent_bytes=len(data))

        def link(connection: SftpConnection, upload: str, path: str) -> None:
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
        self, name: str, data: Data, give_name: Callable[[SftpConnection, str, str], None]
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
                connection.make_folders(parent_path(upload))
                connection.write_file(upload, data)
            try:
                give_name(connection, upload, path)
            except StatusError as error:
                if error.status != Status.NO_SUCH_FILE:
                    raise
                connection.make_folders(parent_path(path))
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
        connection.sync_folder(parent_path(path))

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
            connection.sync_folder(parent_path(path))

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

    def _connected(self) -> SftpConnection:
        with self._lock:
            if self._connection is None or not self._connection.channel.is_open:
                if self._connection is not None:
                    self._connection.channel.close()
                self._connection = None
                self._connection = SftpConnection(SftpChannel(self._command, self.url))
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


def _is_folder(found: Attributes) -> bool:
    return found.mode is not None and stat.S_ISDIR(found.mode)


def _listed(name: str, found: Attributes) -> ListedObject:
    return ListedObject(name, found.size or 0, (found.mtime_s or 0) * 1_000_000_000)
