"""Small files decoded between two requests, so that the next `open` of a walk finds its file at hand.

A program that reads the files of a directory one after the other spends time on each of them, during which
the event loop would wait. In this time it decodes the files that the program will open next, into the chunk
cache. That is the same work on the same thread, only earlier: at most a few files ahead, one at a time, and
none that would have to wait for a disk. A wrong guess costs the decoding of these few.

Used only by the event-loop thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

from casfs.errors import CasfsError
from casfs_mount.event_loop_guard import WouldBlock

log = logging.getLogger(__name__)

MAX_AHEAD = 4

_NEAR = 256
"""Two files whose numbers are no further apart are taken for steps of one walk."""

NEVER = 0

DecodeAfter = Callable[[int], Iterator[int]]
"""Decode the small files after the one with a number, one for each step; yield its number, or `NEVER` for an
entry that is no such file. Raises WouldBlock and CasfsError."""


class IdleReader:
    """Follows the files that are opened, and decodes those that come next when it is asked to."""

    def __init__(self, decode_after: DecodeAfter) -> None:
        self._decode_after = decode_after
        self._steps: Iterator[int] | None = None
        self._ahead: deque[int] = deque()
        self._last = NEVER

    def on_open(self, number: int) -> None:
        """Note that a small file is opened that the kernel did not have."""
        ahead = self._ahead
        while ahead and ahead[0] < number:
            ahead.popleft()
        if ahead and ahead[0] == number:
            ahead.popleft()
        else:
            ahead.clear()
            is_walk = 0 < number - self._last <= _NEAR and self._last != NEVER
            self._steps = self._decode_after(number) if is_walk else None
        self._last = number

    def is_due(self) -> bool:
        """Return whether `work` may find a file to decode."""
        return self._steps is not None and len(self._ahead) < MAX_AHEAD

    def work(self) -> bool:
        """Decode one file, or look at one entry; return whether there may be more to do."""
        if not self.is_due() or self._steps is None:
            return False
        try:
            number = next(self._steps, None)
        except (WouldBlock, CasfsError):
            number = None  # the open of that file waits for it, or reports the damage
        except Exception:
            log.exception("a file could not be decoded ahead")
            number = None
        if number is None:
            self._steps = None
            return False
        if number != NEVER:
            self._ahead.append(number)
        return self.is_due()
