"""A storage in an object storage (S3, GCS, Azure) through `obstore`.

Objects are put as a whole, with `If-None-Match: *` where the server knows it, so that a name never changes
its bytes. obstore's own retries are off: `retry.RetryingStorage` asks again, and finds out by the size of
the object whether a creation happened whose answer was lost.

Threads: obstore's synchronous calls release the GIL and may be made from any thread. They are made in
helper threads, because nothing ends a call before its timeout, not even a signal in the main thread. A
thread that waits for a helper stops waiting when the process is asked to end. Nothing may be asked before
a fork: the child would wait for threads that it does not have.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

import obstore

from casfs.errors import NotFoundError, StorageError, StorageUnavailableError
from casfs.storage.base import (
    MAX_WHOLE_READ_BYTES,
    Capabilities,
    Data,
    ListedObject,
    is_name,
    size_conflict,
)
from casfs.storage.bucket import Bucket
from casfs.storage.buffered_writer import BufferedWriter
from casfs.storage.counting import RequestCounter, RequestKind
from casfs.storage.interruption import INTERRUPTED, interrupted_error
from casfs.storage.object_store_errors import (
    ERRORS,
    already_exists,
    parse_answer,
    translate,
)

if TYPE_CHECKING:
    from datetime import datetime

    from obstore import ListStream, ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")

_PAGE = 1000
"""Entries in a page of a listing: what all servers give at most."""

_RANGE_BYTES = 8 * 1024 * 1024
"""Larger reads are split, so that several ranges come at the same time and a timeout costs little."""

_PARALLEL = 8

_TIMEOUT_S = 60
_LOOK_S = 0.5
_LEAST_BYTES_PER_S = 64 * 1024
"""A timeout covers the body, so it grows with the body: by what a slow line takes."""

_SMALL_BYTES = 1024 * 1024
"""Requests with smaller bodies share one client, and so its open connections, as do those up to 11 MiB."""


class ObjectStorage:
    """Objects of one bucket below one prefix.

    `make_store(timeout_s)` returns a client of the bucket whose requests may take so long; clients are made
    when they are first needed and kept. `bucket` gives the versions and locks of the objects.
    """

    capabilities = Capabilities(
        creates_exclusively=True,
        reads_ranges=True,
        has_own_clock=True,
        syncs_names=True,
        can_overwrite=True,
        can_delete=True,
        reads_nonblocking=False,
        holds_locks=False,
        parallel_requests=_PARALLEL,
    )

    def __init__(
        self,
        url: str,
        prefix: str,
        make_store: Callable[[int], ObjectStore],
        counter: RequestCounter | None = None,
        bucket: Bucket | None = None,
    ) -> None:
        self.url = url
        self.bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._make_store = make_store
        self._counter = counter if counter is not None else RequestCounter()
        self._stores: dict[int, ObjectStore] = {}
        self._lock = threading.Lock()
        self._calls: ThreadPoolExecutor | None = None
        self._ranges: ThreadPoolExecutor | None = None
        self._knows_conditions = True

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix; raise StorageError where the server lists out of order."""
        stream: ListStream[Sequence[ObjectMeta]] = obstore.list(
            self._store(0), prefix=self._prefix + prefix, chunk_size=_PAGE
        )
        last = ""
        while True:
            page = self._run("list", prefix, lambda: next(stream, None))
            self._counter.add(RequestKind.LIST)
            if not page:
                return
            for found in page:
                name = found["path"][len(self._prefix) :]
                if not is_name(name) or not name.startswith(f"{prefix}/"):
                    continue
                if name.replace("/", "").isalnum():
                    if name <= last:
                        raise StorageError(
                            "list",
                            f"{self.url}/{prefix}",
                            OSError(errno.EIO, "the server lists names out of order"),
                        )
                    last = name
                yield ListedObject(name, found["size"], _nanoseconds(found["last_modified"]))
            if len(page) < _PAGE:
                return

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return self._head(name)["size"]

    def mtime_ns(self, name: str) -> int:
        """Return when an object was written, in whole seconds on most servers."""
        return _nanoseconds(self._head(name)["last_modified"])

    def _head(self, name: str) -> ObjectMeta:
        self._counter.add(RequestKind.STAT)
        return self._run("read", name, lambda: obstore.head(self._store(0), self._prefix + name))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""
        if size == 0:
            self._head(name)
            return b""
        limit = MAX_WHOLE_READ_BYTES + 1 if size is None else size
        first, object_bytes = self._read_range(name, offset, min(limit, _RANGE_BYTES))
        end = min(offset + limit, object_bytes)
        if size is None and object_bytes - offset > MAX_WHOLE_READ_BYTES:
            raise StorageError(
                "read",
                f"{self.url}/{name}",
                OSError(errno.EFBIG, "it is too large to be read as a whole"),
            )
        if offset + len(first) >= end:
            return first
        starts = range(offset + len(first), end, _RANGE_BYTES)
        rest = self._range_threads().map(
            lambda start: self._read_range(name, start, min(_RANGE_BYTES, end - start))[0], starts
        )
        return b"".join([first, *rest])

    def _read_range(self, name: str, offset: int, size: int) -> tuple[bytes, int]:
        """Return a range and the size of the object: 0 bytes where it ends before the range."""

        def get() -> tuple[bytes, int]:
            try:
                result = obstore.get(
                    self._store(size),
                    self._prefix + name,
                    options={"range": (offset, offset + size)},
                )
                data = bytes(result.bytes())
            except ERRORS as error:
                if parse_answer(error).is_out_of_range:
                    return b"", 0
                raise
            object_bytes = result.meta["size"]
            if len(data) != min(size, object_bytes - offset):
                raise StorageUnavailableError(
                    "read",
                    f"{self.url}/{name}",
                    OSError(errno.EIO, "the answer has the wrong length"),
                )
            return data, object_bytes

        self._counter.add(RequestKind.READ)
        data, object_bytes = self._run("read", name, get)
        self._counter.add(RequestKind.READ, 0, received_bytes=len(data))
        return data, object_bytes

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return None: every read asks the server."""
        return None

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Do nothing: this back end has no cache."""

    def write(self, name: str, data: Data) -> None:
        """Store an object, replacing one of the same name."""
        self._put(name, data, RequestKind.OVERWRITE)

    def create(self, name: str, data: Data) -> None:
        """Store an object unless there is one of the same name."""
        if not self._knows_conditions and self._is_there(name, len(data)):
            return
        try:
            kind = RequestKind.CREATE if self._knows_conditions else RequestKind.OVERWRITE
            self._put(name, data, kind)
        except _TakenError:
            if not self._is_there(name, len(data)):
                raise StorageUnavailableError(
                    "create",
                    f"{self.url}/{name}",
                    OSError(errno.EAGAIN, "it was deleted at the same time"),
                ) from None
        except _NoConditionsError:
            self._knows_conditions = False
            self.create(name, data)

    def _is_there(self, name: str, size: int) -> bool:
        try:
            found = self.size(name)
        except NotFoundError:
            return False
        if found != size:
            raise size_conflict(self.url, name, found, size)
        return True

    def _put(self, name: str, data: Data, kind: RequestKind) -> None:
        def put() -> None:
            try:
                obstore.put(
                    self._store(len(data)),
                    self._prefix + name,
                    data,
                    mode="create" if kind is RequestKind.CREATE else "overwrite",
                    use_multipart=False,
                )
            except ERRORS as error:
                if kind is RequestKind.CREATE and already_exists(error):
                    raise _TakenError from error
                if kind is RequestKind.CREATE and parse_answer(error).is_not_implemented:
                    raise _NoConditionsError from error
                raise

        self._counter.add(kind, sent_bytes=len(data))
        self._run("write", name, put)

    def delete(self, name: str) -> None:
        """Remove an object."""

        def delete() -> None:
            try:
                obstore.delete(self._store(0), self._prefix + name)
            except FileNotFoundError as error:
                if parse_answer(error).code == "NoSuchBucket":
                    raise

        self._counter.add(RequestKind.DELETE)
        self._run("delete", name, delete)

    def open_writer(self, in_memory: bool) -> BufferedWriter:
        """Begin an object, which is sent when it is committed."""
        return BufferedWriter(self.create, in_memory)

    def close(self) -> None:
        """Let go of the clients; a call that is under way ends by itself."""
        with self._lock:
            pools, self._calls, self._ranges = (self._calls, self._ranges), None, None
            self._stores.clear()
        if self.bucket is not None:
            self.bucket.close()
        for pool in pools:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _store(self, body_bytes: int) -> ObjectStore:
        """Return a client whose timeout is enough for a body of so many bytes."""
        timeout_s = _TIMEOUT_S
        if body_bytes > _SMALL_BYTES:
            timeout_s *= 4
            while timeout_s < _TIMEOUT_S + body_bytes / _LEAST_BYTES_PER_S:
                timeout_s *= 2
        with self._lock:
            store = self._stores.get(timeout_s)
            if store is None:
                store = self._stores[timeout_s] = self._make_store(timeout_s)
            return store

    def _range_threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._ranges is None:
                self._ranges = ThreadPoolExecutor(_PARALLEL, "casfs-object-ranges")
            return self._ranges

    def _call_threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._calls is None:
                self._calls = ThreadPoolExecutor(2 * _PARALLEL, "casfs-object-store")
            return self._calls

    def _run(self, action: str, name: str, call: Callable[[], T]) -> T:
        future = self._call_threads().submit(call)
        # `close` may cancel the call, and `wait` does not count that as done.
        while not future.done():
            if not wait([future], _LOOK_S).done and INTERRUPTED.is_set():
                raise interrupted_error(f"{self.url}/{name}")
        try:
            return future.result()
        except CancelledError as error:
            closed = OSError(errno.ECANCELED, "the repository was closed meanwhile")
            raise StorageError(action, f"{self.url}/{name}", closed) from error
        except (_TakenError, _NoConditionsError):
            raise
        except ERRORS as error:
            raise translate(error, action, self.url, name) from error


class _TakenError(Exception):
    """A creation found its name taken."""


class _NoConditionsError(Exception):
    """The server does not know conditional writes."""


def _nanoseconds(time: datetime) -> int:
    return int(time.timestamp()) * 1_000_000_000 + time.microsecond * 1000
