"""The folders of a whole repository: `snapshots/` with the roots, `ids/`, `hosts/` and `tags/` with links.

Every path that ever was in a folder keeps its serial number, which is the inode number of a link or folder
and its position in listings. So both stay valid when the list of snapshots changes. Safe to share between
threads: `rebuild` replaces all folders at once.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from casfs.digest import SnapshotId
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, NodeType, replace
from casfs.repository.snapshot_filter import FUTURE_TOLERANCE_NS, is_from_future
from casfs_mount.inodes import ROOT, StaleError
from casfs_mount.snapshot_names import digits_that_differ, safe_name

_LATEST = b"latest"
_SNAPSHOTS = (b"snapshots",)
_IDS = (b"ids",)
_HOSTS = (b"hosts",)
_TAGS = (b"tags",)

PathParts = tuple[bytes, ...]
Entry = tuple[int, Node]


class LinkedSnapshot(Protocol):
    """A snapshot with the name of its folder in `snapshots/`; `first` is the inode number of its root."""

    @property
    def snapshot_id(self) -> SnapshotId: ...

    @property
    def snapshot(self) -> Snapshot: ...

    @property
    def name(self) -> bytes: ...

    @property
    def first(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder: the serial numbers of its entries, ascending, and the entries."""

    node: Node
    serials: list[int]
    entries: list[Entry]
    by_name: dict[bytes, Entry]


