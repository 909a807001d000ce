"""An LMDB environment: each call owns its transaction, and the map grows and follows other processes.

This is the only module that imports lmdb. A caller passes a function, which runs inside a transaction on the
calling thread and returns only values copied out of the map. Threads may share the environment; it must not
cross a fork.
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
"""Address space, not memory or disk: the file grows as needed. Enough for about 2,000 million blobs."""

_SMALL_MAP_BYTES = 1024**3
"""The first map size where the address space is limited; it doubles whenever the map is full."""

_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, struct.error)
"""Errors of LMDB, and of unpacking its values, that mean that the file is damaged."""

T = TypeVar("T")

Transaction = lmdb.Transaction
Database = lmdb._Database


class LmdbEnv:
    """An open environment with named databases.

    `on_step` is called before and after every commit. Without `sync` commits do not wait for the disk: for
    tests of everything but durability. `is_damaged` is set once an error has shown that the file is damaged.
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
        # No transaction of this process may be open while the map is resized, or its reads would fail. So no
        # transaction begins inside another: it would wait for the resize, and the resize for the outer one.
        self._gate = threading.Condition()
        self._open_transactions = 0
        self._resizing = False
        try:
            self._env = self._open(readonly)
        except (lmdb.Error, OSError) as error:
            raise IndexUnusableError(
                f"cannot open the index {path}: {error}; it can be rebuilt from the packs "
                "(casfs repair index)"
            ) from error

    def database(self, name: bytes) -> lmdb._Database:
        """Return a named database; create it unless the environment is read-only."""
        try:
            return self._env.open_db(name, create=not self.readonly)
        except lmdb.Error as error:
            raise self._unusable(error) from error

    def database_if_any(self, name: bytes) -> lmdb._Database | None:
        """Return a named database as `database` does; None where a read-only environment lacks it."""
        try:
            return self._env.open_db(name, create=not self.readonly)
        except lmdb.NotFoundError:
            return None
        except lmdb.Error as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def verify_pages(self) -> None:
        """Read every used page and the list of free pages through LMDB.

        Raise IndexDamagedError where they are inconsistent. Other damage may crash the process.
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
        """Return the result of `ask`, run in a read-only transaction."""
        return self._run(False, ask)

    def write(self, change: Callable[[Transaction], T]) -> T:
        """Run `change` in a write transaction and commit it durably.

        If the map is full, the map grows and `change` runs again. Return the result of `change`.
        """
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
            raise FileNotFoundError("the index does not exist")
        lock = not readonly or os.access(self.path / "lock.mdb", os.W_OK)
        for map_bytes in (_MAP_BYTES, _SMALL_MAP_BYTES):
            self._map_bytes = map_bytes
            try:
                env = lmdb.open(
                    os.fsencode(self.path),
                    map_size=map_bytes,
                    max_dbs=5,
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
        """Run `work` in a transaction; run it again whenever the map had to be resized."""
        while True:
            full_bytes = 0
            with self._gate:
                if self._resizing:
                    self._gate.wait_for(lambda: not self._resizing)
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
                    if self._resizing:
                        self._gate.notify_all()
            self._resize(full_bytes)

    def _resize(self, full_bytes: int) -> None:
        """Double a full map of `full_bytes`; with 0, adopt the map size that another process has set."""
        with self._gate:
            self._gate.wait_for(lambda: not self._resizing)
            self._resizing = True
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
                self._resizing = False
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
