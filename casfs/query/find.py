"""Finding entries by name in many snapshots, reading each distinct tree once where it holds nothing.

Snapshots share most of their trees. A tree below which nothing fits is remembered by its digest, and
is not read again in the next snapshot; the others lie on the way to what is found. Damaged
directories are told to the monitor and left out. Used by one thread.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass

from casfs.digest import digest_of
from casfs.errors import IntegrityError
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.paths import join
from casfs.trees.reader import TreeReader, check_depth, is_flagged

MAX_REMEMBERED = 250_000
"""Trees remembered as holding nothing, some 40 MB. Later ones are not: a walk that begins again with
the same trees would otherwise push out each just before it is asked for."""


@dataclass(frozen=True, slots=True)
class Query:
    """What fits; a condition that is None, False or left out holds for everything.

    `pattern` is a shell glob for the name, or for the whole path in the snapshot when it has a `/`.
    Its `*` matches slashes too; a slash at the beginning is ignored.
    """

    pattern: str | None = None
    ignore_case: bool = False
    kinds: frozenset[NodeType] | None = None
    only_flagged: bool = False


@dataclass(slots=True)
class _Frame:
    """A tree piece that is being looked through."""

    path: bytes
    depth: int
    level: int
    key: bytes
    items: Iterator[Node | tuple[bytes, TreeRef]]
    no_match: bool = True


class Finder:
    """Look through one snapshot after the other for the same thing."""

    def __init__(self, trees: TreeReader, query: Query, monitor: Monitor) -> None:
        self._trees = trees
        self._query = query
        self._monitor = monitor
        self._barren: set[bytes] = set()
        self._by_path = query.pattern is not None and "/" in query.pattern
        self._match = None
        if query.pattern is not None:
            flags = re.IGNORECASE if query.ignore_case else re.NOFLAG
            text = query.pattern.lstrip("/") if self._by_path else query.pattern
            self._match = re.compile(fnmatch.translate(text), flags).match

    def find(self, root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """Yield what fits below `root`, which is at `path`: a directory before what is in it.

        A root that is no directory is looked at itself.
        """
        if root.tree is None:
            if self._fits(path.rpartition(b"/")[0], root):
                yield path, root
            return
        frame = self._open(path, root.tree, 1, 0)
        stack = [frame] if frame is not None else []
        while stack:
            frame = stack[-1]
            child = None
            for item in frame.items:
                if isinstance(item, Node):
                    if self._fits(frame.path, item):
                        frame.no_match = False
                        yield join(frame.path, item.name), item
                    if item.tree is None:
                        continue
                    below = join(frame.path, item.name)
                    child = self._open(below, item.tree, frame.depth + 1, 0)
                else:
                    child = self._open(frame.path, item[1], frame.depth, frame.level + 1)
                if child is not None:
                    stack.append(child)
                    break
            if child is None:
                stack.pop()
                self._leave(frame, stack[-1] if stack else None)

    def _open(self, path: bytes, ref: TreeRef, depth: int, level: int) -> _Frame | None:
        """Return the frame of a tree piece, or None where there is nothing to find in it."""
        if self._query.only_flagged and not ref.flagged:
            return None
        key = digest_of(ref.digest + path) if self._by_path else ref.digest
        if key in self._barren:
            return None
        try:
            check_depth(depth, level)
            return _Frame(path, depth, level, key, iter(self._trees.piece(ref)))
        except IntegrityError as error:
            self._remember(key)
            message = f"the directory cannot be read whole: {error}"
            self._monitor.problem(Problem(ProblemKind.DAMAGED, path, message))
            return None

    def _leave(self, frame: _Frame, above: _Frame | None) -> None:
        if frame.no_match:
            self._remember(frame.key)
        elif above is not None:
            above.no_match = False

    def _remember(self, key: bytes) -> None:
        if len(self._barren) < MAX_REMEMBERED:
            self._barren.add(key)

    def _fits(self, above: bytes, node: Node) -> bool:
        query = self._query
        if query.only_flagged and not is_flagged(node):
            return False
        if query.kinds is not None and node.kind not in query.kinds:
            return False
        if self._match is None:
            return True
        text = join(above, node.name) if self._by_path else node.name
        return self._match(text.decode("utf-8", "surrogateescape")) is not None
