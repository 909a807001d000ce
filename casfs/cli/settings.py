"""The options that every command shares: the repository, the output format, and the keys.

Secrets are never arguments or environment variables: those name the file, the descriptor or the command
that a secret is read from.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.output import Output, path_argument
from casfs.cli.param_types import RATE, TAGS
from casfs.errors import CasfsError, StorageError, UsageError, WrongKeyError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from casfs.cli.progress import CommandMonitor
    from casfs.config.file import Configuration
    from casfs.config.repositories import NamedRepository
    from casfs.crypto.age import AgeIdentity
    from casfs.crypto.identities import Identities
    from casfs.crypto.opening import Unlock
    from casfs.crypto.recipients import Recipient
    from casfs.crypto.trust_root import TrustRoot
    from casfs.repository.place import Place
    from casfs.repository.snapshot_filter import SnapshotFilter
    from casfs.storage.base import Storage, StorageOptions

_MAX_PASSPHRASE_BYTES = 64 * 1024
_PASSPHRASE_ATTEMPTS = 3


@dataclass(slots=True)
class PassphraseSource:
    """Where a passphrase comes from: a file, a descriptor or a command, but no terminal."""

    file: str | None = None
    fd: int | None = None
    command: str | None = None
    _read: str | None = None

    def is_given(self) -> bool:
        """Return whether the user named a source."""
        return self.file is not None or self.fd is not None or self.command is not None

    def read(self) -> str:
        """Return the passphrase without its line end; later calls return the same text.

        Raises UsageError for several sources and for an empty passphrase, StorageError if the file or the
        descriptor cannot be read, CasfsError if the command fails.
        """
        if self._read is None:
            if [self.file, self.fd, self.command].count(None) < 2:
                raise UsageError(
                    "give one of --passphrase-file, --passphrase-fd and --passphrase-command"
                )
            data = self._read_bytes()
            try:
                self._read = data.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError("the passphrase is not UTF-8") from error
            if not self._read:
                raise UsageError("the passphrase is empty")
        return self._read

    def _read_bytes(self) -> bytes:
        if self.command is not None:
            return _run_passphrase_command(self.command)
        source = self.file if self.file is not None else f"descriptor {self.fd}"
        try:
            if self.file is not None:
                with open(self.file, "rb") as file:
                    return file.read(_MAX_PASSPHRASE_BYTES)
            assert self.fd is not None
            with os.fdopen(os.dup(self.fd), "rb") as file:
                return file.read(_MAX_PASSPHRASE_BYTES)
        except OSError as error:
            raise StorageError("read the passphrase from", source, error) from error


@dataclass(slots=True)
class KeyOptions:
    """The identity files and the passphrase source that the user gave for an encrypted repository."""

    files: list[str] = field(default_factory=list)
    passphrase: PassphraseSource = field(default_factory=PassphraseSource)
    use_environment: bool = True

    def use_named(self, repository: NamedRepository) -> None:
        """Use the keys that the configuration names for a repository; options take precedence.

        The environment is then ignored: it may name the keys of another repository.
        """
        is_given = bool(self.files) or self.passphrase.is_given()
        identity, file = repository.identity_file, repository.passphrase_file
        command = repository.passphrase_command
        if identity is None and file is None and command is None:
            return
        self.use_environment = False
        if not is_given:
            self.files = [identity.path] if identity is not None else []
            self.passphrase.file = file.path if file is not None else None
            self.passphrase.command = command.text if command is not None else None

    def with_environment(self) -> KeyOptions:
        """Return these options; environment variables fill in those that were not given."""
        if not self.use_environment:
            return self
        files = self.files
        if not files:
            files = [
                name for name in os.environ.get("CASFS_IDENTITY", "").split(os.pathsep) if name
            ]
        passphrase = self.passphrase
        if not passphrase.is_given():
            passphrase.file = os.environ.get("CASFS_PASSPHRASE_FILE") or None
            if passphrase.file is None:
                passphrase.command = os.environ.get("CASFS_PASSPHRASE_COMMAND") or None
        return KeyOptions(files, passphrase)

    def unlock_given(self, storage: Storage, trust: TrustRoot) -> Identities:
        """Return the identities that the options name, without asking at the terminal."""
        from casfs.crypto.identities import Identities, read_identity_file, unlock_by_passphrase

        given = self.with_environment()
        found = Identities()
        for name in given.files:
            found.ages += read_identity_file(Path(name), ask_passphrase)
        if given.passphrase.is_given():
            from casfs.crypto.key_manager import require_trusted_recipients

            found.ages += unlock_by_passphrase(
                storage,
                bytes.fromhex(trust.config.id),
                given.passphrase.read(),
                require_trusted_recipients(storage, trust),
            )
        return found

    def unlock(self, storage: Storage, trust: TrustRoot) -> Identities:
        """Return the identities that the options name, or else those that the GPG agent or a passphrase
        typed at the terminal opens.
        """
        from casfs.crypto.identities import (
            unlock_by_gpg,
            wrapped_identities,
        )
        from casfs.crypto.key_manager import require_trusted_recipients

        found = self.unlock_given(storage, trust)
        if not found:
            found = unlock_by_gpg(storage, trust.recipients(storage).recipients)
        if found:
            return found
        if wrapped_identities(storage, trust.recipients(storage).recipients):
            recipients = require_trusted_recipients(storage, trust)
            found.ages = _ask_until_right(storage, trust.config.id, recipients)
        return found


def _ask_until_right(
    storage: Storage, repository: str, recipients: Sequence[Recipient]
) -> list[AgeIdentity]:
    """Return the identities that a passphrase typed at the terminal decrypts; none without a terminal.

    Raises WrongKeyError after the last of several wrong passphrases.
    """
    from casfs.crypto.identities import unlock_by_passphrase

    for attempts_left in reversed(range(_PASSPHRASE_ATTEMPTS)):
        passphrase = ask_passphrase(f"repository {repository[:12]}")
        if passphrase is None:
            return []
        try:
            return unlock_by_passphrase(storage, bytes.fromhex(repository), passphrase, recipients)
        except WrongKeyError:
            if not attempts_left:
                raise
            print("casfs: the passphrase is wrong; try again", file=sys.stderr)
    raise AssertionError("unreachable")


def unlock_repository(place: Place, unlock: Unlock) -> Identities | None:
    """Return the identities for a repository, None if it is not encrypted.

    This process may fork afterwards: what is needed of a remote place is read in another process.
    """
    from casfs.repository.key_objects import fetch_key_objects
    from casfs.repository.place import LocalPlace

    storage: Storage
    if isinstance(place, LocalPlace):
        storage = place.open_storage()
    else:
        storage = fetch_key_objects(place)
    try:
        trust = place.trust_root(storage)
        return unlock(storage, trust) if trust.config.encryption is not None else None
    finally:
        storage.close()


def ask_passphrase(what: str) -> str | None:
    """Ask for a passphrase at the terminal; return None if standard input is no terminal."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return getpass.getpass(f"passphrase of {what}: ", stream=sys.stderr)


