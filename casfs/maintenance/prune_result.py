"""The result of a prune: its counts, or the reason why it removed nothing or stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

from casfs.digest import SnapshotId, short_id
from casfs.errors import IndexUnusableError, IntegrityError, KeyMissingError


@dataclass(slots=True)
class PruneResult:
    """Counts of what a prune found and did; sizes are bytes of packs.

    `waiting_packs` are unneeded and stay until the processes in `waited_for` (names of locks) end or, where
    hosts write over a network, until `removable_ns` (0: there are none), by the storage's clock.
    `marked_packs` are those among them that this prune marked for removal. `drafts` are snapshots that were
    never published and whose data is kept, `dropped_drafts` those among them that are abandoned, and whose
    data the next prune finds unneeded. Where hosts write over a network, `in_flight_packs` are unneeded and
    left alone, since a process that is seen may have stored them. `locked_packs` could go, and are locked
    until `locked_until_s` at the latest.
    """

    snapshots: int = 0
    unproven: int = 0
    packs: int = 0
    needed_blobs: int = 0
    unneeded_blobs: int = 0
    removed_packs: int = 0
    removed_bytes: int = 0
    repacked_packs: int = 0
    repacked_bytes: int = 0
    new_bytes: int = 0
    waiting_packs: int = 0
    waiting_bytes: int = 0
    waited_for: list[str] = field(default_factory=list)
    marked_packs: int = 0
    marked_bytes: int = 0
    removable_ns: int = 0
    drafts: int = 0
    dropped_drafts: int = 0
    in_flight_packs: int = 0
    in_flight_bytes: int = 0
    locked_packs: int = 0
    locked_bytes: int = 0
    locked_until_s: int = 0

    @property
    def freed_bytes(self) -> int:
        """Return the bytes by which the repository shrinks, 0 where it does not."""
        return max(self.removed_bytes - self.new_bytes, 0)

    @property
    def grown_bytes(self) -> int:
        """Return the bytes by which the repository grows until the waiting packs are removed."""
        return max(self.new_bytes - self.removed_bytes, 0)


class IndexReplacedError(IndexUnusableError):
    """The index is not the index with which this prune began."""

    def __str__(self) -> str:
        return "the index was rebuilt while this prune ran; run `casfs prune` again for the rest"


class NeededBlobsUnknownError(IntegrityError):
    """A tree or content list of a snapshot cannot be read, so the needed blobs are unknown."""

    def __init__(self, snapshot_id: SnapshotId, cause: IntegrityError) -> None:
        super().__init__(snapshot_id, cause)
        self.snapshot_id = snapshot_id
        self.cause = cause

    def __str__(self) -> str:
        return (
            f"the blobs that snapshot {short_id(self.snapshot_id)} needs are unknown: {self.cause}; "
            "nothing was removed. Run `casfs check` to list the damage, and `casfs repair index` where only "
            "the index lost entries; a new backup may restore the rest, or drop the lost data with "
            "`casfs repair snapshots`"
        )


class SnapshotClosedError(KeyMissingError):
    """The identities do not decrypt a snapshot, so the needed blobs are unknown."""

    def __init__(self, snapshot_id: SnapshotId, cause: KeyMissingError) -> None:
        super().__init__(snapshot_id, cause)
        self.snapshot_id = snapshot_id
        self.cause = cause

    def __str__(self) -> str:
        name = short_id(self.snapshot_id)
        return (
            f"the blobs that snapshot {name} needs are unknown: {self.cause}; nothing was removed. Give an "
            "identity or a passphrase for which it was stored, or let someone who has one run `casfs key "
            f"rewrap`. If no host of yours made it, remove it: `casfs forget {name}`"
        )
