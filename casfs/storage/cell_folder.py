"""A folder of cells: cached parts of objects of a remote storage, bounded in bytes, verified when read.

A cell is CELL_BYTES of an object from a multiple of CELL_BYTES on, fewer only where the object ends. Its file
begins with a checksum over the object's name, the number of the cell and its bytes. A cell that does not
match is removed and counts as missing, so that a damaged cache costs a request.

Several processes may use a folder at once, and may delete any of it at any time: a file appears by a rename
and never changes. The cells that were used longest ago are removed first. Every error of the local disk means
that a cell is not cached; none reaches the caller.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from casfs.storage.base import Data

log = logging.getLogger(__name__)

CELL_BYTES = 256 * 1024
"""At 100 Mbit/s a cell takes 20 ms: less than a round trip over a long distance."""

_CHECKSUM_BYTES = 32
_EVICT_TO = 0.9
"""An eviction leaves this share of the limit, so that the next one is not due at once."""

_LOOK_AFTER_BYTES = 64 * 1024 * 1024
"""The folder is measured after this many bytes were added, and when it is closed."""

_USED_AGAIN_S = 3600.0
"""The time of use of a cell is recorded this coarsely, since each record is a write."""

_UNFINISHED_S = 3600.0
_CELL_NAME = re.compile("[0-9a-f]{40}-[0-9]{1,9}")
_LOCK = "lock"
_TAG = (
    "CACHEDIR.TAG",
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# A cache of casfs. It can be deleted at any time, also while casfs runs.\n",
)


class CellFolder:
    """The cells below one folder, which is made when the first cell is added.

    Threads may share it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._added_bytes = 0
        self._is_usable = limit_bytes > 0
        self._is_made = False

    def get(self, name: str, number: int) -> bytes | None:
        """Return a cell of an object, or None; a damaged cell is removed."""
        path = self._path(name, number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                found = file.read(_CHECKSUM_BYTES + CELL_BYTES + 1)
                if time.time() - os.fstat(fd).st_mtime > _USED_AGAIN_S:
                    with suppress(OSError):
                        os.utime(fd)
        except OSError:
            return None
        data = found[_CHECKSUM_BYTES:]
        if len(data) > CELL_BYTES or found[:_CHECKSUM_BYTES] != _checksum(name, number, data):
            log.info("%s is damaged; it is fetched again", path)
            _unlink(path)
            return None
        return data

    def holds(self, name: str, number: int) -> bool:
        """Return whether there is a file of a cell, intact or not."""
        return os.path.lexists(self._path(name, number))

    def add(self, name: str, number: int, data: Data) -> None:
        """Cache a cell of an object."""
        if not self._is_usable:
            return
        path = self._path(name, number)
        unfinished = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        try:
            self._make_folder(path.parent)
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(fd, "wb", buffering=0) as file:
                    _write(file.fileno(), _checksum(name, number, data))
                    _write(file.fileno(), data)
                os.rename(unfinished, path)
            except BaseException:
                _unlink(unfinished)
                raise
        except OSError as error:
            if error.errno != errno.ENOENT:  # the folder was deleted meanwhile
                log.info("nothing more is cached in %s: %s", self.folder, error.strerror)
                self._is_usable = False
            return
        with self._lock:
            self._added_bytes += _CHECKSUM_BYTES + len(data)
            is_due = self._added_bytes >= min(_LOOK_AFTER_BYTES, self._limit_bytes)
        if is_due:
            self.evict()

    def forget(self, name: str) -> bool:
        """Remove all cells of an object; return whether there were any."""
        folder = self._path(name, 0).parent
        prefix = f"{_key(name)}-"
        try:
            found = [one for one in os.listdir(folder) if one.startswith(prefix)]
        except OSError:
            return False
        for one in found:
            _unlink(folder / one)
        return bool(found)

    def evict(self) -> None:
        """Remove the cells that were used longest ago, as far as the limit requires."""
        with self._lock:
            self._added_bytes = 0
        with self._alone() as is_alone:
            if not is_alone:
                return
            cells: list[tuple[float, int, str]] = []
            for path, status in _files(self.folder):
                if _CELL_NAME.fullmatch(os.path.basename(path)):
                    cells.append((status.st_mtime, status.st_blocks * 512, path))
                elif time.time() - status.st_mtime > _UNFINISHED_S:
                    _unlink(Path(path))  # its process died while it wrote
            total_bytes = sum(size for _, size, _ in cells)
            if total_bytes <= self._limit_bytes:
                return
            for _, size, path in sorted(cells):
                if total_bytes <= self._limit_bytes * _EVICT_TO:
                    return
                _unlink(Path(path))
                total_bytes -= size

    def close(self) -> None:
        """Evict what exceeds the limit, if cells were added."""
        if self._added_bytes:
            self.evict()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Yield whether no other process evicts cells of this folder now."""
        try:
            fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
        finally:
            os.close(fd)

    def _make_folder(self, folder: Path) -> None:
        if not self._is_made:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            name, text = _TAG
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with (
                suppress(FileExistsError),
                open(os.open(self.folder / name, flags, 0o600), "wb") as file,
            ):
                file.write(text)
            self._is_made = True
        folder.mkdir(mode=0o700, exist_ok=True)

    def _path(self, name: str, number: int) -> Path:
        key = _key(name)
        return self.folder / key[:2] / f"{key}-{number}"


def _key(name: str) -> str:
    return blake3(name.encode()).hexdigest(length=20)


def _checksum(name: str, number: int, data: Data) -> bytes:
    return blake3(f"{name} {number}\n".encode()).update(data).digest()


def _write(fd: int, data: Data) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _unlink(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files in the folders of a folder; what vanishes meanwhile is left out."""
    with suppress(OSError), os.scandir(folder) as below:
        for entry in below:
            if not entry.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError), os.scandir(entry.path) as files:
                for file in files:
                    with suppress(OSError):
                        yield file.path, file.stat(follow_symlinks=False)
