"""A bounded worker pool that runs jobs in batches and delivers their results in the order of the jobs.

Results and steps run on the thread that adds them. The number of waiting batches and the bytes that their
jobs hold are bounded: a caller that adds more waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")

_THREADS = 1
"""Workers beside the thread that adds jobs. On two cores, a second worker made a restore to ext4 take half as
long again (two threads compete for one journal and for the interpreter), and no restore faster."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The size of a batch, and the limits of pending work beyond which the caller waits.

    `waiting` counts batches and steps: each step that closes a directory holds an open descriptor.
    """

    batch_jobs: int = 32
    batch_bytes: int = 512 * 1024
    waiting: int = 96
    waiting_bytes: int = 8 * 1024 * 1024


DEFAULT_LIMITS = PoolLimits()


class OrderedPool(Generic[J, R]):
    """Run `run` on jobs in worker threads, and pass the results to `on_result` on the calling thread.

    `run` returns expected errors as part of its result; an exception ends the restore. Close the pool in a
    `finally`.
    """

    def __init__(
        self,
        run: Callable[[J], R],
        on_result: Callable[[R], None],
        *,
        limits: PoolLimits = DEFAULT_LIMITS,
    ) -> None:
        self._limits = limits
        self._run = run
        self._on_result = on_result
        self._pool = ThreadPoolExecutor(_THREADS, "casfs-restore")
        self._waiting: deque[tuple[Future[list[R]] | None, Callable[[], None] | None, int]]
        self._waiting = deque()
        self._bytes = 0
        self._batch: list[J] = []
        self._batch_bytes = 0
        self._stopped = False

    def work(self, job: J, size: int) -> None:
        """Add a job that holds `size` bytes of memory. Raises what `run`, `on_result` and steps raise."""
        self._batch.append(job)
        self._batch_bytes += size
        limits = self._limits
        if len(self._batch) >= limits.batch_jobs or self._batch_bytes >= limits.batch_bytes:
            self._submit_batch()
            self._advance()

    def call_after(self, step: Callable[[], None]) -> None:
        """Call `step` on this thread, after the results of all jobs added before."""
        self._submit_batch()
        self._waiting.append((None, step, 0))
        self._advance()

    def drain(self) -> None:
        """Wait for all jobs, and deliver all results."""
        self._submit_batch()
        while self._waiting:
            self._deliver_oldest()

    def close(self) -> None:
        """Wait for the threads to finish their current jobs; drop the jobs that have not begun."""
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit_batch(self) -> None:
        if self._batch:
            future = self._pool.submit(self._run_all, self._batch)
            self._waiting.append((future, None, self._batch_bytes))
            self._bytes += self._batch_bytes
            self._batch, self._batch_bytes = [], 0

    def _advance(self) -> None:
        """Deliver the finished results at the front, and wait while too much is pending."""
        while self._waiting:
            future = self._waiting[0][0]
            limits = self._limits
            is_full = len(self._waiting) > limits.waiting or self._bytes > limits.waiting_bytes
            if not is_full and future is not None and not future.done():
                break
            self._deliver_oldest()

    def _deliver_oldest(self) -> None:
        future, step, size = self._waiting.popleft()
        self._bytes -= size
        if future is not None:
            for result in future.result():
                self._on_result(result)
        if step is not None:
            step()

    def _run_all(self, jobs: list[J]) -> list[R]:
        results = []
        for job in jobs:
            if self._stopped:
                break
            results.append(self._run(job))
        return results
