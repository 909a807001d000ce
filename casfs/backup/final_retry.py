"""Retry the capture of files in state `changed` at the end of a backup, when writers may have finished.

The retry descends into the trees of the walk whose summaries count `changed` files, and rewrites a tree
where a capture has a new result. Memory holds one directory of each level. One thread; no recursion.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from casfs.backup.capture import Capturer
from casfs.backup.source_fs import Handle, close, open_directory, stat_open
from casfs.backup.source_process import ServedMounts
from casfs.backup.sources import SourceNode
from casfs.backup.walker import NewTree
from casfs.format.tree import Node, replace, source_inode
from casfs.monitor import Monitor
from casfs.paths import join
from casfs.problems import unstable_capture
from casfs.trees.reader import TreeReader, is_flagged
from casfs.trees.writer import TreeWriter

_MAX_LINKS = 100_000


@dataclass(slots=True)
class _Frame:
    """A directory with changed files below it; `fd` is None if it vanished or only leads to sources."""

    node: Node
    path: bytes
    fd: Handle | None
    device: int
    nodes: Iterator[Node]
    tree: TreeWriter
    sources: dict[bytes, SourceNode] | None = None


class FinalRetry:
    """Capture the changed files of one walk again. Use each instance for one backup.

    The trees of the walk must be readable from `trees`. Files that are still in state `changed` are reported
    to `monitor`. `devices` are those of the walk.
    What is in `mounts` is read by other processes.
    """

    def __init__(
        self,
        capturer: Capturer,
        trees: TreeReader,
        new_tree: NewTree,
        monitor: Monitor,
        devices: Mapping[bytes, int],
        mounts: ServedMounts,
    ) -> None:
        self._mounts = mounts
        self._devices = devices
        self._capturer = capturer
        self._trees = trees
        self._new_tree = new_tree
        self._monitor = monitor
        self._links: dict[tuple[int, int], Node] = {}

    def run(self, root: Node, source: SourceNode) -> Node:
        """Return the root with every new capture; `source` is the source tree of the walk."""
        fd, device = None, self._devices.get(b"", -1)
        if source.is_source:
            above = self._mounts.above(source.source)
            fd = _open_same(above, source.source, root, device, follow=True)
        stack = [self._frame(root, b"", fd, device, source)]
        try:
            while True:
                frame = stack[-1]
                child = self._advance(frame)
                if child is not None:
                    stack.append(child)
                    continue
                stack.pop()
                _close(frame.fd)
                node = replace(frame.node, tree=frame.tree.finish())
                if not stack:
                    return node
                stack[-1].tree.add(node)
        finally:
            for frame in stack:
                _close(frame.fd)

    def _frame(
        self, node: Node, path: bytes, fd: Handle | None, device: int, source: SourceNode | None
    ) -> _Frame:
        assert node.tree is not None
        single = self._trees.unsplit_entries(node.tree)
        nodes = iter(single) if single is not None else self._trees.nodes(node.tree)
        tree = self._new_tree(node.tree, single)
        sources = source.children if source is not None and not source.is_source else None
        return _Frame(node, path, fd, device, nodes, tree, sources)

    def _advance(self, frame: _Frame) -> _Frame | None:
        """Copy entries up to a directory to enter, and return its frame; None after the last entry."""
        for node in frame.nodes:
            path = join(frame.path, node.name)
            if node.tree is not None and node.tree.flagged:
                return self._enter(frame, path, node)
            if is_flagged(node):
                node = self._retry(frame, path, node)
            frame.tree.add(node)
        return None

    def _enter(self, frame: _Frame, path: bytes, node: Node) -> _Frame:
        device = self._devices.get(path, frame.device)
        if frame.sources is None:
            with self._above(frame.fd, node.name) as above:
                fd = _open_same(above, node.name, node, device)
            return self._frame(node, path, fd, device, None)
        source = frame.sources.get(node.name)
        if source is None or not source.is_source:
            return self._frame(node, path, None, device, source)
        above = self._open_above(source)
        try:
            entry = os.path.basename(source.source)
            fd = _open_same(above, entry, node, device)
        finally:
            _close(above)
        return self._frame(node, path, fd, device, source)

    def _retry(self, frame: _Frame, path: bytes, node: Node) -> Node:
        """Return a new capture of a file, or the old node without one, and report its state."""
        self._monitor.progress.path = path
        key = source_inode(node)
        found = self._links.get(key) if key is not None else None
        if found is not None:
            found = replace(found, name=node.name)
        elif frame.sources is None:
            found = self._capture(frame.fd, node)
        elif (source := frame.sources.get(node.name)) is not None:
            above = self._open_above(source)
            try:
                found = self._capture(above, node)
            finally:
                _close(above)
        if found is None:
            found = node
        elif source_inode(found) == key is not None and len(self._links) < _MAX_LINKS:
            self._links[key] = found
        problem = unstable_capture(path, found)
        if problem is not None:
            self._monitor.problem(problem)
        return found

    def _capture(self, fd: Handle | None, node: Node) -> Node | None:
        with self._above(fd, node.name) as above:
            return self._capturer.capture_again(above, node) if above is not None else None

    @contextmanager
    def _above(self, fd: Handle | None, name: bytes) -> Iterator[Handle | None]:
        """Yield the handle of a directory for the use of an entry, on which a served mount may be."""
        self._mounts.refresh()
        if not isinstance(fd, int) or not self._mounts.is_mountpoint(fd, name):
            yield fd
            return
        above: Handle | None = None
        try:
            above = self._mounts.directory(fd, name)
        except OSError:
            pass  # it was given up during the walk, which reported that
        try:
            yield above
        finally:
            _close(above)

    def _open_above(self, source: SourceNode) -> Handle | None:
        """Open the directory of a source; return None where it has vanished."""
        try:
            above = self._mounts.above(source.source)
            return open_directory(above, os.path.dirname(source.source) or b".", True)
        except OSError:
            return None


def _open_same(
    above: Handle | None, name: bytes, node: Node, device: int, follow: bool = False
) -> Handle | None:
    """Open a directory that the walk visited; return None where it vanished, was replaced or changed.

    A file is stored below the owner and the mode that the walk saw, so they must still be those of its
    directory.
    """
    if above is None:
        return None
    try:
        fd = open_directory(above, name, follow)
        st = stat_open(fd)
    except OSError:
        return None
    seen = (device, node.inode, node.uid, node.gid, node.mode)
    if seen != (st.st_dev, st.st_ino, st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)):
        close(fd)
        return None
    return fd


def _close(fd: Handle | None) -> None:
    if fd is not None:
        close(fd)
