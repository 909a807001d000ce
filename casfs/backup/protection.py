"""Protect a new snapshot by object lock, where the repository has a lock policy.

Before the snapshot is published, the packs that it needs are locked until the date of the snapshot's own
lock. Once it is there, the objects that open the repository are locked, and the snapshot itself. What cannot
be locked does not keep the backup from being published: the result says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from casfs.backup.relied_packs import ReliedPacks
from casfs.digest import SnapshotId, short_id
from casfs.errors import CasfsError, IntegrityError, StorageError, StorageUnavailableError
from casfs.format.config import CONFIG_NAME
from casfs.format.delta import FOLDER as DELTAS
from casfs.format.generation import FOLDER as DOMAINS
from casfs.format.lock_policy import FOLDER as POLICIES
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node
from casfs.repository.lock_policy import lock_duration_s
from casfs.repository.object_locks import ObjectLocks, lock_end_s
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name

log = logging.getLogger(__name__)

_NS = 1_000_000_000

_KEY_FOLDERS = ("sessions", "identities", DOMAINS)
"""What decrypts the packs and the snapshots of an encrypted repository."""


@dataclass(frozen=True, slots=True)
class ProtectionResult:
    """Until when a snapshot and all that it needs are locked, or what could not be locked."""

    until_s: int
    not_locked: int = 0
    error: CasfsError | None = None


class Protection:
    """The locks of one backup. Make it before the backup stores anything."""

    def __init__(self, repository: Repository, locks: ObjectLocks) -> None:
        self._repository = repository
        self._index = repository.store.index
        self._storage = repository.store.storage
        self._locks = locks
        self._packs_before = {record.pack for record in self._index.packs()}
        self._not_locked: set[str] = set()
        self._error: CasfsError | None = None

    @classmethod
    def begin(cls, repository: Repository) -> Protection | None:
        """Return the protection that the lock policy asks for, None without a policy."""
        storage = repository.store.storage
        lock_for_s = lock_duration_s(storage, repository.config)
        bucket = storage.bucket
        if not lock_for_s or bucket is None:
            return None
        now_s = repository.clock.now_ns() // _NS
        locks = ObjectLocks(bucket, repository.store.index, lock_end_s(now_s, lock_for_s))
        locks.drop_ended(now_s)
        return cls(repository, locks)

    def protect_needed(self, root: Node, parent: tuple[SnapshotId, Snapshot] | None) -> None:
        """Lock the packs that a new snapshot needs.

        Raise StorageUnavailableError; nothing was published then.
        """
        self._lock(self._packs_to_lock(root, parent))

    def _lock_rest(self) -> None:
        """Lock what opens the repository, and the packs that the publication of a snapshot stored.

        The publication may also store a session and index deltas.
        """
        new = [
            pack_name(record.pack)
            for record in self._index.packs()
            if record.pack not in self._packs_before
        ]
        self._lock(self._locks.not_locked(new))
        self._lock(self._locks.not_locked(self._key_objects()), may_be_missing=True)

    def protect_snapshot(self, snapshot_id: SnapshotId) -> ProtectionResult:
        """Lock a published snapshot and return whether it and all that it needs are protected."""
        name = f"snapshots/{snapshot_id.hex()}"
        # The lock of a snapshot shows that what it needs is locked as long, so it is the last one.
        try:
            self._lock_rest()
            self._lock([name])
        except (StorageError, StorageUnavailableError) as error:
            self._error = error
            self._not_locked.add(name)
        return ProtectionResult(self._locks.until_s, len(self._not_locked), self._error)

    def protect_kept(
        self, packs: Iterable[str], snapshots: Iterable[SnapshotId]
    ) -> ProtectionResult:
        """Extend the locks of snapshots that stay and of the packs (names) that they need.

        Raise StorageError and StorageUnavailableError.
        """
        self._lock(self._locks.not_locked(packs))
        self._lock_rest()
        names = [f"snapshots/{one.hex()}" for one in snapshots]
        self._lock(self._locks.not_locked(names), may_be_missing=True)
        return ProtectionResult(self._locks.until_s, len(self._not_locked), self._error)

    @classmethod
    def protect_published(cls, repository: Repository, snapshot_id: SnapshotId, root: Node) -> None:
        """Protect a snapshot that another command than `backup` published; warn where that fails."""
        try:
            protection = cls.begin(repository)
            if protection is None:
                return
            protection.protect_needed(root, None)
            error = protection.protect_snapshot(snapshot_id).error
        except (StorageError, StorageUnavailableError) as failure:
            error = failure
        if error is not None:
            log.warning("snapshot %s is not protected: %s", short_id(snapshot_id), error)

    def _lock(self, names: list[str], may_be_missing: bool = False) -> None:
        if not names:
            return
        if self._error is not None:
            self._not_locked.update(names)
            return
        failure = self._locks.lock(names, may_be_missing)
        if failure is not None:
            self._error = failure.error
            self._not_locked |= failure.names

    def _packs_to_lock(self, root: Node, parent: tuple[SnapshotId, Snapshot] | None) -> list[str]:
        new, doubtful = [], {}
        for record in self._index.packs():
            name = pack_name(record.pack)
            if record.pack not in self._packs_before:
                new.append(name)
            elif self._locks.locked_until_s(name) < self._locks.until_s:
                doubtful[record.ordinal] = name
        if not doubtful or root.tree is None:
            return new
        if self._repository.lacks_identity:
            # It cannot read its own snapshots; its index has the packs that this machine stored.
            return new + list(doubtful.values())
        relied = ReliedPacks(self._repository, doubtful.keys())
        covered = parent[1].root.tree if parent is not None and self._covers(parent[0]) else None
        try:
            relied.add(root.tree, covered)
        except IntegrityError as error:
            log.warning("%s; all packs are locked", error)
            return new + list(doubtful.values())
        return new + [doubtful[ordinal] for ordinal in sorted(relied.found)]

    def _covers(self, snapshot_id: SnapshotId) -> bool:
        """Return whether this machine has locked all that a snapshot needs for long enough."""
        name = f"snapshots/{snapshot_id.hex()}"
        return self._locks.locked_until_s(name) >= self._locks.until_s

    def _key_objects(self) -> list[str]:
        """Return the names of the objects without which the packs cannot be used."""
        folders = [POLICIES, DELTAS]
        names = [CONFIG_NAME]
        if self._repository.config.encryption is not None:
            from casfs.crypto.recipients import RECIPIENTS_NAME

            names.append(RECIPIENTS_NAME)
            folders += _KEY_FOLDERS
        for folder in folders:
            names += [entry.name for entry in self._storage.list(folder)]
        return names
