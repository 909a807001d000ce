"""A storage in this process's memory: for fetched copies of key objects, and for tests of other layers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from casfs.errors import NotFoundError
from casfs.storage.base import Capabilities, Data, ListedObject, size_conflict
from casfs.storage.bucket import Bucket
from casfs.storage.buffered_writer import BufferedWriter


class MemoryStorage:
    """Objects in a dictionary; `now_ns` is the storage's clock."""

    capabilities = Capabilities(
        creates_exclusively=True,
        reads_ranges=True,
        has_own_clock=True,
        syncs_names=True,
        can_overwrite=True,
        can_delete=True,
        reads_nonblocking=True,
        holds_locks=False,
        parallel_requests=1,
    )

    def __init__(self, url: str = "memory:", now_ns: Callable[[], int] = time.time_ns) -> None:
        self.url = url
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, int]] = {}

    @property
    def bucket(self) -> Bucket | None:
        """Nothing: old versions are not kept."""
        return None

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix, from a copy of the current list, sorted by name."""
        with self._lock:
            found = [
                ListedObject(name, len(data), mtime_ns)
                for name, (data, mtime_ns) in self._objects.items()
                if name.startswith(f"{prefix}/")
            ]
        yield from sorted(found)

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return len(self._get(name)[0])

    def mtime_ns(self, name: str) -> int:
        """Return the time at which an object was written."""
        return self._get(name)[1]

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""
        data = self._get(name)[0]
        return data[offset:] if size is None else data[offset : offset + size]

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a range if the object contains all of it, else None."""
        try:
            data = self.read(name, offset, size)
        except NotFoundError:
            return None
        return data if len(data) == size else None

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Do nothing: all objects are in memory."""

    def write(self, name: str, data: Data) -> None:
        """Store an object and replace an object of the same name."""
        with self._lock:
            self._objects[name] = (bytes(data), self._now_ns())

    def create(self, name: str, data: Data) -> None:
        """Store an object unless the name exists."""
        with self._lock:
            there = self._objects.setdefault(name, (bytes(data), self._now_ns()))
        if len(there[0]) != len(data):
            raise size_conflict(self.url, name, len(there[0]), len(data))

    def delete(self, name: str) -> None:
        """Remove an object."""
        with self._lock:
            self._objects.pop(name, None)

    def open_writer(self, in_memory: bool) -> BufferedWriter:
        """Begin an object."""
        return BufferedWriter(self.create, in_memory)

    def close(self) -> None:
        """Do nothing: the objects remain."""

    def _get(self, name: str) -> tuple[bytes, int]:
        with self._lock:
            found = self._objects.get(name)
        if found is None:
            raise NotFoundError(f"{name} is not in the repository")
        return found
