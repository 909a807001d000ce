"""A removal of a recipient replaces the repository's secret, and takes nothing from those who stay."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.crypto.keyring import Keyring
from casfs.crypto.opening import open_key_manager
from casfs.crypto.recipients import RecipientList, decode_recipients
from casfs.crypto.session_files import write_session
from casfs.crypto.trust_root import TrustRoot
from casfs.crypto.trust_state import WriterState, load_state, pinned_generations
from casfs.digest import SnapshotId, keyed_digest, short_id
from casfs.errors import (
    KeyMissingError,
    LockedError,
    RefusedError,
    StorageError,
    TrustError,
    UsageError,
)
from casfs.format.chunker import make_chunker
from casfs.format.config import RepositoryConfig, decode_config, with_format
from casfs.format.generation import FOLDER, Generation, encode_snapshot_list, new_generation
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.format.signature import SigningKey
from casfs.format.snapshot import read_envelope
from casfs.maintenance.check import Checker
from casfs.maintenance.mirror import Mirror
from casfs.maintenance.storage_check import check_storage
from casfs.monitor import RecordingMonitor
from casfs.repository.key_change import open_for_key_change
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.place import LocalPlace
from casfs.repository.recipient_removal import remove_recipients
from casfs.storage.local import LocalStorage
from casfs.trees.content import EXTENT
from tests.support.encryption import (
    OTHER,
    OTHER_PUBLIC,
    OTHER_SECRET,
    PUBLIC,
    RECIPIENT,
    identities,
    unlock,
    unlock_other,
)
from tests.support.fleet import OPTIONS, WRITE_ONLY, Fleet, id_of

THIEF = OpenOptions(unlock=unlock_other, sync=False)
"""How the former recipient opens the repository."""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(tmp_path, monkeypatch, recipients=(RECIPIENT, OTHER))


def remove(fleet: Fleet, machine: str = "admin", *arguments: str) -> list[dict[str, Any]]:
    """Remove the other recipient; return what was printed."""
    result = fleet.run(machine, "key", "remove", OTHER_PUBLIC, "--no-sync", "--json", *arguments)
    return [json.loads(line) for line in result.stdout.splitlines()]


def accept(fleet: Fleet, machine: str, with_identity: bool = True) -> str:
    return fleet.run(machine, "key", "accept", with_identity=with_identity).stdout


def config_of(fleet: Fleet) -> RepositoryConfig:
    return decode_config((fleet.root / "config").read_bytes(), "the test")


def state_of(fleet: Fleet, machine: str) -> WriterState:
    with fleet.on(machine):
        state = load_state(config_of(fleet))
    assert state is not None
    return state


def domain_of(fleet: Fleet, machine: str) -> DedupDomain:
    return state_of(fleet, machine).own_domain()


def first_domain(fleet: Fleet) -> DedupDomain:
    """Return the domain that the former recipient knows."""
    config = config_of(fleet)
    assert config.encryption is not None
    keyring = Keyring(LocalStorage(fleet.root), config, identities(OTHER_SECRET))
    return keyring.own_domain()


def listed(fleet: Fleet) -> RecipientList:
    return decode_recipients((fleet.root / "recipients").read_bytes())


def session_of(fleet: Fleet, snapshot: SnapshotId) -> WriteSession:
    envelope = read_envelope(snapshot, (fleet.root / "snapshots" / snapshot.hex()).read_bytes())
    assert envelope is not None
    keyring = Keyring(LocalStorage(fleet.root), config_of(fleet), identities())
    return keyring.session(envelope.session)


def content_of(fleet: Fleet, snapshot: SnapshotId, options: OpenOptions = OPTIONS) -> bytes:
    """Return the content of the only file, as a machine that never saw the repository reads it."""
    path = os.fsencode(fleet.source / "file")
    with fleet.on("fresh"), open_for_reading(fleet.root, options) as repository:
        _, _, _, node = repository.snapshots.resolve_path(f"{snapshot.hex()}:{path.decode()}")
        return b"".join(repository.store.read(one) for one in repository.content(node).blobs())


@contextmanager
def recipients_put_back(fleet: Fleet, data: bytes) -> Iterator[None]:
    """Show another list of recipients, as a hostile storage can."""
    path = fleet.root / "recipients"
    now = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(now)


def publish_as_thief(fleet: Fleet, before: bytes, host: str) -> SnapshotId:
    """Publish a snapshot of the former recipient, for whom the storage shows the list as it was."""
    with recipients_put_back(fleet, before):
        return id_of(fleet.back_up("thief", host, THIEF))


def show(fleet: Fleet, records: list[Generation]) -> bytes:
    """Return the list of recipients with other records of replaced domains."""
    return RecipientList.of(listed(fleet).recipients, records).data


def test_existing_snapshots_stay_readable_and_proven(fleet: Fleet) -> None:
    made = {id_of(fleet.back_up(machine)) for machine in ("admin", "web")}
    remove(fleet)
    for machine in ("admin", "web", "a new one"):
        assert fleet.proven(machine) == dict.fromkeys(made, True)
    for snapshot in made:
        assert content_of(fleet, snapshot) == b"content"


def test_a_removal_prints_the_new_secret_and_the_machine_that_replaced_it(fleet: Fleet) -> None:
    fleet.back_up("admin")
    removed, replaced = remove(fleet)
    assert (removed["type"], removed["recipient"]) == ("recipient", OTHER_PUBLIC)
    assert (replaced["type"], replaced["change"]) == ("secret", "replaced")
    (record,) = listed(fleet).generations
    key = state_of(fleet, "admin").signing_key().public.hex()
    assert (replaced["generation"], replaced["id"]) == (1, record.domain)
    assert (replaced["key"], replaced["hosts"], replaced["is_own"]) == (key, ["admin"], True)
    assert f"this machine ({key})" in fleet.run("admin", "key", "list").stdout


def test_what_is_stored_after_the_removal_has_digests_that_the_former_recipient_cannot_compute(
    fleet: Fleet,
) -> None:
    thief = first_domain(fleet)
    before, after = os.urandom(50_000), os.urandom(50_000)
    (fleet.source / "file").write_bytes(before)
    fleet.back_up("admin")
    remove(fleet)
    (fleet.source / "file").write_bytes(after)
    made = id_of(fleet.back_up("admin"))
    with fleet.on("admin"), open_for_reading(fleet.root, OPTIONS) as repository:
        recognizes = [
            repository.store.index.lookup(keyed_digest(content, thief.digest_key)) is not None
            for content in (before, after)
        ]
        own = domain_of(fleet, "admin").digest_key
        assert repository.store.index.lookup(keyed_digest(after, own)) is not None
    assert recognizes == [True, False]
    with pytest.raises(KeyMissingError):
        content_of(fleet, made, THIEF)
    assert content_of(fleet, made) == after


def test_a_former_recipient_cannot_predict_the_cut_points_of_later_content(fleet: Fleet) -> None:
    thief = first_domain(fleet)
    content = os.urandom(12 << 20)
    chunker = make_chunker(config_of(fleet).chunker, thief.chunker_key)
    predicted = [len(chunk) for chunk in chunker.cut(BytesIO(content).readinto)]
    (fleet.source / "file").write_bytes(content)
    assert _cuts(fleet, id_of(fleet.back_up("admin"))) == predicted
    remove(fleet)
    (fleet.source / "file").unlink()
    (fleet.source / "file").write_bytes(content)
    assert _cuts(fleet, id_of(fleet.back_up("admin"))) != predicted


def _cuts(fleet: Fleet, snapshot: SnapshotId) -> list[int]:
    path = str(fleet.source / "file")
    with fleet.on("fresh"), open_for_reading(fleet.root, OPTIONS) as repository:
        _, _, _, node = repository.snapshots.resolve_path(f"{snapshot.hex()}:{path}")
        assert node.levels == 0
        return [length for length, _ in EXTENT.iter_unpack(node.content)]


@pytest.mark.parametrize("host", ["web", "a new one", "thief"])
def test_a_former_recipient_publishes_nothing_that_counts_as_proven(
    fleet: Fleet, host: str
) -> None:
    """Neither in the name of a known host, nor in that of its own, whose key the others trust."""
    before = (fleet.root / "recipients").read_bytes()
    honest = {id_of(fleet.back_up("web")), id_of(fleet.back_up("thief", options=THIEF))}
    assert fleet.proven("admin") == dict.fromkeys(honest, True)
    remove(fleet)
    forged = publish_as_thief(fleet, before, host)
    for machine in ("admin", "web", "a fresh one"):
        assert fleet.proven(machine) == {**dict.fromkeys(honest, True), forged: False}
    accept(fleet, "web")
    assert fleet.proven("web")[forged] is False


def test_unproven_snapshots_of_a_former_recipient_displace_no_other(fleet: Fleet) -> None:
    before = (fleet.root / "recipients").read_bytes()
    honest = id_of(fleet.back_up("web"))
    remove(fleet)
    forged = {publish_as_thief(fleet, before, host) for host in ("web", "a new one")}
    fleet.run("admin", "forget", "--keep-last", "1")
    assert fleet.proven("admin").keys() == {honest, *forged}


def test_another_machine_goes_on_after_it_accepted_the_list(fleet: Fleet) -> None:
    (fleet.source / "large").write_bytes(os.urandom(100_000))
    before = id_of(fleet.back_up("web"))
    remove(fleet)
    (fleet.source / "file").write_bytes(b"changed")
    with pytest.raises(TrustError, match="run `casfs key accept`"):
        fleet.back_up("web")
    printed = accept(fleet, "web")
    assert "accepted secret 1, replaced by a machine that signed no known snapshot" in printed
    result = fleet.back_up("web")
    assert result.snapshot.parent == before
    assert result.snapshot.stats.new_plain_bytes < 50_000
    assert result.snapshot.stats.unchanged == 1
    assert domain_of(fleet, "web") == domain_of(fleet, "admin") != first_domain(fleet)
    assert fleet.proven("admin") == {before: True, id_of(result): True}
    assert content_of(fleet, id_of(result)) == b"changed"


def test_accepting_names_the_hosts_of_the_machine_that_replaced_the_secret(fleet: Fleet) -> None:
    fleet.back_up("admin")
    assert all(fleet.proven("web").values())
    fleet.back_up("web")
    remove(fleet)
    key = state_of(fleet, "admin").signing_key().public.hex()
    assert f"accepted secret 1, replaced by admin ({key})" in accept(fleet, "web")


def test_accepting_a_changed_list_trusts_no_further_key_of_a_known_host(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The recipient that is removed may have published in its name."""
    honest = id_of(fleet.back_up("web"))
    assert fleet.proven("web") == {honest: True}
    forged = id_of(fleet.back_up("thief", "web", THIEF))
    expected = {honest: True, forged: False}
    assert fleet.proven("web") == expected
    new = id_of(fleet.back_up("a new one"))
    remove(fleet)
    caplog.clear()
    assert " of web" not in accept(fleet, "web")
    assert f"snapshot {short_id(forged)} names the host web, but the key" in caplog.text
    assert fleet.proven("web") == {**expected, new: True}
    key = state_of(fleet, "thief").signing_key().public.hex()
    assert f"accepted the signing key {key} of web" in accept(fleet, "web")
    assert fleet.proven("web")[forged]


