"""The counter of requests and bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from casfs.storage.counting import RequestCounter, RequestKind, RequestTotals


def test_requests_and_bytes_add_up_by_kind() -> None:
    counter = RequestCounter()
    counter.add(RequestKind.CREATE, sent_bytes=10)
    counter.add(RequestKind.CREATE, sent_bytes=5)
    counter.add(RequestKind.LIST, 3)
    counter.add(RequestKind.READ, received_bytes=7)
    assert counter.totals() == {
        RequestKind.CREATE: RequestTotals(2, 15, 0),
        RequestKind.LIST: RequestTotals(3, 0, 0),
        RequestKind.READ: RequestTotals(1, 0, 7),
    }


def test_requests_of_several_threads_are_all_counted() -> None:
    counter = RequestCounter()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(counter.add, RequestKind.READ, received_bytes=1)
    assert counter.totals() == {RequestKind.READ: RequestTotals(2000, 0, 2000)}
