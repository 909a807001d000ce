"""Changing a snapshot's tags: a new snapshot that says which it replaces, then the old one goes.

A crash between the two leaves both, of which only the new one is listed.
"""

from __future__ import annotations

import msgspec

from casfs.digest import SnapshotId
from casfs.format.snapshot import Snapshot
from casfs.repository.repository import Repository


def retag(
    repository: Repository, snapshot_id: SnapshotId, snapshot: Snapshot, tags: tuple[str, ...]
) -> tuple[SnapshotId, Snapshot]:
    """Give a snapshot other tags and return it with its new id; equal tags change nothing."""
    if tags == snapshot.tags:
        return snapshot_id, snapshot
    new_id = repository.replace_snapshot(snapshot_id, snapshot, tags=tags)
    return new_id, msgspec.structs.replace(snapshot, tags=tags, replaces=snapshot_id)
