"""A storage, its writer and its bucket that pass every call to an inner one.

Subclasses override what they change.
"""

from __future__ import annotations

from collections.abc import Iterator

from casfs.storage.base import Capabilities, Data, ListedObject, ObjectWriter, Storage
from casfs.storage.bucket import Bucket, BucketSettings, ObjectVersion


class StorageWrapper:
    """A storage around another, `inner`."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """The location of the inner storage."""
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        """The features of the inner storage."""
        return self.inner.capabilities

    @property
    def bucket(self) -> Bucket | None:
        """The versions and locks of the inner storage."""
        return self.inner.bucket

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix."""
        return self.inner.list(prefix)

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return self.inner.size(name)

    def mtime_ns(self, name: str) -> int:
        """Return the time at which an object was written."""
        return self.inner.mtime_ns(name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""
        return self.inner.read(name, offset, size)

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a range if it is in memory, else None."""
        return self.inner.read_nonblocking(name, offset, size)

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Request that a range be loaded into memory."""
        self.inner.prefetch(name, offset, size)

    def write(self, name: str, data: Data) -> None:
        """Store an object and replace an object of the same name."""
        self.inner.write(name, data)

    def create(self, name: str, data: Data) -> None:
        """Store an object unless the name exists."""
        self.inner.create(name, data)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self.inner.delete(name)

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Begin an object."""
        return self.inner.open_writer(in_memory)

    def close(self) -> None:
        """Close the inner storage."""
        self.inner.close()


class WriterWrapper:
    """A writer around another, `inner`; `written_bytes` counts what was appended."""

    def __init__(self, inner: ObjectWriter) -> None:
        self.inner = inner
        self.written_bytes = 0

    def append(self, data: Data) -> None:
        """Append bytes."""
        self.inner.append(data)
        self.written_bytes += len(data)

    def commit(self, name: str) -> None:
        """Make the bytes durable under a name."""
        self.inner.commit(name)

    def discard(self) -> None:
        """Drop the appended bytes."""
        self.inner.discard()


class BucketWrapper:
    """A bucket around another, `inner`."""

    def __init__(self, inner: Bucket) -> None:
        self.inner = inner

    def settings(self) -> BucketSettings:
        """Return the settings of the inner bucket."""
        return self.inner.settings()

    def locked_until_s(self, name: str) -> int | None:
        """Return the end of the lock of an object."""
        return self.inner.locked_until_s(name)

    def lock(self, name: str, until_s: int) -> None:
        """Lock an object at least until a time."""
        self.inner.lock(name, until_s)

    def versions(self, prefix: str) -> Iterator[ObjectVersion]:
        """Yield every version of an object and of those below it."""
        return self.inner.versions(prefix)

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        """Return a range of a version."""
        return self.inner.read_version(name, version, offset, size)

    def close(self) -> None:
        """Close the inner bucket."""
        self.inner.close()
