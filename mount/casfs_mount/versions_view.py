"""`versions/PATH/`: the distinct versions of a path across all snapshots, as symbolic links.

Every path of any snapshot is a directory here. It lists the versions of the file or directory at that
path; the paths below it are reachable but not listed. The name of a version is the time of the first
snapshot that has it; the link leads into that snapshot. The link `latest` leads to the version in the latest
snapshot that has the path, unless a snapshot has an entry `latest` there. Trees are compared by digest, and
only the trees on the path are read.

Inode numbers are assigned in the order of lookups. A bounded number of them is kept; a request with an
older number fails with ESTALE, and the kernel then looks the name up again.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casfs.digest import SnapshotId, short_id
from casfs.errors import IntegrityError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, replace
from casfs.query.history import PathLookup, Version, path_history
from casfs.repository.snapshot_filter import latest_of
from casfs.trees.reader import TreeReader
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.inodes import LISTINGS_END, VERSIONS, StaleError

log = logging.getLogger(__name__)

_MAX_NUMBERS = 200_000
_MAX_LISTINGS = 64
"""Listings that are cached until the list of snapshots changes."""

_LATEST = b"latest"

PathParts = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NamedSnapshot:
    """A snapshot with the name of its folder in `snapshots/`."""

    snapshot_id: SnapshotId
    snapshot: Snapshot
    name: bytes


@dataclass(frozen=True, slots=True)
class _Folder:
    """The links of one path: their numbers, ascending, and the links in that order."""

    serials: list[int]
    links: list[tuple[int, Node]]
    by_name: dict[bytes, tuple[int, Node]]


class VersionsView:
    """The tree below `versions/`; safe to share between threads.

    `directory(name)` and `link(name, target, time_ns)` build the nodes.
    """

    def __init__(
        self,
        trees: TreeReader,
        guard: EventLoopGuard,
        directory: Callable[[bytes], Node],
        link: Callable[[bytes, bytes, int], Node],
    ) -> None:
        self._trees = trees
        self._guard = guard
        self._directory = directory
        self._link = link
        self._lock = threading.Lock()
        self._snapshots: tuple[NamedSnapshot, ...] = ()
        self._next = VERSIONS + 1
        # The meaning of each number: the path of a folder, or the path and the name of a link.
        self._targets: OrderedDict[int, tuple[PathParts, bytes | None]] = OrderedDict()
        self._numbers: dict[tuple[PathParts, bytes | None], int] = {}
        # For the current list of snapshots: the listings, and the paths known to exist in a snapshot.
        self._folders: OrderedDict[PathParts, _Folder] = OrderedDict()
        self._existing: set[PathParts] = set()
        self._warned: set[SnapshotId] = set()

    def set_snapshots(self, named: tuple[NamedSnapshot, ...]) -> None:
        """Show the versions in these snapshots, the earliest first."""
        with self._lock:
            self._snapshots = named
            self._folders.clear()
            self._existing.clear()

    def root(self) -> tuple[int, Node]:
        """Return the number and the node of `versions/` itself."""
        return VERSIONS, self._top()

    def _top(self) -> Node:
        """Return the node of `versions/`, which only the owner of the mount can enter.

        What is below it does not have the modes of the directories in the snapshots.
        """
        return replace(self._directory(b"versions"), mode=0o500)

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError and WouldBlock."""
        path, name = self._target_of(number)
        if name is None:
            return self._directory(path[-1]) if path else self._top()
        by_name = self._folder(path).by_name
        found = by_name.get(name)
        if found is not None:
            return found[1]
        target = by_name.get(name.replace(b":", b"-"))
        if target is None:
            raise StaleError(number)
        return self._link(name, target[1].name, target[1].mtime_ns)

    def parent(self, number: int) -> int | None:
        """Return the number of a node's directory, None for `versions/` itself."""
        path, name = self._target_of(number)
        if name is None and not path:
            return None
        with self._lock:
            return self._number(path if name is not None else path[:-1], None)

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return the link of a version, or the directory of a path that a snapshot has, or None."""
        path, link = self._target_of(number)
        if link is not None:
            return None
        by_name = self._folder(path).by_name
        found = by_name.get(name)
        if found is not None:
            return found
        plain = name.replace(b":", b"-")  # as older versions named times
        if plain in by_name:
            target = by_name[plain][1]
            with self._lock:
                return self._number(path, name), self._link(name, plain, target.mtime_ns)
        below = (*path, name)
        with self._lock:
            known = below in self._existing
            named = self._snapshots
        if not known:
            self._guard.require_may_block()
            if not self._exists(below, named):
                return None
        with self._lock:
            if named is self._snapshots and len(self._existing) < _MAX_NUMBERS:
                self._existing.add(below)
            return self._number(below, None), self._directory(name)

    def entries(self, number: int, position: int) -> Iterator[tuple[int, Node, int]]:
        """Yield number, node and the place after it of a path's versions from a place on."""
        path, link = self._target_of(number)
        if link is not None:
            return
        folder = self._folder(path)
        for i in range(bisect_right(folder.serials, position), len(folder.serials)):
            yield *folder.links[i], folder.serials[i]

    def _target_of(self, number: int) -> tuple[PathParts, bytes | None]:
        if number == VERSIONS:
            return (), None
        with self._lock:
            target = self._targets.get(number)
            if target is None:
                raise StaleError(number)
            self._targets.move_to_end(number)
            return target

    def _number(self, path: PathParts, name: bytes | None) -> int:
        target = path, name
        if target == ((), None):
            return VERSIONS
        number = self._numbers.get(target)
        if number is None:
            number = self._next
            self._next = number + 1 if number + 1 < LISTINGS_END else VERSIONS + 1
            self._targets[number] = target
            self._numbers[target] = number
            while len(self._targets) > _MAX_NUMBERS:
                _, oldest = self._targets.popitem(last=False)
                del self._numbers[oldest]
        else:
            self._targets.move_to_end(number)
        return number

    def _exists(self, path: PathParts, named: tuple[NamedSnapshot, ...]) -> bool:
        finder = PathLookup(self._trees, b"/".join(path))
        for one in reversed(named):
            try:
                if finder.find(one.snapshot.root) is not None:
                    return True
            except IntegrityError as error:
                self._warn(one.snapshot_id, error)
        return False

    def _folder(self, path: PathParts) -> _Folder:
        with self._lock:
            folder = self._folders.get(path)
            named = self._snapshots
        if folder is not None:
            return folder
        self._guard.require_may_block()
        snapshots = [(one.snapshot_id, one.snapshot) for one in named]
        found = path_history(self._trees, snapshots, b"/".join(path), self._warn)
        names = {one.snapshot_id: one.name for one in named}
        latest = None if self._exists((*path, _LATEST), named) else _latest_version(found)
        with self._lock:
            folder = self._build_folder(path, found, names, latest)
            if named is self._snapshots:
                self._folders[path] = folder
                if len(self._folders) > _MAX_LISTINGS:
                    self._folders.popitem(last=False)
        return folder

    def _build_folder(
        self,
        path: PathParts,
        versions: list[Version],
        names: dict[SnapshotId, bytes],
        latest: Version | None,
    ) -> _Folder:
        by_name: dict[bytes, tuple[int, Node]] = {}
        for version in versions:
            snapshot_id, snapshot = version.snapshots[0]
            name = names[snapshot_id]
            target = b"../" * (len(path) + 1) + b"/".join((b"snapshots", name, *path))
            node = self._link(name, target, snapshot.time_ns)
            by_name[name] = self._number(path, name), node
        if latest is not None:
            first_id, first = latest.snapshots[0]
            link = self._link(_LATEST, names[first_id], first.time_ns)
            by_name[_LATEST] = self._number(path, _LATEST), link
        links = sorted(by_name.values(), key=lambda link: link[0])
        return _Folder([number for number, _ in links], links, by_name)

    def _warn(self, snapshot_id: SnapshotId, error: IntegrityError) -> None:
        with self._lock:
            if snapshot_id in self._warned:
                return
            self._warned.add(snapshot_id)
        log.error("snapshot %s: %s", short_id(snapshot_id), error)


def _latest_version(versions: list[Version]) -> Version | None:
    """Return the version in the latest snapshot that has the path, or None without versions."""
    holders = [(version, snapshot) for version in versions for _, snapshot in version.snapshots]
    holders.sort(key=lambda holder: holder[1].time_ns)
    return latest_of(holders, time.time_ns())[0] if holders else None
