"""The contract of every storage back end: the interface between casfs and the places that keep its objects.

A storage keeps named objects of bytes. Each name is a relative path such as `packs/ab/abcd…`: parts of ASCII
letters, digits, `.`, `_` and `-`, joined by `/`. No part is empty or begins with `.` (`is_name`). A back end
implements `Storage`. No module above this one depends on a particular back end.

Every back end guarantees:

- **Whole or absent.** An object appears under its name with all its bytes, or not at all. No reader ever
  sees part of an object.
- **Durable.** When `create`, `write`, `delete` or `ObjectWriter.commit` returns, the change survives a crash
  of the machine that keeps the objects, as far as that machine keeps its own guarantees.
- **Write-once.** `create` and `commit` never change an existing object. An existing object with the same
  number of bytes counts as written, because the name stands for the bytes (casfs verifies digests when it
  reads). An existing object of another size raises StorageError.
- **Threads.** Several threads may call every method at once, except that an `ObjectWriter` belongs
  to one thread at a time. A storage is never used across a fork: open it in the process that uses it.
- **Errors.** `NotFoundError` means that the object does not exist. `StorageDeniedError` means that the back
  end refuses the caller; a retry does not help. `StorageUnavailableError` means that the back end did not
  answer or is busy; the request may or may not have taken effect, and a retry may help. Every other failure
  is a plain `StorageError`. A back end raises no other exception.
- **Hostile input.** A back end checks the names, sizes and times that it receives: it omits an entry of a
  listing whose name `is_name` refuses, and a read never returns more bytes than requested.
- **Units.** Sizes and offsets are bytes. Times are nanoseconds since 1970 by the clock of the back end.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from casfs.errors import StorageError
from casfs.storage.bucket import Bucket

if TYPE_CHECKING:
    from casfs.storage.locks import LockMode, LockRecord

Data = bytes | bytearray | memoryview
"""Accepted by every write. A memoryview must be contiguous and of bytes."""

MAX_WHOLE_READ_BYTES = 256 * 1024 * 1024
"""The largest object that a read without a size returns, since all its bytes must fit in memory."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_MAX_NAME_CHARS = 512


def is_name(name: str) -> bool:
    """Return whether a string is a valid object name."""
    return len(name) <= _MAX_NAME_CHARS and _NAME.fullmatch(name) is not None


class ListedObject(NamedTuple):
    """An entry of a listing. `mtime_ns` may be coarser than that of `Storage.mtime_ns`."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features of a kind of back end. `probe.py` tests a particular back end."""

    creates_exclusively: bool
    """Of two concurrent creations of the same name, only one succeeds. Correctness never depends on it."""

    reads_ranges: bool
    """A read of a range transfers about as many bytes as it returns."""

    has_own_clock: bool
    """The times of all objects come from one clock, whichever machine wrote them."""

    syncs_names: bool
    """The creation or deletion of a name is durable when the call returns."""

    can_overwrite: bool
    """`write` can replace an object."""

    can_delete: bool
    """`delete` is supported; the credentials may still forbid it."""

    reads_nonblocking: bool
    """`read_nonblocking` may return bytes; where this is False it always returns None."""

    holds_locks: bool
    """Locks of other processes are visible and are released when their process dies."""

    parallel_requests: int
    """The number of concurrent requests up to which reads get faster."""


class ObjectWriter(Protocol):
    """An object that is being written and has no name yet."""

    def append(self, data: Data) -> None:
        """Append bytes; the caller may reuse the buffer afterwards. Raise StorageError."""

    def commit(self, name: str) -> None:
        """Make the bytes durable under a name, write-once (see the module docstring).

        After StorageUnavailableError the caller may call it again with the same name. After any other error
        no object has the name unless one had it before. Raise StorageError.
        """

    def discard(self) -> None:
        """Drop the appended bytes. A second call, or a call after `commit`, does nothing. Raise nothing."""


