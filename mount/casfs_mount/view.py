"""A synchronous view of one snapshot as a file system, which knows nothing of FUSE.

Everything is asked by number (see `casfs_mount.inodes`) and answered with nodes, those of the snapshot and
those of its `.casfs` folder alike. Safe to share between threads; the one that must not wait gets
WouldBlock wherever something has to be read first.
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
from casfs_mount.file_reader import FileReader, Readable
from casfs_mount.inodes import Numbering
from casfs_mount.prefetch import Prefetcher
from casfs_mount.report_files import FILES, FOLDER, ReportFiles
from casfs_mount.tree_cache import TreeCache

log = logging.getLogger(__name__)

REPORT_NUMBERS = 8
"""Numbers after those of a snapshot's nodes that its `.casfs` folder has to itself."""

_VIRTUAL_XATTRS = b"user.casfs."
_REMEMBERED_WARNINGS = 10_000


class RefusedError(CasfsError):
    """What was asked for is there and not given; `errno` is what a program is told."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.errno = code


class View(Protocol):
    """What the file system shows; numbers are always those by position."""

    def node(self, number: int) -> Node:
        """Return the node with a number; raises StaleError."""

    def parent(self, number: int) -> int:
        """Return the number of the directory that holds a node; the root's is its own."""

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a directory's entry, or None."""

    def entries(self, number: int, place: int) -> Iterator[tuple[int, Node, int]]:
        """Yield number, node and the place after it of a directory's entries from a place on."""

    def xattr(self, number: int, name: bytes) -> bytes | None:
        """Return an extended attribute, or None."""

    def xattr_names(self, number: int) -> list[bytes]:
        """Return the names of a node's own extended attributes."""

    def open(self, number: int) -> Readable:
        """Return a reader of a regular file; raises RefusedError."""

    def range_start(self, number: int) -> int:
        """Return where the range of numbers begins that holds a number."""

    def is_immutable(self, number: int) -> bool:
        """Tell whether a node, and what is in a directory, stays the same as long as the mount."""

    def statfs_totals(self) -> tuple[int, int]:
        """Return bytes and entries of all that is shown."""

    def on_readdir(self, number: int, waited: bool) -> None:
        """Tell that a directory is listed from its beginning, and whether that has to wait."""

    def on_open(self, number: int, waited: bool) -> None:
        """Tell that a file is read from its beginning, and whether that has to wait."""

    def describe(self, number: int) -> str:
        """Return what a number is, for the log; never fails and never waits."""

    def damage(self, number: int, error: CasfsError) -> None:
        """Remember that something of a node other than a range of its bytes cannot be read."""


@dataclass(frozen=True, slots=True)
class MountContext:
    """What all views of one mount share."""

    repository: Repository
    blobs: BlobReader
    pieces: TreeCache
    chunks: ChunkCache
    waiting: EventLoopGuard
    errands: BackgroundPool
    deny_changed: bool = False


