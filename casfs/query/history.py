"""Versions: what one path held in many snapshots, told by digests alone.

The path is looked up in each snapshot and nothing below it is read. Two snapshots have the same version
of a file when content and state of the capture are equal, of a directory when the digests of their
trees are. A way through trees that were met before is not read again. Used by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from casfs.digest import SnapshotId
from casfs.errors import IntegrityError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node
from casfs.trees.reader import TreeReader

Found = tuple[SnapshotId, Snapshot]


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a path: the node in the first of the snapshots that have it, and those in order."""

    node: Node
    snapshots: tuple[Found, ...]


class PathLookup:
    """Looks one path up in one snapshot after the other; below equal trees only once."""

    def __init__(self, trees: TreeReader, path: bytes) -> None:
        self._trees = trees
        self._names = [name for name in path.split(b"/") if name]
        self._known: dict[tuple[int, bytes], Node | None] = {}

    def find(self, root: Node) -> Node | None:
        """Return the node at the path below a root, or None; raises what reading trees raises."""
        node: Node | None = root
        passed: list[tuple[int, bytes]] = []
        for depth, name in enumerate(self._names):
            tree = node.tree if node is not None else None
            if tree is None:
                node = None
                break
            key = depth, tree.digest
            if key in self._known:
                node = self._known[key]
                break
            passed.append(key)
            node = self._trees.lookup(tree, name)
        for key in passed:
            self._known[key] = node
        return node


def path_history(
    trees: TreeReader,
    snapshots: Iterable[Found],
    path: bytes,
    on_damage: Callable[[SnapshotId, IntegrityError], None],
) -> list[Version]:
    """Return the distinct versions of a path in snapshots that come in order, the earliest first.

    Snapshots without the path have no part in it. One in which the way to it is damaged is told to
    `on_damage` and left out.
    """
    finder = PathLookup(trees, path)
    nodes: dict[tuple[object, ...], Node] = {}
    holders: dict[tuple[object, ...], list[Found]] = {}
    for snapshot_id, snapshot in snapshots:
        try:
            node = finder.find(snapshot.root)
        except IntegrityError as error:
            on_damage(snapshot_id, error)
            continue
        if node is not None:
            identity = _identity(node)
            nodes.setdefault(identity, node)
            holders.setdefault(identity, []).append((snapshot_id, snapshot))
    return [Version(node, tuple(holders[identity])) for identity, node in nodes.items()]


def _identity(node: Node) -> tuple[object, ...]:
    """Return what two nodes have in common when they are the same version."""
    if node.tree is not None:
        return node.kind, node.tree.digest
    rdev = node.extra.rdev if node.extra is not None else 0
    return node.kind, node.size, node.content, node.captured, node.state, rdev
