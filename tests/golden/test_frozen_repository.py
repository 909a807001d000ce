"""What the first version of each format wrote stays readable, whatever becomes of the code."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import digest_of
from casfs.format.tree import NodeType
from casfs.index.schema import VERIFIED
from casfs.maintenance.check import Checker
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_maintenance, open_for_reading, open_for_writing
from casfs.repository.place import read_config
from casfs.repository.upgrade import upgrade_repository
from casfs.restore.restorer import RestoreOptions, Restorer
from tests.data.make_repository import describe, shortened
from tests.support.stores import pack_paths, pack_ref

DATA = Path(__file__).parent.parent / "data"


Manifest = dict[str, dict[str, dict[str, object]]]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A copy of a frozen repository without its index, and where the original is."""

    format: int
    root: Path
    original: Path

    def manifest(self) -> Manifest:
        text = self.original.with_suffix(".json").read_text(encoding="ascii")
        found: Manifest = json.loads(text)
        return found


@pytest.fixture(params=[1, 2], ids=lambda number: f"format {number}")
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Frozen:
    original = DATA / f"repository-v{request.param}"
    shutil.copytree(original, tmp_path / "repository")
    return Frozen(request.param, tmp_path / "repository", original)


def test_the_frozen_repository_lists_all_its_entries(frozen: Frozen) -> None:
    found = describe(frozen.root)
    if frozen.format == 1:
        assert found == frozen.manifest()
    assert shortened(found) == shortened(frozen.manifest())
    assert [len(entries) for entries in found.values()] == [3010, 2]


def test_every_byte_of_the_frozen_repository_verifies(frozen: Frozen) -> None:
    with open_for_reading(frozen.root) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
    assert result.damage == []
    assert result.snapshots == 2
    assert result.packs_read == result.packs == len(pack_paths(frozen.root)) == 2 * frozen.format


def test_every_file_of_the_frozen_repository_restores_with_its_digest(
    frozen: Frozen, tmp_path: Path
) -> None:
    digests = 0
    reported = frozen.manifest()
    with open_for_reading(frozen.root) as repository:
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
                    entry = reported[snapshot_id.hex()].get(_key(path))
                    if entry is None:
                        continue  # the manifest has one in a hundred of many alike
                    digest = entry["blake3"]
                    data = Path(str(target), path.decode("utf-8", "surrogateescape")).read_bytes()
                    assert blake3(data).hexdigest() == digest
                    digests += 1
    assert digests == {1: 3009, 2: 39}[frozen.format]


def test_packs_and_snapshots_of_the_frozen_repository_are_named_by_their_digests(
    frozen: Frozen,
) -> None:
    files = [*pack_paths(frozen.original), *(frozen.original / "snapshots").iterdir()]
    assert len(files) == 2 + 2 * frozen.format
    for path in files:
        assert blake3(path.read_bytes()).hexdigest() == path.name


def test_a_backup_into_the_frozen_repository_stores_only_new_blobs(
    frozen: Frozen, tmp_path: Path
) -> None:
    there = b"What is the digest of a file that changes?\n" * 40
    source = tmp_path / "source"
    source.mkdir()
    (source / "there").write_bytes(there)
    (source / "new").write_bytes(b"nothing of the kind")
    with open_for_writing(frozen.root, "backup") as repository:
        place = repository.store.index.lookup(digest_of(there))
        assert place is not None
        # The new index has only what the packs say, and not who stored them: a claim until it is verified.
        assert digest_of(there) in repository.store.index.claims([digest_of(there)])
        run_backup(repository, BackupOptions((bytes(source),)), RecordingMonitor())
        assert repository.store.index.lookup(digest_of(there)) == place._replace(flags=VERIFIED)
        assert repository.store.read(digest_of(b"nothing of the kind"))
    new = len(pack_paths(frozen.root)) - len(pack_paths(frozen.original))
    assert new == frozen.format
    assert read_config(frozen.root).format == frozen.format
    assert (frozen.root / "config").read_bytes() == (frozen.original / "config").read_bytes()
    assert (frozen.root / "meta").exists() == (frozen.format == 2)


def test_the_frozen_repository_of_format_1_is_upgraded_and_shows_the_same(frozen: Frozen) -> None:
    before = describe(frozen.root)
    assert upgrade_repository(frozen.root).is_changed == (frozen.format == 1)
    assert describe(frozen.root) == before
    with open_for_maintenance(frozen.root, "prune") as repository:
        options = PruneOptions(repack_all=True)
        Pruner(repository, options, RecordingMonitor()).prune()
    assert {pack_ref(path).is_meta for path in pack_paths(frozen.root)} == {False, True}
    assert describe(frozen.root) == before


def _key(path: bytes) -> str:
    return base64.b64encode(path).decode()
