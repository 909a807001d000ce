"""Make independent requests at the same time where they travel a distance.

A round trip costs more there than the request. Where requests do not travel, such as in a folder, or in a
test that steps through them, they are made one after the other, in the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from casfs.storage.base import Storage

T = TypeVar("T")


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