class Storage(Protocol):
    """A back end that keeps objects. The module docstring states what holds for every method."""

    @property
    def url(self) -> str:
        """The location, for messages and for comparison: a path or a URL without secrets."""

    @property
    def capabilities(self) -> Capabilities:
        """The features of this back end."""

    @property
    def bucket(self) -> Bucket | None:
        """The versions and locks of the objects; None where the place keeps none that casfs can use."""

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix (`packs`: all names that begin with `packs/`).

        The order is by name, provided that the parts of the names hold only letters and digits. Objects that
        are created or deleted during the listing may or may not appear. An error ends the listing, so what
        was yielded before it is incomplete. A prefix that does not exist or has no objects yields nothing.
        """

    def size(self, name: str) -> int:
        """Return an object's size in bytes; raise NotFoundError."""

    def mtime_ns(self, name: str) -> int:
        """Return the time of an object's last write, by the clock of the back end; raise NotFoundError."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes from `offset`, fewer only where the object ends; raise NotFoundError.

        An offset at or beyond the end returns no bytes. Without a size, return everything from the offset on,
        or raise StorageError where that is more than MAX_WHOLE_READ_BYTES.
        """

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return exactly `size` bytes from `offset` if they are in memory, else None; never block."""

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Request that a range be loaded into memory, where the back end can; raise nothing."""

    def write(self, name: str, data: Data) -> None:
        """Store a whole object and atomically replace an object of the same name."""

    def create(self, name: str, data: Data) -> None:
        """Store a whole object, write-once (see the module docstring)."""

    def delete(self, name: str) -> None:
        """Remove an object; do nothing if it does not exist."""

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Begin an object whose name is known only when all its bytes are.

        The bytes wait in memory if `in_memory` is set, else on a disk.
        """

    def close(self) -> None:
        """Release connections and descriptors. A second call does nothing."""


def size_conflict(url: str, name: str, found_bytes: int, wanted_bytes: int) -> StorageError:
    """Return the error for a name whose existing object has another size than the new one."""
    return StorageError(
        "create",
        f"{url}/{name}",
        OSError(
            errno.EEXIST,
            f"an object of this name has {found_bytes} bytes instead of {wanted_bytes}, so it is damaged "
            "or was not written by casfs; remove it and try again",
        ),
    )


DEFAULT_CACHE_BYTES = 2 * 1024 * 1024 * 1024
"""Room for the trees of some ten million files."""


DEFAULT_PATIENCE_S = 900.0
FIRST_PATIENCE_S = 20.0


class HeldLock(Protocol):
    """A lock that this process holds until it releases it or dies; use it in a `with` block."""

    @property
    def name(self) -> str:
        """The name of the lock, which is never used again."""

    @property
    def mode(self) -> LockMode:
        """The purpose of the lock, which decides the conflicts."""

    def release(self) -> None:
        """Release the lock; raise nothing. A second call does nothing."""

    def __enter__(self) -> HeldLock: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Locks(Protocol):
    """The locks of the processes that share a repository, or of those of one machine that share its cache.

    A lock is held as long as its process lives, and no longer. Of two processes that acquire conflicting
    locks at once, at least one fails. Every method raises StorageError where the locks cannot be read or
    written, and RefusedError where another user could change them.
    """

    def acquire(self, verb: str, mode: LockMode, host: str | None = None) -> HeldLock:
        """Acquire a lock; raise LockedError, which names the holder, where a conflicting one is held.

        `verb` is the command, and `host` the host name that others see, by default this machine's.
        """

    def held(self) -> dict[str, LockRecord]:
        """Return the locks that living processes hold, by name, and change nothing."""

    def reap(self) -> dict[str, LockRecord]:
        """Return the locks that living processes hold, by name, and remove what dead ones left."""


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How to reach a back end: the settings that a configuration may give beside the URL.

    None means that the usual variables and files decide, such as AWS_ENDPOINT_URL and ~/.aws/credentials.
    Secrets never appear in `repr`.
    """

    endpoint: str | None = None
    """The URL of the object storage server, such as https://s3.example.org."""

    region: str | None = None

    profile: str | None = None
    """The section of ~/.aws/credentials and ~/.aws/config."""

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    credentials_command: str | None = None
    """A shell command that prints credentials.

    NAME=VALUE lines of the usual variables, the JSON of AWS's credential_process, or the JSON of a service
    account's key of Google.
    """

    account: str | None = None
    """The name of a storage account of Azure."""

    virtual_hosted: bool = False
    """Put the bucket into the host name. AWS always does; most other servers do not need it."""

    ca_file: str | None = None
    """A PEM file of trusted certificates, used instead of the system's."""

    ssh_command: tuple[str, ...] = ("ssh",)
    """The program that connects to a machine, with its first arguments."""

    upload_bytes_per_s: int | None = None
    download_bytes_per_s: int | None = None

    patience_s: float = DEFAULT_PATIENCE_S
    """How long to retry a storage that has answered before."""

    first_patience_s: float = FIRST_PATIENCE_S
    """How long to retry a storage that has not answered yet, so that a wrong host name fails soon."""

    cache_bytes: int = DEFAULT_CACHE_BYTES
    """The limit of what this machine keeps of the objects of a repository; 0 keeps nothing on the disk."""
