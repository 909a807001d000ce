"""A synchronous view of one snapshot as a file system, independent of FUSE.

Requests name an inode number (see `casfs_mount.inodes`); answers are nodes, of the snapshot or of its
`.casfs` folder. Safe to share between threads; the event-loop thread gets WouldBlock where something has
to be read first.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from casfs.digest import SnapshotId, short_id
from casfs.display import escape_path
from casfs.errors import CasfsError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import CaptureState, Node, NodeType, capture_of, captured_digest
from casfs.problems import reason_label
from casfs.repository.repository import Repository
from casfs.trees.content import EXTENT, HOLE
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.damage_log import DamageLog
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.file_reader import MAX_SMALL_BYTES, FileReader, Readable, single_chunk
from casfs_mount.inodes import Numbering
from casfs_mount.logged_name import LoggedName
from casfs_mount.prefetch import Prefetcher
from casfs_mount.report_files import FILES, FOLDER, ReportFiles
from casfs_mount.tree_cache import TreeCache
from casfs_mount.tree_walk import directories_after

log = logging.getLogger(__name__)

REPORT_NUMBERS = 8
"""Inode numbers reserved for the `.casfs` folder, after those of the snapshot's nodes."""

VIRTUAL_XATTRS = b"user.casfs."
_REMEMBERED_WARNINGS = 10_000
_EXTENT_BYTES = EXTENT.size


class RefusedError(CasfsError):
    """The view refuses a request; the program gets `errno`."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.errno = code


class View(Protocol):
    """What the request handlers need of a view; all numbers are inode numbers by position."""

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError."""

    def parent(self, number: int) -> int:
        """Return the number of a node's directory; for the root, its own number."""

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a directory's entry, or None."""

    def entries(self, number: int, position: int) -> Iterator[tuple[int, Node, int]]:
        """Yield the entries of a directory from a position on: number, node and position after it.

        Raise StaleError; WouldBlock and the errors of reads also from the iterator.
        """

    def xattr(self, number: int, name: bytes) -> bytes | None:
        """Return an extended attribute, or None."""

    def xattr_names(self, number: int) -> list[bytes]:
        """Return the names of a node's own extended attributes."""

    def may_have_xattrs(self) -> bool:
        """Return whether any node may have extended attributes of its own while the mount lives."""

    def open(self, number: int) -> Readable:
        """Return a reader of a regular file; raise RefusedError."""

    def range_start(self, number: int) -> int:
        """Return the first number of the range that contains a number."""

    def is_immutable(self, number: int) -> bool:
        """Return whether a node, and the entries of a directory, stay the same while the mount lives."""

    def statfs_totals(self) -> tuple[int, int]:
        """Return the total bytes and the number of entries of the view."""

    def on_readdir(self, number: int, waited: bool) -> None:
        """Note that a directory is listed from its beginning; `waited`: the request has to wait."""

    def on_open(self, number: int, waited: bool) -> None:
        """Note that a file is read from its beginning; `waited`: the request has to wait."""

    def decode_files_after(self, number: int) -> Iterator[int]:
        """Decode the small files after a file in its directory into the cache, one for each step.

        Yield the file's number, or 0 for an entry that is none. Raise WouldBlock and the errors of reads.
        """

    def decode_directories_after(self, number: int) -> Iterator[int]:
        """Decode the trees that a walk lists after a directory into the cache; yield the number of each.

        Raise WouldBlock and the errors of reads.
        """

    def describe(self, number: int) -> str:
        """Return a description of a number for the log; never fail and never wait."""

    def damage(self, number: int, error: CasfsError) -> None:
        """Record that a part of a node other than its data cannot be read."""


@dataclass(frozen=True, slots=True)
class MountContext:
    """The repository, the caches and the threads that all views of one mount share."""

    repository: Repository
    blobs: BlobReader
    tree_cache: TreeCache
    chunk_cache: ChunkCache
    guard: EventLoopGuard
    background: BackgroundPool
    deny_changed: bool = False


