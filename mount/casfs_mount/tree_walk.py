"""The directories of a snapshot in the order in which programs such as find and cp walk them.

That is the order of the entries, which is the order of the inode numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from casfs.format.tree import Node
from casfs_mount.inodes import Numbering
from casfs_mount.tree_cache import TreeCache


def directories_after(
    numbering: Numbering, tree_cache: TreeCache, start: int
) -> Iterator[tuple[int, Node]]:
    """Yield number and node of each directory that a walk lists after `start`, once its tree is cached.

    The directories in `start` come first, then those after it in its parent, then those after its parent.
    Raise WouldBlock and the errors of reads.
    """
    way = numbering.path_to(start)
    stack = [_entries_after(numbering, *way[-1], 0)]
    for (above, parent), (below, _) in pairwise(way):
        stack.insert(-1, _entries_after(numbering, above, parent, below - above))
    while stack:
        for number, node in stack[-1]:
            if node.tree is None:
                continue
            if not tree_cache.holds(node.tree):
                tree_cache.get(node.tree)
            yield number, node
            stack.append(_entries_after(numbering, number, node, 0))
            break
        else:
            stack.pop()


def _entries_after(
    numbering: Numbering, number: int, directory: Node, position: int
) -> Iterator[tuple[int, Node]]:
    return ((number, node) for number, node, _ in numbering.entries(number, directory, position))
