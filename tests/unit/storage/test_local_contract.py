"""A folder keeps the contract of a storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.errors import StorageDeniedError, StorageError
from casfs.storage.base import MAX_WHOLE_READ_BYTES
from casfs.storage.local import LocalStorage

from .contract import StorageContract


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[LocalStorage]:
    storage = LocalStorage(tmp_path, sync=False)
    yield storage
    storage.close()


class TestLocalStorage(StorageContract):
    pass


def test_folders_are_listed_in_the_order_of_their_objects_names(storage: LocalStorage) -> None:
    names = ["d/a-b", "d/a/x", "d/a.b/y", "d/a0"]
    for name in names:
        storage.create(name, b"")
    assert [entry.name for entry in storage.list("d")] == sorted(names)


def test_files_whose_names_casfs_never_gives_are_not_listed(
    storage: LocalStorage, tmp_path: Path
) -> None:
    storage.create("snapshots/a", b"")
    for name in (".hidden", "with space", "new\nline", "\udcff"):
        (tmp_path / "snapshots" / name).write_bytes(b"")
    assert [entry.name for entry in storage.list("snapshots")] == ["snapshots/a"]


def test_an_object_too_large_for_memory_is_not_read_whole(
    storage: LocalStorage, tmp_path: Path
) -> None:
    storage.create("config", b"")
    os.truncate(tmp_path / "config", MAX_WHOLE_READ_BYTES + 1)
    with pytest.raises(StorageError, match="too large"):
        storage.read("config")
    assert storage.read("config", MAX_WHOLE_READ_BYTES, 10) == b"\0"


def test_a_read_only_folder_refuses_a_write_with_storage_denied(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    storage.create("config", b"")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageDeniedError, match="Permission denied"):
        storage.write("config", b"x")
