"""Repair snapshots by dropping lost data, and rebuild the index from the packs alone.

A file that lost chunks keeps the others. The lost ranges become holes, and the file gets the state
`changed` with the reason `damaged`, so that no command treats it as intact; its `observed` digest is the
digest that it had. Files without any remaining data, and entries whose directory cannot be read, are
dropped. A snapshot is never rewritten: a new snapshot replaces it. The repair learns from the index which
blobs are lost, so run `casfs check --read-data` first. A backup that reads the lost data again restores
more than any repair.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from casfs.backup.protection import Protection
from casfs.digest import Digest, PackId, SnapshotId, digest_of
from casfs.errors import (
    BlobError,
    CasfsError,
    IndexDamagedError,
    IntegrityError,
    NotFoundError,
    PacksRemovedError,
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
from casfs.repository.index_opening import replace_with_empty
from casfs.repository.repository import Repository
from casfs.store.writer import BlobWriter
from casfs.trees.content import HOLE, ContentWriter
from casfs.trees.file_content import FileContent, Ranges
from casfs.trees.rewrite import rewrite_tree

DAMAGED_FOLDER = "damaged"
"""The folder for snapshot files that do not match their names."""


class SwappedSnapshots:
    """Intact snapshots stored under wrong names; `files` maps the correct id to the file's bytes."""

    def __init__(self, repository: Repository) -> None:
        self.files: dict[SnapshotId, bytes] = {}
        self._storage = repository.store.storage
        self._misnamed: dict[SnapshotId, bytes] = {}
        damaged = {name for name in repository.snapshots.ids() if _is_damaged(repository, name)}
        names: dict[str, SnapshotId | None] = {f"snapshots/{id_.hex()}": id_ for id_ in damaged}
        if damaged:
            # An interrupted rename_back leaves files there.
            names |= dict.fromkeys(name for name, _, _ in self._storage.list(DAMAGED_FOLDER))
        for name, current_id in names.items():
            try:
                data = self._storage.read(name, 0, MAX_SNAPSHOT_BYTES)
                correct_id = SnapshotId(digest_of(data))
                # Every byte string matches its own digest. Only a digest that names a damaged snapshot
                # shows that these bytes belong there.
                if correct_id in damaged:
                    keyring = (
                        repository.key_manager.keyring
                        if repository.key_manager is not None
                        else None
                    )
                    decode_snapshot(correct_id, data, repository.codec, keyring)
                    self.files[correct_id] = data
                    if current_id is not None:
                        self._misnamed[current_id] = data
            except CasfsError:
                continue

    def rename_back(self) -> None:
        """Rename the snapshots to their digests; the repository is open for writing."""
        # Two snapshots with swapped names overwrite each other: their bytes are saved first.
        overwritten = [name for name in self._misnamed if name in self.files]
        for name in overwritten:
            self._storage.write(f"{DAMAGED_FOLDER}/{name.hex()}", self._misnamed[name])
        for correct_id, data in self.files.items():
            self._storage.write(f"snapshots/{correct_id.hex()}", data)
        for name in overwritten:
            self._storage.delete(f"{DAMAGED_FOLDER}/{name.hex()}")


def _is_damaged(repository: Repository, snapshot_id: SnapshotId) -> bool:
    try:
        repository.snapshots.load(snapshot_id)
    except IntegrityError:
        return True
    except CasfsError:
        return False  # forgotten meanwhile, or encrypted to other recipients
    return False


log = logging.getLogger(__name__)


@dataclass(slots=True)
class SnapshotRepair:
    """The repair of one snapshot. `new_id` is None where no data of the snapshot is left.

    `dropped` counts the entries dropped, `holed` the files that lost ranges.
    """

    snapshot_id: SnapshotId
    new_id: SnapshotId | None = None
    dropped: int = 0
    holed: int = 0
    message: str = ""


@dataclass(slots=True)
class RepairResult:
    """The result of a repair of the snapshots; `intact` counts the snapshots without damage.

    `returned` are intact snapshots that had the name of another snapshot and got their own name back;
    they are checked like all others.
    """

    intact: int = 0
    returned: list[SnapshotId] = field(default_factory=list)
    repaired: list[SnapshotRepair] = field(default_factory=list)


