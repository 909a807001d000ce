"""Rewrite a tree: the same directories with other entries, without recursion and with bounded depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casfs.format.tree import Node, TreeRef, replace
from casfs.paths import join
from casfs.trees.walk import check_depth
from casfs.trees.writer import TreeWriter


@dataclass(slots=True)
class _Frame:
    """A directory that is being rewritten; `node` has its old tree."""

    node: Node
    path: bytes
    entries: Iterator[Node]
    tree: TreeWriter


def rewrite_tree(
    root: Node,
    path: bytes,
    *,
    entries: Callable[[Node, bytes], Iterator[Node]],
    new_tree: Callable[[TreeRef], TreeWriter],
    change: Callable[[Node, bytes], Node | None],
    known: Callable[[TreeRef], TreeRef | None],
    on_tree: Callable[[TreeRef, TreeRef], None] | None = None,
) -> Node:
    """Return the directory `root`, which is at `path`, with a new tree.

    `entries` yields the entries of a directory, `new_tree` returns a writer for the new tree of one. `change`
    returns the new node of an entry, or None to leave it out; a directory keeps its old tree in it. Where
    `known` returns the new tree of a directory, nothing below it is visited. `on_tree` is called with the old
    and the new tree of every directory that was rewritten. Raises TreeError for directories that are nested
    too deeply, and what the callbacks raise.
    """
    assert root.tree is not None
    stack = [_Frame(root, path, entries(root, path), new_tree(root.tree))]
    while True:
        frame = stack[-1]
        for entry in frame.entries:
            below = join(frame.path, entry.name)
            node = change(entry, below)
            if node is None:
                continue
            if node.tree is None:
                frame.tree.add(node)
                continue
            tree = known(node.tree)
            if tree is not None:
                frame.tree.add(replace(node, tree=tree))
                continue
            check_depth(len(stack) + 1, 0)
            stack.append(_Frame(node, below, entries(node, below), new_tree(node.tree)))
            break
        else:
            stack.pop()
            new = frame.tree.finish()
            assert frame.node.tree is not None
            if on_tree is not None:
                on_tree(frame.node.tree, new)
            done = replace(frame.node, tree=new)
            if not stack:
                return done
            stack[-1].tree.add(done)
