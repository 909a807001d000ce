"""A hostile storage: every object is changed in every way, and each command reports it or does no harm.

No wrong data is ever restored or shown, no command ends in a traceback, and the change is reported by
the commands that are required to here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from blake3 import blake3
from msgspec.structs import replace

from casfs.crypto.recipients import (
    Recipient,
    RecipientKind,
    RecipientList,
    read_recipients,
    write_recipients,
)
from casfs.format.config import encode_config
from casfs.format.pack import PACK_PREFIXES
from casfs.repository.place import read_config
from casfs.storage.local import LocalStorage
from casfs.store.pending_removal import RemovalNotice, publish_notice
from tests.support.encryption import OTHER, OTHER_PUBLIC
from tests.support.observation import LOST, Files
from tests.support.process_runner import Stage, come_back, kept_as_it_is
from tests.support.stores import pack_ref
from tests.support.tampering import (
    CHANGES,
    PASSPHRASE,
    RENAMED,
    CommandResult,
    Hostile,
    make_hostile,
    parts_of,
    tamper,
)

PARTS = (
    "the configuration",
    "the list of recipients",
    "the first session",
    "the last session",
    "the identity of the passphrase",
    "the header of a pack",
    "the records of a pack",
    "the directory of a pack",
    "the trailer of a pack",
    "the header of a snapshot",
    "the envelope of a snapshot",
    "the payload of a snapshot",
)
OWN, FOREIGN = list(CHANGES)[-2:]
PLACE_IN_FILE = ("the records", "the directory", "the trailer", "the envelope", "the payload")


def cases() -> Iterator[tuple[str, str]]:
    for part in PARTS:
        for what in CHANGES:
            if what in (OWN, FOREIGN, "cut") and part.startswith(PLACE_IN_FILE):
                continue  # the whole file is changed, which its header stands for
            if what == OWN and part in PARTS[:2] + PARTS[4:5]:
                continue  # there is only one of the kind
            yield part, what
            if part not in PARTS[:2] and what not in (OWN, FOREIGN):
                yield part, what + RENAMED


@pytest.fixture(scope="module")
def intact(stage: Stage) -> Iterator[tuple[Hostile, Hostile]]:
    """Two repositories for the same recipients; they are copied for every change."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        found = [make_hostile(stage, Path(folder) / name / "it") for name in ("one", "other")]
        yield found[0], found[1]


@pytest.fixture
def hostile(intact: tuple[Hostile, Hostile]) -> Iterator[Hostile]:
    """The first of them, which comes back to what it was: who writes to it knows its place."""
    first = intact[0]
    known = dict(first.published)
    with kept_as_it_is(first.folder) as copy:
        yield first
        come_back(copy, first.folder)
    first.published = known


def other_bytes(hostile: Hostile, foreign: Hostile, part: str, what: str) -> bytes:
    """Return the replacement of an object."""
    where = parts_of(hostile)[part].path
    if what.removesuffix(RENAMED) == FOREIGN:
        return parts_of(foreign)[part].path.read_bytes()
    folder = where.relative_to(hostile.root).parts[0]
    if folder in ("config", "recipients"):
        return b""
    others = [path for path in hostile.objects(folder) if path != where]
    return others[0].read_bytes() if others else b""


def must_show_nothing_wrong(hostile: Hostile, seen: dict[str, Files]) -> None:
    """Require that every visible entry was published, or is reported as lost."""
    for name, files in seen.items():
        true = hostile.published.get(name)
        assert true is not None, "a snapshot is shown that no host published"
        for path, digest in files.items():
            assert digest in (true.get(path), LOST), path


def must_restore_nothing_wrong(hostile: Hostile) -> CommandResult:
    """Restore the latest snapshot there is; what has come then is what was published."""
    target = hostile.folder / "target"
    printed = hostile.run(
        "restore", "latest", "--target", target, *hostile.identity(), home="fresh"
    )
    inside = target / str(hostile.source).lstrip("/")
    restored = [path for path in inside.rglob("*") if path.is_file()]
    for path in restored:
        name = str(hostile.source / path.relative_to(inside)).lstrip("/")
        digest = blake3(path.read_bytes()).hexdigest()
        assert digest in {files.get(name) for files in hostile.published.values()}, path
    if printed.exit == 0:
        assert len(restored) == 4, "a restore that said nothing left something out"
    return printed