def test_a_write_only_host_goes_on_after_one_accept_with_an_identity(fleet: Fleet) -> None:
    (fleet.source / "large").write_bytes(os.urandom(100_000))
    accept_as_writer(fleet, "web")
    before = id_of(fleet.back_up("web", options=WRITE_ONLY))
    assert fleet.proven("admin") == {before: True}
    remove(fleet)
    (fleet.source / "file").write_bytes(b"changed")
    with pytest.raises(TrustError, match="run `casfs key accept`"):
        fleet.back_up("web", options=WRITE_ONLY)
    accept(fleet, "web")
    result = fleet.back_up("web", options=WRITE_ONLY)
    for unchanged in (1, 2):
        # What it stored with the secret before is found in its cache of files.
        assert result.snapshot.stats.unchanged == unchanged
        assert result.snapshot.stats.new_plain_bytes < 50_000
        assert session_of(fleet, id_of(result)).domains[0] == domain_of(fleet, "admin")
        result = fleet.back_up("web", options=WRITE_ONLY)
    assert all(fleet.proven("admin").values())
    assert content_of(fleet, id_of(result)) == b"changed"


def accept_as_writer(fleet: Fleet, machine: str) -> None:
    """Give a machine the secret by an identity that it does not keep."""
    accept(fleet, machine)
    assert domain_of(fleet, machine) == first_domain(fleet)


