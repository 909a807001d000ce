"""Descriptors of recently read files, so that many small reads of a file open it once.

A descriptor is closed only while no thread reads from it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable


class DescriptorPool:
    """The descriptors of up to `limit` files, opened by `open_file`; any thread may use it. Close it."""

    def __init__(self, limit: int, open_file: Callable[[str], int]) -> None:
        self._limit = limit
        self._open_file = open_file
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def open(self, name: str) -> OpenFile:
        """Return an open file to use in a `with` block."""
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                self._files.move_to_end(name)
                file.users += 1
                return file
        fd = self._open_file(name)
        with self._lock:
            other = self._files.get(name)
            if other is not None:
                os.close(fd)
                other.users += 1
                return other
            file = OpenFile(self._lock, fd)
            self._files[name] = file
            while len(self._files) > self._limit:
                _, oldest = self._files.popitem(last=False)
                oldest.retire()
        return file

    def if_open(self, name: str) -> OpenFile | None:
        """Return a file to use in a `with` block if it is already open."""
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                file.users += 1
            return file

    def forget(self, name: str) -> None:
        """Close a file whose name is about to refer to another object."""
        with self._lock:
            file = self._files.pop(name, None)
            if file is not None:
                file.retire()

    def close(self) -> None:
        """Close every file; a file that a thread reads from is closed when that read ends."""
        with self._lock:
            for file in self._files.values():
                file.retire()
            self._files.clear()


class OpenFile:
    """A descriptor with a count of its users; `with` returns the descriptor."""

    __slots__ = ("_fd", "_lock", "_retired", "users")

    def __init__(self, lock: threading.Lock, fd: int) -> None:
        self._lock = lock
        self._fd = fd
        self._retired = False
        self.users = 1

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self.users -= 1
            if self._retired and self.users == 0:
                os.close(self._fd)

    def retire(self) -> None:
        """Close the descriptor now, or when its last user leaves. The caller holds the pool's lock."""
        self._retired = True
        if self.users == 0:
            os.close(self._fd)
