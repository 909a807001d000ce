"""Drop or fill the kernel's cache, so that every program starts from the same state."""

from __future__ import annotations

import os
from pathlib import Path

from bench.corpus import warm
from bench.measure import can_drop_caches, drop_caches


class KernelCache:
    """The kernel's cache of the files that the benchmark uses."""

    def __init__(self) -> None:
        self.droppable = can_drop_caches()

    def drop(self) -> None:
        """Drop the whole cache; needs root."""
        drop_caches()

    def settle(self) -> None:
        """Drop the cache of removed files, if this user may; see `Scratch.discard`."""
        if self.droppable:
            self.drop()

    def warm(self, *folders: Path) -> None:
        """Read folders into the cache, and wait until earlier writes have reached the disk.

        They are read every time: nothing says that a kernel still has what it once read (some
        machines give memory back to their host within seconds).
        """
        os.sync()
        for folder in folders:
            warm(folder)
