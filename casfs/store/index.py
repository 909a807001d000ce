"""The index: digest → place in a pack, in LMDB; derived, and rebuilt from the packs alone.

This is the only module that imports lmdb. Every method owns its transaction and returns copies; none
lives across a thread or an `await`. The environment is opened after any fork. Values are fixed in
size; every blob and every pack has an ordinal, so that a set of them is a bitmap (FORMAT.md, "Index").
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lmdb

from casfs.digest import Digest, PackId
from casfs.errors import IndexUnusableError
from casfs.store.pack import PackEntry

log = logging.getLogger(__name__)

INDEX_VERSION = b"1"

_LOCATION = struct.Struct("<IIIIIBBH")
assert _LOCATION.size == 24
_PACK = struct.Struct("<32sQIIQ")
assert _PACK.size == 56
_ORDINAL = struct.Struct(">I")
_COUNTERS = struct.Struct("<QQQ")

_MAP_BYTES = 256 * 1024**3
"""Address space, not memory or disk: the file grows as needed. Room for some 2,000 million blobs."""

_SMALL_MAP_BYTES = 1024**3
"""Where the address space is limited; doubled whenever it is full."""

_ASKED_AT_ONCE = 10_000

T = TypeVar("T")

IndexedPack = tuple[PackId, int, list[PackEntry]]
"""A pack's name, its size in bytes, and its entries."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a blob's payload is: `pack` is the pack's ordinal, `offset` in bytes from its start."""

    pack: int
    offset: int
    stored_bytes: int
    plain_bytes: int
    ordinal: int
    kind: int
    codec: int


@dataclass(frozen=True, slots=True)
class PackRecord:
    """What the index knows of a pack; `verified_s` is when all its bytes were last verified (0: never)."""

    ordinal: int
    pack: PackId
    pack_bytes: int
    blobs: int
    verified_s: int


