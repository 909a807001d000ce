"""An LMDB environment: transactions of one call each, and a map that grows and follows other processes.

This is the only module that imports lmdb. Work is passed in and runs inside a transaction on the
calling thread; what it returns is copied out of the map by then. Safe to share between threads, never
across a fork.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lmdb

from casfs.errors import IndexDamagedError, IndexUnusableError

log = logging.getLogger(__name__)

_MAP_BYTES = 256 * 1024**3
"""Address space, not memory or disk: the file grows as needed. Room for some 2,000 million blobs."""

_SMALL_MAP_BYTES = 1024**3
"""Where the address space is limited; doubled whenever it is full."""

_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, struct.error)
"""What LMDB raises, and what unpacking what it gives does, where the file cannot be what was written."""

T = TypeVar("T")

Transaction = lmdb.Transaction


class LmdbEnv:
    """An open environment with named databases; `on_step` hears of every commit, before and after it.

    Without `sync` commits wait for no disk: for tests of everything but durability. `is_damaged` tells
    whether anything has shown that the file cannot be what was written.
    """

    def __init__(
        self,
        path: Path,
        readonly: bool = False,
        on_step: Callable[[str], None] | None = None,
        sync: bool = True,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.changed = False
        self.is_damaged = False
        self._on_step = on_step
        self._sync = sync
        self._map_bytes = _MAP_BYTES
        # No transaction of this process may be open while the map is moved, or its reads would fail.
        # So none is begun inside another: it would wait for the map, and the map for the outer one.
        self._gate = threading.Condition()
        self._open_transactions = 0
        self._moving = False
        try:
            self._env = self._open(readonly)
        except (lmdb.Error, OSError) as error:
            raise IndexUnusableError(
                f"cannot open the index {path}: {error}; it can be rebuilt from the packs "
                "(casfs repair index)"
            ) from error

    def database(self, name: bytes) -> lmdb._Database:
        """Return a named database, which is made where the environment can be written."""
        try:
            return self._env.open_db(name, create=not self.readonly)
        except lmdb.Error as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def verify_pages(self) -> None:
        """Have LMDB visit every page that is in use and the list of those that are not.

        Raises IndexDamagedError where they contradict each other; more than that may end the process.
        """
        fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._env.copyfd(fd, compact=True)
        except lmdb.Error as error:
            self.is_damaged = True
            raise IndexDamagedError(f"the index {self.path} is damaged: {error}") from error
        finally:
            os.close(fd)

    def read(self, ask: Callable[[Transaction], T]) -> T:
        """Return what `ask` finds in a transaction that changes nothing."""
        return self._run(False, ask)

    def write(self, change: Callable[[Transaction], T]) -> T:
        """Do a change and make it durable; when the map is full it is begun anew in a larger one."""
        self.changed = True
        self._step("commit")
        result = self._run(True, change)
        self._step("done")
        return result

    def _step(self, what: str) -> None:
        if self._on_step is not None:
            self._on_step(f"{what} index")

    def _open(self, readonly: bool) -> lmdb.Environment:
        if not readonly:
            self.path.mkdir(exist_ok=True, mode=0o700)
        elif not (self.path / "data.mdb").exists():
            raise FileNotFoundError("there is no index")
        lock = not readonly or os.access(self.path / "lock.mdb", os.W_OK)
        for map_bytes in (_MAP_BYTES, _SMALL_MAP_BYTES):
            self._map_bytes = map_bytes
            try:
                env = lmdb.open(
                    os.fsencode(self.path),
                    map_size=map_bytes,
                    max_dbs=4,
                    max_readers=512,
                    readonly=readonly,
                    lock=lock,
                    mode=0o600,
                    readahead=False,
                    sync=self._sync,
                    metasync=self._sync,
                    lib_version=0,
                )
            except lmdb.MemoryError:
                continue
            if lock:
                env.reader_check()
            return env
        raise IndexUnusableError(f"not enough address space for the index {self.path}")

    def _run(self, write: bool, work: Callable[[Transaction], T]) -> T:
        """Do some work in a transaction, as often as the map must be made larger for it."""
        while True:
            full_bytes = 0
            with self._gate:
                if self._moving:
                    self._gate.wait_for(lambda: not self._moving)
                self._open_transactions += 1
            try:
                with self._env.begin(write=write) as txn:
                    return work(txn)
            except lmdb.MapResizedError:
                pass
            except lmdb.MapFullError:
                full_bytes = self._map_bytes
            except (lmdb.Error, struct.error) as error:
                raise self._unusable(error) from error
            finally:
                with self._gate:
                    self._open_transactions -= 1
                    if self._moving:
                        self._gate.notify_all()
            self._resize(full_bytes)

    def _resize(self, full_bytes: int) -> None:
        """Double a map of `full_bytes` that is full, or with 0 follow another process's map."""
        with self._gate:
            self._gate.wait_for(lambda: not self._moving)
            self._moving = True
            self._gate.wait_for(lambda: self._open_transactions == 0)
            try:
                if not full_bytes:
                    self._env.set_mapsize(0)
                elif full_bytes == self._map_bytes:
                    self._map_bytes = 2 * max(full_bytes, int(self._env.info()["map_size"]))
                    log.info("the index is full; its map grows to %d bytes", self._map_bytes)
                    self._env.set_mapsize(self._map_bytes)
            except lmdb.Error as error:
                raise self._unusable(error) from error
            finally:
                self._moving = False
                self._gate.notify_all()

    def _unusable(self, error: Exception) -> IndexUnusableError:
        message = (
            f"the index {self.path} cannot be used: {error}; free space on its disk or rebuild it "
            "(casfs repair index)"
        )
        if isinstance(error, _DAMAGE):
            self.is_damaged = True
            return IndexDamagedError(message)
        return IndexUnusableError(message)