@pytest.mark.slow
@pytest.mark.parametrize(("part", "what"), list(cases()))
def test_no_change_of_an_object_goes_unnoticed_or_does_harm(
    hostile: Hostile, intact: tuple[Hostile, Hostile], part: str, what: str
) -> None:
    target = parts_of(hostile)[part]
    before = {path for path in hostile.root.rglob("*") if path.is_file()}
    tamper(target, what, other_bytes(hostile, intact[1], part, what))
    assert len({path for path in hostile.root.rglob("*") if path.is_file()}) == len(before)
    restored = must_restore_nothing_wrong(hostile)
    for seen in (hostile.look("fresh") or {}).values():
        must_show_nothing_wrong(hostile, seen)
    checked = hostile.run("check", "--read-data", *hostile.identity(), home="knowing")
    storage = hostile.run("check", "--storage", home="nobody")
    stored = hostile.back_up()
    reported = {"restore": restored.exit, "check": checked.exit, "storage": storage.exit}
    reported["backup"] = stored.exit
    if part in ("the configuration", "the identity of the passphrase"):
        how = ("--passphrase-fd", "0")
        opened = hostile.run("snapshots", *how, home="fresh", stdin=PASSPHRASE)
        reported["passphrase"] = opened.exit or bool(opened.err)
    found = {verb for verb, code in reported.items() if code}
    if not what.endswith(RENAMED) and (part, what) != ("the list of recipients", FOREIGN):
        assert storage.exit in (1, 5), reported
    if part == "the configuration":
        assert found == set(reported), reported
    elif part == "the list of recipients":
        assert stored.exit in (1, 5), reported
        assert found <= {"backup", "storage"}, reported
    elif part == "the identity of the passphrase":
        assert found - {"storage"} == {"passphrase"}, reported
    elif part == "the first session" and what.endswith(RENAMED):
        # It looks as if it was stored for others. Nothing but the domain is in it, as in all sessions.
        assert found == set(), reported
    else:
        assert checked.exit == 5 or (checked.exit == 1 and part == "the last session"), reported
    if "of a pack" in part or "of a snapshot" in part:
        assert stored.exit == 0, reported
        assert hostile.look("fresh") is not None, "one bad object stops every reader"
    if stored.exit == 0:
        assert len(hostile.published) == 3


class TestDeletedObject:
    """A command that needs a deleted object reports the loss."""

    def test_a_deleted_configuration_is_reported_by_every_command(self, hostile: Hostile) -> None:
        (hostile.root / "config").unlink()
        for arguments in (("snapshots",), ("check", "--storage"), ("backup", hostile.source)):
            assert hostile.run(*arguments, home="writer").exit == 1
        must_restore_nothing_wrong(hostile)

    def test_a_deleted_recipient_list_stops_a_backup_and_no_reader(self, hostile: Hostile) -> None:
        (hostile.root / "recipients").unlink()
        assert hostile.back_up().exit == 5
        assert len(hostile.published) == 2
        assert hostile.run("check", "--storage", home="nobody").exit == 5
        assert must_restore_nothing_wrong(hostile).exit == 0

    def test_a_deleted_pack_is_reported_and_the_next_backup_stores_it_again(
        self, hostile: Hostile
    ) -> None:
        for pack in hostile.objects("packs"):
            pack.unlink()
        assert hostile.run("check", *hostile.identity(), home="knowing").exit == 5
        assert must_restore_nothing_wrong(hostile).exit == 5
        assert hostile.back_up().exit == 0
        assert must_restore_nothing_wrong(hostile).exit == 0

    def test_a_deleted_session_is_reported_with_and_without_a_key(self, hostile: Hostile) -> None:
        hostile.objects("sessions")[-1].unlink()
        assert hostile.run("check", *hostile.identity(), home="knowing").exit == 5
        assert hostile.run("check", "--storage", home="nobody").exit == 5
        must_restore_nothing_wrong(hostile)
        # The host's own index still has the blobs that no key opens now.
        hostile.run("check", "--read-data", *hostile.identity(), home="writer")
        assert hostile.back_up().exit == 0
        assert must_restore_nothing_wrong(hostile).exit == 0

    def test_a_deleted_last_snapshot_is_reported_to_the_host_that_published_it(
        self, hostile: Hostile
    ) -> None:
        hostile.objects("snapshots")[-1].unlink()
        must_restore_nothing_wrong(hostile)
        assert "is missing: it was removed" in hostile.back_up().err
        assert must_restore_nothing_wrong(hostile).exit == 0

    def test_a_deleted_passphrase_identity_is_reported_to_the_user_of_the_passphrase(
        self, hostile: Hostile
    ) -> None:
        hostile.objects("identities")[0].unlink()
        how = ("--passphrase-fd", "0")
        printed = hostile.run("snapshots", *how, home="fresh", stdin=PASSPHRASE)
        assert (printed.exit, "has no passphrase" in printed.err) == (1, True)


