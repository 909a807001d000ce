"""Who may wait: the thread that answers all requests must not, every other thread may.

Whatever could wait for a disk or for another thread asks first. On the event loop's thread the answer
is WouldBlock, and the question is put again on a worker thread, which fills the caches on its way.
"""

from __future__ import annotations

from threading import get_ident


class WouldBlock(Exception):
    """The answer is in no cache, and this thread must not wait for it."""


class EventLoopGuard:
    """Knows the one thread that must not wait, if there is any."""

    def __init__(self) -> None:
        self._hurried = 0

    def bind(self) -> None:
        """Let the calling thread wait no more; there is one such thread at most."""
        self._hurried = get_ident()

    def may_block(self) -> bool:
        """Tell whether the calling thread may wait."""
        return get_ident() != self._hurried

    def require_may_block(self) -> None:
        """Return where the calling thread may wait; raise WouldBlock otherwise."""
        if get_ident() == self._hurried:
            raise WouldBlock
