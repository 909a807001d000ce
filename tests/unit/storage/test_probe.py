"""The probe finds out what a place really does: good servers, bad servers, and invented ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.errors import StorageDeniedError, StorageError
from casfs.storage.base import Data
from casfs.storage.memory import MemoryStorage
from casfs.storage.object_store import ObjectStorage
from casfs.storage.object_store_clients import s3_clients
from casfs.storage.probe import PREFIX, probe_storage
from casfs.storage.sftp import SftpStorage
from tests.support.servers import SFTP_SERVER, S3Server, rclone_s3


def s3(server: S3Server, bucket: str) -> ObjectStorage:
    return ObjectStorage(f"s3://{bucket}/probed", "probed", s3_clients(bucket, server.options))


def test_a_good_storage_passes_and_nothing_is_left_in_it() -> None:
    storage = MemoryStorage()
    result = probe_storage(storage)
    assert (result.creates_exclusively, result.can_overwrite, result.can_delete) == (True,) * 3
    assert abs(result.clock_offset_s) < 5 and not result.is_clock_off
    assert list(storage.list(PREFIX)) == []


@pytest.mark.slow
def test_seaweedfs_passes(s3_server: S3Server) -> None:
    storage = s3(s3_server, "casfs")
    result = probe_storage(storage)
    assert (result.creates_exclusively, result.can_overwrite, result.can_delete) == (True,) * 3
    assert list(storage.list(PREFIX)) == []
    storage.close()


@pytest.mark.slow
def test_openssh_passes(tmp_path: Path) -> None:
    storage = SftpStorage("sftp://pipe", str(tmp_path), (SFTP_SERVER,))
    result = probe_storage(storage)
    assert (result.creates_exclusively, result.can_overwrite, result.can_delete) == (True,) * 3
    storage.close()


@pytest.mark.slow
def test_rclone_is_refused_because_it_ignores_ranges() -> None:
    with rclone_s3("bucket") as server:
        storage = s3(server, "bucket")
        with pytest.raises(StorageError, match=r"ignores ranges.*use another server"):
            probe_storage(storage)
        storage.close()


def test_a_clock_that_is_off_is_noticed() -> None:
    storage = MemoryStorage(now_ns=lambda: 1_000_000_000)
    assert probe_storage(storage).is_clock_off


class Overwriting(MemoryStorage):
    def create(self, name: str, data: Data) -> None:
        self.write(name, data)


class LettingEachCreatorWin(MemoryStorage):
    """Answers the second creator before the first is done, as a server without a lock does."""

    def create(self, name: str, data: Data) -> None:
        if name.endswith("/b"):
            self.write(name, data)
        else:
            super().create(name, data)


class NotDeleting(MemoryStorage):
    def delete(self, name: str) -> None:
        raise StorageDeniedError("delete", name, PermissionError(13, "denied"))


class NotOverwriting(MemoryStorage):
    def write(self, name: str, data: Data) -> None:
        raise StorageDeniedError("write", name, PermissionError(13, "denied"))


def test_what_is_worked_around_is_recorded() -> None:
    assert not probe_storage(Overwriting()).creates_exclusively
    assert not probe_storage(LettingEachCreatorWin()).creates_exclusively
    assert not probe_storage(NotDeleting()).can_delete
    assert not probe_storage(NotOverwriting()).can_overwrite


class IgnoringRanges(MemoryStorage):
    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        return super().read(name)


class NotListing(MemoryStorage):
    def list(self, prefix: str):  # type: ignore[no-untyped-def] # a listing that is always empty
        return iter(())


class Shortening(MemoryStorage):
    def create(self, name: str, data: Data) -> None:
        super().create(name, bytes(data)[:-1])


@pytest.mark.parametrize("kind", [IgnoringRanges, NotListing, Shortening])
def test_a_storage_that_answers_wrongly_is_refused(kind: type[MemoryStorage]) -> None:
    with pytest.raises(StorageError, match="no repository can be kept there"):
        probe_storage(kind())
