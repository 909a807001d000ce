"""Build the nodes of entries other than directories: compare with the parent, read, count and report.

A file with several hard links is read once, as long as its links are remembered. One thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from casfs.backup.capture import Capturer
from casfs.backup.parent import is_unchanged
from casfs.backup.source_fs import EntryName, Handle, make_node, read_link, xattrs_of
from casfs.errors import TreeError
from casfs.format.tree import (
    CaptureState,
    ChangeReason,
    Node,
    NodeType,
    capture_of,
    captured_digest,
    check_entry,
    replace,
)
from casfs.monitor import EntryChange, Monitor
from casfs.problems import backup_failed, silent_change, unread_xattrs, unstable_capture

if TYPE_CHECKING:
    from casfs.backup.file_cache import FileCache

_MAX_LINKS = 100_000
"""Hard-linked files remembered at a time. A file beyond the limit is read again and stores no data."""

_FILE, _DIRECTORY, _NEW = NodeType.FILE, NodeType.DIRECTORY, EntryChange.NEW
"""Module constants: an attribute lookup in an Enum takes longer than the comparison with its result."""


@dataclass(slots=True)
class WalkStats:
    """Counts of the entries of one walk; `files` are `new`, `modified` or `unchanged`."""

    files: int = 0
    new: int = 0
    modified: int = 0
    directories: int = 0
    others: int = 0
    unchanged: int = 0
    unreadable: int = 0
    vanished: int = 0
    silently_changed: int = 0
    missing_sources: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Link:
    """A captured file with hard links; `left` is the number of links not yet visited, and one."""

    node: Node
    left: int = field(default=1)


class EntryBuilder:
    """Build the nodes of one walk. Use each instance for one walk.

    `is_stored` returns whether the content of an unchanged file is still stored (None: it is known to be).
    With `reread`, unchanged files are read all the same and compared. `report_changed` is false where a
    final retry follows, which reports the files that are then still in state `changed`. `file_cache` finds
    files where the parent snapshot cannot be read.
    """

    def __init__(
        self,
        capturer: Capturer,
        monitor: Monitor,
        is_stored: Callable[[Node], bool] | None,
        reread: bool = False,
        report_changed: bool = True,
        file_cache: FileCache | None = None,
    ) -> None:
        self.stats = WalkStats()
        self.uids: set[int] = set()
        self.gids: set[int] = set()
        self._capturer = capturer
        self._monitor = monitor
        self._progress = monitor.progress
        self._is_stored = is_stored if not reread else lambda _: False
        self._reread = reread
        self._report_changed = report_changed
        self._file_cache = file_cache
        self._links: dict[tuple[int, int], _Link] = {}

    @property
    def trusts_metadata(self) -> bool:
        """Return whether every entry with unchanged metadata is unchanged and stored."""
        return self._is_stored is None

    def build(
        self,
        above: Handle,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        kind: NodeType | None,
        previous: Node | None,
    ) -> Node | None:
        """Return the counted node of an entry, or None after reporting why it cannot be backed up.

        `previous` is the entry's node in the parent snapshot. Raises NotRegularError where the name no
        longer refers to a regular file.
        """
        if kind is None:
            self.report_failure(path, OSError(errno.EOPNOTSUPP, "its file type is not supported"))
            return None
        if previous is None and self._file_cache is not None and kind == NodeType.FILE:
            previous = self._file_cache.get(path, st)
        if (
            previous is not None
            and is_unchanged(previous, st, kind)
            and (self._is_stored is None or kind is not _FILE or self._is_stored(previous))
        ):
            self.count_unchanged(previous)
            return previous
        try:
            if kind is _FILE:
                node = self._read_file(above, name, path, st)
            else:
                target = read_link(above, name) if kind == NodeType.SYMLINK else b""
                node = self.make_node(name, path, st, kind, EntryName(above, name), target)
            check_entry(node)
        except (OSError, TreeError) as error:
            self.report_failure(path, error)
            return None
        if self._reread and previous is not None and kind is _FILE:
            self._compare(path, previous, node, st)
        elif kind is _FILE:
            self.count_difference(path, previous)
        self.count(node)
        return node

    def make_node(
        self,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        kind: NodeType,
        where: Handle | EntryName,
        content: bytes = b"",
    ) -> Node:
        """Return the node of an entry that is not a regular file, with the xattrs that can be read.

        `where` is the open entry, or its name in an open directory. Xattrs that cannot be read are reported,
        and the next backup does not trust the entry as unchanged, so that it reports them too.
        """
        xattrs, error = xattrs_of(where)
        node = make_node(name, st, kind, xattrs, content)
        if error is None:
            return node
        self._report_xattrs(path, error)
        return replace(node, racy=True)

    def count(self, node: Node) -> None:
        """Count an entry of the new snapshot."""
        if node.kind == _FILE:
            progress = self._progress
            self.stats.files += 1
            progress.items += 1
            progress.finish_file(node.size)
        elif node.kind == _DIRECTORY:
            self.stats.directories += 1
        else:
            self.stats.others += 1
        self.uids.add(node.uid)
        self.gids.add(node.gid)

    def count_unchanged(self, node: Node) -> None:
        """Count an entry that is equal to the entry in the parent snapshot."""
        self.stats.unchanged += node.kind == _FILE
        self.count(node)

    def count_difference(self, path: bytes, previous: Node | None) -> None:
        """Count and report a file that the parent snapshot lacks, or has with other metadata."""
        if previous is None or previous.kind != _FILE:
            self.stats.new += 1
            self._monitor.entry(path, _NEW)
        else:
            self.stats.modified += 1
            self._monitor.entry(path, EntryChange.MODIFIED)

    def report_failure(self, path: bytes, error: OSError | TreeError) -> None:
        """Count and report an entry that is missing from the snapshot or incomplete."""
        if isinstance(error, FileNotFoundError):
            self.stats.vanished += 1
        else:
            self.stats.unreadable += 1
        self._monitor.problem(backup_failed(path, error))

    def _report_xattrs(self, path: bytes, error: OSError) -> None:
        self.stats.unreadable += 1
        self._monitor.problem(unread_xattrs(path, error))

    def _read_file(self, above: Handle, name: bytes, path: bytes, st: os.stat_result) -> Node:
        if st.st_nlink > 1:
            key = (st.st_dev, st.st_ino)
            link = self._links.get(key)
            if link is not None and is_unchanged(link.node, st, NodeType.FILE):
                link.left -= 1
                if link.left <= 1:
                    del self._links[key]
                return replace(link.node, name=name)
        self._progress.path = path
        node = self._capturer.capture(
            above, name, on_xattr_error=lambda error: self._report_xattrs(path, error)
        )
        if node.extra is not None:
            self._report_capture(path, node)
        if self._file_cache is not None:
            self._file_cache.put(path, node)
        if node.nlink > 1:
            if len(self._links) >= _MAX_LINKS:
                self._links.pop(next(iter(self._links)))
            self._links[st.st_dev, st.st_ino] = _Link(node, node.nlink)
        return node

    def _compare(self, path: bytes, previous: Node, node: Node, st: os.stat_result) -> None:
        """Report a file whose content changed while its metadata did not."""
        if not (
            is_unchanged(previous, st, NodeType.FILE) and is_unchanged(node, st, NodeType.FILE)
        ):
            self.count_difference(path, previous)
            return
        if captured_digest(previous) == captured_digest(node):
            self.stats.unchanged += 1
            return
        self.count_difference(path, previous)
        self.stats.silently_changed += 1
        self._monitor.problem(silent_change(path, previous, node))

    def _report_capture(self, path: bytes, node: Node) -> None:
        capture = capture_of(node)
        if capture is not None and capture.reason == ChangeReason.VANISHED:
            self.stats.vanished += 1
        if node.state == CaptureState.CHANGED and not self._report_changed:
            return
        problem = unstable_capture(path, node)
        if problem is not None:
            self._monitor.problem(problem)