class SnapshotView:
    """One snapshot, or a directory of it, with its numbers from `first` on."""

    def __init__(
        self,
        sources: MountContext,
        snapshot_id: SnapshotId,
        snapshot: Snapshot,
        root: Node,
        first: int,
    ) -> None:
        self._sources = sources
        self._snapshot_id = snapshot_id
        self._numbers = Numbering(root, first, sources.pieces)
        self._foresight = Prefetcher(self._numbers, sources.pieces, sources.blobs, sources.errands)
        self._first = first
        self._folder = self._numbers.end
        self._damage = DamageLog()
        self._reports = ReportFiles(
            snapshot_id, snapshot, root, sources.repository.trees, self._damage, sources.waiting
        )
        self._root = root
        self._lock = threading.Lock()
        self._warned: OrderedDict[int, None] = OrderedDict()

    def node(self, number: int) -> Node:
        """Return the node with a number; raises StaleError."""
        if self._folder <= number < self._folder + REPORT_NUMBERS:
            name = self._report(number)
            if name is not None:
                return self._reports.node(name)
        return self._numbers.node(number)

    def parent(self, number: int) -> int:
        """Return the number of the directory that holds a node; the root's is its own."""
        if number >= self._folder:
            return self._first if number == self._folder else self._folder
        return self._numbers.parent(number)

    def lookup(self, number: int, name: bytes) -> tuple[int, Node] | None:
        """Return a directory's entry; `.casfs` at the root is there when no real one is."""
        if number >= self._folder:
            if number == self._folder and name in FILES:
                return self._folder + 1 + FILES.index(name), self._reports.node(name)
            return None
        found = self._numbers.child(number, self._numbers.node(number), name)
        if found is None and name == FOLDER and number == self._first:
            return self._folder, self._reports.node(FOLDER)
        return found

    def entries(self, number: int, place: int) -> Iterator[tuple[int, Node, int]]:
        """Yield number, node and the place after it of a directory's entries from a place on."""
        if number == self._folder:
            for i in range(place, len(FILES)):
                yield self._folder + 1 + i, self._reports.node(FILES[i]), i + 1
        elif number < self._folder:
            yield from self._numbers.entries(number, self._numbers.node(number), place)

    def xattr(self, number: int, name: bytes) -> bytes | None:
        """Return a node's own attribute of that name, else what casfs knows under that name."""
        node = self.node(number)
        if node.extra is not None:
            for own, value in node.extra.xattrs:
                if own == name:
                    return value
        if name.startswith(_VIRTUAL_XATTRS):
            return self._known_facts(node, name[len(_VIRTUAL_XATTRS) :])
        return None

    def xattr_names(self, number: int) -> list[bytes]:
        """Return the names of a node's own attributes; those of casfs are not listed."""
        node = self.node(number)
        return [] if node.extra is None else [name for name, _ in node.extra.xattrs]

    def open(self, number: int) -> Readable:
        """Return a reader of a regular file; a changed one is told in the log once, or refused."""
        if number >= self._folder:
            name = self._report(number)
            if name is None or name == FOLDER:
                raise RefusedError("it is a directory", errno.EISDIR)
            return self._reports.open(name)
        node = self._numbers.node(number)
        if node.kind != NodeType.FILE:
            raise RefusedError("it is not a regular file", errno.EINVAL)
        if node.state == CaptureState.CHANGED:
            self._warn_of_changed(number)
        return FileReader(
            node,
            self._sources.chunks,
            lambda begin, length, error: self._damage.add_range(
                self._numbers.path(number), begin, length, error
            ),
        )

    def range_start(self, number: int) -> int:
        """Return where the range of numbers begins that holds a number."""
        return self._first

    def is_immutable(self, number: int) -> bool:
        """Tell whether what is said of a number stays true: all but `.casfs` does."""
        return number < self._folder

    def statfs_totals(self) -> tuple[int, int]:
        """Return bytes and entries of the snapshot."""
        tree = self._root.tree
        return (0, 1) if tree is None else (tree.total_bytes, tree.nodes + 1)

    def on_readdir(self, number: int, waited: bool) -> None:
        """Tell that a directory is listed from its beginning, and whether that has to wait."""
        if number < self._folder:
            self._foresight.on_readdir(number, waited)

    def on_open(self, number: int, waited: bool) -> None:
        """Tell that a file is read from its beginning, and whether that has to wait."""
        if number < self._folder:
            self._foresight.on_open(number, waited)

    def describe(self, number: int) -> str:
        """Return the path of a node for the log, or its number where that cannot be told at once."""
        try:
            name = self._report(number)
            path = b".casfs/" + name if name is not None else self._numbers.path(number)
        except Exception:  # the path is a courtesy; what is being told is another error
            return f"inode {number}"
        return f"{escape_path(path) or '/'} (snapshot {short_id(self._snapshot_id)})"

    def damage(self, number: int, error: CasfsError) -> None:
        """Remember that something of a node other than a range of its bytes cannot be read."""
        try:
            path = self._numbers.path(number)
        except Exception:  # the tree that would tell the path may be what is damaged
            path = b"inode %d" % number
        self._damage.add_entry(path, error)

    def _report(self, number: int) -> bytes | None:
        place = number - self._folder
        if place == 0:
            return FOLDER
        return FILES[place - 1] if 0 < place <= len(FILES) else None

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
        path = self._numbers.path(number)
        with self._lock:
            first_time = number not in self._warned
            self._warned[number] = None
            if len(self._warned) > _REMEMBERED_WARNINGS:
                self._warned.popitem(last=False)
        denied = self._sources.deny_changed
        if first_time:
            log.warning(
                "%s changed while it was backed up (snapshot %s)%s",
                escape_path(path),
                short_id(self._snapshot_id),
                ": opening it is denied" if denied else "; what was captured is shown",
            )
        if denied:
            raise RefusedError("it changed while it was backed up", errno.EIO)


def allocated_bytes(node: Node) -> int:
    """Return how much of a regular file is not a hole, as far as its node tells.

    What lists of chunks further down say about holes is not looked up.
    """
    content = node.content
    if node.levels or (len(content) == EXTENT.size and content[8:] != HOLE):
        return node.size
    return sum(length for length, digest in EXTENT.iter_unpack(content) if digest != HOLE)
