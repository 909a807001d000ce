"""The directories that a restore is in, of which a bounded number is open however deep the tree is.

Any user can make thousands of levels, and a process may open a limited number of files. So a directory with
many open ones below it is closed; the way back leads through `..` of the directory below. A directory that is
not found there was moved meanwhile: nothing more is restored in it. One thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from casfs.format.tree import Node
from casfs.restore.target_fs import close_restoring_mode, open_subdir

_OPEN_LEVELS = 64
"""How many of the innermost directories stay open."""

_KEPT_LEVELS = 32
"""How many of the outermost ones do, so that a directory moved far below them costs nothing above it."""


@dataclass(slots=True)
class Directory:
    """A directory that is being restored.

    `fd` is -1 until an entry in it is included, and while it is closed for those below it; then `closed` is
    what it has to be when it is opened again. `mode` is the original mode of an existing directory that was
    made writable. `complete` is false where its tree is damaged. `names` are its entries in the snapshot.
    `is_fresh` is the result of `target_fs.is_fresh` for a directory that was created.
    """

    node: Node
    path: bytes
    fd: int
    included: bool
    nodes: Iterator[Node] = field(default_factory=lambda: iter(()))
    created: bool = False
    is_fresh: bool = False
    mode: int | None = None
    complete: bool = True
    names: set[bytes] = field(default_factory=set)
    folded: dict[str, bytes] | None = None
    closed: os.stat_result | None = None


class OpenDirectories:
    """The directories from the target to the current one, and those below that are not finished yet.

    `call_after` calls a step when all jobs that were given out before are done: until then they may use a
    descriptor. `on_lost` is called for a directory that cannot be opened again. Close it in a `finally`.
    """

    def __init__(
        self,
        call_after: Callable[[Callable[[], None]], None],
        on_lost: Callable[[Directory, OSError], None],
    ) -> None:
        self.stack: list[Directory] = []
        self._call_after = call_after
        self._on_lost = on_lost
        self._open: dict[int, Directory] = {}
        self._closing: set[int] = set()

    def set_open(self, directory: Directory, fd: int, mode: int | None = None) -> None:
        """Note the descriptor of a directory (-1: there is none), and its mode if that was changed."""
        directory.fd, directory.mode = fd, mode
        if fd >= 0:
            self._open[fd] = directory

    def push(self, directory: Directory) -> None:
        """Enter a directory."""
        self.stack.append(directory)
        self.limit_open(len(self.stack) - 1)

    def pop(self) -> Directory:
        """Leave the current directory, and open the one above it again if it was closed."""
        left = self.stack.pop()
        above = self.stack[-1] if self.stack else None
        if above is not None and above.closed is not None:
            error = self._reopen(above, left)
            if error is not None:
                above.nodes, above.complete = iter(()), False
                self._on_lost(above, error)
        return left

    def limit_open(self, level: int) -> None:
        """Close the directory that has too many open ones below it, up to `level` of the stack."""
        if level < _KEPT_LEVELS + _OPEN_LEVELS:
            return
        directory, below = self.stack[level - _OPEN_LEVELS : level - _OPEN_LEVELS + 2]
        if directory.fd < 0 or below.fd < 0:
            return
        fd, directory.fd = directory.fd, -1
        directory.closed = os.fstat(fd)
        del self._open[fd]
        self._closing.add(fd)
        self._call_after(partial(self._close_descriptor, fd))

    def finish(self, directory: Directory) -> None:
        """Close a directory that was left, and set its mode back if that was changed."""
        if self._open.pop(directory.fd, None) is not None:
            close_restoring_mode(directory.fd, directory.mode)

    def close(self) -> None:
        """Close all directories; on the way up, set the modes back that were changed."""
        for fd in list(self._closing):
            self._close_descriptor(fd)
        below: Directory | None = None
        for directory in reversed(self.stack):
            if below is not None:
                if directory.closed is not None:
                    self._reopen(directory, below)
                self.finish(below)
            below = directory
        for directory in reversed(list(self._open.values())):
            self.finish(directory)

    def _close_descriptor(self, fd: int) -> None:
        self._closing.discard(fd)
        os.close(fd)

    def _reopen(self, directory: Directory, below: Directory) -> OSError | None:
        """Open a directory again through the one below it; return the error where that fails."""
        expected, directory.closed = directory.closed, None
        assert expected is not None
        try:
            if below.fd < 0:
                raise _moved_error()
            fd = open_subdir(below.fd, b"..")
            if not os.path.samestat(os.fstat(fd), expected):
                os.close(fd)
                raise _moved_error()
        except OSError as error:
            return error
        self.set_open(directory, fd, directory.mode)
        return None


def _moved_error() -> OSError:
    return OSError(
        errno.ESTALE, "it was moved while entries below it were restored; restore it again"
    )
