"""The walk over a tree: depth first, one page at a time, without recursion and with bounded depth.

A page is one tree blob: all entries of a directory, or a part of them where the directory is split. The
walk keeps only the pages on the path to its current position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from casfs.errors import CasfsError, TreeError
from casfs.format.tree import MAX_DEPTH, MAX_PIECE_LEVELS, Node, TreeRef
from casfs.paths import join

Children = Sequence[Node] | Sequence[TreeRef]
"""The contents of a page: entries, or the pages of a split directory."""


@dataclass(slots=True)
class Page:
    """An open page: of the directory at `path`, which is `depth` directories deep (1: the first).

    `level` counts the pages above it in the same split directory. `is_marked` is for the caller; the walk
    does not use it.
    """

    path: bytes
    ref: TreeRef
    depth: int = 1
    level: int = 0
    above: Page | None = None
    is_marked: bool = False
    _last_name: list[bytes] = field(default_factory=lambda: [b""])
    """The name before this page's first, shared by the pages of one directory."""

    def with_ancestors(self) -> Iterator[Page]:
        """Yield this page and those above it, up to the first of the walk."""
        page: Page | None = self
        while page is not None:
            yield page
            page = page.above


def walk_pages(
    path: bytes,
    ref: TreeRef,
    read: Callable[[Page], Children | None],
    on_leave: Callable[[Page], None] | None = None,
    on_error: Callable[[Page, CasfsError], None] | None = None,
) -> Iterator[tuple[Page, Node]]:
    """Yield the entries below the directory at `path` with their pages, a directory before its entries.

    `read` returns the contents of a page, or None for a page to skip. `on_leave` is called for every page
    that was read, after everything below it has been yielded. Where `read` fails, or a page breaks the rules
    (depth, order of names), `on_error` is called and the walk skips the page; without it the error is raised.
    """
    stack: list[tuple[Page, Iterator[Node | TreeRef]]] = []
    page: Page | None = Page(path, ref)
    while page is not None or stack:
        if page is not None:
            try:
                children = _read(page, read)
            except CasfsError as error:
                if on_error is None:
                    raise
                on_error(page, error)
                children = None
            if children is not None:
                stack.append((page, iter(children)))
            page = None
            continue
        current, items = stack[-1]
        for item in items:
            if isinstance(item, TreeRef):
                page = Page(
                    current.path,
                    item,
                    current.depth,
                    current.level + 1,
                    current,
                    _last_name=current._last_name,
                )
                break
            yield current, item
            if item.tree is not None:
                below = join(current.path, item.name)
                page = Page(below, item.tree, current.depth + 1, 0, current)
                break
        else:
            stack.pop()
            if on_leave is not None:
                on_leave(current)


def check_depth(depth: int, level: int) -> None:
    """Raise TreeError for a page that lies deeper than the format allows.

    `depth` counts directories, `level` the pages above it in a split directory.
    """
    if depth > MAX_DEPTH:
        raise TreeError(f"directories are nested more than {MAX_DEPTH} levels deep")
    if level > MAX_PIECE_LEVELS:
        raise TreeError("a directory is split more often than the format allows")


def _read(page: Page, read: Callable[[Page], Children | None]) -> Children | None:
    check_depth(page.depth, page.level)
    children = read(page)
    if children:
        first, last = children[0], children[-1]
        if isinstance(first, Node) and isinstance(last, Node):
            if first.name <= page._last_name[0]:
                raise TreeError("the pieces of a split directory are not in order")
            page._last_name[0] = last.name
    return children
