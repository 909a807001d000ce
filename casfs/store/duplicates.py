"""Copies of blobs in packs that the index does not name.

Such copies are rare: two backups stored a blob at the same time, a blob was stored again, or the index is
wrong or damaged. So the first failed read scans all directories for all copies, and later failures scan again
only after a pause. Threads may share the object.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.format.pack import PackEntry, PackRef
from casfs.index.index import Index

_MOST_COPIES = 1_000_000
_FRESH_S = 60.0
"""How long a scan that found no further copy of a blob remains valid."""

Copy = tuple[PackRef, PackEntry]


class Duplicates:
    """Copies of blobs that an index does not name.

    `stored` yields packs and sizes, `read` returns a directory.
    """

    def __init__(
        self,
        index: Index,
        stored: Callable[[], Iterable[tuple[PackRef, int]]],
        read: Callable[[PackRef, int], list[PackEntry]],
    ) -> None:
        self._index = index
        self._stored = stored
        self._read = read
        self._lock = threading.Lock()
        self._found: dict[Digest, list[Copy]] = {}
        self._scanned_s: float | None = None

    def find(self, digest: Digest) -> list[Copy]:
        """Return the copies of a blob that the index does not name."""
        with self._lock:
            found = self._found.get(digest)
            now = time.monotonic()
            if found is None and (self._scanned_s is None or now - self._scanned_s > _FRESH_S):
                self._scan_directories()
                self._scanned_s = time.monotonic()
                found = self._found.get(digest)
        return found or []

    def _scan_directories(self) -> None:
        self._found = {}
        names = {record.ordinal: record.pack for record in self._index.packs()}
        left = _MOST_COPIES
        for pack, pack_bytes in self._stored():
            try:
                entries = self._read(pack, pack_bytes)
            except CasfsError:
                continue
            for entry in entries:
                location = self._index.lookup(entry.digest)
                if (
                    location is not None
                    and names.get(location.pack) == pack
                    and location.matches(entry)
                ):
                    continue
                if left:
                    left -= 1
                    self._found.setdefault(entry.digest, []).append((pack, entry))
