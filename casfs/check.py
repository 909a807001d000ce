"""Check: every snapshot, tree, content list and index entry, and with `read_data` every stored byte.

Problems are collected and never raised: what is lost is told as paths and byte ranges of snapshots.
A tree that several snapshots share is walked once, and again only where something below it is damaged,
so that every snapshot's losses are named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from casfs.content import Extent
from casfs.digest import Digest, PackId, SnapshotId
from casfs.errors import BlobError, CasfsError, IntegrityError, PackError, TreeError
from casfs.monitor import Monitor
from casfs.repository import Repository
from casfs.store.pack import TRAILER, PackEntry
from casfs.store.store import pack_name
from casfs.tree import (
    MAX_DEPTH,
    Kind,
    Leaf,
    Node,
    State,
    TreeRef,
    captured_digest,
    decode_piece,
    summary_of,
)
from casfs.treereader import join

log = logging.getLogger(__name__)

_WINDOW_BYTES = 8 * 1024 * 1024
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it should be.

    `what` is "pack", "blob", "index", "snapshot", "tree" or "file"; fields that do not apply are
    None. `ranges` are begin and end in bytes of what a file has lost.
    """

    what: str
    message: str
    pack: PackId | None = None
    blob: Digest | None = None
    snapshot: SnapshotId | None = None
    path: bytes | None = None
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class CheckResult:
    """What was looked at, and what was found; `flagged` counts files captured while they changed."""

    snapshots: int = 0
    trees: int = 0
    files: int = 0
    flagged: int = 0
    packs: int = 0
    packs_read: int = 0
    blobs_read: int = 0
    read_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)


