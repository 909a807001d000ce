"""Locks between processes: one small file each, held by `flock` for as long as its process lives.

A lock whose file can be locked by another belongs to nobody any more and is removed. What may be held at
once is told by `LockMode`. A reader's lock keeps nobody from anything: it tells a prune that somebody
may still read what no snapshot needs any more.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from enum import StrEnum
from pathlib import Path
from types import TracebackType

import msgspec

from casfs.errors import LockedError, StorageError


class LockMode(StrEnum):
    """What a lock is for: readers go with everybody, shared ones (backups) with all but an exclusive one.

    Of those that tend the repository (prune, repair snapshots) there is one at a time; an exclusive one
    (repair index) stands alone.
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
    """What a lock file tells people about who holds it.

    `since_ns` is when it was written by the clock of its file system, in nanoseconds since 1970; it is
    told by `list_and_reap_locks` and not by the file itself.
    """

    mode: LockMode
    verb: str
    host: str
    pid: int
    time: int
    since_ns: int = 0


class RepositoryLock:
    """A held lock; `name` is unique among all that ever were, and marks temporary files."""

    def __init__(self, folder: Path, name: str, fd: int, mode: LockMode) -> None:
        self._path = folder / name
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
        """Take a lock in `folder`, or raise LockedError naming who holds the repository.

        `host` is what others are told of where the holder is, by default this machine's name.
        """
        name = secrets.token_hex(8)
        host = host if host is not None else socket.gethostname()
        record = LockRecord(mode, verb, host, os.getpid(), int(time.time()))
        try:
            folder.mkdir(exist_ok=True)
            lock = cls(folder, name, _create_held(folder, name, record), mode)
        except OSError as error:
            raise StorageError("write a lock in", str(folder), error) from error
        try:
            for other_name, other in list_and_reap_locks(folder).items():
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
        """Give the lock back; harmless when it was given back already."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RepositoryLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def list_and_reap_locks(folder: Path) -> dict[str, LockRecord]:
    """Return the locks that a living process holds, and remove the others."""
    live: dict[str, LockRecord] = {}
    for path in sorted(folder.iterdir()):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another may have removed it first, and its maker have made it again.
            if _is_same_file(path, fd):
                path.unlink(missing_ok=True)
        except BlockingIOError:
            if not path.name.startswith("."):
                live[path.name] = _read_record(fd)
        finally:
            os.close(fd)
    return live


def remove_stale_temporaries(root: Path) -> None:
    """Delete temporary files whose writer no longer lives; `root` is the repository's folder."""
    folder = root / "tmp"
    names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    if not names:
        return
    live = list_and_reap_locks(root / "locks")
    for name in names:
        if name.partition(".")[0] not in live:
            (folder / name).unlink(missing_ok=True)


def _create_held(folder: Path, name: str, record: LockRecord) -> int:
    """Make a lock's file, which appears under its name only when it is held and tells all."""
    unfinished = folder / f".{name}"
    while True:
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.pwrite(fd, msgspec.json.encode(record), 0)
            if _is_same_file(unfinished, fd):
                os.rename(unfinished, folder / name)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            unfinished.unlink(missing_ok=True)
            raise
        # Somebody took the new file for one that was left behind; make it again.
        os.close(fd)


def _is_same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _read_record(fd: int) -> LockRecord:
    try:
        record = msgspec.json.decode(os.pread(fd, 4096, 0), type=LockRecord)
        return msgspec.structs.replace(record, since_ns=os.fstat(fd).st_mtime_ns)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Held, but what it says is damaged, or of another version: treat it as the strictest.
        return LockRecord(LockMode.EXCLUSIVE, "another command", "an unknown host", 0, 0)