def new_passphrase(source: PassphraseSource, option: str) -> str:
    """Return a new passphrase from its source, or else ask twice at the terminal.

    `option` is the option that a message recommends where there is no terminal. Raises UsageError.
    """
    if source.is_given():
        return source.read()
    first = ask_passphrase("the repository, a new one")
    if first is None:
        raise UsageError(f"there is no terminal to ask for a passphrase: give {option}")
    if not first:
        raise UsageError("the passphrase is empty")
    if ask_passphrase("the repository, again") != first:
        raise UsageError("the two passphrases differ")
    return first


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
    _address: RepositoryAddress | None = None
    _place: Place | None = None
    _unlocked: Identities | None = None

    def configuration(self) -> Configuration:
        """Return the contents of the configuration files; raise ConfigError."""
        from casfs.config.file import load_configuration

        return load_configuration(self.config)

    def resolve(self, name: str) -> RepositoryAddress:
        """Return the place for a path, a URL or a name from the configuration."""
        from casfs.config.values import NAME

        if NAME.fullmatch(name):
            named = self.configuration().repositories.get(name)
            if named is not None:
                return RepositoryAddress(named.url.url, named)
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
        from casfs.storage.url import parse_location

        if self._place is None:
            address = self.repository_address()
            options = replace(
                address.storage_options(),
                upload_bytes_per_s=self.upload_bytes_per_s,
                download_bytes_per_s=self.download_bytes_per_s,
            )
            place = place_of(parse_location(address.url), options, self._expected_repository())
            if isinstance(place, LocalPlace) and (
                self.upload_bytes_per_s or self.download_bytes_per_s
            ):
                raise UsageError(
                    f"a rate limit holds for a repository on another machine, and {place} is a folder"
                )
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
        from casfs.repository.place import RemotePlace

        if not (self.as_json and isinstance(self._place, RemotePlace)):
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

    def latest_of(self) -> SnapshotFilter:
        """Return the filter that narrows `latest`."""
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


