"""Decide whether the content of unchanged files is still stored, where the index has lost something."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from casfs.digest import SnapshotId
from casfs.errors import IntegrityError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node
from casfs.repository.repository import Repository

_VERIFIED_AT_ONCE = 1000
"""Blobs of a file whose places are verified together."""


def content_check(
    repository: Repository, parent: tuple[SnapshotId, Snapshot] | None
) -> Callable[[Node], bool] | None:
    """Return a predicate whether the content of an unchanged file is still stored, or None.

    None means that it is known to be stored: the index has lost nothing since the parent was published, and
    no pack is marked for removal.
    """
    index = repository.store.index
    if parent is None or (index.is_complete(parent[0]) and not index.untrusted_packs()):
        return None

    # A new index has only claims of what the parent needs. This machine verified or stored it at the time of
    # the parent; only after a loss may the index have another claim in its place.
    verifies = index.was_complete(parent[0])

    def is_stored(node: Node) -> bool:
        blobs = repository.content(node).blobs()
        try:
            if not verifies:
                return all(index.are_stored(blobs))
            while batch := list(islice(blobs, _VERIFIED_AT_ONCE)):
                if not all(repository.claims.are_stored(batch)):
                    return False
        except IntegrityError:
            return False
        return True

    return is_stored
