"""The check that needs no key: every object has the digest that names it, or is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.crypto.recipients import RECIPIENTS_NAME
from casfs.maintenance.storage_check import FOLDERS, StorageCheck, check_storage
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.place import LocalPlace, read_config
from casfs.storage.local import LocalStorage
from tests.support.builders import RepositoryFixture
from tests.support.encryption import RECIPIENT, EncryptedRepositoryFixture
from tests.support.stores import flip, noise

pytestmark = pytest.mark.usefixtures("own_home")


def checked(root: Path) -> StorageCheck:
    storage = LocalStorage(root)
    return check_storage(storage, LocalPlace(root).trust_root(storage), RecordingMonitor())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An encrypted repository with an object in each folder except that of removal notices."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(noise("file", 20_000))
    folder = tmp_path / "repository"
    create_repository(folder, [RECIPIENT], "secret")
    repo = EncryptedRepositoryFixture.__new__(EncryptedRepositoryFixture)
    repo.root = folder
    repo.back_up(source)
    return folder


def objects(root: Path) -> list[Path]:
    return [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]


def test_storage_check_reads_every_object_of_an_intact_storage(root: Path) -> None:
    result = checked(root)
    assert result.damage == []
    assert result.objects == len(objects(root)) == 7
    assert result.read_bytes == sum(path.stat().st_size for path in objects(root))


def test_storage_check_handles_an_unencrypted_repository_in_the_same_way(tmp_path: Path) -> None:
    repo = RepositoryFixture(tmp_path)
    repo.store(b"one", b"two")
    repo.publish({b"file": b"content"})
    result = checked(repo.root)
    assert (result.damage, result.objects) == ([], len(objects(repo.root)))
    assert result.objects >= 4
    (snapshot,) = (repo.root / "snapshots").iterdir()
    flip(snapshot, 20)
    assert [damage.what for damage in checked(repo.root).damage] == ["snapshot"]


@pytest.mark.parametrize("place", [0, 40, -1])
@pytest.mark.parametrize(
    ("folder", "what"),
    [
        ("packs", "pack"),
        ("meta", "pack"),
        ("snapshots", "snapshot"),
        ("sessions", "session"),
        ("identities", "identity"),
    ],
)
def test_storage_check_reports_a_flipped_bit_anywhere(
    root: Path, folder: str, what: str, place: int
) -> None:
    path = next(path for path in objects(root) if path.relative_to(root).parts[0] == folder)
    flip(path, place)
    (damage,) = checked(root).damage
    assert damage.message.startswith(str(path.relative_to(root)))
    assert damage.message.endswith(": digest mismatch")
    assert damage.what == what


def test_storage_check_reports_a_cut_or_extended_object(root: Path) -> None:
    for path in objects(root):
        data = path.read_bytes()
        for wrong in (b"", data[:-1], data + b"\0"):
            path.write_bytes(wrong)
            assert len(checked(root).damage) == 1, path
        path.write_bytes(data)
    assert checked(root).damage == []


def test_storage_check_reports_an_object_under_another_name(root: Path) -> None:
    path = next(path for path in objects(root) if path.parent.name != "snapshots")
    path.rename(path.with_name("0" * 64))
    assert checked(root).damage


def test_storage_check_reports_the_loss_of_the_first_session(root: Path) -> None:
    first = read_config(root).encryption
    assert first is not None
    for path in (root / "sessions" / first.session).iterdir():
        path.unlink()
    (damage,) = checked(root).damage
    assert "is missing; the configuration needs it" in damage.message


def test_storage_check_reports_a_damaged_or_missing_list_of_recipients(root: Path) -> None:
    flip(root / RECIPIENTS_NAME, 40)
    (damage,) = checked(root).damage
    assert (damage.what, "damaged" in damage.message) == ("recipients", True)
    (root / RECIPIENTS_NAME).unlink()
    (damage,) = checked(root).damage
    assert "missing" in damage.message


def test_storage_check_reports_a_missing_session_that_stored_objects_need(root: Path) -> None:
    first = read_config(root).encryption
    assert first is not None
    (other,) = [path for path in (root / "sessions").iterdir() if path.name != first.session]
    for path in other.iterdir():
        path.unlink()
    other.rmdir()
    (damage,) = checked(root).damage
    assert damage.what == "session"
    assert f"session {other.name} is missing; packs/" in damage.message
