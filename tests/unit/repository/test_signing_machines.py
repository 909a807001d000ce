"""A machine signs what it publishes: a former recipient publishes in the name of no known host."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import Result

from casfs.crypto.trust_state import load_state
from casfs.crypto.writers import TrustedWriters
from casfs.digest import SnapshotId
from casfs.errors import RefusedError, TrustError
from casfs.format.config import decode_config, encode_config
from casfs.repository.opening import open_for_maintenance, open_for_reading, open_for_writing
from casfs.storage.locks import LockMode
from tests.support.fleet import OPTIONS, Fleet, id_of
from tests.support.observation import look_through_the_mount


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(tmp_path, monkeypatch)


def test_machines_trust_the_first_key_of_each_host(fleet: Fleet) -> None:
    made = {id_of(fleet.back_up(machine)) for machine in ("admin", "web", "mail")}
    for machine in ("admin", "web", "mail", "a new one"):
        assert fleet.proven(machine) == dict.fromkeys(made, True)


def test_a_former_recipient_publishes_in_the_name_of_no_known_host(fleet: Fleet) -> None:
    honest = id_of(fleet.back_up("web"))
    assert fleet.proven("admin") == {honest: True}
    forged = id_of(fleet.back_up("thief", host="web"))
    assert fleet.proven("admin") == {honest: True, forged: False}
    assert fleet.proven("web") == {honest: True, forged: False}
    assert fleet.back_up("web").snapshot.parent == honest


def test_a_forged_snapshot_hides_no_honest_one(fleet: Fleet) -> None:
    honest = id_of(fleet.back_up("web"))
    assert fleet.proven("admin") == {honest: True}
    forged = _copy(fleet, "thief", honest, tags=("evil",), replaces=honest)
    assert _listed(fleet, "admin") == {honest, forged}


def _copy(
    fleet: Fleet,
    machine: str,
    copied: SnapshotId,
    tags: tuple[str, ...] = (),
    replaces: SnapshotId | None = None,
    host: str | None = None,
) -> SnapshotId:
    """Publish a snapshot again on another machine and leave the first one there.

    It keeps its author's signature unless it gets another host.
    """
    with fleet.on(machine), open_for_writing(fleet.root, "tag", OPTIONS) as repository:
        store = repository.snapshots
        snapshot = store.load(copied)
        signed = store.provenance.signed(copied)
        assert signed is not None and signed.signers is not None
        changed = msgspec.structs.replace(
            snapshot, tags=tags, replaces=replaces, host=host or snapshot.host
        )
        return store.publish(changed, author=signed.signers.author if host is None else None)


def _back_up_changed(fleet: Fleet, machine: str, content: bytes) -> SnapshotId:
    (fleet.source / "file").write_bytes(content)
    return id_of(fleet.back_up(machine))


def _listed(fleet: Fleet, machine: str) -> set[SnapshotId]:
    with fleet.on(machine), open_for_reading(fleet.root, OPTIONS) as repository:
        return {one for one, _ in repository.snapshots.iterate()}


@pytest.mark.parametrize("host", ["a new one", "mail"])
def test_a_machine_replaces_no_snapshot_of_another_host(fleet: Fleet, host: str) -> None:
    """A host that was taken over, or a new one, signs what claims to replace the snapshot of another."""
    honest = id_of(fleet.back_up("web"))
    fleet.back_up("mail")
    assert all(fleet.proven("admin").values())
    forged = _copy(fleet, host, honest, replaces=honest, host=host)
    assert fleet.proven("admin")[forged]
    assert {honest, forged} <= _listed(fleet, "admin")
    fleet.run("admin", "forget", forged.hex())
    assert honest in fleet.proven("admin")


@pytest.mark.parametrize("command", [("forget",), ("tag", "--add", "kept")])
def test_a_copy_that_claims_to_replace_another_snapshot_does_not_remove_it(
    fleet: Fleet, command: tuple[str, ...]
) -> None:
    """The author's signature of an older snapshot does not cover what the copy claims to replace."""
    older, newer = (_back_up_changed(fleet, "web", content) for content in (b"older", b"newer"))
    assert fleet.proven("admin") == {older: True, newer: True}
    copy = _copy(fleet, "thief", older, tags=("x",), replaces=newer)
    fleet.run("admin", *command, copy.hex())
    left = fleet.proven("admin")
    assert {older, newer} <= left.keys()
    assert copy not in left


