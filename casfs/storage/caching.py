"""A storage that keeps parts of immutable objects of another one: in memory, and in a folder of this machine.

Packs and snapshots never change under their names, so what was read of them once need not be requested again.
They are kept as the storage has them, encrypted in an encrypted repository. Listings, sizes, times and all
other objects come from the inner storage.

- Data packs (`packs/`): the cells that a read covers. Longer reads are not kept: what streams a whole
  repository would displace everything else.
- Metadata packs (`meta/`): around what is read, more at each request, so that few requests fetch the pack.
- Snapshots (`snapshots/`): whole, and only if their bytes have the digest that names them.

Threads: every method may be called from several threads. A cell that one thread fetches is not requested by
another; the other waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from blake3 import blake3

from casfs.errors import CasfsError
from casfs.storage.base import Data, Storage
from casfs.storage.cell_folder import CELL_BYTES, CellFolder
from casfs.storage.interruption import interrupted_error
from casfs.storage.wrapper import StorageWrapper

if TYPE_CHECKING:
    from casfs.storage.buffered_writer import BufferedWriter

log = logging.getLogger(__name__)

DATA, METADATA, SNAPSHOTS = "packs/", "meta/", "snapshots/"

MAX_KEPT_READ_BYTES = 4 * 1024 * 1024
"""Longer reads of data packs are not kept."""

_FIRST_AHEAD_CELLS = 2
_MOST_AHEAD_CELLS = 32
"""Cells around a read of a metadata pack: at most 8 MiB, which the storage reads in one request."""

_MEMORY_CELLS = 64
_GAP_CELLS = 2
"""Cells between two wanted ones that are fetched with them: cheaper than a second request."""

_REQUESTS = 8
_MOST_WAITING_AHEAD = 64
"""Ranges that wait to be fetched ahead; more would come too late to be of use."""

_Cell = tuple[str, int]


class CachingStorage(StorageWrapper):
    """A storage around another one; `folder` None keeps cells in memory only."""

    def __init__(self, inner: Storage, folder: CellFolder | None) -> None:
        super().__init__(inner)
        self._folder = folder
        self._lock = threading.Lock()
        self._memory: OrderedDict[_Cell, bytes] = OrderedDict()
        self._fetching: dict[_Cell, Future[bytes]] = {}
        self._ahead: dict[str, int] = {}
        self._waiting_ahead = 0
        self._pool: ThreadPoolExecutor | None = None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a range of an object's bytes."""
        if size is None or not size:
            return self.inner.read(name, offset, size)
        if name.startswith(SNAPSHOTS) and offset == 0:
            return self._read_snapshot(name, size)
        if not self._keeps(name, size):
            return self.inner.read(name, offset, size)
        first, last = offset // CELL_BYTES, (offset + size - 1) // CELL_BYTES
        data = b"".join(self._cells(name, range(first, last + 1)))
        begin = offset - first * CELL_BYTES
        return data[begin : begin + size]

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a range if all its cells are in memory, else None."""
        if not size or not self._keeps(name, size):
            return None
        first, last = offset // CELL_BYTES, (offset + size - 1) // CELL_BYTES
        with self._lock:
            cells = [self._memory.get((name, number)) for number in range(first, last + 1)]
        if None in cells:
            return None
        begin = offset - first * CELL_BYTES
        found = b"".join(cell for cell in cells if cell is not None)[begin : begin + size]
        return found if len(found) == size else None

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Fetch the missing cells of a range in the background."""
        if not size or not self._keeps(name, size):
            return
        numbers = range(offset // CELL_BYTES, (offset + size - 1) // CELL_BYTES + 1)
        with self._lock:
            if self._waiting_ahead >= _MOST_WAITING_AHEAD:
                return
            self._waiting_ahead += 1
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS, "casfs-ahead")
            self._pool.submit(self._prefetch, name, numbers)

    def _prefetch(self, name: str, numbers: range) -> None:
        try:
            for _ in self._cells(name, numbers):
                pass
        except CasfsError as error:
            log.debug("nothing is read ahead: %s", error)  # a reader gets the error
        finally:
            with self._lock:
                self._waiting_ahead -= 1

    def create(self, name: str, data: Data) -> None:
        """Store an object unless the name exists; keep what the next commands are likely to read."""
        self.inner.create(name, data)
        if name.startswith((METADATA, SNAPSHOTS)):
            self._keep_whole(name, data)

    def write(self, name: str, data: Data) -> None:
        """Store an object and replace an object of the same name."""
        self.forget(name)
        self.inner.write(name, data)

    def delete(self, name: str) -> None:
        """Remove an object, and what is kept of it."""
        self.forget(name)
        self.inner.delete(name)

    def open_writer(self, in_memory: bool) -> BufferedWriter:
        """Begin an object, which is sent when it is committed."""
        from casfs.storage.buffered_writer import BufferedWriter

        return BufferedWriter(self.create, in_memory)

    def forget(self, name: str) -> bool:
        """Drop what is kept of an object, such as wrong bytes; return whether there was any."""
        with self._lock:
            kept = [cell for cell in self._memory if cell[0] == name]
            for cell in kept:
                del self._memory[cell]
        was_on_disk = self._folder is not None and self._folder.forget(name)
        return bool(kept) or was_on_disk

    def close(self) -> None:
        """Stop fetching ahead, and close the folder and the inner storage."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        self.inner.close()
        if self._folder is not None:
            self._folder.close()

    def _keeps(self, name: str, size: int) -> bool:
        return name.startswith(METADATA) or (name.startswith(DATA) and size <= MAX_KEPT_READ_BYTES)

    def _read_snapshot(self, name: str, size: int) -> bytes:
        parts: list[bytes] = []
        while (cell := self._kept(name, len(parts))) is not None:
            parts.append(cell)
            if len(cell) < CELL_BYTES:
                kept = b"".join(parts)
                if _has_named_digest(name, kept):
                    return kept[:size]
                break
        data = self.inner.read(name, 0, size)
        if not _has_named_digest(name, data):
            # A false answer may have been a single one.
            data = self.inner.read(name, 0, size)
        if len(data) < size and _has_named_digest(name, data):
            self._keep_whole(name, data)
        return data

    def _keep_whole(self, name: str, data: Data) -> None:
        for number in range(len(data) // CELL_BYTES + 1):
            begin = number * CELL_BYTES
            if self._folder is not None:
                self._folder.add(name, number, data[begin : begin + CELL_BYTES])

    def _cells(self, name: str, numbers: range) -> Iterable[bytes]:
        """Yield cells in order, up to the end of the object."""
        missing: list[int] = []
        found: dict[int, bytes] = {}
        for number in numbers:
            cell = self._kept(name, number)
            if cell is None:
                missing.append(number)
                continue
            found[number] = cell
            if len(cell) < CELL_BYTES:
                break
        waiting = self._fetch(name, missing) if missing else {}
        for number in numbers:
            cell = found[number] if number in found else waiting[number].result()
            yield cell
            if len(cell) < CELL_BYTES:
                return

    def _kept(self, name: str, number: int) -> bytes | None:
        with self._lock:
            cell = self._memory.get((name, number))
            if cell is not None:
                self._memory.move_to_end((name, number))
                return cell
            if (name, number) in self._fetching:
                return None
        cell = self._folder.get(name, number) if self._folder is not None else None
        if cell is not None:
            self._remember(name, number, cell)
        return cell

    def _remember(self, name: str, number: int, cell: bytes) -> None:
        with self._lock:
            self._memory[name, number] = cell
            self._memory.move_to_end((name, number))
            while len(self._memory) > _MEMORY_CELLS:
                self._memory.popitem(last=False)

    def _fetch(self, name: str, missing: list[int]) -> dict[int, Future[bytes]]:
        """Return the futures of cells; those that no other thread fetches are fetched here."""
        own: dict[int, Future[bytes]] = {}
        futures: dict[int, Future[bytes]] = {}
        wanted = self._with_ahead(name, missing)
        with self._lock:
            for number in wanted:
                future = self._fetching.get((name, number))
                if future is None:
                    if number not in missing and (name, number) in self._memory:
                        continue
                    future = own[number] = self._fetching[name, number] = Future()
                futures[number] = future
        for run in _runs(sorted(own)):
            self._fetch_run(name, run, own)
        return futures

    def _fetch_run(self, name: str, run: range, own: dict[int, Future[bytes]]) -> None:
        """Fetch cells that lie together with one read, and set their futures."""
        try:
            data = self.inner.read(name, run.start * CELL_BYTES, len(run) * CELL_BYTES)
        except BaseException as error:
            with self._lock:
                for number in run:
                    if number in own:
                        self._fetching.pop((name, number), None)
            is_own = isinstance(error, CasfsError)
            passed_on = error if is_own else interrupted_error(f"{self.url}/{name}")
            for number in run:
                if number in own:
                    own[number].set_exception(passed_on)
            if not is_own:
                raise
            return
        for number in run:
            begin = (number - run.start) * CELL_BYTES
            cell = data[begin : begin + CELL_BYTES]
            if begin <= len(data):
                if self._folder is not None:
                    self._folder.add(name, number, cell)
                self._remember(name, number, cell)
            if number in own:
                with self._lock:
                    self._fetching.pop((name, number), None)
                own[number].set_result(cell)

    def _with_ahead(self, name: str, missing: list[int]) -> list[int]:
        """Return the cells to fetch for some that are missing: of metadata also those around them."""
        if not name.startswith(METADATA):
            return missing
        with self._lock:
            cells = self._ahead.get(name, _FIRST_AHEAD_CELLS)
            self._ahead[name] = min(2 * cells, _MOST_AHEAD_CELLS)
        begin = missing[0] // cells * cells
        end = max(begin + cells, missing[-1] + 1)
        on_disk = self._folder.holds if self._folder is not None else lambda *_: False
        return [
            number for number in range(begin, end) if number in missing or not on_disk(name, number)
        ]


def _runs(numbers: list[int]) -> Iterable[range]:
    """Yield the ranges that cover some numbers, with small gaps."""
    begin = end = -1
    for number in numbers:
        if begin >= 0 and number - end > _GAP_CELLS:
            yield range(begin, end)
            begin = -1
        if begin < 0:
            begin = number
        end = number + 1
    if begin >= 0:
        yield range(begin, end)


def _has_named_digest(name: str, data: bytes) -> bool:
    return blake3(data).hexdigest() == name.rpartition("/")[2]
