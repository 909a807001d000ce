"""Ask a bucket until when objects are locked: several requests at a time.

What a lock holds back is no error for a command that removes objects: they stay until the lock ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from casfs.errors import NotFoundError, StorageDeniedError
from casfs.storage.base import Storage
from casfs.storage.bucket import Bucket
from casfs.storage.interruption import INTERRUPTED, interrupted_error

_THREADS = 8
_AHEAD = 1000
_LOOK_S = 0.5


def locking_bucket(storage: Storage) -> Bucket | None:
    """Return the bucket of a storage if it can lock objects; raise StorageError."""
    bucket = storage.bucket
    if bucket is None:
        return None
    try:
        return bucket if bucket.settings().can_lock else None
    except StorageDeniedError:
        return bucket  # the credentials may ask for locks without being allowed to ask for the settings


def lock_ends_s(bucket: Bucket, names: Sequence[str]) -> dict[str, int]:
    """Return the ends of the locks of objects; those that have no lock, or are gone, are left out.

    Raise StorageError.
    """
    found: dict[str, int] = {}

    def ask(name: str) -> None:
        try:
            until_s = bucket.locked_until_s(name)
        except NotFoundError:
            return
        if until_s is not None:
            found[name] = until_s

    pool = ThreadPoolExecutor(_THREADS, "casfs-lock-dates")
    try:
        for begin in range(0, len(names), _AHEAD):
            waiting = {pool.submit(ask, name) for name in names[begin : begin + _AHEAD]}
            while waiting:
                done, waiting = wait(waiting, _LOOK_S)
                if waiting and INTERRUPTED.is_set():
                    raise interrupted_error(names[begin])
                for future in done:
                    future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def held_until_s(storage: Storage, names: Sequence[str], now_s: int) -> dict[str, int]:
    """Return until when locks keep objects from being removed; objects that can be removed are left out.

    `now_s` is the time by the storage's clock. Raise StorageError.
    """
    bucket = locking_bucket(storage) if names else None
    if bucket is None:
        return {}
    return {name: end_s for name, end_s in lock_ends_s(bucket, names).items() if end_s > now_s}
