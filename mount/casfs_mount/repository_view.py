"""The whole repository as one view: every snapshot in `snapshots/`, found by id, host and tag too.

`versions/` has the versions of every path across them (see `casfs_mount.versions_view`).

`snapshots/` holds the snapshots' roots under their local times. `ids/`, `hosts/` and `tags/` lead there
by symbolic links, so that every file has one path, one number and one place in the kernel's cache.
`latest` stands wherever snapshots do. The list is read again when it is asked for and older than a
second; a snapshot's numbers depend on its id alone, its name stays as long as it is there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from casfs.digest import SHOWN_HEX_DIGITS, Digest, SnapshotId, digest_of, short_id
from casfs.errors import (
    CasfsError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    StorageError,
)
from casfs.format.config import CONFIG_NAME
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, NodeType, replace, subtree_count
from casfs_mount.file_reader import Readable
from casfs_mount.inodes import LISTINGS_END, ROOT, VERSIONS, InodeRanges, StaleError
from casfs_mount.versions_view import NamedSnapshot, VersionsView
from casfs_mount.view import REPORT_NUMBERS, MountContext, SnapshotView

_MAX_NAME_BYTES = 255


def time_name(time_ns: int) -> bytes:
    """Return the name of a snapshot of that time: local, to the second."""
    try:
        moment = datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return b"@%d" % (time_ns // 1_000_000_000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S").encode("ascii")


def safe_name(text: str) -> bytes:
    """Return a file name for a host or a tag, another one for each: odd characters as %XX.

    What would be too long is cut and told apart by a digest.
    """
    raw = text.encode("utf-8", "surrogateescape")
    name = b"".join(
        b"%%%02X" % byte if byte < 0x20 or byte in b"/%\x7f" else bytes([byte]) for byte in raw
    )
    if name in (b"", b".", b".."):
        name = name.replace(b".", b"%2E") or b"%"
    if len(name) > _MAX_NAME_BYTES:
        mark = b"%" + digest_of(raw).hex()[:16].encode("ascii")
        name = name[: _MAX_NAME_BYTES - len(mark)] + mark
    return name


def digits_that_differ(ids: list[str]) -> int:
    """Return how many digits tell all ids apart, twelve at least."""
    ordered = sorted(ids)
    digits = SHOWN_HEX_DIGITS
    for one, other in pairwise(ordered):
        while one[:digits] == other[:digits] and digits < 64:
            digits += 1
    return digits


log = logging.getLogger(__name__)

FRESH_S = 1.0
"""How old the list of snapshots may be when it is asked for."""

_KEEP_GONE_S = 24 * 3600.0
"""How long a forgotten snapshot still answers programs that are in it."""

_LATEST = b"latest"

Path = tuple[bytes, ...]


@dataclass(slots=True)
class _Shown:
    """A snapshot with its range of numbers; `gone_s` is when it was last seen to be missing."""

    snapshot_id: SnapshotId
    snapshot: Snapshot
    name: bytes
    first: int
    view: SnapshotView
    gone_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Listing:
    """A directory of the catalogue: the serial numbers of its entries, in order, and the entries."""

    node: Node
    serials: list[int]
    entries: list[tuple[int, Node]]
    by_name: dict[bytes, tuple[int, Node]]


class RepositoryView:
    """Every snapshot of a repository side by side; safe to share between threads."""

    def __init__(self, sources: MountContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._sources = sources
        self._clock = clock
        self._owner = os.getuid(), os.getgid()
        self._born_ns = time.time_ns()
        self._lock = threading.Lock()
        self._checked_s = -FRESH_S
        self._ranges = InodeRanges()
        self._shown: dict[SnapshotId, _Shown] = {}
        self._unreadable: set[SnapshotId] = set()
        self._waited_for: set[SnapshotId] = set()
        self._by_first: dict[int, _Shown] = {}
        # Serial numbers of the paths that there ever were; they are the inode numbers of links and
        # directories here, and the positions in listings, which so survive all changes.
        self._serials: dict[Path, int] = {(): ROOT}
        self._paths: dict[int, Path] = {ROOT: ()}
        self._listings: dict[int, _Listing] = {}
        self._full_ids: dict[bytes, tuple[int, Node]] = {}
        self._versions = VersionsView(
            sources.repository.trees,
            sources.waiting,
            lambda name: self._directory(name, self._born_ns),
            self._link,
        )

    def node(self, number: int) -> Node:
        """Return the node with a number; raises StaleError."""
        if number >= LISTINGS_END:
            return self._view(number).node(number)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.node(number)
        listing = self._listings.get(number)
        if listing is not None:
            return listing.node
        path = self._paths.get(number)
        if path:
            above = self._listings.get(self._serials[path[:-1]])
            found = above.by_name.get(path[-1]) if above is not None else None
            if found is None and path[0] == b"ids":
                found = self._full_ids.get(path[-1])
            if found is not None:
                return found[1]
        raise StaleError(number)

    def parent(self, number: int) -> int:
        """Return the number of the directory that holds a node; the root's is its own."""
        if number >= LISTINGS_END:
            shown = self._shown_at(number)
            if number == shown.first:
                return self._serials[(b"snapshots",)]
            return shown.view.parent(number)
        if number >= VERSIONS:
            above = self._versions.parent(number)
            return ROOT if above is None else above
        return self._serials[self._paths.get(number, ())[:-1]]

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a directory's entry, or None; whole ids are found besides the short ones."""
        if number >= LISTINGS_END:
            return self._view(number).lookup(number, name)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.lookup(number, name)
        listing = self._listings.get(number)
        if listing is None:
            raise StaleError(number)
        found = listing.by_name.get(name)
        if found is None and self._paths[number] == (b"ids",):
            found = self._full_ids.get(name)
        return found

    def entries(self, number: int, place: int) -> Iterator[tuple[int, Node, int]]:
        """Yield number, node and the place after it of a directory's entries from a place on."""
        if number >= LISTINGS_END:
            yield from self._view(number).entries(number, place)
            return
        self._refresh()
        if number >= VERSIONS:
            yield from self._versions.entries(number, place)
            return
        listing = self._listings.get(number)
        if listing is None:
            raise StaleError(number)
        for i in range(bisect_right(listing.serials, place), len(listing.serials)):
            yield *listing.entries[i], listing.serials[i]

    def xattr(self, number: int, name: bytes) -> bytes | None:
        """Return an extended attribute, or None."""
        return self._view(number).xattr(number, name) if number >= LISTINGS_END else None

    def xattr_names(self, number: int) -> list[bytes]:
        """Return the names of a node's own extended attributes."""
        return self._view(number).xattr_names(number) if number >= LISTINGS_END else []

    def open(self, number: int) -> Readable:
        """Return a reader of a regular file; the catalogue itself has none."""
        if number < LISTINGS_END:
            raise StaleError(number)
        return self._view(number).open(number)

    def range_start(self, number: int) -> int:
        """Return where the range of numbers begins that holds a number."""
        return self._ranges.find(number) if number >= LISTINGS_END else 0

    def is_immutable(self, number: int) -> bool:
        """Tell whether what is said of a number stays true as long as the mount."""
        return number >= LISTINGS_END and self._view(number).is_immutable(number)

    def statfs_totals(self) -> tuple[int, int]:
        """Return the sums over all snapshots, as if nothing were shared."""
        self._refresh()
        views = [shown.view for shown in self._shown.values() if shown.gone_s is None]
        sums = [view.statfs_totals() for view in views]
        return sum(size for size, _ in sums), sum(nodes for _, nodes in sums)

    def on_readdir(self, number: int, waited: bool) -> None:
        """Tell that a directory is listed from its beginning, and whether that has to wait."""
        if number >= LISTINGS_END:
            self._view(number).on_readdir(number, waited)

    def on_open(self, number: int, waited: bool) -> None:
        """Tell that a file is read from its beginning, and whether that has to wait."""
        self._view(number).on_open(number, waited)

    def describe(self, number: int) -> str:
        """Return what a number is, for the log."""
        if number < LISTINGS_END:
            return "the list of snapshots"
        try:
            return self._view(number).describe(number)
        except StaleError:
            return f"inode {number}"

    def damage(self, number: int, error: CasfsError) -> None:
        """Remember that something of a node other than a range of its bytes cannot be read."""
        if number < LISTINGS_END:
            log.error("cannot list the snapshots: %s", error)
        else:
            self._view(number).damage(number, error)

    def _view(self, number: int) -> SnapshotView:
        return self._shown_at(number).view

    def _shown_at(self, number: int) -> _Shown:
        return self._by_first[self._ranges.find(number)]

    def _refresh(self) -> None:
        if self._clock() - self._checked_s < FRESH_S:
            return
        self._sources.waiting.require_may_block()
        with self._lock:
            if self._clock() - self._checked_s < FRESH_S:
                return
            if self._read_list() or not self._listings:
                self._arrange()
            self._checked_s = self._clock()

    def _read_list(self) -> bool:
        """Bring what is shown into agreement with the repository; tell whether that changed it."""
        now = self._clock()
        found = set(self._sources.repository.snapshots.ids())
        if not found:
            # No snapshots are one thing; no repository, because a disk is gone, is another.
            self._sources.repository.store.storage.size(CONFIG_NAME)
        self._unreadable &= found
        self._waited_for &= found
        new: list[tuple[SnapshotId, Snapshot]] = []
        for snapshot_id in found - self._shown.keys() - self._unreadable:
            try:
                new.append((snapshot_id, self._sources.repository.snapshots.load(snapshot_id)))
            except NotFoundError:
                continue
            except StorageError as error:
                if snapshot_id not in self._waited_for:
                    log.error("%s; it is not shown until it can be read", error)
                self._waited_for.add(snapshot_id)
            except KeyMissingError as error:
                self._unreadable.add(snapshot_id)
                log.warning("snapshot %s is not shown: %s", short_id(snapshot_id), error)
            except IntegrityError as error:
                self._unreadable.add(snapshot_id)
                log.error("%s; it is not shown", error)
        changed = False
        for snapshot_id, snapshot in sorted(new, key=lambda item: (item[1].time_ns, item[0])):
            self._learn_packs(snapshot)
            self._add(snapshot_id, snapshot)
            changed = True
        replaced = {s.snapshot.replaces for i, s in self._shown.items() if i in found}
        for shown in list(self._shown.values()):
            gone = shown.snapshot_id not in found or shown.snapshot_id in replaced
            if gone != (shown.gone_s is not None):
                shown.gone_s = now if gone else None
                changed = True
            elif shown.gone_s is not None and now - shown.gone_s > _KEEP_GONE_S:
                self._drop(shown)
        return changed

    def _add(self, snapshot_id: SnapshotId, snapshot: Snapshot) -> None:
        taken = {shown.name for shown in self._shown.values()}
        name = time_name(snapshot.time_ns)
        if name in taken:
            name += b"-" + snapshot_id.hex()[:8].encode("ascii")
        if name in taken:
            name = name[:-8] + snapshot_id.hex().encode("ascii")
        root = snapshot.root
        first = self._ranges.add(snapshot_id, subtree_count(root) + REPORT_NUMBERS)
        view = SnapshotView(self._sources, snapshot_id, snapshot, root, first)
        shown = _Shown(snapshot_id, snapshot, name, first, view)
        self._by_first[first] = shown
        self._shown[snapshot_id] = shown

    def _drop(self, shown: _Shown) -> None:
        del self._shown[shown.snapshot_id], self._by_first[shown.first]
        self._ranges.remove(shown.first)

    def _learn_packs(self, snapshot: Snapshot) -> None:
        """See to it that the index knows the blobs of a snapshot that appeared.

        It always does when it is the repository's own; a user's own copy has to be brought up to date.
        """
        tree, store = snapshot.root.tree, self._sources.repository.store
        try:
            if tree is not None and store.index.lookup(Digest(tree.digest)) is None:
                store.reconcile()
        except CasfsError as error:
            log.warning("the index could not be brought up to date: %s", error)

    def _arrange(self) -> None:
        """Make all directories of the catalogue anew."""
        present = sorted(
            (shown for shown in self._shown.values() if shown.gone_s is None),
            key=lambda shown: (shown.snapshot.time_ns, shown.snapshot_id),
        )
        digits = digits_that_differ([shown.snapshot_id.hex() for shown in present])
        folders: dict[Path, dict[bytes, tuple[int, Node]]] = {(): {}}
        folders |= {(name,): {} for name in (b"hosts", b"ids", b"snapshots", b"tags")}
        times: dict[Path, int] = dict.fromkeys(folders, self._born_ns)
        full_ids: dict[bytes, tuple[int, Node]] = {}
        for shown in present:
            time_ns = shown.snapshot.time_ns
            identity = shown.snapshot_id.hex().encode("ascii")
            target = b"../snapshots/" + shown.name
            links: list[tuple[Path, bytes, bytes]] = [
                ((b"snapshots",), _LATEST, shown.name),
                ((b"ids",), identity[:digits], target),
                ((b"ids",), _LATEST, target),
            ]
            groups = [(b"hosts", shown.snapshot.host)]
            groups += [(b"tags", tag) for tag in shown.snapshot.tags]
            for kind, text in groups:
                folder = (kind, safe_name(text))
                links += [(folder, shown.name, b"../" + target), (folder, _LATEST, shown.name)]
            folders[(b"snapshots",)][shown.name] = (
                shown.first,
                replace(shown.snapshot.root, name=shown.name),
            )
            self._serial((b"snapshots", shown.name))
            for path, name, to in links:
                entries = folders.setdefault(path, {})
                entries[name] = self._serial((*path, name)), self._link(name, to, time_ns)
                times[path] = time_ns
            whole = self._serial((b"ids", identity))
            full_ids[identity] = whole, self._link(identity, target, time_ns)
        self._versions.set_snapshots(
            tuple(NamedSnapshot(shown.snapshot_id, shown.snapshot, shown.name) for shown in present)
        )
        folders[()][b"versions"] = self._versions.root()
        listings: dict[int, _Listing] = {}
        nodes: dict[Path, Node] = {}
        for path in folders:
            name = path[-1] if path else b""
            node = self._directory(name, times[path])
            if path:
                folders[path[:-1]][name] = self._serial(path), node
            nodes[path] = node
        for path, entries in folders.items():
            listings[self._serial(path)] = self._listing(path, nodes[path], entries)
        self._listings, self._full_ids = listings, full_ids

    def _listing(self, path: Path, node: Node, entries: dict[bytes, tuple[int, Node]]) -> _Listing:
        order = sorted((self._serial((*path, name)), entry) for name, entry in entries.items())
        serials = [serial for serial, _ in order]
        return _Listing(node, serials, [entry for _, entry in order], entries)

    def _serial(self, path: Path) -> int:
        serial = self._serials.get(path)
        if serial is None:
            serial = self._serials[path] = len(self._serials) + ROOT
            self._paths[serial] = path
        return serial

    def _directory(self, name: bytes, time_ns: int) -> Node:
        uid, gid = self._owner
        return Node(name, NodeType.DIRECTORY, 0o555, uid, gid, time_ns, time_ns, 0, 2)

    def _link(self, name: bytes, target: bytes, time_ns: int) -> Node:
        uid, gid = self._owner
        size = len(target)
        return Node(
            name, NodeType.SYMLINK, 0o777, uid, gid, time_ns, time_ns, 0, 1, size, content=target
        )