@pytest.mark.parametrize("knew_the_secret", [True, False])
def test_a_write_only_host_that_accepts_without_an_identity_uses_no_secret_of_before(
    fleet: Fleet, knew_the_secret: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (fleet.source / "large").write_bytes(os.urandom(100_000))
    if knew_the_secret:
        accept_as_writer(fleet, "web")
    before = id_of(fleet.back_up("web", options=WRITE_ONLY))
    old = domain_of(fleet, "web")
    remove(fleet)
    accept(fleet, "web", with_identity=False)
    (fleet.source / "file").write_bytes(b"changed")
    result = fleet.back_up("web", options=WRITE_ONLY)
    assert "run `casfs key accept --identity FILE` once on it" in caplog.text
    new = domain_of(fleet, "web")
    assert new not in (old, first_domain(fleet), domain_of(fleet, "admin"))
    assert state_of(fleet, "web").earlier_domains() == [old]
    assert result.snapshot.stats.unchanged == 1
    assert fleet.proven("admin") == {before: knew_the_secret, id_of(result): False}
    assert content_of(fleet, id_of(result)) == b"changed"
    accept(fleet, "web")
    made = id_of(fleet.back_up("web", options=WRITE_ONLY))
    assert fleet.proven("admin")[made]


@pytest.mark.parametrize("format_", [1, 2])
def test_a_backup_that_ends_after_a_removal_on_its_machine_does_not_undo_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: int
) -> None:
    """Else a list of before the removal, put back by the storage, would be the one that it trusts."""
    fleet = Fleet(tmp_path, monkeypatch, format_, recipients=(RECIPIENT, OTHER))
    before = (fleet.root / "recipients").read_bytes()
    fleet.back_up("admin")
    chosen = BackupOptions(paths=(os.fsencode(fleet.source),), host="admin")
    with fleet.on("admin"), open_for_writing(fleet.root, "backup", OPTIONS) as repository:
        remove(fleet)
        removed = state_of(fleet, "admin")
        made = id_of(run_backup(repository, chosen, RecordingMonitor()))
        ended = state_of(fleet, "admin")
        assert (ended.domain, ended.recipients) == (removed.domain, removed.recipients)
        assert (ended.generation, ended.earlier) == (removed.generation, removed.earlier)
        assert ended.last_snapshot == made.hex()
    with recipients_put_back(fleet, before), pytest.raises(TrustError, match="recipients"):
        fleet.back_up("admin")
    made = id_of(fleet.back_up("admin"))
    assert fleet.proven("admin")[made]
    with pytest.raises(KeyMissingError):
        content_of(fleet, made, THIEF)


