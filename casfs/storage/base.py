"""The seam between casfs and the places that keep its objects: the contract of every storage.

A storage keeps named objects of bytes. Each name is a relative path such as `packs/ab/abcd…`: parts of
ASCII letters, digits, `.`, `_` and `-`, joined by `/`, none empty and none beginning with `.` (`is_name`).
A back end implements `Storage`; nothing above this module knows which one it has.

What every back end promises:

- **Whole or absent.** An object appears under its name with all its bytes, or not at all. No reader ever
  sees a part of one.
- **Durable.** When `create`, `write`, `delete` or `ObjectWriter.commit` returns, the change survives a crash
  of the machine that keeps the objects, as far as that machine keeps its own promises.
- **Write-once.** `create` and `commit` never change an object that is there. Finding one with the same number
  of bytes counts as having written it, since the name stands for the bytes (casfs verifies digests when it
  reads). Finding one with another size raises StorageError.
- **Threads.** Every method may be called from several threads at once, except that one `ObjectWriter` belongs
  to one thread at a time. A storage is never used across a fork: open it in the process that uses it.
- **Errors.** `NotFoundError` says that there is no such object. `StorageDeniedError` says that the place
  refuses the caller; asking again does not help. `StorageUnavailableError` says that the place did not answer
  or is busy; what was asked may or may not have happened, and asking again may help. Every other failure
  is a plain `StorageError`. No other exception leaves a back end.
- **Hostile input.** Names, sizes and times that a place reports are checked: an entry of a listing with a
  name that `is_name` refuses is left out, and a read never returns more bytes than were asked for.
- **Units.** Sizes and offsets are bytes. Times are nanoseconds since 1970 by the clock of the place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

Data = bytes | bytearray | memoryview
"""What can be written. A memoryview is contiguous and of bytes."""

MAX_WHOLE_READ_BYTES = 256 * 1024 * 1024
"""A read without a size refuses larger objects, whose bytes would all have to be in memory."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_MAX_NAME_CHARS = 512


def is_name(name: str) -> bool:
    """Return whether a string may be the name of an object."""
    return len(name) <= _MAX_NAME_CHARS and _NAME.fullmatch(name) is not None


class ListedObject(NamedTuple):
    """An entry of a listing. `mtime_ns` may be coarser than that of `Storage.mtime_ns`."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kind of place can do. A probe (`probe.py`) finds out whether a particular one does."""

    creates_exclusively: bool
    """Of two creations of one name at the same time, only one succeeds. Correctness never needs it."""

    reads_ranges: bool
    """A read of a range transfers about as many bytes as it returns."""

    has_own_clock: bool
    """The times of objects come from one clock, whichever machine wrote them."""

    syncs_names: bool
    """A name is durable when the call that made or removed it returns."""

    can_overwrite: bool
    """`write` can replace an object."""

    can_delete: bool
    """`delete` can work; whether the credentials allow it is another matter."""

    reads_nonblocking: bool
    """`read_nonblocking` returns bytes now and then; elsewhere it always returns None."""

    holds_locks: bool
    """Locks of other processes can be seen and are released when their process dies."""

    parallel_requests: int
    """How many requests at the same time make reading faster."""


class ObjectWriter(Protocol):
    """An object that is being written and has no name yet."""

    def append(self, data: Data) -> None:
        """Add bytes to the end; the buffer may be changed afterwards. Raise StorageError."""

    def commit(self, name: str) -> None:
        """Make the bytes durable under a name, write-once as the module's docstring says.

        After StorageUnavailableError it may be called again with the same name. After any other error
        nothing has the name unless something had it before. Raise StorageError.
        """

    def discard(self) -> None:
        """Drop what was appended; harmless after `commit` and when called again. Raise nothing."""


class Storage(Protocol):
    """A place that keeps objects; see the module's docstring for what holds for every method."""

    @property
    def url(self) -> str:
        """The place, for messages and to know it again: a path or a URL, never with a secret in it."""

    @property
    def capabilities(self) -> Capabilities:
        """What the place can do."""

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield every object below a prefix (`packs`: all names that begin with `packs/`).

        Ordered by name, as long as the parts of the names hold only letters and digits. Objects that are
        created or deleted meanwhile may be listed or not. An error ends the listing: what was
        yielded before it is not all. A prefix without objects, or that does not exist, yields nothing.
        """

    def size(self, name: str) -> int:
        """Return an object's size in bytes; raise NotFoundError."""

    def mtime_ns(self, name: str) -> int:
        """Return when an object was written, by the clock of the place; raise NotFoundError."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes from `offset`, fewer only where the object ends; raise NotFoundError.

        From or beyond the end of the object on that is no bytes. Without a size everything from the
        offset on is returned, or StorageError is raised where that is more than MAX_WHOLE_READ_BYTES.
        """

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return exactly `size` bytes from `offset` if they are in memory, else None; never wait."""

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Ask for a range to be brought into memory, where the place can; raise nothing."""

    def write(self, name: str, data: Data) -> None:
        """Store a whole object, replacing one of the same name in one step."""

    def create(self, name: str, data: Data) -> None:
        """Store a whole object, write-once as the module's docstring says."""

    def delete(self, name: str) -> None:
        """Remove an object; one that does not exist is no error."""

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        """Begin an object whose name is known only at its end.

        `in_memory` says where the bytes wait until then: in memory, or on a disk.
        """

    def close(self) -> None:
        """Release connections and descriptors; harmless when called again."""


class HeldLock(Protocol):
    """A lock that this process holds; use it in a `with` block, or `release` it."""

    @property
    def name(self) -> str:
        """The lock's name, which no other lock ever has."""

    def release(self) -> None:
        """Give the lock back; harmless when called again. Raise nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How a place is reached: what a configuration may say beside the URL.

    None means the usual variables and files decide, such as AWS_ENDPOINT_URL and ~/.aws/credentials.
    Secrets never appear in `repr`.
    """

    endpoint: str | None = None
    """The URL of the server of an object storage, such as https://s3.example.org."""

    region: str | None = None

    profile: str | None = None
    """The section of ~/.aws/credentials and ~/.aws/config."""

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    credentials_command: str | None = None
    """A shell command that prints credentials: NAME=VALUE lines of the usual variables, or the JSON of
    AWS's credential_process."""

    virtual_hosted: bool = False
    """Put the bucket into the host's name. AWS does so by itself; most other servers do not need it."""

    ca_file: str | None = None
    """A PEM file of certificates to trust, instead of those of the system."""

    ssh_command: tuple[str, ...] = ("ssh",)
    """The program that reaches a machine, with its first arguments."""

    upload_bytes_per_s: int | None = None
    download_bytes_per_s: int | None = None

    patience_s: float = 900.0
    """For how long a storage that answered before is asked again before giving up."""

    first_patience_s: float = 20.0
    """The same for one that has not answered yet: a wrong name should not be waited for."""
