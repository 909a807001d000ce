"""Rewrite snapshots without the paths that patterns match; what other snapshots share stays.

Every rewritten snapshot is published as one that replaces the old one (`SnapshotStore.replace`). A prune
frees the data that no snapshot needs any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from casfs.backup.protection import Protection
from casfs.digest import SnapshotId, short_id
from casfs.errors import RefusedError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, TreeRef
from casfs.monitor import Monitor
from casfs.patterns import Pattern, PatternMatcher
from casfs.repository.repository import Repository
from casfs.trees.rewrite import rewrite_tree
from casfs.trees.writer import TreeWriter


@dataclass(slots=True)
class RewrittenSnapshot:
    """The outcome for one snapshot; `new_id` is None where nothing matched, and in a dry run."""

    snapshot_id: SnapshotId
    new_id: SnapshotId | None
    removed: list[bytes]
    """The paths that were left out; what is below a directory is not listed."""


def rewrite_snapshot(
    repository: Repository,
    snapshot_id: SnapshotId,
    snapshot: Snapshot,
    exclude: Sequence[Pattern],
    monitor: Monitor,
    dry_run: bool = False,
) -> RewrittenSnapshot:
    """Publish a snapshot without the entries that the patterns match, and delete the old one.

    Raises RefusedError for a snapshot that no trusted writer published, since the new one would look as if
    one had; BlobError and TreeError for a damaged tree, and then publishes nothing.
    """
    if not repository.snapshots.provenance.is_from_trusted_writer(snapshot_id):
        raise RefusedError(
            f"snapshot {short_id(snapshot_id)} is unproven: no writer that this repository trusts published "
            "it; it is not rewritten"
        )
    return repository.snapshots.repeat_until_published(
        lambda: _rewrite_and_publish(
            repository, snapshot_id, snapshot, PatternMatcher(exclude), monitor, dry_run
        ),
        "rewriting the snapshot",
    )


def _rewrite_and_publish(
    repository: Repository,
    snapshot_id: SnapshotId,
    snapshot: Snapshot,
    matcher: PatternMatcher,
    monitor: Monitor,
    dry_run: bool,
) -> RewrittenSnapshot:
    """Store the new directories and publish the new snapshot."""
    removed: list[bytes] = []

    def change(node: Node, path: bytes) -> Node | None:
        monitor.progress.path = path
        if matcher.matches(path, node.tree is not None):
            removed.append(path)
            return None
        return node

    writer = repository.writer(dry_run)

    def new_tree(previous: TreeRef) -> TreeWriter:
        single = repository.trees.unsplit_entries(previous)
        return repository.tree_writer(writer.put, previous, single)

    try:
        root = snapshot.root
        if root.tree is not None:
            root = rewrite_tree(
                root,
                b"",
                entries=lambda node, _: (
                    repository.trees.nodes(node.tree) if node.tree else iter(())
                ),
                new_tree=new_tree,
                change=change,
                known=lambda _: None,
            )
        writer.finish()
    finally:
        writer.close()
    if dry_run or not removed:
        return RewrittenSnapshot(snapshot_id, None, removed)
    new_id = repository.snapshots.replace(snapshot_id, snapshot, root=root)
    Protection.protect_published(repository, new_id, root)
    return RewrittenSnapshot(snapshot_id, new_id, removed)