class Checker:
    """Check one repository; used once."""

    def __init__(self, repository: Repository, monitor: Monitor) -> None:
        self.result = CheckResult()
        self._repository = repository
        self._store = repository.store
        self._monitor = monitor
        self._bad: dict[Digest, PackId] = {}
        self._pack_bytes: dict[int, int] = {}
        self._visited = bytearray()
        self._damaged_trees: set[bytes] = set()

    def check(self, read_data: bool = False, share: float = 1.0) -> CheckResult:
        """Check the structure, and read the given share (0 to 1) of the packs where asked for."""
        self._check_packs(read_data, share)
        self._check_snapshots()
        return self.result

    def _report(self, damage: Damage) -> None:
        self.result.damage.append(damage)

    def _check_packs(self, read_data: bool, share: float) -> None:
        # A backup may be running: what the index names first is in the storage by the time of the
        # listing, and what is found beyond that is newer than this check.
        entries_before = self._store.index.blob_count()
        records = self._store.index.packs()
        stored = dict(self._store.stored_packs())
        ordinals: dict[int, PackId] = {}
        for record in records:
            ordinals[record.ordinal] = record.pack
            self._pack_bytes[record.ordinal] = stored.get(record.pack, 0)
            if record.pack not in stored:
                message = "the index names it, but it is missing"
                self._report(Damage("pack", message, pack=record.pack))
            elif stored[record.pack] != record.pack_bytes:
                message = (
                    f"it has {stored[record.pack]} bytes where {record.pack_bytes} were stored"
                )
                self._report(Damage("pack", message, pack=record.pack))
        self.result.packs = len(stored)
        wanted = set(_share_of(sorted(stored), share)) if read_data else set()
        self._monitor.progress.total_bytes = sum(stored[pack] for pack in wanted)
        known = set(ordinals.values())
        indexed = 0
        with ThreadPoolExecutor(_THREADS, "casfs-check") as pool:
            jobs = ((pack, size, pack in wanted) for pack, size in sorted(stored.items()))
            for pack, entries, damage in pool.map(lambda job: self._check_pack(*job), jobs):
                for found in damage:
                    self._report(found)
                    # Of a blob that two packs hold, only the copy that the index names is read.
                    if found.blob is not None and self._is_indexed(found.blob, pack, ordinals):
                        self._bad[found.blob] = pack
                if pack in known:
                    indexed += self._compare_index(pack, entries, ordinals)
                if pack in wanted:
                    self.result.packs_read += 1
                    self.result.read_bytes += stored[pack]
                    self.result.blobs_read += len(entries)
                    self._monitor.progress.done_bytes += stored[pack]
        if indexed < entries_before and not self.result.damage:
            message = "it has entries that no pack holds; it can be rebuilt from the packs"
            self._report(Damage("index", message))

    def _is_indexed(self, blob: Digest, pack: PackId, ordinals: dict[int, PackId]) -> bool:
        location = self._store.index.lookup(blob)
        return location is not None and ordinals.get(location.pack) == pack

    def _compare_index(
        self, pack: PackId, entries: list[PackEntry], ordinals: dict[int, PackId]
    ) -> int:
        """Compare a pack's directory with the index; return how many index entries point into it."""
        count = 0
        for entry in entries:
            location = self._store.index.lookup(entry.digest)
            if location is None:
                self._report(Damage("index", "it does not know the blob", pack, entry.digest))
            elif ordinals.get(location.pack) == pack:
                count += 1
                told = (location.offset, location.stored_bytes, location.plain_bytes)
                if told != (entry.offset, entry.stored_bytes, entry.plain_bytes):
                    message = "it names another place for the blob than its pack does"
                    self._report(Damage("index", message, pack, entry.digest))
        return count

    def _check_pack(
        self, pack: PackId, pack_bytes: int, read_data: bool
    ) -> tuple[PackId, list[PackEntry], list[Damage]]:
        damage: list[Damage] = []
        entries: list[PackEntry] = []
        try:
            entries = self._store.read_directory(pack, pack_bytes)
        except CasfsError as error:
            damage.append(Damage("pack", _reason(error), pack))
            try:
                entries = self._store.salvage_directory(pack, pack_bytes)
            except CasfsError as unreadable:
                damage.append(Damage("pack", _reason(unreadable), pack))
                return pack, entries, damage
        if read_data:
            damage += self._read_pack(pack, pack_bytes, entries)
        return pack, entries, damage

    def _read_pack(self, pack: PackId, pack_bytes: int, entries: list[PackEntry]) -> list[Damage]:
        """Recompute the digest of a pack and of every blob in it, in one pass."""
        damage: list[Damage] = []
        whole = blake3()
        reader = _PackReader(self._repository, pack, pack_bytes, whole)
        try:
            for entry in sorted(entries, key=lambda entry: entry.offset):
                payload = reader.read(entry.offset, entry.stored_bytes)
                try:
                    self._store.codec.decode(entry.digest, entry.codec, payload, entry.plain_bytes)
                except BlobError as error:
                    damage.append(Damage("blob", error.reason, pack, entry.digest))
            reader.read(pack_bytes - TRAILER.size, TRAILER.size)
        except CasfsError as error:
            damage.append(Damage("pack", _reason(error), pack))
            return damage
        if whole.digest() != pack:
            damage.append(Damage("pack", "its bytes do not have the digest that names it", pack))
        return damage

    def _check_snapshots(self) -> None:
        for snapshot_id in self._repository.snapshot_ids():
            self.result.snapshots += 1
            try:
                snapshot = self._repository.load(snapshot_id)
            except CasfsError as error:
                self._report(Damage("snapshot", str(error), snapshot=snapshot_id))
                continue
            self._walk(snapshot_id, snapshot.root)
            if snapshot.root.tree is not None:
                self.result.flagged += snapshot.root.tree.flagged

    def _walk(self, snapshot_id: SnapshotId, root: Node) -> None:
        """Visit the trees below a root; a directory whose loss is found marks those above it."""
        assert root.tree is not None
        stack: list[tuple[bytes, TreeRef, Iterator[Node | TreeRef]]] = []
        self._push(stack, snapshot_id, b"", root.tree)
        while stack:
            path, _, children = stack[-1]
            for child in children:
                if isinstance(child, TreeRef):
                    self._push(stack, snapshot_id, path, child)
                    break
                below = join(path, child.name)
                if child.tree is not None:
                    self._push(stack, snapshot_id, below, child.tree)
                    break
                if child.kind == Kind.FILE and not self._check_file(snapshot_id, below, child):
                    self._mark(stack)
            else:
                stack.pop()

    def _push(
        self,
        stack: list[tuple[bytes, TreeRef, Iterator[Node | TreeRef]]],
        snapshot_id: SnapshotId,
        path: bytes,
        ref: TreeRef,
    ) -> None:
        damaged_before = ref.digest in self._damaged_trees
        if not damaged_before and self._was_visited(ref):
            return
        if damaged_before:
            self._mark(stack)
        try:
            if len(stack) > 2 * MAX_DEPTH:
                raise TreeError("directories are nested deeper than the format allows")
            digest = Digest(ref.digest)
            if digest in self._bad:
                raise BlobError(digest, "its data does not have its digest", self._bad[digest])
            piece = decode_piece(self._store.read(Digest(ref.digest)))
            _check_summary(ref, piece)
        except (IntegrityError, CasfsError) as error:
            self._damaged_trees.add(ref.digest)
            self._mark(stack)
            self._report(
                Damage(
                    "tree",
                    f"the directory cannot be read: {error}",
                    getattr(error, "pack", None),
                    Digest(ref.digest),
                    snapshot_id,
                    path,
                )
            )
            return
        self.result.trees += 1
        if isinstance(piece, Leaf):
            children: Iterator[Node | TreeRef] = iter(piece.nodes)
        else:
            children = iter([part.tree for part in piece.pieces])
        stack.append((path, ref, children))

    def _mark(self, stack: list[tuple[bytes, TreeRef, Iterator[Node | TreeRef]]]) -> None:
        for _, ref, _ in stack:
            self._damaged_trees.add(ref.digest)

    def _was_visited(self, ref: TreeRef) -> bool:
        location = self._store.index.lookup(Digest(ref.digest))
        if location is None:
            return False
        place, bit = divmod(location.ordinal, 8)
        if place >= len(self._visited):
            self._visited.extend(bytes(place + 1 - len(self._visited) + (1 << 16)))
        if self._visited[place] & (1 << bit):
            return True
        self._visited[place] |= 1 << bit
        return False

    def _check_file(self, snapshot_id: SnapshotId, path: bytes, node: Node) -> bool:
        self.result.files += 1
        self._monitor.progress.files += 1
        lost: list[tuple[int, int]] = []
        blob: Digest | None = None
        done = 0
        try:
            _check_capture(node)
            for extent in self._repository.content(node).extents(lost_lists=True):
                done = extent.begin + extent.length
                if not self._is_sound(extent):
                    lost.append((extent.begin, done))
                    blob = blob or extent.digest
            if done != node.size:
                raise TreeError(f"its list tells {done} bytes where {node.size} were captured")
        except IntegrityError as error:
            self._report(Damage("file", str(error), snapshot=snapshot_id, path=path))
            return False
        if lost:
            ranges = ", ".join(f"{begin}-{end}" for begin, end in lost)
            message = f"the bytes {ranges} of {node.size} are lost"
            self._report(Damage("file", message, None, blob, snapshot_id, path, tuple(lost)))
        return not lost

    def _is_sound(self, extent: Extent) -> bool:
        if extent.digest is None:
            return True
        location = self._store.index.lookup(extent.digest)
        if extent.lost or location is None or extent.digest in self._bad:
            return False
        pack_bytes = self._pack_bytes.get(location.pack)
        if pack_bytes is not None and location.offset + location.stored_bytes > pack_bytes:
            return False
        if location.plain_bytes != extent.length:
            raise TreeError("a chunk does not have the length that is recorded for it")
        return True


