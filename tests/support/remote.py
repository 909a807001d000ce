"""The installed command with a repository on a real server: SeaweedFS, or a folder behind `sshd`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cli import Casfs
from tests.support.servers import S3Server, SshServer


@dataclass(frozen=True, slots=True)
class RemoteCasfs(Casfs):
    """The command of one host: its home is its own, its repository is at `url`."""

    url: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        variables = {**self.variables, "CASFS_REPOSITORY": self.url, **(extra or {})}
        return Casfs.environment(self, variables)

    def host(self, home: Path) -> RemoteCasfs:
        """Return the command of another host with the same repository."""
        home.mkdir()
        return RemoteCasfs(None, home, self.url, self.variables)


def on_s3(server: S3Server, bucket: str, prefix: str, home: Path) -> RemoteCasfs:
    """Return the command of a host with a repository in a bucket."""
    return RemoteCasfs(None, home, f"s3://{bucket}/{prefix}", server.variables())


def over_ssh(server: SshServer, folder: Path, home: Path) -> RemoteCasfs:
    """Return the command of a host with a repository in a folder of the SSH server."""
    variables = {"CASFS_SSH_COMMAND": shlex.join(server.ssh_command)}
    return RemoteCasfs(None, home, server.url(folder), variables)
