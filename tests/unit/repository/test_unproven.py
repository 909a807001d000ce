"""Unproven snapshots: what a storage can publish is no parent, displaces nothing and is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.crypto.session_files import remove_session, write_session
from casfs.digest import SnapshotId
from casfs.errors import RefusedError
from casfs.format.key_derivation import MAX_DOMAINS, DedupDomain, WriteSession
from casfs.maintenance.forget import Grouping, forget, plan_policy, select_by_name
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.repair import SnapshotRepairer
from casfs.maintenance.retention import Policy
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_writing
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS
from casfs.storage.local import LocalStorage
from tests.support.encryption import RECIPIENT, SECRET, EncryptedRepositoryFixture, unlock
from tests.support.observation import look_through_the_mount
from tests.support.stores import flip, noise, pack_paths, pack_ref

DAY_NS = 86_400 * 10**9
START_NS = 1_700_000_000 * 10**9


class Attacked:
    """A repository with one proven snapshot, and an attacker who can only add objects to it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "file").write_bytes(b"honest")
        (folder / "identity").write_text(SECRET + "\n")
        self.repo = EncryptedRepositoryFixture(folder)
        self.root = self.repo.root
        self._monkeypatch = monkeypatch
        self.honest = self.back_up(START_NS)

    def back_up(self, time_ns: int, **options: object) -> BackupResult:
        """Publish a snapshot as the owner, who has an identity."""
        chosen = BackupOptions(
            paths=(os.fsencode(self.source),),
            host="here",
            time_ns=time_ns,
            **options,  # type: ignore[arg-type]
        )
        opened = open_for_writing(self.root, "backup", OpenOptions(unlock=unlock, sync=False))
        with opened as repository:
            return run_backup(repository, chosen, RecordingMonitor())

    def forge(self, time_ns: int, replaces: SnapshotId | None = None) -> SnapshotId:
        """Publish a snapshot as the attacker, who has neither a key nor the repository's secret."""
        with self._monkeypatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.folder / "attacker"))
            patch.setenv("XDG_CACHE_HOME", str(self.folder / "attacker cache"))
            result = self.repo.back_up(self.source, time_ns=time_ns, use_parent=False)
            if replaces is None:
                return self.repo.id_of(result)
            with self.repo.writing() as repository:
                repository.snapshots.delete(self.repo.id_of(result))
                forged = msgspec.structs.replace(result.snapshot, replaces=replaces)
                return repository.snapshots.publish(forged)

    def run(self, *arguments: str) -> Result:
        """Run a command in this process with the owner's identity."""
        result = CliRunner().invoke(
            casfs,
            [*arguments, "--repo", str(self.root), "--identity", str(self.folder / "identity")],
            obj=Settings(),
            standalone_mode=False,
        )
        if result.exception is not None:
            raise result.exception
        return result


