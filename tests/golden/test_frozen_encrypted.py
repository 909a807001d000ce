"""The encrypted repositories that the first version of each format wrote stay readable with every key."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from casfs.backup.run import BackupOptions, run_backup
from casfs.crypto.identities import Identities, read_identity_file, unlock_by_passphrase
from casfs.crypto.trust_root import TrustRoot
from casfs.digest import digest_of
from casfs.errors import KeyMissingError
from casfs.format.pack import PACK_PREFIXES
from casfs.format.tree import NodeType
from casfs.index.schema import VERIFIED
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.maintenance.storage_check import check_storage
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.base import Storage
from tests.data.make_repository import describe, shortened

DATA = Path(__file__).parent.parent / "data"

pytestmark = pytest.mark.usefixtures("own_home")


OBJECTS = {1: 8, 2: 12}
"""Packs, snapshots, files of sessions, an identity, and in format 2 deltas."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A copy of a frozen repository, where the original is, and what opens it."""

    format: int
    root: Path
    original: Path

    @property
    def options(self) -> OpenOptions:
        return OpenOptions(unlock=self.by_age)

    def manifest(self) -> dict[str, dict[str, dict[str, object]]]:
        text = self.original.with_suffix(".json").read_text(encoding="ascii")
        found: dict[str, dict[str, dict[str, object]]] = json.loads(text)
        return found

    def by_age(self, storage: Storage, trust: TrustRoot) -> Identities:
        return Identities(read_identity_file(self.original.with_suffix(".age"), lambda what: None))

    def by_ssh(self, storage: Storage, trust: TrustRoot) -> Identities:
        return Identities(read_identity_file(self.original.with_suffix(".ssh"), lambda what: None))

    def by_passphrase(self, storage: Storage, trust: TrustRoot) -> Identities:
        text = self.original.with_suffix(".passphrase").read_text().strip()
        return Identities(
            unlock_by_passphrase(
                storage,
                bytes.fromhex(trust.config.id),
                text,
                trust.recipients(storage).recipients,
            )
        )


@pytest.fixture(params=[1, 2], ids=lambda number: f"format {number}")
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Frozen:
    original = DATA / f"encrypted-v{request.param}"
    shutil.copytree(original, tmp_path / "repository")
    return Frozen(request.param, tmp_path / "repository", original)


@pytest.mark.parametrize("unlock", [Frozen.by_age, Frozen.by_ssh, Frozen.by_passphrase])
def test_each_key_of_the_frozen_repository_shows_all_its_entries(
    frozen: Frozen,
    unlock: Callable[[Frozen, Storage, TrustRoot], Identities],
) -> None:
    found = describe(frozen.root, partial(unlock, frozen))
    assert shortened(found) == frozen.manifest()
    assert [len(entries) for entries in found.values()] == [3010, 3011]


def test_the_frozen_encrypted_repository_verifies_with_a_key_and_without(frozen: Frozen) -> None:
    with open_for_reading(frozen.root, frozen.options) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
        trust = repository.place.trust_root(repository.store.storage)
        storage = check_storage(repository.store.storage, trust, RecordingMonitor())
    assert (result.damage, storage.damage) == ([], [])
    assert (result.snapshots, result.packs_read, storage.objects) == (
        2,
        2 * frozen.format,
        OBJECTS[frozen.format],
    )


def test_every_file_of_the_frozen_encrypted_repository_restores_with_its_digest(
    frozen: Frozen, tmp_path: Path
) -> None:
    with open_for_reading(frozen.root, frozen.options) as repository:
        *_, (_, snapshot) = repository.snapshots.iterate()
        monitor = RecordingMonitor()
        result = Restorer(repository, RestoreOptions(), monitor).restore(
            b"", snapshot.root, bytes(tmp_path / "target"), with_root=True
        )
    assert (result.damaged, result.failed) == (0, 0)
    reported = frozen.manifest()
    files = 0
    for entries in reported.values():
        for path, entry in entries.items():
            if entry["kind"] == NodeType.FILE:
                name = base64.b64decode(path).decode("utf-8", "surrogateescape")
                data = (tmp_path / "target" / name).read_bytes()
                assert blake3(data).hexdigest() == entry["blake3"]
                files += 1
    assert files == 75


def test_the_frozen_encrypted_repository_shows_nothing_without_a_key(frozen: Frozen) -> None:
    with pytest.raises(KeyMissingError, match="check --storage"):
        open_for_reading(frozen.root)
    with (
        open_for_reading(frozen.root, OpenOptions(allow_no_identity=True)) as repository,
        pytest.raises(KeyMissingError),
    ):
        list(repository.snapshots.iterate())


def test_objects_of_the_frozen_encrypted_repository_are_named_by_their_digests(
    frozen: Frozen,
) -> None:
    folders = (*PACK_PREFIXES, "snapshots", "sessions", "identities", "deltas")
    places = [frozen.original / folder for folder in folders]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) == OBJECTS[frozen.format]
    for path in files:
        assert (
            blake3(path.read_bytes()).hexdigest() == path.name.partition(".")[0].rpartition("-")[2]
        )


def test_a_backup_into_the_frozen_encrypted_repository_finds_stored_blobs(
    frozen: Frozen, tmp_path: Path
) -> None:
    there = b"What is the digest of a file that changes?\n" * 40
    source = tmp_path / "source"
    source.mkdir()
    (source / "there").write_bytes(there)
    with open_for_writing(frozen.root, "backup", frozen.options) as repository:
        digest = repository.codec.digest(there)
        place = repository.store.index.lookup(digest)
        assert place is not None
        assert repository.store.index.lookup(digest_of(there)) is None
        # The new index has only what the packs say, and not who stored them: a claim until it is verified.
        assert digest in repository.store.index.claims([digest])
        run_backup(repository, BackupOptions((bytes(source),)), RecordingMonitor())
        assert repository.store.index.lookup(digest) == place._replace(flags=VERIFIED)