class SnapshotView:
    """A snapshot or a directory of it as a view; `first` is the inode number of its root."""

    def __init__(
        self,
        context: MountContext,
        snapshot_id: SnapshotId,
        snapshot: Snapshot,
        root: Node,
        first: int,
    ) -> None:
        self._context = context
        self._snapshot_id = snapshot_id
        self._numbering = Numbering(root, first, context.tree_cache)
        self._prefetcher = Prefetcher(
            self._numbering, context.tree_cache, context.blobs, context.background
        )
        self._first = first
        self._folder = self._numbering.end
        self._damage = DamageLog()
        self._reports = ReportFiles(
            snapshot_id,
            snapshot,
            root,
            context.repository.trees,
            self._damage,
            context.guard,
            unproven=not context.repository.snapshots.provenance.is_from_trusted_writer(
                snapshot_id
            ),
        )
        self._root = root
        self._lock = threading.Lock()
        self._warned: OrderedDict[int, None] = OrderedDict()

    def node(self, number: int) -> Node:
        """Return the node with a number; raise StaleError."""
        if self._folder <= number < self._folder + REPORT_NUMBERS:
            name = self._report(number)
            if name is not None:
                return self._reports.node(name)
        return self._numbering.node(number)

    def parent(self, number: int) -> int:
        """Return the number of a node's directory; for the root, its own number."""
        if number >= self._folder:
            return self._first if number == self._folder else self._folder
        return self._numbering.parent(number)

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a directory's entry, or None; the root has a `.casfs` unless the snapshot has one."""
        if number >= self._folder:
            if number == self._folder and name in FILES:
                return self._folder + 1 + FILES.index(name), self._reports.node(name)
            return None
        found = self._numbering.child(number, self._numbering.node(number), name)
        if found is None and name == FOLDER and number == self._first:
            return self._folder, self._reports.node(FOLDER)
        return found

    def entries(self, number: int, position: int) -> Iterator[tuple[int, Node, int]]:
        """Yield the entries of a directory from a position on: number, node and position after it."""
        if number < self._folder:
            return self._numbering.entries(number, self._numbering.node(number), position)
        if number > self._folder:
            return iter(())
        first = self._folder + 1
        return (
            (first + i, self._reports.node(FILES[i]), i + 1) for i in range(position, len(FILES))
        )

    def xattr(self, number: int, name: bytes) -> bytes | None:
        """Return a node's own extended attribute, or the virtual one of casfs with that name."""
        node = self.node(number)
        if node.extra is not None:
            for own, value in node.extra.xattrs:
                if own == name:
                    return value
        if name.startswith(VIRTUAL_XATTRS):
            return self._known_facts(node, name[len(VIRTUAL_XATTRS) :])
        return None

    def xattr_names(self, number: int) -> list[bytes]:
        """Return the names of a node's own attributes; the virtual ones are not listed."""
        node = self.node(number)
        return [] if node.extra is None else [name for name, _ in node.extra.xattrs]

    def may_have_xattrs(self) -> bool:
        """Return whether a node may have extended attributes: unless the root's summary counts none."""
        root = self._root
        if root.extra is not None and root.extra.xattrs:
            return True
        return root.tree is not None and root.tree.xattrs != 0

    def open(self, number: int) -> Readable:
        """Return a reader of a regular file; a changed one is logged once, and refused on request."""
        if number >= self._folder:
            name = self._report(number)
            if name is None or name == FOLDER:
                raise RefusedError("it is a directory", errno.EISDIR)
            return self._reports.open(name)
        node = self._numbering.node(number)
        if node.kind != NodeType.FILE:
            raise RefusedError("it is not a regular file", errno.EINVAL)
        if node.state == CaptureState.CHANGED:
            self._warn_of_changed(number)
        return FileReader(
            node,
            self._context.chunk_cache,
            lambda begin, length, error: self._damage.add_range(
                self._numbering.path(number), begin, length, error
            ),
        )

    def range_start(self, number: int) -> int:
        """Return the first number of the range that contains a number."""
        return self._first

    def is_immutable(self, number: int) -> bool:
        """Return whether a node stays the same: every node except `.casfs` and its files."""
        return number < self._folder

    def statfs_totals(self) -> tuple[int, int]:
        """Return the total bytes and the number of entries of the snapshot."""
        tree = self._root.tree
        return (0, 1) if tree is None else (tree.total_bytes, tree.nodes + 1)

    def on_readdir(self, number: int, waited: bool) -> None:
        """Note that a directory is listed from its beginning; `waited`: the request has to wait."""
        if number < self._folder:
            self._prefetcher.on_readdir(number, waited)

    def on_open(self, number: int, waited: bool) -> None:
        """Note that a file is read from its beginning; `waited`: the request has to wait."""
        if number < self._folder:
            self._prefetcher.on_open(number, waited)

    def decode_files_after(self, number: int) -> Iterator[int]:
        """Decode the small files after a file in its directory into the cache, one for each step.

        Yield the file's number, or 0 for an entry that is none. Raise WouldBlock and the errors of reads.
        """
        numbering, chunks = self._numbering, self._context.chunk_cache
        if number >= self._folder:
            return
        directory = numbering.parent(number)
        position = number - directory
        for beside, node, _ in numbering.entries(directory, numbering.node(directory), position):
            digest = single_chunk(node) if node.size <= MAX_SMALL_BYTES else None
            if digest is None or node.kind != NodeType.FILE:
                yield 0
            else:
                chunks.decode_ahead(digest)
                yield beside

    def decode_directories_after(self, number: int) -> Iterator[int]:
        """Decode the trees that a walk lists after a directory into the cache; yield the number of each.

        Raise WouldBlock and the errors of reads.
        """
        if number >= self._folder:
            return iter(())
        walk = directories_after(self._numbering, self._context.tree_cache, number)
        return (directory for directory, _ in walk)

    def describe(self, number: int) -> str:
        """Return the path of a node for the log, or its number if the path cannot be found at once."""
        try:
            name = self._report(number)
            path = b".casfs/" + name if name is not None else self._numbering.path(number)
        except Exception:  # the log message is about another error; the path only helps the reader
            return f"inode {number}"
        return f"{escape_path(path) or '/'} (snapshot {short_id(self._snapshot_id)})"

    def damage(self, number: int, error: CasfsError) -> None:
        """Record that a part of a node other than its data cannot be read."""
        try:
            path = self._numbering.path(number)
        except Exception:  # the damaged tree may be the one that holds the path
            path = b"inode %d" % number
        self._damage.add_entry(path, error)

    def _report(self, number: int) -> bytes | None:
        position = number - self._folder
        if position == 0:
            return FOLDER
        return FILES[position - 1] if 0 < position <= len(FILES) else None

    def _known_facts(self, node: Node, what: bytes) -> bytes | None:
        if what == b"snapshot":
            return self._snapshot_id.hex().encode("ascii")
        captured = captured_digest(node)
        if captured is None:
            return None
        capture = capture_of(node)
        if what == b"capture":
            return CaptureState(node.state).name.lower().encode("ascii")
        if what == b"captured":
            return captured.hex().encode("ascii")
        if what == b"observed":
            seen = capture.observed if capture is not None else None
            return (seen if seen is not None else captured).hex().encode("ascii")
        if what == b"attempts":
            return b"%d" % (capture.attempts if capture is not None else 1)
        if what == b"reason":
            return reason_label(capture.reason if capture is not None else 0).encode("ascii")
        return None

    def _warn_of_changed(self, number: int) -> None:
        path = self._numbering.path(number)
        with self._lock:
            first_time = number not in self._warned
            self._warned[number] = None
            if len(self._warned) > _REMEMBERED_WARNINGS:
                self._warned.popitem(last=False)
        denied = self._context.deny_changed
        if first_time:
            log.warning(
                "%s changed while it was backed up (snapshot %s)%s",
                LoggedName(escape_path(path)),
                short_id(self._snapshot_id),
                ": opening it is denied" if denied else "; the mount shows the captured data",
            )
        if denied:
            raise RefusedError("it changed while it was backed up", errno.EIO)


def allocated_bytes(node: Node) -> int:
    """Return the bytes of a regular file that are not holes, as far as its node alone shows.

    Holes that are recorded in deeper extent lists count as data.
    """
    content = node.content
    if len(content) == _EXTENT_BYTES and (content[8] or content[8:] != HOLE):
        return node.size
    if node.levels:
        return node.size
    return sum(length for length, digest in EXTENT.iter_unpack(content) if digest != HOLE)
