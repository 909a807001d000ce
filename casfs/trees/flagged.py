"""Flagged files: those that changed while they were captured, found without looking anywhere else.

Every tree and every piece of a split directory tells how many there are below it, so that only the ways
to them are read. What a summary tells wrongly is found by a check, not here.
"""

from __future__ import annotations

from collections.abc import Iterator

from casfs.errors import TreeError
from casfs.format.tree import MAX_DEPTH, MAX_PIECE_LEVELS, Kind, Node, State, TreeRef
from casfs.trees.reader import TreeReader, join


def is_flagged(node: Node) -> bool:
    """Tell whether an entry is a file whose captured content may be a mixture."""
    return node.kind == Kind.FILE and node.state == State.CHANGED


def flagged_files(trees: TreeReader, root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    """Yield the flagged files at or below `root`, which is at `path`, with their paths and in order.

    Raises BlobError and TreeError where a tree on the way is damaged.
    """
    if root.tree is None:
        if is_flagged(root):
            yield path, root
        return
    if not root.tree.flagged:
        return
    first: Iterator[Node | tuple[bytes, TreeRef]] = iter(trees.piece(root.tree))
    stack = [(path, 1, 0, first)]
    while stack:
        above, depth, level, items = stack[-1]
        for item in items:
            if isinstance(item, Node):
                ref = item.tree
                below, below_depth, below_level = join(above, item.name), depth + 1, 0
                if ref is None and is_flagged(item):
                    yield below, item
            else:
                ref = item[1]
                below, below_depth, below_level = above, depth, level + 1
            if ref is not None and ref.flagged:
                check_depth(below_depth, below_level)
                stack.append((below, below_depth, below_level, iter(trees.piece(ref))))
                break
        else:
            stack.pop()


def check_depth(depth: int, level: int) -> None:
    """Raise TreeError where directories, or the pieces of one, lie deeper than the format allows."""
    if depth > MAX_DEPTH:
        raise TreeError(f"directories lie more than {MAX_DEPTH} deep")
    if level > MAX_PIECE_LEVELS:
        raise TreeError("a directory is split more often than the format allows")


def flagged_below(node: Node) -> int:
    """Return how many flagged files an entry stands for, without reading anything."""
    ref: TreeRef | None = node.tree
    return int(is_flagged(node)) if ref is None else ref.flagged
