"""Statistics of a repository, and of one snapshot, including the data that no other snapshot needs.

Every distinct tree is read once. Sets of blobs are bitmaps over the ordinals of the index, one bit per blob,
independent of the number of snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass

from casfs.digest import SnapshotId
from casfs.errors import NotFoundError
from casfs.format.tree import Node, NodeType, subtree_count
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.repository import Repository
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS, SnapshotFilter
from casfs.store.blob_store import pack_name
from casfs.store.pack_shares import stored_bytes
from casfs.trees.reader import flagged_below

_MAX_TIME_REQUESTS = 100


@dataclass(frozen=True, slots=True)
class RepositoryStats:
    """Counts and sizes of a repository.

    `plain_bytes` is the size of all blobs before compression, `total_bytes` that of all files in all
    snapshots.
    """

    snapshots: int
    unproven: int
    packs: int
    pack_bytes: int
    blobs: int
    plain_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotContentStats:
    """Counts and sizes of a snapshot, or of a part of it.

    `blobs` is the number of distinct blobs that it needs, data and trees, `stored_bytes` their size in packs,
    and `unique_stored_bytes` the size of those that no other snapshot needs.
    """

    snapshot_id: SnapshotId
    entries: int
    total_bytes: int
    flagged: int
    blobs: int
    stored_bytes: int
    unique_stored_bytes: int


@dataclass(frozen=True, slots=True)
class PackStats:
    """Counts and sizes of the packs, which need no key.

    `oldest_verification_ns` is the earliest time of the last verification of any pack. For a pack that was
    never verified, the time when the storage received it counts. None without packs.
    """

    packs: int
    pack_bytes: int
    unverified_packs: int
    oldest_verification_ns: int | None


def pack_stats(repository: Repository) -> PackStats:
    """Return the sizes of all packs, and the time of the oldest verification."""
    packs = repository.store.index.packs()
    unverified = [pack for pack in packs if not pack.verified_s]
    times_ns = [pack.verified_s * 1_000_000_000 for pack in packs if pack.verified_s]
    # Each time is one request to the storage. Older packs have lower ordinals, so the first ones suffice.
    for pack in unverified[:_MAX_TIME_REQUESTS]:
        try:
            times_ns.append(repository.store.storage.mtime_ns(pack_name(pack.pack)))
        except NotFoundError:
            continue  # removed by a concurrent prune
    return PackStats(
        packs=len(packs),
        pack_bytes=sum(pack.pack_bytes for pack in packs),
        unverified_packs=len(unverified),
        oldest_verification_ns=min(times_ns, default=None),
    )


def repository_stats(repository: Repository) -> RepositoryStats:
    """Return the sizes of the whole repository, from the index and the snapshots' summaries."""
    packs = repository.store.index.packs()
    snapshots = list(repository.snapshots.iterate())
    totals = [snapshot.root.tree for _, snapshot in snapshots]
    return RepositoryStats(
        snapshots=len(snapshots),
        unproven=sum(
            not repository.snapshots.provenance.is_from_trusted_writer(one) for one, _ in snapshots
        ),
        packs=len(packs),
        pack_bytes=sum(pack.pack_bytes for pack in packs),
        blobs=repository.store.index.blob_count(),
        plain_bytes=sum(location.plain_bytes for _, location in repository.store.index.blobs()),
        total_bytes=sum(tree.total_bytes for tree in totals if tree is not None),
    )


def snapshot_stats(
    repository: Repository, spec: str, latest_of: SnapshotFilter = ALL_SNAPSHOTS
) -> SnapshotContentStats:
    """Return the sizes of the snapshot or entry that `spec` (`SNAP` or `SNAP:PATH`) names.

    `latest` is the newest snapshot that `latest_of` accepts. Raises NotFoundError, and BlobError or TreeError
    where a tree of any snapshot is damaged.
    """
    snapshot_id, _, _, node = repository.snapshots.resolve_path(spec, latest_of)
    others = NeededBlobs(repository)
    for other_id, other in repository.snapshots.iterate():
        if other_id != snapshot_id:
            others.add(other.root)
    needed = NeededBlobs(repository, others.blobs)
    needed.add(node)
    index = repository.store.index
    needed_bytes = stored_bytes(index, needed.shares)
    return SnapshotContentStats(
        snapshot_id=snapshot_id,
        entries=subtree_count(node) - (node.tree is not None),
        total_bytes=_file_bytes(node),
        flagged=flagged_below(node),
        blobs=needed.count,
        stored_bytes=needed_bytes,
        unique_stored_bytes=needed_bytes - stored_bytes(index, needed.other_shares),
    )


def _file_bytes(node: Node) -> int:
    if node.tree is not None:
        return node.tree.total_bytes
    return node.size if node.kind == NodeType.FILE else 0
