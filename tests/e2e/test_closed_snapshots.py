"""Snapshots that the given identities do not decrypt: what each command over all snapshots says and does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.crypto.recipients import RecipientList, write_recipients
from casfs.digest import SnapshotId, short_id
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import SnapshotClosedError
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance
from casfs.storage.local import LocalStorage
from tests.support.cli import Casfs, Result
from tests.support.encryption import (
    OTHER,
    RECIPIENT,
    SECRET,
    EncryptedRepositoryFixture,
    unlock,
)
from tests.support.stores import noise, pack_paths


class TwoOwners:
    """A repository with a snapshot for one identity and a snapshot for another one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "identity").write_text(SECRET + "\n")
        (folder / "identity").chmod(0o600)
        self.repo = EncryptedRepositoryFixture(folder)
        self.own = self._back_up("mine", "owner", monkeypatch)
        storage = LocalStorage(self.repo.root, sync=False)
        write_recipients(storage, RecipientList.of([OTHER]))
        self.closed = self._back_up("theirs", "stranger", monkeypatch)
        write_recipients(storage, RecipientList.of([RECIPIENT]))
        storage.close()

    def _back_up(self, name: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> SnapshotId:
        source = self.folder / name
        source.mkdir()
        (source / name).write_bytes(noise(name, 5000))
        with monkeypatch.context() as patch:
            for kind in ("state", "cache"):
                path = self.folder / machine / kind
                path.mkdir(mode=0o700, parents=True)
                patch.setenv(f"XDG_{kind.upper()}_HOME", str(path))
            return self.repo.id_of(self.repo.back_up(source, host=machine))

    def run(self, *arguments: str, expect: int) -> Result:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        casfs = Casfs(self.repo.root, home)
        return casfs.run(*arguments, "--identity", self.folder / "identity", expect=expect)


@pytest.fixture
def owners(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> TwoOwners:
    return TwoOwners(tmp_path, monkeypatch)


def test_a_prune_names_the_snapshot_that_no_identity_decrypts_and_removes_nothing(
    owners: TwoOwners,
) -> None:
    before = pack_paths(owners.repo.root)
    options = OpenOptions(unlock=unlock, sync=False)
    with open_for_maintenance(owners.repo.root, "prune", options) as repository:
        pruner = Pruner(repository, PruneOptions(), RecordingMonitor())
        with pytest.raises(SnapshotClosedError) as raised:
            pruner.prune()
    message = str(raised.value)
    assert raised.value.exit_code == 1
    assert short_id(owners.closed) in message
    assert "nothing was removed" in message
    assert "identity" in message and f"casfs forget {short_id(owners.closed)}" in message
    assert pack_paths(owners.repo.root) == before


@pytest.mark.parametrize(
    "arguments",
    [("find", "mine"), ("stats",), ("forget", "--keep-last", "1")],
    ids=lambda arguments: arguments[0],
)
def test_a_command_over_all_snapshots_goes_on_and_reports_the_closed_one(
    owners: TwoOwners, arguments: tuple[str, ...]
) -> None:
    assert "the result is incomplete" in owners.run(*arguments, expect=1).complaint
    done = owners.run(*arguments, "--json", expect=1)
    assert done.one("omitted")["snapshot"] == owners.closed.hex()
    # The result for the other snapshot is there.
    kinds = {line["type"] for line in done.objects}
    assert len(kinds) > 1 and "error" not in kinds


def test_a_check_goes_on_beside_snapshots_and_packs_that_no_identity_decrypts(
    owners: TwoOwners,
) -> None:
    seen = owners.run("check", "--read-data", expect=1)
    assert short_id(owners.closed) in seen.text
    assert "no damage was found" in seen.text
    assert "none of the given identities" in seen.complaint
    done = owners.run("check", "--read-data", "--json", expect=1)
    assert (done.one("summary")["damage"], done.one("summary")["files"]) == (0, 1)
    assert {line["what"] for line in done.of_type("unreadable")} == {"snapshot", "pack"}


def test_a_closed_snapshot_is_forgotten_by_its_id_and_no_longer_ends_a_prune(
    owners: TwoOwners,
) -> None:
    ended = owners.run("prune", expect=1)
    assert len(ended.complaints) == 1 and short_id(owners.closed) in ended.complaint
    gone = owners.run("forget", owners.closed.hex(), expect=0)
    assert "incomplete" not in gone.complaint
    assert os.listdir(owners.repo.root / "snapshots") == [owners.own.hex()]
    owners.run("prune", expect=0)


def test_a_damaged_snapshot_makes_a_result_incomplete_with_the_code_of_damage(
    owners: TwoOwners,
) -> None:
    (owners.repo.root / "snapshots" / ("ab" * 32)).write_bytes(b"junk")
    owners.run("stats", expect=5)
