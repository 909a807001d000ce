"""Arrange the named sources of a backup as one tree below the root of the snapshot.

An absolute path keeps all its components, a relative path is kept as given. `..` is resolved first, and a
relative path that leads out of the current directory becomes absolute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from casfs.display import escape_path
from casfs.errors import UsageError
from casfs.paths import normalize_source_path


@dataclass(slots=True)
class SourceNode:
    """A source, or a directory that only leads to sources.

    `is_source` marks a source: the entry and everything below it is backed up. `source` is its path in
    the file system.
    """

    source: bytes
    is_source: bool = False
    children: dict[bytes, SourceNode] = field(default_factory=dict)

    def sources(self) -> Iterator[bytes]:
        """Yield the paths of the sources at and below this node; what is below a source belongs to it."""
        stack = [self]
        while stack:
            node = stack.pop()
            if node.is_source:
                yield node.source
            else:
                stack += node._children_backwards()

    def covered_sources(self) -> Iterator[bytes]:
        """Yield the paths of the sources that lie in other sources."""
        stack = [(self, False)]
        while stack:
            node, is_covered = stack.pop()
            if is_covered and node.is_source:
                yield node.source
            is_covered = is_covered or node.is_source
            stack += [(child, is_covered) for child in node._children_backwards()]

    def _children_backwards(self) -> list[SourceNode]:
        return [self.children[name] for name in sorted(self.children, reverse=True)]


def _is_directory_link(path: bytes) -> bool:
    return os.path.islink(path) and os.path.isdir(path)


def build_source_tree(
    paths: list[bytes], is_directory_link: Callable[[bytes], bool] = _is_directory_link
) -> SourceNode:
    """Return the root of the tree of sources for the paths that a user named.

    Raises UsageError where two different sources would get the same path in the snapshot, such as `/etc/x`
    and a relative `etc/x`.
    """
    kept = [normalize_source_path(path) for path in paths]
    absolute = any(path.startswith(b"/") for path in kept)
    root = SourceNode(b"/" if absolute else b".")
    for named, path in zip(paths, kept, strict=True):
        node = root
        source = b"/" if path.startswith(b"/") else b""
        for name in _names(path):
            source = os.path.join(source, name)
            node = node.children.setdefault(name, SourceNode(source))
        if not node.is_source:
            node.source = source or b"."
            node.is_source = True
        if named.endswith((b"/", b"/.")) and is_directory_link(path):
            # As for rsync and tar: a slash at the end means the directory that a link leads to.
            node.source = os.path.join(path, b".")
    for path in kept:
        _refuse_same_snapshot_path(root, path)
    return root


def _refuse_same_snapshot_path(root: SourceNode, path: bytes) -> None:
    node = root
    names = _names(path)
    for depth in range(len(names) + 1):
        if node.is_source:
            source = os.path.normpath(os.path.join(node.source, *names[depth:]))
            if source != path and os.path.abspath(source) != os.path.abspath(path):
                raise UsageError(
                    f"{escape_path(node.source)} and {escape_path(path)} are different sources "
                    "with the same path in the snapshot; back them up separately"
                )
        if depth < len(names):
            node = node.children[names[depth]]


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]
