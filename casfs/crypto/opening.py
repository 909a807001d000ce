"""What a repository asks of its keys when it is made or opened.

Nothing of encryption is loaded here for a repository that is not encrypted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casfs.crypto.trust_state import pin, verify_pin
from casfs.errors import KeyMissingError, StorageError
from casfs.format.codec import BlobCodec
from casfs.format.config import RepositoryConfig
from casfs.storage.base import Storage
from casfs.storage.locks import LockMode

if TYPE_CHECKING:
    from casfs.crypto.identities import Identities
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.recipients import Recipient
    from casfs.store.cipher import PackCiphers

    Unlock = Callable[[Storage, RepositoryConfig], Identities]

log = logging.getLogger(__name__)


def create_encryption(
    storage: Storage,
    config: RepositoryConfig,
    recipients: Sequence[Recipient],
    passphrase: str | None,
) -> RepositoryConfig:
    """Make the keys of a new repository and return its configuration with them."""
    from casfs.crypto.key_manager import create_keys

    encryption = create_keys(storage, config.id, recipients, passphrase)
    return msgspec.structs.replace(config, encryption=encryption)


def open_key_manager(
    root: Path,
    storage: Storage,
    config: RepositoryConfig,
    unlock: Unlock | None,
    mode: LockMode | None = None,
    closed_ok: bool = False,
) -> KeyManager | None:
    """Return the keys of a repository, None of one that is not encrypted; `mode` is that of a writer.

    Raises KeyMissingError where nothing opens it, unless that is `closed_ok`; what `unlock` raises, and
    what `KeyManager.for_writing` does; TrustError where another encrypted repository, or none, is in the
    place of one that this user has written to or read from.
    """
    verify_pin(root, config)
    if config.encryption is None:
        return None
    from casfs.crypto.identities import Identities
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.session_files import NOTHING_GIVEN

    identities = unlock(storage, config) if unlock is not None else Identities()
    if not (identities or closed_ok):
        raise KeyMissingError(
            f"the repository in {root} {NOTHING_GIVEN}. Without one there are backup, snapshots and "
            "check --storage"
        )
    if mode is None:
        if identities:
            _remember(root, config)
        return KeyManager.for_reading(storage, config, identities)
    return KeyManager.for_writing(root, storage, config, identities, mode != LockMode.SHARED)


def _remember(root: Path, config: RepositoryConfig) -> None:
    """Remember what a reader has opened, so that it notices another repository in its place."""
    try:
        pin(root, config)
    except StorageError as error:
        log.info("%s; an exchanged repository would not be noticed", error)


def make_ciphers(storage: Storage, vault: KeyManager | None) -> PackCiphers | None:
    """Return what opens the packs of an encrypted repository."""
    if vault is None:
        return None
    from casfs.store.cipher import PackCiphers

    return PackCiphers(storage, vault.keyring)


def make_codec(level: int, vault: KeyManager | None) -> BlobCodec:
    """Return the codec of a repository; that of a writer keys its digests."""
    domain = vault.domain if vault is not None else None
    return BlobCodec(level, digest_key=domain.digest_key if domain is not None else None)
