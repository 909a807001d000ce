"""Encrypted repositories with the real tools: each kind of key opens what was stored for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.places import MakeCasfs
from tests.support.cli import Casfs, Result, program
from tests.support.comparing import rsync_differences
from tests.support.key_tools import (
    PASSPHRASE,
    SSH_PASSPHRASE,
    Keys,
    at_a_terminal,
    gpg_environment,
    made_keys,
)
from tests.support.mounts import mounted
from tests.support.stored_objects import StoredObjects
from tests.support.waiting import wait_until

NOBODY = 65534


@pytest.fixture(scope="module")
def keys() -> Iterator[Keys]:
    with made_keys() as found:
        yield found


@dataclass(frozen=True, slots=True)
class Stored:
    """A source, and an encrypted repository that holds two snapshots of it."""

    casfs: Casfs
    source: Path

    def restores(self, target: Path, *arguments: str | Path, **how: Any) -> None:
        """Require that what is restored is the source."""
        self.casfs.run("restore", "latest", "--target", target, *arguments, **how)
        self.is_whole(target)

    def is_whole(self, target: Path) -> None:
        assert rsync_differences(self.source, target / self.source.name) == ""

    def back_up(self, *arguments: str | Path, **how: Any) -> dict[str, Any]:
        """Back up under a relative path, so that nothing above the source belongs to it."""
        return self.casfs.backup(self.source.name, *arguments, cwd=self.source.parent, **how)


def fill(source: Path) -> Path:
    (source / "documents").mkdir(parents=True)
    (source / "readme.txt").write_bytes(b"read me\n")
    (source / "documents" / "report.txt").write_bytes(b"a report\n" * 1000)
    (source / "documents" / "noise").write_bytes(os.urandom(3_000_000))
    (source / "link").symlink_to("documents/report.txt")
    return source


def reader(casfs: Casfs, folder: Path) -> Casfs:
    """Return the command for another person, who has a home of her own."""
    home = folder / "home of a reader"
    home.mkdir(exist_ok=True)
    return casfs.with_home(home)


@pytest.fixture(scope="module")
def mixed(keys: Keys, tmp_path_factory: pytest.TempPathFactory, make_casfs: MakeCasfs) -> Stored:
    """A repository for all kinds of recipients at once, written by who has none of their keys."""
    folder = tmp_path_factory.mktemp("mixed")
    home = folder / "home"
    home.mkdir()
    casfs = make_casfs(folder, home)
    source = fill(folder / "source")
    (folder / "recipients").write_text(f"# ours\n{keys.ssh_public}{keys.locked_ssh_public}")
    casfs.run(
        *("init", "--recipient", keys.age_public, "--recipient", keys.gpg),
        *("--recipients-file", folder / "recipients"),
        *("--passphrase", "--passphrase-file", keys.passphrase),
        env={"GNUPGHOME": str(keys.gpg_home)},
    )
    writer = Stored(casfs, source)
    assert [writer.back_up()["unchanged"] for _ in range(2)] == [0, 3]
    return Stored(reader(casfs, folder), source)


class TestEveryKeyType:
    """Each of them opens the one repository that was stored for all."""

    def test_an_age_identity_restores(self, mixed: Stored, keys: Keys, tmp_path: Path) -> None:
        mixed.restores(tmp_path / "target", "--identity", keys.age)

    def test_an_ssh_key_restores(self, mixed: Stored, keys: Keys, tmp_path: Path) -> None:
        mixed.restores(tmp_path / "target", "--identity", keys.ssh)

    def test_an_ssh_key_with_a_passphrase_restores_at_a_terminal(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        arguments = ("restore", "latest", "--target", tmp_path / "target")
        shown = at_a_terminal(
            mixed.casfs, *arguments, "--identity", keys.locked_ssh, answers=[SSH_PASSPHRASE]
        )
        mixed.is_whole(tmp_path / "target")
        assert str(keys.locked_ssh) in shown.complaint
        assert SSH_PASSPHRASE not in shown.complaint
        sentence = mixed.casfs.refuses("ls", "latest", "--identity", keys.locked_ssh)
        assert "needs a passphrase, and there is no terminal" in sentence

    def test_a_gpg_key_restores_through_the_agent(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        mixed.restores(tmp_path / "target", env={"GNUPGHOME": str(keys.gpg_home)})

    def test_a_passphrase_from_a_file_restores(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        mixed.restores(tmp_path / "target", "--passphrase-file", keys.passphrase)

    def test_a_passphrase_from_a_descriptor_restores(self, mixed: Stored, tmp_path: Path) -> None:
        mixed.restores(tmp_path / "target", "--passphrase-fd", "0", stdin=PASSPHRASE.encode())

    def test_a_passphrase_from_a_command_restores(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        command = f"cat '{keys.passphrase}'"
        mixed.restores(tmp_path / "target", "--passphrase-command", command)

    def test_a_passphrase_from_the_terminal_restores(self, mixed: Stored, tmp_path: Path) -> None:
        arguments = ("restore", "latest", "--target", tmp_path / "target")
        shown = at_a_terminal(mixed.casfs, *arguments, answers=[PASSPHRASE])
        mixed.is_whole(tmp_path / "target")
        assert PASSPHRASE not in shown.complaint

    def test_keys_are_accepted_from_the_environment(self, mixed: Stored, keys: Keys) -> None:
        for env in (
            {"CASFS_IDENTITY": f"{keys.stranger}:{keys.age}"},
            {"CASFS_PASSPHRASE_FILE": str(keys.passphrase)},
            {"CASFS_PASSPHRASE_COMMAND": f"cat {keys.passphrase}"},
        ):
            assert "readme.txt" in mixed.casfs.run("ls", "-R", "latest", env=env).text


class TestPlainTools:
    """What wrapped the keys of a session can unwrap them without casfs."""

    def sessions(self, stored: Stored, folder: Path) -> list[Path]:
        found = sorted((StoredObjects(stored.casfs).files(folder) / "sessions").iterdir())
        assert len(found) == 3
        return found

    @staticmethod
    def holds_the_session(name: str, text: bytes) -> None:
        document = json.loads(text)
        assert document["casfs"] == "session 1"
        assert document["id"] == name
        assert len(document["secret"]) == 64

    def test_age_opens_every_session_with_an_identity_and_with_an_ssh_key(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        for session in self.sessions(mixed, tmp_path):
            (file,) = session.glob("*.age")
            for identity in (keys.age, keys.ssh):
                done = subprocess.run(
                    ["age", "--decrypt", "-i", identity, file], capture_output=True, check=True
                )
                self.holds_the_session(session.name, done.stdout)
            refused = subprocess.run(
                ["age", "--decrypt", "-i", keys.stranger, file], capture_output=True, check=False
            )
            assert refused.returncode != 0 and refused.stdout == b""

    def test_gpg_opens_every_session(self, mixed: Stored, keys: Keys, tmp_path: Path) -> None:
        for session in self.sessions(mixed, tmp_path):
            (file,) = session.glob("*.gpg")
            done = subprocess.run(
                ["gpg", "--quiet", "--batch", "--decrypt", file],
                env=gpg_environment(keys.gpg_home),
                capture_output=True,
                check=True,
            )
            self.holds_the_session(session.name, done.stdout)


class TestWithoutKey:
    def test_snapshots_without_a_key_prints_only_times_and_sizes(self, mixed: Stored) -> None:
        listed = mixed.casfs.json("snapshots").of_type("snapshot")
        assert len(listed) == 2
        for one in listed:
            assert sorted(one) == ["bytes", "closed", "id", "new_bytes", "time", "type"]
            assert one["bytes"] > 3_000_000
        assert listed[1]["new_bytes"] == 0
        shown = mixed.casfs.run("snapshots")
        assert "the repository is encrypted; give --identity" in shown.complaint
        assert str(mixed.source) not in shown.text

    def test_check_of_the_storage_without_a_key_reads_every_object(self, mixed: Stored) -> None:
        reported = mixed.casfs.json("check", "--storage").one("summary")
        assert (reported["ok"], reported["damage"]) == (True, 0)
        # A pack of each kind and the delta that names them, snapshots, files of sessions, identities.
        assert reported["objects"] == 3 + 2 + 6 + 2

    @pytest.mark.parametrize(
        "arguments",
        [
            ("ls", "latest"),
            ("find", "readme*"),
            ("diff", "latest", "latest"),
            ("dump", "latest:x"),
            ("restore", "latest", "--target", "target"),
            ("check", "--read-data"),
            ("forget", "--keep-last", "1"),
            ("prune",),
            ("repair", "index"),
            ("repair", "snapshots"),
            ("tag", "latest", "--add", "x"),
            ("changed", "latest"),
            ("log", "latest:x"),
            ("stats",),
            ("snapshots", "--tag", "x"),
            ("key", "rewrap"),
        ],
        ids=" ".join,
    )
    def test_every_other_command_without_a_key_reports_what_is_missing(
        self, mixed: Stored, arguments: tuple[str, ...]
    ) -> None:
        printed = mixed.casfs.run(*arguments, expect=1)
        assert printed.out == b""
        assert len(printed.complaints) == 1
        assert "give --identity FILE, or a passphrase" in printed.complaint

    @pytest.mark.fuse
    def test_mount_without_a_key_reports_what_is_missing_and_mounts_nothing(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        (tmp_path / "at").mkdir()
        sentence = mixed.casfs.refuses("mount", tmp_path / "at")
        assert "give --identity FILE" in sentence
        printed = mixed.casfs.run("mount", tmp_path / "at", "--identity", keys.stranger, expect=1)
        assert "none of the given identities decrypts this" in printed.complaints[-1]


class TestWrongKey:
    def test_a_wrong_passphrase_is_reported(self, mixed: Stored) -> None:
        how = ("--passphrase-fd", "0")
        for wrong in (b"wrong\n", PASSPHRASE.upper().encode(), b" " + PASSPHRASE.encode()):
            printed = mixed.casfs.run("ls", "latest", *how, stdin=wrong, expect=1)
            assert printed.complaints == ["casfs: the passphrase is wrong"]

    def test_an_unusable_passphrase_is_a_usage_error(self, mixed: Stored) -> None:
        for wrong, word in ((b"", "empty"), (b"\n", "empty"), (b"\xff\xfe", "not UTF-8")):
            printed = mixed.casfs.run("ls", "latest", "--passphrase-fd", "0", stdin=wrong, expect=2)
            assert word in printed.complaint
        printed = mixed.casfs.run(
            *("ls", "latest", "--passphrase-fd", "0", "--passphrase-command", "true"), expect=2
        )
        assert "give one of --passphrase-file" in printed.complaint

    def test_a_failing_source_of_a_passphrase_is_reported(
        self, mixed: Stored, tmp_path: Path
    ) -> None:
        for arguments, word in (
            (("--passphrase-file", tmp_path / "none"), "No such file"),
            (("--passphrase-fd", "77"), "Bad file descriptor"),
            (("--passphrase-command", "false"), "failed with exit code 1"),
            (("--passphrase-command", "no-such-program-here"), "cannot be run"),
            (("--passphrase-command", ""), "cannot be run"),
            (("--passphrase-command", "unclosed '"), "cannot be run"),
        ):
            printed = mixed.casfs.run("ls", "latest", *arguments, expect=1)
            assert word in printed.complaint and len(printed.complaints) == 1, printed

    def test_a_foreign_identity_opens_nothing(self, mixed: Stored, keys: Keys) -> None:
        sentence = mixed.casfs.refuses("ls", "latest", "--identity", keys.stranger)
        assert "none of the given identities decrypts this" in sentence

    def test_a_recipient_in_place_of_an_identity_is_reported(
        self, mixed: Stored, tmp_path: Path, keys: Keys
    ) -> None:
        file = tmp_path / "public"
        file.write_text(keys.age_public)
        sentence = mixed.casfs.refuses("ls", "latest", "--identity", file)
        assert "line 1: not an age identity" in sentence

    def test_missing_gpg_disables_only_gpg_keys(
        self, mixed: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        env = {"GNUPGHOME": str(keys.gpg_home), "PATH": str(tmp_path)}
        printed = mixed.casfs.run("ls", "latest", env=env, expect=1)
        assert "give --identity" in printed.complaint
        mixed.casfs.run("ls", "latest", "--identity", keys.age, env=env)
        # A backup wraps its session to every recipient, so it needs the tools of all of them.
        objects = StoredObjects(mixed.casfs)
        before = objects.below("snapshots")
        assert len(before) == 2
        printed = mixed.casfs.run("backup", mixed.source, env=env, expect=1)
        assert "gpg is not installed" in printed.complaint
        assert objects.below("snapshots") == before


@pytest.fixture
def stored(casfs: Casfs, keys: Keys, tmp_path: Path) -> Stored:
    """A repository for one age key, and the host that writes to it."""
    casfs.run("init", "--recipient", keys.age_public)
    source = fill(tmp_path / "source")
    stored = Stored(casfs, source)
    stored.back_up()
    return stored


def listed(casfs: Casfs, *arguments: str | Path) -> list[str]:
    return [one["id"] for one in casfs.json("snapshots", *arguments).of_type("snapshot")]


class TestCommandsWithKey:
    """What works in any repository works in an encrypted one, for who has the key."""

    def test_commands_that_list_and_search_work_with_a_key(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs, source = stored.casfs, stored.source
        key = ("--identity", keys.age)
        (source / "readme.txt").write_bytes(b"read me again\n")
        stored.back_up("--tag", "second")
        first, second = listed(casfs, *key)
        inside = source.name
        assert f"{inside}/link" in casfs.run("ls", "-R", "latest", *key).text
        assert f"{inside}/readme.txt" in casfs.run("find", "readme*", *key).text
        assert "readme.txt" in casfs.run("diff", first, second, *key).text
        dumped = casfs.run("dump", f"latest:{inside}/readme.txt", *key)
        assert dumped.out == b"read me again\n"
        assert second[:12] in casfs.run("log", f"latest:{inside}/readme.txt", *key).text
        assert casfs.json("changed", "latest", *key).of_type("file") == []
        assert casfs.json("stats", *key).one("stats")["snapshots"] == 2
        assert listed(casfs, *key, "--tag", "second") == [second]
        stored.restores(tmp_path / "target", *key)

    def test_commands_that_maintain_work_with_a_key(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs, source = stored.casfs, stored.source
        key = ("--identity", keys.age)
        (source / "documents" / "noise").unlink()
        (source / "other").write_bytes(os.urandom(200_000))
        stored.back_up()
        assert casfs.json("check", *key).one("summary")["ok"]
        assert casfs.json("check", "--read-data", *key).one("summary")["packs_read"] == 4
        old = listed(casfs, *key)
        new = casfs.json("tag", "latest", "--add", "kept", *key).one("snapshot")
        assert new["replaces"] == old[1]
        casfs.run("forget", "--keep-tag", "kept", *key)
        assert listed(casfs, *key) == [new["id"]]
        pruned = casfs.json("prune", *key).one("prune")
        assert pruned["freed_bytes"] > 2_900_000
        casfs.run("repair", "index", *key)
        assert casfs.json("repair", "snapshots", *key).of_type("repaired") == []
        assert casfs.json("check", "--read-data", *key).one("summary")["ok"]
        assert casfs.json("check", "--storage").one("summary")["ok"]
        stored.restores(tmp_path / "target", *key)
        assert (
            "is missing: it was removed"
            not in casfs.run("backup", source.name, cwd=source.parent).complaint
        )

    @pytest.mark.fuse
    def test_a_mount_with_a_key_shows_new_snapshots(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        her = reader(stored.casfs, tmp_path)
        with mounted(her, "--identity", keys.age, at=tmp_path / "at") as at:
            latest = at / "snapshots" / "latest"
            stored.is_whole(latest)
            (stored.source / "more").write_bytes(b"more")
            stored.back_up()
            inside = stored.source.name
            wait_until(lambda: (latest / inside / "more").exists(), "the snapshot is shown")
            stored.is_whole(latest)

    def test_commands_that_check_and_repair_work_with_a_key(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs, key = stored.casfs, ("--identity", keys.age)
        objects = StoredObjects(casfs)
        (pack,) = objects.data_packs()
        objects.flip(pack.name, pack.size // 2)
        checked = casfs.json("check", "--read-data", *key, expect=5)
        (lost,) = checked.of_type("damage")[-1:]
        assert lost["path"] == f"{stored.source.name}/documents/noise"
        assert lost["ranges"]
        casfs.run("restore", "latest", "--target", tmp_path / "target", *key, expect=5)
        restored = tmp_path / "target" / stored.source.name
        assert (restored / "readme.txt").read_bytes() == b"read me\n"
        assert not (restored / "documents" / "noise").exists()
        casfs.run("repair", "snapshots", "--read-data", *key)
        (repaired,) = listed(casfs, *key)
        casfs.run("restore", repaired, "--target", tmp_path / "again", *key)
        kept = (tmp_path / "again" / stored.source.name / "documents" / "noise").read_bytes()
        true = (stored.source / "documents" / "noise").read_bytes()
        (begin, end), *_ = lost["ranges"]
        assert kept[:begin] == true[:begin] and kept[end:] == true[end:]

    def test_a_backup_with_an_identity_uses_the_parent_snapshot(
        self, stored: Stored, keys: Keys
    ) -> None:
        again = stored.back_up("--identity", keys.age)
        assert again["unchanged"] == 3
        assert again["parent"] == listed(stored.casfs)[0]


class TestWriteOnlyHost:
    def test_a_write_only_host_reads_no_unchanged_file_and_stores_nothing(
        self, stored: Stored
    ) -> None:
        packs = StoredObjects(stored.casfs).packs()
        again = stored.back_up()
        assert (again["files"], again["unchanged"], again["new_blobs"]) == (3, 3, 0)
        assert StoredObjects(stored.casfs).packs() == packs

    def test_a_write_only_host_stores_changed_and_copied_data_once(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        noise = (stored.source / "documents" / "noise").read_bytes()
        (stored.source / "copy").write_bytes(noise)
        again = stored.back_up()
        assert again["unchanged"] == 3
        assert again["new_bytes"] < 100_000
        stored.restores(tmp_path / "target", "--identity", keys.age)

    def test_a_write_only_host_without_its_cache_stores_everything_again_correctly(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        shutil.rmtree(stored.casfs.home / ".cache" / "casfs")
        again = stored.back_up()
        assert again["unchanged"] == 0
        stored.restores(tmp_path / "target", "--identity", keys.age)
        assert stored.back_up()["unchanged"] == 3

    def test_a_write_only_host_without_its_state_is_unproven_until_it_accepts_with_an_identity(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs, key = stored.casfs, ("--identity", keys.age)
        shutil.rmtree(casfs.home / ".local" / "state" / "casfs")
        printed = casfs.run("backup", stored.source.name, cwd=stored.source.parent)
        assert (
            "backups deduplicate with nothing in it and are reported as unproven"
            in printed.complaint
        )
        her = Stored(reader(casfs, tmp_path), stored.source)
        her.restores(tmp_path / "target", *key)
        assert "is unproven" in her.casfs.run("ls", "latest", *key).complaint
        casfs.run("key", "accept", *key)
        assert (
            "unproven"
            not in casfs.run("backup", stored.source.name, cwd=stored.source.parent).complaint
        )
        her.restores(tmp_path / "again", *key)
        assert "unproven" not in her.casfs.run("ls", "latest", *key).complaint
        assert casfs.json("check", "--read-data", *key).one("summary")["ok"]

    def test_a_write_only_host_without_cache_and_state_backs_up_correctly(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        (stored.source / "more").write_bytes(b"more")
        fresh = Stored(reader(stored.casfs, tmp_path), stored.source)
        fresh.back_up()
        fresh.restores(tmp_path / "target", "--identity", keys.age)

    def test_a_write_only_host_refuses_recipients_other_than_those_of_its_file(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        file = tmp_path / "recipients"
        file.write_text(keys.age_public + "\n")
        stored.back_up("--recipients-file", file)
        file.write_text(f"{keys.stranger_public}\n")
        sentence = stored.casfs.refuses("backup", stored.source, "--recipients-file", file)
        assert "recipients differ from the file" in sentence

    def test_a_write_only_host_may_run_as_a_user_with_only_the_recipients(
        self, keys: Keys, superuser: None
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="cn"))
        try:
            folder.chmod(0o755)
            as_nobody: tuple[str, ...] = (
                "setpriv",
                f"--reuid={NOBODY}",
                f"--regid={NOBODY}",
                "--clear-groups",
            )
            probe = subprocess.run([*as_nobody, *program(), "version"], capture_output=True)
            if probe.returncode:  # the interpreter lies where only root may look
                read = "+dac_read_search"
                as_nobody += (f"--inh-caps={read}", f"--ambient-caps={read}")
            home, source = folder / "home", fill(folder / "source")
            home.mkdir()
            os.chown(home, NOBODY, NOBODY)
            recipients = folder / "recipients"
            recipients.write_text(keys.age_public + "\n")
            mine = Casfs(folder / "repository", folder)
            mine.run("init", "--recipients-file", recipients)
            assert mine.repository is not None
            for path in (mine.repository, *mine.repository.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            theirs = Stored(Casfs(mine.repository, home), source)
            how = ("--recipients-file", recipients)
            for unchanged in (0, 3):
                reported = theirs.back_up(*how, prefix=as_nobody)
                assert reported["unchanged"] == unchanged
            theirs.casfs.run("ls", "latest", expect=1, prefix=as_nobody)
            owners = {path.stat().st_uid for path in mine.repository.rglob("*")}
            assert owners == {NOBODY}
            # The repository is that user's now, so root is asked whether to trust it.
            key = ("--identity", keys.age)
            mine.refuses("ls", "latest", *key, mentions=["--allow-foreign-repository"])
            stored = Stored(mine, source)
            stored.restores(folder / "target", "--allow-foreign-repository", *key)
        finally:
            shutil.rmtree(folder)


class TestTwoHosts:
    def test_two_hosts_with_the_identity_share_stored_data(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        second = reader(stored.casfs, tmp_path)
        key = ("--identity", keys.age)
        reported = Stored(second, stored.source).back_up(*key, "--host", "second")
        assert reported["new_bytes"] < 100_000
        assert "unproven" not in second.run("ls", "latest", *key).complaint
        Stored(second, stored.source).restores(tmp_path / "target", *key)
        # The first finds what the second stored, since both write in one domain.
        (stored.source / "more").write_bytes(os.urandom(500_000))
        Stored(second, stored.source).back_up(*key, "--host", "second")
        assert stored.back_up(*key)["new_bytes"] < 100_000

    def test_two_write_only_hosts_store_separately_and_a_prune_repacks_both_domains(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs, source = stored.casfs, stored.source
        key = ("--identity", keys.age)
        second = reader(casfs, tmp_path)
        reported = Stored(second, source).back_up("--host", "second")
        assert reported["new_bytes"] > 3_000_000
        # Half of the data of each host is removed, so that a prune repacks the rest.
        (source / "documents" / "noise").unlink()
        for host in (casfs, second):
            Stored(host, source).back_up("--host", "short")
        casfs.run("forget", "--host", "short", "--keep-last", "2", *key)
        everything = casfs.json("snapshots", *key).of_type("snapshot")
        for one in everything:
            if one["host"] != "short":
                casfs.run("forget", one["id"], *key)
        pruned = casfs.json("prune", *key).one("prune")
        assert pruned["repacked_packs"] >= 2
        for number, name in enumerate(listed(casfs, *key)):
            target = tmp_path / f"target {number}"
            casfs.run("restore", name, "--target", target, *key)
            stored.is_whole(target)
        assert casfs.json("check", "--read-data", *key).one("summary")["ok"]
        # Each finds its own blobs again where they are now.
        for host in (casfs, second):
            shutil.rmtree(host.home / ".cache" / "casfs")
            assert Stored(host, source).back_up(*key)["new_bytes"] < 100_000


class TestRecipientChanges:
    def key_list(self, casfs: Casfs) -> list[str]:
        return [one["recipient"] for one in casfs.json("key", "list").of_type("recipient")]

    def test_an_added_key_opens_new_snapshots_and_all_after_a_rewrap(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs = stored.casfs
        theirs = ("--identity", keys.stranger)
        casfs.run("key", "add", "--recipient", keys.stranger_public)
        assert self.key_list(casfs) == [keys.age_public, keys.stranger_public]
        her = reader(casfs, tmp_path)
        printed = her.run("ls", "latest", *theirs, expect=1)
        assert len(printed.complaints) >= 1
        assert "none of the given identities" in her.run("check", *theirs, expect=1).complaint
        (stored.source / "more").write_bytes(b"more")
        stored.back_up()
        assert listed(her, *theirs) == listed(her, "--identity", keys.age)[1:]
        printed = casfs.run("key", "rewrap", "--identity", keys.age)
        assert "3 sessions" in printed.text
        assert listed(her, *theirs) == listed(her, "--identity", keys.age)
        Stored(her, stored.source).restores(tmp_path / "target", *theirs)

    def test_a_removed_key_opens_no_new_snapshots_and_none_after_a_rewrap(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs = stored.casfs
        mine, theirs = ("--identity", keys.age), ("--identity", keys.stranger)
        casfs.run("key", "add", "--recipient", keys.stranger_public)
        casfs.run("key", "remove", keys.age_public[:20])
        assert self.key_list(casfs) == [keys.stranger_public]
        stored.back_up()
        her = reader(casfs, tmp_path)
        assert len(listed(her, *mine)) == 1
        assert len(listed(her, *theirs)) == 1
        casfs.run("key", "rewrap", *mine, *theirs)
        her.run("ls", "latest", *mine, expect=1)
        Stored(her, stored.source).restores(tmp_path / "target", *theirs)
        assert casfs.json("check", "--storage").one("summary")["ok"]

    def test_a_removal_replaces_the_secret_of_every_machine_that_stays(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        casfs = stored.casfs
        casfs.run("key", "add", "--recipient", keys.stranger_public)
        her = reader(casfs, tmp_path)
        mine = ("--identity", keys.age)
        hers = Stored(her, stored.source)
        hers.back_up("--host", "hers", *mine)
        printed = casfs.run("key", "remove", keys.stranger_public)
        assert "replaced the repository's secret (number 1)" in printed.text
        assert "this machine" in casfs.run("key", "list").text
        (stored.source / "more").write_bytes(b"more")
        stored.back_up()
        refused = her.run("backup", stored.source, "--host", "hers", *mine, expect=1)
        assert "run `casfs key accept`" in refused.complaint
        assert "accepted secret 1" in her.run("key", "accept", *mine).text
        hers.back_up("--host", "hers", *mine)
        snapshots = her.json("snapshots", *mine).of_type("snapshot")
        assert [one["unproven"] for one in snapshots] == [False] * 4
        her.run("check", "--read-data", *mine)
        hers.restores(tmp_path / "target", *mine)

    def test_the_last_recipient_cannot_be_removed(self, stored: Stored, keys: Keys) -> None:
        printed = stored.casfs.run("key", "remove", keys.age_public, expect=2)
        assert "the last recipient cannot be removed" in printed.complaint
        stored.casfs.run("key", "remove", "age1nobody", expect=2)
        stored.casfs.run("key", "add", expect=2)
        assert self.key_list(stored.casfs) == [keys.age_public]

    def test_an_added_gpg_key_opens_everything_after_a_rewrap(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        env = {"GNUPGHOME": str(keys.gpg_home)}
        stored.casfs.run("key", "add", "--recipient", "ann@example.org", env=env)
        assert self.key_list(stored.casfs) == [keys.age_public, keys.gpg]
        stored.casfs.run("key", "rewrap", "--identity", keys.age)
        her = Stored(reader(stored.casfs, tmp_path), stored.source)
        her.restores(tmp_path / "target", env=env)

    def test_a_machine_that_knows_other_recipients_cannot_change_keys(
        self, stored: Stored, keys: Keys, tmp_path: Path
    ) -> None:
        other = reader(stored.casfs, tmp_path)
        other.run("key", "add", "--recipient", keys.stranger_public)
        for arguments in (
            ("backup", stored.source),
            ("key", "add", "--recipient", keys.ssh_public),
            ("key", "remove", keys.age_public),
            ("key", "rewrap", "--identity", keys.age),
        ):
            printed = stored.casfs.run(*arguments, expect=1)
            assert "differ from those that this machine trusts" in printed.complaint
        stored.casfs.run("key", "accept")
        stored.back_up()

    def test_key_commands_refuse_an_unencrypted_repository(self, repository: Casfs) -> None:
        for arguments in (("list",), ("rewrap",), ("add", "--recipient", "age1x")):
            printed = repository.run("key", *arguments, expect=None)
            assert printed.exit in (1, 2) and len(printed.complaints[-1].split()) > 3


class TestPassphraseChanges:
    def test_a_passphrase_is_asked_for_twice_at_a_terminal_and_can_be_changed(
        self, casfs: Casfs, source: Path, tmp_path: Path
    ) -> None:
        at_a_terminal(casfs, "init", "--passphrase", answers=["one", "other"], expect=2)
        assert casfs.repository is None or not casfs.repository.exists()
        casfs.refuses("snapshots", mentions=["no repository"])
        at_a_terminal(casfs, "init", "--passphrase", answers=[PASSPHRASE, PASSPHRASE])
        stored = Stored(casfs, source)
        stored.back_up()
        at_a_terminal(casfs, "ls", "latest", answers=["wrong"] * 3, expect=1)
        at_a_terminal(casfs, "key", "passwd", answers=[PASSPHRASE, "new one", "new one"])
        at_a_terminal(casfs, "ls", "latest", answers=[PASSPHRASE] * 3, expect=1)
        (tmp_path / "new").write_text("new one")
        stored.restores(tmp_path / "target", "--passphrase-file", tmp_path / "new")

    def test_a_passphrase_can_be_changed_without_a_terminal(
        self, casfs: Casfs, source: Path, keys: Keys, tmp_path: Path
    ) -> None:
        old, new = ("--passphrase-file", keys.passphrase), tmp_path / "new"
        new.write_text("new")
        casfs.run("init", "--passphrase", *old)
        casfs.backup(source)
        casfs.run("key", "passwd", "--passphrase-file", new, "--new-passphrase-file", new, expect=1)
        casfs.run("key", "passwd", *old, "--new-passphrase-file", new)
        casfs.run("ls", "latest", *old, expect=1)
        casfs.run("ls", "latest", "--passphrase-file", new)

    def test_a_passphrase_cannot_be_set_without_a_terminal_or_source(self, casfs: Casfs) -> None:
        printed = casfs.run("init", "--passphrase", expect=2)
        assert "no terminal" in printed.complaint
        assert casfs.repository is None or not casfs.repository.exists()
        casfs.refuses("snapshots", mentions=["no repository"])


class TestSecrets:
    def test_secrets_are_in_no_argument_no_output_and_no_file(
        self, casfs: Casfs, keys: Keys, tmp_path: Path, source: Path
    ) -> None:
        trace = tmp_path / "trace"
        env = {"GNUPGHOME": str(keys.gpg_home), "TMPDIR": str(tmp_path / "tmp")}
        (tmp_path / "tmp").mkdir()
        passphrase = ("--passphrase", "--passphrase-file", keys.passphrase)
        printed: list[Result] = []
        for number, arguments in enumerate(
            (
                ("init", "--recipient", keys.age_public, "--recipient", keys.gpg, *passphrase),
                ("backup", source),
                ("ls", "latest"),
                ("ls", "latest", "--passphrase-command", f"cat {keys.passphrase}"),
                ("key", "rewrap", "--identity", keys.age, "--identity", keys.ssh),
            )
        ):
            traced = ("strace", "-f", "-s", "10000", "-e", "trace=execve")
            prefix = (*traced, "-o", f"{trace}.{number}")
            printed.append(casfs.run(*arguments, env=env, prefix=prefix))
        executed = b"".join(path.read_bytes() for path in tmp_path.glob("trace.*"))
        assert b'"gpg"' in executed and b"--passphrase-file" in executed
        stored = StoredObjects(casfs).files(tmp_path / "stored")
        session = b"".join(path.read_bytes() for path in stored.rglob("*") if path.is_file())
        kept = b"".join(path.read_bytes() for path in casfs.home.rglob("*") if path.is_file())
        spoken = b"".join(one.out + one.err for one in printed)
        for secret in keys.secrets():
            for place in (executed, session, kept, spoken):
                assert secret not in place
        assert b"AGE-SECRET-KEY-" not in executed + session + kept + spoken
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_secrets_are_in_no_file_that_other_users_can_read(self, stored: Stored) -> None:
        for folder in (
            stored.casfs.home / ".local" / "state" / "casfs",
            stored.casfs.home / ".cache" / "casfs",
        ):
            files = [path for path in folder.rglob("*") if path.is_file()]
            assert files
            for path in files:
                assert path.stat().st_mode & 0o077 == 0, path
