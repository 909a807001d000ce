"""Rescue: what is needed and rotten where the index looks is stored anew from another pack that has it.

Two backups that ran at the same time may have stored a blob twice, and a prune that asks the index takes
the pack with the only sound copy for unneeded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set

from casfs.digest import Digest, short_id
from casfs.errors import BlobError, CasfsError, NotFoundError
from casfs.format.codec import BlobKind
from casfs.index.schema import Location, PackRecord
from casfs.repository.repository import Repository
from casfs.repository.used_blobs import UsedBlobs

log = logging.getLogger(__name__)


class Evacuator:
    """Rescue blobs of a repository that is open for writing; `needs` are those that matter."""

    def __init__(self, repository: Repository, needs: UsedBlobs) -> None:
        self._repository = repository
        self._store = repository.store
        self._needs = needs

    def copy_needed_blobs(self, records: Mapping[int, PackRecord], ordinals: Set[int]) -> set[int]:
        """See to it that what is needed, and is in packs that go, is sound where the index looks.

        `records` are the packs that there were before; what was packed anew since is not read again.
        Returns the packs that have to stay: they cannot be read, and something that is needed is lost
        unless they have it.
        """
        rotten = {}
        closed = set()
        for ordinal in sorted(ordinals):
            record = records[ordinal]
            try:
                entries = self._store.entries(record.pack)
            except NotFoundError:
                continue
            except CasfsError as error:
                log.warning(
                    "pack %s, which nothing seems to need: %s", short_id(record.pack), error
                )
                closed.add(ordinal)
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
            self.copy_damaged(rotten)
        return closed if closed and self._lacks_anything() else set()

    def _lacks_anything(self) -> bool:
        """Tell whether any blob that is needed can be read from nowhere; all of them are read for that."""
        for digest, location in self._store.index.blobs():
            if location.ordinal in self._needs.blobs:
                try:
                    self._store.read(digest)
                except CasfsError as error:
                    log.warning("%s; the packs that cannot be read stay", error)
                    return True
        return False

    def copy_damaged(self, rotten: Mapping[Digest, Location]) -> bool:
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
                if not location.is_damaged:
                    self._store.index.mark_blobs(location.pack, [digest])
                writer.put(BlobKind(location.kind), digest, plain)
                found = True
            writer.finish()
        finally:
            writer.close()
        self._store.found_elsewhere.clear()
        return found
