"""Where a repository is: a folder of this machine, or a place elsewhere; all that is above knows only this.

What this machine keeps beside a remote repository is in the user's cache folder: the index, and the locks
that keep two processes of this machine from changing the index at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from casfs.errors import NotFoundError, RefusedError, StorageError
from casfs.format.config import CONFIG_NAME, MAX_CONFIG_BYTES, RepositoryConfig, decode_config
from casfs.storage.base import Storage, StorageOptions
from casfs.storage.counting import RequestCounter
from casfs.storage.local import LocalStorage
from casfs.storage.url import Location, open_storage
from casfs.user_dirs import cached_index_dir, index_dir


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A folder that this machine can open; `root` is absolute."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def open_storage(
        self, sync: bool = True, on_step: Callable[[str], None] | None = None
    ) -> LocalStorage:
        """Return the storage in the folder."""
        return LocalStorage(self.root, sync=sync, on_step=on_step)

    def read_config(self, storage: Storage) -> RepositoryConfig:
        """Return the configuration of the repository in the folder.

        Raises NotFoundError, FormatError, IntegrityError and StorageError.
        """
        path = self.root / CONFIG_NAME
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_CONFIG_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"there is no repository in {self.root}; casfs init makes one"
            ) from error
        except OSError as error:
            raise StorageError("read", str(path), error) from error
        return decode_config(data, str(self.root))

    def index_dir(self, config: RepositoryConfig) -> Path:
        """Return the folder of the index."""
        return index_dir(self.root, config.id, encrypted=config.encryption is not None)

    def locks_dir(self, config: RepositoryConfig) -> Path:
        """Return the folder of the locks."""
        return self.root / "locks"


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """A place that is reached over a network. `counter` counts what is asked of it."""

    location: Location
    options: StorageOptions = field(default_factory=StorageOptions)
    counter: RequestCounter = field(default_factory=RequestCounter, compare=False)

    def __str__(self) -> str:
        return str(self.location)

    def open_storage(
        self, sync: bool = True, on_step: Callable[[str], None] | None = None
    ) -> Storage:
        """Return the storage, of which nothing is asked yet; the server decides what is synced."""
        return open_storage(self.location, self.options, self.counter)

    def read_config(self, storage: Storage) -> RepositoryConfig:
        """Return the configuration of the repository; raises as `LocalPlace.read_config` does."""
        try:
            data = storage.read(CONFIG_NAME, 0, MAX_CONFIG_BYTES)
        except NotFoundError as error:
            raise NotFoundError(
                f"there is no repository in {self}; casfs init makes one"
            ) from error
        return decode_config(data, str(self))

    def index_dir(self, config: RepositoryConfig) -> Path:
        """Return the folder of the index in the user's cache; its parent is made."""
        try:
            return cached_index_dir(config.id)
        except OSError as error:
            raise StorageError("make an index in the folder", str(error.filename), error) from error

    def locks_dir(self, config: RepositoryConfig) -> Path:
        """Return the folder of the locks that this machine's processes hold."""
        return self.index_dir(config).with_name("locks")


Place = LocalPlace | RemotePlace


def local_root(place: Place, command: str) -> Path:
    """Return the folder of a local place; raise RefusedError for a remote one, naming the command."""
    if isinstance(place, RemotePlace):
        raise RefusedError(
            f"{command} is refused: this version of casfs cannot yet change {place} safely beside the "
            "backups of other hosts; nothing was changed"
        )
    return place.root


def as_place(place: Path | Place) -> Place:
    """Return the place that a path means; a place is returned as it is."""
    return LocalPlace(place.absolute()) if isinstance(place, Path) else place


def place_of(location: Location, options: StorageOptions) -> Place:
    """Return the place that a name means."""
    if location.is_local:
        return LocalPlace(Path(location.path).absolute())
    return RemotePlace(location, options)


def read_config(place: Path | Place) -> RepositoryConfig:
    """Return the configuration of the repository in a place; raises as `LocalPlace.read_config` does."""
    place = as_place(place)
    storage = place.open_storage()
    try:
        return place.read_config(storage)
    finally:
        storage.close()
