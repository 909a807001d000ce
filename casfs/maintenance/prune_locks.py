"""Object lock in a prune: locked packs stay until their locks end, and needed locks are extended.

A pack whose lock has not ended is neither marked for removal nor repacked: the server would keep it, and
writers would store its blobs again. That is no error: a later prune removes it. What kept snapshots need is
locked again, so that a snapshot that the retention rules keep for years is protected for as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

from casfs.backup.protection import Protection, ProtectionResult
from casfs.digest import SnapshotId
from casfs.index.schema import PackRecord
from casfs.repository.lock_dates import held_until_s
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name

_NS = 1_000_000_000


def held_packs(
    repository: Repository, records: Mapping[int, PackRecord], ordinals: Set[int]
) -> dict[int, int]:
    """Return until when locks hold packs (ordinals), in seconds since 1970; the others can be removed.

    Raise StorageError.
    """
    names = {pack_name(records[ordinal].pack): ordinal for ordinal in sorted(ordinals)}
    now_s = repository.clock.now_ns() // _NS
    held = held_until_s(repository.store.storage, list(names), now_s)
    return {names[name]: until_s for name, until_s in held.items()}


def extend_locks(
    repository: Repository,
    needed: Callable[[], Iterable[PackRecord]],
    snapshots: Iterable[SnapshotId],
) -> ProtectionResult | None:
    """Lock kept snapshots and the packs that they need as the lock policy says; None without a policy.

    `needed` returns these packs; it is called only where there is a policy. Raise StorageError and
    StorageUnavailableError.
    """
    protection = Protection.begin(repository)
    if protection is None:
        return None
    return protection.protect_kept([pack_name(record.pack) for record in needed()], snapshots)
