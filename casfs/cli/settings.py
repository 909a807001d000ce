"""The choices of the user for all commands: repository, output format, keys and snapshots."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.cli.key_options import KeyOptions
from casfs.cli.output import Output, path_argument
from casfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from casfs.cli.progress import CommandMonitor
    from casfs.config.file import Configuration
    from casfs.config.repositories import NamedRepository
    from casfs.crypto.identities import Identities
    from casfs.crypto.trust_root import TrustRoot
    from casfs.repository.place import Place
    from casfs.repository.snapshot_filter import SnapshotFilter
    from casfs.storage.base import Storage, StorageOptions


@dataclass(frozen=True, slots=True)
class RepositoryAddress:
    """The path or URL of a repository, and its section of the configuration if there is one."""

    url: str
    named: NamedRepository | None = None

    def storage_options(self) -> StorageOptions:
        """Return how the place is reached, beside its URL."""
        from casfs.storage.base import StorageOptions

        return self.named.storage_options() if self.named is not None else StorageOptions()


@dataclass(slots=True)
class Settings:
    """The options that a user gives before or after the name of the command."""

    repo: str | None = None
    config: str | None = None
    as_json: bool = False
    sync: bool = True
    hosts: tuple[str, ...] = ()
    tags: tuple[frozenset[str], ...] = ()
    paths: tuple[str, ...] = ()
    verb: str | None = None
    progress: str = "auto"
    verbose: bool = False
    quiet: bool = False
    keys: KeyOptions = field(default_factory=KeyOptions)
    expected: str | None = None
    upload_bytes_per_s: int | None = None
    download_bytes_per_s: int | None = None
    as_of_ns: int | None = None
    _address: RepositoryAddress | None = None
    _place: Place | None = None
    _unlocked: Identities | None = None

    def configuration(self) -> Configuration:
        """Return the contents of the configuration files; raise ConfigError."""
        from casfs.config.file import load_configuration

        return load_configuration(self.config)

    def resolve(self, name: str) -> RepositoryAddress:
        """Return the place for a path, a URL or a name from the configuration.

        Raises NotFoundError for the name of no folder that is nearly a name from the configuration.
        """
        from casfs.config.names import NAME

        if NAME.fullmatch(name):
            repositories = self.configuration().repositories
            if name in repositories:
                return RepositoryAddress(repositories[name].url.url, repositories[name])
            if not os.path.lexists(name):
                _refuse_mistyped(name, list(repositories))
        return RepositoryAddress(name)

    def repository_address(self) -> RepositoryAddress:
        """Return the place of the repository, and use its keys from now on; raise UsageError."""
        if self._address is None:
            name = self.repo if self.repo is not None else os.environ.get("CASFS_REPOSITORY")
            if self.repo == "":
                # A script whose variable is unset must not reach the repository of the environment.
                raise UsageError("--repo is empty: name a repository")
            if not name:
                raise UsageError(
                    "no repository was named: give --repo PATH or set CASFS_REPOSITORY"
                )
            self._address = self.resolve(name)
            if self._address.named is not None:
                self.keys.use_named(self._address.named)
        return self._address

    def repository(self) -> Place:
        """Return the place of the repository, always the same one; raise UsageError if none is named."""
        from casfs.repository.place import LocalPlace, place_of
        from casfs.storage.url import parse_address

        if self._place is None:
            address = self.repository_address()
            options = replace(
                address.storage_options(),
                upload_bytes_per_s=self.upload_bytes_per_s,
                download_bytes_per_s=self.download_bytes_per_s,
            )
            place = place_of(parse_address(address.url), options, self._expected_repository())
            if isinstance(place, LocalPlace) and (
                self.upload_bytes_per_s or self.download_bytes_per_s
            ):
                raise UsageError(
                    f"a rate limit holds for a repository on another machine, and {place} is a folder"
                )
            if self.as_of_ns is not None:
                if isinstance(place, LocalPlace):
                    raise UsageError(
                        f"--as-of reads the versions of objects in an S3 bucket, and {place} is a folder"
                    )
                place = replace(place, as_of_ns=self.as_of_ns)
            self._place = place
        return self._place

    def _expected_repository(self) -> str | None:
        """Return the id, or the digest of the configuration, that the repository must have."""
        given = self.expected or os.environ.get("CASFS_EXPECT_REPOSITORY")
        if not given:
            return None
        if not re.fullmatch("[0-9a-fA-F]{64}", given):
            raise UsageError(
                "the expected repository is not 64 hexadecimal digits: give its id, or what `b3sum config` "
                "prints in its folder"
            )
        return given.lower()

    def report_requests(self) -> None:
        """Print as JSON how many requests the command made to a remote repository, by kind."""
        if self._place is None or not self.as_json:
            return
        from casfs.repository.place import RemotePlace

        if not isinstance(self._place, RemotePlace):
            return
        totals = self._place.counter.totals()
        if totals:
            kinds = {
                str(kind): {
                    "requests": found.requests,
                    "sent_bytes": found.sent_bytes,
                    "received_bytes": found.received_bytes,
                }
                for kind, found in sorted(totals.items())
            }
            self.output().emit("requests", **kinds)

    def recipients_file(self) -> Path | None:
        """Return the recipients file that the configuration names for the repository, or None."""
        named = self.repository_address().named
        file = named.recipients_file if named is not None else None
        return Path(file.path) if file is not None else None

    def unlock(self, storage: Storage, trust: TrustRoot) -> Identities:
        """Return the user's identities; later calls return the same ones without asking again."""
        if self._unlocked is None:
            self._unlocked = self.keys.unlock(storage, trust)
        return self._unlocked

    def snapshot_filter(self) -> SnapshotFilter:
        """Return the filter that --host, --tag and --path make."""
        from casfs.repository.snapshot_filter import SnapshotFilter

        return SnapshotFilter(self.hosts, self.tags, tuple(map(path_argument, self.paths)))

    def output(self) -> Output:
        """Return the writer of the command's results."""
        return Output(self.as_json, self.quiet)

    def monitor(
        self, verb: str, source_path: Callable[[bytes], bytes] | None = None
    ) -> CommandMonitor:
        """Return the monitor of a command that works for a while; raise UsageError."""
        from casfs.cli.progress import CommandMonitor, ProgressMode, Verbosity

        if self.verbose and self.quiet:
            raise UsageError("--verbose and --quiet exclude each other; give one of them")
        mode = ProgressMode(self.progress)
        if mode == ProgressMode.JSON and not self.as_json:
            raise UsageError("--progress json needs --json")
        verbosity = Verbosity(mode, self.verbose, self.quiet)
        return CommandMonitor(self.output(), verb, source_path, verbosity)


def _refuse_mistyped(name: str, known: list[str]) -> None:
    """Raise NotFoundError where a name is nearly one of the known names."""
    import difflib

    close = difflib.get_close_matches(name, known, n=2)
    if close:
        raise NotFoundError(
            f"the configuration has no repository {name}; did you mean {' or '.join(close)}? "
            f"(write ./{name} for a new folder)"
        )
