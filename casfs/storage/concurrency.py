"""Make independent requests at the same time where they travel a distance.

A round trip costs more there than the request. Where requests do not travel, such as in a folder, or in a
test that steps through them, they are made one after the other, in the calling thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from casfs.storage.base import Storage

if TYPE_CHECKING:
    from concurrent.futures import Future

S = TypeVar("S")
T = TypeVar("T")

MOST_REQUESTS = 16


def begin(storage: Storage, call: Callable[[], T]) -> Callable[[], T]:
    """Begin a call and return what waits for its end and returns its result, or raises its error.

    Where requests do not travel, the call is made when its result is asked for, and once.
    """
    if storage.capabilities.parallel_requests <= 1:
        return cache(call)
    # A repository in a folder does not need this import.
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, "casfs-request")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future.result


def in_order(
    storage: Storage, call: Callable[[S], T], items: Iterable[S], most: int = MOST_REQUESTS
) -> Generator[T, None, None]:
    """Yield the result of a call for each item, in their order; the first error ends the iteration.

    Where requests travel a distance, as many calls as the storage takes requests, and at most `most`, run at
    the same time, each in a thread of its own. So at most as many results are in memory, and after an error
    calls for later items may have been made.
    """
    requests = min(storage.capabilities.parallel_requests, most)
    if requests <= 1:
        for item in items:
            yield call(item)
        return
    from concurrent.futures import ThreadPoolExecutor

    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(requests, "casfs-requests") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(call, item))
                if len(ahead) == requests:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
