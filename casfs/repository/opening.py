"""Create a repository, and open one for reading, for writing or for maintenance.

Reading takes no lock and never blocks a backup. Writing and maintenance hold a lock for as long as the
repository is open. An open repository belongs to the process that opened it and is never used across a
fork. A process opens a repository only once at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.crypto.opening import create_encryption, make_ciphers, make_codec, open_key_manager
from casfs.crypto.trust_state import pin
from casfs.errors import ExistsError, NotFoundError, StorageError
from casfs.format.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    RepositoryConfig,
    decode_config,
    encode_config,
    new_config,
)
from casfs.index.fingerprint import clear
from casfs.index.index import Index
from casfs.repository.index_opening import close_index, open_index, open_index_readonly
from casfs.repository.repository import Repository
from casfs.storage.local import LocalStorage, allocate_reserve, release_reserve
from casfs.storage.locks import LockMode, RepositoryLock, remove_stale_temporaries
from casfs.user_dirs import index_dir

if TYPE_CHECKING:
    # A repository without encryption does not load what encrypts.
    from casfs.crypto.opening import Unlock
    from casfs.crypto.recipients import Recipient

DEFAULT_LEVEL = 3
"""zstd's own default: some 250 MB/s a core, close to what the stronger levels reach on real trees."""

_FOLDERS = ("packs", "snapshots", "condemned", "locks", "tmp")
_README = (
    "This folder is a casfs repository: backups of files, kept as digest-named packs.\n"
    "Change nothing in it by hand. `index` can be rebuilt; everything else is needed.\n"
)


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open a repository, whatever for.

    `unlock` returns the identities that open an encrypted repository. Without any, opening fails unless
    `allow_locked`: a write-only host backs up, and anybody may list the snapshots. `level` is zstd's, for
    what is written. `sync=False` is for tests of everything but durability; `on_step` is called with the
    name of every durable step before and after it.
    """

    unlock: Unlock | None = None
    allow_locked: bool = False
    level: int = DEFAULT_LEVEL
    sync: bool = True
    on_step: Callable[[str], None] | None = None


_DEFAULTS = OpenOptions()


def create_repository(
    root: Path, recipients: Sequence[Recipient] = (), passphrase: str | None = None
) -> RepositoryConfig:
    """Create a repository in an empty or new folder and return its configuration.

    With recipients or a passphrase it is encrypted. Raises ExistsError where something is already,
    StorageError where the disk refuses.
    """
    if (root / CONFIG_NAME).exists():
        raise ExistsError(f"there is a repository in {root} already; nothing was changed")
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(root.iterdir()):
            raise ExistsError(f"{root} is not empty; name a new or empty folder")
        for folder in _FOLDERS:
            (root / folder).mkdir(mode=0o700)
        (root / "README").write_text(_README)
    except (NotADirectoryError, FileExistsError) as error:
        raise ExistsError(f"{root} is not a folder, and no repository can be made there") from error
    except OSError as error:
        raise StorageError("make a repository in", str(root), error) from error
    config = new_config(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    storage = LocalStorage(root)
    if recipients or passphrase is not None:
        config = create_encryption(storage, config, recipients, passphrase)
    index = Index(index_dir(root, config.id, encrypted=config.encryption is not None))
    index.rebuild(tuple)
    close_index(index)
    allocate_reserve(root)
    storage.write(CONFIG_NAME, encode_config(config))
    pin(root.absolute(), config)
    return config


def open_for_reading(
    root: Path,
    options: OpenOptions = _DEFAULTS,
    *,
    reader: str | None = None,
    may_write_index: bool = False,
) -> Repository:
    """Open a repository without a lock.

    `reader` names the command: while it is open, a prune keeps what it may still read, if it may write into
    the repository's `locks`. With `may_write_index` it can mark in the index what it found, if it may write
    there. Raises NotFoundError, FormatError, IntegrityError (configuration), StorageError, KeyMissingError
    and IndexUnusableError.
    """
    root = root.absolute()
    config = read_config(root)
    storage = LocalStorage(root)
    keys = open_key_manager(root, storage, config, options.unlock, None, options.allow_locked)
    lock = _reader_lock(root, reader, config) if reader is not None else None
    try:
        ciphers = make_ciphers(storage, keys)
        codec = make_codec(options.level, keys)
        index = open_index_readonly(root, config.id, storage, codec, may_write_index, ciphers)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return Repository(root, config, storage, index, options.level, lock, keys)


def open_for_writing(root: Path, command: str, options: OpenOptions = _DEFAULTS) -> Repository:
    """Open a repository for a command that adds to it, beside others that do.

    Raises what `open_for_reading` raises, and LockedError while exclusive maintenance is at work.
    """
    return _open_locked(root, command, LockMode.SHARED, options)


def open_for_maintenance(
    root: Path,
    command: str,
    options: OpenOptions = _DEFAULTS,
    mode: LockMode = LockMode.MAINTENANCE,
) -> Repository:
    """Open a repository for a command that removes from it or repairs it.

    `mode` decides what goes beside it: with `MAINTENANCE` backups and readers, with `EXCLUSIVE` only
    readers, with `SHARED` all but exclusive maintenance. The reserved disk space is released, so that a full
    disk can be freed, except for an EXCLUSIVE rebuild. Raises what `open_for_reading` raises, and
    LockedError.
    """
    if mode != LockMode.EXCLUSIVE:
        read_config(root.absolute())
        release_reserve(root.absolute())
    return _open_locked(root, command, mode, options)


def _open_locked(root: Path, command: str, mode: LockMode, options: OpenOptions) -> Repository:
    root = root.absolute()
    config = read_config(root)
    lock = RepositoryLock.acquire(root / "locks", command, mode, _lock_host(config))
    try:
        remove_stale_temporaries(root)
        storage = LocalStorage(root, writer=lock.name, sync=options.sync, on_step=options.on_step)
        keys = open_key_manager(root, storage, config, options.unlock, mode, options.allow_locked)
        path = index_dir(root, config.id, encrypted=keys is not None)
        if mode == LockMode.EXCLUSIVE:
            clear(path)
        index = open_index(
            root,
            path,
            storage,
            make_codec(options.level, keys),
            lock.name,
            options.on_step,
            options.sync,
            ciphers=make_ciphers(storage, keys),
        )
        return Repository(root, config, storage, index, options.level, lock, keys)
    except OSError as error:
        lock.release()
        raise StorageError("open", str(root), error) from error
    except BaseException:
        lock.release()
        raise


def _lock_host(config: RepositoryConfig) -> str | None:
    """Return the machine's name for a lock; an encrypted repository does not reveal it."""
    return None if config.encryption is None else "a machine"


def _reader_lock(root: Path, reader: str, config: RepositoryConfig) -> RepositoryLock | None:
    try:
        return RepositoryLock.acquire(root / "locks", reader, LockMode.READER, _lock_host(config))
    except StorageError:
        return None  # a read-only medium, or a user who may only read


def read_config(root: Path) -> RepositoryConfig:
    """Return the configuration of the repository in a folder.

    Raises NotFoundError, FormatError, IntegrityError and StorageError.
    """
    path = root / CONFIG_NAME
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no repository in {root}; casfs init makes one") from error
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    return decode_config(data, str(root))
