"""Open the index of a repository: find it, verify that it is intact, and reconcile it with the packs.

A damaged index costs only the time to rebuild it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.errors import IndexDamagedError, IndexUnusableError, StorageError
from casfs.format.codec import BlobCodec
from casfs.format.config import RepositoryConfig
from casfs.index import fingerprint
from casfs.index.fingerprint import IndexState
from casfs.index.index import Index
from casfs.repository.place import Place, RemotePlace
from casfs.storage.base import Locks, Storage
from casfs.storage.locks import LockMode
from casfs.store.blob_store import BlobStore
from casfs.store.index_update import UpdateOptions, update_index
from casfs.user_dirs import cached_index_dir

if TYPE_CHECKING:
    from casfs.store.cipher import PackCiphers
    from casfs.store.delta_sync import DeltaSync

log = logging.getLogger(__name__)

_READ = UpdateOptions()

_WHY_REBUILT = {
    IndexState.DAMAGED: "the index %s is damaged; rebuilding it from the packs",
    IndexState.FOREIGN: (
        "the index %s was not written by this user on this machine; rebuilding it from the packs"
    ),
}


def open_index_readonly(
    place: Place,
    config: RepositoryConfig,
    storage: Storage,
    codec: BlobCodec,
    takes_notes: bool = False,
    ciphers: PackCiphers | None = None,
) -> Index:
    """Return an index that contains every pack in the storage.

    If the repository's own index is missing, damaged or outdated, it is brought up to date. If it cannot be
    written, this user's own index in the cache directory is used instead, as always in an encrypted
    repository. With `takes_notes` the returned index can be written where possible.
    """
    path = place.index_dir(config)
    try:
        if takes_notes:
            # Only the repository's own index is changed before a pack is removed. A user's index may be
            # behind a prune of another host, so a pack that it alone names is not missing.
            is_own = isinstance(place, RemotePlace) or not path.is_relative_to(place.root)
            update = UpdateOptions(lists_packs=True, keep_missing=not is_own)
            return open_index(place, config, path, storage, codec, update, ciphers=ciphers)
        if has_deltas(place, config):
            return _open_synced(place, config, path, storage, codec, ciphers)
        in_use = _is_in_use(place.locks(config))
        if fingerprint.assess(path, in_use) != IndexState.INTACT:
            raise IndexUnusableError(f"the index {path} is damaged")
        index = Index(path, readonly=True)
    except IndexUnusableError:
        pass
    else:
        try:
            has_all = _has_all_packs(index, storage, codec) and _has_places(index, ciphers)
        except BaseException:
            close_index(index)
            raise
        if has_all:
            return index
        close_index(index)
    try:
        return open_index(place, config, path, storage, codec, ciphers=ciphers)
    except IndexUnusableError:
        if isinstance(place, RemotePlace) or not path.is_relative_to(place.root):
            raise
    try:
        own = cached_index_dir(config.id)
    except OSError as error:
        raise StorageError("create an index in the folder", str(error.filename), error) from error
    return open_index(place, config, own, storage, codec, ciphers=ciphers)


def has_deltas(place: Place, config: RepositoryConfig) -> bool:
    """Return whether the index of a place is synced by index deltas; else by a listing of the packs."""
    return isinstance(place, RemotePlace) and config.has_deltas


def make_delta_sync(store: BlobStore, ciphers: PackCiphers | None) -> DeltaSync:
    """Return a sync that applies index deltas to a store with the keys of this process."""
    from casfs.store.delta_sync import DeltaSync

    if ciphers is None:
        return DeltaSync(store)
    return DeltaSync(store, ciphers.sessions, ciphers.can_read)


def _open_synced(
    place: Place,
    config: RepositoryConfig,
    path: Path,
    storage: Storage,
    codec: BlobCodec,
    ciphers: PackCiphers | None,
) -> Index:
    """Return the index, brought up to date by deltas; as it is where it cannot be written."""
    try:
        return open_index(place, config, path, storage, codec, ciphers=ciphers)
    except IndexUnusableError as error:
        if fingerprint.assess(path, in_use=True) != IndexState.INTACT:
            raise
        try:
            index = Index(path, readonly=True)
        except IndexUnusableError:
            raise error from None
        if not index.is_current():
            close_index(index)
            raise
        log.warning("%s; it is used as it is, so what other hosts stored is found slowly", error)
        return index


def open_index(
    place: Place,
    config: RepositoryConfig,
    path: Path,
    storage: Storage,
    codec: BlobCodec,
    update: UpdateOptions = _READ,
    own_lock: str | None = None,
    on_step: Callable[[str], None] | None = None,
    sync: bool = True,
    ciphers: PackCiphers | None = None,
) -> Index:
    """Return the index in the folder `path`, repaired if needed; `own_lock` is the caller's lock.

    Raise IndexUnusableError, also where the folder cannot be written.
    """

    def is_alone() -> bool:
        return not _is_in_use(place.locks(config), own_lock)

    for is_last in (False, True):
        try:
            state = fingerprint.assess(path, in_use=not is_alone())
            if state != IndexState.INTACT:
                log.warning(_WHY_REBUILT[state], path)
                fingerprint.delete_index(path)
        except OSError as error:
            raise IndexUnusableError(
                f"cannot replace the damaged index {path}: {error.strerror}"
            ) from error
        index = Index(path, on_step=on_step, sync=sync)
        index.tracks_deltas = config.has_deltas
        if not _can_read(ciphers):
            index.omit_places()
        try:
            store = BlobStore(storage, index, codec, ciphers)
            deltas = make_delta_sync(store, ciphers) if has_deltas(place, config) else None
            update_index(store, deltas, update, is_alone)
            if _can_read(ciphers):
                store.place_blobs()
            elif update.is_writer:
                index.drop_old_places()
        except IndexDamagedError:
            close_index(index)
            if is_last or not is_alone():
                raise
        except BaseException:
            close_index(index)
            raise
        else:
            return index
    raise AssertionError("unreachable")


def replace_with_empty(store: BlobStore) -> None:
    """Replace an index that LMDB cannot change by an empty one; the caller must be its only user."""
    log.warning("the index %s is damaged; rebuilding it from the packs", store.index.path)
    store.index.close()
    fingerprint.delete_index(store.index.path)
    index = Index(store.index.path)
    index.tracks_deltas = store.index.tracks_deltas
    if store.index.omits_places:
        index.omit_places()
    store.use_index(index)


def close_index(index: Index) -> None:
    """Close an index; write its fingerprint if it was changed, or mark it damaged if it is."""
    changed, damaged = index.changed, index.environment.is_damaged and not index.readonly
    index.close()
    if damaged:
        fingerprint.mark_index_damaged(index.path)
    elif changed:
        fingerprint.write_fingerprint(index.path)


def _is_in_use(locks: Locks, own_lock: str | None = None) -> bool:
    """Return whether another process may be changing the index now."""
    try:
        live = locks.reap()
    except StorageError:
        return False
    return any(name != own_lock and record.mode != LockMode.READER for name, record in live.items())


def _can_read(ciphers: PackCiphers | None) -> bool:
    """Return whether this process can read what the repository stores."""
    return ciphers is None or ciphers.can_read


def _has_places(index: Index, ciphers: PackCiphers | None) -> bool:
    """Return whether the index has the places of all blobs that this process can read, or can get none.

    Where it cannot be written, `BlobStore` looks the places up in the packs' directories, again and again.
    """
    return (
        not _can_read(ciphers) or not os.access(index.path, os.W_OK) or not index.unplaced_packs()
    )


def _has_all_packs(index: Index, storage: Storage, codec: BlobCodec) -> bool:
    if not index.is_current() or index.partial_packs():
        return False
    indexed = {record.pack.id for record in index.packs()}
    return all(pack.id in indexed for pack, _ in BlobStore(storage, index, codec).stored_packs())
