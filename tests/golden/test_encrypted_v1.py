"""An encrypted repository that an early version wrote stays readable, with each of its keys."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from casfs.backup.run import BackupOptions, run_backup
from casfs.crypto.identities import Identities, read_identity_file, unlock_by_passphrase
from casfs.crypto.trust_root import TrustRoot
from casfs.digest import digest_of
from casfs.errors import KeyMissingError
from casfs.format.tree import NodeType
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.maintenance.storage_check import check_storage
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.base import Storage
from tests.data.make_encrypted_v1 import shortened
from tests.data.make_repository_v1 import describe

FROZEN = Path(__file__).parent.parent / "data" / "encrypted-v1"

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """Return a copy of the frozen repository."""
    copy = tmp_path / "repository"
    shutil.copytree(FROZEN, copy)
    return copy


def by_age(storage: Storage, trust: TrustRoot) -> Identities:
    return Identities(read_identity_file(FROZEN.with_suffix(".age"), lambda what: None))


def by_ssh(storage: Storage, trust: TrustRoot) -> Identities:
    return Identities(read_identity_file(FROZEN.with_suffix(".ssh"), lambda what: None))


def by_passphrase(storage: Storage, trust: TrustRoot) -> Identities:
    text = FROZEN.with_suffix(".passphrase").read_text().strip()
    return Identities(
        unlock_by_passphrase(
            storage,
            bytes.fromhex(trust.config.id),
            text,
            trust.recipients(storage).recipients,
        )
    )


@pytest.mark.parametrize("unlock", [by_age, by_ssh, by_passphrase])
def test_each_key_of_the_frozen_repository_shows_all_its_entries(
    frozen: Path,
    unlock: Callable[[Storage, TrustRoot], Identities],
) -> None:
    reported = json.loads(FROZEN.with_suffix(".json").read_text(encoding="ascii"))
    found = describe(frozen, unlock)
    assert shortened(found) == reported
    assert [len(entries) for entries in found.values()] == [3010, 3011]


def test_the_frozen_encrypted_repository_verifies_with_a_key_and_without(frozen: Path) -> None:
    with open_for_reading(frozen, OpenOptions(unlock=by_age)) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
        trust = repository.place.trust_root(repository.store.storage)
        storage = check_storage(repository.store.storage, trust, RecordingMonitor())
    assert (result.damage, storage.damage) == ([], [])
    assert (result.snapshots, result.packs_read, storage.objects) == (2, 2, 8)


def test_every_file_of_the_frozen_encrypted_repository_restores_with_its_digest(
    frozen: Path, tmp_path: Path
) -> None:
    with open_for_reading(frozen, OpenOptions(unlock=by_age)) as repository:
        *_, (_, snapshot) = repository.snapshots.iterate()
        monitor = RecordingMonitor()
        result = Restorer(repository, RestoreOptions(), monitor).restore(
            b"", snapshot.root, bytes(tmp_path / "target"), with_root=True
        )
    assert (result.damaged, result.failed) == (0, 0)
    reported = json.loads(FROZEN.with_suffix(".json").read_text(encoding="ascii"))
    files = 0
    for entries in reported.values():
        for path, entry in entries.items():
            if entry["kind"] == NodeType.FILE:
                name = base64.b64decode(path).decode("utf-8", "surrogateescape")
                data = (tmp_path / "target" / name).read_bytes()
                assert blake3(data).hexdigest() == entry["blake3"]
                files += 1
    assert files == 75


def test_the_frozen_encrypted_repository_shows_nothing_without_a_key(frozen: Path) -> None:
    with pytest.raises(KeyMissingError, match="check --storage"):
        open_for_reading(frozen)
    with (
        open_for_reading(frozen, OpenOptions(allow_no_identity=True)) as repository,
        pytest.raises(KeyMissingError),
    ):
        list(repository.snapshots.iterate())


def test_objects_of_the_frozen_encrypted_repository_are_named_by_their_digests() -> None:
    folders = ("packs", "snapshots", "sessions", "identities")
    files = [path for folder in folders for path in (FROZEN / folder).rglob("*") if path.is_file()]
    assert len(files) == 8
    for path in files:
        assert blake3(path.read_bytes()).hexdigest() == path.name.partition(".")[0]


def test_a_backup_into_the_frozen_encrypted_repository_finds_stored_blobs(
    frozen: Path, tmp_path: Path
) -> None:
    there = b"What is the digest of a file that changes?\n" * 40
    source = tmp_path / "source"
    source.mkdir()
    (source / "there").write_bytes(there)
    with open_for_writing(frozen, "backup", OpenOptions(unlock=by_age)) as repository:
        digest = repository.codec.digest(there)
        place = repository.store.index.lookup(digest)
        assert place is not None
        assert repository.store.index.lookup(digest_of(there)) is None
        run_backup(repository, BackupOptions((bytes(source),)), RecordingMonitor())
        assert repository.store.index.lookup(digest) == place
