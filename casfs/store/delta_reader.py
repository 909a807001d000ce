"""Read index deltas from the storage, several at a time where it takes several requests.

The memory is bounded by the largest delta and the number of requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from casfs.errors import (
    CasfsError,
    DeltaError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    StorageError,
)
from casfs.format.delta import (
    FOLDER,
    MAX_DELTA_BYTES,
    Delta,
    DeltaName,
    decode_delta,
    parse_name,
)
from casfs.format.key_derivation import Sessions
from casfs.storage.base import Storage

_AHEAD_BYTES = 16 * 1024 * 1024
"""The most bytes of deltas that are read ahead of the one that is applied, but for one larger delta.

To apply as many takes seconds.
"""

_MOST_REQUESTS = 16


class DeltaReader:
    """Reads the deltas of one storage. In an encrypted repository `sessions` provides the keys."""

    def __init__(self, storage: Storage, sessions: Sessions | None = None) -> None:
        self._storage = storage
        self._sessions = sessions

    def read(self, name: DeltaName, size: int) -> Delta | CasfsError:
        """Return a delta, or the error of reading it; a storage that does not answer raises."""
        try:
            if size > MAX_DELTA_BYTES:
                raise DeltaError(str(name), "it is too large")
            return decode_delta(name, self._storage.read(str(name), 0, size), self._sessions)
        except (IntegrityError, KeyMissingError, NotFoundError, StorageError) as error:
            return error

    def read_all(
        self, names: Iterator[DeltaName], sizes: dict[DeltaName, int]
    ) -> Iterator[tuple[DeltaName, Delta | CasfsError]]:
        """Yield deltas in order, reading ahead where the storage takes several requests at a time."""
        requests = max(1, min(self._storage.capabilities.parallel_requests, _MOST_REQUESTS))
        ahead: deque[tuple[DeltaName, Future[Delta | CasfsError]]] = deque()
        ahead_bytes = 0
        with ThreadPoolExecutor(requests, "casfs-deltas") as pool:
            try:
                for name in names:
                    ahead.append((name, pool.submit(self.read, name, sizes[name])))
                    ahead_bytes += sizes[name]
                    while len(ahead) >= requests or (ahead_bytes > _AHEAD_BYTES and len(ahead) > 1):
                        done, future = ahead.popleft()
                        ahead_bytes -= sizes[done]
                        yield done, future.result()
                while ahead:
                    done, future = ahead.popleft()
                    yield done, future.result()
            finally:
                for _, future in ahead:
                    future.cancel()


def list_deltas(storage: Storage) -> dict[DeltaName, int]:
    """Return the names of all deltas with their sizes; objects with other names are ignored."""
    found = {}
    for item in storage.list(FOLDER):
        name = parse_name(item.name)
        if name is not None:
            found[name] = item.size
    return found
