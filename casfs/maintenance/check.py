"""Check every snapshot, tree, content list and index entry and, on request, every stored byte.

Problems are collected and never raised. Lost data is reported as paths and byte ranges of snapshots.
A tree that several snapshots share is walked once, and again only where something below it is damaged or
cannot be read, so that the result names the losses of every snapshot. One thread walks; the scrub has
threads of its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from casfs.digest import Digest, PackId, SnapshotId
from casfs.errors import BlobError, CasfsError, IntegrityError, KeyMissingError, TreeError
from casfs.format.tree import (
    MAX_FILE_BYTES,
    CaptureState,
    Leaf,
    Node,
    NodeType,
    TreeRef,
    captured_digest,
    decode_piece,
    subtree_summary,
    sum_of_counts,
    xattr_count,
)
from casfs.index.bitmap import Bitmap
from casfs.index.schema import Location
from casfs.maintenance.delta_check import check_deltas
from casfs.maintenance.findings import Finding, is_refused
from casfs.maintenance.scrub import PackSelection, Scrubber, ScrubResult
from casfs.monitor import Monitor, Unit
from casfs.paths import join
from casfs.repository.repository import Repository
from casfs.trees.content import EXTENT, Extent
from casfs.trees.walk import Children, Page, walk_pages

log = logging.getLogger(__name__)

_FILE, _STABLE = int(NodeType.FILE), int(CaptureState.STABLE)
"""Plain integers, for a look at every node."""

_MAX_LOCATIONS = 20_000
"""Limit of the cached chunk locations, looked up once per tree for the files in it."""


@dataclass(slots=True)
class CheckResult(ScrubResult):
    """Counts of the objects checked, and the findings; `flagged` counts files in state `changed`."""

    snapshots: int = 0
    unproven: list[SnapshotId] = field(default_factory=list)
    trees: int = 0
    files: int = 0
    flagged: int = 0


class Checker:
    """Check one repository. Use each instance for one check."""

    def __init__(self, repository: Repository, monitor: Monitor) -> None:
        self.result = CheckResult()
        self.damaged_trees: set[bytes] = set()
        self._unreadable_trees: set[bytes] = set()
        self._repository = repository
        self._store = repository.store
        self._monitor = monitor
        self._visited = Bitmap()
        self._reported_unknown: set[Digest] = set()
        self._locations: dict[Digest, Location] = {}

    def check(self, read: PackSelection | None = None) -> CheckResult:
        """Check the structure, and read the packs that `read` selects (None: no pack)."""
        scrubber = Scrubber(self._repository, self.result, self._monitor)
        scrubber.scrub(read)
        damaged = {finding.pack for finding in self.result.damage}
        intact = {pack: one for pack, one in scrubber.directories.items() if pack.id not in damaged}
        self.result.damage += check_deltas(self._repository, intact)
        self._report_false_claims()
        self._check_sessions()
        self._check_snapshots()
        return self.result

    def _report(self, damage: Finding) -> None:
        self.result.damage.append(damage)

    def _report_false_claims(self) -> None:
        """Report the packs that lacked a blob when a backup of this machine wanted to rely on it.

        What the backup needed was stored again.
        """
        for record in self._store.index.packs():
            if record.has_false_claim:
                message = (
                    "it lacks blobs that the machine that stored it, or an index delta, says it holds; find "
                    "out which machine that is, and run `casfs check --read-data`"
                )
                self._report(Finding("pack", message, pack=record.pack.id))

    def _check_sessions(self) -> None:
        if self._repository.key_manager is not None:
            keyring = self._repository.key_manager.keyring
            for error in keyring.damaged():
                self._report(Finding("session", str(error)))
            for damaged in keyring.generations.damaged():
                self._report(Finding("snapshot list", str(damaged)))

    def _check_snapshots(self) -> None:
        self._walk_snapshots()
        if self.result.damage:
            # A snapshot that was forgotten during the check has no losses.
            existing = set(self._repository.snapshots.ids())
            self.result.damage = [
                damage
                for damage in self.result.damage
                if damage.snapshot is None or damage.snapshot in existing
            ]

    def _walk_snapshots(self) -> None:
        self._monitor.progress.begin("checking files", Unit.FILES)
        snapshots = self._repository.snapshots
        for snapshot_id, load in snapshots.load_each(snapshots.ids()):
            self.result.snapshots += 1
            try:
                snapshot = load()
            except CasfsError as error:
                is_closed = is_refused(error) or isinstance(error, KeyMissingError)
                found = self.result.unreadable if is_closed else self.result.damage
                found.append(Finding("snapshot", str(error), snapshot=snapshot_id))
                continue
            if not self._repository.snapshots.provenance.is_from_trusted_writer(snapshot_id):
                self.result.unproven.append(snapshot_id)
            self._walk(snapshot_id, snapshot.root)
            if snapshot.root.tree is not None:
                self.result.flagged += snapshot.root.tree.flagged

    def _walk(self, snapshot_id: SnapshotId, root: Node) -> None:
        """Visit the trees below a root; on damage, mark all trees above it as damaged."""
        assert root.tree is not None

        def damaged(page: Page, error: CasfsError) -> None:
            if getattr(error, "pack", None) in self.result.unreadable_packs:
                self._report_unreadable(snapshot_id, page, error)
                return
            self._mark_above(page)
            message = f"the directory cannot be read: {error}"
            pack = getattr(error, "pack", None)
            digest = Digest(page.ref.digest)
            self._report(Finding("tree", message, pack, digest, snapshot_id, page.path))

        progress = self._monitor.progress
        for page, node in walk_pages(b"", root.tree, self._read_page, on_error=damaged):
            if node.kind != _FILE:
                continue
            self.result.files += 1
            progress.items += 1
            path = progress.path = join(page.path, node.name)
            if not self._is_stable_intact_chunk(node):
                self._check_file(snapshot_id, page, node, path)

    def _report_unreadable(self, snapshot_id: SnapshotId, page: Page, error: CasfsError) -> None:
        """Record a directory that this user may not read; what is below it is not checked."""
        self._mark_unreadable_above(page)
        message = f"the directory was not checked: {error}"
        pack, digest = getattr(error, "pack", None), Digest(page.ref.digest)
        finding = Finding("tree", message, pack, digest, snapshot_id, page.path)
        self.result.unreadable.append(finding)

    def _read_page(self, page: Page) -> Children | None:
        """Return what a page holds, or None for one that was visited before."""
        is_damaged = page.ref.digest in self.damaged_trees
        is_unreadable = page.ref.digest in self._unreadable_trees
        if is_damaged:
            self._mark_above(page)
        if is_unreadable:
            self._mark_unreadable_above(page)
        digest = Digest(page.ref.digest)
        location = self._store.index.lookup(digest)
        if not is_damaged and not is_unreadable and self._was_visited(location):
            return None
        if digest in self.result.damaged:
            raise BlobError(digest, "digest mismatch", self.result.damaged[digest])
        if location is None:
            self._is_in_unindexed_pack(digest)
        piece = decode_piece(self._store.read(digest))
        _check_summary(page.ref, piece)
        self.result.trees += 1
        if isinstance(piece, Leaf):
            self._locate(piece.nodes)
            return piece.nodes
        return [part.tree for part in piece.pieces]

    def _locate(self, nodes: list[Node]) -> None:
        """Cache the locations of all single-chunk files among `nodes`, with one index lookup."""
        digests = [Digest(node.content[8:]) for node in nodes if _is_one_chunk(node)]
        if len(self._locations) > _MAX_LOCATIONS:
            self._locations.clear()
        found = zip(digests, self._store.index.lookup_many(digests), strict=True)
        self._locations.update((digest, at) for digest, at in found if at is not None)

    def _mark_above(self, page: Page) -> None:
        """Mark a page and those above it as damaged."""
        for above in page.with_ancestors():
            self.damaged_trees.add(above.ref.digest)

    def _mark_unreadable_above(self, page: Page) -> None:
        """Mark a page and those above it: a part of them was not checked.

        They are not marked as damaged, because a repair drops what it cannot read of a damaged directory.
        """
        for above in page.with_ancestors():
            self._unreadable_trees.add(above.ref.digest)

    def _was_visited(self, location: Location | None) -> bool:
        return location is not None and not self._visited.add(location.ordinal)

    def _is_stable_intact_chunk(self, node: Node) -> bool:
        """Return whether a file is what most files are: a stable capture in one chunk that is intact."""
        return (
            node.state == _STABLE
            and node.extra is None
            and not self.result.unreadable_packs
            and self._is_intact_single_chunk(node)
        )

    def _check_file(self, snapshot_id: SnapshotId, page: Page, node: Node, path: bytes) -> None:
        """Check a file of a page, and mark the page where the file is damaged or was not checked."""
        lost: list[tuple[int, int]] = []
        blob: Digest | None = None
        unreadable: list[tuple[int, int]] = []
        refused: tuple[Digest, PackId] | None = None
        done = 0
        try:
            _check_capture(node)
            if self._is_intact_single_chunk(node):
                return
            for extent in self._repository.content(node).extents(lost_lists=True):
                done = extent.begin + extent.length
                pack = self._unreadable_pack(extent.digest)
                if extent.digest is not None and pack is not None:
                    unreadable.append((extent.begin, done))
                    refused = refused or (extent.digest, pack)
                elif not self.is_intact(extent):
                    lost.append((extent.begin, done))
                    blob = blob or extent.digest
            if done != node.size:
                raise TreeError(f"the content list covers {done} bytes, captured were {node.size}")
        except IntegrityError as error:
            self._report(Finding("file", str(error), snapshot=snapshot_id, path=path))
            self._mark_above(page)
            return
        if lost:
            message = f"bytes {_listed(lost)} of {node.size} are lost"
            self._report(Finding("file", message, None, blob, snapshot_id, path, tuple(lost)))
            self._mark_above(page)
        if refused is not None:
            message = (
                f"bytes {_listed(unreadable)} of {node.size} were not checked: "
                "this user has no permission to read their pack"
            )
            digest, pack = refused
            self.result.unreadable.append(
                Finding("file", message, pack, digest, snapshot_id, path, tuple(unreadable))
            )
            self._mark_unreadable_above(page)

    def _is_intact_single_chunk(self, node: Node) -> bool:
        """Return whether a file is a single intact chunk whose location is cached."""
        if not _is_one_chunk(node):
            return False
        length, digest = EXTENT.unpack(node.content)
        location = self._locations.get(digest)
        return (
            location is not None
            and location.plain_bytes == length == node.size
            and digest not in self.result.damaged
            and self._unreadable_pack(digest) is None
        )

    def is_intact(self, extent: Extent) -> bool:
        """Return whether a chunk is stored and was not found damaged; one that may not be read is no loss.

        Raises TreeError where the index and the content list disagree about its length.
        """
        if extent.digest is None:
            return True
        if self._unreadable_pack(extent.digest) is not None:
            return True
        location = self._store.index.lookup(extent.digest)
        if extent.lost or extent.digest in self.result.damaged:
            return False
        if location is None:
            return self._is_in_unindexed_pack(extent.digest)
        if location.plain_bytes != extent.length:
            raise TreeError(
                f"chunk length mismatch: {location.plain_bytes} bytes stored, {extent.length} recorded"
            )
        return True

    def _unreadable_pack(self, digest: Digest | None) -> PackId | None:
        """Return the pack of a blob where this user has no permission to read that pack."""
        if digest is None or not self.result.unreadable_packs:
            return None
        location = self._store.index.lookup(digest)
        if location is None:
            return None
        pack = self._store.index.pack_ref(location.pack).id
        return pack if pack in self.result.unreadable_packs else None

    def _is_in_unindexed_pack(self, digest: Digest) -> bool:
        """Return whether a pack holds a needed blob that the index lacks, and report the index."""
        pack = self.result.unknown.get(digest)
        if pack is not None and digest not in self._reported_unknown:
            self._reported_unknown.add(digest)
            message = "a stored blob is missing from it; run `casfs repair index`"
            self._report(Finding("index", message, pack, digest))
        return pack is not None


def _listed(ranges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{begin}-{end}" for begin, end in ranges)


def _is_one_chunk(node: Node) -> bool:
    return len(node.content) == EXTENT.size and not node.levels and node.kind == _FILE


def _check_summary(ref: TreeRef, piece: object) -> None:
    if isinstance(piece, Leaf):
        recomputed = subtree_summary(piece.nodes)
        xattrs = xattr_count(piece.nodes)
    else:
        parts = [part.tree for part in piece.pieces]  # type: ignore[attr-defined]
        recomputed = (
            sum(part.nodes for part in parts),
            min(sum(part.total_bytes for part in parts), MAX_FILE_BYTES),
            sum(part.flagged for part in parts),
        )
        xattrs = sum_of_counts(part.xattrs for part in parts)
    is_counted = ref.xattrs is not None
    if recomputed != (ref.nodes, ref.total_bytes, ref.flagged) or (
        is_counted and ref.xattrs != xattrs
    ):
        raise TreeError("the summary differs from the entries")


def _check_capture(node: Node) -> None:
    """Raise TreeError where the state of a file contradicts its two digests."""
    capture = node.extra.capture if node.extra is not None else None
    if node.state == CaptureState.CHANGED and capture is None:
        raise TreeError("the state is `changed`, but the capture record is missing")
    observed = capture.observed if capture is not None else None
    if node.state == CaptureState.STABLE and observed not in (None, captured_digest(node)):
        raise TreeError("the state is `stable`, but two reads saw different data")
