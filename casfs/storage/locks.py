"""Locks between processes: one small file each, held by `flock` as long as its process lives.

The kernel releases a lock when its process dies; the next process that lists the locks removes its file.
`LockMode` defines which locks conflict. A reader's lock conflicts with none: it shows a prune that a reader
may still need blobs that no snapshot refers to.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from enum import StrEnum
from pathlib import Path
from types import TracebackType

import msgspec

from casfs.errors import CasfsError, LockedError, StorageError
from casfs.json_document import InvalidJsonError, parse_json
from casfs.storage.folder import Folder, open_regular

_LOCK_NAME = re.compile(r"\.?[0-9a-f]{16}")
_TEMPORARY_NAME = re.compile(r"(?:[0-9a-f]{16}|p[0-9]+)\.[0-9]+")
_NOT_LOCKS = frozenset([errno.ENOENT, errno.ELOOP, errno.EINVAL])
"""The errors of a name that vanished, and of one that is no regular file."""

log = logging.getLogger(__name__)


class LockMode(StrEnum):
    """The purpose of a lock.

    Readers conflict with no lock. Shared locks (backups) conflict only with an exclusive lock. Only one
    process at a time may hold a maintenance lock (prune, repair snapshots). An exclusive lock (repair index)
    conflicts with every lock except a reader's.
    """

    READER = "reader"
    SHARED = "shared"
    MAINTENANCE = "tending"
    EXCLUSIVE = "exclusive"


_CONFLICTS = {
    LockMode.READER: frozenset[LockMode](),
    LockMode.SHARED: frozenset([LockMode.EXCLUSIVE]),
    LockMode.MAINTENANCE: frozenset([LockMode.MAINTENANCE, LockMode.EXCLUSIVE]),
    LockMode.EXCLUSIVE: frozenset([LockMode.SHARED, LockMode.MAINTENANCE, LockMode.EXCLUSIVE]),
}


class LockRecord(msgspec.Struct, frozen=True):
    """The contents of a lock file: who holds the lock.

    `since_ns` is the time at which the lock was written: nanoseconds since 1970 by the clock of its file
    system. `list_and_reap_locks` sets it; the file does not contain it.
    """

    mode: LockMode
    verb: str
    host: str
    pid: int
    time: int
    since_ns: int = 0


class RepositoryLock:
    """A held lock. `name` is never reused; it is also part of the names of temporary files."""

    def __init__(self, above: Folder, folder: str, name: str, fd: int, mode: LockMode) -> None:
        self._above = above
        self._folder = folder
        self._fd = fd
        self.name = name
        self.mode = mode

    @classmethod
    def acquire(
        cls,
        folder: Path,
        verb: str,
        mode: LockMode = LockMode.SHARED,
        host: str | None = None,
    ) -> RepositoryLock:
        """Acquire a lock in `folder`, which is created if missing.

        `host` is the host name recorded in the lock, by default this machine's. Raise LockedError naming the
        holder of a conflicting lock, and RefusedError for a folder of another user.
        """
        name = os.urandom(8).hex()
        host = host if host is not None else os.uname().nodename
        record = LockRecord(mode, verb, host, os.getpid(), int(time.time()))
        above = Folder(folder.parent)
        try:
            above.make(folder.name)
            with above.opened(folder.name) as folder_fd:
                held_fd = _create_held(folder_fd, name, record)
        except OSError as error:
            above.close()
            raise StorageError("write a lock in", str(folder), error) from error
        except BaseException:
            above.close()
            raise
        lock = cls(above, folder.name, name, held_fd, mode)
        try:
            for other_name, other in _live_locks(above, folder.name, reap=True).items():
                if other_name != name and other.mode in _CONFLICTS[mode]:
                    raise LockedError(
                        f"the repository is in use: {other.verb} on {other.host}, process {other.pid}; "
                        "wait for it to end"
                    )
        except OSError as error:
            lock.release()
            raise StorageError("read the locks in", str(folder), error) from error
        except BaseException:
            lock.release()
            raise
        return lock

    def release(self) -> None:
        """Release the lock; raise nothing. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            # In the folder in which the lock was acquired, whatever its path refers to now.
            with self._above.opened(self._folder) as folder_fd:
                _unlink(folder_fd, self.name)
        except (OSError, CasfsError) as error:
            # The lock is released with its descriptor; the next process that lists the locks removes it.
            log.debug("the file of a lock stays: %s", error)
        self._above.close()
        try:
            os.close(fd)
        except OSError as error:
            log.debug("the file of a lock cannot be closed: %s", error)

    def __enter__(self) -> RepositoryLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class FolderLocks:
    """The locks in a folder, which the first lock creates; see `casfs.storage.base.Locks`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def acquire(self, verb: str, mode: LockMode, host: str | None = None) -> RepositoryLock:
        """Acquire a lock; raise LockedError where a conflicting one is held."""
        return RepositoryLock.acquire(self._folder, verb, mode, host)

    def held(self) -> dict[str, LockRecord]:
        """Return the locks that living processes hold, by name; none where the folder does not exist."""
        try:
            return list_locks(self._folder)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unreadable(error) from error

    def reap(self) -> dict[str, LockRecord]:
        """Return the locks that living processes hold, by name, and remove what dead ones left."""
        try:
            return list_and_reap_locks(self._folder)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError("read the locks in", str(self._folder), error)


def list_and_reap_locks(folder: Path) -> dict[str, LockRecord]:
    """Return the locks that living processes hold, and remove the files of the rest.

    Entries whose names are not those of locks are left alone.
    """
    return _list_locks(folder, reap=True)


def list_locks(folder: Path) -> dict[str, LockRecord]:
    """Return the locks that living processes hold, and change nothing."""
    return _list_locks(folder, reap=False)


def _list_locks(folder: Path, reap: bool) -> dict[str, LockRecord]:
    above = Folder(folder.parent)
    try:
        return _live_locks(above, folder.name, reap)
    finally:
        above.close()


def _live_locks(above: Folder, folder: str, reap: bool) -> dict[str, LockRecord]:
    live: dict[str, LockRecord] = {}
    with above.opened(folder) as folder_fd:
        for name in sorted(os.listdir(folder_fd)):
            if _LOCK_NAME.fullmatch(name) is None:
                continue
            try:
                fd = open_regular(name, folder_fd)
            except OSError as error:
                if error.errno in _NOT_LOCKS:
                    continue
                raise
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process may have removed the file, and its owner created it again.
                if reap and _is_same_file(folder_fd, name, fd):
                    _unlink(folder_fd, name)
            except BlockingIOError:
                if not name.startswith("."):
                    live[name] = _read_record(fd)
            finally:
                os.close(fd)
    return live


def remove_stale_temporaries(root: Path) -> None:
    """Delete temporary files whose writer is dead; `root` is the repository's folder.

    Entries whose names are not those of temporary files are left alone.
    """
    folder = Folder(root)
    try:
        with folder.opened("tmp") as folder_fd:
            names = [name for name in os.listdir(folder_fd) if _TEMPORARY_NAME.fullmatch(name)]
            if not names:
                return
            live = _live_locks(folder, "locks", reap=True)
            for name in names:
                if name.partition(".")[0] not in live:
                    _unlink(folder_fd, name)
    except FileNotFoundError:
        return
    finally:
        folder.close()


def _unlink(folder_fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder_fd)
    except (FileNotFoundError, IsADirectoryError):
        return


def _create_held(folder_fd: int, name: str, record: LockRecord) -> int:
    """Create a lock file that appears under its name only when it is locked and complete."""
    unfinished = f".{name}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(unfinished, flags, 0o600, dir_fd=folder_fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.pwrite(fd, msgspec.json.encode(record), 0)
            if _is_same_file(folder_fd, unfinished, fd):
                os.rename(unfinished, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            _unlink(folder_fd, unfinished)
            raise
        # Another process removed the unfinished file as stale; create it again.
        os.close(fd)


def _is_same_file(folder_fd: int, name: str, fd: int) -> bool:
    try:
        named = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), named)


def _read_record(fd: int) -> LockRecord:
    try:
        record = parse_json(os.pread(fd, 4096, 0), LockRecord)
        return msgspec.structs.replace(record, since_ns=os.fstat(fd).st_mtime_ns)
    except InvalidJsonError:
        # The lock is held, but its record is damaged or of another version: assume the strictest
        # mode.
        return LockRecord(LockMode.EXCLUSIVE, "another command", "an unknown host", 0, 0)
