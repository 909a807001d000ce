"""A bounded worker pool that runs jobs in batches and delivers their results in the order of the jobs.

Results and steps run on the thread that adds them. The number of waiting batches and the bytes that their
jobs hold are bounded: a caller that adds more waits. A caller whose workers all have enough to do runs a
batch itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Pending(Protocol[R]):
    """The results of a batch that a worker has."""

    def done(self) -> bool:
        """Return whether `result` returns at once."""

    def result(self) -> list[R]:
        """Wait for the results, and return them in the order of the jobs."""


class Workers(Protocol[J, R]):
    """Workers that run batches beside the caller."""

    def submit(self, jobs: list[J]) -> Pending[R] | None:
        """Give a batch to a worker; return None where the caller runs it itself."""

    def close(self) -> None:
        """Wait for the workers to finish their current jobs; drop the jobs that have not begun."""


class WorkerThread(Generic[J, R]):
    """One thread that runs batches.

    On two cores, a second one made a restore to ext4 take half as long again (two threads compete for one
    journal and for the interpreter), and no restore faster.
    """

    def __init__(self, run: Callable[[J], R]) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, "casfs-restore")
        self.is_stopped = False

    def submit(self, jobs: list[J]) -> Future[list[R]]:
        """Give a batch to the thread."""
        return self._pool.submit(self._run_all, jobs)

    def close(self) -> None:
        """Wait for the thread to finish its current job; drop the jobs that have not begun."""
        self.is_stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run_all(self, jobs: list[J]) -> list[R]:
        results = []
        for job in jobs:
            if self.is_stopped:
                break
            results.append(self._run(job))
        return results


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The size of a batch, and the limits of pending work beyond which the caller waits.

    `batch_jobs` counts jobs and steps, and `waiting` batches and steps: each step that closes a directory
    holds an open descriptor. `process_entries` is the number of entries of a tree from which processes
    run the jobs.
    """

    batch_jobs: int = 32
    batch_bytes: int = 512 * 1024
    waiting: int = 96
    waiting_bytes: int = 8 * 1024 * 1024
    process_entries: int = 2000


DEFAULT_LIMITS = PoolLimits()


@dataclass(slots=True)
class _Batch(Generic[J, R]):
    """Jobs, and the steps between them: each with the number of jobs of the batch that come before it."""

    jobs: list[J] = field(default_factory=list)
    steps: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    size_bytes: int = 0
    pending: Pending[R] | None = None
    results: list[R] = field(default_factory=list)

    @property
    def weight(self) -> int:
        return 1 + len(self.steps)


class OrderedPool(Generic[J, R]):
    """Run `run` on jobs, and pass the results to `on_result` on the calling thread.

    `workers` run most batches, by default a thread, and the caller the others. `run` returns expected errors
    as part of its result; an exception ends the restore. Close the pool in a `finally`.
    """

    def __init__(
        self,
        run: Callable[[J], R],
        on_result: Callable[[R], None],
        *,
        limits: PoolLimits = DEFAULT_LIMITS,
        workers: Workers[J, R] | None = None,
    ) -> None:
        self._limits = limits
        self._run = run
        self._on_result = on_result
        self._workers: Workers[J, R] = workers if workers is not None else WorkerThread(run)
        self._waiting: deque[_Batch[J, R]] = deque()
        self._waiting_weight = 0
        self._bytes = 0
        self._batch: _Batch[J, R] = _Batch()

    def work(self, job: J, size: int) -> None:
        """Add a job that holds `size` bytes of memory. Raises what `run`, `on_result` and steps raise."""
        batch = self._batch
        batch.jobs.append(job)
        batch.size_bytes += size
        self._submit_full()

    def call_after(self, step: Callable[[], None]) -> None:
        """Call `step` on this thread, after the results of all jobs added before."""
        if not (self._waiting or self._batch.jobs or self._batch.steps):
            step()
            return
        self._batch.steps.append((len(self._batch.jobs), step))
        self._submit_full()

    def drain(self) -> None:
        """Wait for all jobs, and deliver all results."""
        # This thread would only wait for a worker.
        self._finish_batch(self._run_here)
        while self._waiting:
            self._deliver_oldest()

    def close(self) -> None:
        """Wait for the workers to finish their current jobs; drop the jobs that have not begun."""
        self._workers.close()

    def _submit_full(self) -> None:
        batch, limits = self._batch, self._limits
        if (
            len(batch.jobs) + len(batch.steps) >= limits.batch_jobs
            or batch.size_bytes >= limits.batch_bytes
        ):
            self._finish_batch(self._submit)
            self._advance()

    def _finish_batch(self, process: Callable[[_Batch[J, R]], None]) -> None:
        batch = self._batch
        if not (batch.jobs or batch.steps):
            return
        self._batch = _Batch()
        if batch.jobs:
            process(batch)
        self._waiting.append(batch)
        self._waiting_weight += batch.weight
        self._bytes += batch.size_bytes

    def _submit(self, batch: _Batch[J, R]) -> None:
        batch.pending = self._workers.submit(batch.jobs)
        if batch.pending is None:
            self._run_here(batch)

    def _run_here(self, batch: _Batch[J, R]) -> None:
        batch.results = [self._run(job) for job in batch.jobs]

    def _advance(self) -> None:
        """Deliver the finished results at the front, and wait while too much is pending."""
        limits = self._limits
        while self._waiting:
            pending = self._waiting[0].pending
            is_full = self._waiting_weight > limits.waiting or self._bytes > limits.waiting_bytes
            if not is_full and pending is not None and not pending.done():
                break
            self._deliver_oldest()

    def _deliver_oldest(self) -> None:
        batch = self._waiting.popleft()
        self._waiting_weight -= batch.weight
        self._bytes -= batch.size_bytes
        results = batch.results if batch.pending is None else batch.pending.result()
        done = 0
        for position, step in batch.steps:
            for result in results[done:position]:
                self._on_result(result)
            done = position
            step()
        for result in results[done:]:
            self._on_result(result)
