"""A read-only storage that shows the objects of a versioned bucket as they were at a time.

What was deleted or overwritten after that time is there, what was created after it is not. The times are
those of the bucket, in whole seconds on most servers. Memory is bounded: versions that a listing found are
kept for the reads that follow, and every other one is asked for.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NoReturn

from casfs.errors import NotFoundError, RefusedError, StorageDeniedError, StorageError
from casfs.storage.base import MAX_WHOLE_READ_BYTES, Data, ListedObject, ObjectWriter, Storage
from casfs.storage.bucket import Bucket, ObjectVersion
from casfs.storage.wrapper import StorageWrapper

_KEPT_VERSIONS = 50_000


class AsOfStorage(StorageWrapper):
    """The objects of `inner`, which has a bucket, as they were at `time_ns`.

    The first read raises RefusedError for a bucket that keeps no versions.
    """

    def __init__(self, inner: Storage, bucket: Bucket, time_ns: int) -> None:
        super().__init__(inner)
        self._versions = bucket
        self._time_ns = time_ns
        self._known: OrderedDict[str, ObjectVersion] = OrderedDict()
        self._lock = threading.Lock()
        self._is_checked = False

    @property
    def bucket(self) -> None:
        """Nothing: what was cannot be locked."""

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix that was there."""
        for version in self._current(prefix):
            if version.name != prefix:
                self._keep(version)
                yield ListedObject(version.name, version.size, version.mtime_ns)

    def _current(self, prefix: str) -> Iterator[ObjectVersion]:
        """Yield the version of each object that was its newest, unless the object was deleted."""
        self._require_versions()
        decided = ""
        for version in self._versions.versions(prefix):
            if version.name == decided or version.mtime_ns > self._time_ns:
                continue
            decided = version.name
            if not version.is_deletion:
                yield version

    def _require_versions(self) -> None:
        """Raise RefusedError for a bucket that keeps no versions; what was there earlier is lost."""
        if self._is_checked:
            return
        try:
            keeps = self._versions.settings().keeps_versions
        except StorageDeniedError:
            keeps = True  # the credentials may read versions without being allowed to ask for the setting
        if not keeps:
            raise RefusedError(
                f"the bucket of {self.url} keeps no versions, so what was there at an earlier time is lost"
            )
        self._is_checked = True

    def _keep(self, version: ObjectVersion) -> None:
        with self._lock:
            self._known[version.name] = version
            self._known.move_to_end(version.name)
            if len(self._known) > _KEPT_VERSIONS:
                self._known.popitem(last=False)

    def _version(self, name: str) -> ObjectVersion:
        with self._lock:
            known = self._known.get(name)
        if known is not None:
            return known
        for version in self._current(name):
            if version.name == name:
                self._keep(version)
                return version
        raise NotFoundError(f"{name} was not in the repository at that time")

    def size(self, name: str) -> int:
        """Return the size that an object had."""
        return self._version(name).size

    def mtime_ns(self, name: str) -> int:
        """Return the time at which the version was written."""
        return self._version(name).mtime_ns

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of the bytes that an object had."""
        version = self._version(name)
        left_bytes = max(0, version.size - offset)
        if size is None and left_bytes > MAX_WHOLE_READ_BYTES:
            raise StorageError(
                "read",
                f"{self.url}/{name}",
                OSError(errno.EFBIG, "it is too large to be read as a whole"),
            )
        wanted_bytes = min(left_bytes, size if size is not None else left_bytes)
        return self._versions.read_version(name, version.version, offset, wanted_bytes)

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return None: every read asks the server."""
        return None

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Do nothing: the inner storage would load another version."""

    def write(self, name: str, data: Data) -> None:
        """Refuse."""
        self._refuse("write", name)

    def create(self, name: str, data: Data) -> None:
        """Refuse."""
        self._refuse("create", name)

    def delete(self, name: str) -> None:
        """Refuse."""
        self._refuse("delete", name)

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Refuse."""
        self._refuse("write", "an object")

    def _refuse(self, action: str, name: str) -> NoReturn:
        reason = "what the repository was at an earlier time can only be read"
        raise StorageDeniedError(action, f"{self.url}/{name}", OSError(errno.EROFS, reason))