def test_each_further_removal_replaces_the_secret_again(fleet: Fleet) -> None:
    lists = [(fleet.root / "recipients").read_bytes()]
    made = [id_of(fleet.back_up("admin"))]
    remove(fleet)
    made.append(id_of(fleet.back_up("admin")))
    fleet.run("admin", "key", "add", OTHER_PUBLIC)
    made.append(id_of(fleet.back_up("admin")))
    lists.append((fleet.root / "recipients").read_bytes())
    thief_knows = domain_of(fleet, "admin")
    remove(fleet)
    made.append(id_of(fleet.back_up("admin")))
    assert [one.number for one in listed(fleet).generations] == [1, 2]
    first, second = first_domain(fleet), thief_knows
    assert session_of(fleet, made[-1]).domains == (domain_of(fleet, "admin"), second, first)
    forged = []
    for number, before in enumerate(lists):
        with recipients_put_back(fleet, before):
            forged.append(id_of(fleet.back_up(f"thief {number}", f"host {number}", THIEF)))
    expected = {**dict.fromkeys(made, True), **dict.fromkeys(forged, False)}
    for machine in ("admin", "a fresh one"):
        assert fleet.proven(machine) == expected


def test_a_new_machine_with_an_identity_writes_in_the_newest_domain(fleet: Fleet) -> None:
    before = id_of(fleet.back_up("admin"))
    remove(fleet)
    made = id_of(fleet.back_up("a new one"))
    assert domain_of(fleet, "a new one") == domain_of(fleet, "admin")
    assert fleet.proven("admin") == {before: True, made: True}


def test_a_recipient_that_was_added_after_the_removal_takes_part(fleet: Fleet) -> None:
    fleet.back_up("admin")
    remove(fleet)
    fleet.run("admin", "key", "add", OTHER_PUBLIC)
    (fleet.source / "file").write_bytes(b"for the new recipient")
    made = id_of(fleet.back_up("admin"))
    assert content_of(fleet, made, THIEF) == b"for the new recipient"
    with fleet.on("new"), open_for_reading(fleet.root, THIEF) as repository:
        assert repository.snapshots.provenance.is_from_trusted_writer(made)
    made = id_of(fleet.back_up("new", options=THIEF))
    assert fleet.proven("admin")[made]
    assert domain_of(fleet, "new") == domain_of(fleet, "admin")


