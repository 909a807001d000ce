"""The kernel's cache, dropped or filled so that every program starts from the same state."""

from __future__ import annotations

import os
from pathlib import Path

from bench.corpus import warm
from bench.measure import can_drop_caches, drop_caches


class KernelCache:
    """What the kernel keeps of the files that the benchmark uses."""

    def __init__(self) -> None:
        self.droppable = can_drop_caches()

    def drop(self) -> None:
        """Make everything cold; needs root."""
        drop_caches()

    def settle(self) -> None:
        """Forget what was removed, as far as that is allowed; see `Scratch.discard`."""
        if self.droppable:
            self.drop()

    def warm(self, *folders: Path) -> None:
        """Make folders warm, and let no writing of an earlier program disturb the next.

        They are read every time: nothing says that a kernel still has what it once read (some
        machines give memory back to their host within seconds).
        """
        os.sync()
        for folder in folders:
            warm(folder)
