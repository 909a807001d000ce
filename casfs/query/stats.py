"""Sizes: what a repository stores, and what of it one snapshot needs and no other.

Every distinct tree is read once. Sets of blobs are bitmaps over the ordinals of the index, one bit for
a blob, whatever the number of snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass

from casfs.digest import SnapshotId
from casfs.errors import NotFoundError
from casfs.format.tree import Node, NodeType, subtree_count
from casfs.repository.repository import Repository
from casfs.repository.used_blobs import UsedBlobs
from casfs.store.blob_store import pack_name
from casfs.trees.reader import flagged_below

_MAX_ASKED_PACKS = 100


@dataclass(frozen=True, slots=True)
class RepositoryStats:
    """What is stored; `plain_bytes` before compression, `total_bytes` of the files of all snapshots."""

    snapshots: int
    packs: int
    pack_bytes: int
    blobs: int
    plain_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotContentStats:
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


@dataclass(frozen=True, slots=True)
class PackStats:
    """What lies in packs; no key is needed to know it.

    `oldest_verification_ns` is when the pack that was verified longest ago was verified, or written by
    the storage's clock where it never was; None without any pack.
    """

    packs: int
    pack_bytes: int
    unverified_packs: int
    oldest_verification_ns: int | None


def pack_stats(repository: Repository) -> PackStats:
    """Return the sizes of all packs, and for how long one of them has not been verified."""
    packs = repository.store.index.packs()
    unverified = [pack for pack in packs if not pack.verified_s]
    times_ns = [pack.verified_s * 1_000_000_000 for pack in packs if pack.verified_s]
    # Packs are numbered as they come, so the first of them are the oldest; to ask for the time of each
    # would be a request a pack.
    for pack in unverified[:_MAX_ASKED_PACKS]:
        try:
            times_ns.append(repository.store.storage.mtime_ns(pack_name(pack.pack)))
        except NotFoundError:
            continue  # a prune has just removed it
    return PackStats(
        packs=len(packs),
        pack_bytes=sum(pack.pack_bytes for pack in packs),
        unverified_packs=len(unverified),
        oldest_verification_ns=min(times_ns, default=None),
    )


def repository_stats(repository: Repository) -> RepositoryStats:
    """Return the sizes of the whole repository, from the index and the snapshots' summaries."""
    packs = repository.store.index.packs()
    totals = [snapshot.root.tree for _, snapshot in repository.snapshots.iterate()]
    return RepositoryStats(
        snapshots=len(totals),
        packs=len(packs),
        pack_bytes=sum(pack.pack_bytes for pack in packs),
        blobs=repository.store.index.blob_count(),
        plain_bytes=sum(place.plain_bytes for _, place in repository.store.index.blobs()),
        total_bytes=sum(tree.total_bytes for tree in totals if tree is not None),
    )


def snapshot_stats(repository: Repository, spec: str) -> SnapshotContentStats:
    """Return the sizes of what `SNAP` or `SNAP:PATH` names.

    Raises NotFoundError, and BlobError or TreeError where a tree of any snapshot is damaged.
    """
    snapshot_id, _, _, node = repository.snapshots.resolve_path(spec)
    others = UsedBlobs(repository)
    for other_id, other in repository.snapshots.iterate():
        if other_id != snapshot_id:
            others.add(other.root)
    needs = UsedBlobs(repository, others.blobs)
    needs.add(node)
    return SnapshotContentStats(
        snapshot_id=snapshot_id,
        entries=subtree_count(node) - (node.tree is not None),
        total_bytes=_file_bytes(node),
        flagged=flagged_below(node),
        blobs=needs.count,
        stored_bytes=needs.stored_bytes,
        unique_stored_bytes=needs.stored_bytes - needs.other_stored_bytes,
    )


def _file_bytes(node: Node) -> int:
    if node.tree is not None:
        return node.tree.total_bytes
    return node.size if node.kind == NodeType.FILE else 0
