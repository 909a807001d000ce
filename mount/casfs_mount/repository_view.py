"""The view of a whole repository: all snapshots by time, and links to them by id, host and tag.

`snapshots/` has the root of each snapshot, named by its local time. `ids/`, `hosts/` and `tags/` contain
symbolic links into it, so that every file has one path, one inode number and one place in the kernel's
cache. Each of these folders has a link `latest`. `versions/` has the versions of every path across the
snapshots (see `casfs_mount.versions_view`). The list of snapshots is read again when a request needs it
and it is older than a second. The inode numbers of a snapshot depend on its id alone, and its name does
not change while it exists.
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
from casfs.repository.snapshot_filter import FUTURE_TOLERANCE_NS, is_from_future
from casfs_mount.file_reader import Readable
from casfs_mount.inodes import LISTINGS_END, ROOT, VERSIONS, InodeRanges, StaleError
from casfs_mount.versions_view import NamedSnapshot, VersionsView
from casfs_mount.view import REPORT_NUMBERS, MountContext, SnapshotView

_MAX_NAME_BYTES = 255


def time_name(time_ns: int) -> bytes:
    """Return the name of a snapshot's folder: its local time, to the second.

    It has no colon: rsync and scp take what is before one for a host, and Windows has no such names.
    """
    try:
        moment = datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return b"@%d" % (time_ns // 1_000_000_000)
    return moment.strftime("%Y-%m-%dT%H-%M-%S").encode("ascii")


def safe_name(text: str) -> bytes:
    """Return a unique file name for a host or a tag, with special characters as %XX.

    A name that would be too long is cut, and a digest is appended to keep it unique.
    """
    raw = text.encode("utf-8", "surrogateescape")
    name = b"".join(
        b"%%%02X" % byte if byte < 0x20 or byte in b"/:%\x7f" else bytes([byte]) for byte in raw
    )
    if name in (b"", b".", b".."):
        name = name.replace(b".", b"%2E") or b"%"
    if len(name) > _MAX_NAME_BYTES:
        mark = b"%" + digest_of(raw).hex()[:16].encode("ascii")
        name = name[: _MAX_NAME_BYTES - len(mark)] + mark
    return name


def digits_that_differ(ids: list[str]) -> int:
    """Return how many digits make all ids distinct, twelve at least."""
    ordered = sorted(ids)
    digits = SHOWN_HEX_DIGITS
    for one, other in pairwise(ordered):
        while one[:digits] == other[:digits] and digits < 64:
            digits += 1
    return digits


log = logging.getLogger(__name__)

FRESH_S = 1.0
"""The age at which the list of snapshots is read again."""

_KEEP_GONE_S = 24 * 3600.0
"""How long a forgotten snapshot still serves programs that have it open."""

_LATEST = b"latest"

PathParts = tuple[bytes, ...]


@dataclass(slots=True)
class _ShownSnapshot:
    """A snapshot with its range of inode numbers; `gone_s` is the time when it disappeared."""

    snapshot_id: SnapshotId
    snapshot: Snapshot
    name: bytes
    first: int
    view: SnapshotView
    gone_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Listing:
    """A directory of this view: the serial numbers of its entries, ascending, and the entries."""

    node: Node
    serials: list[int]
    entries: list[tuple[int, Node]]
    by_name: dict[bytes, tuple[int, Node]]


class RepositoryView:
    """All snapshots of a repository; safe to share between threads."""

    def __init__(self, context: MountContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._owner = os.getuid(), os.getgid()
        self._born_ns = time.time_ns()
        self._lock = threading.Lock()
        self._checked_s = -FRESH_S
        self._ranges = InodeRanges()
        self._shown: dict[SnapshotId, _ShownSnapshot] = {}
        self._unreadable: set[SnapshotId] = set()
        self._unavailable: set[SnapshotId] = set()
        self._by_first: dict[int, _ShownSnapshot] = {}
        # A serial number for every path that this view ever had. It is the inode number of a link or
        # directory of this view and its position in listings, so both stay valid when the list changes.
        self._serials: dict[PathParts, int] = {(): ROOT}
        self._paths: dict[int, PathParts] = {ROOT: ()}
        self._listings: dict[int, _Listing] = {}
        # When the next snapshot from the future is one of the past, and may be the latest.
        self._next_arrival_ns = 0
        self._full_ids: dict[bytes, tuple[int, Node]] = {}
        self._versions = VersionsView(
            context.repository.trees,
            context.guard,
            lambda name: self._directory(name, self._born_ns),
            self._link,
        )

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError."""
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
            found = self._entry(self._serials[path[:-1]], path[-1])
            if found is not None:
                return found[1]
        raise StaleError(number)

    def parent(self, number: int) -> int:
        """Return the number of a node's directory; for the root, its own number."""
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
        """Return a directory's entry, or None.

        Some are found and not listed: full ids in `ids/`, and the times with colons of older versions.
        """
        if number >= LISTINGS_END:
            return self._view(number).lookup(number, name)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.lookup(number, name)
        if number not in self._listings:
            raise StaleError(number)
        return self._entry(number, name)

    def _entry(self, directory: int, name: bytes) -> tuple[int, Node] | None:
        listing = self._listings.get(directory)
        if listing is None:
            return None
        found = listing.by_name.get(name)
        if found is not None:
            return found
        path = self._paths[directory]
        if path == (b"ids",):
            return self._full_ids.get(name)
        plain = name.replace(b":", b"%3A" if path in ((b"hosts",), (b"tags",)) else b"-")
        if plain == name or path == () or plain not in listing.by_name:
            return None
        with self._lock:
            serial = self._serial((*path, name))
        return serial, self._link(name, plain, listing.by_name[plain][1].mtime_ns)

    def entries(self, number: int, position: int) -> Iterator[tuple[int, Node, int]]:
        """Yield the entries of a directory from a position on: number, node and position after it."""
        if number >= LISTINGS_END:
            return self._view(number).entries(number, position)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.entries(number, position)
        listing = self._listings.get(number)
        if listing is None:
            raise StaleError(number)
        following = range(bisect_right(listing.serials, position), len(listing.serials))
        return ((*listing.entries[i], listing.serials[i]) for i in following)

    def xattr(self, number: int, name: bytes) -> bytes | None:
        """Return an extended attribute, or None."""
        return self._view(number).xattr(number, name) if number >= LISTINGS_END else None

    def xattr_names(self, number: int) -> list[bytes]:
        """Return the names of a node's own extended attributes."""
        return self._view(number).xattr_names(number) if number >= LISTINGS_END else []

    def may_have_xattrs(self) -> bool:
        """Return True: snapshots appear while the mount lives."""
        return True

    def open(self, number: int) -> Readable:
        """Return a reader of a regular file, which only snapshots have; raise StaleError."""
        if number < LISTINGS_END:
            raise StaleError(number)
        return self._view(number).open(number)

    def range_start(self, number: int) -> int:
        """Return the first number of the range that contains a number."""
        return self._ranges.find(number) if number >= LISTINGS_END else 0

    def is_immutable(self, number: int) -> bool:
        """Return whether a node, and the entries of a directory, stay the same while the mount lives."""
        return number >= LISTINGS_END and self._view(number).is_immutable(number)

    def statfs_totals(self) -> tuple[int, int]:
        """Return the sums of bytes and entries over all snapshots, without deduplication."""
        self._refresh()
        views = [shown.view for shown in self._shown.values() if shown.gone_s is None]
        sums = [view.statfs_totals() for view in views]
        return sum(size for size, _ in sums), sum(nodes for _, nodes in sums)

    def on_readdir(self, number: int, waited: bool) -> None:
        """Note that a directory is listed from its beginning; `waited`: the request has to wait."""
        if number >= LISTINGS_END:
            self._view(number).on_readdir(number, waited)

    def on_open(self, number: int, waited: bool) -> None:
        """Note that a file is read from its beginning; `waited`: the request has to wait."""
        self._view(number).on_open(number, waited)

    def decode_after(self, number: int) -> Iterator[int]:
        """Decode the small files after a file in its directory into the cache, one for each step."""
        return self._view(number).decode_after(number)

    def describe(self, number: int) -> str:
        """Return a description of a number for the log."""
        if number < LISTINGS_END:
            return "the list of snapshots"
        try:
            return self._view(number).describe(number)
        except StaleError:
            return f"inode {number}"

    def damage(self, number: int, error: CasfsError) -> None:
        """Record that a part of a node other than its data cannot be read."""
        if number < LISTINGS_END:
            log.error("cannot list the snapshots: %s", error)
        else:
            self._view(number).damage(number, error)

    def _view(self, number: int) -> SnapshotView:
        return self._shown_at(number).view

    def _shown_at(self, number: int) -> _ShownSnapshot:
        return self._by_first[self._ranges.find(number)]

    def _refresh(self) -> None:
        if self._clock() - self._checked_s < FRESH_S:
            return
        self._context.guard.require_may_block()
        with self._lock:
            if self._clock() - self._checked_s < FRESH_S:
                return
            is_due = time.time_ns() >= self._next_arrival_ns
            if self._update_snapshots() or not self._listings or is_due:
                self._build_listings()
            self._checked_s = self._clock()

    def _update_snapshots(self) -> bool:
        """Read the list of snapshots and update the ranges and views; return whether it changed."""
        now = self._clock()
        found = set(self._context.repository.snapshots.ids())
        if not found:
            # An empty list can also mean that the disk is gone; then this raises.
            self._context.repository.store.storage.size(CONFIG_NAME)
        self._unreadable &= found
        self._unavailable &= found
        new: list[tuple[SnapshotId, Snapshot]] = []
        for snapshot_id in found - self._shown.keys() - self._unreadable:
            try:
                new.append((snapshot_id, self._context.repository.snapshots.load(snapshot_id)))
            except NotFoundError:
                continue
            except StorageError as error:
                if snapshot_id not in self._unavailable:
                    log.error("%s; it is not shown until it can be read", error)
                self._unavailable.add(snapshot_id)
            except KeyMissingError as error:
                self._unreadable.add(snapshot_id)
                log.warning("snapshot %s is not shown: %s", short_id(snapshot_id), error)
            except IntegrityError as error:
                self._unreadable.add(snapshot_id)
                log.error("%s; it is not shown", error)
        changed = False
        for snapshot_id, snapshot in sorted(new, key=lambda item: (item[1].time_ns, item[0])):
            self._index_new_packs(snapshot)
            self._add(snapshot_id, snapshot)
            changed = True
            if not self._context.repository.snapshots.provenance.is_from_trusted_writer(
                snapshot_id
            ):
                log.warning(
                    "snapshot %s is unproven: the owner of the storage may have made it",
                    short_id(snapshot_id),
                )
        replaced_by = self._context.repository.snapshots.provenance.replaced_by
        replaced = {
            replaced_by(snapshot_id, shown.snapshot)
            for snapshot_id, shown in self._shown.items()
            if snapshot_id in found and shown.snapshot.replaces in self._shown
        }
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
        view = SnapshotView(self._context, snapshot_id, snapshot, root, first)
        shown = _ShownSnapshot(snapshot_id, snapshot, name, first, view)
        self._by_first[first] = shown
        self._shown[snapshot_id] = shown

    def _drop(self, shown: _ShownSnapshot) -> None:
        del self._shown[shown.snapshot_id], self._by_first[shown.first]
        self._ranges.remove(shown.first)

    def _index_new_packs(self, snapshot: Snapshot) -> None:
        """Add the packs of a new snapshot to the index if it does not know them.

        The index inside the repository always knows them; an index in the user's cache may not.
        """
        tree, store = snapshot.root.tree, self._context.repository.store
        try:
            if tree is not None and store.index.lookup(Digest(tree.digest)) is None:
                store.reconcile()
        except CasfsError as error:
            log.warning("the index cannot be updated: %s", error)

    def _build_listings(self) -> None:
        """Build all directories of this view again and replace the old ones."""
        present = sorted(
            (shown for shown in self._shown.values() if shown.gone_s is None),
            key=lambda shown: (shown.snapshot.time_ns, shown.snapshot_id),
        )
        digits = digits_that_differ([shown.snapshot_id.hex() for shown in present])
        folders: dict[PathParts, dict[bytes, tuple[int, Node]]] = {(): {}}
        folders |= {(name,): {} for name in (b"hosts", b"ids", b"snapshots", b"tags")}
        times: dict[PathParts, int] = dict.fromkeys(folders, self._born_ns)
        full_ids: dict[bytes, tuple[int, Node]] = {}
        now_ns = time.time_ns()
        future_ns = [
            shown.snapshot.time_ns
            for shown in present
            if is_from_future(shown.snapshot.time_ns, now_ns)
        ]
        self._next_arrival_ns = min(future_ns, default=1 << 63) - FUTURE_TOLERANCE_NS
        for shown in present:
            time_ns = shown.snapshot.time_ns
            identity = shown.snapshot_id.hex().encode("ascii")
            target = b"../snapshots/" + shown.name
            links: list[tuple[PathParts, bytes, bytes]] = [
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
                if name == _LATEST in entries and is_from_future(time_ns, now_ns):
                    continue
                entries[name] = self._serial((*path, name)), self._link(name, to, time_ns)
                times[path] = time_ns
            whole = self._serial((b"ids", identity))
            full_ids[identity] = whole, self._link(identity, target, time_ns)
        self._versions.set_snapshots(
            tuple(NamedSnapshot(shown.snapshot_id, shown.snapshot, shown.name) for shown in present)
        )
        folders[()][b"versions"] = self._versions.root()
        listings: dict[int, _Listing] = {}
        nodes: dict[PathParts, Node] = {}
        for path in folders:
            name = path[-1] if path else b""
            node = self._directory(name, times[path])
            if path:
                folders[path[:-1]][name] = self._serial(path), node
            nodes[path] = node
        for path, entries in folders.items():
            listings[self._serial(path)] = self._listing(path, nodes[path], entries)
        self._listings, self._full_ids = listings, full_ids

    def _listing(
        self, path: PathParts, node: Node, entries: dict[bytes, tuple[int, Node]]
    ) -> _Listing:
        order = sorted((self._serial((*path, name)), entry) for name, entry in entries.items())
        serials = [serial for serial, _ in order]
        return _Listing(node, serials, [entry for _, entry in order], entries)

    def _serial(self, path: PathParts) -> int:
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
