"""Drafts as a prune sees them: snapshots that a host is about to publish over a network (FORMAT.md).

A draft keeps the data of its snapshot. So one that a dead host left would keep it for ever, and one that is
damaged, whose needs are unknown, would end every prune. A prune deletes a draft that is older than
`ABANDONED_NS` and whose writer is not seen any more. A damaged one goes by its name only. A writer that was
suspended meanwhile stores its draft again, and looks again, before it publishes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from casfs.digest import SnapshotId, short_id
from casfs.display import format_duration
from casfs.errors import AmbiguousIdError, IntegrityError, NotFoundError, RefusedError
from casfs.format.snapshot import MAX_SNAPSHOT_BYTES
from casfs.maintenance.prune_plan import SHARED_MARGIN_S
from casfs.maintenance.prune_result import NeededBlobsUnknownError, SnapshotClosedError
from casfs.maintenance.repair import DAMAGED_FOLDER
from casfs.repository.presence import PresentProcess
from casfs.repository.repository import Repository
from casfs.repository.snapshot_listing import DRAFTS, id_in_name
from casfs.storage.base import Storage
from casfs.storage.locks import LockMode

log = logging.getLogger(__name__)

_NS = 1_000_000_000

ABANDONED_NS = 7 * 86_400 * _NS
"""A draft that is older by the storage's clock is abandoned, unless its writer is seen."""


class DraftUnreadableError(NeededBlobsUnknownError):
    """A draft, or a tree that it needs, cannot be read, so the needed blobs are unknown."""

    def __str__(self) -> str:
        return _message_about(
            self.snapshot_id, self.cause, "If no backup is about to publish it, drop it"
        )


class DraftClosedError(SnapshotClosedError):
    """The identities do not decrypt a draft, so the needed blobs are unknown."""

    def __str__(self) -> str:
        return _message_about(
            self.snapshot_id,
            self.cause,
            "Give an identity or a passphrase for which it was stored, or drop it",
        )


def _message_about(draft: SnapshotId, cause: object, advice: str) -> str:
    """Return the sentences about a draft that ends a prune; `advice` ends with dropping it."""
    name = short_id(draft)
    return (
        f"the blobs that draft {name}, a snapshot that was never published, needs are unknown: {cause}; "
        f"nothing was removed. {advice} with `casfs prune --drop-draft {name}` once it is "
        f"{format_duration(SHARED_MARGIN_S)} old"
    )


def list_drafts(storage: Storage) -> dict[SnapshotId, int]:
    """Return the drafts, each with the time of its object in nanoseconds; raise StorageError."""
    found = {}
    for name, _, mtime_ns in storage.list(DRAFTS):
        snapshot_id = id_in_name(name)
        if snapshot_id is not None:
            found[snapshot_id] = mtime_ns
    return found


def abandoned_drafts(
    drafts: Mapping[SnapshotId, int], processes: Iterable[PresentProcess], before_ns: int
) -> set[SnapshotId]:
    """Return the drafts that were stored before a time, and by none of the processes that are seen."""
    writers = [one for one in processes if one.record.mode != LockMode.READER]
    began_ns = min((one.record.since_ns for one in writers), default=before_ns)
    return {draft for draft, mtime_ns in drafts.items() if mtime_ns < min(before_ns, began_ns)}


def drop_draft(
    repository: Repository, prefix: str, margin_s: float | None, dry_run: bool = False
) -> SnapshotId:
    """Delete the draft whose id begins with `prefix`, intact or not, and return its id.

    A copy goes to the folder of damaged files. Raise NotFoundError, AmbiguousIdError, and RefusedError for a
    draft that is younger than the margin, whose writer may be about to publish it.
    """
    storage = repository.store.storage
    drafts = list_drafts(storage)
    matches = [one for one in sorted(drafts) if prefix and one.hex().startswith(prefix.lower())]
    if not matches:
        raise NotFoundError(f"no draft has the id {prefix!r}; nothing was removed")
    if len(matches) > 1:
        raise AmbiguousIdError(prefix, [one.hex() for one in matches])
    (draft,) = matches
    least_s = SHARED_MARGIN_S if margin_s is None else margin_s
    age_s = (repository.clock.now_ns() - drafts[draft]) / _NS
    if age_s < least_s:
        raise RefusedError(
            f"draft {short_id(draft)} is not dropped: it is younger than {format_duration(int(least_s))}, so "
            "a host may be about to publish it; nothing was removed"
        )
    if not dry_run:
        name = f"{DRAFTS}/{draft.hex()}"
        try:
            data = storage.read(name, 0, MAX_SNAPSHOT_BYTES)
            storage.write(f"{DAMAGED_FOLDER}/{draft.hex()}", data)
        except (IntegrityError, NotFoundError) as error:
            log.warning("%s; no copy of the draft is kept", error)
        storage.delete(name)
    return draft
