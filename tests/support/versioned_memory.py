"""A storage in memory whose bucket keeps versions and locks them, as S3 does in COMPLIANCE mode."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

from casfs.errors import NotFoundError, StorageDeniedError
from casfs.storage.base import Data
from casfs.storage.bucket import BucketSettings, ObjectVersion
from casfs.storage.memory import MemoryStorage


class VersionedMemoryStorage(MemoryStorage):
    """A `MemoryStorage` with a bucket; `memory_bucket` is the same bucket with what only tests may do."""

    def __init__(
        self, url: str = "memory:", now_ns: Callable[[], int] = time.time_ns, can_lock: bool = True
    ) -> None:
        super().__init__(url, now_ns)
        self.memory_bucket = MemoryBucket(now_ns, can_lock)

    @property
    def bucket(self) -> MemoryBucket:
        return self.memory_bucket

    def write(self, name: str, data: Data) -> None:
        super().write(name, data)
        self.memory_bucket.add(name, bytes(data), self.mtime_ns(name))

    def create(self, name: str, data: Data) -> None:
        is_new = name not in self._objects
        super().create(name, data)
        if is_new:
            self.memory_bucket.add(name, bytes(data), self.mtime_ns(name))

    def delete(self, name: str) -> None:
        if name in self._objects:
            self.memory_bucket.add(name, None, self._now_ns())
        super().delete(name)


class MemoryBucket:
    """Versions and locks. Without `may_lock` the credentials do not allow to lock."""

    def __init__(self, now_ns: Callable[[], int], can_lock: bool) -> None:
        self.may_lock = True
        self.default_lock_s: int | None = None
        self._can_lock = can_lock
        self._now_ns = now_ns
        self._serials = itertools.count(1)
        self._versions: dict[str, list[tuple[ObjectVersion, bytes]]] = {}
        self._locks: dict[str, int] = {}

    def add(self, name: str, data: bytes | None, mtime_ns: int) -> None:
        version = ObjectVersion(
            name, f"v{next(self._serials)}", len(data or b""), mtime_ns, data is None
        )
        self._versions.setdefault(name, []).insert(0, (version, data or b""))
        if self.default_lock_s is not None and data is not None:
            self._locks[version.version] = mtime_ns // 1_000_000_000 + self.default_lock_s

    def delete_version(self, name: str, version: str) -> None:
        """Delete a version for good, as a thief would; a lock refuses it."""
        until_s = self._locks.get(version)
        if until_s is not None and until_s * 1_000_000_000 > self._now_ns():
            raise StorageDeniedError("delete", name, PermissionError(13, "it is locked"))
        self._versions[name] = [one for one in self._versions[name] if one[0].version != version]

    def settings(self) -> BucketSettings:
        return BucketSettings(True, self._can_lock, self.default_lock_s)

    def _newest(self, name: str) -> ObjectVersion:
        versions = self._versions.get(name)
        if not versions or versions[0][0].is_deletion:
            raise NotFoundError(f"{name} does not exist")
        return versions[0][0]

    def locked_until_s(self, name: str) -> int | None:
        return self._locks.get(self._newest(name).version)

    def lock(self, name: str, until_s: int) -> None:
        version = self._newest(name).version
        if not (self.may_lock and self._can_lock):
            raise StorageDeniedError("lock", name, PermissionError(13, "not allowed"))
        self._locks[version] = max(until_s, self._locks.get(version, 0))

    def versions(self, prefix: str) -> Iterator[ObjectVersion]:
        for name in sorted(self._versions):
            if name == prefix or name.startswith(f"{prefix}/"):
                yield from [version for version, _ in self._versions[name]]

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        for found, data in self._versions.get(name, []):
            if found.version == version and not found.is_deletion:
                return data[offset : offset + size]
        raise NotFoundError(f"{name} has no version {version}")

    def close(self) -> None:
        pass
