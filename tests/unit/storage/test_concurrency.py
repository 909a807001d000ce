"""Calls that are made at the same time over a distance, and one after the other elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from casfs.storage.concurrency import in_order
from casfs.storage.memory import MemoryStorage
from tests.support.storage_double import RecordingStorage, Script

HUNG_S = 60


def storage(parallel_requests: int) -> RecordingStorage:
    return RecordingStorage(MemoryStorage(), Script(parallel_requests=parallel_requests))


@pytest.mark.parametrize("requests", [1, 3])
def test_results_come_in_the_order_of_the_items(requests: int) -> None:
    assert list(in_order(storage(requests), str, range(20))) == [str(n) for n in range(20)]


def test_calls_are_made_at_the_same_time_over_a_distance() -> None:
    together = threading.Barrier(4, timeout=HUNG_S)
    list(in_order(storage(8), lambda _: together.wait(), range(8), most=4))
    assert not together.broken


def test_no_more_items_are_taken_than_results_may_be_in_memory() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    found = in_order(storage(8), lambda number: number, items(), most=4)
    assert next(found) == 0
    assert len(taken) == 4
    assert next(found) == 1
    assert len(taken) == 5
    found.close()


def test_calls_are_made_in_the_calling_thread_where_requests_do_not_travel() -> None:
    threads = set(in_order(storage(1), lambda _: threading.current_thread(), range(3)))
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("requests", [1, 3])
def test_the_first_error_ends_the_calls(requests: int) -> None:
    called: list[int] = []

    def call(number: int) -> int:
        called.append(number)
        if number == 5:
            raise ValueError(number)
        return number

    found: list[int] = []
    with pytest.raises(ValueError, match="5"):
        found.extend(in_order(storage(requests), call, range(100)))
    assert len(called) <= 5 + 1 + requests
