"""The place of a repository: a folder of this machine, or a remote place. The layers above use only `Place`.

This machine keeps the index of a remote repository in the user's cache folder, with locks that prevent two
processes of this machine from changing the index at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from casfs.crypto.trust_root import TrustRoot
from casfs.errors import NotFoundError, RefusedError, StorageError, TrustError
from casfs.format.config import CONFIG_NAME, MAX_CONFIG_BYTES, RepositoryConfig
from casfs.storage.base import Locks, Storage, StorageOptions
from casfs.storage.counting import RequestCounter
from casfs.storage.local import LocalStorage
from casfs.storage.locks import FolderLocks
from casfs.storage.url import StorageAddress
from casfs.user_dirs import cached_index_dir, index_dir


@dataclass(slots=True)
class ConfigCache:
    """A cache of the configuration of a repository: a process reads it only once."""

    _found: TrustRoot | None = None

    def read(self, storage: Storage, place: str, expected: str | None) -> TrustRoot:
        """Return the configuration; only the first successful call reads it."""
        if self._found is None:
            found = TrustRoot(_read_config_bytes(storage, place), place)
            accepted = (found.config.id, found.config_digest, found.file_digest)
            if expected is not None and expected not in accepted:
                raise TrustError(
                    f"the repository in {place} is {found.config.id[:12]}, not the expected "
                    f"{expected[:12]}; the digest of its configuration is {found.file_digest}"
                )
            self._found = found
        return self._found


def _read_config_bytes(storage: Storage, place: str) -> bytes:
    try:
        return storage.read(CONFIG_NAME, 0, MAX_CONFIG_BYTES)
    except NotFoundError as error:
        raise _no_repository(place) from error
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            raise _no_repository(place) from error
        raise


def _no_repository(place: str) -> NotFoundError:
    return NotFoundError(f"there is no repository in {place}; casfs init makes one")


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A folder that this machine can open; `root` is absolute.

    `expected`, if given, is the id of the repository there or the digest of its configuration, as `b3sum
    config` prints it, now or before an upgrade. `config_cache` keeps the configuration for the whole process,
    which uses one place.
    """

    root: Path
    expected: str | None = None
    config_cache: ConfigCache = field(default_factory=ConfigCache, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.root)

    def open_storage(
        self, sync: bool = True, on_step: Callable[[str], None] | None = None
    ) -> LocalStorage:
        """Return the storage in the folder."""
        return LocalStorage(self.root, sync=sync, on_step=on_step)

    def trust_root(self, storage: Storage) -> TrustRoot:
        """Return the configuration of the repository, which the first call reads.

        Raises NotFoundError, FormatError, IntegrityError, StorageError, and TrustError for another repository
        than the expected one.
        """
        return self.config_cache.read(storage, str(self), self.expected)

    def index_dir(self, config: RepositoryConfig) -> Path:
        """Return the folder of the index."""
        return index_dir(self.root, config.id, encrypted=config.encryption is not None)

    def cached_storage(self, storage: Storage, config: RepositoryConfig, on_disk: bool) -> Storage:
        """Return the storage itself: the kernel caches a folder."""
        return storage

    def locks(self, config: RepositoryConfig) -> Locks:
        """Return the locks of the processes that open the folder."""
        return FolderLocks(self.root / "locks")


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """A place that is reached over a network. `counter` counts the requests to it.

    With `as_of_ns`, a time by the place's clock, it is read as it was then, and has an index of its own.
    """

    address: StorageAddress
    options: StorageOptions = field(default_factory=StorageOptions)
    counter: RequestCounter = field(default_factory=RequestCounter, compare=False)
    expected: str | None = None
    config_cache: ConfigCache = field(default_factory=ConfigCache, compare=False, repr=False)
    as_of_ns: int | None = None

    def __str__(self) -> str:
        return str(self.address)

    def open_storage(
        self, sync: bool = True, on_step: Callable[[str], None] | None = None
    ) -> Storage:
        """Return the storage, before its first request; the server decides what is synced.

        Raise RefusedError where the place keeps no versions that `as_of_ns` could select from.
        """
        from casfs.storage.remote import open_storage

        storage = open_storage(self.address, self.options, self.counter)
        if self.as_of_ns is None:
            return storage
        from casfs.storage.as_of import AsOfStorage

        if storage.bucket is None:
            raise RefusedError(
                f"--as-of reads the versions of objects in an S3 bucket, and {self} keeps none for casfs"
            )
        return AsOfStorage(storage, storage.bucket, self.as_of_ns)

    def trust_root(self, storage: Storage) -> TrustRoot:
        """Return the configuration as `LocalPlace.trust_root` does."""
        return self.config_cache.read(storage, str(self), self.expected)

    def index_dir(self, config: RepositoryConfig) -> Path:
        """Return the folder of the index in the user's cache, and create its parent."""
        try:
            path = cached_index_dir(config.id)
            return path if self.as_of_ns is None else path.with_name("as-of-index")
        except OSError as error:
            raise StorageError("make an index in the folder", str(error.filename), error) from error

    def cached_storage(self, storage: Storage, config: RepositoryConfig, on_disk: bool) -> Storage:
        """Return the storage behind a cache: on the disk of this machine, or only in memory."""
        from casfs.storage.caching import CachingStorage
        from casfs.storage.cell_folder import CellFolder

        limit_bytes = self.options.cache_bytes
        # What an attacker wrote over a pack may be in the cache, and is not what there was before.
        if not on_disk or not limit_bytes or self.as_of_ns is not None:
            return CachingStorage(storage, None)
        folder = self.index_dir(config).with_name("objects")
        return CachingStorage(storage, CellFolder(folder, limit_bytes))

    def locks(self, config: RepositoryConfig) -> Locks:
        """Return the locks that this machine's processes hold."""
        name = "locks" if self.as_of_ns is None else "as-of-locks"
        return FolderLocks(self.index_dir(config).with_name(name))


Place = LocalPlace | RemotePlace


def as_place(place: Path | Place) -> Place:
    """Convert a path to a local place; return a place unchanged."""
    return LocalPlace(place.absolute()) if isinstance(place, Path) else place


def place_of(
    address: StorageAddress, options: StorageOptions, expected: str | None = None
) -> Place:
    """Return the place at an address, which must hold the repository `expected` if given."""
    if address.is_local:
        return LocalPlace(Path(address.path).absolute(), expected)
    return RemotePlace(address, options, expected=expected)


def read_config(place: Path | Place) -> RepositoryConfig:
    """Return the configuration of the repository in a place; raises as `LocalPlace.trust_root` does."""
    place = as_place(place)
    storage = place.open_storage()
    try:
        return place.trust_root(storage).config
    finally:
        storage.close()
