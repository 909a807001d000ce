"""Changing real files at an exact read: the reads of this process go through a hook."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Action = Callable[[], None]


class Reads:
    """What happens before the reads of some files; every read of those gives at most `step` bytes.

    A file is known by its inode, so what replaces it under its name is read undisturbed. Reads are
    counted from 1, over all attempts and witnesses.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int = 64 * 1024) -> None:
        self._step = step
        self._counts: dict[int, int] = {}
        self._actions: dict[int, Callable[[int], None]] = {}
        self._is_acting = False
        for name in ("read", "pread"):
            monkeypatch.setattr(os, name, self._plain(getattr(os, name)))
        monkeypatch.setattr(os, "preadv", self._vectored(os.preadv))

    def watch(self, file: Path, action: Callable[[int], None]) -> None:
        """Call `action` with the number of each read of a file, before the read."""
        inode = file.stat().st_ino
        self._actions[inode] = action
        self._counts[inode] = 0

    def before(self, file: Path, number: int, action: Action) -> None:
        """Do something once, before the read of that number."""
        self.watch(file, lambda count: action() if count == number else None)

    def count(self, file: Path) -> int:
        return self._counts[file.stat().st_ino]

    def _act(self, fd: int) -> bool:
        if self._is_acting or not self._actions:
            return False
        inode = os.fstat(fd).st_ino
        if inode not in self._actions:
            return False
        self._counts[inode] += 1
        self._is_acting = True
        try:
            self._actions[inode](self._counts[inode])
        finally:
            self._is_acting = False
        return True

    def _plain(self, real: Callable[..., bytes]) -> Callable[..., bytes]:
        def read(fd: int, size: int, *offset: int) -> bytes:
            return real(fd, min(size, self._step) if self._act(fd) else size, *offset)

        return read

    def _vectored(self, real: Callable[..., int]) -> Callable[..., int]:
        def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if not self._act(fd):
                return real(fd, buffers, offset)
            return real(fd, [memoryview(buffers[0])[: self._step]], offset)

        return preadv
