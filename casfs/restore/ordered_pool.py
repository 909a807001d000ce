"""A crew: jobs done by threads of its own, a batch each; what comes of them is told in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")

_THREADS = 1
"""Beside the one that adds jobs. A second one made ext4 work half as long again (two threads wait for one
journal, and for the interpreter) and nothing faster, on two cores."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How large a batch is, and how much may wait before the caller does.

    `waiting` counts batches and steps: a directory that a step closes is one open descriptor.
    """

    batch_jobs: int = 32
    batch_bytes: int = 512 * 1024
    waiting: int = 96
    waiting_bytes: int = 8 * 1024 * 1024


DEFAULT_LIMITS = PoolLimits()


class OrderedPool(Generic[J, R]):
    """Do jobs with `do` in threads and hand what it returns to `tell`, on the thread that adds them.

    `do` raises nothing that is expected. To be closed in a `finally`.
    """

    def __init__(
        self,
        do: Callable[[J], R],
        tell: Callable[[R], None],
        *,
        limits: PoolLimits = DEFAULT_LIMITS,
    ) -> None:
        self._limits = limits
        self._do = do
        self._tell = tell
        self._pool = ThreadPoolExecutor(_THREADS, "casfs-crew")
        self._waiting: deque[tuple[Future[list[R]] | None, Callable[[], None] | None, int]]
        self._waiting = deque()
        self._bytes = 0
        self._batch: list[J] = []
        self._batch_bytes = 0
        self._stopped = False

    def work(self, job: J, size: int) -> None:
        """Have a job done that holds `size` bytes of memory; raises what `tell` and steps raise."""
        self._batch.append(job)
        self._batch_bytes += size
        limits = self._limits
        if len(self._batch) >= limits.batch_jobs or self._batch_bytes >= limits.batch_bytes:
            self._send()
            self._advance()

    def call_after(self, step: Callable[[], None]) -> None:
        """Call `step` on this thread, when all is told that was added before."""
        self._send()
        self._waiting.append((None, step, 0))
        self._advance()

    def drain(self) -> None:
        """Wait until all is told that was added."""
        self._send()
        while self._waiting:
            self._settle_oldest()

    def close(self) -> None:
        """Wait for the threads, which end what they have begun and begin nothing more."""
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _send(self) -> None:
        if self._batch:
            future = self._pool.submit(self._do_all, self._batch)
            self._waiting.append((future, None, self._batch_bytes))
            self._bytes += self._batch_bytes
            self._batch, self._batch_bytes = [], 0

    def _advance(self) -> None:
        """Tell what is done, and wait where too much is not."""
        while self._waiting:
            future = self._waiting[0][0]
            limits = self._limits
            is_full = len(self._waiting) > limits.waiting or self._bytes > limits.waiting_bytes
            if not is_full and future is not None and not future.done():
                break
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        future, step, size = self._waiting.popleft()
        self._bytes -= size
        if future is not None:
            for found in future.result():
                self._tell(found)
        if step is not None:
            step()

    def _do_all(self, jobs: list[J]) -> list[R]:
        found = []
        for job in jobs:
            if self._stopped:
                break
            found.append(self._do(job))
        return found
