"""The installed command with a repository on a real server: SeaweedFS, or a folder behind `sshd`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from casfs.storage.base import Storage, StorageOptions
from casfs.storage.remote import open_storage
from casfs.storage.url import parse_address
from tests.support.cli import Casfs
from tests.support.servers import S3Server, SshServer


@dataclass(frozen=True, slots=True)
class RemoteCasfs(Casfs):
    """The command of one host: its home is its own, its repository is at `url`."""

    url: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The URL of the repository, or the path of a local one that the same host uses."""
        return self.url or str(self.repository)

    def at(self, repository: Path | None) -> RemoteCasfs:
        """Return the command of the same host for a local repository (None: for none at all)."""
        return replace(self, repository=repository, url="")

    def beside(self, name: str) -> RemoteCasfs:
        """Return the same command for a repository that is not yet made, at the same server."""
        return replace(self, url=f"{self.url}-{name}")

    def settled(self, pruned: dict[str, Any]) -> dict[str, Any]:
        """Return the result of the prune that removes what an earlier one has marked for removal."""
        assert pruned["removed_packs"] == 0
        return self.json("prune", "--margin", "0s").one("prune")

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        named = {"CASFS_REPOSITORY": self.url} if self.url else {}
        return Casfs.environment(self, {**self.variables, **named, **(extra or {})})

    def open_storage(self) -> Storage:
        """Return the storage of the repository, which this process reaches as the command does."""
        options = StorageOptions(
            endpoint=self.variables.get("AWS_ENDPOINT_URL"),
            region=self.variables.get("AWS_REGION"),
            access_key_id=self.variables.get("AWS_ACCESS_KEY_ID"),
            secret_access_key=self.variables.get("AWS_SECRET_ACCESS_KEY"),
        )
        return open_storage(parse_address(self.url), options, env=self.variables)

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
