"""The blobs that trees and the files in them need, as a set of ordinals.

Every distinct tree is read once. The sets are bitmaps over the index's ordinals, one bit for each blob,
whatever the number of snapshots. One thread only.
"""

from __future__ import annotations

from collections.abc import Callable

from casfs.digest import Digest
from casfs.format.pack import BLOB_HEADER
from casfs.format.tree import Node, NodeType
from casfs.index.bitmap import Bitmap
from casfs.index.schema import Location
from casfs.repository.repository import Repository
from casfs.trees.content import HOLE, parse_records
from casfs.trees.walk import Children, Page, walk_pages


class NeededBlobs:
    """The blobs that the added trees need.

    Blobs in `without` are counted separately. Trees that were opened are tracked separately from counted
    blobs: a file's data may equal a tree's bytes, and counting that data blob does not cover the tree's
    entries. `on_blob` is called once for each counted blob.
    """

    def __init__(
        self,
        repository: Repository,
        without: Bitmap | None = None,
        on_blob: Callable[[Digest, Location], None] | None = None,
    ) -> None:
        self.blobs = Bitmap()
        self.count = 0
        self.stored_bytes = 0
        self.other_stored_bytes = 0
        self._store = repository.store
        self._trees = repository.trees
        self._without = without
        self._on_blob = on_blob
        self._opened = Bitmap()

    def add(self, root: Node, on_entry: Callable[[bytes], None] | None = None) -> None:
        """Count the blobs that a node needs; raise BlobError and TreeError where a tree is damaged.

        `on_entry` is called with the path of each visited entry's directory.
        """
        if root.tree is None:
            self._add_content(root)
            return

        def read(page: Page) -> Children | None:
            if not self._count(Digest(page.ref.digest), self._opened):
                return None
            return self._trees.children(page.ref)

        for page, node in walk_pages(b"", root.tree, read):
            if on_entry is not None:
                on_entry(page.path)
            if node.tree is None:
                self._add_content(node)

    def _add_content(self, node: Node) -> None:
        if node.kind != NodeType.FILE:
            return
        stack = [(iter(parse_records(node.content)), node.levels)]
        while stack:
            records, levels = stack[-1]
            for _, digest in records:
                if digest == HOLE:
                    continue
                if levels == 0:
                    self._count(Digest(digest))
                elif self._count(Digest(digest), self._opened):
                    below = parse_records(self._store.read(Digest(digest)))
                    stack.append((iter(below), levels - 1))
                    break
            else:
                stack.pop()

    def _count(self, digest: Digest, opened: Bitmap | None = None) -> bool:
        """Count a blob once; return whether it is new in `opened`."""
        location = self._store.locate(digest)
        if self.blobs.add(location.ordinal):
            self.count += 1
            stored_bytes = location.stored_bytes + BLOB_HEADER.size
            self.stored_bytes += stored_bytes
            if self._on_blob is not None:
                self._on_blob(digest, location)
            if self._without is not None and location.ordinal in self._without:
                self.other_stored_bytes += stored_bytes
        return opened is not None and opened.add(location.ordinal)
