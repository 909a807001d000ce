"""Lock the objects that a snapshot needs, and remember until when each of them is locked.

All dates are rounded up to the end of a period of a quarter of the lock's duration. So the first backup of a
period extends the lock of each pack that it relies on, with one request a pack, and the others find all of
them locked for long enough. The dates are kept in the index (`meta`); without them every object is locked
again. Requests are sent in parallel. One thread uses an instance.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from casfs.errors import CasfsError, NotFoundError, StorageDeniedError, StorageError
from casfs.index.index import Index
from casfs.index.lmdb_env import Transaction
from casfs.storage.bucket import Bucket
from casfs.storage.interruption import INTERRUPTED, interrupted_error

log = logging.getLogger(__name__)

_KEY = b"locked"
_DATE = struct.Struct("<Q")
_LONGEST_PERIOD_S = 30 * 86_400
_PARTS = 4
_THREADS = 8
_AHEAD = 4 * _THREADS
_LOOK_S = 0.5


def lock_end_s(now_s: int, lock_for_s: int) -> int:
    """Return until when what is needed now is locked: at least `lock_for_s`, at most a quarter more."""
    period_s = max(1, min(lock_for_s // _PARTS, _LONGEST_PERIOD_S))
    return ((now_s + lock_for_s) // period_s + 1) * period_s


@dataclass(frozen=True, slots=True)
class NotLocked:
    """Objects that could not be locked, and why the first of them could not."""

    names: frozenset[str]
    error: CasfsError


class ObjectLocks:
    """The locks of the objects of one repository.

    `until_s` is the date until which this process locks what it needs.
    """

    def __init__(self, bucket: Bucket, index: Index, until_s: int) -> None:
        self.until_s = until_s
        self._bucket = bucket
        self._env = index.environment
        self._meta = self._env.database(b"meta")

    def locked_until_s(self, name: str) -> int:
        """Return the last known end of the lock of an object, 0 if none is known."""
        key = _KEY + name.encode()
        value = self._env.read(lambda txn: txn.get(key, db=self._meta))
        return int(_DATE.unpack(value)[0]) if value is not None else 0

    def not_locked(self, names: Iterable[str]) -> list[str]:
        """Return the objects that are not known to be locked until `until_s`."""
        return [name for name in names if self.locked_until_s(name) < self.until_s]

    def lock(self, names: Sequence[str], may_be_missing: bool = False) -> NotLocked | None:
        """Lock objects until `until_s`; return what could not be locked, None for nothing.

        The first refusal of the credentials ends it, since all others would be refused as well. With
        `may_be_missing` an object that is gone is no failure. Raise StorageUnavailableError.
        """
        locked: list[str] = []
        gone: list[str] = []
        first: CasfsError | None = None
        try:
            for name, error in self._lock_each(names):
                if error is None:
                    locked.append(name)
                elif may_be_missing and isinstance(error, NotFoundError):
                    gone.append(name)
                else:
                    first = first or error
                    if isinstance(error, StorageDeniedError):
                        break
        finally:
            self._remember(locked)
        if first is None:
            return None
        return NotLocked(frozenset(names).difference(locked, gone), first)

    def _lock_each(self, names: Sequence[str]) -> Iterator[tuple[str, CasfsError | None]]:
        """Yield each name once its request was answered, with the error of the answer."""
        pool = ThreadPoolExecutor(_THREADS, "casfs-locks")
        waiting: dict[Future[None], str] = {}
        rest = iter(names)
        try:
            while True:
                while len(waiting) < _AHEAD and (name := next(rest, None)) is not None:
                    waiting[pool.submit(self._bucket.lock, name, self.until_s)] = name
                if not waiting:
                    return
                done = wait(waiting, _LOOK_S, FIRST_COMPLETED).done
                if not done and INTERRUPTED.is_set():
                    raise interrupted_error(names[0])
                for future in done:
                    name = waiting.pop(future)
                    try:
                        future.result()
                    except (StorageError, NotFoundError) as error:
                        yield name, error
                    else:
                        yield name, None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _remember(self, names: list[str]) -> None:
        value = _DATE.pack(self.until_s)

        def change(txn: Transaction) -> None:
            for name in names:
                txn.put(_KEY + name.encode(), value, db=self._meta)

        if names:
            self._env.write(change)

    def drop_ended(self, now_s: int) -> None:
        """Forget the locks that have ended."""

        def ended(txn: Transaction) -> list[bytes]:
            cursor = txn.cursor(db=self._meta)
            found = []
            more = cursor.set_range(_KEY)
            while more and (key := bytes(cursor.key())).startswith(_KEY):
                if _DATE.unpack(cursor.value())[0] < now_s:
                    found.append(key)
                more = cursor.next()
            return found

        def change(txn: Transaction) -> None:
            for key in old:
                txn.delete(key, db=self._meta)

        old = self._env.read(ended)
        if old:
            self._env.write(change)
