"""Who may wait: the thread that answers all requests must not, every other thread may.

Whatever could wait for a disk or for another thread asks first. On the event loop's thread the answer
is NotAtHand, and the question is put again on a worker thread, which fills the caches on its way.
"""

from __future__ import annotations

from threading import get_ident


class NotAtHand(Exception):
    """The answer is in no cache, and this thread must not wait for it."""


class Waiting:
    """Knows the one thread that must not wait, if there is any."""

    def __init__(self) -> None:
        self._hurried = 0

    def forbid_here(self) -> None:
        """Let the calling thread wait no more; there is one such thread at most."""
        self._hurried = get_ident()

    def is_allowed(self) -> bool:
        """Tell whether the calling thread may wait."""
        return get_ident() != self._hurried

    def begin(self) -> None:
        """Return where the calling thread may wait; raise NotAtHand otherwise."""
        if get_ident() == self._hurried:
            raise NotAtHand
