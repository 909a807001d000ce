"""A bucket that keeps the versions of its objects and locks them: a capability beyond `Storage`.

`Storage.bucket` is None where the place has no such thing: a folder, SFTP, and the object storages that casfs
does not know to lock. Names are those of `Storage`, relative to the repository.

A lock is a date before which the server removes the version of an object for no credential (S3's COMPLIANCE
mode). It can be extended, never shortened. A deletion of a locked object that names no version hides the
object behind a delete marker, and the version stays.

Threads, errors, hostile input and units are as in `base.py`; dates of locks are whole seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class BucketSettings:
    """The settings of a bucket; `default_lock_s` is for how long it locks every new object, or None."""

    keeps_versions: bool
    can_lock: bool
    default_lock_s: int | None = None


class ObjectVersion(NamedTuple):
    """A version of an object. `is_deletion` marks a delete marker: the object was absent from then on."""

    name: str
    version: str
    size: int
    mtime_ns: int
    is_deletion: bool


class Bucket(Protocol):
    """The versions and the locks of the objects of a repository. The module docstring states what holds."""

    def settings(self) -> BucketSettings:
        """Return the settings of the bucket; raise StorageError."""

    def locked_until_s(self, name: str) -> int | None:
        """Return the end of the lock of an object's newest version, None without a lock.

        Raise NotFoundError.
        """

    def lock(self, name: str, until_s: int) -> None:
        """Lock an object's newest version at least until a time; a lock that lasts longer stays as it is.

        Raise NotFoundError, and StorageDeniedError where the credentials may not lock.
        """

    def versions(self, prefix: str) -> Iterator[ObjectVersion]:
        """Yield every version of the object `prefix` and of the objects below it, as `Storage.list` yields.

        The order is by name, and the versions of one object come from the newest to the oldest.
        """

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a version from `offset`, fewer only where it ends; raise NotFoundError."""

    def close(self) -> None:
        """Release the connections. A second call does nothing."""
