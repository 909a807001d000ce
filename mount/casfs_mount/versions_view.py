"""`versions/PATH/`: the distinct versions of a path across all snapshots, as links to where they are.

Every path of any snapshot is a directory here that lists the versions of what was at that path; the
paths below it are reachable and not listed. A version is named by the time of the first snapshot that
has it, and leads there. Trees are compared by digest and none is read that is not on the way.

Numbers are given in the order of asking. A bounded number of them is remembered, and a program that
comes back with an older one is told that it is stale, upon which the kernel asks by name again.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casfs.digest import SnapshotId, short_id
from casfs.errors import IntegrityError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node
from casfs.query.history import PathLookup, Version, path_history
from casfs.trees.reader import TreeReader
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.inodes import LISTINGS_END, VERSIONS, StaleError

log = logging.getLogger(__name__)

_MOST_NUMBERS = 200_000
_MOST_LISTINGS = 64
"""Listings that are kept until the list of snapshots changes."""

Path = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NamedSnapshot:
    """A snapshot with its name in `snapshots/`."""

    snapshot_id: SnapshotId
    snapshot: Snapshot
    name: bytes


@dataclass(frozen=True, slots=True)
class _Folder:
    """The links of one path: serial numbers in ascending order, and the links in that order."""

    serials: list[int]
    links: list[tuple[int, Node]]
    by_name: dict[bytes, tuple[int, Node]]


class VersionsView:
    """The tree below `versions/`; safe to share between threads.

    `directory` and `link` make the nodes of what has a name, or of a link with a target and a time.
    """

    def __init__(
        self,
        trees: TreeReader,
        waiting: EventLoopGuard,
        directory: Callable[[bytes], Node],
        link: Callable[[bytes, bytes, int], Node],
    ) -> None:
        self._trees = trees
        self._waiting = waiting
        self._directory = directory
        self._link = link
        self._lock = threading.Lock()
        self._placed: tuple[NamedSnapshot, ...] = ()
        self._next = VERSIONS + 1
        # What a number stands for: a folder's path, or a link's path and its name.
        self._things: OrderedDict[int, tuple[Path, bytes | None]] = OrderedDict()
        self._numbers: dict[tuple[Path, bytes | None], int] = {}
        # Of the present list of snapshots: listings, and paths that are known to be in one.
        self._folders: OrderedDict[Path, _Folder] = OrderedDict()
        self._existing: set[Path] = set()
        self._told: set[SnapshotId] = set()

    def set_snapshots(self, placed: tuple[NamedSnapshot, ...]) -> None:
        """Show the versions in these snapshots, the earliest first."""
        with self._lock:
            self._placed = placed
            self._folders.clear()
            self._existing.clear()

    def root(self) -> tuple[int, Node]:
        """Return number and node of `versions/` itself."""
        return VERSIONS, self._directory(b"versions")

    def node(self, number: int) -> Node:
        """Return the node with a number; raises StaleError and WouldBlock."""
        path, name = self._target_of(number)
        if name is None:
            return self._directory(path[-1] if path else b"versions")
        found = self._folder(path).by_name.get(name)
        if found is None:
            raise StaleError(number)
        return found[1]

    def parent(self, number: int) -> int | None:
        """Return the number of the directory that holds a node; None for `versions/` itself."""
        path, name = self._target_of(number)
        if name is None and not path:
            return None
        with self._lock:
            return self._number(path if name is not None else path[:-1], None)

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a version's link, else the directory of a path that is in any snapshot, else None."""
        path, link = self._target_of(number)
        if link is not None:
            return None
        found = self._folder(path).by_name.get(name)
        if found is not None:
            return found
        below = (*path, name)
        with self._lock:
            known = below in self._existing
            placed = self._placed
        if not known:
            self._waiting.require_may_block()
            if not self._exists(below, placed):
                return None
        with self._lock:
            if placed is self._placed and len(self._existing) < _MOST_NUMBERS:
                self._existing.add(below)
            return self._number(below, None), self._directory(name)

    def entries(self, number: int, place: int) -> Iterator[tuple[int, Node, int]]:
        """Yield number, node and the place after it of a path's versions from a place on."""
        path, link = self._target_of(number)
        if link is not None:
            return
        folder = self._folder(path)
        for i in range(bisect_right(folder.serials, place), len(folder.serials)):
            yield *folder.links[i], folder.serials[i]

    def _target_of(self, number: int) -> tuple[Path, bytes | None]:
        if number == VERSIONS:
            return (), None
        with self._lock:
            thing = self._things.get(number)
            if thing is None:
                raise StaleError(number)
            self._things.move_to_end(number)
            return thing

    def _number(self, path: Path, name: bytes | None) -> int:
        thing = path, name
        if thing == ((), None):
            return VERSIONS
        number = self._numbers.get(thing)
        if number is None:
            number = self._next
            self._next = number + 1 if number + 1 < LISTINGS_END else VERSIONS + 1
            self._things[number] = thing
            self._numbers[thing] = number
            while len(self._things) > _MOST_NUMBERS:
                _, oldest = self._things.popitem(last=False)
                del self._numbers[oldest]
        else:
            self._things.move_to_end(number)
        return number

    def _exists(self, path: Path, placed: tuple[NamedSnapshot, ...]) -> bool:
        finder = PathLookup(self._trees, b"/".join(path))
        for one in reversed(placed):
            try:
                if finder.find(one.snapshot.root) is not None:
                    return True
            except IntegrityError as error:
                self._warn(one.snapshot_id, error)
        return False

    def _folder(self, path: Path) -> _Folder:
        with self._lock:
            folder = self._folders.get(path)
            placed = self._placed
        if folder is not None:
            return folder
        self._waiting.require_may_block()
        snapshots = [(one.snapshot_id, one.snapshot) for one in placed]
        found = path_history(self._trees, snapshots, b"/".join(path), self._warn)
        names = {one.snapshot_id: one.name for one in placed}
        with self._lock:
            folder = self._build_folder(path, found, names)
            if placed is self._placed:
                self._folders[path] = folder
                if len(self._folders) > _MOST_LISTINGS:
                    self._folders.popitem(last=False)
        return folder

    def _build_folder(
        self, path: Path, versions: list[Version], names: dict[SnapshotId, bytes]
    ) -> _Folder:
        by_name: dict[bytes, tuple[int, Node]] = {}
        for version in versions:
            snapshot_id, snapshot = version.snapshots[0]
            name = names[snapshot_id]
            target = b"../" * (len(path) + 1) + b"/".join((b"snapshots", name, *path))
            node = self._link(name, target, snapshot.time_ns)
            by_name[name] = self._number(path, name), node
        links = sorted(by_name.values(), key=lambda link: link[0])
        return _Folder([number for number, _ in links], links, by_name)

    def _warn(self, snapshot_id: SnapshotId, error: IntegrityError) -> None:
        with self._lock:
            if snapshot_id in self._told:
                return
            self._told.add(snapshot_id)
        log.error("snapshot %s: %s", short_id(snapshot_id), error)
