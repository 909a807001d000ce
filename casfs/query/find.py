"""Find entries by name in many snapshots, and read each distinct tree without a match only once.

Snapshots share most of their trees. A tree without a match below it is remembered by its digest and not read
again in the next snapshot; the other trees lead to a match. Damaged directories are reported to the monitor
and skipped. Used by one thread.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass

from casfs.digest import digest_of
from casfs.errors import CasfsError, IntegrityError
from casfs.format.tree import Node, NodeType
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.paths import join
from casfs.trees.reader import TreeReader, is_flagged
from casfs.trees.walk import Children, Page, walk_pages

MAX_REMEMBERED = 250_000
"""Limit of the remembered trees, about 40 MB. Further trees are not remembered: evicting old ones would not
help, because a walk of the next snapshot meets the same trees in the same order, and each would be evicted
just before its use."""


@dataclass(frozen=True, slots=True)
class Query:
    """The conditions of a search; a condition that is None or False matches every entry.

    `pattern` is a shell glob for the name, or for the whole path in the snapshot if it contains a `/`.
    Its `*` matches slashes too; a leading slash is ignored. A limit of the size selects regular files only.
    `newer_than_ns` compares the time of modification, in nanoseconds since 1970.
    """

    pattern: str | None = None
    ignore_case: bool = False
    kinds: frozenset[NodeType] | None = None
    only_flagged: bool = False
    min_bytes: int = 0
    max_bytes: int | None = None
    newer_than_ns: int | None = None

    def has_conditions(self) -> bool:
        """Return whether any condition is set, so that not every entry matches."""
        return self != Query(ignore_case=self.ignore_case)


class Finder:
    """Search one snapshot after the other for the same query."""

    def __init__(
        self,
        trees: TreeReader,
        query: Query,
        monitor: Monitor,
        *,
        max_remembered: int = MAX_REMEMBERED,
    ) -> None:
        self._max_remembered = max_remembered
        self._trees = trees
        self._query = query
        self._monitor = monitor
        self._no_match: set[bytes] = set()
        self._by_path = query.pattern is not None and "/" in query.pattern
        self._match = None
        if query.pattern is not None:
            flags = re.IGNORECASE if query.ignore_case else re.NOFLAG
            text = query.pattern.lstrip("/") if self._by_path else query.pattern
            self._match = re.compile(fnmatch.translate(text), flags).match

    def find(self, root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """Yield the matches below `root`, which is at `path`; a directory comes before its entries.

        A root that is not a directory is itself compared with the query.
        """
        if root.tree is None:
            if self._matches(path.rpartition(b"/")[0], root):
                yield path, root
            return
        for page, node in walk_pages(path, root.tree, self._read, self._leave, self._damaged):
            if self._matches(page.path, node):
                page.is_marked = True
                yield join(page.path, node.name), node

    def _read(self, page: Page) -> Children | None:
        """Return the children of a page, or None where an earlier search found no match in it."""
        if self._query.only_flagged and not page.ref.flagged:
            return None
        if self._key(page) in self._no_match:
            return None
        return self._trees.children(page.ref)

    def _leave(self, page: Page) -> None:
        """Record a page without a match; a match marks the pages above it."""
        if not page.is_marked:
            self._remember(self._key(page))
        elif page.above is not None:
            page.above.is_marked = True

    def _damaged(self, page: Page, error: CasfsError) -> None:
        if not isinstance(error, IntegrityError):
            raise error
        self._remember(self._key(page))
        message = f"the directory cannot be read completely: {error}"
        self._monitor.problem(Problem(ProblemKind.DAMAGED, page.path, message))

    def _key(self, page: Page) -> bytes:
        """Return the key of a page: pages with equal keys have equal matches."""
        return digest_of(page.ref.digest + page.path) if self._by_path else page.ref.digest

    def _remember(self, key: bytes) -> None:
        if len(self._no_match) < self._max_remembered:
            self._no_match.add(key)

    def _matches(self, above: bytes, node: Node) -> bool:
        query = self._query
        if query.only_flagged and not is_flagged(node):
            return False
        if query.kinds is not None and node.kind not in query.kinds:
            return False
        if query.newer_than_ns is not None and node.mtime_ns <= query.newer_than_ns:
            return False
        if not self._has_size(node):
            return False
        if self._match is None:
            return True
        text = join(above, node.name) if self._by_path else node.name
        return self._match(text.decode("utf-8", "surrogateescape")) is not None

    def _has_size(self, node: Node) -> bool:
        minimum, maximum = self._query.min_bytes, self._query.max_bytes
        if not minimum and maximum is None:
            return True
        if node.kind != NodeType.FILE:
            return False
        return minimum <= node.size and (maximum is None or node.size <= maximum)
