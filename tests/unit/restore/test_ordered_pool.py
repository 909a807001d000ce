"""The ordered pool: results and steps come in the order of submission, whichever is done first."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from casfs.restore import ordered_pool as ordered_pool_module
from casfs.restore.ordered_pool import OrderedPool


@pytest.fixture(autouse=True)
def _one_job_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_pool_module, "_BATCH_JOBS", 1)


class Told:
    """A pool whose jobs are numbers; a job ends when its gate opens."""

    def __init__(self, held: set[int]) -> None:
        self.reported: list[object] = []
        self.begun: set[int] = set()
        self.gates = {number: threading.Event() for number in held}
        self.pool: OrderedPool[int, int] = OrderedPool(self.do, self.reported.append)

    def do(self, number: int) -> int:
        self.begun.add(number)
        if number in self.gates:
            self.gates[number].wait()
        return number * 10


@pytest.fixture
def held() -> Iterator[Told]:
    reported = Told({0})
    yield reported
    for gate in reported.gates.values():
        gate.set()
    reported.pool.close()


def test_early_results_wait_for_their_turn(held: Told) -> None:
    for number in range(10):
        held.pool.work(number, 1)
    held.pool.call_after(lambda: held.reported.append("step"))
    assert held.reported == []
    held.gates[0].set()
    held.pool.drain()
    assert held.reported == [*range(0, 100, 10), "step"]


def test_a_step_runs_at_once_where_no_work_is_before_it(held: Told) -> None:
    held.pool.call_after(lambda: held.reported.append("step"))
    assert held.reported == ["step"]


def test_a_bounded_number_of_results_waits(held: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_pool_module, "_MOST_WAITING", 5)
    held.pool.work(0, 1)
    for number in range(1, 5):
        held.pool.work(number, 1)
    adder = threading.Thread(target=held.pool.work, args=(5, 1))
    adder.start()
    assert adder.is_alive() and held.reported == []
    held.gates[0].set()
    adder.join()
    assert held.reported[:1] == [0]


def test_results_that_wait_hold_a_bounded_amount_of_memory(
    held: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_pool_module, "_MOST_BYTES", 1000)
    held.gates[0].set()
    for number in range(50):
        held.pool.work(number, 600)
        assert len(held.reported) >= number, "the one before this was told before another was added"


def test_an_error_of_the_result_handler_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(found: int) -> None:
        raise OSError(28, "No space left on device")

    pool: OrderedPool[int, int] = OrderedPool(lambda number: number, refuse)
    try:
        with pytest.raises(OSError, match="No space left"):
            pool.work(1, 1)
            pool.drain()
    finally:
        pool.close()


def test_a_closed_pool_starts_no_more_work() -> None:
    reported = Told({0, 1})
    for number in range(30):
        reported.pool.work(number, 1)
    closer = threading.Thread(target=reported.pool.close)
    closer.start()
    while not reported.pool._stopped:
        closer.join(0.001)
    reported.gates[0].set()
    reported.gates[1].set()
    closer.join()
    assert reported.begun <= {0, 1}
