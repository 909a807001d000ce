"""Rate limits: how long a transfer waits."""

from __future__ import annotations

import pytest

from casfs.storage.limits import LimitedStorage, RateLimit
from casfs.storage.memory import MemoryStorage


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def time(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_transfers_take_as_long_as_the_limit_says() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock.time, clock.sleep)
    for _ in range(10):
        limit.take(1000)
    assert clock.now_s == pytest.approx(109)  # one second's worth was at hand


def test_a_transfer_larger_than_the_bucket_is_waited_for_as_a_whole() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock.time, clock.sleep)
    limit.take(64_000)
    assert clock.now_s == pytest.approx(163)


def test_an_idle_limit_saves_no_more_than_a_second() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock.time, clock.sleep)
    clock.now_s += 3600
    limit.take(3000)
    assert clock.now_s == pytest.approx(3702)


def test_a_rate_limit_of_zero_is_refused() -> None:
    with pytest.raises(ValueError):
        RateLimit(0)


def test_each_direction_has_its_own_limit() -> None:
    clock = Clock()
    upload = RateLimit(1000, clock.time, clock.sleep)
    download = RateLimit(10_000, clock.time, clock.sleep)
    storage = LimitedStorage(MemoryStorage(), upload, download)
    writer = storage.open_writer(in_memory=True)
    for _ in range(4):
        writer.append(bytes(500))
    writer.commit("packs/a")
    storage.create("packs/b", bytes(1000))
    storage.write("config", bytes(1000))
    assert clock.now_s == pytest.approx(103)
    clock.now_s = 200
    for _ in range(10):
        storage.read("packs/a")
    assert clock.now_s == pytest.approx(201)