def test_a_copy_hides_no_snapshot_in_a_mount_of_everything(fleet: Fleet) -> None:
    older, newer = (_back_up_changed(fleet, "web", content) for content in (b"older", b"newer"))
    assert fleet.proven("admin") == {older: True, newer: True}
    copy = _copy(fleet, "thief", older, tags=("x",), replaces=newer)
    with fleet.on("admin"), open_for_reading(fleet.root, OPTIONS) as repository:
        seen = look_through_the_mount(repository)
    assert set(seen) == {one.hex() for one in (older, newer, copy)}


def test_copies_of_a_snapshot_displace_no_other_by_any_retention_rule(fleet: Fleet) -> None:
    made = {_back_up_changed(fleet, "web", content) for content in (b"1", b"2", b"3")}
    assert fleet.proven("admin") == dict.fromkeys(made, True)
    copies = {_copy(fleet, "thief", one, tags=(tag,)) for one in made for tag in ("a", "b", "c")}
    fleet.run("admin", "forget", "--keep-last", "3")
    assert fleet.proven("admin").keys() == made | copies


def test_a_snapshot_that_another_machine_tagged_counts_once(fleet: Fleet) -> None:
    made = [_back_up_changed(fleet, "web", content) for content in (b"1", b"2")]
    assert fleet.proven("web") == dict.fromkeys(made, True)
    fleet.run("admin", "tag", made[0].hex(), "--add", "kept")
    fleet.run("web", "forget", "--keep-last", "1")
    assert fleet.proven("web") == {made[1]: True}


def test_a_tag_that_another_machine_changes_leaves_the_snapshot_proven(fleet: Fleet) -> None:
    made = id_of(fleet.back_up("web"))
    assert fleet.proven("web") == {made: True}
    fleet.run("admin", "tag", made.hex()[:12], "--add", "kept")
    (after,) = fleet.proven("web").items()
    assert after[1] is True
    assert after[0] != made
    assert fleet.back_up("web").snapshot.parent == after[0]


def test_a_host_that_was_set_up_again_is_accepted_by_a_command(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    before = id_of(fleet.back_up("web"))
    assert fleet.proven("admin") == {before: True}
    after = id_of(fleet.back_up("the new web", host="web"))
    assert fleet.proven("admin") == {before: True, after: False}
    assert "run `casfs key accept` with an identity" in caplog.text
    printed = [json.loads(line) for line in _lines(fleet.run("admin", "key", "accept", "--json"))]
    (accepted,) = [one for one in printed if one["type"] == "writer"]
    assert (accepted["change"], accepted["host"], accepted["is_own"]) == ("accepted", "web", False)
    assert fleet.proven("admin") == {before: True, after: True}


def test_key_list_shows_the_keys_that_sign(fleet: Fleet) -> None:
    fleet.back_up("web")
    fleet.back_up("admin")
    fleet.proven("admin")
    printed = [json.loads(line) for line in _lines(fleet.run("admin", "key", "list", "--json"))]
    listed = {one["host"]: one for one in printed if one["type"] == "writer"}
    assert {host: one["is_own"] for host, one in listed.items()} == {"web": False, "admin": True}
    assert listed["web"]["key"] == _own_key(fleet, "web")
    text = fleet.run("admin", "key", "list").stdout
    assert f"admin (this machine)  {_own_key(fleet, 'admin')}" in text


def _lines(result: Result) -> list[str]:
    return result.stdout.splitlines()


def _own_key(fleet: Fleet, machine: str) -> str:
    config = decode_config((fleet.root / "config").read_bytes(), "the test")
    with fleet.on(machine):
        state = load_state(config)
    assert state is not None
    return state.signing_key().public.hex()


def test_snapshots_of_format_1_stay_proven_after_an_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, monkeypatch, format_=1)
    unsigned = id_of(fleet.back_up("web"))
    fleet.run("web", "upgrade")
    assert fleet.proven("web") == {unsigned: True}
    signed = id_of(fleet.back_up("web"))
    assert fleet.proven("web") == {unsigned: True, signed: True}


