"""The objects of a repository, wherever it is: what a disk, a server or a person does to them.

A test that damages, removes or counts stored objects in this way holds for a repository in a folder, in a
bucket and behind `sshd`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from casfs.errors import NotFoundError
from casfs.format.pack import DATA_PREFIX, META_PREFIX, PACK_PREFIXES
from casfs.maintenance.storage_check import FOLDERS
from casfs.storage.base import Storage
from tests.support.cli import Casfs
from tests.support.remote import RemoteCasfs

_FOLDERS = (*FOLDERS, "damaged", "drafts", "mirror", "presence", "probe")
_SINGLE = ("config", "recipients", "remote-writers")


class StoredObject(NamedTuple):
    """An object's name in the storage, and its size in bytes."""

    name: str
    size: int

    @property
    def digest(self) -> str:
        """The last part of the name: the digest of the bytes, in hexadecimal."""
        return self.name.rpartition("/")[2]

    @property
    def is_meta(self) -> bool:
        """Whether it is a metadata pack."""
        return self.name.startswith(f"{META_PREFIX}/")


@dataclass(frozen=True, slots=True)
class StoredObjects:
    """The objects of the repository of a command.

    A change also removes what the host of the command has cached of far objects, which would hide it.
    """

    casfs: Casfs

    def below(self, *folders: str) -> list[StoredObject]:
        """Return the objects below the folders, sorted by the last parts of their names."""
        if self._root is not None:
            found = [
                StoredObject(str(path.relative_to(self._root)), path.stat().st_size)
                for folder in folders
                for path in (self._root / folder).rglob("*")
                if path.is_file()
            ]
        else:
            with self._storage() as storage:
                found = [
                    StoredObject(name, size)
                    for folder in folders
                    for name, size, _ in storage.list(folder)
                ]
        return sorted(found, key=lambda one: one.digest)

    def names(self) -> list[str]:
        """Return the names of all objects; in a folder, of every file."""
        if self._root is not None:
            paths = [path for path in self._root.rglob("*") if path.is_file()]
            return sorted(str(path.relative_to(self._root)) for path in paths)
        with self._storage() as storage:
            single = [name for name in _SINGLE if _exists(storage, name)]
        return sorted([*single, *(one.name for one in self.below(*_FOLDERS))])

    def packs(self) -> list[StoredObject]:
        """Return all packs, sorted by their digests."""
        return self.below(*PACK_PREFIXES)

    def data_packs(self) -> list[StoredObject]:
        """Return the data packs, sorted by their digests."""
        return self.below(DATA_PREFIX)

    def largest_pack(self) -> StoredObject:
        """Return the largest pack."""
        return max(self.packs(), key=lambda one: one.size)

    def stored_bytes(self) -> int:
        """Return the size of all packs together."""
        return sum(one.size for one in self.packs())

    def read(self, name: str) -> bytes:
        """Return the bytes of an object."""
        if self._root is not None:
            return (self._root / name).read_bytes()
        with self._storage() as storage:
            return storage.read(name)

    def write(self, name: str, data: bytes) -> None:
        """Put bytes into the place of an object."""
        if self._root is not None:
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                path.chmod(0o600)
            path.write_bytes(data)
            return
        with self._storage() as storage:
            storage.write(name, data)
        self._forget_cached()

    def delete(self, name: str) -> None:
        """Remove an object."""
        if self._root is not None:
            (self._root / name).unlink()
            return
        with self._storage() as storage:
            storage.delete(name)
        self._forget_cached()

    def flip(self, name: str, offset: int) -> None:
        """Change one bit of an object."""
        data = bytearray(self.read(name))
        data[offset] ^= 1
        self.write(name, bytes(data))

    def truncate(self, name: str, size: int) -> None:
        """Cut an object short."""
        self.write(name, self.read(name)[:size])

    def delete_index(self) -> None:
        """Remove the index that the command uses."""
        for folder in self._index_folders():
            shutil.rmtree(folder)

    def damage_index(self) -> None:
        """Overwrite the index that the command uses."""
        for folder in self._index_folders():
            (folder / "data.mdb").write_bytes(b"junk" * 5000)

    def files(self, into: Path) -> Path:
        """Return a folder with all objects as files: that of a local repository, or a copy in `into`."""
        if self._root is not None:
            return self._root
        for name in self.names():
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return into

    @property
    def _root(self) -> Path | None:
        return self.casfs.repository

    @contextmanager
    def _storage(self) -> Iterator[Storage]:
        assert isinstance(self.casfs, RemoteCasfs)
        storage = self.casfs.open_storage()
        try:
            yield storage
        finally:
            storage.close()

    def _index_folders(self) -> list[Path]:
        if self._root is not None:
            return [self._root / "index"]
        found = list((self.casfs.home / ".cache" / "casfs").glob("*/index"))
        assert found
        return found

    def _forget_cached(self) -> None:
        for folder in (self.casfs.home / ".cache" / "casfs").glob("*/objects"):
            shutil.rmtree(folder)


def _exists(storage: Storage, name: str) -> bool:
    try:
        return storage.size(name) >= 0
    except NotFoundError:
        return False
