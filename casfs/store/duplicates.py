"""Where else a blob is: the copies in packs that the index does not name, found when one is asked for.

They are rare: two backups that stored a blob at the same time, one that was stored anew, an index that is
wrong or damaged. So all directories are read once for all of them, when the first read fails, and no
more than once in a while after that. Safe to share between threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from casfs.digest import Digest, PackId
from casfs.errors import CasfsError
from casfs.format.pack import PackEntry
from casfs.index.index import Index

_MOST_COPIES = 1_000_000
_FRESH_S = 60.0
"""How long it is believed that there is no further copy of a blob."""

Copy = tuple[PackId, PackEntry]


class Duplicates:
    """The copies that an index does not name; `stored` lists packs and sizes, `read` a directory."""

    def __init__(
        self,
        index: Index,
        stored: Callable[[], Iterable[tuple[PackId, int]]],
        read: Callable[[PackId, int], list[PackEntry]],
    ) -> None:
        self._index = index
        self._stored = stored
        self._read = read
        self._lock = threading.Lock()
        self._found: dict[Digest, list[Copy]] = {}
        self._looked_s: float | None = None

    def find(self, digest: Digest) -> list[Copy]:
        """Return the copies of a blob in other places than the index names."""
        with self._lock:
            found = self._found.get(digest)
            now = time.monotonic()
            if found is None and (self._looked_s is None or now - self._looked_s > _FRESH_S):
                self._look()
                self._looked_s = time.monotonic()
                found = self._found.get(digest)
        return found or []

    def _look(self) -> None:
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
