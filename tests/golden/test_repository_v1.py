"""A repository that an early version wrote stays readable, whatever becomes of the code."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import digest_of
from casfs.format.tree import NodeType
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_reading, open_for_writing
from casfs.restore.restorer import RestoreOptions, Restorer
from tests.data.make_repository_v1 import describe

FROZEN = Path(__file__).parent.parent / "data" / "repository-v1"


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """Return a copy of the frozen repository, which has no index."""
    copy = tmp_path / "repository"
    shutil.copytree(FROZEN, copy)
    return copy


def manifest() -> dict[str, dict[str, dict[str, object]]]:
    found: dict[str, dict[str, dict[str, object]]] = json.loads(
        FROZEN.with_suffix(".json").read_text(encoding="ascii")
    )
    return found


def test_the_frozen_repository_lists_all_its_entries(frozen: Path) -> None:
    assert describe(frozen) == manifest()


def test_every_byte_of_the_frozen_repository_verifies(frozen: Path) -> None:
    with open_for_reading(frozen) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
    assert result.damage == []
    assert result.snapshots == 2
    assert result.packs_read == result.packs > 0


def test_every_file_of_the_frozen_repository_restores_with_its_digest(
    frozen: Path, tmp_path: Path
) -> None:
    digests = 0
    reported = manifest()
    with open_for_reading(frozen) as repository:
        for snapshot_id, snapshot in repository.snapshots.iterate():
            target = tmp_path / snapshot_id.hex()
            monitor = RecordingMonitor()
            options = RestoreOptions()
            result = Restorer(repository, options, monitor).restore(
                b"", snapshot.root, bytes(target), with_root=True
            )
            assert (result.damaged, result.failed) == (0, 0)
            for path, node in repository.trees.walk(snapshot.root):
                if node.kind == NodeType.FILE:
                    digest = reported[snapshot_id.hex()][_key(path)]["blake3"]
                    data = Path(str(target), path.decode("utf-8", "surrogateescape")).read_bytes()
                    assert blake3(data).hexdigest() == digest
                    digests += 1
    assert digests == 3009


def test_packs_and_snapshots_of_the_frozen_repository_are_named_by_their_digests() -> None:
    objects = [path for folder in ("packs", "snapshots") for path in (FROZEN / folder).rglob("*")]
    files = [path for path in objects if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert blake3(path.read_bytes()).hexdigest() == path.name


def test_a_backup_into_the_frozen_repository_stores_only_new_blobs(
    frozen: Path, tmp_path: Path
) -> None:
    there = b"What is the digest of a file that changes?\n" * 40
    source = tmp_path / "source"
    source.mkdir()
    (source / "there").write_bytes(there)
    (source / "new").write_bytes(b"nothing of the kind")
    with open_for_writing(frozen, "backup") as repository:
        place = repository.store.index.lookup(digest_of(there))
        assert place is not None
        run_backup(repository, BackupOptions((bytes(source),)), RecordingMonitor())
        assert repository.store.index.lookup(digest_of(there)) == place
        assert repository.store.read(digest_of(b"nothing of the kind"))
    assert sum(1 for _ in (frozen / "packs").rglob("*/*")) == 1 + sum(
        1 for _ in (FROZEN / "packs").rglob("*/*")
    )


def _key(path: bytes) -> str:
    return base64.b64encode(path).decode()
