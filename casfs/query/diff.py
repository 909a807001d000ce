"""Compare two trees by reading both in parallel, in the order of their names.

Directories with equal digests, and equal pieces of split directories, are skipped without being read. Memory
holds one piece of each side for each level of the trees. Inode numbers, link counts and ctimes are not
compared: they differ in a copied tree. One thread; no recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from casfs.errors import IntegrityError, TreeError
from casfs.format.tree import Node, NodeExtra, NodeType, TreeRef, captured_digest
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.paths import join, split
from casfs.trees.reader import TreeReader
from casfs.trees.walk import check_depth

_NO_EXTRA = NodeExtra()


class ChangeKind(StrEnum):
    """How an entry differs; METADATA where its content is equal, TYPE where its type differs."""

    ADDED = "added"
    REMOVED = "removed"
    MODIFIED = "modified"
    METADATA = "metadata"
    TYPE = "type"


@dataclass(frozen=True, slots=True)
class Change:
    """An entry that differs; `path` is relative to the compared roots.

    `fields` are the names of the differing fields of an entry that both sides have. `before` is None for an
    added entry, `after` for a removed one.
    """

    kind: ChangeKind
    path: bytes
    before: Node | None
    after: Node | None
    fields: tuple[str, ...] = ()


class Differ:
    """Compare trees of one repository; damaged directories are reported to the monitor and skipped.

    The mtime of the directories in `ancestors` is not compared: they only lead to the sources of a backup,
    and their mtime changes with entries outside the backup.
    """

    def __init__(
        self, trees: TreeReader, monitor: Monitor, ancestors: frozenset[bytes] = frozenset()
    ) -> None:
        self._trees = trees
        self._monitor = monitor
        self._ancestors = ancestors

    def changes(self, before: Node, after: Node) -> Iterator[Change]:
        """Yield the changes from `before` to `after`, a directory before its entries.

        The path of the roots is b"" where one of them is a directory, else the name of `after`.
        """
        path = b"" if before.tree is not None or after.tree is not None else after.name
        change = self._compare(path, before, after)
        if change is not None:
            yield change
        stack = [(path, _pairs(self._trees, before.tree, after.tree))]
        while stack:
            above, pairs = stack[-1]
            try:
                check_depth(len(stack), 0)
                pair = next(pairs, None)
            except IntegrityError as error:
                message = f"the directory cannot be compared completely: {error}"
                self._monitor.problem(Problem(ProblemKind.DAMAGED, above, message))
                pair = None
            if pair is None:
                stack.pop()
                continue
            old, new = pair
            present = new if new is not None else old
            assert present is not None
            path = join(above, present.name)
            change = self._compare(path, old, new)
            if change is not None:
                yield change
            old_tree = old.tree if old is not None else None
            new_tree = new.tree if new is not None else None
            if _differ(old_tree, new_tree):
                stack.append((path, _pairs(self._trees, old_tree, new_tree)))

    def _compare(self, path: bytes, before: Node | None, after: Node | None) -> Change | None:
        if before is None:
            return Change(ChangeKind.ADDED, path, None, after)
        if after is None:
            return Change(ChangeKind.REMOVED, path, before, None)
        if before.kind != after.kind:
            return Change(ChangeKind.TYPE, path, before, after, ("kind",))
        content = _content_fields(before, after)
        metadata = _metadata_fields(before, after)
        if path in self._ancestors and "mtime" in metadata:
            metadata.remove("mtime")
        if not (content or metadata):
            return None
        kind = ChangeKind.MODIFIED if content else ChangeKind.METADATA
        return Change(kind, path, before, after, (*content, *metadata))


def ancestor_dirs(paths: tuple[bytes, ...], above: bytes) -> frozenset[bytes]:
    """Return the directories that only lead to the source paths of a snapshot.

    The returned paths are relative to `above`, the compared part of the snapshot.
    """
    sources = [split(path) for path in paths]
    base = split(above)
    found = set()
    for parts in sources:
        for count in range(len(base), len(parts)):
            ancestor = parts[:count]
            is_compared = ancestor[: len(base)] == base
            if is_compared and not any(ancestor[: len(other)] == other for other in sources):
                found.add(b"/".join(ancestor[len(base) :]))
    return frozenset(found)


def _content_fields(before: Node, after: Node) -> list[str]:
    fields = []
    if before.kind == NodeType.FILE:
        if before.size != after.size:
            fields.append("size")
        if captured_digest(before) != captured_digest(after):
            fields.append("content")
    elif before.kind == NodeType.SYMLINK:
        if before.content != after.content:
            fields.append("target")
    elif (before.extra or _NO_EXTRA).rdev != (after.extra or _NO_EXTRA).rdev:
        fields.append("rdev")
    return fields


def _metadata_fields(before: Node, after: Node) -> list[str]:
    fields = []
    if before.mode != after.mode:
        fields.append("mode")
    if before.uid != after.uid:
        fields.append("uid")
    if before.gid != after.gid:
        fields.append("gid")
    if before.mtime_ns != after.mtime_ns:
        fields.append("mtime")
    if (before.extra or _NO_EXTRA).xattrs != (after.extra or _NO_EXTRA).xattrs:
        fields.append("xattrs")
    return fields


def _differ(before: TreeRef | None, after: TreeRef | None) -> bool:
    if before is None or after is None:
        return before is not after
    return before.digest != after.digest


class _Side:
    """A cursor over the entries of one directory in order; `name` is None at the end.

    The next item is a `node` of this name, or a `piece` that was not read, whose names are all at or after
    `name`.
    """

    __slots__ = ("_last", "_stack", "_trees", "name", "node", "piece")

    def __init__(self, trees: TreeReader, ref: TreeRef | None) -> None:
        self.name: bytes | None = None if ref is None else b""
        self.node: Node | None = None
        self.piece = ref
        self._trees = trees
        self._stack: list[Iterator[Node | tuple[bytes, TreeRef]]] = []
        self._last = b""

    def expand(self) -> None:
        """Read the piece, and move to its first item."""
        assert self.piece is not None
        check_depth(0, len(self._stack))
        self._stack.append(iter(self._trees.piece(self.piece)))
        self.advance()

    def advance(self) -> None:
        """Move past the next item."""
        self.name = self.node = self.piece = None
        while self._stack:
            item = next(self._stack[-1], None)
            if item is None:
                self._stack.pop()
                continue
            if isinstance(item, Node):
                if item.name <= self._last:
                    raise TreeError("the pieces of a split directory are not in order")
                self.name = self._last = item.name
                self.node = item
            else:
                self.name, self.piece = item
            return


def _pairs(
    trees: TreeReader, before_ref: TreeRef | None, after_ref: TreeRef | None
) -> Iterator[tuple[Node | None, Node | None]]:
    """Yield the entries of two directories in pairs by name; a missing entry is None.

    Entries of pieces that both directories share are skipped.
    """
    before, after = _Side(trees, before_ref), _Side(trees, after_ref)
    while before.name is not None or after.name is not None:
        old, new = before.piece, after.piece
        if old is not None and new is not None and old.digest == new.digest:
            before.advance()
            after.advance()
            continue
        # None sorts last: a side at its end waits for the other side.
        before_first = after.name is None or (before.name is not None and before.name <= after.name)
        after_first = before.name is None or (after.name is not None and after.name <= before.name)
        if before_first and before.piece is not None:
            before.expand()
        elif after_first and after.piece is not None:
            after.expand()
        else:
            yield before.node if before_first else None, after.node if after_first else None
            if before_first:
                before.advance()
            if after_first:
                after.advance()
