"""Check until when snapshots are protected by object lock, and that what they need is locked as long.

The locks are asked of the server, not of this machine's record. Snapshots are visited from the longest lock
to the shortest, so that the first snapshot that needs a pack is the one that needs it for longest, and no
directory is read twice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from casfs.backup.relied_packs import ReliedPacks
from casfs.digest import SnapshotId
from casfs.errors import IntegrityError, NotFoundError
from casfs.monitor import Monitor, Unit
from casfs.repository.lock_dates import lock_ends_s, locking_bucket
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShortLock:
    """A pack (its object's name) that is locked for less long than a snapshot that needs it.

    `until_s` is None for a pack without a lock.
    """

    snapshot: SnapshotId
    snapshot_until_s: int
    pack: str
    until_s: int | None


@dataclass(slots=True)
class LockReport:
    """The end of the lock of each snapshot, None without a lock, and the packs that are locked too short."""

    snapshots: dict[SnapshotId, int | None] = field(default_factory=dict)
    short: list[ShortLock] = field(default_factory=list)


def check_locks(repository: Repository, monitor: Monitor, now_s: int) -> LockReport | None:
    """Return the ends of the locks, or None where the place locks nothing; raise StorageError.

    A lock that ended before `now_s` counts as none.
    """
    bucket = locking_bucket(repository.store.storage)
    if bucket is None:
        return None
    monitor.progress.begin("asking for locks", Unit.PACKS)
    names = {f"snapshots/{one.hex()}": one for one in repository.snapshots.ids()}
    ends_s = lock_ends_s(bucket, list(names))
    report = LockReport()
    for name, snapshot_id in names.items():
        end_s = ends_s.get(name)
        report.snapshots[snapshot_id] = end_s if end_s is not None and end_s > now_s else None
    needed = _needed_packs(repository, report.snapshots)
    pack_ends_s = lock_ends_s(bucket, list(needed))
    for pack, (snapshot_id, until_s) in needed.items():
        end_s = pack_ends_s.get(pack)
        if end_s is None or end_s < until_s:
            report.short.append(ShortLock(snapshot_id, until_s, pack, end_s))
    return report


def _needed_packs(
    repository: Repository, snapshots: dict[SnapshotId, int | None]
) -> dict[str, tuple[SnapshotId, int]]:
    """Return each pack that locked snapshots need, with the one of them that is locked for longest."""
    locked = [(until_s, one) for one, until_s in snapshots.items() if until_s is not None]
    packs = {record.ordinal: record.pack for record in repository.store.index.packs()}
    relied = ReliedPacks(repository, packs.keys())
    needed: dict[str, tuple[SnapshotId, int]] = {}
    for until_s, snapshot_id in sorted(locked, reverse=True):
        before = set(relied.found)
        try:
            root = repository.snapshots.load(snapshot_id).root
            assert root.tree is not None
            relied.add(root.tree)
        except NotFoundError:
            continue
        except IntegrityError as error:
            log.info("the packs that a damaged snapshot needs are not all known: %s", error)
        for ordinal in relied.found - before:
            needed[pack_name(packs[ordinal])] = snapshot_id, until_s
    return needed
