"""The verb key: who can open what is stored in an encrypted repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.settings import PassphraseSource, Settings, common_options, new_passphrase
from casfs.errors import StorageError, UsageError

if TYPE_CHECKING:
    from casfs.crypto.recipients import Recipient
    from casfs.format.config import RepositoryConfig
    from casfs.storage.local import LocalStorage


def recipient_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name recipients."""
    command = click.option(
        "--passphrase",
        is_flag=True,
        help="A passphrase: asked for at a terminal, or from --passphrase-file, -fd, -command.",
    )(command)
    command = click.option(
        "--recipients-file",
        "recipients_files",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Recipients, one a line.",
    )(command)
    return click.option(
        "--recipient",
        "recipients",
        multiple=True,
        metavar="KEY",
        help="An age public key, an SSH public key, or a GPG key id; may be repeated.",
    )(command)


def named_recipients(texts: tuple[str, ...], files: tuple[Path, ...]) -> list[Recipient]:
    """Return the recipients that the options name; raises WrongKeyError and StorageError."""
    if not (texts or files):
        return []
    from casfs.crypto.recipients import merged, parse_recipient

    found = [parse_recipient(text) for text in texts]
    return merged(found, [one for file in files for one in recipients_in(file)])


def recipients_in(file: Path) -> list[Recipient]:
    """Return the recipients that a file names; raises WrongKeyError and StorageError."""
    from casfs.crypto.recipients import parse_recipients_file

    try:
        data = file.read_bytes()
    except OSError as error:
        raise StorageError("read the recipients in", str(file), error) from error
    return parse_recipients_file(data, str(file))


@click.group()
@common_options
def key() -> None:
    """Say who can open what is stored, or show it."""


@key.command("list")
@common_options
@click.pass_obj
def list_keys(settings: Settings) -> None:
    """List the recipients: whoever has what opens one of them can read what is stored."""
    from casfs.crypto.recipients import read_recipients

    _, storage, _ = _encrypted(settings)
    output = settings.output()
    rows = []
    for one in read_recipients(storage):
        rows.append((str(one.kind), one.value))
        output.emit("recipient", kind=str(one.kind), value=one.value)
    output.table(("kind", "recipient"), (), rows)


@key.command()
@recipient_options
@common_options
@click.pass_obj
def add(
    settings: Settings,
    recipients: tuple[str, ...],
    recipients_files: tuple[Path, ...],
    passphrase: bool,
) -> None:
    """Add recipients: they can read what is stored from now on.

    What is there already opens to them after `casfs key rewrap`.
    """
    from casfs.crypto.identities import add_passphrase
    from casfs.crypto.key_manager import change_recipients, verify_trusted, with_gpg_identities
    from casfs.crypto.recipients import merged, read_recipients

    new = named_recipients(recipients, recipients_files)
    if not (new or passphrase):
        raise UsageError("name a recipient to add, or give --passphrase")
    text = None
    if passphrase:
        text = new_passphrase(settings.keys.with_environment().passphrase, "--passphrase-file")
    with _open_for_maintenance(settings, "key add") as (root, storage, config):
        verify_trusted(root, storage, config)
        if text is not None:
            new.append(add_passphrase(storage, text, bytes.fromhex(config.id)))
        now = read_recipients(storage)
        known = {one.value for one in now}
        added = with_gpg_identities(storage, [one for one in new if one.value not in known])
        change_recipients(root, storage, config, merged(now, added))
    _print_recipients(settings, "added", added)


@key.command()
@click.argument("values", nargs=-1, required=True, metavar="RECIPIENT...")
@common_options
@click.pass_obj
def remove(settings: Settings, values: tuple[str, ...]) -> None:
    """Remove recipients, by the value that `casfs key list` shows or the beginning of one.

    They cannot read what is stored from now on, and can still read what they could read before:
    `casfs key rewrap` takes that from them too, as far as they have no copy of the old files.
    """
    from casfs.crypto.key_manager import change_recipients
    from casfs.crypto.recipients import read_recipients

    gone = []
    with _open_for_maintenance(settings, "key remove") as (root, storage, config):
        now = read_recipients(storage)
        for value in values:
            fitting = [one for one in now if one.value.startswith(value)]
            if len(fitting) != 1:
                raise UsageError(
                    f"{len(fitting)} recipients begin with {value!r}; nothing was changed"
                )
            gone += fitting
        change_recipients(root, storage, config, [one for one in now if one not in gone])
    _print_recipients(settings, "removed", gone)