class TestReplacedRepository:
    def test_a_rollback_of_the_repository_is_reported_to_its_writer(self, hostile: Hostile) -> None:
        with kept_as_it_is(hostile.root) as earlier:
            (hostile.source / "a" / "3").write_bytes(b"later")
            assert hostile.back_up().exit == 0
            come_back(earlier, hostile.root)
        printed = hostile.back_up()
        assert "rolled back to an earlier state" in printed.err
        assert must_restore_nothing_wrong(hostile).exit == 0
        assert hostile.run("check", *hostile.identity(), home="fresh").exit == 0

    def test_a_repository_replaced_by_another_of_the_same_recipients_stores_nothing(
        self, hostile: Hostile, intact: tuple[Hostile, Hostile]
    ) -> None:
        shutil.rmtree(hostile.root)
        shutil.copytree(intact[1].root, hostile.root)
        before = hostile.objects("")
        printed = hostile.back_up()
        assert (printed.exit, "casfs key accept" in printed.err) == (1, True)
        assert hostile.objects("") == before
        reported = hostile.run("snapshots", *hostile.identity(), home="writer")
        assert "and is" in reported.err

    def test_a_repository_replaced_by_an_unencrypted_one_stores_nothing(
        self, hostile: Hostile
    ) -> None:
        shutil.rmtree(hostile.root)
        assert hostile.run("init", home="attacker").exit == 0
        before = hostile.objects("")
        printed = hostile.back_up()
        assert (printed.exit, "an unencrypted one now" in printed.err) == (1, True)
        assert hostile.objects("") == before

    def test_a_repository_with_another_domain_in_its_configuration_stores_nothing(
        self, hostile: Hostile
    ) -> None:
        config = read_config(hostile.root)
        assert config.encryption is not None
        encryption = msgspec.structs.replace(config.encryption, domain="0" * 64)
        forged = msgspec.structs.replace(config, encryption=encryption)
        (hostile.root / "config").write_bytes(encode_config(forged))
        printed = hostile.back_up()
        assert (printed.exit, "casfs key accept" in printed.err) == (1, True)
        assert len(hostile.published) == 2