@dataclass(slots=True)
class IndexRepair:
    """The result of an index rebuild.

    The directories of `salvaged` packs are damaged, their intact blobs were found all the same.
    `unreadable` packs contribute nothing to the index.
    """

    packs: int
    blobs: int
    salvaged: list[PackId]
    unreadable: list[PackId]


def repair_index(repository: Repository, monitor: Monitor) -> IndexRepair:
    """Rebuild the index and the index deltas from the packs; the caller holds the exclusive lock."""
    store = repository.store
    try:
        store.rebuild(monitor.progress)
    except IndexDamagedError:
        replace_with_empty(store)
        store.rebuild(monitor.progress)
    if repository.deltas is not None:
        repository.deltas.merge(from_packs=True)
    return IndexRepair(
        packs=len(store.index.packs()),
        blobs=store.index.blob_count(),
        salvaged=sorted(pack.id for pack in store.salvaged),
        unreadable=sorted(pack.id for pack in store.unreadable),
    )


class SnapshotRepairer:
    """Repair the snapshots of a repository that is open under the maintenance lock.

    Use each instance for one repair. The monitor gets a problem for every entry that is dropped, with
    its path in the snapshot.
    """

    def __init__(self, repository: Repository, monitor: Monitor, dry_run: bool = False) -> None:
        self.result = RepairResult()
        self._repository = repository
        self._read = repository.store.read
        self._monitor = monitor
        self._dry_run = dry_run
        self._checker = Checker(repository, monitor)
        self._current = SnapshotRepair(SnapshotId(b""))
        self._is_reported = False

    def repair(self, read: PackSelection | None = None) -> RepairResult:
        """Check the repository, and replace every snapshot that lost data by one without it.

        `read` selects the packs whose data the check reads (None: no pack).
        """
        swapped = self._rename_swapped()
        damaged = self._find_damaged(read, swapped)
        if damaged and self._repository.store.is_shared:
            # A snapshot that another host published meanwhile has packs that the index did not know.
            self._repository.store.reconcile(self._repository.is_alone)
            self._checker = Checker(self._repository, self._monitor)
            damaged &= self._find_damaged(read, swapped)
        for snapshot_id in self._repository.snapshots.ids():
            if snapshot_id in damaged:
                self._repair_one(snapshot_id)
            else:
                self.result.intact += 1
        return self.result

    def _rename_swapped(self) -> SwappedSnapshots:
        swapped = SwappedSnapshots(self._repository)
        self.result.returned = sorted(swapped.files)
        if not self._dry_run:
            swapped.rename_back()
        return swapped

    def _find_damaged(
        self, read: PackSelection | None, swapped: SwappedSnapshots
    ) -> set[SnapshotId]:
        """Return the snapshots with losses, as the check finds them."""
        findings = self._checker.check(read).damage
        damaged = {finding.snapshot for finding in findings if finding.snapshot is not None}
        if self._dry_run:
            damaged -= swapped.files.keys()
        return damaged

    def _repair_one(self, snapshot_id: SnapshotId) -> None:
        self._current = SnapshotRepair(snapshot_id)
        self._is_reported = False
        try:
            snapshot = self._repository.snapshots.load(snapshot_id)
        except NotFoundError:
            return
        except IntegrityError as error:
            self._drop_snapshot(snapshot_id, str(error))
        else:
            self._repository.snapshots.repeat_until_published(
                lambda: self._replace_snapshot(snapshot_id, snapshot), "repairing the snapshot"
            )
        self.result.repaired.append(self._current)

    def _replace_snapshot(self, snapshot_id: SnapshotId, snapshot: Snapshot) -> None:
        self._current = SnapshotRepair(snapshot_id)
        writer = self._repository.writer(self._dry_run)
        try:
            root = self._rewrite(writer, snapshot.root)
            writer.finish()
        finally:
            writer.close()
        if root.tree is not None and root.tree.nodes == 0 and self._current.dropped:
            self._drop_snapshot(snapshot_id, "none of its data is left")
        elif not self._dry_run:
            try:
                new_id = self._repository.snapshots.replace_root(snapshot_id, snapshot, root)
            except PacksRemovedError:
                self._is_reported = True
                raise
            self._current.new_id = new_id
            Protection.protect_published(self._repository, new_id, root)

    def _drop_snapshot(self, snapshot_id: SnapshotId, reason: str) -> None:
        """Delete a snapshot, after a copy of its file went to the folder of damaged files."""
        self._current.message = reason
        self._report_dropped(b"", f"the whole snapshot is dropped: {reason}")
        if self._dry_run:
            return
        storage = self._repository.store.storage
        name = f"snapshots/{snapshot_id.hex()}"
        try:
            data = storage.read(name, 0, MAX_SNAPSHOT_BYTES)
        except CasfsError as error:
            log.warning("%s; no copy of the snapshot file is kept", error)
        else:
            storage.write(f"{DAMAGED_FOLDER}/{snapshot_id.hex()}", data)
        self._repository.snapshots.delete(snapshot_id)

    def _rewrite(self, writer: BlobWriter, root: Node) -> Node:
        """Return the root of the remaining tree; read only directories with losses below them."""
        damaged = self._checker.damaged_trees

        def change(node: Node, path: bytes) -> Node | None:
            return node if node.tree is not None else self._remaining_entry(writer, path, node)

        return rewrite_tree(
            root,
            b"",
            entries=self._entries,
            new_tree=lambda _: self._repository.tree_writer(writer.put),
            change=change,
            known=lambda tree: None if tree.digest in damaged else tree,
        )

    def _entries(self, directory: Node, path: bytes) -> Iterator[Node]:
        """Yield the readable entries of a directory, and report the others as dropped."""
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
                self._report_dropped(
                    path, f"{ref.nodes} entries of this directory are dropped: {error}"
                )
                continue
            if isinstance(piece, Leaf):
                yield from piece.nodes
                last = piece.nodes[-1].name if piece.nodes else last
            else:
                stack.append(iter([part.tree for part in piece.pieces]))

    def _remaining_entry(self, writer: BlobWriter, path: bytes, node: Node) -> Node | None:
        """Return an entry without its lost data, or None where no data is left."""
        if node.kind != NodeType.FILE or self._is_complete(node):
            return node
        with_holes = self._punch_holes(writer, node)
        if with_holes is None:
            self._report_dropped(path, "the file is dropped: none of its data is left")
            return None
        new, lost = with_holes
        if not lost:
            return node  # another pack holds an intact copy of each damaged chunk
        ranges = ", ".join(f"{begin}-{end}" for begin, end in lost)
        self._current.holed += 1
        message = f"bytes {ranges} of {node.size} are lost and read as zeros; the file is marked `changed`"
        self._report(path, message)
        return new

    def _is_complete(self, node: Node) -> bool:
        try:
            length = 0
            for extent in self._repository.content(node).extents(lost_lists=True):
                length += extent.length
                if not self._checker.is_intact(extent):
                    return False
        except IntegrityError:
            return False
        return length == node.size

    def _punch_holes(
        self, writer: BlobWriter, node: Node
    ) -> tuple[Node, list[tuple[int, int]]] | None:
        """Return a file with holes for its lost data, and the lost ranges (begin, end) in bytes.

        Returns None where no data is left, or where the content list contradicts itself.
        """
        content = ContentWriter(writer.put, self._repository.codec.digest)
        file = FileContent(node, self._repository.content(node), self._read_intact, salvage=True)
        kept = 0
        try:
            for part in file.parts():
                content.add(part.length, HOLE if part.data is None else part.digest or HOLE)
                if not part.is_lost:
                    kept += part.length if part.data is not None else 0
        except TreeError:
            return None
        if not kept:
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
            captured=file.digest,
            state=CaptureState.CHANGED,
            extra=replace(node.extra or NodeExtra(), capture=evidence),
        )
        return new, _merge(file.lost)

    def _read_intact(self, digest: Digest) -> bytes:
        """Return a chunk; raise BlobError for whatever keeps it from being read."""
        try:
            return self._read(digest)
        except BlobError:
            raise
        except CasfsError as error:
            raise BlobError(digest, str(error)) from error

    def _report_dropped(self, path: bytes, message: str) -> None:
        self._current.dropped += 1
        self._report(path, message)

    def _report(self, path: bytes, message: str) -> None:
        """Report a loss, unless an earlier attempt at this snapshot has reported its losses."""
        if not self._is_reported:
            self._monitor.problem(Problem(ProblemKind.DAMAGED, path, message))


def _merge(ranges: Ranges) -> Ranges:
    """Return sorted ranges with adjacent ones joined."""
    merged: Ranges = []
    for begin, end in ranges:
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
