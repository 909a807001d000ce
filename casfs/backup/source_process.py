"""Read a mount that may never answer through another process, which is given up after a timeout.

A process that waits for such a mount can be in a state that SIGKILL does not end. It is left behind then, and
ends when the mount answers or is taken away. This process never calls into the mount itself. One thread.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from contextlib import suppress
from stat import S_ISDIR, S_ISLNK
from typing import Any, NoReturn

from casfs.backup.mount_table import MountTable
from casfs.backup.source_fs import AT_FDCWD, OPENING, Handle, stat_entry
from casfs.backup.source_server import ADOPT, receive, send
from casfs.display import escape_path
from casfs.server_process import start_server_process

DEFAULT_MOUNT_TIMEOUT_S = 60.0

_START_S = 60.0
_REAP_S = 0.2

_SERVER = "casfs.backup.source_server"


class MountTimeoutError(OSError):
    """A mount did not answer in time; nothing in it is read any more."""


class RemoteHandle:
    """A descriptor of the process that reads a mount."""

    __slots__ = ("_fd", "_process")

    def __init__(self, process: SourceProcess, fd: int) -> None:
        self._process = process
        self._fd = fd

    @property
    def is_dead(self) -> bool:
        """Whether the process was given up."""
        return self._process.error is not None

    def call(self, action: str, *arguments: object) -> Any:
        """Return the result of an action on this descriptor; raise OSError."""
        if action == "close" and self.is_dead:
            return None
        found = self._process.call(action, self._fd, arguments)
        return RemoteHandle(self._process, found) if action in OPENING else found


class SourceProcess:
    """The process for one mount. `error` is set when it was given up."""

    def __init__(self, mount: bytes, timeout_s: float) -> None:
        self.error: OSError | None = None
        self._mount = mount
        self._timeout_s = timeout_s
        self._connection, other = socket.socketpair()
        with other:
            # A signal of the terminal is for the backup alone; the process ends with its connection.
            self._pid = start_server_process(
                _SERVER,
                other.fileno(),
                default=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
                own_group=True,
            )
        self._connection.settimeout(_START_S)
        try:
            receive(self._connection)
        except (OSError, EOFError):
            self.error = self._error("did not start")
            self.close()
        except BaseException:
            self.close()
            raise
        else:
            self._connection.settimeout(timeout_s)
        self.working_directory = RemoteHandle(self, AT_FDCWD)

    def adopt(self, fd: int) -> RemoteHandle:
        """Return a handle of the process for a descriptor of this process."""
        return RemoteHandle(self, self._ask(ADOPT, 0, (), fd))

    def call(self, action: str, fd: int, arguments: tuple[object, ...]) -> Any:
        """Return the result of an action; raise its OSError, or MountTimeoutError without an answer."""
        return self._ask(action, fd, arguments)

    def _ask(
        self, action: str, fd: int, arguments: tuple[object, ...], passed_fd: int | None = None
    ) -> Any:
        if self.error is not None:
            raise self.error
        try:
            send(self._connection, (action, fd, arguments))
            if passed_fd is not None:
                socket.send_fds(self._connection, [b"\0"], [passed_fd])
            result, failed = receive(self._connection)
        except (OSError, EOFError) as error:
            self._give_up(error)
        except BaseException:
            # A signal ended the wait: what comes later would be taken for the answer to another request.
            self.error = MountTimeoutError(errno.EINTR, os.strerror(errno.EINTR))
            self.close()
            raise
        if failed is not None:
            raise failed
        return result

    def _give_up(self, error: Exception) -> NoReturn:
        if isinstance(error, TimeoutError):
            self.error = MountTimeoutError(
                errno.ETIMEDOUT,
                f"the file system mounted on {escape_path(self._mount)} did not answer for "
                f"{self._timeout_s:g} s; the rest of it is missing from the snapshot",
            )
        else:
            self.error = self._error("ended")
        self.close()
        raise self.error from error

    def _error(self, what: str) -> OSError:
        return MountTimeoutError(
            errno.EIO,
            f"the process that reads the file system mounted on {escape_path(self._mount)} {what}; the rest "
            "of it is missing from the snapshot",
        )

    def close(self) -> None:
        """End the process, without waiting for one that does not end."""
        if self._pid < 0:
            return
        pid, self._pid = self._pid, -1
        self._connection.close()
        deadline = time.monotonic() + _REAP_S
        # Where SIGCHLD is ignored there is nothing to wait for once the process has ended.
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
            while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.005)


class ServedMounts:
    """The served mounts of one backup, each with its process once something in it is read. Close it."""

    def __init__(
        self, timeout_s: float = DEFAULT_MOUNT_TIMEOUT_S, table: MountTable | None = None
    ) -> None:
        self._timeout_s = timeout_s
        self._table = table or MountTable()
        self._processes: dict[bytes, SourceProcess] = {}

    def close(self) -> None:
        """End all processes."""
        self._table.close()
        for process in self._processes.values():
            process.close()

    def refresh(self) -> bool:
        """Look whether mounts have come or gone; return whether the table changed."""
        return self._table.refresh()

    def names_in(self, device: int, inode: int) -> frozenset[bytes]:
        """Return the names in a directory on which served mounts are."""
        return self._table.names_in(device, inode)

    def is_mountpoint(self, fd: int, name: bytes) -> bool:
        """Return whether a served mount is on a name in a directory of this process."""
        st = os.fstat(fd)
        return name in self.names_in(st.st_dev, st.st_ino)

    def stat(self, path: bytes, follow: bool = False) -> os.stat_result:
        """Return the metadata at a path; raise OSError."""
        return stat_entry(self.above(path), path, follow)

    def is_directory_link(self, path: bytes) -> bool:
        """Return whether a path is a symlink to a directory."""
        try:
            return S_ISLNK(self.stat(path).st_mode) and S_ISDIR(self.stat(path, True).st_mode)
        except OSError:
            return False

    def directory(self, fd: int, name: bytes) -> RemoteHandle:
        """Return a handle of a directory of this process, for use of the mount on `name` in it."""
        path = os.path.join(os.readlink(b"/proc/self/fd/%d" % fd), name)
        return self._process(path).adopt(fd)

    def above(self, path: bytes) -> Handle:
        """Return the handle from which to look up a path: of the process of its mount, or of this process."""
        self._table.refresh()
        mount = self._table.mount_of(path)
        return AT_FDCWD if mount is None else self._process(mount).working_directory

    def _process(self, mount: bytes) -> SourceProcess:
        process = self._processes.get(mount)
        if process is None:
            process = self._processes[mount] = SourceProcess(mount, self._timeout_s)
        return process
