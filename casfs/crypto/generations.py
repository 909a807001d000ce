"""The generations of a repository's own dedup domain, as this process can verify them.

The list of recipients has a record of each domain that replaced another one. A record counts once its code
and signature were verified, which takes the secret of the domain before it: sessions contain that. A machine
remembers the records that it verified. Where a storage later shows fewer or other ones, it uses what it
remembers and warns; what writes refuses the list (`casfs.crypto.key_manager`). Used by one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from casfs.crypto.recipients import RecipientList
from casfs.crypto.trust_state import pin_generations, pinned_generations
from casfs.digest import SnapshotId
from casfs.errors import (
    IntegrityError,
    NoHomeError,
    NotFoundError,
    RefusedError,
    StorageError,
    TrustError,
)
from casfs.format.config import RepositoryConfig
from casfs.format.generation import MAX_LIST_BYTES, Generation, decode_snapshot_list
from casfs.format.key_derivation import DedupDomain, DomainId
from casfs.storage.base import Storage

log = logging.getLogger(__name__)


class Generations:
    """The domains of one encrypted repository; number 0 is the one that the configuration names.

    `shown` returns the list of recipients; without it, and in format 1, there is only the first domain.
    Without `uses_pins` the process goes by the shown list alone and remembers nothing of it.
    """

    def __init__(
        self,
        storage: Storage,
        config: RepositoryConfig,
        shown: Callable[[], RecipientList] | None = None,
        *,
        uses_pins: bool = True,
    ) -> None:
        assert config.encryption is not None
        self._storage = storage
        self._config = config
        self._shown = shown if config.signs_snapshots else None
        self._uses_pins = uses_pins
        self._pinned: tuple[Generation, ...] = ()
        self._records: tuple[Generation, ...] | None = None
        self._verified = [DomainId(bytes.fromhex(config.encryption.domain))]
        self._known: dict[DomainId, DedupDomain] = {}
        self._lists: dict[int, frozenset[SnapshotId]] = {}
        self.is_forged = False

    @property
    def records(self) -> tuple[Generation, ...]:
        """The records that are not known to be forged. The first call reads the list of recipients."""
        if self._records is None:
            self._records = self._load()
        return self._records

    @property
    def newest_id(self) -> DomainId:
        """The id of the domain in which trusted machines write."""
        return self.records[-1].domain_id if self.records else self._verified[0]

    @property
    def is_verified(self) -> bool:
        """Whether every record was verified."""
        return len(self._verified) > len(self.records)

    def learn(self, domains: Iterable[DedupDomain]) -> None:
        """Verify what the secrets of some domains allow to verify; log a forged record and ignore it."""
        self._known.update((domain.id, domain) for domain in domains)
        while not self.is_verified:
            before = self._known.get(self._verified[-1])
            if before is None:
                return
            record = self.records[len(self._verified) - 1]
            if not record.is_authentic(before.repository, before):
                self._ignore_from(record)
                return
            self._verified.append(record.domain_id)
            if record is self.records[-1]:
                self._remember()

    def number_of(self, domain: DedupDomain) -> int | None:
        """Return the number of a domain, None if it is not known to be the repository's own."""
        return self._verified.index(domain.id) if domain.id in self._verified else None

    def earlier(self) -> list[DedupDomain]:
        """Return the known domains before the newest one, the newest first."""
        before = [one for one in self._verified if one != self.newest_id]
        return [self._known[one] for one in reversed(before) if one in self._known]

    def was_there(self, number: int, snapshot_id: SnapshotId) -> bool:
        """Return whether a snapshot existed when the domain with a number was replaced."""
        if number not in self._lists:
            try:
                self._lists[number] = self._read_list(self.records[number])
            except (IntegrityError, NotFoundError, StorageError) as error:
                log.warning(
                    "which snapshots existed before the secret was replaced is unknown, so they count as "
                    "unproven: %s",
                    error,
                )
                self._lists[number] = frozenset()
        return snapshot_id in self._lists[number]

    def damaged(self) -> list[IntegrityError]:
        """Return an error for each list of snapshots that is missing or damaged; raise StorageError."""
        found = []
        for record in self.records:
            try:
                self._read_list(record)
            except IntegrityError as error:
                found.append(error)
        return found

    def _read_list(self, record: Generation) -> frozenset[SnapshotId]:
        try:
            data = self._storage.read(record.list_name, 0, MAX_LIST_BYTES)
        except NotFoundError as error:
            raise IntegrityError(f"{record.list_name} is missing") from error
        return decode_snapshot_list(record, data)

    def _load(self) -> tuple[Generation, ...]:
        if self._shown is None:
            return ()
        if self._uses_pins:
            self._pinned = pinned_generations(self._config.id)
        try:
            shown = self._shown().generations
        except (IntegrityError, StorageError) as error:
            level = logging.WARNING if self._pinned else logging.INFO
            log.log(level, "%s; this machine goes by the secrets that it has seen", error)
            return self._pinned
        if shown[: len(self._pinned)] == self._pinned:
            return shown
        log.warning("%s; this machine goes by what it knows", _rollback_of(self._storage.url))
        return self._pinned

    def _ignore_from(self, record: Generation) -> None:
        self.is_forged = True
        log.warning(
            "the list of recipients says that a secret replaced the one that this machine knows (generation "
            "%d), and no machine that knew it wrote so: the storage may have forged it, and it is ignored",
            record.number,
        )
        self._records = self.records[: record.number - 1]

    def _remember(self) -> None:
        if self.records == self._pinned or not self._uses_pins:
            return
        try:
            pin_generations(self._config.id, self.records)
        except (StorageError, RefusedError, NoHomeError) as error:
            log.info("%s; an earlier list of recipients would not be noticed", error)


def require_authentic(generations: Generations) -> None:
    """Raise TrustError where the list of recipients was found to have a forged record."""
    if generations.is_forged:
        raise TrustError(
            "the list of recipients says that the repository's secret was replaced, and no machine that knew "
            "the secret wrote so: restore the file `recipients` from a copy"
        )


def require_no_rollback(
    config: RepositoryConfig, shown: Callable[[], RecipientList], place: str
) -> None:
    """Raise TrustError for a list that lacks a replacement of the domain which this machine has seen."""
    pinned = pinned_generations(config.id) if config.signs_snapshots else ()
    if pinned and shown().generations[: len(pinned)] != pinned:
        raise TrustError(f"{_rollback_of(place)}. If that is intended, run `casfs key accept`")


def _rollback_of(place: str) -> str:
    return (
        f"the list of recipients in {place} lacks a replacement of the repository's secret that this machine "
        "has seen: an earlier list may have been put back"
    )
