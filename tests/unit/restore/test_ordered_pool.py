"""A crew: whichever thread is first, what comes of jobs and steps is told in their order."""

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
    """A crew whose jobs are numbers; a number is done when it is let go."""

    def __init__(self, held: set[int]) -> None:
        self.told: list[object] = []
        self.begun: set[int] = set()
        self.gates = {number: threading.Event() for number in held}
        self.crew: OrderedPool[int, int] = OrderedPool(self.do, self.told.append)

    def do(self, number: int) -> int:
        self.begun.add(number)
        if number in self.gates:
            self.gates[number].wait()
        return number * 10


@pytest.fixture
def held() -> Iterator[Told]:
    told = Told({0})
    yield told
    for gate in told.gates.values():
        gate.set()
    told.crew.close()


def test_early_results_wait_for_their_turn(held: Told) -> None:
    for number in range(10):
        held.crew.work(number, 1)
    held.crew.call_after(lambda: held.told.append("step"))
    assert held.told == []
    held.gates[0].set()
    held.crew.drain()
    assert held.told == [*range(0, 100, 10), "step"]


def test_a_step_runs_at_once_where_no_work_is_before_it(held: Told) -> None:
    held.crew.call_after(lambda: held.told.append("step"))
    assert held.told == ["step"]


def test_a_bounded_number_of_results_waits(held: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_pool_module, "_MOST_WAITING", 5)
    held.crew.work(0, 1)
    for number in range(1, 5):
        held.crew.work(number, 1)
    adder = threading.Thread(target=held.crew.work, args=(5, 1))
    adder.start()
    assert adder.is_alive() and held.told == []
    held.gates[0].set()
    adder.join()
    assert held.told[:1] == [0]


def test_results_that_wait_hold_a_bounded_amount_of_memory(
    held: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_pool_module, "_MOST_BYTES", 1000)
    held.gates[0].set()
    for number in range(50):
        held.crew.work(number, 600)
        assert len(held.told) >= number, "the one before this was told before another was added"


def test_an_error_of_the_result_handler_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(found: int) -> None:
        raise OSError(28, "No space left on device")

    crew: OrderedPool[int, int] = OrderedPool(lambda number: number, refuse)
    try:
        with pytest.raises(OSError, match="No space left"):
            crew.work(1, 1)
            crew.drain()
    finally:
        crew.close()


def test_a_closed_pool_starts_no_more_work() -> None:
    told = Told({0, 1})
    for number in range(30):
        told.crew.work(number, 1)
    closer = threading.Thread(target=told.crew.close)
    closer.start()
    while not told.crew._stopped:
        closer.join(0.001)
    told.gates[0].set()
    told.gates[1].set()
    closer.join()
    assert told.begun <= {0, 1}