class LinkFolders:
    """All folders above the snapshots. There are none before the first `rebuild`."""

    def __init__(self) -> None:
        self._owner = os.getuid(), os.getgid()
        self._born_ns = time.time_ns()
        self._lock = threading.Lock()
        self._serials: dict[PathParts, int] = {(): ROOT}
        self._paths: dict[int, PathParts] = {ROOT: ()}
        self._folders: dict[int, _Folder] = {}
        self._full_ids: dict[bytes, Entry] = {}
        self.valid_until_ns = 0
        """When the next snapshot from the future is one of the past, and may be the latest."""

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError."""
        folder = self._folders.get(number)
        if folder is not None:
            return folder.node
        path = self._paths.get(number)
        if path:
            found = self._entry(self._serials[path[:-1]], path[-1])
            if found is not None:
                return found[1]
        raise StaleError(number)

    def parent(self, number: int) -> int:
        """Return the number of an entry's folder; for the root, its own number."""
        return self._serials[self._paths.get(number, ())[:-1]]

    @property
    def snapshots(self) -> int:
        """The number of `snapshots/`."""
        return self._serials[_SNAPSHOTS]

    def lookup(self, number: int, name: bytes) -> Entry | None:
        """Return an entry of a folder, or None; raise StaleError.

        Some are found and not listed: full ids in `ids/`, and the times with colons of older versions.
        """
        if number not in self._folders:
            raise StaleError(number)
        return self._entry(number, name)

    def _entry(self, number: int, name: bytes) -> Entry | None:
        folder = self._folders.get(number)
        if folder is None:
            return None
        found = folder.by_name.get(name)
        if found is not None:
            return found
        path = self._paths[number]
        if path == _IDS:
            return self._full_ids.get(name)
        plain = name.replace(b":", b"%3A" if path in (_HOSTS, _TAGS) else b"-")
        if plain == name or path == () or plain not in folder.by_name:
            return None
        with self._lock:
            serial = self._serial((*path, name))
        return serial, self.link(name, plain, folder.by_name[plain][1].mtime_ns)

    def entries(self, number: int, position: int) -> Iterator[tuple[int, Node, int]]:
        """Yield the entries of a folder from a position on: number, node and position after it."""
        folder = self._folders.get(number)
        if folder is None:
            raise StaleError(number)
        following = range(bisect_right(folder.serials, position), len(folder.serials))
        return ((*folder.entries[i], folder.serials[i]) for i in following)

    def is_empty(self) -> bool:
        """Return whether `rebuild` was never called."""
        return not self._folders

    def rebuild(self, present: Sequence[LinkedSnapshot], versions: Entry) -> None:
        """Show these snapshots, the earliest first, and the folder `versions`."""
        with self._lock:
            self._rebuild(present, versions)

    def _rebuild(self, present: Sequence[LinkedSnapshot], versions: Entry) -> None:
        digits = digits_that_differ([shown.snapshot_id.hex() for shown in present])
        folders: dict[PathParts, dict[bytes, Entry]] = {(): {}}
        folders |= {path: {} for path in (_HOSTS, _IDS, _SNAPSHOTS, _TAGS)}
        times: dict[PathParts, int] = dict.fromkeys(folders, self._born_ns)
        full_ids: dict[bytes, Entry] = {}
        now_ns = time.time_ns()
        future_ns = [
            shown.snapshot.time_ns
            for shown in present
            if is_from_future(shown.snapshot.time_ns, now_ns)
        ]
        for shown in present:
            time_ns = shown.snapshot.time_ns
            root = replace(shown.snapshot.root, name=shown.name)
            folders[_SNAPSHOTS][shown.name] = shown.first, root
            self._serial((*_SNAPSHOTS, shown.name))
            for path, name, target in _links_to(shown, digits):
                entries = folders.setdefault(path, {})
                if name == _LATEST in entries and is_from_future(time_ns, now_ns):
                    continue
                entries[name] = self._serial((*path, name)), self.link(name, target, time_ns)
                times[path] = time_ns
            identity = shown.snapshot_id.hex().encode("ascii")
            link = self.link(identity, b"../snapshots/" + shown.name, time_ns)
            full_ids[identity] = self._serial((*_IDS, identity)), link
        folders[()][b"versions"] = versions
        nodes: dict[PathParts, Node] = {}
        for path in folders:
            name = path[-1] if path else b""
            node = nodes[path] = self._directory(name, times[path])
            if path:
                folders[path[:-1]][name] = self._serial(path), node
        self._folders = {
            self._serial(path): self._folder(path, nodes[path], entries)
            for path, entries in folders.items()
        }
        self._full_ids = full_ids
        self.valid_until_ns = min(future_ns, default=1 << 63) - FUTURE_TOLERANCE_NS

    def _folder(self, path: PathParts, node: Node, entries: dict[bytes, Entry]) -> _Folder:
        order = sorted((self._serial((*path, name)), entry) for name, entry in entries.items())
        serials = [serial for serial, _ in order]
        return _Folder(node, serials, [entry for _, entry in order], entries)

    def _serial(self, path: PathParts) -> int:
        serial = self._serials.get(path)
        if serial is None:
            serial = self._serials[path] = len(self._serials) + ROOT
            self._paths[serial] = path
        return serial

    def directory(self, name: bytes) -> Node:
        """Return the node of a directory that is as old as the mount."""
        return self._directory(name, self._born_ns)

    def _directory(self, name: bytes, time_ns: int) -> Node:
        uid, gid = self._owner
        return Node(name, NodeType.DIRECTORY, 0o555, uid, gid, time_ns, time_ns, 0, 2)

    def link(self, name: bytes, target: bytes, time_ns: int) -> Node:
        """Return the node of a symbolic link."""
        uid, gid = self._owner
        size = len(target)
        return Node(
            name, NodeType.SYMLINK, 0o777, uid, gid, time_ns, time_ns, 0, 1, size, content=target
        )


def _links_to(shown: LinkedSnapshot, digits: int) -> Iterator[tuple[PathParts, bytes, bytes]]:
    """Yield the folder, name and target of each link to a snapshot. `digits` are shown of its id."""
    identity = shown.snapshot_id.hex().encode("ascii")
    target = b"../snapshots/" + shown.name
    yield _SNAPSHOTS, _LATEST, shown.name
    yield _IDS, identity[:digits], target
    yield _IDS, _LATEST, target
    groups = [(_HOSTS, shown.snapshot.host), *((_TAGS, tag) for tag in shown.snapshot.tags)]
    for above, text in groups:
        folder = (*above, safe_name(text))
        yield folder, shown.name, b"../" + target
        yield folder, _LATEST, shown.name
