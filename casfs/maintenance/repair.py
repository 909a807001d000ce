"""Repair: snapshots without what is lost, and the index from the packs alone.

A file that lost chunks keeps the others: the lost ranges are holes, and it is flagged as `changed` with
the reason `damaged`, so that nothing takes it for sound; its `observed` digest is the one that it had.
A file of which nothing is left, and entries whose directory cannot be read, are dropped. A snapshot is
never rewritten: a new one replaces it. What is lost is known from the index, so the blobs' data should be
checked first; a backup that sees the lost data again heals more than any repair.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from blake3 import blake3

from casfs.digest import Digest, PackId, SnapshotId, digest_of, update_zeros
from casfs.errors import (
    CasfsError,
    IndexDamagedError,
    IntegrityError,
    NotFoundError,
    TreeError,
)
from casfs.format.snapshot import MAX_SNAPSHOT_BYTES, Snapshot, decode_snapshot
from casfs.format.tree import (
    MAX_PIECE_LEVELS,
    Capture,
    CaptureState,
    ChangeReason,
    Leaf,
    Node,
    NodeExtra,
    NodeType,
    TreeRef,
    captured_digest,
    decode_piece,
    replace,
)
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.paths import join
from casfs.repository.index_opening import replace_with_empty
from casfs.repository.repository import Repository
from casfs.store.writer import BlobWriter
from casfs.trees.content import HOLE, ContentWriter
from casfs.trees.writer import TreeWriter

DAMAGED_FOLDER = "damaged"
"""Where the files of snapshots are put aside that cannot be read under their names."""


class SwappedSnapshots:
    """The misplaced snapshots of a repository: `files` are their bytes, by their right ids."""

    def __init__(self, repository: Repository) -> None:
        self.files: dict[SnapshotId, bytes] = {}
        self._storage = repository.store.storage
        self._taken: dict[SnapshotId, bytes] = {}
        damaged = {one for one in repository.snapshot_ids() if _is_damaged(repository, one)}
        names: dict[str, SnapshotId | None] = {f"snapshots/{one.hex()}": one for one in damaged}
        if damaged:
            # A repair that ended half-way has left something there.
            names |= dict.fromkeys(name for name, _, _ in self._storage.list(DAMAGED_FOLDER))
        for name, under in names.items():
            try:
                data = self._storage.read(name, 0, MAX_SNAPSHOT_BYTES)
                right = SnapshotId(digest_of(data))
                # Any bytes are right under the name of their digest: it takes that name to know them by.
                if right in damaged:
                    keyring = repository.vault.keyring if repository.vault is not None else None
                    decode_snapshot(right, data, repository.codec, keyring)
                    self.files[right] = data
                    if under is not None:
                        self._taken[under] = data
            except CasfsError:
                continue

    def rename_back(self) -> None:
        """Give the snapshots their names; the repository is open for writing."""
        aside = [one for one in self._taken if one in self.files]
        for one in aside:
            self._storage.write(f"{DAMAGED_FOLDER}/{one.hex()}", self._taken[one])
        for right, data in self.files.items():
            self._storage.write(f"snapshots/{right.hex()}", data)
        for one in aside:
            self._storage.delete(f"{DAMAGED_FOLDER}/{one.hex()}")


def _is_damaged(repository: Repository, snapshot_id: SnapshotId) -> bool:
    try:
        repository.load(snapshot_id)
    except IntegrityError:
        return True
    except CasfsError:
        return False  # it was forgotten meanwhile, or is for others
    return False


log = logging.getLogger(__name__)


@dataclass(slots=True)
class SnapshotRepair:
    """What was done to one snapshot: `new_id` is None where nothing of it could be kept."""

    snapshot_id: SnapshotId
    new_id: SnapshotId | None = None
    dropped: int = 0
    holed: int = 0
    message: str = ""


@dataclass(slots=True)
class RepairResult:
    """What a repair of the snapshots came to; sound ones are only counted.

    `returned` are those that were whole and had the names of others; they are looked at like all.
    """

    intact: int = 0
    returned: list[SnapshotId] = field(default_factory=list)
    repaired: list[SnapshotRepair] = field(default_factory=list)


@dataclass(slots=True)
class IndexRepair:
    """What the index was built from; of `salvaged` packs the directory was damaged."""

    packs: int
    blobs: int
    salvaged: list[PackId]
    unreadable: list[PackId]


def repair_index(repository: Repository) -> IndexRepair:
    """Build the index anew from the packs alone; the repository is open for writing, alone."""
    store = repository.store
    try:
        store.rebuild()
    except IndexDamagedError:
        replace_with_empty(store)
        store.rebuild()
    return IndexRepair(
        packs=len(store.index.packs()),
        blobs=store.index.blob_count(),
        salvaged=sorted(store.salvaged),
        unreadable=sorted(store.unreadable),
    )


class SnapshotRepairer:
    """Repair the snapshots of a repository that is open with a lock that tends it; used once.

    The monitor is told of everything that is dropped, with its path in the snapshot.
    """

    def __init__(self, repository: Repository, monitor: Monitor, dry_run: bool = False) -> None:
        self.result = RepairResult()
        self._repository = repository
        self._read = repository.store.read
        self._monitor = monitor
        self._dry_run = dry_run
        self._checker = Checker(repository, monitor)
        self._current = SnapshotRepair(SnapshotId(b""))

    def repair(self, read: PackSelection | None = None) -> RepairResult:
        """Look for what is lost, as a check does, and publish snapshots without it."""
        misplaced = SwappedSnapshots(self._repository)
        self.result.returned = sorted(misplaced.files)
        if not self._dry_run:
            misplaced.rename_back()
        lost = {d.snapshot for d in self._checker.check(read).damage if d.snapshot is not None}
        if self._dry_run:
            lost -= misplaced.files.keys()
        for snapshot_id in self._repository.snapshot_ids():
            if snapshot_id not in lost:
                self.result.intact += 1
                continue
            self._current = SnapshotRepair(snapshot_id)
            try:
                snapshot = self._repository.load(snapshot_id)
            except NotFoundError:
                continue
            except IntegrityError as error:
                self._give_up(snapshot_id, str(error))
            else:
                self._repair_one(snapshot_id, snapshot)
            self.result.repaired.append(self._current)
        return self.result

    def _repair_one(self, snapshot_id: SnapshotId, snapshot: Snapshot) -> None:
        writer = self._repository.writer(self._dry_run)
        try:
            root = self._rewrite(writer, snapshot.root)
            writer.finish()
        finally:
            writer.close()
        if root.tree is not None and root.tree.nodes == 0 and self._current.dropped:
            self._give_up(snapshot_id, "nothing of it is left")
        elif not self._dry_run:
            self._current.new_id = self._repository.replace_snapshot(
                snapshot_id, snapshot, root=root
            )

    def _give_up(self, snapshot_id: SnapshotId, reason: str) -> None:
        """Drop a whole snapshot; its file is put aside."""
        self._current.message = reason
        self._lose(b"", f"the whole snapshot is dropped: {reason}")
        if self._dry_run:
            return
        storage = self._repository.store.storage
        name = f"snapshots/{snapshot_id.hex()}"
        try:
            data = storage.read(name, 0, MAX_SNAPSHOT_BYTES)
        except CasfsError as error:
            log.warning("%s; no copy of it is kept", error)
        else:
            storage.write(f"{DAMAGED_FOLDER}/{snapshot_id.hex()}", data)
        self._repository.delete_snapshot(snapshot_id)

    def _rewrite(self, writer: BlobWriter, root: Node) -> Node:
        """Return the root of what is left; only directories with losses below them are read."""
        stack = [_Frame(root, b"", self._entries(root, b""), self._tree_writer(writer))]
        while True:
            frame = stack[-1]
            for node in frame.nodes:
                path = join(frame.path, node.name)
                if node.tree is not None and node.tree.digest in self._checker.damaged_trees:
                    tree = self._tree_writer(writer)
                    stack.append(_Frame(node, path, self._entries(node, path), tree))
                    break
                kept = self._kept(writer, path, node)
                if kept is not None:
                    frame.tree.add(kept)
            else:
                stack.pop()
                done = replace(frame.node, tree=frame.tree.finish())
                if not stack:
                    return done
                stack[-1].tree.add(done)

    def _tree_writer(self, writer: BlobWriter) -> TreeWriter:
        seed = self._repository.tree_seed
        return TreeWriter(writer.put, self._repository.codec.digest, seed)

    def _entries(self, directory: Node, path: bytes) -> Iterator[Node]:
        """Yield what can be read of a directory's entries; what cannot is told."""
        assert directory.tree is not None
        stack: list[Iterator[TreeRef]] = [iter([directory.tree])]
        last = b""
        while stack:
            ref = next(stack[-1], None)
            if ref is None:
                stack.pop()
                continue
            try:
                if len(stack) > MAX_PIECE_LEVELS + 1:
                    raise TreeError("a directory is split more often than the format allows")
                piece = decode_piece(self._read(Digest(ref.digest)))
                if isinstance(piece, Leaf) and piece.nodes and piece.nodes[0].name <= last:
                    raise TreeError("the pieces of a split directory are not in order")
            except CasfsError as error:
                self._lose(path, f"{ref.nodes} entries of this directory are dropped: {error}")
                continue
            if isinstance(piece, Leaf):
                yield from piece.nodes
                last = piece.nodes[-1].name if piece.nodes else last
            else:
                stack.append(iter([part.tree for part in piece.pieces]))

    def _kept(self, writer: BlobWriter, path: bytes, node: Node) -> Node | None:
        """Return an entry as it can be kept, or None."""
        if node.kind != NodeType.FILE or self._is_whole(node):
            return node
        holed = self._holed(writer, node)
        if holed is None:
            self._lose(path, "the file is dropped: nothing of it is left")
            return None
        new, lost = holed
        if not lost:
            return node  # another pack has what is damaged where the index looks for it
        ranges = ", ".join(f"{begin}-{end}" for begin, end in lost)
        self._current.holed += 1
        message = (
            f"the bytes {ranges} of {node.size} are lost; zeros stand there, and it is flagged"
        )
        self._monitor.problem(Problem(ProblemKind.DAMAGED, path, message))
        return new

    def _is_whole(self, node: Node) -> bool:
        try:
            length = 0
            for extent in self._repository.content(node).extents(lost_lists=True):
                length += extent.length
                if not self._checker.is_intact(extent):
                    return False
        except IntegrityError:
            return False
        return length == node.size

    def _holed(self, writer: BlobWriter, node: Node) -> tuple[Node, list[tuple[int, int]]] | None:
        """Return a file with holes where its data is lost, and these; None where nothing is left."""
        content = ContentWriter(writer.put, self._repository.codec.digest)
        whole = blake3()
        lost: list[tuple[int, int]] = []
        size = kept = 0
        try:
            for extent in self._repository.content(node).extents(lost_lists=True):
                data = self._data_of(extent.digest, extent.length, extent.lost)
                begin, size = size, size + extent.length
                if data is not None:
                    content.add(extent.length, extent.digest or HOLE)
                    whole.update(data)
                    kept += extent.length
                    continue
                content.add(extent.length, HOLE)
                update_zeros(whole, extent.length)
                if extent.digest is None:
                    continue
                if lost and lost[-1][1] == begin:
                    lost[-1] = (lost[-1][0], size)
                else:
                    lost.append((begin, size))
        except TreeError:
            return None  # its own list contradicts itself
        if not kept or size != node.size:
            return None
        records, levels = content.finish()
        attempts = 1
        if node.extra is not None and node.extra.capture is not None:
            attempts = node.extra.capture.attempts
        evidence = Capture(ChangeReason.DAMAGED, attempts, captured_digest(node))
        new = replace(
            node,
            content=records,
            levels=levels,
            captured=whole.digest(),
            state=CaptureState.CHANGED,
            extra=replace(node.extra or NodeExtra(), capture=evidence),
        )
        return new, lost

    def _data_of(self, digest: Digest | None, length: int, lost: bool) -> bytes | None:
        """Return a chunk's data; None for a hole, and for what is lost."""
        if digest is None or lost:
            return None
        try:
            data = self._read(digest)
        except CasfsError:
            return None
        return data if len(data) == length else None

    def _lose(self, path: bytes, message: str) -> None:
        self._current.dropped += 1
        self._monitor.problem(Problem(ProblemKind.DAMAGED, path, message))


@dataclass(slots=True)
class _Frame:
    """A directory that is being written anew."""

    node: Node
    path: bytes
    nodes: Iterator[Node]
    tree: TreeWriter
