"""Sizes: what a repository stores, and what of it one snapshot needs and no other.

Every distinct tree is read once. Sets of blobs are bitmaps over the ordinals of the index, one bit for
a blob, whatever the number of snapshots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from casfs.content import HOLE, parse_records
from casfs.digest import Digest, SnapshotId
from casfs.errors import TreeError
from casfs.flagged import flagged_below
from casfs.repository import Repository
from casfs.store.pack import RECORD
from casfs.tree import MAX_DEPTH, MAX_PIECE_LEVELS, Kind, Node, TreeRef, nodes_of


@dataclass(frozen=True, slots=True)
class RepositorySizes:
    """What is stored; `plain_bytes` before compression, `total_bytes` of the files of all snapshots."""

    snapshots: int
    packs: int
    pack_bytes: int
    blobs: int
    plain_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotSizes:
    """What a snapshot, or a part of it, holds.

    `blobs` are the distinct ones that it needs, data and trees, and `stored_bytes` their size in
    packs; `unique_stored_bytes` counts of these the ones that no other snapshot needs.
    """

    snapshot_id: SnapshotId
    entries: int
    total_bytes: int
    flagged: int
    blobs: int
    stored_bytes: int
    unique_stored_bytes: int


class Bitmap:
    """A set of ordinals that takes one bit for each number up to the greatest."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, ordinal: int) -> bool:
        """Put a number into the set; tell whether it was new."""
        place, bit = ordinal >> 3, 1 << (ordinal & 7)
        bits = self._bits
        if place >= len(bits):
            bits.extend(bytes(max(place + 1 - len(bits), len(bits))))
        if bits[place] & bit:
            return False
        bits[place] |= bit
        return True

    def __contains__(self, ordinal: int) -> bool:
        place = ordinal >> 3
        return place < len(self._bits) and bool(self._bits[place] & 1 << (ordinal & 7))


class _Needs:
    """The blobs that are needed by the trees that were added.

    `without` are blobs that do not count. What is opened is told apart from what is counted: a file
    may consist of the very bytes of a tree, and its blob then says nothing of that tree's entries.
    """

    def __init__(self, repository: Repository, without: Bitmap | None = None) -> None:
        self.blobs = Bitmap()
        self.count = 0
        self.stored_bytes = 0
        self.other_stored_bytes = 0
        self._store = repository.store
        self._trees = repository.trees
        self._without = without
        self._opened = Bitmap()

    def add(self, root: Node) -> None:
        """Count what a node needs; raises BlobError and TreeError where a tree is damaged."""
        if root.tree is None:
            self._add_content(root)
            return
        stack: list[Iterator[Node | tuple[bytes, TreeRef]]] = []
        ref: TreeRef | None = root.tree
        while ref is not None or stack:
            if ref is not None and self._count(Digest(ref.digest), self._opened):
                if len(stack) > MAX_DEPTH * (MAX_PIECE_LEVELS + 1):
                    raise TreeError("directories lie deeper than the format allows")
                stack.append(iter(self._trees.piece(ref)))
            ref = None
            for item in stack[-1] if stack else ():
                if not isinstance(item, Node):
                    ref = item[1]
                    break
                if item.tree is not None:
                    ref = item.tree
                    break
                self._add_content(item)
            else:
                if stack:
                    stack.pop()

    def _add_content(self, node: Node) -> None:
        if node.kind != Kind.FILE:
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
        """Count a blob once; tell whether it is the first to be put into `opened`."""
        location = self._store.locate(digest)
        if self.blobs.add(location.ordinal):
            self.count += 1
            stored_bytes = location.stored_bytes + RECORD.size
            self.stored_bytes += stored_bytes
            if self._without is not None and location.ordinal in self._without:
                self.other_stored_bytes += stored_bytes
        return opened is not None and opened.add(location.ordinal)


def measure_repository(repository: Repository) -> RepositorySizes:
    """Return the sizes of the whole repository, from the index and the snapshots' summaries."""
    packs = repository.store.index.packs()
    totals = [snapshot.root.tree for _, snapshot in repository.snapshots()]
    return RepositorySizes(
        snapshots=len(totals),
        packs=len(packs),
        pack_bytes=sum(pack.pack_bytes for pack in packs),
        blobs=repository.store.index.blob_count(),
        plain_bytes=sum(place.plain_bytes for _, place in repository.store.index.blobs()),
        total_bytes=sum(tree.total_bytes for tree in totals if tree is not None),
    )


def measure_snapshot(repository: Repository, spec: str) -> SnapshotSizes:
    """Return the sizes of what `SNAP` or `SNAP:PATH` names.

    Raises NotFoundError, and BlobError or TreeError where a tree of any snapshot is damaged.
    """
    snapshot_id, _, _, node = repository.resolve_path(spec)
    others = _Needs(repository)
    for other_id, other in repository.snapshots():
        if other_id != snapshot_id:
            others.add(other.root)
    needs = _Needs(repository, others.blobs)
    needs.add(node)
    return SnapshotSizes(
        snapshot_id=snapshot_id,
        entries=nodes_of(node) - (node.tree is not None),
        total_bytes=_file_bytes(node),
        flagged=flagged_below(node),
        blobs=needs.count,
        stored_bytes=needs.stored_bytes,
        unique_stored_bytes=needs.stored_bytes - needs.other_stored_bytes,
    )


def _file_bytes(node: Node) -> int:
    if node.tree is not None:
        return node.tree.total_bytes
    return node.size if node.kind == Kind.FILE else 0
