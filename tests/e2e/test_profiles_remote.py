"""Nights of a profile whose repository is on another machine or in an object storage."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs, finish
from tests.support.night import Night
from tests.support.ping_server import serving_pings
from tests.support.servers import SshServer, seaweedfs, session_pids, sshd

MIB = 1 << 20


@pytest.fixture
def night(casfs: Casfs, tmp_path: Path, source: Path) -> Iterator[Night]:
    with serving_pings() as pings:
        yield Night(casfs.at(None), tmp_path, pings, [source])


def by_name(night: Night) -> tuple[str | Path, ...]:
    return ("--config", night.config, "-r", "nas")


def test_an_object_storage_is_reached_with_what_a_command_prints(night: Night) -> None:
    with seaweedfs() as server:
        server.make_bucket("backups")
        secret = night.folder / "secret"
        secret.write_text(
            f"AWS_ACCESS_KEY_ID={server.access_key_id}\n"
            f"AWS_SECRET_ACCESS_KEY={server.secret_access_key}\n"
        )
        night.configure(
            url="s3://backups/home",
            prunes=False,
            repository=f'endpoint = "{server.endpoint}"\ncredentials-command = "cat {secret}"',
        )
        night.casfs.run("init", *by_name(night))
        result = night.run()
        assert set(night.steps(result).values()) == {"0"}
        assert server.secret_access_key not in result.text + result.complaint
        (snapshot,) = night.casfs.json("snapshots", *by_name(night)).of_type("snapshot")
        assert snapshot["id"] == result.one("run")["snapshot"]
        metrics = night.metrics
        assert metrics["repository_packs"] >= 1
        assert metrics["repository_bytes"] > 0
        assert metrics["repository_oldest_verification_timestamp_seconds"] > 0


@pytest.mark.slow
def test_connections_that_are_cut_while_a_night_uploads_do_not_fail_it(night: Night) -> None:
    for number in range(3):
        large = night.sources[0] / f"large{number}"
        large.write_bytes(random.Random(number).randbytes(66 * MIB))
    with sshd() as server:
        night.configure(
            url=server.url(server.folder / "repository"),
            prunes=False,
            repository=f"ssh-command = {json.dumps(server.ssh_command)}",
        )
        night.casfs.run("init", *by_name(night))
        run = night.casfs.start("run", "--config", night.config, "--json", "home")
        uploads = server.folder / "repository" / "uploads"
        cuts = 0
        while run.poll() is None:
            pids = session_pids(server)
            if cuts < 2 and pids and uploads.is_dir() and os.listdir(uploads):
                cuts += 1
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        result = finish(run)
        assert cuts == 2
        assert (result.exit, night.steps(result)["backup"]) == (0, "0")
        night.require_reports(result)
        night.casfs.run("check", "--read-data", *by_name(night))


@pytest.mark.slow
def test_a_server_that_goes_away_fails_one_night_and_not_the_next(night: Night) -> None:
    def configure(server: SshServer) -> None:
        night.configure(
            url=server.url(server.folder / "repository"),
            prunes=False,
            repository=f"ssh-command = {json.dumps(server.ssh_command)}",
        )

    with sshd() as server:
        # The folder of the keys stays when the server goes away for a while.
        with sshd(server.folder) as first:
            configure(first)
            night.casfs.run("init", *by_name(night))
            night.run()
        result = night.run(expect=1)
        steps = night.steps(result)
        assert (steps["backup"], steps["forget"]) == ("1", "skipped")
        assert night.pings.paths[-1] == "/uuid/fail"
        assert night.metrics["run_consecutive_failures"] == 1
        with sshd(server.folder, first.port):
            night.run()
        assert night.pings.paths[-1] == "/uuid"
        assert night.metrics["run_consecutive_failures"] == 0
