"""Which snapshots and drafts a storage has, by the names of their objects."""

from __future__ import annotations

import re
import time

from casfs.digest import SnapshotId
from casfs.storage.base import Storage
from casfs.storage.concurrency import begin

SNAPSHOTS = "snapshots"
DRAFTS = "drafts"
"""The folder of snapshots that are about to be published (FORMAT.md, "Many hosts")."""

_ID = re.compile("[0-9a-f]{64}")

_FRESH_S = 10.0
"""How old a listing may be that was begun when the repository was opened."""


class SnapshotListing:
    """A listing of the snapshots that is under way while a repository is opened."""

    def __init__(self, storage: Storage) -> None:
        self._began_s = time.monotonic()
        self._wait = begin(storage, lambda: list_ids(storage, SNAPSHOTS))

    def is_fresh(self) -> bool:
        """Return whether it began a short time ago."""
        return time.monotonic() - self._began_s < _FRESH_S

    def ids(self) -> list[SnapshotId]:
        """Wait for the listing and return its ids; raise its error."""
        return self._wait()


def list_ahead(storage: Storage) -> SnapshotListing | None:
    """Begin a listing of the snapshots where it would cost a round trip later, else return None."""
    return SnapshotListing(storage) if storage.capabilities.parallel_requests > 1 else None


def list_ids(storage: Storage, folder: str) -> list[SnapshotId]:
    """Return the ids of all snapshots, or of all drafts, sorted; objects with other names are ignored."""
    ids = (id_in_name(name) for name, _, _ in storage.list(folder))
    return [one for one in ids if one is not None]


def id_in_name(name: str) -> SnapshotId | None:
    """Return the id in the name of a snapshot's or draft's object, None where there is none."""
    text = name.rpartition("/")[2]
    return SnapshotId(bytes.fromhex(text)) if _ID.fullmatch(text) else None
