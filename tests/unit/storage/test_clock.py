"""The clock of a storage, seen through the times of written objects."""

from __future__ import annotations

import logging

import pytest

from casfs.storage.clock import StorageClock, elapsed_ns
from casfs.storage.memory import MemoryStorage

S = 1_000_000_000


class Times:
    """The clocks of a machine and of a storage; each is set by the test."""

    def __init__(self) -> None:
        self.wall_ns = 1_000 * S
        self.elapsed_ns = 5 * S
        self.storage_ns = 1_000 * S


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def clock(times: Times) -> StorageClock:
    storage = MemoryStorage("s3://bucket/r", lambda: times.storage_ns)
    return StorageClock(storage, lambda: times.wall_ns, lambda: times.elapsed_ns)


def test_the_machines_clock_counts_until_an_object_was_written(
    clock: StorageClock, times: Times
) -> None:
    assert clock.now_ns() == times.wall_ns


def test_the_time_of_a_written_object_sets_the_clock(clock: StorageClock, times: Times) -> None:
    times.storage_ns = 970 * S
    assert clock.create("presence/a", b"x") == 970 * S
    times.elapsed_ns += 7 * S
    assert clock.now_ns() == 977 * S


def test_the_time_that_a_machine_was_suspended_counts() -> None:
    assert elapsed_ns() <= elapsed_ns()
    clock = StorageClock(MemoryStorage())
    clock.write("presence/a", b"x")
    assert clock.now_ns() <= clock.now_ns()


def test_a_change_of_the_machines_clock_does_not_move_it(clock: StorageClock, times: Times) -> None:
    clock.write("presence/a", b"x")
    times.wall_ns += 86_400 * S
    assert clock.now_ns() == times.storage_ns


@pytest.mark.parametrize("offset_s", [-61, 61])
def test_a_clock_that_is_off_by_more_than_a_minute_is_reported_once(
    clock: StorageClock, times: Times, caplog: pytest.LogCaptureFixture, offset_s: int
) -> None:
    times.storage_ns = times.wall_ns + offset_s * S
    with caplog.at_level(logging.WARNING):
        clock.write("presence/a", b"x")
        clock.write("presence/a", b"x")
    (record,) = caplog.records
    assert "this machine's clock and that of s3://bucket/r differ by 61 s" in record.getMessage()


@pytest.mark.parametrize("offset_s", [-60, 0, 60])
def test_a_clock_within_a_minute_is_not_reported(
    clock: StorageClock, times: Times, caplog: pytest.LogCaptureFixture, offset_s: int
) -> None:
    times.storage_ns = times.wall_ns + offset_s * S
    clock.write("presence/a", b"x")
    assert caplog.records == []
