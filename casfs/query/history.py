"""The history of one path: its distinct versions in many snapshots, by digests alone.

The path is looked up in each snapshot, and nothing below it is read. Two snapshots have the same version of a
file if content and capture state are equal, and of a directory if the digests of its tree are equal. Trees
that were already visited are not read again. Used by one thread.
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
    """A version of a path: the snapshots that have it, in order, and the node in the first of them."""

    node: Node
    snapshots: tuple[Found, ...]


class PathLookup:
    """Look up one path in one snapshot after the other, below equal trees only once."""

    def __init__(self, trees: TreeReader, path: bytes) -> None:
        self._trees = trees
        self._names = [name for name in path.split(b"/") if name]
        self._known: dict[tuple[int, bytes], Node | None] = {}

    def find(self, root: Node) -> Node | None:
        """Return the node at the path below a root, or None; raise IntegrityError for a damaged tree."""
        node: Node | None = root
        visited: list[tuple[int, bytes]] = []
        for depth, name in enumerate(self._names):
            tree = node.tree if node is not None else None
            if tree is None:
                node = None
                break
            key = depth, tree.digest
            if key in self._known:
                node = self._known[key]
                break
            visited.append(key)
            node = self._trees.lookup(tree, name)
        for key in visited:
            self._known[key] = node
        return node


def path_history(
    trees: TreeReader,
    snapshots: Iterable[Found],
    path: bytes,
    on_damage: Callable[[SnapshotId, IntegrityError], None],
) -> list[Version]:
    """Return the distinct versions of a path in `snapshots`, in the order of the snapshots.

    Snapshots without the path are skipped. So are snapshots with a damaged tree on the path, which go to
    `on_damage`.
    """
    lookup = PathLookup(trees, path)
    nodes: dict[tuple[object, ...], Node] = {}
    holders: dict[tuple[object, ...], list[Found]] = {}
    for snapshot_id, snapshot in snapshots:
        try:
            node = lookup.find(snapshot.root)
        except IntegrityError as error:
            on_damage(snapshot_id, error)
            continue
        if node is not None:
            identity = _identity(node)
            nodes.setdefault(identity, node)
            holders.setdefault(identity, []).append((snapshot_id, snapshot))
    return [Version(node, tuple(holders[identity])) for identity, node in nodes.items()]


def _identity(node: Node) -> tuple[object, ...]:
    """Return a key that is equal for nodes of the same version."""
    if node.tree is not None:
        return node.kind, node.tree.digest
    rdev = node.extra.rdev if node.extra is not None else 0
    return node.kind, node.size, node.content, node.captured, node.state, rdev