class TestForgery:
    """What the storage can make of what is public: it needs no secret to encrypt to the recipients."""

    def test_a_forged_recipient_list_stops_the_next_backup(self, hostile: Hostile) -> None:
        storage = LocalStorage(hostile.root)
        write_recipients(storage, RecipientList.of([*read_recipients(storage).recipients, OTHER]))
        before = hostile.objects("")
        printed = hostile.back_up()
        assert (printed.exit, "differ from those that this machine trusts" in printed.err) == (
            1,
            True,
        )
        assert hostile.objects("") == before
        for more in (("add", "--recipient", OTHER_PUBLIC), ("rewrap", *hostile.identity())):
            assert hostile.run("key", *more, home="writer").exit == 1
        assert must_restore_nothing_wrong(hostile).exit == 0

    def test_a_forged_snapshot_is_reported_as_unproven_wherever_it_is_used(
        self, hostile: Hostile
    ) -> None:
        lure = hostile.folder / "lure"
        lure.mkdir()
        (lure / "payroll").write_bytes(b"what the attacker wants to be restored")
        printed = hostile.run("backup", "--no-sync", lure, home="attacker")
        assert printed.exit == 0
        (forged,) = set(os.listdir(hostile.root / "snapshots")) - set(hostile.published)
        listed = hostile.run("snapshots", *hostile.identity(), home="fresh")
        assert f"{forged[:12]} is unproven" in listed.err
        for true in hostile.published:
            assert true[:12] not in listed.err
        asked = hostile.run("snapshots", "--json", *hostile.identity(), home="fresh")
        reported = {one["id"]: one["unproven"] for one in map(json.loads, asked.out.splitlines())}
        assert reported == {forged: True, **dict.fromkeys(hostile.published, False)}
        target = hostile.folder / "lured"
        for arguments in (("ls", "latest"), ("restore", "latest", "--target", target)):
            printed = hostile.run(*arguments, *hostile.identity(), home="fresh")
            assert f"snapshot {forged[:12]} is unproven" in printed.err
        # No backup takes it for what is unchanged, and no true snapshot has anything of it.
        assert hostile.back_up(*map(str, hostile.identity())).exit == 0

    def test_a_replayed_repository_shows_nothing_of_the_other_one(
        self, hostile: Hostile, intact: tuple[Hostile, Hostile]
    ) -> None:
        for folder in (*PACK_PREFIXES, "snapshots", "sessions"):
            shutil.copytree(intact[1].root / folder, hostile.root / folder, dirs_exist_ok=True)
        for seen in (hostile.look("fresh") or {}).values():
            must_show_nothing_wrong(hostile, seen)
        assert must_restore_nothing_wrong(hostile).exit == 0
        checked = hostile.run("check", *hostile.identity(), home="fresh")
        assert checked.exit == 5
        assert "belongs to another repository" in checked.out

    def test_foreign_encrypted_objects_stop_neither_reading_nor_storing(
        self, hostile: Hostile
    ) -> None:
        with kept_as_it_is(hostile.root) as theirs:
            write_recipients(LocalStorage(theirs), RecipientList.of([OTHER]))
            (hostile.folder / "lure").mkdir()
            (hostile.folder / "lure" / "file").write_bytes(b"for the stranger")
            attacker = ("backup", "--no-sync", hostile.folder / "lure", "--repo", theirs)
            assert hostile.run(*attacker, home="attacker").exit == 0
            for folder in (*PACK_PREFIXES, "snapshots", "sessions"):
                shutil.copytree(theirs / folder, hostile.root / folder, dirs_exist_ok=True)
        assert len(hostile.objects("snapshots")) == 3
        listed = hostile.run("snapshots", *hostile.identity(), home="fresh")
        assert (listed.exit, "is omitted: none of the given identities" in listed.err) == (0, True)
        assert must_restore_nothing_wrong(hostile).exit == 0
        seen = hostile.look("fresh")
        assert seen is not None and set(seen["read"]) == set(hostile.published)
        assert hostile.back_up().exit == 0
        # Objects that cannot be opened cannot be verified, and may be needed.
        for verb in ("check", "prune"):
            printed = hostile.run(verb, *hostile.identity(), home="fresh")
            assert (printed.exit, "none of the given identities" in printed.err) == (1, True), (
                printed
            )
        assert hostile.run("check", "--storage", home="nobody").exit == 0
        assert must_restore_nothing_wrong(hostile).exit == 0

    def test_a_forged_removal_notice_for_every_pack_removes_nothing_needed(
        self, hostile: Hostile
    ) -> None:
        packs = map(pack_ref, hostile.objects("packs"))
        storage = LocalStorage(hostile.root, writer="attacker")
        publish_notice(storage, replace(RemovalNotice.of(0, packs), writers=()))
        assert must_restore_nothing_wrong(hostile).exit == 0
        printed = hostile.run("prune", *hostile.identity(), home="fresh")
        assert printed.exit == 0
        assert must_restore_nothing_wrong(hostile).exit == 0
        for seen in (hostile.look("fresh") or {}).values():
            must_show_nothing_wrong(hostile, seen)
            assert set(seen) == set(hostile.published)

    def test_a_forged_recipient_cannot_write_control_characters_to_a_terminal(
        self, hostile: Hostile
    ) -> None:
        storage = LocalStorage(hostile.root)
        forged = Recipient(RecipientKind.AGE, "age1\x1b[2J\nssh nobody")
        write_recipients(storage, RecipientList.of([*read_recipients(storage).recipients, forged]))
        printed = hostile.run("key", "list", home="nobody")
        assert printed.exit == 5
        assert "\x1b" not in printed.out + printed.err
