"""Walk the source directories, merged with the trees of the parent snapshot in one pass.

An unchanged entry costs one `lstat` and a comparison, and keeps the node object that was read from the parent
tree; a directory whose nodes are all kept keeps its tree. One thread; no recursion.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from casfs.backup.entry_builder import EntryBuilder
from casfs.backup.exclude import Exclusions
from casfs.backup.parent import ParentCursor, is_unchanged
from casfs.backup.source_fs import (
    EntryName,
    Handle,
    RemoteHandle,
    close,
    list_names,
    make_node,
    node_type,
    open_directory,
    open_path,
    stat_entries,
    stat_entry,
    stat_open,
)
from casfs.backup.source_process import ServedMounts
from casfs.backup.sources import SourceNode
from casfs.errors import NotRegularError, TreeError
from casfs.format.tree import (
    MAX_DEPTH,
    Node,
    NodeType,
    TreeRef,
    check_entry,
    check_name,
    replace,
)
from casfs.monitor import Monitor
from casfs.paths import join
from casfs.problems import (
    marked_source,
    missing_sources,
    repository_excluded,
)
from casfs.trees.reader import TreeReader
from casfs.trees.writer import TreeWriter

_DIRECTORY = NodeType.DIRECTORY
"""A module constant: an attribute lookup in an Enum takes longer than the comparison with its result."""

_OPEN_LEVELS = 128
"""How many of the innermost directories stay open: an ordinary user can make thousands of levels."""

_KEPT_LEVELS = 64
"""How many of the outermost ones do, so that a directory moved far below them costs nothing above it."""

_REFRESH_ENTRIES = 16
"""After how many unchanged entries the table of mounts is looked at: within less than 0.1 ms."""

_STATS_AT_ONCE = 64
"""Entries of a mount in another process whose metadata are asked for in one request."""

_MAX_TYPE_CHANGES = 3
"""How often the type of an entry may change between `lstat` and open before the entry is skipped."""

NewTree = Callable[[TreeRef | None, list[Node] | None], TreeWriter]


@dataclass(slots=True)
class _Frame:
    """A directory that is being walked: its handle (None without one) and its remaining names.

    `sources` are the names to visit in a directory that only leads to sources; `covered` are names in a
    source that were named themselves, or lead to such. `served` are the names on which mounts are that may
    never answer, as of `mounts_seen`. `ahead` are the next entries of such a mount, the last one first.
    """

    node: Node
    path: bytes
    fd: Handle | None
    device: int
    names: Iterator[bytes]
    parent: ParentCursor
    tree: TreeWriter
    sources: dict[bytes, SourceNode] | None = None
    covered: dict[bytes, SourceNode] = field(default_factory=dict)
    marker: bytes | None = None
    inode: int = 0
    served: frozenset[bytes] = frozenset()
    mounts_seen: int = -1
    is_parked: bool = False
    ahead: list[tuple[bytes, os.stat_result | OSError]] = field(default_factory=list)


class Walker:
    """Walk sources into trees. Use each instance for one walk.

    `entries` builds and counts the nodes, `new_tree` begins the tree of a directory. The walk skips the
    repository's own folder, `repository_stat`, unless that is None. Into `devices` go the paths of the
    directories that are on another device than the directory above, and their devices. What is in `mounts`
    is read by other processes.
    """

    def __init__(
        self,
        entries: EntryBuilder,
        trees: TreeReader,
        new_tree: NewTree,
        exclusions: Exclusions,
        one_file_system: bool,
        repository_stat: os.stat_result | None,
        monitor: Monitor,
        devices: dict[bytes, int],
        mounts: ServedMounts,
    ) -> None:
        self._mounts = mounts
        self._mounts_seen = 0
        self._entries = entries
        self._devices = devices
        self._trees = trees
        self._new_tree = new_tree
        self._exclusions = exclusions
        self._matcher = exclusions.matcher()
        self._has_excludes = self._matcher is not None or exclusions.larger_than is not None
        self._one_file_system = one_file_system
        self._repository_stat = repository_stat
        self._monitor = monitor
        self._progress = monitor.progress

    def _is_repository(self, st: os.stat_result) -> bool:
        return self._repository_stat is not None and os.path.samestat(st, self._repository_stat)

    def walk(self, root: SourceNode, previous: Node | None) -> Node:
        """Return the root node of the new snapshot; `previous` is the root of the parent snapshot."""
        tree = previous.tree if previous is not None else None
        for path in root.covered_sources():
            try:
                stat_entry(self._mounts.above(path), path)
            except OSError as error:
                self._count_missing([path], error)
        if root.is_source:
            fd = open_directory(self._mounts.above(root.source), root.source, True)
            try:
                st = stat_open(fd)
                node = self._entries.make_node(b"", b"", st, NodeType.DIRECTORY, fd)
                self._devices[b""] = st.st_dev
                frame = self._open_frame(node, b"", fd, st, tree, root)
            except BaseException:
                close(fd)
                raise
            self._report_marker(frame)
        else:
            node = self._leading_node(b"", b"", self._mounts.above(root.source), root.source)
            frame = self._source_frame(node, b"", root, tree)
        return self._run(frame)

    def _leading_node(self, name: bytes, path: bytes, above: Handle, entry: bytes) -> Node:
        """Return the node of a directory that only leads to sources; raise OSError for another entry."""
        fd = open_path(above, entry, True)
        try:
            where = EntryName(fd, b".")
            return self._entries.make_node(name, path, stat_open(fd), NodeType.DIRECTORY, where)
        finally:
            close(fd)

    def _run(self, root: _Frame) -> Node:
        stack = [root]
        try:
            while True:
                frame = stack[-1]
                child = self._advance(frame, len(stack))
                if child is not None:
                    stack.append(child)
                    self._park(stack)
                    continue
                stack.pop()
                self._unpark(stack, frame)
                _close(frame.fd)
                node = replace(frame.node, tree=frame.tree.finish())
                if not stack:
                    return node
                try:
                    check_entry(node)
                except TreeError as error:
                    self._entries.report_failure(frame.path, error)
                    continue
                self._entries.count(node)
                stack[-1].tree.add(node)
        finally:
            for frame in stack:
                _close(frame.fd)

    def _park(self, stack: list[_Frame]) -> None:
        """Close a directory that has too many open ones below it; the way back leads through `..`."""
        if len(stack) <= _KEPT_LEVELS + _OPEN_LEVELS:
            return
        frame, below = stack[-_OPEN_LEVELS - 1], stack[-_OPEN_LEVELS]
        if isinstance(frame.fd, int) and isinstance(below.fd, int):
            close(frame.fd)
            frame.fd, frame.is_parked = None, True

    def _unpark(self, stack: list[_Frame], below: _Frame) -> None:
        """Open the directory above again, before the one below it is closed; report one that was moved."""
        if not stack or not stack[-1].is_parked:
            return
        frame = stack[-1]
        frame.is_parked = False
        try:
            if below.fd is None:
                raise _moved_error()
            fd = open_directory(below.fd, b"..")
            st = stat_open(fd)
            if (st.st_dev, st.st_ino) != (frame.device, frame.inode):
                close(fd)
                raise _moved_error()
            frame.fd = fd
        except OSError as error:
            self._entries.report_failure(frame.path, error)

    def _advance(self, frame: _Frame, depth: int) -> _Frame | None:
        """Add entries up to a directory to enter, and return its frame; None after the last entry."""
        match = frame.parent.match
        if frame.sources is not None:
            for name in frame.names:
                child = self._enter_source(frame, name, join(frame.path, name), match(name))
                if child is not None:
                    return child
            return None
        if not isinstance(frame.fd, int):
            return self._advance_remotely(frame, frame.fd, depth) if frame.fd is not None else None
        entries = self._entries
        is_plain = entries.trusts_metadata and not self._has_excludes and frame.marker is None
        countdown = 0
        for name in frame.names:
            previous = match(name)
            if countdown == 0:
                self._look_for_mounts(frame)
                countdown = _REFRESH_ENTRIES
            countdown -= 1
            if name in frame.served:
                child = self._enter_mount(frame, frame.fd, name, previous, depth)
                if child is not None:
                    return child
                continue
            try:
                st = os.stat(name, dir_fd=frame.fd, follow_symlinks=False)
            except OSError as error:
                self._entries.report_failure(join(frame.path, name), error)
                continue
            kind = node_type(st)
            if (
                previous is not None
                and kind is not _DIRECTORY
                and is_plain
                and is_unchanged(previous, st, kind)
            ):
                entries.count_unchanged(previous)
                frame.tree.add(previous)
                continue
            child = self._enter(frame, name, join(frame.path, name), st, kind, previous, depth)
            if child is not None:
                return child
            # Reading took time, in which a user may have mounted something.
            countdown = 0
        return None

    def _look_for_mounts(self, frame: _Frame) -> None:
        """Find the served mounts in a directory again, if mounts have come or gone."""
        if self._mounts.refresh():
            self._mounts_seen += 1
        if frame.mounts_seen != self._mounts_seen:
            frame.mounts_seen = self._mounts_seen
            frame.served = self._mounts.names_in(frame.device, frame.inode)

    def _enter_mount(
        self, frame: _Frame, fd: int, name: bytes, previous: Node | None, depth: int
    ) -> _Frame | None:
        """Add the root of a mount that may never answer, or return its frame, as `_enter` does."""
        path = join(frame.path, name)
        above: RemoteHandle | None = None
        try:
            above = self._mounts.directory(fd, name)
            st = stat_entry(above, name)
            remote = dataclasses.replace(frame, fd=above)
            return self._enter(remote, name, path, st, node_type(st), previous, depth)
        except OSError as error:
            self._entries.report_failure(path, error)
            return None
        finally:
            if above is not None:
                close(above)

    def _advance_remotely(self, frame: _Frame, fd: RemoteHandle, depth: int) -> _Frame | None:
        """Do what `_advance` does in a mount that another process reads, until it is given up."""
        while not fd.is_dead:
            if not frame.ahead:
                names = list(itertools.islice(frame.names, _STATS_AT_ONCE))
                if not names:
                    return None
                try:
                    frame.ahead = list(zip(names, stat_entries(fd, names), strict=True))[::-1]
                except OSError as error:
                    self._entries.report_failure(join(frame.path, names[0]), error)
                    return None
            name, st = frame.ahead.pop()
            path, previous = join(frame.path, name), frame.parent.match(name)
            if isinstance(st, OSError):
                self._entries.report_failure(path, st)
                continue
            child = self._enter(frame, name, path, st, node_type(st), previous, depth)
            if child is not None:
                return child
        return None

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
        """Add an entry, or return the frame of a directory to enter."""
        assert frame.fd is not None
        for _ in range(_MAX_TYPE_CHANGES):
            is_directory = kind is _DIRECTORY
            if self._is_excluded(frame, name, path, st, is_directory):
                return None
            if is_directory:
                if self._is_repository(st):
                    self._monitor.problem(repository_excluded(path))
                    return None
                return self._enter_directory(frame, name, path, st, previous, depth)
            try:
                node = self._entries.build(frame.fd, name, path, st, kind, previous)
                if node is not None:
                    frame.tree.add(node)
                return None
            except NotRegularError:
                pass
            try:
                st = stat_entry(frame.fd, name)
            except OSError as error:
                self._entries.report_failure(path, error)
                return None
            kind = node_type(st)
        self._entries.report_failure(path, _unstable_name_error())
        return None

    def _enter_directory(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        previous: Node | None,
        depth: int,
        source: SourceNode | None = None,
    ) -> _Frame | None:
        """Return the frame of a directory, or None after reporting why it is not entered.

        `source` is given where the directory was named.
        """
        if previous is not None and previous.tree is None:
            previous = None
        assert frame.fd is not None
        tree = previous.tree if previous is not None else None
        entry = name if source is None else os.path.basename(source.source)
        source = source if source is not None else frame.covered.get(name)
        foreign = self._one_file_system and st.st_dev != frame.device
        if foreign and source is not None and source.is_source:
            foreign = False
        fd: Handle | None = None
        try:
            check_name(name)
            if depth >= MAX_DEPTH:
                # Readers refuse even an empty directory there.
                raise TreeError(f"it is nested more than {MAX_DEPTH} directories deep")
            # Another process may have exchanged the name since its `lstat`: metadata and entries are
            # those of the directory that was opened.
            fd = open_path(frame.fd, entry) if foreign else open_directory(frame.fd, entry)
            st = stat_open(fd)
            if self._is_repository(st):
                close(fd)
                self._monitor.problem(repository_excluded(path))
                return None
            if st.st_dev != frame.device and not foreign:
                self._devices[path] = st.st_dev
                foreign = self._one_file_system and (source is None or not source.is_source)
            if previous is not None and is_unchanged(previous, st, NodeType.DIRECTORY):
                node = previous
            else:
                where = EntryName(fd, b".") if foreign else fd
                node = self._entries.make_node(name, path, st, NodeType.DIRECTORY, where)
            if foreign:
                close(fd)
                fd = None
            if foreign and source is not None:
                return self._source_frame(node, path, source, tree)
            child = self._open_frame(node, path, fd, st, tree, source)
            if frame.marker is not None:
                # The directory is itself the marker of its parent: it is kept without its entries.
                child.names = iter(())
            return child
        except (OSError, TreeError) as error:
            _close(fd)
            self._entries.report_failure(path, error)
            if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
                return None
            node = make_node(name, st, NodeType.DIRECTORY, ())
            return _Frame(
                node,
                path,
                None,
                st.st_dev,
                iter(()),
                ParentCursor(self._trees, None),
                self._new_tree(None, None),
            )

    def _open_frame(
        self,
        node: Node,
        path: bytes,
        fd: Handle | None,
        st: os.stat_result,
        tree: TreeRef | None,
        source: SourceNode | None = None,
    ) -> _Frame:
        names = list_names(fd) if fd is not None else []
        marker = self._exclusions.marker_of(names, fd) if names and fd is not None else None
        previous = ParentCursor(self._trees, tree)
        writer = self._new_tree(previous.ref, previous.single)
        writer.reuse_leaves(previous.leaf_from)
        frame = _Frame(node, path, fd, st.st_dev, iter(names), previous, writer, marker=marker)
        frame.inode = st.st_ino
        if source is not None:
            frame.covered = source.children
        self._progress.path = path
        return frame

    def _source_frame(
        self, node: Node, path: bytes, source: SourceNode, tree: TreeRef | None
    ) -> _Frame:
        previous = ParentCursor(self._trees, tree)
        names = iter(sorted(source.children))
        writer = self._new_tree(previous.ref, previous.single)
        return _Frame(node, path, None, -1, names, previous, writer, source.children)

    def _enter_source(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        previous: Node | None,
        types_seen: int = 1,
    ) -> _Frame | None:
        """Add a named source, or return the frame of a directory: a source or one that leads to some."""
        assert frame.sources is not None
        source = frame.sources[name]
        folder = os.path.dirname(source.source) or b"."
        try:
            above = open_directory(self._mounts.above(source.source), folder, True)
        except OSError as error:
            self._report_missing(source, error)
            return None
        try:
            entry = os.path.basename(source.source)
            st = stat_entry(above, entry, not source.is_source)
            kind = node_type(st)
            parent = _Frame(
                frame.node, frame.path, above, st.st_dev, iter(()), frame.parent, frame.tree
            )
            if source.is_source and kind != NodeType.DIRECTORY:
                added = self._entries.build(above, name, path, st, kind, previous)
                if added is not None:
                    frame.tree.add(added)
                return None
            if source.is_source:
                if self._is_repository(st):
                    self._monitor.problem(repository_excluded(path))
                    return None
                self._devices[path] = st.st_dev
                child = self._enter_directory(parent, name, path, st, previous, 1, source)
                self._report_marker(child)
                return child
            if kind != NodeType.DIRECTORY:
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
            tree = previous.tree if previous is not None else None
            node = self._leading_node(name, path, above, entry)
            return self._source_frame(node, path, source, tree)
        except NotRegularError:
            if types_seen < _MAX_TYPE_CHANGES:
                return self._enter_source(frame, name, path, previous, types_seen + 1)
            self._entries.report_failure(path, _unstable_name_error())
            return None
        except OSError as error:
            self._report_missing(source, error)
            return None
        finally:
            close(above)

    def _report_marker(self, frame: _Frame | None) -> None:
        """Report a named directory whose marker excludes all its other entries."""
        if frame is not None and frame.marker is not None:
            self._monitor.problem(marked_source(frame.path, frame.marker))

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

    def _report_missing(self, source: SourceNode, error: OSError) -> None:
        self._count_missing(source.sources(), error)

    def _count_missing(self, sources: Iterable[bytes], error: OSError) -> None:
        stats = self._entries.stats
        for problem in missing_sources(sources, error):
            stats.missing_sources.append(problem.path)
            stats.unreadable += 1
            self._monitor.problem(problem)


def _close(fd: Handle | None) -> None:
    if fd is not None:
        close(fd)


def _moved_error() -> OSError:
    return OSError(
        errno.ESTALE, "a directory in it was moved during the backup; the rest of it is missing"
    )


def _unstable_name_error() -> OSError:
    return OSError(errno.ESTALE, "its type changed at every attempt to open it")
