"""The event library of pyfuse3: trio, with a cheaper lock and a cheaper wait for the next request.

pyfuse3 takes its event library from its module attribute `trio`, so that its own asyncio support can replace
it. Between two requests pyfuse3 acquires a lock and waits until the FUSE descriptor is readable. In trio each
of the two is a checkpoint: a trip through the scheduler, with two calls of epoll_ctl and epoll_wait.
For requests that are answered from memory, these trips cost more than the answers. So here:

- The lock suspends only a task that finds it held.
- `wait_readable` first polls the descriptor on the spot, which blocks the event-loop thread for at most
  `POLL_MS`. Only if no request arrives does it wait in trio, so an idle mount sleeps there without a timeout.
- Before it blocks, small pieces of work are done that requests will need soon (`WorkAhead`); after each the
  descriptor is polled again.

What keeps other tasks, signals, timers and cancellation alive:

- After `MAX_TURNS` requests in a row, or `MAX_TURNS_S` seconds, the wait goes through trio, which runs every
  task that is ready, delivers cancellation, and calls signal handlers.
- While a worker thread is busy for a request, no wait is on the spot: its result must not wait for a poll.
- Nor while no other task waits for the lock. pyfuse3 has then started one, which has to run first: otherwise
  it would start another one for each request.
- What the poll reports besides readable (an unmounted or invalid descriptor) and its errors take the same
  path as in trio.

Used only by the event-loop thread.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import pyfuse3
import trio

POLL_MS = 2
"""The longest wait on the spot. Programs that walk a mount send the next request much sooner."""

MAX_TURNS = 256
MAX_TURNS_S = 0.02
"""How many requests, and for how long, may follow each other without a trip through trio."""

_ATTRIBUTE = "trio"
_READABLE = select.POLLIN | select.POLLERR | select.POLLHUP


class Poll(Protocol):
    """The calls of `select.poll` objects that are used here."""

    def register(self, fd: int, eventmask: int, /) -> None:
        """Add a descriptor."""

    def poll(self, timeout: float | None, /) -> list[tuple[int, int]]:
        """Return descriptors with their events; wait at most `timeout` milliseconds."""


class WorkAhead(Protocol):
    """Work that may be done while no request is there."""

    def is_due(self) -> bool:
        """Return whether there may be work; at no cost."""

    def work(self) -> bool:
        """Do a piece that takes no longer than answering a request; return whether there may be more.

        Never wait, and raise nothing.
        """


class RequestLock:
    """A lock of tasks that costs no checkpoint while it is free.

    It does not go to the task that waits longest: the task that releases it may acquire it again at once, and
    the waiting task looks again when trio runs it next. So one task answers request after request, and
    another takes over when that task waits for a worker thread.
    """

    def __init__(self) -> None:
        self._held = False
        self._parked = trio.lowlevel.ParkingLot()
        self._waiting = 0

    def is_awaited(self) -> bool:
        """Return whether a task waits for the lock, or was woken and has not run yet."""
        return self._waiting > 0

    async def __aenter__(self) -> None:
        if self._held:
            self._waiting += 1
            try:
                while self._held:
                    await self._parked.park()
            finally:
                self._waiting -= 1
        self._held = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held = False
        if self._parked:
            self._parked.unpark()


class RequestWait:
    """The waits for one FUSE descriptor.

    `is_idle` returns whether no worker thread is busy, `has_successor` whether another task is ready to wait
    next.
    """

    def __init__(
        self,
        is_idle: Callable[[], bool],
        has_successor: Callable[[], bool],
        ahead: WorkAhead | None = None,
        *,
        make_poll: Callable[[], Poll] = select.poll,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_idle = is_idle
        self._has_successor = has_successor
        self._ahead = ahead
        self._make_poll = make_poll
        self._clock = clock
        self._polls: dict[int, Poll] = {}
        self._turns = 0
        self._until = 0.0

    async def wait_readable(self, fd: int) -> None:
        """Return when a descriptor is readable, or has an error or a hang-up.

        Raises trio.ClosedResourceError after `trio.lowlevel.notify_closing`, and the errors of trio's wait.
        """
        if (
            self._turns
            and self._has_successor()
            and self._is_idle()
            and self._clock() < self._until
        ):
            self._turns -= 1
            if self._work_until_readable(fd) or self._is_readable(fd, POLL_MS):
                return
        await trio.lowlevel.wait_readable(fd)
        self._turns = MAX_TURNS
        self._until = self._clock() + MAX_TURNS_S

    def _work_until_readable(self, fd: int) -> bool:
        """Work ahead while there is something to do and no request; return whether there is a request."""
        ahead = self._ahead
        if ahead is None or not ahead.is_due():
            return False
        while not self._is_readable(fd, 0):
            if not ahead.work() or self._clock() >= self._until:
                return False
        return True

    def _is_readable(self, fd: int, timeout_ms: int) -> bool:
        poll = self._polls.get(fd)
        if poll is None:
            poll = self._polls[fd] = self._make_poll()
            poll.register(fd, select.POLLIN)
        try:
            found = poll.poll(timeout_ms)
        except OSError:
            return False  # trio's wait reports what is wrong with the descriptor
        return bool(found) and bool(found[0][1] & _READABLE)


class _LowLevel:
    """`trio.lowlevel` with another `wait_readable`."""

    def __init__(self, wait: RequestWait) -> None:
        self.wait_readable = wait.wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class EventLibrary:
    """`trio` as one session of pyfuse3 uses it: with one lock, and another `lowlevel.wait_readable`."""

    def __init__(self, is_idle: Callable[[], bool], ahead: WorkAhead | None = None) -> None:
        self._lock = RequestLock()
        self.lowlevel = _LowLevel(RequestWait(is_idle, self._lock.is_awaited, ahead))

    def Lock(self) -> RequestLock:
        """Return the lock of the session; pyfuse3 makes only one."""
        return self._lock

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@contextmanager
def fast_event_library(
    is_idle: Callable[[], bool], ahead: WorkAhead | None = None
) -> Iterator[bool]:
    """Let pyfuse3 use an `EventLibrary` while the context lasts; yield whether it does.

    A pyfuse3 that keeps trio elsewhere stays with plain trio, which is slower.
    """
    if getattr(pyfuse3, _ATTRIBUTE, None) is not trio:
        yield False
        return
    setattr(pyfuse3, _ATTRIBUTE, EventLibrary(is_idle, ahead))
    try:
        yield True
    finally:
        setattr(pyfuse3, _ATTRIBUTE, trio)
