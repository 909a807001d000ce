"""Misplaced snapshots: whole, and under the name of another, as after two files have changed places.

Nothing of them is lost. Each gets its own name back; what else was under that name is put aside first, so
that a crash on the way costs nothing that the next repair would not find.
"""

from __future__ import annotations

from casfs.digest import SnapshotId, digest_of
from casfs.errors import CasfsError, IntegrityError
from casfs.format.snapshot import MAX_SNAPSHOT_BYTES, decode_snapshot
from casfs.repository.repository import Repository

DAMAGED_FOLDER = "damaged"
"""Where the files of snapshots are put aside that cannot be read under their names."""


class Misplaced:
    """The misplaced snapshots of a repository: `files` are their bytes, by their right ids."""

    def __init__(self, repository: Repository) -> None:
        self.files: dict[SnapshotId, bytes] = {}
        self._storage = repository.store.storage
        self._taken: dict[SnapshotId, bytes] = {}
        damaged = {one for one in repository.snapshot_ids() if _is_damaged(repository, one)}
        names: dict[str, SnapshotId | None] = {f"snapshots/{one.hex()}": one for one in damaged}
        if damaged:
            # A repair that ended half-way has left something there.
            names |= dict.fromkeys(name for name, _ in self._storage.names(DAMAGED_FOLDER))
        for name, under in names.items():
            try:
                data = self._storage.read(name, 0, MAX_SNAPSHOT_BYTES)
                right = SnapshotId(digest_of(data))
                # Any bytes are right under the name of their digest: it takes that name to know them by.
                if right in damaged:
                    keyring = repository.vault.keyring if repository.vault is not None else None
                    decode_snapshot(right, data, repository.codec, keyring)
                    self.files[right] = data
                    if under is not None:
                        self._taken[under] = data
            except CasfsError:
                continue

    def put_in_place(self) -> None:
        """Give the snapshots their names; the repository is open for writing."""
        aside = [one for one in self._taken if one in self.files]
        for one in aside:
            self._storage.write(f"{DAMAGED_FOLDER}/{one.hex()}", self._taken[one])
        for right, data in self.files.items():
            self._storage.write(f"snapshots/{right.hex()}", data)
        for one in aside:
            self._storage.delete(f"{DAMAGED_FOLDER}/{one.hex()}")


def _is_damaged(repository: Repository, snapshot_id: SnapshotId) -> bool:
    try:
        repository.load(snapshot_id)
    except IntegrityError:
        return True
    except CasfsError:
        return False  # it was forgotten meanwhile, or is for others
    return False
