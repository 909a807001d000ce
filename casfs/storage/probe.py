"""Probe what a place supports: once, when a repository is created there.

casfs refuses a place that returns other bytes than were stored, or that leaves objects out of listings. It
accepts a place where two creations of a name succeed or a deletion fails: correctness depends on neither.
"""

from __future__ import annotations

import errno
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from casfs.errors import NotFoundError, StorageDeniedError, StorageError
from casfs.storage.base import Data, Storage

PREFIX = "probe"

_CREATORS = 4
_MOST_CLOCK_OFFSET_S = 60


class ProbeResult(msgspec.Struct, frozen=True):
    """The results of a probe, recorded in the repository."""

    creates_exclusively: bool
    """A creation of a taken name changed nothing, nor did any of several at the same time."""

    can_overwrite: bool
    can_delete: bool

    clock_offset_s: float
    """How far this machine's clock is ahead of the place's; a request takes a part of it."""

    @property
    def is_clock_off(self) -> bool:
        """Whether the clocks of this machine and of the place differ by more than a minute."""
        return abs(self.clock_offset_s) > _MOST_CLOCK_OFFSET_S


def probe_storage(storage: Storage) -> ProbeResult:
    """Probe a place with a few small objects, and remove them again.

    Raise StorageError where it does not keep or list what is stored, and what the storage raises.
    """
    token = secrets.token_hex(8)
    first, other = f"{PREFIX}/{token}/a", f"{PREFIX}/{token}/b"
    data = secrets.token_bytes(3000)
    before_s = time.time()
    storage.create(first, data)
    clock_offset_s = before_s - storage.mtime_ns(first) / 1e9
    try:
        _require_reads(storage, first, data)
        _require_listing(storage, f"{PREFIX}/{token}", first, len(data))
        exclusive = _keeps_first(storage, first, data) and _lets_one_win(storage, other)
        overwrites = _overwrites(storage, first)
    finally:
        deletes = _deletes(storage, (first, other))
    return ProbeResult(exclusive, overwrites, deletes, clock_offset_s)


def _require_reads(storage: Storage, name: str, data: bytes) -> None:
    if storage.size(name) != len(data):
        raise _wrong(storage, "reports another size than that of what was stored")
    if storage.read(name) != data:
        raise _wrong(storage, "returns other bytes than were stored")
    for offset, size in ((0, 10), (1000, 500), (2990, 100), (3000, 10)):
        if storage.read(name, offset, size) != data[offset : offset + size]:
            raise _wrong(storage, "returns wrong bytes for a part of an object")
    try:
        storage.read(f"{name}-missing")
    except NotFoundError:
        return
    raise _wrong(storage, "returns an object that was never stored")


def _require_listing(storage: Storage, prefix: str, name: str, size: int) -> None:
    listed = [(entry.name, entry.size) for entry in storage.list(prefix)]
    if listed != [(name, size)]:
        raise _wrong(storage, "does not list what was stored")


def _keeps_first(storage: Storage, name: str, data: bytes) -> bool:
    storage.create(name, secrets.token_bytes(len(data)))
    return storage.read(name) == data


def _lets_one_win(storage: Storage, name: str) -> bool:
    """Return whether what the first of several creators stored is still there when all are done."""
    versions = [secrets.token_bytes(1000) for _ in range(_CREATORS)]
    seen: list[bytes] = []

    def create(data: Data) -> None:
        storage.create(name, data)
        seen.append(storage.read(name))

    with ThreadPoolExecutor(_CREATORS) as pool:
        list(pool.map(create, versions))
    return len(set(seen)) == 1


def _overwrites(storage: Storage, name: str) -> bool:
    data = secrets.token_bytes(2000)
    try:
        storage.write(name, data)
    except StorageDeniedError:
        return False
    return storage.read(name) == data


def _deletes(storage: Storage, names: tuple[str, ...]) -> bool:
    try:
        for name in names:
            storage.delete(name)
        return not any(_exists(storage, name) for name in names)
    except StorageError:
        return False


def _exists(storage: Storage, name: str) -> bool:
    try:
        return storage.size(name) >= 0
    except NotFoundError:
        return False


def _wrong(storage: Storage, what: str) -> StorageError:
    return StorageError(
        "use",
        storage.url,
        OSError(
            errno.EIO, f"the server {what}, so no repository can be kept there; use another server"
        ),
    )
