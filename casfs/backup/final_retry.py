"""Retry the capture of files in state `changed` at the end of a backup, when writers may have finished.

The retry descends into the trees of the walk whose summaries count `changed` files, and rewrites a tree
where a capture has a new result. Memory holds one directory of each level. One thread; no recursion.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from casfs.backup.capture import Capturer
from casfs.backup.source_fs import open_directory
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
    """A directory with changed files below it; `fd` is -1 where it has vanished or only leads to sources."""

    node: Node
    path: bytes
    fd: int
    device: int
    nodes: Iterator[Node]
    tree: TreeWriter
    sources: dict[bytes, SourceNode] | None = None


class FinalRetry:
    """Capture the changed files of one walk again. Use each instance for one backup.

    The trees of the walk must be readable from `trees`. Files that are still in state `changed` are reported
    to `monitor`. `devices` are those of the walk.
    """

    def __init__(
        self,
        capturer: Capturer,
        trees: TreeReader,
        new_tree: NewTree,
        monitor: Monitor,
        devices: Mapping[bytes, int],
    ) -> None:
        self._devices = devices
        self._capturer = capturer
        self._trees = trees
        self._new_tree = new_tree
        self._monitor = monitor
        self._links: dict[tuple[int, int], Node] = {}

    def run(self, root: Node, source: SourceNode) -> Node:
        """Return the root with every new capture; `source` is the source tree of the walk."""
        fd, device = -1, self._devices.get(b"", -1)
        if source.is_source:
            fd = _open_same(None, source.source, root, device, follow=True)
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
        self, node: Node, path: bytes, fd: int, device: int, source: SourceNode | None
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
            fd = _open_same(frame.fd, node.name, node, device) if frame.fd >= 0 else -1
            return self._frame(node, path, fd, device, None)
        source = frame.sources.get(node.name)
        if source is None or not source.is_source:
            return self._frame(node, path, -1, device, source)
        above = _open_above(source)
        try:
            entry = os.path.basename(source.source)
            fd = _open_same(above, entry, node, device) if above >= 0 else -1
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
            above = _open_above(source)
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

    def _capture(self, fd: int, node: Node) -> Node | None:
        return self._capturer.capture_again(fd, node) if fd >= 0 else None


def _open_above(source: SourceNode) -> int:
    """Open the directory of a source; return -1 where it has vanished."""
    try:
        return open_directory(None, os.path.dirname(source.source) or b".", follow=True)
    except OSError:
        return -1


def _open_same(
    dir_fd: int | None, name: bytes, node: Node, device: int, follow: bool = False
) -> int:
    """Open a directory that the walk visited; return -1 where it has vanished, been replaced or changed.

    A file is stored below the owner and the mode that the walk saw, so they must still be those of its
    directory.
    """
    try:
        fd = open_directory(dir_fd, name, follow)
    except OSError:
        return -1
    st = os.fstat(fd)
    seen = (device, node.inode, node.uid, node.gid, node.mode)
    if seen != (st.st_dev, st.st_ino, st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)):
        os.close(fd)
        return -1
    return fd


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