class TestHostileStorage:
    def test_an_earlier_list_is_refused_by_what_writes_and_reported_to_what_reads(
        self, fleet: Fleet, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = (fleet.root / "recipients").read_bytes()
        honest = id_of(fleet.back_up("web"))
        remove(fleet)
        assert fleet.proven("reader") == {honest: True}
        forged = publish_as_thief(fleet, before, "a new one")
        with recipients_put_back(fleet, before):
            with pytest.raises(TrustError):
                fleet.back_up("admin")
            with pytest.raises(TrustError, match="lacks a replacement of the repository's secret"):
                fleet.back_up("reader")
            caplog.clear()
            for machine in ("admin", "reader"):
                assert fleet.proven(machine) == {honest: True, forged: False}
            assert caplog.text.count("an earlier list may have been put back") == 2
        assert content_of(fleet, honest) == b"content"

    def test_an_earlier_list_that_its_owner_wants_back_is_accepted(self, fleet: Fleet) -> None:
        before = (fleet.root / "recipients").read_bytes()
        fleet.back_up("admin")
        remove(fleet)
        made = id_of(fleet.back_up("admin"))
        (fleet.root / "recipients").write_bytes(before)
        accept(fleet, "admin")
        assert fleet.proven("admin")[made] is False
        made = id_of(fleet.back_up("admin"))
        assert fleet.proven("admin")[made]
        assert domain_of(fleet, "admin") == first_domain(fleet)
        assert content_of(fleet, made) == b"content"

    def test_a_record_by_the_storage_is_ignored_by_what_reads_and_refused_by_what_writes(
        self, fleet: Fleet, caplog: pytest.LogCaptureFixture
    ) -> None:
        honest = id_of(fleet.back_up("web"))
        forged = show(
            fleet, [_record(fleet, 1, DedupDomain.new(bytes.fromhex(config_of(fleet).id)))]
        )
        with recipients_put_back(fleet, forged):
            assert fleet.proven("reader") == {honest: True}
            assert "no machine that knew it wrote so" in caplog.text
            for machine in ("web", "a fresh one"):
                with pytest.raises(TrustError):
                    fleet.back_up(machine)
            with pytest.raises(TrustError, match="restore the file `recipients` from a copy"):
                accept(fleet, "web")
        with fleet.on("reader"):
            assert pinned_generations(config_of(fleet).id) == ()

    def test_a_former_recipient_cannot_continue_the_list_after_its_removal(
        self, fleet: Fleet
    ) -> None:
        """It does not know the domain that replaced the first one."""
        fleet.back_up("admin")
        remove(fleet)
        real = listed(fleet).generations[0]
        forged = show(fleet, [real, _record(fleet, 2, first_domain(fleet))])
        with recipients_put_back(fleet, forged):
            with pytest.raises(TrustError):
                fleet.back_up("admin")
            with pytest.raises(TrustError, match="restore the file `recipients` from a copy"):
                accept(fleet, "admin")
            assert all(fleet.proven("admin").values())
        made = id_of(fleet.back_up("admin"))
        assert fleet.proven("admin")[made]

    def test_a_former_recipient_cannot_exchange_the_replacement_on_a_machine_that_saw_it(
        self, fleet: Fleet, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = [id_of(fleet.back_up("admin"))]
        remove(fleet)
        made.append(id_of(fleet.back_up("admin")))
        assert all(fleet.proven("reader").values())
        forged = show(fleet, [_record(fleet, 1, first_domain(fleet))])
        with recipients_put_back(fleet, forged):
            for machine in ("admin", "reader"):
                with pytest.raises(TrustError):
                    fleet.back_up(machine)
                assert fleet.proven(machine) == dict.fromkeys(made, True)
            caplog.clear()
            printed = accept(fleet, "admin")
            assert "lacks a replacement of the repository's secret that this machine has" in (
                caplog.text
            )
            assert "replaced by a machine that signed no known snapshot" in printed

    def test_what_others_stored_under_the_name_of_the_list_of_snapshots_is_replaced(
        self, fleet: Fleet
    ) -> None:
        """The name follows from the ids of the snapshots, which everyone who can list them knows."""
        honest = {id_of(fleet.back_up("admin")), id_of(fleet.back_up("web"))}
        digest, data = encode_snapshot_list(honest)
        (fleet.root / FOLDER).mkdir()
        (fleet.root / FOLDER / digest).write_bytes(bytes(len(data)))
        remove(fleet)
        assert listed(fleet).generations[0].snapshots == digest
        for machine in ("admin", "web", "a fresh one"):
            assert fleet.proven(machine) == dict.fromkeys(honest, True)

    def test_an_earlier_state_is_judged_by_the_format_that_the_machine_has_seen(
        self, fleet: Fleet
    ) -> None:
        """In format 1 nothing is signed, and every writer that knew the first secret would be trusted."""
        before = (fleet.root / "recipients").read_bytes()
        honest = id_of(fleet.back_up("web"))
        assert fleet.proven("admin") == {honest: True}
        remove(fleet)
        forged = publish_as_thief(fleet, before, "web")
        data = with_format((fleet.root / "config").read_bytes(), 1)
        storage = LocalStorage(fleet.root)
        with fleet.on("admin"):
            keys = open_key_manager(
                fleet.root, storage, TrustRoot(data, "the test"), unlock, is_past=True
            )
        assert keys is not None and keys.writers is not None
        proven = {one: keys.keyring.proves(session_of(fleet, one), one) for one in (honest, forged)}
        assert proven == {honest: True, forged: False}

    def test_a_missing_list_of_snapshots_leaves_them_readable_and_unproven(
        self, fleet: Fleet, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = id_of(fleet.back_up("admin"))
        remove(fleet)
        (file,) = (fleet.root / FOLDER).iterdir()
        data = file.read_bytes()
        for damaged in (None, data[:-1], b""):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            assert fleet.proven("admin") == {before: False}
            assert "which snapshots existed before the secret was replaced" in caplog.text
            assert content_of(fleet, before) == b"content"
            assert _damage(fleet) == ["snapshot list"]
            assert "snapshot list" in _storage_damage(fleet)
            file.write_bytes(data)
        assert _damage(fleet) == _storage_damage(fleet) == []

    def test_a_missing_list_of_recipients_keeps_nothing_from_being_read(self, fleet: Fleet) -> None:
        made = [id_of(fleet.back_up("admin"))]
        remove(fleet)
        made.append(id_of(fleet.back_up("admin")))
        (fleet.root / "recipients").unlink()
        assert fleet.proven("admin") == dict.fromkeys(made, True)
        assert fleet.proven("a fresh one") == {made[0]: True, made[1]: False}
        assert [content_of(fleet, one) for one in made] == [b"content", b"content"]


def _record(fleet: Fleet, number: int, before: DedupDomain) -> Generation:
    """Return a record that the attacker made, with a session that the recipients decrypt."""
    session = WriteSession.new([DedupDomain.new(before.repository), before])
    write_session(LocalStorage(fleet.root, writer="thief", sync=False), session, [RECIPIENT, OTHER])
    return new_generation(number, before, session, "00" * 32, SigningKey(bytes(32)))


def _damage(fleet: Fleet) -> list[str]:
    with fleet.on("admin"), open_for_reading(fleet.root, OPTIONS) as repository:
        return [one.what for one in Checker(repository, RecordingMonitor()).check().damage]


def _storage_damage(fleet: Fleet) -> list[str]:
    storage = LocalStorage(fleet.root)
    trust = LocalPlace(fleet.root).trust_root(storage)
    return [one.what for one in check_storage(storage, trust, RecordingMonitor()).damage]


class TestRefusal:
    def test_a_machine_without_the_secret_removes_no_recipient(self, fleet: Fleet) -> None:
        before = (fleet.root / "recipients").read_bytes()
        with pytest.raises(RefusedError, match="give --identity FILE or a passphrase"):
            fleet.run("a new one", "key", "remove", OTHER_PUBLIC, with_identity=False)
        assert (fleet.root / "recipients").read_bytes() == before
        fleet.run("a new one", "key", "remove", OTHER_PUBLIC)
        assert [one.value for one in listed(fleet).recipients] == [PUBLIC]

    def test_an_identity_that_does_not_decrypt_the_secret_removes_no_recipient(
        self, fleet: Fleet
    ) -> None:
        remove(fleet)
        before = (fleet.root / "recipients").read_bytes()
        with fleet.on("thief"):
            storage = LocalStorage(fleet.root, writer="test", sync=False)
            trust = LocalPlace(fleet.root).trust_root(storage)
            with pytest.raises(RefusedError, match="the given identities do not decrypt it"):
                remove_recipients(fleet.root, storage, trust, [OTHER], identities(OTHER_SECRET))
        assert (fleet.root / "recipients").read_bytes() == before

    def test_the_last_recipient_stays(self, fleet: Fleet) -> None:
        with pytest.raises(UsageError, match="the last recipient cannot be removed"):
            fleet.run("admin", "key", "remove", PUBLIC, OTHER_PUBLIC)
        assert listed(fleet).generations == ()

    def test_the_machine_that_created_the_repository_needs_no_identity(self, fleet: Fleet) -> None:
        fleet.run("admin", "key", "remove", OTHER_PUBLIC, with_identity=False)
        assert len(listed(fleet).generations) == 1

    def test_a_removal_in_format_1_keeps_the_secret_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fleet = Fleet(tmp_path, monkeypatch, 1, (RECIPIENT, OTHER))
        text = fleet.run("admin", "key", "remove", OTHER_PUBLIC).stdout
        assert "the repository has format 1, whose secret stays" in text
        assert listed(fleet).data.startswith(b"casfs recipients 1\n")
        assert domain_of(fleet, "admin").id.hex() == _configured_domain(fleet)
        fleet.run("admin", "upgrade")
        fleet.run("admin", "key", "add", OTHER_PUBLIC)
        assert len(remove(fleet)) == 2
        assert domain_of(fleet, "admin").id.hex() != _configured_domain(fleet)
        assert fleet.proven("a fresh one") == {}


def _configured_domain(fleet: Fleet) -> str:
    config = config_of(fleet)
    assert config.encryption is not None
    return config.encryption.domain


def test_a_list_from_which_no_recipient_was_removed_has_its_former_bytes(fleet: Fleet) -> None:
    before = listed(fleet)
    fleet.run(
        "admin", "key", "add", "age169cv388tenh49q7hfg5g8jqnrzpr8vftc3k6fzvg6u7hpycnedfsv6jn66"
    )
    after = listed(fleet)
    assert before.data.startswith(b"casfs recipients 1\n")
    assert after.data == RecipientList.of(after.recipients).data
    assert after.data.startswith(b"casfs recipients 1\n")
    assert not (fleet.root / FOLDER).exists()


class TestTwoMachines:
    def test_two_machines_do_not_remove_recipients_at_the_same_time(self, fleet: Fleet) -> None:
        fleet.back_up("web")
        with (
            fleet.on("web"),
            open_for_key_change(LocalPlace(fleet.root), "key remove"),
            pytest.raises(LockedError),
        ):
            remove(fleet)
        remove(fleet)

    def test_the_later_of_two_removals_wins_and_the_other_machine_accepts_it(
        self, fleet: Fleet
    ) -> None:
        """A machine that was suspended within the removal writes over the list of another one."""
        before = [id_of(fleet.back_up(machine)) for machine in ("admin", "web")]
        with fleet.on("web"):
            storage = LocalStorage(fleet.root, writer="test", sync=False)
            trust = LocalPlace(fleet.root).trust_root(storage)
            trust.recipients(storage)
        remove(fleet)
        made = id_of(fleet.back_up("admin"))
        with fleet.on("web"):
            remove_recipients(fleet.root, storage, trust, [RECIPIENT], identities())
        after = id_of(fleet.back_up("web"))
        assert domain_of(fleet, "web") != domain_of(fleet, "admin")
        with pytest.raises(TrustError):
            fleet.back_up("admin")
        accept(fleet, "admin")
        last = id_of(fleet.back_up("admin"))
        assert domain_of(fleet, "web") == domain_of(fleet, "admin")
        expected = {**dict.fromkeys([*before, after, last], True), made: False}
        for machine in ("admin", "web", "a fresh one"):
            assert fleet.proven(machine) == expected
        for snapshot in expected:
            assert content_of(fleet, snapshot) == b"content"


class TestMaintenance:
    def test_a_prune_keeps_what_the_list_of_recipients_names_and_repacks_all_domains(
        self, fleet: Fleet
    ) -> None:
        files = [fleet.source / str(number) for number in range(8)]
        for file in files:
            file.write_bytes(os.urandom(30_000))
        fleet.back_up("admin")
        remove(fleet)
        for file in files[:6]:
            file.write_bytes(os.urandom(30_000))
        fleet.back_up("admin")
        for file in files[6:7]:
            file.write_bytes(os.urandom(30_000))
        kept = id_of(fleet.back_up("admin"))
        fleet.run("admin", "forget", "--keep-last", "1", "--prune")
        assert list(fleet.proven("admin")) == [kept]
        session = listed(fleet).generations[0].session
        assert (fleet.root / "sessions" / session).is_dir()
        assert _damage(fleet) == _storage_damage(fleet) == []
        fleet.run("fresh", "check", "--read-data")
        target = fleet.folder / "target"
        fleet.run("fresh", "restore", "latest", "--target", str(target))
        for file in files:
            restored = target / file.relative_to("/")
            assert restored.read_bytes() == file.read_bytes()

    def test_a_session_that_the_list_of_recipients_names_is_missed_by_a_check(
        self, fleet: Fleet
    ) -> None:
        remove(fleet)
        session = listed(fleet).generations[0].session
        for file in (fleet.root / "sessions" / session).iterdir():
            file.unlink()
        assert "session" in _damage(fleet)
        assert "session" in _storage_damage(fleet)

    def test_a_mirror_has_all_that_proves_its_snapshots(self, fleet: Fleet) -> None:
        made = [id_of(fleet.back_up("admin"))]
        remove(fleet)
        made.append(id_of(fleet.back_up("admin")))
        mirrored = fleet.folder / "mirror"
        mirrored.mkdir()
        destination = LocalStorage(mirrored, writer="test", sync=False)
        Mirror(LocalStorage(fleet.root), destination, RecordingMonitor()).run()
        with fleet.on("a fresh one"), open_for_reading(mirrored, OPTIONS) as repository:
            for one in made:
                assert repository.snapshots.provenance.is_from_trusted_writer(one)

    def test_a_rewrap_lets_a_later_recipient_verify_everything(self, fleet: Fleet) -> None:
        made = [id_of(fleet.back_up("admin"))]
        remove(fleet)
        made.append(id_of(fleet.back_up("admin")))
        fleet.run("admin", "key", "add", OTHER_PUBLIC)
        fleet.run("admin", "key", "rewrap")
        assert fleet.proven("new", THIEF) == dict.fromkeys(made, True)

    def test_a_writer_with_an_identity_can_store_an_earlier_blob_again(self, fleet: Fleet) -> None:
        """Another host may remove the pack of an unchanged file while a backup relies on it."""
        content = os.urandom(30_000)
        (fleet.source / "file").write_bytes(content)
        fleet.back_up("admin")
        old = keyed_digest(content, first_domain(fleet).digest_key)
        remove(fleet)
        with fleet.on("admin"), open_for_writing(fleet.root, "backup", OPTIONS) as repository:
            assert repository.key_manager is not None
            session = repository.key_manager.session()
            assert session.domains[session.domain_of(old, content)] == first_domain(fleet)

    def test_tags_of_an_earlier_snapshot_can_be_changed(self, fleet: Fleet) -> None:
        before = id_of(fleet.back_up("web"))
        remove(fleet)
        fleet.run("admin", "tag", before.hex(), "--add", "kept")
        (after,) = fleet.proven("admin").items()
        assert after[0] != before and after[1]
        assert content_of(fleet, after[0]) == b"content"


def test_a_damaged_record_of_seen_replacements_is_named(fleet: Fleet) -> None:
    fleet.back_up("admin")
    remove(fleet)
    (file,) = (fleet.folder / "admin" / "state" / "casfs").glob("domains-*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    for damaged in (b"{", b'{"repository":"x","generations":[{"number":1}]}'):
        file.write_bytes(damaged)
        with pytest.raises(TrustError, match="is damaged; restore it, or remove it and run"):
            fleet.back_up("admin")


def test_a_machine_that_cannot_remember_a_replacement_still_reads(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = id_of(fleet.back_up("admin"))
    remove(fleet)

    def fail(*_: object) -> None:
        raise StorageError("write", "the state", OSError(28, "no space"))

    monkeypatch.setattr("casfs.crypto.generations.pin_generations", fail)
    assert fleet.proven("a fresh one") == {made: True}
