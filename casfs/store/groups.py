"""The groups of blobs that were read last, so that a reader of a group's other blobs need not read it again.

No digest verifies a cached group as a whole; `Group.blob` verifies each blob that it returns. A group is
cached after one of its blobs was verified, and dropped when one is damaged. The cache is bounded in bytes.
Threads may share it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from casfs.digest import PackId
from casfs.format.group import MAX_GROUP_BYTES, Group

_CACHED_BYTES = 8 * MAX_GROUP_BYTES

_OVERHEAD_BYTES = 1024
_BOUND_BYTES = 40
"""What a cached group takes beside its plaintext, and for each of its blobs. Many small groups, which no
writer stores, would take much more memory than their plaintexts."""


class GroupCache:
    """Groups by pack and offset, the least recently used ones dropped first."""

    def __init__(self, max_bytes: int = _CACHED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[PackId, int], Group] = OrderedDict()
        self._bytes = 0

    def get(self, pack: PackId, offset: int) -> Group | None:
        """Return a group, or None if it is not cached."""
        with self._lock:
            group = self._groups.get((pack, offset))
            if group is not None:
                self._groups.move_to_end((pack, offset))
            return group

    def put(self, pack: PackId, offset: int, group: Group) -> None:
        """Cache a group."""
        with self._lock:
            self._remove(pack, offset)
            self._groups[pack, offset] = group
            self._bytes += _size_bytes(group)
            while self._bytes > self._max_bytes:
                _, oldest = self._groups.popitem(last=False)
                self._bytes -= _size_bytes(oldest)

    def drop(self, pack: PackId, offset: int) -> None:
        """Forget a group."""
        with self._lock:
            self._remove(pack, offset)

    def _remove(self, pack: PackId, offset: int) -> None:
        group = self._groups.pop((pack, offset), None)
        if group is not None:
            self._bytes -= _size_bytes(group)


def _size_bytes(group: Group) -> int:
    return len(group.plain) + _OVERHEAD_BYTES + group.blob_count * _BOUND_BYTES