class Index:
    """An open index; safe to share between threads, never across a fork."""

    def __init__(self, path: Path, readonly: bool = False) -> None:
        self._path = path
        self._map_bytes = _MAP_BYTES
        # No transaction of this process may be open while the map is moved, or its reads would fail.
        # So none is begun inside another: it would wait for the map, and the map for the outer one.
        self._gate = threading.Condition()
        self._open_transactions = 0
        self._moving = False
        try:
            self._env = self._open(readonly)
            self._blobs = self._env.open_db(b"blobs", create=not readonly)
            self._packs = self._env.open_db(b"packs", create=not readonly)
            self._meta = self._env.open_db(b"meta", create=not readonly)
        except (lmdb.Error, OSError) as error:
            raise IndexUnusableError(
                f"cannot open the index {path}: {error}; it can be rebuilt from the packs "
                "(casfs repair index)"
            ) from error
        self._pack_ids: dict[int, PackId] = {}

    def _open(self, readonly: bool) -> lmdb.Environment:
        if not readonly:
            self._path.mkdir(exist_ok=True, mode=0o700)
        elif not (self._path / "data.mdb").exists():
            raise FileNotFoundError("there is no index")
        lock = not readonly or os.access(self._path / "lock.mdb", os.W_OK)
        for map_bytes in (_MAP_BYTES, _SMALL_MAP_BYTES):
            self._map_bytes = map_bytes
            try:
                env = lmdb.open(
                    str(self._path),
                    map_size=map_bytes,
                    max_dbs=4,
                    max_readers=512,
                    readonly=readonly,
                    lock=lock,
                    mode=0o600,
                    readahead=False,
                    lib_version=0,
                )
            except lmdb.MemoryError:
                continue
            if lock:
                env.reader_check()
            return env
        raise IndexUnusableError(f"not enough address space for the index {self._path}")

    def prefetch(self, max_bytes: int) -> None:
        """Have the kernel read the index soon if it is no larger than this; raises nothing."""
        try:
            fd = os.open(self._path / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if os.fstat(fd).st_size <= max_bytes:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def lookup(self, digest: Digest) -> Location | None:
        """Return where a blob is, or None."""
        value = self._read(lambda txn: txn.get(digest, db=self._blobs))
        return None if value is None else Location(*_LOCATION.unpack(value)[:7])

    def known(self, digests: Iterable[Digest]) -> list[bool]:
        """Tell for each digest whether the index has it.

        `digests` are taken a batch at a time and never inside a transaction, so that what yields them
        may use the index.
        """

        def ask(txn: lmdb.Transaction, batch: list[Digest]) -> list[bool]:
            get = txn.get
            blobs = self._blobs
            return [get(digest, db=blobs) is not None for digest in batch]

        told: list[bool] = []
        rest = iter(digests)
        while batch := list(itertools.islice(rest, _ASKED_AT_ONCE)):
            told += self._read(functools.partial(ask, batch=batch))
        return told

    def pack_id(self, ordinal: int) -> PackId:
        """Return the name of a pack by its ordinal; raises IndexUnusableError for an unknown one."""
        pack = self._pack_ids.get(ordinal)
        if pack is None:
            value = self._read(lambda txn: txn.get(_ORDINAL.pack(ordinal), db=self._packs))
            if value is None:
                raise IndexUnusableError(f"the index names a pack {ordinal} that it does not have")
            pack = self._pack_ids[ordinal] = PackId(_PACK.unpack(value)[0])
        return pack

    def packs(self) -> list[PackRecord]:
        """Return every pack in the order of the ordinals."""

        def ask(txn: lmdb.Transaction) -> list[PackRecord]:
            records = []
            for key, value in txn.cursor(db=self._packs):
                pack, pack_bytes, blobs, _, verified_s = _PACK.unpack(value)
                ordinal = _ORDINAL.unpack(key)[0]
                records.append(PackRecord(ordinal, PackId(pack), pack_bytes, blobs, verified_s))
            return records

        return self._read(ask)

    def blob_count(self) -> int:
        """Return how many blobs the index has."""
        return self._read(lambda txn: int(txn.stat(db=self._blobs)["entries"]))

    def blobs(self, batch: int = 10_000) -> Iterator[tuple[Digest, Location]]:
        """Yield every blob in the order of the digests, a bounded batch in memory at a time."""
        after: bytes | None = None
        while True:
            rows = self._read(functools.partial(self._batch, after=after, limit=batch))
            for key, value in rows:
                yield Digest(key), Location(*_LOCATION.unpack(value)[:7])
            if len(rows) < batch:
                return
            after = rows[-1][0]

    def _batch(
        self, txn: lmdb.Transaction, after: bytes | None, limit: int
    ) -> list[tuple[bytes, bytes]]:
        cursor = txn.cursor(db=self._blobs)
        found = cursor.first() if after is None else cursor.set_range(after)
        if found and after is not None and cursor.key() == after:
            found = cursor.next()
        rows: list[tuple[bytes, bytes]] = []
        while found and len(rows) < limit:
            rows.append((bytes(cursor.key()), bytes(cursor.value())))
            found = cursor.next()
        return rows

    def add_packs(self, packs: Iterable[IndexedPack]) -> None:
        """Record packs in one durable transaction.

        A blob that another pack holds already keeps its place; a pack that is known is left alone.
        """
        added = list(packs)
        self._write(lambda txn: self._add(txn, added))

    def rebuild(self, packs: Callable[[], Iterable[IndexedPack]]) -> None:
        """Replace everything by what `packs` yields, in one transaction; counts as a loss.

        Others see the index as it was until it is whole. Ordinals go on from where they were, so that
        none that a reader remembers comes to mean another pack or blob.
        """

        def change(txn: lmdb.Transaction) -> None:
            next_pack, next_blob, losses = self._counters(txn)
            for db in (self._blobs, self._packs, self._meta):
                txn.drop(db, delete=False)
            txn.put(b"counters", _COUNTERS.pack(next_pack, next_blob, losses + 1), db=self._meta)
            txn.put(b"version", INDEX_VERSION, db=self._meta)
            self._add(txn, packs())

        self._write(change)

    def _add(self, txn: lmdb.Transaction, packs: Iterable[IndexedPack]) -> None:
        next_pack, next_blob, losses = self._counters(txn)
        blobs, pack_location = self._blobs, _LOCATION.pack
        for pack, pack_bytes, entries in packs:
            if not txn.put(b"pack" + pack, b"", overwrite=False, db=self._meta):
                continue
            value = _PACK.pack(pack, pack_bytes, len(entries), 0, 0)
            txn.put(_ORDINAL.pack(next_pack), value, db=self._packs)
            for entry in sorted(entries):
                digest, offset, stored_bytes, plain_bytes, kind, codec = entry
                location = pack_location(
                    next_pack, offset, stored_bytes, plain_bytes, next_blob, kind, codec, 0
                )
                if txn.put(digest, location, overwrite=False, db=blobs):
                    next_blob += 1
            next_pack += 1
        txn.put(b"counters", _COUNTERS.pack(next_pack, next_blob, losses), db=self._meta)

    def losses(self) -> int:
        """Return how often entries were lost so far; see `mark_complete`."""
        return self._read(lambda txn: self._counters(txn)[2])

    def mark_complete(self, snapshot: bytes, losses: int) -> None:
        """Remember that every blob a snapshot needs was in the index after so many losses.

        `losses` was asked for before the first blob was taken for stored: what another process loses
        between then and now must not be missed.
        """

        def change(txn: lmdb.Transaction) -> None:
            txn.put(b"complete" + snapshot, b"%d" % losses, db=self._meta)

        self._write(change)

    def is_complete(self, snapshot: bytes) -> bool:
        """Tell whether nothing can have been lost from a snapshot since `mark_complete`."""

        def ask(txn: lmdb.Transaction) -> bool:
            value = txn.get(b"complete" + snapshot, db=self._meta)
            return value is not None and value == b"%d" % self._counters(txn)[2]

        return self._read(ask)

    def mark_verified(self, ordinal: int, when_s: int) -> None:
        """Remember when all bytes of a pack were last verified (seconds since 1970)."""

        def change(txn: lmdb.Transaction) -> None:
            key = _ORDINAL.pack(ordinal)
            value = txn.get(key, db=self._packs)
            if value is not None:
                pack, pack_bytes, blobs, flags, _ = _PACK.unpack(value)
                txn.put(key, _PACK.pack(pack, pack_bytes, blobs, flags, when_s), db=self._packs)

        self._write(change)

    def is_current(self) -> bool:
        """Tell whether the index was begun by `rebuild` in a version that this module reads."""
        return self._read(lambda txn: txn.get(b"version", db=self._meta)) == INDEX_VERSION

    def _counters(self, txn: lmdb.Transaction) -> tuple[int, int, int]:
        value = txn.get(b"counters", db=self._meta)
        return _COUNTERS.unpack(value) if value is not None else (0, 0, 0)

    def _read(self, ask: Callable[[lmdb.Transaction], T]) -> T:
        return self._run(False, ask)

    def _write(self, change: Callable[[lmdb.Transaction], None]) -> None:
        self._run(True, change)

    def _run(self, write: bool, work: Callable[[lmdb.Transaction], T]) -> T:
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
        return IndexUnusableError(
            f"the index {self._path} cannot be used: {error}; free space on its disk or rebuild it "
            "(casfs repair index)"
        )
