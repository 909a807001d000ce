"""The writers of snapshots: which snapshots are proven, and which replace others.

Every writer to the storage can add snapshots. In an encrypted repository the writer of a proven
snapshot knew the repository's own secret, and in format 2 a machine that this one trusts for the host signed
it. Used by one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from casfs.digest import SnapshotId, short_id
from casfs.errors import (
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    RefusedError,
    StorageError,
)
from casfs.format.snapshot import Snapshot

if TYPE_CHECKING:
    # An unencrypted local repository does not need these imports.
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.writers import HostKey, SignedSnapshot, TrustedWriters
    from casfs.format.signature import Author, Signers

log = logging.getLogger(__name__)


class _Origin(NamedTuple):
    """Where a snapshot comes from; `knew_secret` says that its writer knew the repository's own secret."""

    knew_secret: bool
    host: str
    signers: Signers | None


class Provenance:
    """The origins of the snapshots of one repository; `keys` is None if it is not encrypted.

    `load` returns a snapshot after it has passed its origin to `record`, and raises as
    `SnapshotStore.load` does. `list_snapshots` returns the ids of all snapshots.
    """

    def __init__(
        self,
        keys: KeyManager | None,
        load: Callable[[SnapshotId], Snapshot],
        list_snapshots: Callable[[], list[SnapshotId]],
    ) -> None:
        self._keys = keys
        self._load = load
        self._list = list_snapshots
        self._origins: dict[SnapshotId, _Origin] = {}

    def record(
        self, snapshot_id: SnapshotId, knew_secret: bool, host: str, signers: Signers | None
    ) -> None:
        """Record the origin of a snapshot that was read."""
        self._origins[snapshot_id] = _Origin(knew_secret, host, signers)

    def is_from_trusted_writer(self, snapshot_id: SnapshotId) -> bool:
        """Return whether a snapshot is proven.

        In an encrypted repository its writer must have known the repository's own secret, and it must have
        existed when that secret was replaced, if it was. In format 2 a
        machine that this one trusts for its host must have signed it. An unproven snapshot is no parent,
        counts in no retention rule and replaces no other. Raises as `load` does.
        """
        if self._keys is None:
            return True
        signed = self.signed(snapshot_id)
        if signed is None:
            return False
        writers = self.trusted_writers()
        return writers is None or writers.trusts(signed)

    def replaced_by(self, snapshot_id: SnapshotId, snapshot: Snapshot) -> SnapshotId | None:
        """Return the snapshot that another one hides, and that is deleted with it; None if there is none.

        The author does not sign `replaces`. So in an encrypted repository a snapshot replaces another only if
        it is proven, a machine that is trusted for its host published it, and the other one is of the same
        host and can be read. Raises as `load` does for the first of the two.
        """
        if snapshot.replaces is None:
            return None
        replaced = SnapshotId(snapshot.replaces)
        if self._keys is None:
            return replaced
        if not self._may_replace(snapshot_id):
            return None
        if replaced not in self._origins:
            try:
                self._load(replaced)
            except (NotFoundError, KeyMissingError, IntegrityError):
                return None
        return replaced if self._origins[replaced].host == snapshot.host else None

    def hidden_by(self, snapshot_id: SnapshotId, snapshot: Snapshot) -> list[SnapshotId]:
        """Return the snapshots that one hides, and those that they hide, the oldest first.

        They are deleted in this order before the one that hides them. Raises as `replaced_by`.
        """
        found: list[SnapshotId] = []
        while (replaced := self.replaced_by(snapshot_id, snapshot)) is not None:
            try:
                snapshot = self._load(replaced)
            except NotFoundError:
                break
            except (KeyMissingError, IntegrityError):
                found.append(replaced)
                break
            found.append(replaced)
            snapshot_id = replaced
        return found[::-1]

    def uncounted_copies(self, snapshot_ids: Iterable[SnapshotId]) -> set[SnapshotId]:
        """Return which snapshots must count in no retention rule, since each only repeats another one.

        The author does not sign the tags. So a reader of a proven snapshot who can write to the storage can
        publish it any number of times, with other tags. Of those with the same author's signature, the
        ones count that a trusted machine published, or one if there are none. Raises as `load` does.
        """
        writers = self.trusted_writers()
        if writers is None:
            return set()
        copies: dict[Author, list[tuple[bool, SnapshotId]]] = {}
        for snapshot_id in snapshot_ids:
            signed = self.signed(snapshot_id)
            if signed is None or signed.signers is None or not writers.trusts(signed):
                continue
            trusted = writers.trusts_publisher(signed)
            copies.setdefault(signed.signers.author, []).append((trusted, snapshot_id))
        uncounted = set[SnapshotId]()
        for same in copies.values():
            counted = {one for trusted, one in same if trusted} or {same[0][1]}
            uncounted.update(one for _, one in same if one not in counted)
        return uncounted

    def _may_replace(self, snapshot_id: SnapshotId) -> bool:
        """Return whether a snapshot is proven and a trusted machine published it."""
        signed, writers = self.signed(snapshot_id), self.trusted_writers()
        if signed is None or not self.is_from_trusted_writer(snapshot_id):
            return False
        return writers is None or writers.trusts_publisher(signed)

    def learn_writers(self, unknown_hosts_only: bool = False) -> list[HostKey]:
        """Trust the machines that signed the snapshots that exist now; return the keys that are new.

        With `unknown_hosts_only` a further key of a known host is logged, and not trusted.
        Raise the errors of `load` only where no snapshot at all can be read.
        """
        if self._keys is None or self._keys.writers is None:
            return []
        found = []
        for snapshot_id in self._list():
            try:
                signed = self.signed(snapshot_id)
            except (NotFoundError, KeyMissingError, IntegrityError, StorageError) as error:
                log.info("who wrote snapshot %s is unknown: %s", short_id(snapshot_id), error)
                continue
            if signed is not None:
                found.append(signed)
        return self._keys.writers.learn(found, unknown_hosts_only)

    def signed(self, snapshot_id: SnapshotId) -> SignedSnapshot | None:
        """Return who signed a snapshot, None if its writer did not know the repository's own secret."""
        from casfs.crypto.writers import SignedSnapshot

        if snapshot_id not in self._origins:
            self._load(snapshot_id)
        origin = self._origins[snapshot_id]
        if not origin.knew_secret:
            return None
        return SignedSnapshot(snapshot_id, origin.host, origin.signers)

    def trusted_writers(self) -> TrustedWriters | None:
        """Return the machines that this one trusts, None in format 1; the first call learns them."""
        writers = self._keys.writers if self._keys is not None else None
        if writers is not None and writers.is_first_use:
            self.learn_writers()
        return writers

    def unproven_of(self, snapshot_ids: Iterable[SnapshotId]) -> list[SnapshotId]:
        """Return the unproven ones of some snapshots, in their order; raises as `load` does."""
        return [one for one in snapshot_ids if not self.is_from_trusted_writer(one)]

    def require_proven(self, snapshot_id: SnapshotId, refused: str) -> None:
        """Raise RefusedError for an unproven snapshot; `refused` names what is refused."""
        if not self.is_from_trusted_writer(snapshot_id):
            raise RefusedError(
                f"{refused} is refused: snapshot {short_id(snapshot_id)} is unproven, so the owner of the "
                "storage may have made it; nothing was changed"
            )
