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
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import (
    CasfsError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    StorageError,
)
from casfs.format.config import CONFIG_NAME
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, subtree_count
from casfs_mount.file_reader import Readable
from casfs_mount.inodes import LISTINGS_END, ROOT, VERSIONS, InodeRanges, StaleError
from casfs_mount.link_folders import LinkFolders
from casfs_mount.snapshot_names import time_name
from casfs_mount.versions_view import NamedSnapshot, VersionsView
from casfs_mount.view import REPORT_NUMBERS, MountContext, SnapshotView

log = logging.getLogger(__name__)

FRESH_S = 1.0
"""The age at which the list of snapshots is read again."""

_KEEP_GONE_S = 24 * 3600.0
"""How long a forgotten snapshot still serves programs that have it open."""


@dataclass(slots=True)
class _ShownSnapshot:
    """A snapshot with its range of inode numbers; `gone_s` is the time when it disappeared."""

    snapshot_id: SnapshotId
    snapshot: Snapshot
    name: bytes
    first: int
    view: SnapshotView
    gone_s: float | None = None


class RepositoryView:
    """All snapshots of a repository; safe to share between threads."""

    def __init__(self, context: MountContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._lock = threading.Lock()
        self._checked_s = -FRESH_S
        self._ranges = InodeRanges()
        self._shown: dict[SnapshotId, _ShownSnapshot] = {}
        self._unreadable: set[SnapshotId] = set()
        self._unavailable: set[SnapshotId] = set()
        self._by_first: dict[int, _ShownSnapshot] = {}
        self._folders = LinkFolders()
        self._versions = VersionsView(
            context.repository.trees,
            context.guard,
            self._folders.directory,
            self._folders.link,
        )

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError."""
        if number >= LISTINGS_END:
            return self._view(number).node(number)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.node(number)
        return self._folders.node(number)

    def parent(self, number: int) -> int:
        """Return the number of a node's directory; for the root, its own number."""
        if number >= LISTINGS_END:
            shown = self._shown_at(number)
            if number == shown.first:
                return self._folders.snapshots
            return shown.view.parent(number)
        if number >= VERSIONS:
            above = self._versions.parent(number)
            return ROOT if above is None else above
        return self._folders.parent(number)

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a directory's entry, or None.

        Some are found and not listed: full ids in `ids/`, and the times with colons of older versions.
        """
        if number >= LISTINGS_END:
            return self._view(number).lookup(number, name)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.lookup(number, name)
        return self._folders.lookup(number, name)

    def entries(self, number: int, position: int) -> Iterator[tuple[int, Node, int]]:
        """Yield the entries of a directory from a position on: number, node and position after it."""
        if number >= LISTINGS_END:
            return self._view(number).entries(number, position)
        self._refresh()
        if number >= VERSIONS:
            return self._versions.entries(number, position)
        return self._folders.entries(number, position)

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

    def decode_files_after(self, number: int) -> Iterator[int]:
        """Decode the small files after a file in its directory into the cache, one for each step."""
        return self._view(number).decode_files_after(number)

    def decode_directories_after(self, number: int) -> Iterator[int]:
        """Decode the trees that a walk lists after a directory of a snapshot, one for each step."""
        if number < LISTINGS_END:
            return iter(())
        return self._view(number).decode_directories_after(number)

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
            is_due = time.time_ns() >= self._folders.valid_until_ns
            if self._update_snapshots() or self._folders.is_empty() or is_due:
                self._rebuild_folders()
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

    def _rebuild_folders(self) -> None:
        present = sorted(
            (shown for shown in self._shown.values() if shown.gone_s is None),
            key=lambda shown: (shown.snapshot.time_ns, shown.snapshot_id),
        )
        self._versions.set_snapshots(
            tuple(NamedSnapshot(shown.snapshot_id, shown.snapshot, shown.name) for shown in present)
        )
        self._folders.rebuild(present, self._versions.root())
