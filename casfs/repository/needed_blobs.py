"""The blobs that trees and the files in them need, as a set of ordinals.

Every distinct tree is read once. The sets are bitmaps over the index's ordinals, one bit for each blob,
whatever the number of snapshots. One thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from casfs.digest import Digest
from casfs.format.tree import Node, NodeType
from casfs.index.bitmap import Bitmap
from casfs.index.schema import Location
from casfs.repository.repository import Repository
from casfs.store.pack_shares import PackShare
from casfs.trees.content import HOLE, parse_records
from casfs.trees.walk import Children, Page, walk_pages

_ASKED_AT_ONCE = 4096
"""The most blobs that are looked up in one transaction."""


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
        self.shares: dict[int, PackShare] = {}
        self.other_shares: dict[int, PackShare] = {}
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
            self._add_files([root])
            return

        def read(page: Page) -> Children | None:
            digest = Digest(page.ref.digest)
            location = self._store.locate(digest)
            self._count(digest, location)
            if not self._opened.add(location.ordinal):
                return None
            children = self._trees.children(page.ref)
            self._add_files(children)
            return children

        for page, _ in walk_pages(b"", root.tree, read):
            if on_entry is not None:
                on_entry(page.path)

    def _add_files(self, entries: Children) -> None:
        """Count the blobs of the files among some entries of a directory."""
        asked: list[Digest] = []
        for node in entries:
            if not isinstance(node, Node) or node.kind != NodeType.FILE:
                continue
            for digest in self._chunks(node):
                asked.append(digest)
                if len(asked) == _ASKED_AT_ONCE:
                    self._count_all(asked)
                    asked = []
        self._count_all(asked)

    def _chunks(self, node: Node) -> Iterable[Digest]:
        """Return the digests of a file's chunks; of content lists that are new, count these first."""
        if node.levels:
            return self._listed_chunks(node)
        return [Digest(digest) for _, digest in parse_records(node.content) if digest != HOLE]

    def _listed_chunks(self, node: Node) -> Iterator[Digest]:
        stack = [(iter(parse_records(node.content)), node.levels)]
        while stack:
            records, levels = stack[-1]
            for _, digest in records:
                if digest == HOLE:
                    continue
                if levels == 0:
                    yield Digest(digest)
                    continue
                location = self._store.locate(Digest(digest))
                self._count(Digest(digest), location)
                if self._opened.add(location.ordinal):
                    below = parse_records(self._store.read(Digest(digest)))
                    stack.append((iter(below), levels - 1))
                    break
            else:
                stack.pop()

    def _count_all(self, digests: list[Digest]) -> None:
        """Count blobs, looked up in one transaction."""
        if digests:
            for digest, found in zip(digests, self._store.index.lookup_many(digests), strict=True):
                self._count(digest, found if found is not None else self._store.locate(digest))

    def _count(self, digest: Digest, location: Location) -> None:
        """Count a blob once."""
        if self.blobs.add(location.ordinal):
            self.count += 1
            self.shares.setdefault(location.pack, PackShare()).add(location)
            if self._on_blob is not None:
                self._on_blob(digest, location)
            if self._without is not None and location.ordinal in self._without:
                self.other_shares.setdefault(location.pack, PackShare()).add(location)
