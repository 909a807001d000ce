"""Small files stored in the kernel's page cache while they are opened, so that no read request follows.

A program that opens a small file almost always reads it. The reply to the open would be followed by a read
request, which costs several times what the decoding costs. The FUSE notification *store* puts the verified
bytes into the page cache before the reply.

- Only whole files of one chunk are stored, only verified bytes, and only if no step would block. In all other
  cases, also for damaged data, the read request comes and is answered, or refused, as usual.
- The notification waits for pages that are locked, and a page stays locked while a read request for it is not
  answered. So a file that is open already is never stored: the event loop would wait for its own answer.
- A file is stored once, until a read request shows that the kernel has dropped its pages.

Used only by the event-loop thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from casfs_mount.file_reader import MAX_SMALL_BYTES, Readable

log = logging.getLogger(__name__)

StorePages = Callable[[int, int, bytes], None]
"""Store data in the page cache: inode number, offset, bytes; raises OSError."""

_BLOCK_BITS = 13
_MAX_BLOCKS = 512
"""Blocks of file numbers that are remembered: 512 KiB of memory for four million numbers."""


class NumberSet:
    """A set of numbers in bounded memory: a bitmap of blocks, whose least recently used one is dropped."""

    def __init__(self, max_blocks: int = _MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, bytearray] = OrderedDict()

    def __contains__(self, number: int) -> bool:
        block = self._blocks.get(number >> _BLOCK_BITS)
        at = number & ((1 << _BLOCK_BITS) - 1)
        return block is not None and bool(block[at >> 3] & 1 << (at & 7))

    def add(self, number: int) -> None:
        """Add a number."""
        key = number >> _BLOCK_BITS
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = bytearray(1 << (_BLOCK_BITS - 3))
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(key)
        at = number & ((1 << _BLOCK_BITS) - 1)
        block[at >> 3] |= 1 << (at & 7)

    def clear(self) -> None:
        """Remove all numbers."""
        self._blocks.clear()


class PageCache:
    """What the kernel's page cache holds of small files, as far as the mount knows.

    `store` is None where nothing may be stored. Files are named by their position, and to the kernel by
    their inode number, which hard links share.
    """

    def __init__(self, store: StorePages | None) -> None:
        self._store = store
        self._held = NumberSet()
        self._open: dict[int, int] = {}

    def on_open(self, position: int, inode: int, reader: Readable) -> bool:
        """Note that a file is opened; store it if it is small and at hand, and return whether it was."""
        count = self._open.get(inode, 0)
        self._open[inode] = count + 1
        if self._store is None or count or position in self._held:
            return False
        data = reader.whole(MAX_SMALL_BYTES)
        if data is None:
            return False
        try:
            self._store(inode, 0, data)
        except OSError as error:
            log.info("files are not stored in the kernel's page cache: %s", error)
            self._store = None
            return False
        self._held.add(position)
        return True

    def on_read(self, position: int) -> None:
        """Note a read request for the beginning of a file, whose pages the kernel holds afterwards."""
        if self._store is None:
            return
        if position in self._held:
            # The kernel dropped these pages, and probably others.
            self._held.clear()
        self._held.add(position)

    def on_release(self, inode: int) -> None:
        """Note that an open file is closed."""
        count = self._open.pop(inode, 0)
        if count > 1:
            self._open[inode] = count - 1
