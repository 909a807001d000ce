"""Real processes of several hosts on one real object storage, at random: backups, prunes, tags, and kills."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cli import program
from tests.support.effort import EFFORT, dice
from tests.support.remote import RemoteCasfs, on_s3
from tests.support.servers import S3Server

HOSTS = 4
ROUNDS = 5 * EFFORT
_MOST_LIFE_S = 4.0


class Host:
    """A host with a source of its own and at most one process."""

    def __init__(self, casfs: RemoteCasfs, number: int, folder: Path) -> None:
        self.casfs = casfs
        self.name = f"host-{number}"
        self.source = folder / f"source {number}"
        self.source.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.killed = False

    def change(self, chance: random.Random) -> None:
        """Write files, most of which other hosts have or had too."""
        for name in "abcdef":
            if chance.random() < 0.5:
                content = random.Random(chance.randrange(6)).randbytes(200_000)
                (self.source / name).write_bytes(content)

    def start(self, chance: random.Random) -> None:
        self.change(chance)
        backup = ("backup", "--host", self.name, ".")
        command = chance.choice(
            [
                backup,
                backup,
                backup,
                ("prune", "--margin", "0s", "--max-unused", "0%"),
                ("prune", "--margin", "0s"),
                ("forget", "--group-by", "host", "--keep-last", "1"),
                ("tag", "--add", f"tag-{chance.randrange(9)}", "latest"),
            ]
        )
        self.killed = False
        self.process = subprocess.Popen(
            [*program(), *command],
            cwd=self.source,
            env=self.casfs.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.killed = True


@pytest.mark.slow
@pytest.mark.timeout(300 + 120 * EFFORT)
def test_hosts_that_back_up_prune_and_die_at_random_lose_nothing_published(
    s3_server: S3Server, tmp_path: Path
) -> None:
    chance = dice()
    first = on_s3(s3_server, "casfs", f"hosts-{chance.randrange(10**9)}", tmp_path / "home")
    first.home.mkdir()
    first.run("init")
    hosts = [
        Host(first.host(tmp_path / f"home {number}"), number, tmp_path) for number in range(HOSTS)
    ]
    for number in range(ROUNDS):
        for host in hosts:
            host.start(chance)
        for host in hosts:
            if chance.random() < 0.4:
                time.sleep(chance.random() * _MOST_LIFE_S / HOSTS)
                host.kill()
        for host in hosts:
            assert host.process is not None
            # A command may fail, such as a tag without any snapshot; it says so and does no harm.
            code = host.process.wait()
            assert code in (0, 1, 3) or (host.killed and code == -signal.SIGKILL)
        reader = first.host(tmp_path / f"reader {number}")
        reader.run("check", "--read-data")
    for _ in range(2):
        first.run("prune", "--margin", "0s")
    last = first.host(tmp_path / "last")
    last.run("check", "--read-data")
    for snapshot in last.run("snapshots", "--json").of_type("snapshot"):
        last.run("restore", snapshot["id"], "--target", tmp_path / f"back {snapshot['id'][:8]}")
