"""The command upgrade, with the repository in a folder, in object storage and over SSH."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from shlex import quote

import pytest

from casfs.format.versions import OLDEST_FORMAT
from casfs.repository.creation import create_repository
from tests.support.cli import Casfs, finish, interrupt
from tests.support.comparing import tree_differences
from tests.support.remote import RemoteCasfs, on_s3, over_ssh
from tests.support.servers import S3Server, sshd
from tests.support.stores import pack_paths, pack_ref

_serials = count()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "below" / "deep").mkdir(parents=True)
    (folder / "file").write_bytes(b"content" * 1000)
    (folder / "below" / "deep" / "file").write_bytes(b"more content" * 1000)
    return folder


@pytest.fixture
def old(casfs: Casfs, source: Path) -> Casfs:
    """The command with a repository of format 1, in which there is a backup."""
    assert casfs.repository is not None
    create_repository(casfs.repository, format_=OLDEST_FORMAT)
    casfs.run("backup", ".", cwd=source)
    return casfs


def first_line(casfs: Casfs) -> str:
    assert casfs.repository is not None
    return (casfs.repository / "config").read_text().splitlines()[0]


def restores(casfs: Casfs, source: Path, target: Path) -> None:
    casfs.run("restore", "latest", "--target", target)
    assert tree_differences(source, target) == []
    casfs.run("check", "--read-data")


def test_a_new_repository_has_the_newest_format_and_needs_no_upgrade(repository: Casfs) -> None:
    assert first_line(repository) == "casfs repository, format 2"
    assert "has format 2 already; nothing was changed" in repository.run("upgrade").text


def test_commands_leave_a_repository_of_format_1_in_its_format(
    old: Casfs, source: Path, tmp_path: Path
) -> None:
    assert old.repository is not None
    (source / "file").write_bytes(b"changed" * 1000)
    old.run("backup", ".", cwd=source)
    old.run("forget", "--keep-last", "1", "--prune")
    old.run("repair", "index")
    restores(old, source, tmp_path / "back")
    assert first_line(old) == "casfs repository, format 1"
    assert not any(pack_ref(path).is_meta for path in pack_paths(old.repository))
    assert not {"meta", "deltas"} & {path.name for path in old.repository.iterdir()}


def test_an_upgrade_keeps_every_backup_and_the_next_one_uses_the_new_format(
    old: Casfs, source: Path, tmp_path: Path
) -> None:
    assert old.repository is not None
    upgraded = old.run("upgrade", "--json").one("upgrade")
    assert (upgraded["old_format"], upgraded["new_format"]) == (1, 2)
    assert first_line(old) == "casfs repository, format 2"
    restores(old, source, tmp_path / "back")
    (source / "file").write_bytes(b"changed" * 1000)
    old.run("backup", ".", cwd=source)
    assert {pack_ref(path).is_meta for path in pack_paths(old.repository)} == {False, True}
    restores(old, source, tmp_path / "again")
    old.run("recompress", "--compression", "5")
    restores(old, source, tmp_path / "once more")


def test_an_upgrade_beside_a_backup_of_this_machine_exits_with_6(old: Casfs) -> None:
    process = old.start("backup", "--stdin-from-command", "--", "sleep", "1000")
    try:
        while not old.run("locks", "--json").objects:
            assert process.poll() is None
        refused = old.run("upgrade", expect=6)
        assert "the repository is in use: backup" in refused.complaint
    finally:
        interrupt(process)
        finish(process)
    assert first_line(old) == "casfs repository, format 1"


def test_an_upgrade_without_a_repository_exits_with_1(casfs: Casfs) -> None:
    assert "there is no repository" in casfs.run("upgrade", expect=1).complaint


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_a_remote_repository_is_upgraded_beside_a_host_that_began_before(
    kind: str, request: pytest.FixtureRequest, old: Casfs, source: Path, tmp_path: Path
) -> None:
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        remote = on_s3(server, "casfs", f"upgrade-{next(_serials)}", old.home)
        _upgrade_remote(remote, old, source, tmp_path)
    else:
        with sshd() as ssh_server:
            remote = over_ssh(ssh_server, tmp_path / "far", old.home)
            _upgrade_remote(remote, old, source, tmp_path)


def _upgrade_remote(remote: RemoteCasfs, old: Casfs, source: Path, tmp_path: Path) -> None:
    old.run("mirror", remote.url, env=remote.variables)
    other = remote.host(tmp_path / "other home")
    (source / "new").write_bytes(b"written meanwhile" * 100)
    waiting = tmp_path / "go on"
    # The backup reads its last file only when the upgrade is done.
    script = f"while [ ! -e {quote(str(waiting))} ]; do sleep 0.05; done; echo done"
    process = other.start(
        "backup", "--stdin-name", "last", "--stdin-from-command", "--", "sh", "-c", script
    )
    try:
        while not other.run("locks", "--json").objects:
            assert process.poll() is None
        upgraded = remote.run("upgrade", "--json").one("upgrade")
        assert (upgraded["old_format"], upgraded["new_format"]) == (1, 2)
        waiting.touch()
    finally:
        ended = finish(process)
    assert ended.exit == 0, ended
    assert "has format 2 already" in other.run("upgrade").text
    assert other.run("dump", "latest:last").out == b"done\n"
    remote.run("backup", ".", cwd=source)
    assert len(remote.run("snapshots", "--json").of_type("snapshot")) == 3
    restores(remote, source, tmp_path / "back")


def test_an_upgrade_with_a_credential_that_may_not_overwrite_is_one_sentence(
    s3_server: S3Server, old: Casfs, source: Path
) -> None:
    s3_server.make_bucket("no-overwrite")
    remote = on_s3(s3_server, "no-overwrite", "r", old.home)
    old.run("mirror", remote.url, env=remote.variables)
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:PutObject",
                "Resource": "arn:aws:s3:::no-overwrite/r/config",
            }
        ],
    }
    s3_server.put_policy("no-overwrite", json.dumps(policy).encode())
    denied = remote.run("upgrade", expect=1)
    assert len(denied.complaints) == 1
    assert "nothing was changed: run `casfs upgrade` with credentials" in denied.complaint
    remote.run("backup", ".", cwd=source)
