"""Work that nobody waits for: a few threads, a short queue, and no place for what does not fit.

The threads start with the first errand and keep no process from ending.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from casfs.errors import CasfsError

log = logging.getLogger(__name__)

_THREADS = 2
_MAX_WAITING = 8
"""BackgroundPool that may wait; more would do what is not wanted any more when its turn comes."""


class BackgroundPool:
    """Runs errands; safe to share between threads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, errand: Callable[[], None]) -> bool:
        """Have an errand run soon; False when there are too many already."""
        if self._closed or self._queue.qsize() >= _MAX_WAITING:
            return False
        if not self._threads:
            self._start()
        self._queue.put(errand)
        return True

    def close(self, patience_s: float = 1.0) -> bool:
        """Run no more of them, and tell whether none is running any more."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(patience_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self) -> None:
        with self._lock:
            if self._threads:
                return
            self._threads = [
                threading.Thread(target=self._run, name=f"casfs-errands-{n}", daemon=True)
                for n in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _run(self) -> None:
        while (errand := self._queue.get()) is not None and not self._closed:
            try:
                errand()
            except CasfsError as error:
                # Whoever needs what failed here asks for it again and is told.
                log.debug("in the background: %s", error)
            except Exception:
                log.exception("an errand failed")