def _set_upload_limit(ctx: click.Context, _: click.Parameter, value: int | None) -> None:
    ctx.ensure_object(Settings).upload_bytes_per_s = value


def _set_download_limit(ctx: click.Context, _: click.Parameter, value: int | None) -> None:
    ctx.ensure_object(Settings).download_bytes_per_s = value


upload_limit_option = click.option(
    "--limit-upload",
    type=RATE,
    metavar="RATE",
    expose_value=False,
    callback=_set_upload_limit,
    help="Send at most this many bytes per second to a remote repository, such as 500K.",
)
download_limit_option = click.option(
    "--limit-download",
    type=RATE,
    metavar="RATE",
    expose_value=False,
    callback=_set_download_limit,
    help="Fetch at most this many bytes per second from a remote repository.",
)


def key_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that open an encrypted repository; their values go into the Settings."""
    for name, metavar, help_text in (
        (
            "--passphrase-command",
            "COMMAND",
            "Run this command to get the passphrase [default: $CASFS_PASSPHRASE_COMMAND].",
        ),
        ("--passphrase-fd", "N", "Read the passphrase from this descriptor."),
        (
            "--passphrase-file",
            "FILE",
            "Read the passphrase from a file [default: $CASFS_PASSPHRASE_FILE].",
        ),
        (
            "--identity",
            "FILE",
            "Decrypt with this age identity or private SSH key; repeatable [default: $CASFS_IDENTITY].",
        ),
    ):
        command = click.option(
            name,
            metavar=metavar,
            type=int if name == "--passphrase-fd" else str,
            multiple=name == "--identity",
            expose_value=False,
            callback=_set_key_option,
            is_eager=True,
            help=help_text,
        )(command)
    return command


def _set_key_option(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    keys = ctx.ensure_object(Settings).keys
    if parameter.name == "identity":
        keys.files += value
    elif value is not None:
        setattr(keys.passphrase, str(parameter.name).removeprefix("passphrase_"), value)


def _run_passphrase_command(command: str) -> bytes:
    try:
        words = shlex.split(command)
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError, IndexError) as error:
        raise CasfsError(f"the passphrase command cannot be run: {error}") from error
    if done.returncode:
        raise CasfsError(f"the passphrase command failed with exit code {done.returncode}")
    return done.stdout[:_MAX_PASSPHRASE_BYTES]


def _allow_foreign(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        from casfs.storage.folder import allow_foreign_folders

        allow_foreign_folders()


def _set_repo(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).repo = value


def _set_expected(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).expected = value


def _set_config(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).config = value


def _set_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).as_json = True


def _set_no_sync(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).sync = False


def _set_progress(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).progress = value


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).verbose = True


def _set_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).quiet = True


def progress_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that work for a while: `Settings.monitor` uses their values."""
    command = click.option(
        "--progress",
        type=click.Choice(["auto", "never", "json"]),
        expose_value=False,
        callback=_set_progress,
        is_eager=True,
        help="Show progress on a terminal, never, or as JSON lines once a second (with --json)"
        " [default: auto].",
    )(command)
    command = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_quiet,
        is_eager=True,
        help="Print problems and errors only: no progress, no summary.",
    )(command)
    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        is_eager=True,
        help="Print more about what is done: each file that is backed up or restored.",
    )(command)


