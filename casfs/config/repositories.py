"""Repositories of the configuration: their names, addresses and keys.

The configuration contains no secret. It names the files that hold secrets and the commands that print them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from casfs.config.values import AbsolutePath, Command, Duration, RepositoryUrl, Size
from casfs.storage.base import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_PATIENCE_S,
    FIRST_PATIENCE_S,
    StorageOptions,
)


class NamedRepository(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True
):
    """A table `[repositories.NAME]`.

    The keys from `endpoint` to `ca_file` reach object storage, `ssh_command` reaches a machine, `retry_for`
    and `cache_size` limit how long either is waited for and what is kept of it, and the others open an
    encrypted repository.
    """

    url: RepositoryUrl
    endpoint: str | None = None
    region: str | None = None
    credentials_command: Command | None = None
    aws_profile: str | None = None
    account: str | None = None
    virtual_hosted: bool = False
    ca_file: AbsolutePath | None = None
    cache_size: Size | None = None
    retry_for: Duration | None = None
    ssh_command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("ssh",)
    identity_file: AbsolutePath | None = None
    passphrase_command: Command | None = None
    passphrase_file: AbsolutePath | None = None
    recipients_file: AbsolutePath | None = None

    def __post_init__(self) -> None:
        if self.passphrase_command is not None and self.passphrase_file is not None:
            raise ValueError("give passphrase-command or passphrase-file, not both")

    def storage_options(self) -> StorageOptions:
        """Return the options to reach the place, apart from its URL."""
        command = self.credentials_command
        patience_s = DEFAULT_PATIENCE_S if self.retry_for is None else self.retry_for.seconds
        return StorageOptions(
            endpoint=self.endpoint,
            region=self.region,
            profile=self.aws_profile,
            account=self.account,
            credentials_command=command.text if command is not None else None,
            virtual_hosted=self.virtual_hosted,
            ca_file=self.ca_file.path if self.ca_file is not None else None,
            ssh_command=self.ssh_command,
            patience_s=patience_s,
            first_patience_s=min(patience_s, FIRST_PATIENCE_S),
            cache_bytes=self.cache_size.bytes
            if self.cache_size is not None
            else DEFAULT_CACHE_BYTES,
        )
