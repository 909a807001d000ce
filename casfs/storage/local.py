"""A storage in a folder of a local or mounted file system: the contract of `base` over POSIX calls.

An object's bytes are synced before its temporary file is renamed to its name. The folder that holds the name
is synced before the call returns.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from casfs.errors import CasfsError, NotFoundError, StorageDeniedError, StorageError
from casfs.storage.base import (
    MAX_WHOLE_READ_BYTES,
    Capabilities,
    Data,
    ListedObject,
    is_name,
    size_conflict,
)
from casfs.storage.descriptor_pool import DescriptorPool
from casfs.storage.folder import Folder

log = logging.getLogger(__name__)

_TEMPORARIES = "tmp"
_OPEN_FILES = 64
"""How many packs stay open for reading; each uses one descriptor."""


class LocalStorage:
    """A storage in a folder of a local file system.

    `writer` is part of the names of this process's temporary files, so that the files of a dead process can
    be recognized. `sync=False` is for tests of everything but durability. `on_step` is called with the name
    of every durable step before and after it, for tests that stop a process there.
    """

    capabilities = Capabilities(
        creates_exclusively=False,
        reads_ranges=True,
        has_own_clock=True,
        syncs_names=True,
        can_overwrite=True,
        can_delete=True,
        reads_nonblocking=True,
        holds_locks=True,
        parallel_requests=1,
    )

    def __init__(
        self,
        root: Path,
        writer: str | None = None,
        sync: bool = True,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        self.root = root
        self.writer = writer if writer is not None else f"p{os.getpid()}"
        self._sync = sync
        self._on_step = on_step
        self._serial = itertools.count()
        self._folder = Folder(root)
        self._files = DescriptorPool(_OPEN_FILES, self._folder.open_file)

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self.root)

    @property
    def bucket(self) -> None:
        """A folder keeps no versions."""

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix, sorted by name."""
        try:
            with self._folder.opened(prefix) as fd:
                # A folder sorts by its name with the `/` that follows it, so that objects come in order
                # of their names.
                with os.scandir(fd) as found_entries:
                    entries = sorted(
                        found_entries,
                        key=lambda entry: (
                            f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                        ),
                    )
                for entry in entries:
                    name = f"{prefix}/{entry.name}"
                    if not is_name(name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        yield from self.list(name)
                        continue
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    yield ListedObject(name, found.st_size, found.st_mtime_ns)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _storage_error("list", str(self.root / prefix), error) from error

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return self._stat(name).st_size

    def mtime_ns(self, name: str) -> int:
        """Return the time at which an object was written."""
        return self._stat(name).st_mtime_ns

    def _stat(self, name: str) -> os.stat_result:
        try:
            return self._folder.stat(name)
        except FileNotFoundError as error:
            raise NotFoundError(f"{name} is not in the repository") from error
        except OSError as error:
            raise _storage_error("read", str(self.root / name), error) from error

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""
        try:
            with self._files.open(name) as fd:
                if size is None:
                    size = max(0, os.fstat(fd).st_size - offset)
                    if size > MAX_WHOLE_READ_BYTES:
                        raise OSError(errno.EFBIG, "too large to read as a whole")
                data = os.pread(fd, size, offset)
                while len(data) < size:
                    more = os.pread(fd, size - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
                return data
        except FileNotFoundError as error:
            raise NotFoundError(f"{name} is not in the repository") from error
        except OSError as error:
            self._files.forget(name)
            self._folder.reopen_after(error)
            raise _storage_error("read", str(self.root / name), error) from error

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a range if its object is open and the kernel has the range cached, else None."""
        file = self._files.if_open(name)
        if file is None:
            return None
        data = bytearray(size)
        try:
            with file as fd:
                got = os.preadv(fd, [data], offset, os.RWF_NOWAIT)
        except OSError:
            return None
        return bytes(data) if got == size else None

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Ask the kernel to read a range in the background."""
        try:
            with self._files.open(name) as fd:
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return

    def write(self, name: str, data: Data) -> None:
        """Store a whole object durably and replace an object of the same name."""
        writer = self.open_writer(in_memory=True)
        try:
            writer.append(data)
            writer.replace(name)
        finally:
            writer.discard()

    def create(self, name: str, data: Data) -> None:
        """Store a whole object durably unless the name exists."""
        writer = self.open_writer(in_memory=True)
        try:
            writer.append(data)
            writer.commit(name)
        finally:
            writer.discard()

    def delete(self, name: str) -> None:
        """Remove an object and make its removal durable."""
        self._files.forget(name)
        above, _, last = name.rpartition("/")
        try:
            self._step("unlink", name)
            with self._folder.opened(above) as fd:
                os.unlink(last, dir_fd=fd)
                self._sync_folder(fd, name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _storage_error("delete", str(self.root / name), error) from error

    def open_writer(self, in_memory: bool) -> LocalWriter:
        """Begin an object; with `in_memory` the disk is not touched before the commit."""
        return LocalWriter(self, in_memory)

    def close(self) -> None:
        """Close the packs that are kept open for reading, and the folder."""
        self._files.close()
        self._folder.close()

    def _temporary_name(self) -> str:
        return f"{self.writer}.{next(self._serial)}"

    def _create_temporary(self, name: str) -> int:
        """Create a file in `tmp` and return its descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with self._folder.opened(_TEMPORARIES) as fd:
                return os.open(name, flags, 0o600, dir_fd=fd)
        except FileNotFoundError:
            # A copy of a repository may lack the empty folders.
            self._folder.make(_TEMPORARIES)
        with self._folder.opened(_TEMPORARIES) as fd:
            return os.open(name, flags, 0o600, dir_fd=fd)

    def _remove_temporary(self, name: str) -> None:
        try:
            with self._folder.opened(_TEMPORARIES) as fd:
                os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            return

    def _publish(self, fd: int, temporary: str, name: str) -> None:
        self._step("data", name)
        if self._sync:
            os.fsync(fd)
        self._step("rename", name)
        try:
            self._rename(temporary, name)
        except FileNotFoundError:
            for above in self._folder.make(name.rpartition("/")[0]):
                with self._folder.opened(above) as folder:
                    self._sync_folder(folder, name)
            self._rename(temporary, name)

    def _rename(self, temporary: str, name: str) -> None:
        """Rename a temporary file to the name of an object, and sync its folder."""
        above, _, last = name.rpartition("/")
        with self._folder.opened(_TEMPORARIES) as source, self._folder.opened(above) as fd:
            self._files.forget(name)
            os.rename(temporary, last, src_dir_fd=source, dst_dir_fd=fd)
            self._sync_folder(fd, name)

    def _keep_existing(self, name: str, size: int) -> bool:
        """Return whether an object of this name and size exists; if so, make its name durable."""
        try:
            found_bytes = self._folder.stat(name).st_size
            if found_bytes == size and self._sync:
                with self._folder.opened(name.rpartition("/")[0]) as fd:
                    self._sync_folder(fd, name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _storage_error("create", str(self.root / name), error) from error
        if found_bytes != size:
            raise size_conflict(self.url, name, found_bytes, size)
        return True

    def _sync_folder(self, fd: int, name: str) -> None:
        self._step("folder", name)
        if self._sync:
            os.fsync(fd)
        self._step("done", name)

    def _step(self, what: str, name: str) -> None:
        if self._on_step is not None:
            self._on_step(f"{what} {name.partition('/')[0]}")


class LocalWriter:
    """An unnamed object of a LocalStorage; used by one thread at a time."""

    def __init__(self, storage: LocalStorage, in_memory: bool) -> None:
        self._storage = storage
        self._parts: list[bytes] | None = [] if in_memory else None
        self._temporary: str | None = None
        self._fd = -1
        self._begun = 0
        self._bytes = 0

    def append(self, data: Data) -> None:
        """Append bytes; raise StorageError when the write fails."""
        if self._parts is not None:
            self._parts.append(bytes(data))
            return
        self._write(data)
        if self._bytes - self._begun >= 8 * 1024 * 1024:
            # The advice to drop the pages starts writeback, which leaves less for the sync at the
            # end.
            os.posix_fadvise(
                self._fd, self._begun, self._bytes - self._begun, os.POSIX_FADV_DONTNEED
            )
            self._begun = self._bytes

    def commit(self, name: str) -> None:
        """Make the bytes durable under a name, unless an object of the same size has it."""
        size = sum(map(len, self._parts)) if self._parts is not None else self._bytes
        if self._storage._keep_existing(name, size):
            self.discard()
        else:
            self.replace(name)

    def replace(self, name: str) -> None:
        """Make the bytes durable under a name and replace the object that has it."""
        for part in self._parts or ():
            self._write(part)
        self._parts = None
        temporary = self._open()
        try:
            self._storage._publish(self._fd, temporary, name)
        except OSError as error:
            raise _storage_error("write", str(self._storage.root / name), error) from error
        os.close(self._fd)
        self._fd, self._temporary = -1, None

    def discard(self) -> None:
        """Remove the bytes written so far; after `commit`, do nothing."""
        self._parts = None
        fd, temporary = self._fd, self._temporary
        self._fd, self._temporary = -1, None
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            log.debug("a temporary file cannot be closed: %s", error)
        try:
            if temporary is not None:
                self._storage._remove_temporary(temporary)
        except (OSError, CasfsError) as error:
            # The next process that opens the repository for writing removes it.
            log.debug("a temporary file stays: %s", error)

    def _open(self) -> str:
        if self._temporary is None:
            name = self._storage._temporary_name()
            try:
                self._fd = self._storage._create_temporary(name)
            except OSError as error:
                path = self._storage.root / _TEMPORARIES / name
                raise _storage_error("create", str(path), error) from error
            self._temporary = name
        return self._temporary

    def _write(self, data: Data) -> None:
        path = str(self._storage.root / _TEMPORARIES / self._open())
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                raise _storage_error("write", path, error) from error
            if written == 0:
                raise _storage_error("write", path, OSError(errno.EIO, "the kernel wrote no bytes"))
            view = view[written:]
            self._bytes += written


def _storage_error(action: str, path: str, error: OSError) -> StorageError:
    kind = StorageDeniedError if error.errno in (errno.EACCES, errno.EPERM) else StorageError
    return kind(action, path, error)
