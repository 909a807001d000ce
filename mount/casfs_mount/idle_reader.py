"""Small files and trees decoded between two requests, so that the next request of a walk finds them at hand.

A program that lists directories or reads files one after the other spends time on each of them, during which
the event loop would wait. In this time it decodes what the program will list and open next, into the caches.
That is the same work on the same thread, only earlier: at most a few steps ahead, one at a time, and none
that would have to wait for a disk. A wrong guess costs the decoding of these few.

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

NEAR_FILES = 256
"""Two files whose numbers are no further apart are taken for steps of one walk."""

NEVER = 0

DecodeAfter = Callable[[int], Iterator[int]]
"""Decode what comes after a number in the order of a walk, one for each step; yield its number, or `NEVER`
for an entry without anything to decode. Raises WouldBlock and CasfsError."""


class WalkAhead:
    """Follows the numbers of one walk, and decodes what comes next when it is asked to.

    Two numbers that are more than `near` apart are no steps of one walk; None allows any distance.
    """

    def __init__(self, decode_after: DecodeAfter, near: int | None = None) -> None:
        self._decode_after = decode_after
        self._near = near
        self._steps: Iterator[int] | None = None
        self._ahead: deque[int] = deque()
        self._last = NEVER

    def follow(self, number: int) -> None:
        """Note the next number of the walk, or of another one."""
        ahead = self._ahead
        while ahead and ahead[0] < number:
            ahead.popleft()
        if ahead and ahead[0] == number:
            ahead.popleft()
        else:
            ahead.clear()
            distance = number - self._last if self._last != NEVER else 0
            is_walk = distance > 0 and (self._near is None or distance <= self._near)
            self._steps = self._decode_after(number) if is_walk else None
        self._last = number

    def is_due(self) -> bool:
        """Return whether `work` may find something to decode."""
        return self._steps is not None and len(self._ahead) < MAX_AHEAD

    def work(self) -> bool:
        """Decode one file or tree, or look at one entry; return whether there may be more to do."""
        if not self.is_due() or self._steps is None:
            return False
        try:
            number = next(self._steps, None)
        except (WouldBlock, CasfsError):
            number = None  # the request for it waits, or reports the damage
        except Exception:
            log.exception("nothing could be decoded ahead")
            number = None
        if number is None:
            self._steps = None
            return False
        if number != NEVER:
            self._ahead.append(number)
        return self.is_due()


class IdleReader:
    """Decodes ahead of the walk through files, and of that through directories."""

    def __init__(self, decode_files_after: DecodeAfter, decode_trees_after: DecodeAfter) -> None:
        self._files = WalkAhead(decode_files_after, NEAR_FILES)
        self._directories = WalkAhead(decode_trees_after)

    def on_open(self, number: int) -> None:
        """Note that a small file is opened that the kernel did not have."""
        self._files.follow(number)

    def on_readdir(self, number: int) -> None:
        """Note that a directory is listed from its beginning."""
        self._directories.follow(number)

    def is_due(self) -> bool:
        """Return whether `work` may find something to decode."""
        return self._files.is_due() or self._directories.is_due()

    def work(self) -> bool:
        """Decode one file or tree, or look at one entry; return whether there may be more to do."""
        if self._files.is_due():
            return self._files.work() or self._directories.is_due()
        return self._directories.work()
