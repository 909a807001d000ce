"""Retries with growing pauses for a storage that does not answer.

The patience is that of all calls together: it counts from the first attempt that failed since the storage
last answered. After its end each call makes one attempt, so that a command with many calls ends soon, and a
mount fails its reads soon and finds the storage again when it is back.

Only `StorageUnavailableError` causes a retry. Every object is write-once or replaced as a whole, so a
repeated request does no harm. Where the answer to a creation was lost, the size of the object shows whether
the creation took effect.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from casfs.errors import CasfsError, NotFoundError, StorageUnavailableError
from casfs.storage.base import Data, ListedObject, ObjectWriter, Storage
from casfs.storage.bucket import Bucket, BucketSettings, ObjectVersion
from casfs.storage.interruption import INTERRUPTED
from casfs.storage.wrapper import BucketWrapper, StorageWrapper, WriterWrapper

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.5
_FORGOTTEN_AFTER_S = 60.0
"""A failure so long before the next attempt says nothing about how long the storage has been away."""

_REPORTED_AFTER_S = 5.0
"""A pause of at least this length is logged, so that the user sees why nothing happens."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of the pauses between two attempts, and of all attempts together.

    `first_patience_s` applies until the storage has answered once: a wrong host name should fail sooner than
    a network that went away.
    """

    patience_s: float = 900.0
    first_patience_s: float = 20.0
    first_pause_s: float = 0.2
    factor: float = 2.0
    max_pause_s: float = 30.0


class Retrier:
    """Runs actions until they succeed or the time limit is reached; several threads may use it at once.

    `sleep(seconds)` returns True when `stop` ended the pause. `jitter` returns a factor between 0.5 and 1, so
    that machines that lost the connection together do not retry together.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool] | None = None,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1),
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._stopped = threading.Event()
        self._sleep = sleep if sleep is not None else self._wait
        self._jitter = jitter
        self._has_answered = False
        self._lock = threading.Lock()
        self._away_since_s: float | None = None
        self._last_failure_s = 0.0

    def stop(self) -> None:
        """End every pause; the calls that were waiting raise their last error."""
        self._stopped.set()

    def run(self, action: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Return the result of `action`; attempts after the first call `again` instead, if given."""
        deadline: float | None = None
        pause_s = self._policy.first_pause_s
        while True:
            began_s = self._clock()
            try:
                result = action()
            except StorageUnavailableError as error:
                now_s = self._clock()
                if deadline is None:
                    deadline = now_s + self._patience_s()
                left_s = min(deadline, self._note_failure(began_s, now_s)) - now_s
                if left_s <= 0 or self._stopped.is_set() or INTERRUPTED.is_set():
                    raise
                wait_s = min(pause_s * self._jitter(), left_s)
                if wait_s >= _REPORTED_AFTER_S:
                    log.warning("%s; trying again in %.0f s", error, wait_s)
                if self._sleep(wait_s):
                    raise
                pause_s = min(pause_s * self._policy.factor, self._policy.max_pause_s)
                action = again if again is not None else action
            except CasfsError:
                self._note_answer()
                raise
            else:
                self._note_answer()
                return result

    def _note_failure(self, began_s: float, now_s: float) -> float:
        """Note an attempt that failed; return until when the storage is waited for."""
        with self._lock:
            if (
                self._away_since_s is None
                or began_s - self._last_failure_s > _FORGOTTEN_AFTER_S + self._policy.max_pause_s
            ):
                self._away_since_s = now_s
            self._last_failure_s = max(self._last_failure_s, now_s)
            return self._away_since_s + self._patience_s()

    def _note_answer(self) -> None:
        with self._lock:
            self._has_answered = True
            self._away_since_s = None

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if self._stopped.wait(min(left_s, _LOOK_S)) or INTERRUPTED.is_set():
                return True
        return False

    def _patience_s(self) -> float:
        policy = self._policy
        return policy.patience_s if self._has_answered else policy.first_patience_s


class RetryingStorage(StorageWrapper):
    """A storage that repeats a call when the back end does not answer."""

    def __init__(self, inner: Storage, retrier: Retrier) -> None:
        super().__init__(inner)
        self._retrier = retrier

    @property
    def bucket(self) -> Bucket | None:
        """The versions and locks of the inner storage, with the same retries."""
        bucket = self.inner.bucket
        return RetryingBucket(bucket, self._retrier) if bucket is not None else None

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix; after an error the listing resumes after the last name."""
        last = ""
        entries = self.inner.list(prefix)

        def reopen() -> ListedObject | None:
            nonlocal entries
            entries = self.inner.list(prefix)
            return next((entry for entry in entries if entry.name > last), None)

        while True:
            entry = self._retrier.run(lambda: next(entries, None), reopen)
            if entry is None:
                return
            last = entry.name
            yield entry

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return self._retrier.run(lambda: self.inner.size(name))

    def mtime_ns(self, name: str) -> int:
        """Return the time at which an object was written."""
        return self._retrier.run(lambda: self.inner.mtime_ns(name))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""
        return self._retrier.run(lambda: self.inner.read(name, offset, size))

    def write(self, name: str, data: Data) -> None:
        """Store an object and replace an object of the same name."""
        self._retrier.run(lambda: self.inner.write(name, data))

    def create(self, name: str, data: Data) -> None:
        """Store an object unless the name exists; an earlier attempt may have taken effect."""
        self._retrier.run(
            lambda: self.inner.create(name, data),
            lambda: self._unless_there(name, len(data), lambda: self.inner.create(name, data)),
        )

    def _unless_there(self, name: str, size: int, send: Callable[[], None]) -> None:
        """Send an object unless the name has it; asking costs less than a body that is refused."""
        try:
            if self.inner.size(name) == size:
                return
        except NotFoundError:
            pass
        send()

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._retrier.run(lambda: self.inner.delete(name))

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Begin an object."""
        return _RetryingWriter(self, self.inner.open_writer(in_memory))

    def close(self) -> None:
        """End every pause and close the inner storage."""
        self._retrier.stop()
        self.inner.close()


class RetryingBucket(BucketWrapper):
    """A bucket that repeats a call when the server does not answer."""

    def __init__(self, inner: Bucket, retrier: Retrier) -> None:
        super().__init__(inner)
        self._retrier = retrier

    def settings(self) -> BucketSettings:
        """Return the settings of the bucket."""
        return self._retrier.run(self.inner.settings)

    def locked_until_s(self, name: str) -> int | None:
        """Return the end of the lock of an object."""
        return self._retrier.run(lambda: self.inner.locked_until_s(name))

    def lock(self, name: str, until_s: int) -> None:
        """Lock an object at least until a time; to lock it twice is harmless."""
        self._retrier.run(lambda: self.inner.lock(name, until_s))

    def versions(self, prefix: str) -> Iterator[ObjectVersion]:
        """Yield every version; after an error the listing resumes after the last version."""
        last: ObjectVersion | None = None
        found = self.inner.versions(prefix)

        def reopen() -> ObjectVersion | None:
            nonlocal found
            found = self.inner.versions(prefix)
            for version in found:
                if last is None or version.name > last.name:
                    return version
                if version.name == last.name and version.version == last.version:
                    break
            return next(found, None)

        while True:
            version = self._retrier.run(lambda: next(found, None), reopen)
            if version is None:
                return
            last = version
            yield version

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        """Return a range of a version."""
        return self._retrier.run(lambda: self.inner.read_version(name, version, offset, size))


class _RetryingWriter(WriterWrapper):
    """A writer that repeats `commit`; an earlier attempt may have taken effect."""

    def __init__(self, storage: RetryingStorage, inner: ObjectWriter) -> None:
        super().__init__(inner)
        self._storage = storage

    def commit(self, name: str) -> None:
        """Make the bytes durable under a name."""
        self._storage._retrier.run(
            lambda: self.inner.commit(name),
            lambda: self._storage._unless_there(
                name, self.written_bytes, lambda: self.inner.commit(name)
            ),
        )
