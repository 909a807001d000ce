"""Open a repository for reading, for writing or for maintenance.

Reading takes no lock and never blocks a backup. Writing and maintenance hold a lock for as long as the
repository is open. An open repository belongs to the process that opened it and is never used across a fork.
A process opens a repository only once at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.crypto.opening import make_ciphers, make_codec, open_key_manager
from casfs.errors import StorageError
from casfs.index.fingerprint import require_probe
from casfs.index.index import Index
from casfs.repository.activity import Activity, begin_reading, begin_writing
from casfs.repository.index_opening import open_index, open_index_readonly
from casfs.repository.place import LocalPlace, Place, RemotePlace, as_place, read_config
from casfs.repository.remote_writers import is_marked, is_shared
from casfs.repository.repository import Repository
from casfs.repository.snapshot_listing import list_ahead
from casfs.storage.concurrency import begin
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode, remove_stale_temporaries
from casfs.storage.reserve import release_reserve
from casfs.store.blob_store import pack_name
from casfs.store.index_update import UpdateOptions

if TYPE_CHECKING:
    # An unencrypted repository does not need these imports.
    from casfs.crypto.opening import Unlock

log = logging.getLogger(__name__)

DEFAULT_LEVEL = 3
"""zstd's default: about 250 MB/s a core, with a ratio close to that of higher levels on real trees."""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for all ways of opening a repository.

    `unlock` returns the identities that decrypt an encrypted repository. Without any identity, opening fails
    unless `allow_no_identity` is set: a write-only host can back up, and any user can list the snapshots.
    `level` is the zstd level for new data. `sync=False` is for tests of everything but durability. `on_step`
    is called with the name of every durable step before and after it. Without `use_cache` everything is read
    from the place itself, as a check must, and nothing is kept beyond the end of the process.
    """

    unlock: Unlock | None = None
    allow_no_identity: bool = False
    level: int = DEFAULT_LEVEL
    sync: bool = True
    on_step: Callable[[str], None] | None = None
    use_cache: bool = True


_DEFAULTS = OpenOptions()

_LISTS_SNAPSHOTS = frozenset(["backup"])
"""The writing commands that list the snapshots first, and for which a listing may be some seconds old."""

_CHECKS_MARKS = frozenset(["backup", "copy"])
"""The commands that store again what was in packs that were marked for removal when they began."""


def open_for_reading(
    place: Path | Place,
    options: OpenOptions = _DEFAULTS,
    *,
    reader: str | None = None,
    may_write_index: bool = False,
) -> Repository:
    """Open a repository for reading, without a lock that blocks others.

    `reader` is the command's name: while the repository is open, a prune keeps the packs that the command may
    still read, provided that the command may write to the repository's `locks`. With `may_write_index` the
    command can mark its findings in the index, provided that it may write there. Raise NotFoundError,
    FormatError, IntegrityError (configuration), StorageError, KeyMissingError and IndexUnusableError.
    """
    place = as_place(place)
    storage = place.open_storage()
    activity: Activity | None = None
    try:
        listing = list_ahead(storage)
        trust = place.trust_root(storage)
        config = trust.config
        storage = place.cached_storage(storage, config, options.use_cache)
        is_past = isinstance(place, RemotePlace) and place.as_of_ns is not None
        keys = open_key_manager(
            *(str(place), storage, trust, options.unlock),
            closed_ok=options.allow_no_identity,
            is_past=is_past,
        )
        activity = begin_reading(place, storage, config, reader)
        ciphers = make_ciphers(storage, keys)
        codec = make_codec(options.level, keys)
        index = open_index_readonly(place, config, storage, codec, may_write_index, ciphers)
    except BaseException:
        if activity is not None:
            activity.end()
        storage.close()
        raise
    repository = Repository(place, config, storage, index, options.level, activity, keys)
    repository.snapshots.listing = listing
    repository.store.needs_notices = False
    return repository


def open_for_writing(
    place: Path | Place, command: str, options: OpenOptions = _DEFAULTS
) -> Repository:
    """Open a repository for a command that adds to it; other such commands may run concurrently.

    Raise the errors of `open_for_reading`, and LockedError while exclusive maintenance runs.
    """
    return _open_locked(as_place(place), command, LockMode.SHARED, options)


def open_for_maintenance(
    place: Path | Place,
    command: str,
    options: OpenOptions = _DEFAULTS,
    mode: LockMode = LockMode.MAINTENANCE,
) -> Repository:
    """Open a repository for a command that removes from it or repairs it.

    `mode` decides which commands may run concurrently: with `MAINTENANCE` backups and readers, with
    `EXCLUSIVE` only readers, with `SHARED` all commands except exclusive maintenance. Except for an EXCLUSIVE
    rebuild the reserved disk space is released, so that the command works on a full disk. In a remote place
    these are the commands of this machine. Raise the errors of `open_for_reading`, and LockedError.
    """
    place = as_place(place)
    if isinstance(place, LocalPlace) and mode != LockMode.EXCLUSIVE:
        read_config(place)
        release_reserve(place.root)
    return _open_locked(place, command, mode, options)


def _open_locked(place: Place, command: str, mode: LockMode, options: OpenOptions) -> Repository:
    # Only what writes needs this import.
    from casfs.repository.publication import SnapshotPublisher

    storage = place.open_storage(options.sync, options.on_step)
    activity: Activity | None = None
    try:
        is_remote = isinstance(place, RemotePlace)
        has_mark = begin(storage, lambda: not is_remote or is_marked(storage))
        listing = list_ahead(storage) if command in _LISTS_SNAPSHOTS else None
        trust = place.trust_root(storage)
        config = trust.config
        storage = place.cached_storage(storage, config, options.use_cache)
        activity = begin_writing(place, storage, config, command, mode, has_mark)
        lock = activity.lock
        assert lock is not None
        if isinstance(place, LocalPlace) and isinstance(storage, LocalStorage):
            remove_stale_temporaries(place.root)
            storage.writer = lock.name
        keys = open_key_manager(
            str(place), storage, trust, options.unlock, mode, options.allow_no_identity
        )
        path = place.index_dir(config)
        if mode == LockMode.EXCLUSIVE:
            require_probe(path)
        index = open_index(
            place,
            config,
            path,
            storage,
            make_codec(options.level, keys),
            UpdateOptions(is_writer=True, lists_packs=mode != LockMode.SHARED),
            lock.name,
            options.on_step,
            options.sync,
            ciphers=make_ciphers(storage, keys),
        )
        if isinstance(place, LocalPlace) and mode == LockMode.SHARED:
            index.distrust(_unreadable_packs(place.root, index))
        activity.wait_until_shown()
        repository = Repository(place, config, storage, index, options.level, activity, keys)
        repository.snapshots.listing = listing
        repository.store.is_shared = is_shared(storage)
        repository.snapshots.publisher = SnapshotPublisher(repository, command in _CHECKS_MARKS)
        return repository
    except BaseException as error:
        if activity is not None:
            activity.end()
        storage.close()
        if isinstance(error, OSError):
            raise StorageError("open", str(place), error) from error
        raise


def _unreadable_packs(root: Path, index: Index) -> set[int]:
    """Return the ordinals of packs that this user may not read.

    A snapshot of this user must not refer to them: what is in them is stored again. They are those of another
    user of the repository, such as root.
    """
    found = {
        record.ordinal
        for record in index.packs()
        if not os.access(root / pack_name(record.pack), os.R_OK)
    }
    if found:
        log.warning(
            "this user has no permission to read %d packs of another user; what they hold is stored again",
            len(found),
        )
    return found
