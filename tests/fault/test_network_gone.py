"""The network goes away in the middle of a command and stays away.

The installed command ends within the patience of its configuration, with one sentence and the exit code of a
failure. Nothing that was published is lost, and when the network is back the next command works. The
repository is on SeaweedFS or behind `sshd`, in either case behind a proxy that is the network.
"""

from __future__ import annotations

import errno
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.cli import Result
from tests.support.comparing import tree_differences
from tests.support.mounts import mounted, processes_naming
from tests.support.remote import RemoteCasfs, on_s3
from tests.support.servers import S3Server, SshServer
from tests.support.stores import noise
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20
ENOUGH_S = 60
"""Far more than a command takes that gives up after its patience, and far less than the usual patience."""

UNREACHABLE = ("the connection failed", "the server refuses connections", "cannot reach sftp://")

_serials = itertools.count()


@dataclass(frozen=True, slots=True)
class Far:
    """A host whose repository is beyond the network, and a source of which there is a snapshot."""

    casfs: RemoteCasfs
    proxy: TcpProxy
    source: Path

    def fails(self, *arguments: str | Path) -> Result:
        """Run a command during which the network goes away, and require one sentence that says so."""
        self.proxy.cut_after(4 * MIB)
        result = self.casfs.run(*arguments, expect=1, timeout=ENOUGH_S)
        assert self.proxy.is_cut.is_set(), "the command did not need the network"
        assert len(result.complaints) == 1, result
        assert any(words in result.complaint for words in UNREACHABLE), result
        return result

    def snapshots(self) -> list[str]:
        return [one["id"] for one in self.casfs.json("snapshots").of_type("snapshot")]


@pytest.fixture(params=["s3", "ssh"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Far]:
    home, source = tmp_path / "home", tmp_path / "source"
    home.mkdir()
    source.mkdir()
    (source / "small").write_bytes(b"unharmed")
    (source / "big").write_bytes(noise("big", 24 * MIB))
    config = tmp_path / "config.toml"
    server: S3Server | SshServer = request.getfixturevalue(f"{request.param}_server")
    with tcp_proxy(server.port) as proxy:
        if isinstance(server, S3Server):
            reached = replace(server, endpoint=proxy.endpoint)
            host = on_s3(reached, "casfs", f"gone-{next(_serials)}", home)
        else:
            command = (*server.ssh_command, f"-oHostKeyAlias=[127.0.0.1]:{server.port}")
            url = replace(server, port=proxy.port).url(tmp_path / "far")
            host = RemoteCasfs(None, home, url, {"CASFS_SSH_COMMAND": shlex.join(command)})
        config.write_text(
            f'[repositories.far]\nurl = "{host.url}"\nretry-for = "1s"\n[profiles.home]\n'
            f'repository = "far"\nsources = ["{source}"]\nkeep = {{ last = 3 }}\n'
            'prune-every = "7d"\ncheck = { every = "1d", older-than = "0s" }\n'
        )
        config.chmod(0o600)
        casfs = replace(host, url="far", variables={**host.variables, "CASFS_CONFIG": str(config)})
        casfs.init()
        casfs.backup(".", cwd=source)
        yield Far(casfs, proxy, source)


def test_a_backup_without_a_network_publishes_nothing_and_the_next_one_works(far: Far) -> None:
    before = far.snapshots()
    (far.source / "new").write_bytes(noise("new", 24 * MIB))
    result = far.fails("backup", far.source)
    assert "nothing was published" in result.complaint
    far.proxy.come_back()
    assert far.snapshots() == before
    far.proxy.cut_after(4 * MIB)
    error = far.casfs.json("backup", far.source, expect=1).one("error")
    assert error["exit"] == 1 and "nothing was published" in error["message"]
    far.proxy.come_back()
    far.casfs.backup(far.source)
    assert len(far.snapshots()) == len(before) + 1
    assert far.casfs.json("check", "--read-data").one("summary")["ok"] is True


def test_a_run_without_a_network_fails_each_step_and_the_next_run_works(far: Far) -> None:
    (far.source / "new").write_bytes(noise("new", 24 * MIB))
    far.proxy.cut_after(4 * MIB)
    result = far.casfs.json("run", "home", expect=1)
    steps = {line["step"]: line for line in result.of_type("step")}
    assert (steps["backup"]["exit"], steps["forget"]["status"]) == (1, "skipped")
    assert {steps[step]["exit"] for step in ("prune", "check")} == {1}
    for step in ("backup", "prune", "check"):
        assert any(words in steps[step]["reason"] for words in UNREACHABLE), steps[step]
        assert "\n" not in steps[step]["reason"]
    assert result.one("run")["outcome"] == "failed"
    far.proxy.come_back()
    assert len(far.snapshots()) == 1
    again = far.casfs.json("run", "home")
    assert {line["exit"] for line in again.of_type("step")} == {0}
    assert len(far.snapshots()) == 2


def test_a_restore_without_a_network_leaves_no_part_of_a_file_and_can_be_finished(
    far: Far, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    result = far.fails("restore", "latest", "--target", target)
    assert "damage" not in result.complaint
    assert not (target / "big").exists()
    far.proxy.come_back()
    far.casfs.run("restore", "latest", "--target", target)
    assert tree_differences(far.source, target) == []


@pytest.mark.fuse
def test_a_read_of_a_mount_without_a_network_is_an_error_until_the_network_is_back(
    far: Far, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with mounted(far.casfs, "--log-file", log, "latest", at=tmp_path / "mount") as mount:
        assert (mount / "small").read_bytes() == b"unharmed"
        far.proxy.cut_after(4 * MIB)
        with pytest.raises(OSError) as raised:
            (mount / "big").read_bytes()
        assert raised.value.errno == errno.EIO
        assert (mount / "small").read_bytes() == b"unharmed"
        far.proxy.come_back()
        expected = (far.source / "big").read_bytes()

        def is_back() -> bool:
            try:
                return (mount / "big").read_bytes() == expected
            except OSError:
                return False

        wait_until(is_back, "the file is readable again")
        assert (mount / ".casfs/damage").read_bytes() == b"", "a network that is away is no damage"


@pytest.mark.fuse
def test_a_mount_whose_network_is_away_ends_soon_after_its_umount(far: Far, tmp_path: Path) -> None:
    with mounted(far.casfs, "latest", at=tmp_path / "mount") as mount:
        far.proxy.is_cut.set()
    wait_until(lambda: not processes_naming(mount), "the mount's process is gone", limit=15)
