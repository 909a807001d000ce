"""Upgrade a repository to the newest format, in one durable step: the configuration is replaced.

Nothing else changes. Packs and snapshots of the old format stay readable, and new metadata goes into packs of
its own. A writer that opened the repository before goes on in the old format, which is part of the new one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from casfs.crypto.trust_root import TrustRoot
from casfs.crypto.trust_state import pin, verify_pin
from casfs.errors import RefusedError, StorageDeniedError, StorageError
from casfs.format.config import CONFIG_NAME, with_format
from casfs.format.versions import NEWEST_FORMAT
from casfs.repository.place import LocalPlace, Place, as_place
from casfs.storage.base import Storage
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode, remove_stale_temporaries

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UpgradeResult:
    """The format before and after an upgrade; the two are equal where nothing had to be changed."""

    repository: str
    old_format: int
    new_format: int

    @property
    def is_changed(self) -> bool:
        """Whether the configuration was replaced."""
        return self.old_format != self.new_format


def upgrade_repository(place: Path | Place, storage: Storage | None = None) -> UpgradeResult:
    """Replace the configuration by one of the newest format, beside no other writer of this machine.

    It needs no key. `storage` is the storage of the place, opened here where it is None. Raise NotFoundError,
    FormatError, IntegrityError, LockedError, TrustError where the repository is not the one that this machine
    knows, RefusedError for credentials that may not replace an object, and StorageError.
    """
    place = as_place(place)
    storage = storage if storage is not None else place.open_storage()
    try:
        trust = place.trust_root(storage)
        verify_pin(str(place), trust)
        config = trust.config
        if config.format == NEWEST_FORMAT:
            return UpgradeResult(config.id, config.format, config.format)
        host = None if config.encryption is None else "a machine"
        with place.locks(config).acquire("upgrade", LockMode.EXCLUSIVE, host) as lock:
            if isinstance(place, LocalPlace) and isinstance(storage, LocalStorage):
                remove_stale_temporaries(place.root)
                storage.writer = lock.name
            _replace_config(storage, place, trust)
        return UpgradeResult(config.id, config.format, NEWEST_FORMAT)
    finally:
        storage.close()


def _replace_config(storage: Storage, place: Place, trust: TrustRoot) -> None:
    data = with_format(trust.data, NEWEST_FORMAT)
    try:
        storage.write(CONFIG_NAME, data)
    except StorageDeniedError as error:
        raise RefusedError(
            f"these credentials may not replace the configuration of {place} "
            f"({error.cause.strerror or error.cause}); nothing was changed: run `casfs upgrade` with "
            "credentials that may overwrite objects"
        ) from error
    try:
        # Only now: a machine that has seen the new format refuses the old one.
        pin(str(place), TrustRoot(data, str(place)))
    except StorageError as error:
        log.warning("%s; this machine would not notice an older configuration", error)