@key.command()
@common_options
@click.pass_obj
def rewrap(settings: Settings) -> None:
    """Have everything that is stored open to the recipients that there are now, and to nobody else."""
    from casfs.crypto.key_manager import rewrap_sessions, verify_trusted

    with _open_for_maintenance(settings, "key rewrap") as (root, storage, config):
        verify_trusted(root, storage, config)
        count = rewrap_sessions(storage, config, settings.unlock(storage, config))
    output = settings.output()
    output.line(f"wrapped the keys of {count} sessions anew")
    output.emit("rewrapped", sessions=count)


@key.command()
@click.option("--new-passphrase-file", metavar="FILE", help="Read the new one from a file.")
@common_options
@click.pass_obj
def passwd(settings: Settings, new_passphrase_file: str | None) -> None:
    """Change the passphrase; the old one opens nothing any more, but for copies of the repository."""
    from casfs.cli.settings import ask_passphrase
    from casfs.crypto.identities import change_passphrase

    _encrypted(settings)
    source = settings.keys.with_environment().passphrase
    old = source.read() if source.is_given() else ask_passphrase("the repository, the old one")
    if old is None:
        raise UsageError("there is no terminal to ask for the old passphrase: --passphrase-file")
    new = new_passphrase(PassphraseSource(file=new_passphrase_file), "--new-passphrase-file")
    with _open_for_maintenance(settings, "key passwd") as (_, storage, config):
        change_passphrase(storage, old, new, bytes.fromhex(config.id))
    output = settings.output()
    output.line("the passphrase was changed")
    output.emit("passphrase", changed=True)


@key.command()
@common_options
@click.pass_obj
def accept(settings: Settings) -> None:
    """Have this machine trust the repository that is here now, and the recipients that it has.

    With an identity this machine also takes up the repository's own secret for what it stores, so that it
    deduplicates with all the others.
    """
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.key_manager import trust_current_recipients as accept_keys
    from casfs.repository.opening import read_config
    from casfs.storage.local import LocalStorage

    root = settings.repository_path().absolute()
    config = read_config(root)
    storage = LocalStorage(root)
    recipients = accept_keys(root, storage, config)
    if config.encryption is not None:
        identities = settings.keys.unlock_given(storage, config)
        if identities:
            KeyManager.for_writing(root, storage, config, identities)
    _print_recipients(settings, "accepted", recipients)


def _encrypted(settings: Settings) -> tuple[Path, LocalStorage, RepositoryConfig]:
    """Return the repository that was named; raises UsageError where it is not encrypted."""
    from casfs.repository.opening import read_config
    from casfs.storage.local import LocalStorage

    root = settings.repository_path().absolute()
    config = read_config(root)
    if config.encryption is None:
        raise UsageError(
            f"the repository in {root} is not encrypted; that is decided by casfs init"
        )
    return root, LocalStorage(root), config


@contextmanager
def _open_for_maintenance(
    settings: Settings, verb: str
) -> Iterator[tuple[Path, LocalStorage, RepositoryConfig]]:
    """Give the repository that was named while nobody else changes its keys; raises LockedError."""
    from casfs.storage.local import LocalStorage
    from casfs.storage.locks import LockMode, RepositoryLock

    root, _, config = _encrypted(settings)
    with RepositoryLock.acquire(root / "locks", verb, LockMode.MAINTENANCE, "a machine") as lock:
        storage = LocalStorage(root, writer=lock.name, sync=settings.sync)
        try:
            yield root, storage, config
        finally:
            storage.close()


def _print_recipients(settings: Settings, what: str, recipients: list[Recipient]) -> None:
    output = settings.output()
    for one in recipients:
        output.line(f"{what} {one.kind} {one.value}")
        output.emit("recipient", what=what, kind=str(one.kind), value=one.value)
    if not recipients:
        output.line("nothing was to be done")