def complete_profiles(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the profiles whose names begin like this; none where the configuration cannot be read."""
    try:
        names = ctx.ensure_object(Settings).configuration().profiles
    except CasfsError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def complete_snapshots(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the snapshots, or the paths inside `SNAP:`, that begin like this."""
    from casfs.cli.shell_completion import snapshot_candidates

    return snapshot_candidates(ctx, parameter, incomplete)


def complete_tags(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the tags that snapshots have and that begin like this."""
    from casfs.cli.shell_completion import tag_candidates

    return tag_candidates(ctx, parameter, incomplete)


def complete_hosts(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the hosts that snapshots have and that begin like this."""
    from casfs.cli.shell_completion import host_candidates

    return host_candidates(ctx, parameter, incomplete)


def complete_folders(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Make the shell complete the names of folders."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that every verb has."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_set_json,
        is_eager=True,
        help="Print one JSON object per line.",
    )(command)


def configuration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that work with the configuration and open no repository themselves."""
    command = output_options(command)
    return click.option(
        "--config",
        metavar="FILE",
        expose_value=False,
        callback=_set_config,
        is_eager=True,
        help="The configuration [default: $CASFS_CONFIG, else ~/.config/casfs/config.toml and "
        "/etc/casfs/config.toml].",
    )(command)


def _set_filter(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    setattr(ctx.ensure_object(Settings), str(parameter.name), value)


def latest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that narrow `latest` to a command that takes a SNAP."""
    for name, variable, metavar, help_text, value_type, complete in (
        (
            "--path",
            "paths",
            "PATH",
            "Take latest from snapshots with this path; repeatable.",
            None,
            None,
        ),
        (
            "--tag",
            "tags",
            "TAG[,TAG...]",
            "Take latest from snapshots with all these tags.",
            TAGS,
            complete_tags,
        ),
        (
            "--host",
            "hosts",
            "NAME",
            "Take latest from snapshots of this host; repeatable.",
            None,
            complete_hosts,
        ),
    ):
        command = click.option(
            name,
            variable,
            metavar=metavar,
            type=value_type,
            multiple=True,
            expose_value=False,
            callback=_set_filter,
            shell_complete=complete,
            help=help_text,
        )(command)
    return command


def repository_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that work on a repository and need no key."""
    command = click.option(
        "--no-sync",
        is_flag=True,
        hidden=True,
        expose_value=False,
        callback=_set_no_sync,
        is_eager=True,
        help="For tests only: do not sync to disk. A crash may lose published snapshots.",
    )(command)
    command = configuration_options(command)
    command = click.option(
        "--expect-repository",
        metavar="DIGEST",
        expose_value=False,
        callback=_set_expected,
        is_eager=True,
        help="Refuse another repository than the one with this id, or whose file config has this BLAKE3 "
        "digest [default: $CASFS_EXPECT_REPOSITORY].",
    )(command)
    command = click.option(
        "--allow-foreign-repository",
        is_flag=True,
        expose_value=False,
        callback=_allow_foreign,
        help="Use a repository folder that belongs to another user, who can then change what is read "
        "[default: $CASFS_ALLOW_FOREIGN].",
    )(command)
    return click.option(
        "-r",
        "--repo",
        metavar="REPOSITORY",
        expose_value=False,
        callback=_set_repo,
        is_eager=True,
        help="The repository: a path, a URL, or a name from the configuration "
        "[default: $CASFS_REPOSITORY].",
    )(command)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that read a repository; their values are in the context's Settings."""
    return repository_options(key_options(command))
