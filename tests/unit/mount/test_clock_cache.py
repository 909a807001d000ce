"""The cache that the chunk cache and the tree cache share."""

from __future__ import annotations

import threading

from casfs_mount.clock_cache import ClockCache


def filled(limit_bytes: int, *keys: bytes, weight: int = 10) -> ClockCache[str]:
    cache: ClockCache[str] = ClockCache(limit_bytes)
    for key in keys:
        cache.add(key, key.decode(), weight)
    return cache


def test_values_are_found_by_key_and_weighed() -> None:
    cache = filled(100, b"a", b"b")
    assert (cache.get(b"a"), cache.get(b"c")) == ("a", None)
    assert cache.holds(b"b") and not cache.holds(b"c")
    assert (len(cache), cache.cached_bytes) == (2, 20)


def test_the_oldest_entry_that_was_not_used_is_evicted_first() -> None:
    cache = filled(30, b"a", b"b", b"c")
    cache.get(b"a")
    cache.add(b"d", "d", 10)
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.holds(key)] == [b"a", b"c", b"d"]
    assert cache.cached_bytes == 30


def test_an_entry_that_is_not_used_again_loses_its_second_chance() -> None:
    cache = filled(20, b"a", b"b")
    cache.get(b"a")
    for key in (b"c", b"d"):
        cache.add(key, key.decode(), 10)
    assert cache.holds(b"a") and not cache.holds(b"b")
    cache.add(b"e", "e", 10)
    assert not cache.holds(b"a")


def test_looking_whether_a_key_is_cached_does_not_count_as_a_use() -> None:
    cache = filled(20, b"a", b"b")
    assert cache.holds(b"a")
    cache.add(b"c", "c", 10)
    assert not cache.holds(b"a")


def test_a_value_heavier_than_the_limit_stays_until_the_next_one() -> None:
    cache = filled(20, b"a")
    cache.add(b"big", "big", 1000)
    assert cache.get(b"big") == "big" and len(cache) == 1
    cache.add(b"b", "b", 10)
    cache.add(b"c", "c", 10)
    assert not cache.holds(b"big") and cache.cached_bytes == 20


def test_a_key_that_is_cached_keeps_its_value_and_its_weight() -> None:
    cache = filled(100, b"a")
    cache.add(b"a", "other", 50)
    assert (cache.get(b"a"), cache.cached_bytes) == ("a", 10)


def test_several_threads_never_make_it_exceed_its_limit() -> None:
    cache: ClockCache[int] = ClockCache(1000)
    failures: list[object] = []

    def work(seed: int) -> None:
        for step in range(2000):
            number = (seed * 7919 + step) % 300
            found = cache.get(b"%d" % number)
            if found not in (None, number):
                failures.append((number, found))
            cache.add(b"%d" % number, number, 10)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.cached_bytes == 10 * len(cache) <= 1000
