"""Rescue: what is needed and rotten where the index looks is stored anew from another pack that has it.

Two backups that ran at the same time may have stored a blob twice, and a prune that asks the index takes
the pack with the only sound copy for unneeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from casfs.digest import Digest
from casfs.errors import BlobError, CasfsError
from casfs.repository import Repository
from casfs.store.blob import BlobKind
from casfs.store.location import Location, PackRecord
from casfs.upkeep.needs import Needs


class Rescuer:
    """Rescue blobs of a repository that is open for writing; `needs` are those that matter."""

    def __init__(self, repository: Repository, needs: Needs) -> None:
        self._repository = repository
        self._store = repository.store
        self._needs = needs

    def rescue_last_copies(self, records: Mapping[int, PackRecord], ordinals: Set[int]) -> None:
        """See to it that what is needed, and is in packs that go, is sound where the index looks.

        `records` are the packs that there were before; what was packed anew since is not read again.
        """
        rotten = {}
        for ordinal in sorted(ordinals):
            record = records[ordinal]
            try:
                entries = self._store.entries(record.pack)
            except CasfsError:
                continue
            for entry in entries:
                location = self._store.index.lookup(entry.digest)
                if (
                    location is None
                    or location.pack == ordinal
                    or location.pack not in records
                    or location.ordinal not in self._needs.blobs
                ):
                    continue
                try:
                    self._store.read_at(entry.digest, location)
                except BlobError:
                    rotten[entry.digest] = location
        if rotten:
            self.rescue(rotten)

    def rescue(self, rotten: Mapping[Digest, Location]) -> bool:
        """Store anew what another pack has sound of these blobs; tell whether there was any.

        That pack may be one of those that nobody seems to need.
        """
        found = False
        writer = self._repository.writer()
        try:
            for digest, location in rotten.items():
                try:
                    plain = self._store.read(digest)
                except CasfsError:
                    continue
                if not location.is_bad:
                    self._store.index.mark_blobs(location.pack, [digest])
                writer.put(BlobKind(location.kind), digest, plain)
                found = True
            writer.finish()
        finally:
            writer.close()
        self._store.found_elsewhere.clear()
        return found
