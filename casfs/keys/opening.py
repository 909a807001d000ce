"""What a repository asks of its keys when it is made or opened.

Nothing of encryption is loaded here for a repository that is not encrypted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casfs.keys.state import check_place, remember_place
from casfs.store.blob import BlobCodec
from casfs.store.config import RepositoryConfig
from casfs.store.lock import LockMode
from casfs.store.storage import Storage

if TYPE_CHECKING:
    from casfs.keys.identity import Identities
    from casfs.keys.recipients import Recipient
    from casfs.keys.vault import Vault
    from casfs.store.cipher import PackCiphers

    Unlock = Callable[[Storage, RepositoryConfig], Identities]


def encrypted_config(
    root: Path,
    storage: Storage,
    config: RepositoryConfig,
    recipients: Sequence[Recipient],
    passphrase: str | None,
) -> RepositoryConfig:
    """Make the keys of a new repository and return its configuration with them."""
    from casfs.keys.vault import create_keys

    config = msgspec.structs.replace(
        config, encryption=create_keys(storage, config.id, recipients, passphrase)
    )
    remember_place(root, config)
    return config


def open_vault(
    root: Path,
    storage: Storage,
    config: RepositoryConfig,
    unlock: Unlock | None,
    mode: LockMode | None = None,
) -> Vault | None:
    """Return the keys of a repository, None of one that is not encrypted; `mode` is that of a writer.

    Raises what `unlock` raises, and what `Vault.to_write` does.
    """
    if config.encryption is None:
        if mode is not None:
            check_place(root, config)
        return None
    from casfs.keys.identity import Identities
    from casfs.keys.vault import Vault

    identities = unlock(storage, config) if unlock is not None else Identities()
    if mode is None:
        return Vault.to_read(storage, config, identities)
    return Vault.to_write(root, storage, config, identities, mode != LockMode.SHARED)


def ciphers_of(storage: Storage, vault: Vault | None) -> PackCiphers | None:
    """Return what opens the packs of an encrypted repository."""
    if vault is None:
        return None
    from casfs.store.cipher import PackCiphers

    return PackCiphers(storage, vault.keyring)


def codec_of(level: int, vault: Vault | None) -> BlobCodec:
    """Return the codec of a repository; that of a writer keys its digests."""
    domain = vault.domain if vault is not None else None
    return BlobCodec(level, digest_key=domain.digest_key if domain is not None else None)
