"""The packs that a snapshot relies on, among those about which there is a doubt.

The walk skips what the snapshot shares with another one whose packs are known to be locked: directories and
files that are equal at the same path. So it reads the directories that changed, in both. Each distinct
directory is read once. One thread.
"""

from __future__ import annotations

from collections.abc import Set

from casfs.backup.parent import ParentCursor
from casfs.digest import Digest
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.index.bitmap import Bitmap
from casfs.paths import join
from casfs.repository.repository import Repository
from casfs.trees.content import HOLE, parse_records
from casfs.trees.walk import Children, Page, walk_pages


class ReliedPacks:
    """Finds which of the packs `doubtful` (ordinals) snapshots need; `found` are those so far."""

    def __init__(self, repository: Repository, doubtful: Set[int]) -> None:
        self.found: set[int] = set()
        self._store = repository.store
        self._trees = repository.trees
        self._doubtful = frozenset(doubtful)
        self._opened = Bitmap()

    @property
    def is_complete(self) -> bool:
        """Whether all packs in doubt were found to be needed."""
        return len(self.found) == len(self._doubtful)

    def add(self, root: TreeRef, covered: TreeRef | None = None) -> None:
        """Find the packs that the tree at `root` needs, except for what `covered` has at the same path.

        Raise BlobError and TreeError where a tree is damaged.
        """
        counterparts: dict[bytes, TreeRef] = {b"": covered} if covered is not None else {}
        cursors: dict[bytes, ParentCursor] = {}

        def read(page: Page) -> Children | None:
            ref = None
            if page.level == 0:
                ref = counterparts.pop(page.path, None)
                if ref is not None and ref.digest == page.ref.digest:
                    return None
            if not self._open(Digest(page.ref.digest)):
                return None
            if ref is not None:
                cursors[page.path] = ParentCursor(self._trees, ref)
            return self._trees.children(page.ref)

        def leave(page: Page) -> None:
            if page.level == 0:
                cursors.pop(page.path, None)

        for page, node in walk_pages(b"", root, read, on_leave=leave):
            if self.is_complete:
                return
            cursor = cursors.get(page.path)
            known = cursor.match(node.name) if cursor is not None else None
            if node.tree is not None:
                if known is not None and known.tree is not None:
                    counterparts[join(page.path, node.name)] = known.tree
            elif known is None or (known.content, known.levels) != (node.content, node.levels):
                self._add_content(node)

    def _add_content(self, node: Node) -> None:
        if node.kind != NodeType.FILE:
            return
        stack = [(node.content, node.levels)]
        while stack:
            content, levels = stack.pop()
            for _, digest in parse_records(content):
                if digest == HOLE:
                    continue
                if levels == 0:
                    self._find(Digest(digest))
                elif self._open(Digest(digest)):
                    stack.append((self._store.read(Digest(digest)), levels - 1))

    def _open(self, digest: Digest) -> bool:
        """Find the pack of a tree or a list; return whether it is opened for the first time.

        Chunks are not counted as opened: a file's data may equal the bytes of a tree.
        """
        return self._opened.add(self._find(digest))

    def _find(self, digest: Digest) -> int:
        """Take the pack of a blob for needed; return the blob's ordinal."""
        location = self._store.locate(digest)
        if location.pack in self._doubtful:
            self.found.add(location.pack)
        return location.ordinal