class _PackReader:
    """Read a pack from its beginning to its end in windows, hashing all of it on the way."""

    def __init__(
        self, repository: Repository, pack: PackId, pack_bytes: int, whole: blake3
    ) -> None:
        self._storage = repository.store.storage
        self._name = pack_name(pack)
        self._pack_bytes = pack_bytes
        self._pack = pack
        self._whole = whole
        self._begin = 0
        self._data = b""

    def read(self, offset: int, size: int) -> bytes:
        """Return a range that lies at or behind the one before; what is between is hashed too."""
        while offset + size > self._begin + len(self._data):
            keep = self._data[max(offset - self._begin, 0) :]
            end = self._begin + len(self._data)
            more = self._storage.read(self._name, end, max(_WINDOW_BYTES, size))
            if not more:
                raise PackError(self._pack, "it ends before its last blob")
            self._whole.update(more)
            self._data = keep + more
            self._begin = end - len(keep)
        start = offset - self._begin
        return self._data[start : start + size]


def _share_of(packs: Iterable[PackId], share: float) -> list[PackId]:
    """Return the packs of a share: always the same ones for the same share, evenly spread."""
    limit = int(share * 2**64)
    return [pack for pack in packs if int.from_bytes(pack[:8], "big") < limit]


def _check_summary(ref: TreeRef, piece: object) -> None:
    if isinstance(piece, Leaf):
        told = summary_of(piece.nodes)
    else:
        parts = [part.tree for part in piece.pieces]  # type: ignore[attr-defined]
        told = (
            sum(part.nodes for part in parts),
            sum(part.total_bytes for part in parts),
            sum(part.flagged for part in parts),
        )
    if told != (ref.nodes, ref.total_bytes, ref.flagged):
        raise TreeError("its summary does not fit what is in it")


def _check_capture(node: Node) -> None:
    """Raise TreeError where a file's state and its two digests contradict each other."""
    capture = node.extra.capture if node.extra is not None else None
    if node.state == State.CHANGED and capture is None:
        raise TreeError("it is flagged without the evidence")
    observed = capture.observed if capture is not None else None
    if node.state == State.STABLE and observed not in (None, captured_digest(node)):
        raise TreeError("it is called stable, but two reads saw different data")


def _reason(error: CasfsError) -> str:
    return error.reason if isinstance(error, PackError) else str(error)
