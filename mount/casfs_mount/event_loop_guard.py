"""Guard against blocking the event-loop thread: try without waiting, then repeat on a worker thread.

One thread runs the event loop and answers all FUSE requests. If it waits for a disk, every other program
in the mount waits too. A worker thread may wait, but to hand a request over costs some 100 µs, several
times the cost of an answer from the cache. So each request takes two steps at most:

1. The handler calls the view on the event-loop thread. Code that is about to wait, for a disk, a lock
   or a future, first calls `require_may_block`. On this thread it raises WouldBlock: like EWOULDBLOCK of a
   non-blocking socket, the answer is in no cache yet.
2. The handler catches WouldBlock and makes the same call on a worker thread, where `require_may_block`
   returns. The worker reads from disk and fills the caches on its way.

A call that raises WouldBlock must have no effect that its repetition would double. All code below the
handlers is synchronous and has no second, non-blocking version: the guard alone makes the difference.
"""

from __future__ import annotations

from threading import get_ident


class WouldBlock(Exception):
    """The answer is not cached, and the event-loop thread must not wait for it.

    Like EWOULDBLOCK: the caller repeats the call on a thread that may wait.
    """


class EventLoopGuard:
    """Keeps which thread must not wait; every thread may until `bind` is called.

    Safe to share between threads.
    """

    def __init__(self) -> None:
        self._event_loop_thread = 0

    def bind(self) -> None:
        """Make the calling thread the event-loop thread, which must not wait from now on."""
        self._event_loop_thread = get_ident()

    def may_block(self) -> bool:
        """Return whether the calling thread may wait."""
        return get_ident() != self._event_loop_thread

    def require_may_block(self) -> None:
        """Raise WouldBlock if the calling thread must not wait."""
        if get_ident() == self._event_loop_thread:
            raise WouldBlock
