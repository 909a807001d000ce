"""A best-effort worker pool: a few daemon threads and a short queue; a task that does not fit is dropped.

No caller waits for a result. The threads start with the first task and do not keep the process alive.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from casfs.errors import CasfsError

log = logging.getLogger(__name__)

_THREADS = 2
_MAX_QUEUED = 8
"""Tasks that may wait for a thread; in a longer queue, results would come too late to be of use."""


class BackgroundPool:
    """Runs tasks on its threads; safe to share between threads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, task: Callable[[], None]) -> bool:
        """Queue a task and return True; return False if the queue is full or the pool is closed."""
        if self._closed or self._queue.qsize() >= _MAX_QUEUED:
            return False
        if not self._threads:
            self._start()
        if not self._threads:
            return False
        self._queue.put(task)
        return True

    def close(self, timeout_s: float = 1.0) -> bool:
        """Start no further task; return whether all running tasks ended within `timeout_s` each."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self) -> None:
        with self._lock:
            if self._threads:
                return
            started = []
            for number in range(_THREADS):
                name = f"casfs-background-{number}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the system starts no more threads
                    log.debug("%s is not started: %s", name, error)
                    break
                started.append(thread)
            self._threads = started

    def _run(self) -> None:
        while (task := self._queue.get()) is not None and not self._closed:
            try:
                task()
            except CasfsError as error:
                # A reader that needs the data reads it again and gets the error.
                log.debug("in the background: %s", error)
            except Exception:
                log.exception("a background task failed")