def test_an_unsigned_snapshot_in_a_repository_of_format_2_is_unproven(fleet: Fleet) -> None:
    """A former recipient leaves the signature out, as an earlier version of casfs did."""
    signed = id_of(fleet.back_up("web"))
    assert fleet.proven("admin") == {signed: True}
    with fleet.on("thief"), open_for_writing(fleet.root, "backup", OPTIONS) as repository:
        snapshot = repository.snapshots.load(signed)
        assert repository.snapshots._keys is not None
        repository.snapshots._keys.writers = None
        unsigned = repository.snapshots.publish(msgspec.structs.replace(snapshot, tags=("x",)))
    assert fleet.proven("admin") == {signed: True, unsigned: False}


def test_a_repaired_snapshot_is_signed_by_the_machine_that_repaired_it(fleet: Fleet) -> None:
    made = id_of(fleet.back_up("web"))
    with (
        fleet.on("admin"),
        open_for_maintenance(fleet.root, "repair", OPTIONS, LockMode.MAINTENANCE) as repository,
    ):
        snapshot = repository.snapshots.load(made)
        root = msgspec.structs.replace(snapshot.root, mode=0o700)
        repaired = repository.snapshots.replace_root(made, snapshot, root)
        assert repository.snapshots.provenance.is_from_trusted_writer(repaired)
    assert fleet.proven("admin") == {repaired: True}
    assert fleet.proven("web") == {repaired: False}


def test_a_replacement_of_an_unproven_snapshot_is_refused(fleet: Fleet) -> None:
    honest = id_of(fleet.back_up("web"))
    assert fleet.proven("admin") == {honest: True}
    forged = id_of(fleet.back_up("thief", host="web"))
    with pytest.raises(RefusedError, match="unproven"):
        fleet.run("admin", "tag", forged.hex()[:12], "--add", "kept")


def test_a_damaged_file_of_keys_is_named(fleet: Fleet) -> None:
    fleet.back_up("web")
    fleet.proven("web")
    (file,) = (fleet.folder / "web" / "state" / "casfs").glob("writers-*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"{")
    with pytest.raises(TrustError, match="is damaged; restore it, or remove it and run"):
        fleet.proven("web")


def test_the_keys_of_a_new_machine_stay_the_same(fleet: Fleet) -> None:
    fleet.back_up("web")
    before = _own_key(fleet, "web")
    fleet.back_up("web")
    assert _own_key(fleet, "web") == before
    config = decode_config((fleet.root / "config").read_bytes(), "the test")
    with fleet.on("web"):
        assert [one.key for one in TrustedWriters(config).listed()] == [before]


def test_changed_parameters_of_the_chunker_are_refused_on_a_new_machine(fleet: Fleet) -> None:
    """The configuration is not encrypted; a session says with which parameters its writer cut."""
    fleet.back_up("web")
    file = fleet.root / "config"
    config = decode_config(file.read_bytes(), "the test")
    chunker = msgspec.structs.replace(config.chunker, avg_bytes=2 * config.chunker.avg_bytes)
    file.write_bytes(encode_config(msgspec.structs.replace(config, chunker=chunker)))
    with pytest.raises(TrustError, match="the file `config` was changed"):
        fleet.back_up("a new one")
