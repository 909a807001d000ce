"""Repositories on real servers, in S3 and over SFTP, used with the installed command."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.cli import Casfs, program
from tests.support.comparing import tree_differences
from tests.support.encryption import OTHER_PUBLIC, PUBLIC
from tests.support.mounts import mounted
from tests.support.remote import RemoteCasfs, on_s3, over_ssh
from tests.support.servers import (
    S3Server,
    SshServer,
    session_pids,
)
from tests.support.tcp_proxy import tcp_proxy

MIB = 1 << 20

_serials = itertools.count()

pytestmark = pytest.mark.slow


@pytest.fixture
def empty(casfs: Casfs, request: pytest.FixtureRequest, tmp_path: Path) -> RemoteCasfs:
    """The command of a host whose repository is named and not yet made."""
    kind = getattr(request, "param", "s3")
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return on_s3(server, "casfs", f"remote-{next(_serials)}", casfs.home)
    return over_ssh(request.getfixturevalue("ssh_server"), tmp_path / "far", casfs.home)


@pytest.fixture
def remote(empty: RemoteCasfs) -> RemoteCasfs:
    """The command of a host with an empty repository."""
    empty.run("init")
    return empty


everywhere = pytest.mark.parametrize("empty", ["s3", "sftp"], indirect=True)
over_sftp = pytest.mark.parametrize("empty", ["sftp"], indirect=True)


@everywhere
class TestRemoteRepository:
    def test_a_tree_comes_back_as_it_was(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "large").write_bytes(random.Random(1).randbytes(70 * MIB))
        remote.run("backup", ".", cwd=source)
        remote.run("restore", "latest", "--target", tmp_path / "back")
        assert tree_differences(source, tmp_path / "back") == []
        remote.run("check", "--read-data")
        remote.run("check", "--storage")

    def test_a_second_host_sees_what_the_first_stored_and_stores_nothing_twice(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "large").write_bytes(random.Random(1).randbytes(5 * MIB))
        first = remote.run("backup", "--json", ".", cwd=source).one("snapshot")
        assert first["new_bytes"] > 5 * MIB
        other = remote.host(tmp_path / "other home")
        again = other.run("backup", "--json", "--host", "other", ".", cwd=source).one("snapshot")
        assert again["new_bytes"] < 100_000
        third = remote.run("backup", "--json", ".", cwd=source).one("snapshot")
        assert third["new_bytes"] == 0
        counted = remote.run("snapshots", "--json").one("requests")
        assert counted["list"]["requests"] >= 1
        assert counted["read"]["received_bytes"] > 0
        assert "create" not in counted
        shown = remote.run("stats", "--requests").text
        assert re.search(r"^read +[1-9]\d* +0 B +\d", shown, re.MULTILINE), shown
        assert len(remote.run("snapshots", "--json").of_type("snapshot")) == 3
        other.run("restore", "latest", "--target", tmp_path / "back")
        assert tree_differences(source, tmp_path / "back") == []

    def test_a_lost_cache_is_made_again(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        remote.run("backup", ".", cwd=source)
        subprocess.run(["rm", "-r", str(remote.home / ".cache" / "casfs")], check=True)
        again = remote.run("backup", "--json", ".", cwd=source).one("snapshot")
        assert again["new_bytes"] == 0
        remote.run("check", "--read-data")

    def test_the_verbs_that_look_work(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "changing").write_text("one")
        remote.run("backup", ".", cwd=source)
        (source / "changing").write_text("two and more")
        remote.run("backup", "--tag", "second", ".", cwd=source)
        ids = [one["id"] for one in remote.run("snapshots", "--json").of_type("snapshot")]
        assert "changing" in remote.run("ls", "latest").text
        assert "changing" in remote.run("find", "chang*").text
        assert "changing" in remote.run("diff", ids[0], ids[1]).text
        assert len(remote.run("log", "latest:changing", "--json").objects) >= 2
        assert remote.run("dump", "latest:changing").out == b"two and more"
        remote.run("stats")
        remote.run("changed", "latest")
        remote.run("tag", "--add", "kept", ids[0])
        remote.run("forget", ids[1])
        assert len(remote.run("snapshots", "--json").of_type("snapshot")) == 1

    @pytest.mark.fuse
    def test_a_mount_shows_the_tree(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "large").write_bytes(random.Random(1).randbytes(9 * MIB))
        remote.run("backup", ".", cwd=source)
        with mounted(remote, "latest", at=tmp_path / "at") as at:
            assert tree_differences(source, at) == []
        with mounted(remote, at=tmp_path / "whole") as at:
            (name,) = [one for one in os.listdir(at / "ids") if one != "latest"]
            assert tree_differences(source, at / "ids" / name) == []

    @pytest.mark.fuse
    def test_an_encrypted_repository_opens_with_its_passphrase(
        self, empty: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "passphrase").write_text("right")
        (tmp_path / "wrong").write_text("wrong")
        key = ("--passphrase-file", str(tmp_path / "passphrase"))
        empty.run("init", "--passphrase", *key)
        empty.run("backup", *key, ".", cwd=source)
        empty.run("restore", *key, "latest", "--target", tmp_path / "back")
        assert tree_differences(source, tmp_path / "back") == []
        with mounted(empty, "latest", *key, at=tmp_path / "at") as at:
            assert tree_differences(source, at) == []
        wrong = empty.run("ls", "latest", "--passphrase-file", tmp_path / "wrong", expect=1)
        assert "passphrase" in wrong.complaint
        empty.run("check", "--storage")

    def test_unneeded_data_is_marked_by_one_prune_and_removed_by_the_first_after_the_margin(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "large").write_bytes(random.Random(1).randbytes(5 * MIB))
        remote.run("backup", ".", cwd=source)
        (source / "large").write_bytes(random.Random(2).randbytes(5 * MIB))
        remote.run("backup", ".", cwd=source)
        marked = remote.run("forget", "--keep-last", "1", "--prune", "--json").one("prune")
        assert (marked["removed_packs"], marked["freed_bytes"]) == (0, 0)
        assert marked["marked_packs"] >= 1 and marked["waiting_packs"] == marked["marked_packs"]
        assert marked["marked_bytes"] > 5 * MIB and marked["removable_from"] is not None
        other = remote.host(tmp_path / "other home")
        assert "removed by the first prune after" in other.run("prune").text
        would = other.run("prune", "--margin", "0s", "--dry-run", "--json").one("prune")
        assert would["removed_packs"] == marked["marked_packs"]
        done = other.run("prune", "--margin", "0s", "--json").one("prune")
        assert done["removed_packs"] == marked["marked_packs"]
        assert done["removed_bytes"] > 5 * MIB and done["waiting_packs"] == 0
        remote.run("check", "--read-data")
        remote.run("restore", "latest", "--target", tmp_path / "back")
        assert tree_differences(source, tmp_path / "back") == []

    def test_snapshots_and_the_index_are_repaired(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        remote.run("backup", ".", cwd=source)
        before = remote.run("snapshots", "--json").of_type("snapshot")
        assert remote.run("repair", "snapshots", "--json").one("summary")["repaired"] == 0
        remote.run("repair", "index")
        assert remote.run("snapshots", "--json").of_type("snapshot") == before
        remote.run("check", "--read-data")

    def test_the_keys_of_a_remote_repository_are_changed(
        self, empty: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "one").write_text("one\n")
        (tmp_path / "two").write_text("two\n")
        one, two = (("--passphrase-file", str(tmp_path / name)) for name in ("one", "two"))
        empty.run("init", "--recipient", PUBLIC, "--passphrase", *one)
        empty.run("backup", *one, ".", cwd=source)
        empty.run("key", "passwd", *one, "--new-passphrase-file", tmp_path / "two")
        assert "passphrase" in empty.run("ls", "latest", *one, expect=1).complaint
        empty.run("key", "add", OTHER_PUBLIC)
        empty.run("key", "remove", PUBLIC)
        empty.run("key", "rewrap", *two)
        kinds = [one["kind"] for one in empty.run("key", "list", "--json").of_type("recipient")]
        assert sorted(kinds) == ["age", "passphrase"]
        empty.run("restore", *two, "latest", "--target", tmp_path / "back")
        assert tree_differences(source, tmp_path / "back") == []
        empty.run("check", *two, "--read-data")
        assert empty.run("locks", "--json").of_type("lock") == []

    def test_the_processes_of_all_hosts_are_listed(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        assert remote.run("locks", "--json").of_type("lock") == []
        running = ("backup", "--stdin-from-command", "--", "sleep", "1000")
        process = subprocess.Popen(
            [*program(), *running], env=remote.environment(), stderr=subprocess.DEVNULL
        )
        try:
            other = remote.host(tmp_path / "other home")
            while not (found := other.run("locks", "--json").of_type("lock")):
                assert process.poll() is None
            assert [(one["command"], one["pid"]) for one in found] == [("backup", process.pid)]
            assert found[0]["seen"] is not None and not found[0]["stale"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
        assert remote.run("locks", "--json").of_type("lock") == []

    def test_a_repository_is_not_made_twice(self, remote: RemoteCasfs) -> None:
        result = remote.run("init", expect=1)
        assert "already" in result.complaint

    def test_a_place_without_a_repository_is_named(self, empty: RemoteCasfs) -> None:
        result = empty.run("snapshots", expect=1)
        assert f"there is no repository in {empty.url}" in result.complaint
        assert "casfs init" in result.complaint

    def test_two_hosts_back_up_at_the_same_time(
        self, remote: RemoteCasfs, source: Path, tmp_path: Path
    ) -> None:
        for i in range(30):
            (source / f"f{i}").write_bytes(random.Random(i).randbytes(300_000))
        hosts = [remote.host(tmp_path / f"home {i}") for i in range(3)]
        running = [
            subprocess.Popen(
                [*program(), "backup", "--host", f"h{i}", "."],
                cwd=source,
                env=host.environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for i, host in enumerate(hosts)
        ]
        for process in running:
            _, complaints = process.communicate()
            assert (process.returncode, complaints) == (0, b"")
        assert len(remote.run("snapshots", "--json").of_type("snapshot")) == 3
        remote.run("check", "--read-data")


_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
"""Runs a command and prints the most memory that it had, in bytes."""


def test_memory_stays_below_300_mb_with_packs_on_their_way(
    s3_server: S3Server, casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    for number in range(4):
        (source / f"large {number}").write_bytes(os.urandom(70 * MIB))
    remote = on_s3(s3_server, "casfs", f"memory-{next(_serials)}", casfs.home)
    remote.run("init")
    restore = ("restore", "latest", "--target", str(tmp_path / "back"))
    for arguments in (("backup", "."), restore, ("check", "--read-data")):
        # A process inherits the peak of the one that forks it, so a small one starts the command.
        measured = subprocess.run(
            [sys.executable, "-c", _MEASURE, *program(), *arguments],
            cwd=source,
            env=remote.environment(),
            stdout=subprocess.PIPE,
            check=True,
        )
        assert int(measured.stdout.splitlines()[-1]) < 300_000_000, arguments


@over_sftp
def test_a_local_prune_waits_for_the_margin_where_hosts_write_over_sftp(
    remote: RemoteCasfs, source: Path, tmp_path: Path
) -> None:
    (source / "large").write_bytes(random.Random(1).randbytes(5 * MIB))
    remote.run("backup", ".", cwd=source)
    (source / "large").write_bytes(random.Random(2).randbytes(5 * MIB))
    remote.run("backup", ".", cwd=source)
    local = Casfs(tmp_path / "far", remote.home)
    marked = local.run("forget", "--keep-last", "1", "--prune", "--json").one("prune")
    assert marked["removed_packs"] == 0 and marked["removable_from"] is not None
    local.run("prune", "--margin", "0s")
    local.run("check", "--read-data")
    remote.run("check", "--read-data")


def test_a_local_repository_can_be_used_over_sftp_from_then_on(
    repository: Casfs, ssh_server: SshServer, source: Path, tmp_path: Path
) -> None:
    assert repository.repository is not None
    repository.run("backup", ".", cwd=source)
    repository.run("prune")
    far = over_ssh(ssh_server, repository.repository, tmp_path / "other")
    far.home.mkdir()
    far.run("restore", "latest", "--target", tmp_path / "back")
    assert tree_differences(source, tmp_path / "back") == []
    repository.run("prune")  # reading leaves no mark
    far.run("backup", "--host", "far", ".", cwd=source)
    repository.run("forget", "--host", "far", "--keep-last", "1")
    assert repository.run("prune", "--json").one("prune")["removed_packs"] == 0
    assert len(repository.run("snapshots", "--json").of_type("snapshot")) == 2


@over_sftp
def test_a_backup_outlives_connections_that_are_cut(
    remote: RemoteCasfs, ssh_server: SshServer, source: Path, tmp_path: Path
) -> None:
    for i in range(3):
        (source / f"large{i}").write_bytes(random.Random(i).randbytes(66 * MIB))
    process = subprocess.Popen(
        [*program(), "backup", "."],
        cwd=source,
        env=remote.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    uploads = tmp_path / "far" / "uploads"
    cuts = 0
    while process.poll() is None:
        pids = session_pids(ssh_server)
        if cuts < 3 and pids and uploads.is_dir() and os.listdir(uploads):
            cuts += 1
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
    _, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert cuts > 0
    remote.run("check", "--read-data")


def test_a_credential_that_cannot_delete_is_enough_for_a_backup(
    s3_server: S3Server, casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    s3_server.make_bucket("create-only")
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:DeleteObject",
                "Resource": "arn:aws:s3:::create-only/*",
            }
        ],
    }
    s3_server.put_policy("create-only", json.dumps(policy).encode())
    remote = on_s3(s3_server, "create-only", "r", casfs.home)
    remote.run("init")
    for _ in range(2):
        assert remote.run("backup", ".", cwd=source).complaint == ""
    denied = remote.run("forget", "latest", "--allow-all", expect=None)
    assert denied.exit != 0
    remote.run("restore", "latest", "--target", tmp_path / "back")
    assert tree_differences(source, tmp_path / "back") == []
    assert len(remote.run("snapshots", "--json").of_type("snapshot")) == 2


def test_wrong_keys_and_buckets_are_one_sentence(s3_server: S3Server, casfs: Casfs) -> None:
    wrong = S3Server(s3_server.endpoint, s3_server.access_key_id, "wrong")
    result = on_s3(wrong, "casfs", "r", casfs.home).run("init", expect=1)
    assert "the credentials are not accepted" in result.complaint
    missing = on_s3(s3_server, "no-such-bucket", "r", casfs.home).run("init", expect=1)
    assert "there is no such bucket" in missing.complaint
    assert len(result.complaints) == len(missing.complaints) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_backup_whose_server_has_gone_silent(
    s3_server: S3Server, casfs: Casfs, source: Path, number: signal.Signals
) -> None:
    (source / "large").write_bytes(random.Random(1).randbytes(140 * MIB))
    with tcp_proxy(s3_server.port) as proxy:
        server = replace(s3_server, endpoint=proxy.endpoint)
        remote = on_s3(server, "casfs", f"silent-{number}", casfs.home)
        remote.run("init")
        before = proxy.passed_bytes
        process = subprocess.Popen(
            [*program(), "backup", "."],
            cwd=source,
            env=remote.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while proxy.passed_bytes < before + 10 * MIB:
            assert process.poll() is None
        proxy.is_silent.set()
        process.send_signal(number)
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 130
        assert complaints.decode().strip().endswith("the repository is as intact as before")
        proxy.is_silent.clear()
        remote.run("backup", ".", cwd=source)
        remote.run("check", "--read-data")


@pytest.mark.parametrize("name", ["user@host:path", "s3:bucket/path", "b2:bucket", "host:/srv"])
def test_the_forms_of_other_programs_make_no_folder(
    casfs: Casfs, tmp_path: Path, name: str
) -> None:
    before = sorted(os.listdir(tmp_path))
    for command in (("init",), ("backup", "."), ("snapshots",)):
        result = casfs.at(None).run("-r", name, *command, cwd=tmp_path, expect=2)
        assert "://" in result.complaint and "./" in result.complaint
    assert sorted(os.listdir(tmp_path)) == before