@pytest.fixture
def attacked(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Attacked:
    return Attacked(tmp_path, monkeypatch)


def test_an_unproven_snapshot_is_never_the_parent_of_a_backup(attacked: Attacked) -> None:
    forged = attacked.forge(START_NS + DAY_NS)
    assert attacked.back_up(START_NS + 2 * DAY_NS).snapshot.parent == attacked.honest.snapshot_id
    with pytest.raises(RefusedError, match="unproven"):
        attacked.back_up(START_NS + 3 * DAY_NS, parent=forged.hex())


def test_unproven_snapshots_displace_no_proven_one_by_any_retention_rule(
    attacked: Attacked,
) -> None:
    forged = {attacked.forge(START_NS + number) for number in range(1, 4)}
    policy = Policy(last=1, hourly=1, daily=1, weekly=1, monthly=1, yearly=1)
    with attacked.repo.reading() as repository:
        plan = plan_policy(repository, policy, Grouping(), ALL_SNAPSHOTS, allow_all=False)
    assert (plan.forgotten(), plan.kept()) == ([], 1)
    assert {candidate.snapshot_id for candidate in plan.unproven} == forged


def test_the_last_proven_snapshot_is_not_forgotten_because_unproven_ones_are_left(
    attacked: Attacked,
) -> None:
    attacked.forge(START_NS + 1)
    assert attacked.honest.snapshot_id is not None
    with (
        attacked.repo.reading() as repository,
        pytest.raises(RefusedError, match="no snapshot would be left"),
    ):
        select_by_name(repository, [attacked.honest.snapshot_id.hex()], allow_all=False)


def test_a_prune_stores_nothing_in_a_session_that_no_reader_accepts(attacked: Attacked) -> None:
    """Everyone who can add objects can add sessions, whose domains a prune takes into its own."""
    for name in ("kept", "removed"):
        (attacked.source / name).write_bytes(noise(name, 300_000))
    forgotten = attacked.back_up(START_NS + 1).snapshot_id
    assert forgotten is not None
    (attacked.source / "removed").unlink()
    attacked.back_up(START_NS + 2)
    attacked.run("forget", forgotten.hex())
    config = attacked.repo.config
    flood = WriteSession.new(
        [DedupDomain.new(bytes.fromhex(config.id)) for _ in range(MAX_DOMAINS)]
    )
    storage = LocalStorage(attacked.root)
    write_session(storage, flood, [RECIPIENT])
    with pytest.raises(RefusedError, match=f"sessions/{flood.id.hex()} alone has 65,536"):
        attacked.run("prune", "--max-unused", "0")
    attacked.run("check", "--read-data")
    remove_session(storage, flood.id)
    assert "repacked" in attacked.run("prune", "--max-unused", "0").stdout
    attacked.run("check", "--read-data")


def test_an_unproven_snapshot_neither_hides_nor_removes_the_one_it_claims_to_replace(
    attacked: Attacked,
) -> None:
    honest = attacked.honest.snapshot_id
    forged = attacked.forge(START_NS + DAY_NS, replaces=honest)
    options = OpenOptions(unlock=unlock, sync=False)
    with open_for_maintenance(attacked.root, "forget", options) as repository:
        assert [one for one, _ in repository.snapshots.iterate()] == [honest, forged]
        assert forget(repository, select_by_name(repository, [forged.hex()], False)) == 1
        assert [one for one, _ in repository.snapshots.iterate()] == [honest]


def test_a_change_of_tags_does_not_make_an_unproven_snapshot_proven(attacked: Attacked) -> None:
    forged = attacked.forge(START_NS + DAY_NS)
    before = set((attacked.root / "snapshots").iterdir())
    with pytest.raises(RefusedError, match="is unproven"):
        attacked.run("tag", forged.hex(), "--add", "trusted")
    assert set((attacked.root / "snapshots").iterdir()) == before


def test_a_repair_does_not_make_a_damaged_unproven_snapshot_proven(attacked: Attacked) -> None:
    packs = set(pack_paths(attacked.root))
    (attacked.source / "file").write_bytes(b"forged")
    forged = attacked.forge(START_NS + DAY_NS)
    for pack in set(pack_paths(attacked.root)) - packs:
        pack.unlink()
    options = OpenOptions(unlock=unlock, sync=False)
    with open_for_maintenance(attacked.root, "repair", options) as repository:
        result = SnapshotRepairer(repository, RecordingMonitor()).repair()
        assert [found.snapshot_id for found in result.repaired] == [forged]
        assert set(repository.snapshots.ids()) == {attacked.honest.snapshot_id}


def test_a_repaired_unproven_snapshot_stays_unproven(attacked: Attacked) -> None:
    packs = set(pack_paths(attacked.root))
    (attacked.source / "file").write_bytes(noise("forged", 50_000))
    (attacked.source / "other").write_bytes(b"what is left")
    forged = attacked.forge(START_NS + DAY_NS)
    new = set(pack_paths(attacked.root)) - packs
    (pack,) = [path for path in new if not pack_ref(path).is_meta]
    flip(pack, 10_000)  # in the data of the large file
    options = OpenOptions(unlock=unlock, sync=False)
    with open_for_maintenance(attacked.root, "repair", options) as repository:
        repairer = SnapshotRepairer(repository, RecordingMonitor())
        (repaired,) = repairer.repair(PackSelection()).repaired
        assert repaired.snapshot_id == forged
    with open_for_maintenance(attacked.root, "prune", options) as repository:
        assert forged not in repository.snapshots.ids()
        assert repaired.new_id is not None
        assert not repository.snapshots.provenance.is_from_trusted_writer(repaired.new_id)
        Pruner(repository, PruneOptions(), RecordingMonitor()).prune()


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("check",), "summary"),
        (("stats",), "stats"),
        (("prune", "--dry-run"), "prune"),
        (("forget", "--keep-last", "1", "--dry-run"), "summary"),
        (("find", "file"), "match"),
        (("log", "latest:{source}/file"), None),
        (("snapshots",), "snapshot"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_command_over_all_snapshots_reports_the_unproven_ones(
    attacked: Attacked, command: tuple[str, ...], kind: str | None
) -> None:
    forged = attacked.forge(START_NS + DAY_NS)
    arguments = [word.format(source=attacked.source) for word in command]
    assert "unproven" in attacked.run(*arguments).output
    if kind is None:
        return
    lines = attacked.run(*arguments, "--json").stdout.splitlines()
    found = [one for one in map(json.loads, lines) if one["type"] == kind]
    assert any(
        one.get("unproven") is True
        or one.get("unproven_snapshots") == 1
        or one.get("unproven_ids") == [forged.hex()]
        for one in found
    )


def test_a_mount_of_everything_reports_unproven_snapshots_and_hides_no_proven_one(
    attacked: Attacked, caplog: pytest.LogCaptureFixture
) -> None:
    forged = attacked.forge(START_NS + DAY_NS, replaces=attacked.honest.snapshot_id)
    assert attacked.honest.snapshot_id is not None
    with attacked.repo.reading() as repository:
        seen = look_through_the_mount(repository)
    assert set(seen) == {forged.hex(), attacked.honest.snapshot_id.hex()}
    assert f"snapshot {forged.hex()[:12]} is unproven" in caplog.text
    assert attacked.honest.snapshot_id.hex()[:12] not in caplog.text
