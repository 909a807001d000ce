"""Create a repository in an empty place: a folder of this machine, or a remote place.

The configuration makes a place a repository, so it is written last.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casfs.crypto.opening import create_encryption
from casfs.crypto.trust_root import TrustRoot
from casfs.crypto.trust_state import pin
from casfs.errors import ExistsError, NotFoundError, StorageError
from casfs.format.config import CONFIG_NAME, RepositoryConfig, encode_config, new_config
from casfs.format.delta import FOLDER as DELTAS
from casfs.format.pack import META_PREFIX, PACK_PREFIXES
from casfs.format.versions import DEFAULT_FORMAT
from casfs.index.index import Index
from casfs.repository.index_opening import close_index
from casfs.repository.place import LocalPlace, Place, RemotePlace, as_place
from casfs.repository.remote_writers import mark_remote_writers
from casfs.storage.base import Storage
from casfs.storage.local import LocalStorage
from casfs.storage.probe import probe_storage
from casfs.storage.reserve import allocate_reserve

if TYPE_CHECKING:
    # An unencrypted repository does not need this import.
    from casfs.crypto.recipients import Recipient

log = logging.getLogger(__name__)

FOLDERS = (*PACK_PREFIXES, DELTAS, "snapshots", "condemned", "locks", "tmp")
_FOLDERS_OF_FORMAT_2 = (META_PREFIX, DELTAS)
PROBED_NAME = "probed.json"
"""The object with the result of the probe of a remote place."""

_README = (
    "This folder is a casfs repository: backups of files, kept as digest-named packs.\n"
    "Change nothing in it by hand. `index` can be rebuilt; everything else is needed.\n"
)


def create_repository(
    place: Path | Place,
    recipients: Sequence[Recipient] = (),
    passphrase: str | None = None,
    format_: int = DEFAULT_FORMAT,
) -> RepositoryConfig:
    """Create a repository in an empty or new place and return its configuration.

    With recipients or a passphrase it is encrypted. `format_` is the repository format. Raise ExistsError
    where the place is not empty, StorageError where a write fails.
    """
    place = as_place(place)
    config = new_config(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), format_)
    if isinstance(place, RemotePlace):
        return _create_remote(place, config, recipients, passphrase)
    return _create_local(place.root, config, recipients, passphrase)


def _create_local(
    root: Path, config: RepositoryConfig, recipients: Sequence[Recipient], passphrase: str | None
) -> RepositoryConfig:
    if (root / CONFIG_NAME).exists():
        raise _exists(LocalPlace(root))
    is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(root.iterdir()):
            raise ExistsError(f"{root} is not empty; give a new or empty folder")
        # Of two that create a repository here, one makes this folder, and only that one goes on.
        (root / FOLDERS[0]).mkdir(mode=0o700)
    except (NotADirectoryError, FileExistsError) as error:
        raise ExistsError(f"{root} is not a folder; give a new or empty folder") from error
    except OSError as error:
        raise StorageError("make a repository in", str(root), error) from error
    try:
        return _fill_local(root, config, recipients, passphrase)
    except BaseException:
        if (root / CONFIG_NAME).exists():
            raise
        # The folder was empty and is this process's own, so the next init finds it as this one did.
        for name in os.listdir(root):
            path = root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if is_new:
            root.rmdir()
        raise


def _fill_local(
    root: Path, config: RepositoryConfig, recipients: Sequence[Recipient], passphrase: str | None
) -> RepositoryConfig:
    """Create a repository in an empty folder; its configuration, which makes it one, is written last."""
    try:
        for folder in FOLDERS[1:]:
            if folder not in _FOLDERS_OF_FORMAT_2 or config.format >= 2:
                (root / folder).mkdir(mode=0o700)
        (root / "README").write_text(_README)
    except OSError as error:
        raise StorageError("make a repository in", str(root), error) from error
    storage = LocalStorage(root)
    if recipients or passphrase is not None:
        config = create_encryption(storage, config, recipients, passphrase)
    index = Index(LocalPlace(root).index_dir(config))
    index.rebuild(tuple)
    close_index(index)
    allocate_reserve(root)
    data = encode_config(config)
    pin(root, TrustRoot(data, str(root)))
    # From now on it is a repository, and others may use it.
    storage.write(CONFIG_NAME, data)
    return config


def _create_remote(
    place: RemotePlace,
    config: RepositoryConfig,
    recipients: Sequence[Recipient],
    passphrase: str | None,
) -> RepositoryConfig:
    storage = place.open_storage()
    try:
        _require_empty(storage, place)
        probed = probe_storage(storage)
        if probed.is_clock_off:
            log.warning(
                "this machine's clock and that of %s differ by %.0f s; set it right (timedatectl)",
                place,
                abs(probed.clock_offset_s),
            )
        storage.create(PROBED_NAME, msgspec.json.encode(probed) + b"\n")
        storage.create("README", _README.encode())
        mark_remote_writers(storage)
        if recipients or passphrase is not None:
            config = create_encryption(storage, config, recipients, passphrase)
        data = encode_config(config)
        storage.create(CONFIG_NAME, data)
        # Another machine may have made one at the same time, with as many bytes.
        if storage.read(CONFIG_NAME, 0, len(data) + 1) != data:
            raise _exists(place)
    finally:
        storage.close()
    pin(str(place), TrustRoot(data, str(place)))
    return config


def _require_empty(storage: Storage, place: RemotePlace) -> None:
    try:
        # A read, since an answer without a body says less of what is wrong.
        storage.read(CONFIG_NAME, 0, 1)
    except NotFoundError:
        pass
    else:
        raise _exists(place)
    for prefix in (*PACK_PREFIXES, "snapshots"):
        if next(iter(storage.list(prefix)), None) is not None:
            raise ExistsError(
                f"{place} has objects of a repository without its configuration; name an empty place"
            )


def _exists(place: Place) -> ExistsError:
    return ExistsError(f"there is a repository in {place} already; nothing was changed")
