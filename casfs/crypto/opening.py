"""Keys for creating and for opening a repository.

For an unencrypted repository this module imports nothing of encryption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casfs.crypto.process_protection import forbid_inspection
from casfs.crypto.trust_root import TrustRoot
from casfs.crypto.trust_state import pin, pinned_format, verify_pin
from casfs.errors import KeyMissingError, StorageError
from casfs.format.codec import BlobCodec
from casfs.format.config import KEYED_CHUNKER, RepositoryConfig
from casfs.storage.base import Storage
from casfs.storage.locks import LockMode

if TYPE_CHECKING:
    from casfs.crypto.identities import Identities
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.recipients import Recipient
    from casfs.store.cipher import PackCiphers

    Unlock = Callable[[Storage, TrustRoot], Identities]

log = logging.getLogger(__name__)


def create_encryption(
    storage: Storage,
    config: RepositoryConfig,
    recipients: Sequence[Recipient],
    passphrase: str | None,
) -> RepositoryConfig:
    """Create the keys of a new repository and return its configuration with their ids."""
    from casfs.crypto.key_manager import create_keys

    forbid_inspection()
    if config.format >= 2:
        chunker = msgspec.structs.replace(config.chunker, algorithm=KEYED_CHUNKER)
        config = msgspec.structs.replace(config, chunker=chunker)
    encryption = create_keys(storage, config, recipients, passphrase)
    return msgspec.structs.replace(config, encryption=encryption)


def open_key_manager(
    root: Path | str,
    storage: Storage,
    trust: TrustRoot,
    unlock: Unlock | None,
    mode: LockMode | None = None,
    closed_ok: bool = False,
    is_past: bool = False,
) -> KeyManager | None:
    """Return a repository's key manager, None if it is not encrypted; `mode` is a writer's lock mode.

    With `is_past` the repository is read as it was at an earlier time, which this machine does not record.
    Raise KeyMissingError where no identity is given, unless `closed_ok`. Raise the errors of `unlock` and of
    `KeyManager.for_writing`. Raise TrustError where another repository, encrypted or not, has replaced an
    encrypted one that this user has written to or read from.
    """
    verify_pin(root, trust, is_past)
    config = trust.config
    if config.encryption is None:
        return None
    forbid_inspection()
    from casfs.crypto.identities import Identities
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.session_files import NOTHING_GIVEN

    identities = unlock(storage, trust) if unlock is not None else Identities()
    if not (identities or closed_ok):
        raise KeyMissingError(
            f"the repository in {root} {NOTHING_GIVEN}. Without it only backup, snapshots and "
            "check --storage are possible"
        )
    if mode is None:
        if is_past:
            # The storage may show a configuration of format 1, in which no snapshot is signed.
            config = msgspec.structs.replace(config, format=max(config.format, pinned_format(root)))
        elif identities:
            _pin_for_reader(root, trust)
            if config.signs_snapshots:
                trust.begin_recipients(storage)
        return KeyManager.for_reading(storage, config, identities, trust)
    return KeyManager.for_writing(root, storage, trust, identities, mode != LockMode.SHARED)


def _pin_for_reader(root: Path | str, trust: TrustRoot) -> None:
    """Pin the repository that a reader opens, so that a later process notices another in its place."""
    try:
        pin(root, trust)
    except StorageError as error:
        log.info("%s; a replaced repository would not be noticed", error)


def make_ciphers(storage: Storage, keys: KeyManager | None) -> PackCiphers | None:
    """Return the ciphers of an encrypted repository's packs, None without encryption."""
    if keys is None:
        return None
    from casfs.store.cipher import PackCiphers

    return PackCiphers(storage, keys.keyring, keys.can_read)


def make_codec(level: int, keys: KeyManager | None) -> BlobCodec:
    """Return the codec of a repository; a writer's codec keys its digests."""
    domain = keys.domain if keys is not None else None
    return BlobCodec(level, digest_key=domain.digest_key if domain is not None else None)
