"""Reach the files of a folder that other users may be able to change, and follow no symlink.

The folder itself is opened once, at the first use, and everything below it is reached from there: every name
is looked up by itself with O_NOFOLLOW, and the kind of what was opened is checked on the descriptor. A folder
that belongs to neither this user nor root is refused, unless the user has allowed it: its owner decides what
is found there.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casfs.errors import RefusedError

ALLOW_FOREIGN_VARIABLE = "CASFS_ALLOW_FOREIGN"
"""If this environment variable is 1, folders of other users are used."""

_STEP_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_NEW_FOLDER_MODE = 0o775
"""Before the umask: a folder that every user can write lets every user replace what is in it."""


def allows_foreign_folders() -> bool:
    """Return whether the user has allowed repositories that belong to other users."""
    return os.environ.get(ALLOW_FOREIGN_VARIABLE) == "1"


def allow_foreign_folders() -> None:
    """Allow repositories that belong to other users, in this process and its children."""
    os.environ[ALLOW_FOREIGN_VARIABLE] = "1"


_GONE = frozenset(
    [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN]
)


def open_regular(name: str, dir_fd: int) -> int:
    """Open a file for reading; raise OSError for a symlink and everything else that is no regular file."""
    try:
        fd = os.open(name, _FILE_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        raise _explained(error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return fd


def _explained(error: OSError) -> OSError:
    if error.errno == errno.ELOOP:
        return OSError(errno.ELOOP, "it is a symlink, which is not followed in a repository")
    if error.errno == errno.ENXIO:
        return OSError(errno.EINVAL, "it is not a regular file")
    return error


class Folder:
    """A folder and the folders below it, for one storage. Thread-safe."""

    # Of the class: `__del__` also runs where a signal has ended `__init__` before its first line.
    _fd = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        self._users = 0
        self._is_closing = False
        self._lock = threading.Lock()
        self._allows_foreign = allows_foreign_folders()

    def __del__(self) -> None:
        # Without the lock, which may not be there yet: nothing else uses the folder any more.
        self._close_fd()

    def close(self) -> None:
        """Close the folder, at the end of its current uses; the next use opens it again."""
        with self._lock:
            self._is_closing = True
            self._close_unused()

    def _close_unused(self) -> None:
        if self._is_closing and self._users == 0:
            self._close_fd()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            # Forgotten first: a signal in between must not close the same number twice.
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _enter(self) -> int:
        """Return the folder's descriptor, which stays open until `_leave`."""
        with self._lock:
            if self._fd < 0:
                self._fd = self._open_root()
            self._is_closing = False
            self._users += 1
            return self._fd

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._close_unused()

    def _open_root(self) -> int:
        # The path is the user's own: symlinks in it are followed.
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._require_owner(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _require_owner(self, fd: int, *names: str) -> None:
        owner = os.fstat(fd).st_uid
        if owner not in (0, os.geteuid()) and not self._allows_foreign:
            raise RefusedError(
                f"the folder {self.path.joinpath(*names)} belongs to user {owner}, who could change the "
                "repository while it is used; if you trust that user, add --allow-foreign-repository or "
                f"set {ALLOW_FOREIGN_VARIABLE}=1"
            )

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Yield a descriptor of the folder `name` ("" is the folder itself), which can be listed and synced.

        Raises OSError, and RefusedError for a folder of another user.
        """
        with self._above(name) as (above, last):
            if not last:
                yield above
                return
            fd = os.open(last, _FOLDER_FLAGS, dir_fd=above)
            try:
                self._require_owner(fd, name)
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _above(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield a descriptor of the folder that holds `name`, for lookups, and the last part of the name."""
        above, _, last = name.rpartition("/")
        root = fd = self._enter()
        try:
            if above:
                fd = self._descend(root, above)
            yield fd, last
        except OSError as error:
            self.reopen_after(error)
            raise
        finally:
            if fd != root:
                os.close(fd)
            self._leave()

    def reopen_after(self, error: OSError) -> None:
        """Let the next use open the folder by its path again, where an error shows that this one is gone.

        A network or a disk that went away and came back has another folder at the same path.
        """
        with self._lock:
            if self._fd < 0:
                return
            is_gone = error.errno in _GONE
            if error.errno == errno.ENOENT:
                is_gone = os.fstat(self._fd).st_nlink == 0
            if is_gone:
                self._is_closing = True
                self._close_unused()

    def _descend(self, fd: int, name: str) -> int:
        """Return a descriptor, for lookups, of the folder `name` below `fd`; the caller closes it."""
        below = -1
        try:
            steps = name.split("/")
            for count, step in enumerate(steps, 1):
                above, below = below, os.open(step, _STEP_FLAGS, dir_fd=fd if below < 0 else below)
                if above >= 0:
                    os.close(above)
                self._require_owner(below, *steps[:count])
            return below
        except BaseException:
            if below >= 0:
                os.close(below)
            raise

    def open_file(self, name: str) -> int:
        """Open a regular file for reading; raise OSError and RefusedError."""
        with self._above(name) as (above, last):
            return open_regular(last, above)

    def stat(self, name: str) -> os.stat_result:
        """Return the metadata of a regular file; raise OSError and RefusedError."""
        with self._above(name) as (above, last):
            st = os.stat(last, dir_fd=above, follow_symlinks=False)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return st

    def make(self, name: str) -> list[str]:
        """Create a folder and those above it; return the folders in which one was created."""
        changed: list[str] = []
        above = ""
        for step in name.split("/"):
            with self.opened(above) as fd:
                try:
                    os.mkdir(step, _NEW_FOLDER_MODE, dir_fd=fd)
                    changed.append(above)
                except FileExistsError:
                    pass
            above = f"{above}/{step}" if above else step
        return changed
