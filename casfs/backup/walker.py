"""The walk: directories of the source and the trees of the previous snapshot, merged in one pass.

An unchanged entry costs one `lstat` and a comparison, and its node is the very object that was read from
the previous tree; a directory whose nodes all are so keeps its tree. One thread; no recursion.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from casfs.backup.capture import Capturer
from casfs.backup.exclude import Exclusions
from casfs.backup.parent import ParentCursor, is_unchanged
from casfs.backup.source_fs import (
    list_names,
    make_node,
    node_type,
    open_directory,
    proc_fd_path,
    read_xattrs,
)
from casfs.backup.sources import SourceNode
from casfs.errors import NotRegularError
from casfs.format.tree import (
    MAX_DEPTH,
    CaptureState,
    ChangeReason,
    Node,
    NodeType,
    TreeRef,
    capture_of,
    captured_digest,
    replace,
)
from casfs.monitor import Monitor
from casfs.paths import join
from casfs.problems import (
    backup_failed,
    marked_source,
    missing_sources,
    repository_excluded,
    silent_change,
    unstable_capture,
)
from casfs.trees.reader import TreeReader
from casfs.trees.writer import TreeWriter

if TYPE_CHECKING:
    from casfs.backup.file_cache import FileCache

_MAX_LINKS = 100_000
"""Hard-linked files remembered at a time; one that was forgotten is read again and stores nothing."""

_FILE, _DIRECTORY = NodeType.FILE, NodeType.DIRECTORY
"""Looked up once: to ask a class of names for one takes longer than to compare it."""

_MAX_TYPE_CHANGES = 3
"""What a name may turn into while it is looked at, before it is given up."""

NewTree = Callable[[TreeRef | None, list[Node] | None], TreeWriter]


@dataclass(slots=True)
class WalkStats:
    """What a walk met."""

    files: int = 0
    directories: int = 0
    others: int = 0
    unchanged: int = 0
    unreadable: int = 0
    vanished: int = 0
    missing_sources: int = 0
    silently_changed: int = 0


@dataclass(slots=True)
class _Frame:
    """A directory that is being walked: its descriptor (-1: none is needed) and what is left of it."""

    node: Node
    path: bytes
    fd: int
    device: int
    names: Iterator[bytes]
    parent: ParentCursor
    tree: TreeWriter
    sources: dict[bytes, SourceNode] | None = None
    marker: bytes | None = None


@dataclass(slots=True)
class _Link:
    node: Node
    left: int = field(default=1)


class Walker:
    """Walk sources into trees; used once.

    `left_out` is the repository's own folder; `is_stored` tells whether an unchanged file's content is
    still there (None: it must be). With `reread` it is read all the same. `tell_changed` is false where
    a last look follows, which tells of the files that are still flagged then. `memory` is asked for files
    where there is no previous snapshot to be read.
    """

    def __init__(
        self,
        capturer: Capturer,
        trees: TreeReader,
        new_tree: NewTree,
        exclusions: Exclusions,
        one_file_system: bool,
        left_out: os.stat_result,
        is_stored: Callable[[Node], bool] | None,
        monitor: Monitor,
        reread: bool = False,
        tell_changed: bool = True,
        memory: FileCache | None = None,
    ) -> None:
        self.stats = WalkStats()
        self.uids: set[int] = set()
        self.gids: set[int] = set()
        self.new_tree = new_tree
        self._capturer = capturer
        self._trees = trees
        self._exclusions = exclusions
        self._matcher = exclusions.matcher()
        self._has_excludes = self._matcher is not None or exclusions.larger_than is not None
        self._one_file_system = one_file_system
        self._repository_stat = left_out
        self._is_stored = is_stored if not reread else lambda _: False
        self._reread = reread
        self._report_changed = tell_changed
        self._file_cache = memory
        self._monitor = monitor
        self._progress = monitor.progress
        self._links: dict[tuple[int, int], _Link] = {}

    def walk(self, root: SourceNode, previous: Node | None) -> Node:
        """Return the root node of the snapshot of all places."""
        st = os.stat(root.source)
        node = make_node(b"", st, NodeType.DIRECTORY, self._xattrs(root.source, b""))
        tree = previous.tree if previous is not None else None
        if root.is_source:
            fd = open_directory(None, root.source, follow=True)
            frame = self._open_frame(node, b"", fd, st, tree, root)
            self._report_marker(frame)
        else:
            frame = self._source_frame(node, b"", root, tree)
        return self._run(frame)

    def count(self, node: Node) -> None:
        """Count an entry that goes into the snapshot."""
        if node.kind == _FILE:
            progress = self._progress
            self.stats.files += 1
            progress.files += 1
            progress.done_bytes += node.size
        elif node.kind == _DIRECTORY:
            self.stats.directories += 1
        else:
            self.stats.others += 1
        self.uids.add(node.uid)
        self.gids.add(node.gid)

    def _run(self, root: _Frame) -> Node:
        stack = [root]
        try:
            while True:
                frame = stack[-1]
                child = self._advance(frame, len(stack))
                if child is not None:
                    stack.append(child)
                    continue
                stack.pop()
                if frame.fd >= 0:
                    os.close(frame.fd)
                node = replace(frame.node, tree=frame.tree.finish())
                if not stack:
                    return node
                self.count(node)
                stack[-1].tree.add(node)
        finally:
            for frame in stack:
                if frame.fd >= 0:
                    os.close(frame.fd)

    def _advance(self, frame: _Frame, depth: int) -> _Frame | None:
        """Handle entries of a directory until one is a directory to go into; None when all are done."""
        take = frame.parent.match
        if frame.sources is not None:
            for name in frame.names:
                child = self._enter_source(frame, name, join(frame.path, name), take(name))
                if child is not None:
                    return child
            return None
        is_trusting = self._is_stored is None and not self._has_excludes and frame.marker is None
        for name in frame.names:
            previous = take(name)
            try:
                st = os.stat(name, dir_fd=frame.fd, follow_symlinks=False)
            except OSError as error:
                self._failed(join(frame.path, name), error)
                continue
            kind = node_type(st)
            if (
                previous is not None
                and kind is not _DIRECTORY
                and is_trusting
                and is_unchanged(previous, st, kind)
            ):
                self._add_unchanged(frame, previous)
                continue
            child = self._enter(frame, name, join(frame.path, name), st, kind, previous, depth)
            if child is not None:
                return child
        return None

    def _add_unchanged(self, frame: _Frame, node: Node) -> None:
        """Add an entry that is what it was in the previous snapshot."""
        self.stats.unchanged += node.kind == _FILE
        self.count(node)
        frame.tree.add(node)

    def _enter(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        kind: NodeType | None,
        previous: Node | None,
        depth: int,
    ) -> _Frame | None:
        """Add an entry, or return the frame of a directory to go into."""
        for _ in range(_MAX_TYPE_CHANGES):
            is_directory = kind is _DIRECTORY
            if self._is_excluded(frame, name, path, st, is_directory):
                return None
            if is_directory:
                if os.path.samestat(st, self._repository_stat):
                    self._monitor.problem(repository_excluded(path))
                    return None
                return self._enter_directory(frame, name, path, st, previous, depth)
            try:
                self._add_entry(frame, name, path, st, kind, previous)
                return None
            except NotRegularError:
                pass
            try:
                st = os.stat(name, dir_fd=frame.fd, follow_symlinks=False)
            except OSError as error:
                self._failed(path, error)
                return None
            kind = node_type(st)
        self._failed(path, _unstable_name_error())
        return None

    def _enter_directory(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        previous: Node | None,
        depth: int,
    ) -> _Frame | None:
        if previous is not None and previous.tree is None:
            previous = None
        foreign = self._one_file_system and st.st_dev != frame.device
        fd = -1
        try:
            if depth >= MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, f"it lies more than {MAX_DEPTH} directories deep")
            if not foreign:
                fd = open_directory(frame.fd, name)
            if previous is not None and is_unchanged(previous, st, NodeType.DIRECTORY):
                node = previous
            else:
                where = fd if fd >= 0 else proc_fd_path(frame.fd, name)
                node = make_node(name, st, NodeType.DIRECTORY, read_xattrs(where))
            child = self._open_frame(
                node, path, fd, st, previous.tree if previous is not None else None
            )
            if frame.marker is not None:
                # Only a marker gets here, and one that is a directory marks without what is in it.
                child.names = iter(())
            return child
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            self._failed(path, error)
            if isinstance(error, FileNotFoundError):
                return None
            node = make_node(name, st, NodeType.DIRECTORY, ())
            return _Frame(
                node,
                path,
                -1,
                st.st_dev,
                iter(()),
                ParentCursor(self._trees, None),
                self.new_tree(None, None),
            )

    def _open_frame(
        self,
        node: Node,
        path: bytes,
        fd: int,
        st: os.stat_result,
        tree: TreeRef | None,
        place: SourceNode | None = None,
    ) -> _Frame:
        names = list_names(fd) if fd >= 0 else []
        marker = self._exclusions.marker_of(names, fd) if names else None
        previous = ParentCursor(self._trees, tree)
        writer = self.new_tree(previous.ref, previous.single)
        frame = _Frame(node, path, fd, st.st_dev, iter(names), previous, writer, None, marker)
        self._progress.path = path
        return frame

    def _source_frame(
        self, node: Node, path: bytes, place: SourceNode, tree: TreeRef | None
    ) -> _Frame:
        previous = ParentCursor(self._trees, tree)
        names = iter(sorted(place.children))
        writer = self.new_tree(previous.ref, previous.single)
        return _Frame(node, path, -1, -1, names, previous, writer, place.children)

    def _enter_source(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        previous: Node | None,
        meanings: int = 1,
    ) -> _Frame | None:
        """Add what a user named, or return the frame of a directory on the way there or of it."""
        assert frame.sources is not None
        place = frame.sources[name]
        try:
            above = open_directory(None, os.path.dirname(place.source) or b".", follow=True)
        except OSError as error:
            self._missing(place, error)
            return None
        try:
            entry = os.path.basename(place.source)
            st = os.stat(entry, dir_fd=above, follow_symlinks=not place.is_source)
            kind = node_type(st)
            parent = _Frame(
                frame.node, frame.path, above, st.st_dev, iter(()), frame.parent, frame.tree
            )
            if place.is_source and kind != NodeType.DIRECTORY:
                self._add_entry(parent, name, path, st, kind, previous)
                return None
            if place.is_source:
                if os.path.samestat(st, self._repository_stat):
                    self._monitor.problem(repository_excluded(path))
                    return None
                child = self._enter_directory(parent, name, path, st, previous, 1)
                self._report_marker(child)
                return child
            if kind != NodeType.DIRECTORY:
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
            tree = previous.tree if previous is not None else None
            node = make_node(name, st, NodeType.DIRECTORY, self._xattrs(place.source, path))
            return self._source_frame(node, path, place, tree)
        except NotRegularError:
            if meanings < _MAX_TYPE_CHANGES:
                return self._enter_source(frame, name, path, previous, meanings + 1)
            self._failed(path, _unstable_name_error())
            return None
        except OSError as error:
            self._missing(place, error)
            return None
        finally:
            os.close(above)

    def _report_marker(self, frame: _Frame | None) -> None:
        """Report a named directory of which a marker leaves out everything else."""
        if frame is not None and frame.marker is not None:
            self._monitor.problem(marked_source(frame.path, frame.marker))

    def _add_entry(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        kind: NodeType | None,
        previous: Node | None,
    ) -> None:
        if kind is None:
            self._failed(
                path, OSError(errno.EOPNOTSUPP, "it is of a kind that casfs does not know")
            )
            return
        if previous is None and self._file_cache is not None and kind == NodeType.FILE:
            previous = self._file_cache.get(path, st)
        if (
            previous is not None
            and is_unchanged(previous, st, kind)
            and (self._is_stored is None or kind is not _FILE or self._is_stored(previous))
        ):
            self._add_unchanged(frame, previous)
            return
        try:
            if kind is _FILE:
                node = self._read_file(frame, name, path, st)
            else:
                where = proc_fd_path(frame.fd, name)
                target = os.readlink(name, dir_fd=frame.fd) if kind == NodeType.SYMLINK else b""
                node = make_node(name, st, kind, read_xattrs(where), target)
        except OSError as error:
            self._failed(path, error)
            return
        if self._reread and previous is not None and kind is _FILE:
            self._compare(path, previous, node, st)
        self.count(node)
        frame.tree.add(node)

    def _compare(self, path: bytes, previous: Node, node: Node, st: os.stat_result) -> None:
        """Tell of a file that was read although it seemed unchanged, and was not."""
        if not (
            is_unchanged(previous, st, NodeType.FILE) and is_unchanged(node, st, NodeType.FILE)
        ):
            return
        if captured_digest(previous) == captured_digest(node):
            self.stats.unchanged += 1
            return
        self.stats.silently_changed += 1
        self._monitor.problem(silent_change(path, previous, node))

    def _read_file(self, frame: _Frame, name: bytes, path: bytes, st: os.stat_result) -> Node:
        if st.st_nlink > 1:
            key = (st.st_dev, st.st_ino)
            link = self._links.get(key)
            if link is not None and is_unchanged(link.node, st, NodeType.FILE):
                link.left -= 1
                if link.left <= 1:
                    del self._links[key]
                return replace(link.node, name=name)
        self._progress.path = path
        node = self._capturer.capture(frame.fd, name)
        if node.extra is not None:
            self._report_capture(path, node)
        if self._file_cache is not None:
            self._file_cache.put(path, node)
        if node.nlink > 1:
            if len(self._links) >= _MAX_LINKS:
                self._links.pop(next(iter(self._links)))
            self._links[st.st_dev, st.st_ino] = _Link(node, node.nlink)
        return node

    def _report_capture(self, path: bytes, node: Node) -> None:
        capture = capture_of(node)
        if capture is not None and capture.reason == ChangeReason.VANISHED:
            self.stats.vanished += 1
        if node.state == CaptureState.CHANGED and not self._report_changed:
            return
        problem = unstable_capture(path, node)
        if problem is not None:
            self._monitor.problem(problem)

    def _is_excluded(
        self, frame: _Frame, name: bytes, path: bytes, st: os.stat_result, is_directory: bool
    ) -> bool:
        if frame.marker is not None and name != frame.marker:
            return True
        if not self._has_excludes:
            return False
        if self._exclusions.excludes_file(st):
            return True
        return self._matcher is not None and self._matcher.matches(path, is_directory)

    def _xattrs(self, source: bytes, path: bytes) -> tuple[tuple[bytes, bytes], ...]:
        try:
            return read_xattrs(source)
        except OSError as error:
            self._failed(path, error)
            return ()

    def _failed(self, path: bytes, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            self.stats.vanished += 1
        else:
            self.stats.unreadable += 1
        self._monitor.problem(backup_failed(path, error))

    def _missing(self, place: SourceNode, error: OSError) -> None:
        for problem in missing_sources(place.sources(), error):
            self.stats.missing_sources += 1
            self.stats.unreadable += 1
            self._monitor.problem(problem)


def _unstable_name_error() -> OSError:
    return OSError(errno.ESTALE, "it turns into something else whenever it is looked at")
