"""The ordered pool: results and steps come in the order of submission, whichever is done first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from casfs.restore.ordered_pool import OrderedPool, PoolLimits, WorkerThread

ONE_AT_A_TIME = PoolLimits(batch_jobs=1)


class HeldPool:
    """A pool whose jobs are numbers; a job ends when its gate opens."""

    def __init__(self, held: set[int], limits: PoolLimits = ONE_AT_A_TIME) -> None:
        self.reported: list[object] = []
        self.begun: set[int] = set()
        self.gates = {number: threading.Event() for number in held}
        self.thread = WorkerThread(self.do)
        self.pool: OrderedPool[int, int] = OrderedPool(
            self.do, self.reported.append, limits=limits, workers=self.thread
        )

    def do(self, number: int) -> int:
        self.begun.add(number)
        if number in self.gates:
            self.gates[number].wait()
        return number * 10


@contextmanager
def held_pool(limits: PoolLimits) -> Iterator[HeldPool]:
    """A pool with these limits whose job 0 waits for its gate; it is closed at the end."""
    found = HeldPool({0}, limits)
    try:
        yield found
    finally:
        for gate in found.gates.values():
            gate.set()
        found.pool.close()


@pytest.fixture
def held() -> Iterator[HeldPool]:
    with held_pool(ONE_AT_A_TIME) as found:
        yield found


def test_early_results_wait_for_their_turn(held: HeldPool) -> None:
    for number in range(10):
        held.pool.work(number, 1)
    held.pool.call_after(lambda: held.reported.append("step"))
    assert held.reported == []
    held.gates[0].set()
    held.pool.drain()
    assert held.reported == [*range(0, 100, 10), "step"]


def test_a_step_runs_at_once_where_no_work_is_before_it(held: HeldPool) -> None:
    held.pool.call_after(lambda: held.reported.append("step"))
    assert held.reported == ["step"]


def test_a_bounded_number_of_results_waits() -> None:
    with held_pool(replace(ONE_AT_A_TIME, waiting=5)) as held:
        held.pool.work(0, 1)
        for number in range(1, 5):
            held.pool.work(number, 1)
        adder = threading.Thread(target=held.pool.work, args=(5, 1))
        adder.start()
        assert adder.is_alive() and held.reported == []
        held.gates[0].set()
        adder.join()
        assert held.reported[:1] == [0]


def test_results_that_wait_hold_a_bounded_amount_of_memory() -> None:
    with held_pool(replace(ONE_AT_A_TIME, waiting_bytes=1000)) as held:
        held.gates[0].set()
        for number in range(50):
            held.pool.work(number, 600)
            assert len(held.reported) >= number, "a result was reported before the next was added"


def test_an_error_of_the_result_handler_reaches_the_caller() -> None:
    def refuse(found: int) -> None:
        raise OSError(28, "No space left on device")

    pool: OrderedPool[int, int] = OrderedPool(lambda number: number, refuse, limits=ONE_AT_A_TIME)
    try:
        with pytest.raises(OSError, match="No space left"):
            pool.work(1, 1)
            pool.drain()
    finally:
        pool.close()


def test_a_closed_pool_starts_no_more_work() -> None:
    reported = HeldPool({0, 1})
    for number in range(30):
        reported.pool.work(number, 1)
    closer = threading.Thread(target=reported.pool.close)
    closer.start()
    while not reported.thread.is_stopped:
        closer.join(0.001)
    reported.gates[0].set()
    reported.gates[1].set()
    closer.join()
    assert reported.begun <= {0, 1}
