"""A storage that records its calls, and delays, fails or reorders them as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from casfs.errors import StorageUnavailableError
from casfs.storage.base import Capabilities, Data, ListedObject, ObjectWriter, Storage
from casfs.storage.bucket import Bucket, BucketSettings, ObjectVersion
from casfs.storage.wrapper import BucketWrapper, StorageWrapper, WriterWrapper

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a storage: what was asked, of which name, and the bytes that went with it."""

    method: str
    name: str
    size: int = 0


def unavailable(call: Call) -> StorageUnavailableError:
    """Return the error of a place that does not answer."""
    return StorageUnavailableError(call.method, call.name, TimeoutError(110, "no answer"))


@dataclass(slots=True)
class Failure:
    """Raise `error` at calls that `applies` accepts, `times` times; `after` lets the call act first."""

    applies: Callable[[Call], bool]
    error: Callable[[Call], BaseException] = unavailable
    times: int = 1
    after: bool = False


@dataclass(slots=True)
class Script:
    """What happens to the calls of a `RecordingStorage`; changed by a test while it is used."""

    failures: list[Failure] = field(default_factory=list)
    round_trip_s: float = 0.0
    parallel_requests: int | None = None
    """The number of concurrent requests that the storage states, where it is not that of the inner one."""
    before: Callable[[Call], None] | None = None
    """Called in the calling thread before a call acts: a test that waits here holds the call back, so
    that others overtake it."""


class RecordingStorage(StorageWrapper):
    """A storage around another one; `calls` is what was asked of it, in order."""

    def __init__(self, inner: Storage, script: Script | None = None) -> None:
        super().__init__(inner)
        self.script = script if script is not None else Script()
        self.calls: list[Call] = []
        self.spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        """What the inner storage supports, with the number of requests of the script."""
        requests = self.script.parallel_requests
        found = self.inner.capabilities
        return found if requests is None else replace(found, parallel_requests=requests)

    def round_trips(self) -> int:
        """Return the largest number of requests since the last call that were made one after the other.

        It is what a command waits for over a distance. The script has to give a round trip.
        """
        spans, self.spans = self.spans, []
        found, free_s = 0, 0.0
        for begin_s, end_s in sorted(spans, key=lambda span: span[1]):
            if begin_s >= free_s:
                found, free_s = found + 1, end_s
        return found

    def methods(self) -> list[str]:
        """Return the methods that were called, in order."""
        with self._lock:
            return [call.method for call in self.calls]

    @property
    def bucket(self) -> Bucket | None:
        """The versions and locks of the inner storage, recorded too."""
        bucket = self.inner.bucket
        return _RecordingBucket(self, bucket) if bucket is not None else None

    def _do(self, call: Call, action: Callable[[], T]) -> T:
        with self._lock:
            self.calls.append(call)
            failure = next(
                (one for one in self.script.failures if one.times and one.applies(call)), None
            )
            if failure is not None:
                failure.times -= 1
        if self.script.before is not None:
            self.script.before(call)
        if self.script.round_trip_s and call.method not in ("list entry", "version entry"):
            begin_s = time.monotonic()
            time.sleep(self.script.round_trip_s)
            self.spans.append((begin_s, time.monotonic()))
        if failure is not None and not failure.after:
            raise failure.error(call)
        result = action()
        if failure is not None:
            raise failure.error(call)
        return result

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix; each entry is a call of its own, `list entry`."""
        entries = self._do(Call("list", prefix), lambda: self.inner.list(prefix))
        for entry in entries:
            yield self._do(Call("list entry", entry.name), lambda entry=entry: entry)  # type: ignore[misc]

    def size(self, name: str) -> int:
        """Return an object's size."""
        return self._do(Call("size", name), lambda: self.inner.size(name))

    def mtime_ns(self, name: str) -> int:
        """Return when an object was written."""
        return self._do(Call("mtime_ns", name), lambda: self.inner.mtime_ns(name))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range."""
        return self._do(Call("read", name, size or 0), lambda: self.inner.read(name, offset, size))

    def write(self, name: str, data: Data) -> None:
        """Store an object, replacing one of the same name."""
        self._do(Call("write", name, len(data)), lambda: self.inner.write(name, data))

    def create(self, name: str, data: Data) -> None:
        """Store an object unless there is one of the same name."""
        self._do(Call("create", name, len(data)), lambda: self.inner.create(name, data))

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._do(Call("delete", name), lambda: self.inner.delete(name))

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Begin an object."""
        return _RecordingWriter(self, self.inner.open_writer(in_memory))


class _RecordingWriter(WriterWrapper):
    def __init__(self, storage: RecordingStorage, inner: ObjectWriter) -> None:
        super().__init__(inner)
        self._storage = storage

    def commit(self, name: str) -> None:
        self._storage._do(Call("commit", name, self.written_bytes), lambda: self.inner.commit(name))


class _RecordingBucket(BucketWrapper):
    """The bucket of a recording storage: its calls are recorded and fail with those of the storage."""

    def __init__(self, storage: RecordingStorage, inner: Bucket) -> None:
        super().__init__(inner)
        self._storage = storage

    def settings(self) -> BucketSettings:
        return self._storage._do(Call("settings", ""), self.inner.settings)

    def locked_until_s(self, name: str) -> int | None:
        return self._storage._do(
            Call("locked_until_s", name), lambda: self.inner.locked_until_s(name)
        )

    def lock(self, name: str, until_s: int) -> None:
        self._storage._do(Call("lock", name), lambda: self.inner.lock(name, until_s))

    def versions(self, prefix: str) -> Iterator[ObjectVersion]:
        found = self._storage._do(Call("versions", prefix), lambda: self.inner.versions(prefix))
        for version in found:
            yield self._storage._do(
                Call("version entry", version.name),
                lambda version=version: version,  # type: ignore[misc]
            )

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        return self._storage._do(
            Call("read_version", name, size),
            lambda: self.inner.read_version(name, version, offset, size),
        )
