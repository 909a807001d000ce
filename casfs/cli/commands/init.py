"""The command init: create a repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casfs.cli.commands.key import named_recipients, recipient_options
from casfs.cli.commands.lock_policy import require_lock_duration
from casfs.cli.key_options import new_passphrase
from casfs.cli.options import common_options
from casfs.cli.param_types import DURATION
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import escape_path
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.format.config import RepositoryConfig
    from casfs.repository.place import Place


@click.command(cls=Verb)
@click.argument("path", required=False)
@recipient_options
@click.option(
    "--lock-for",
    "lock_for_s",
    type=DURATION,
    metavar="DURATION",
    help="In a bucket with object lock: lock what a new snapshot needs for this long, as in 30d.",
)
@common_options
@click.pass_obj
def init(
    settings: Settings,
    path: str | None,
    recipients: tuple[str, ...],
    recipients_files: tuple[Path, ...],
    passphrase: bool,
    lock_for_s: int | None,
) -> None:
    """Create a repository; refuse if one exists.

    With recipients or a passphrase, casfs encrypts everything in the repository. Backups then need only
    write access to the folder; reading needs an identity or the passphrase. Encryption cannot be turned
    on or off later. Recipients can be changed (casfs key).
    """
    from casfs.repository.creation import create_repository

    if path is not None and settings.repo is not None and path != settings.repo:
        raise UsageError("the argument and --repo name different repositories; give one of them")
    if path is not None:
        settings.repo = path
    place, name = settings.repository(), settings.repository_address().url
    named = settings.repository_address().named
    expected = settings.recipients_file()
    if not (recipients or recipients_files) and expected is not None:
        recipients_files = (expected,)
    keys = settings.keys.with_environment()
    new = None
    if passphrase or keys.passphrase.is_given():
        new = new_passphrase(keys.passphrase, "--passphrase-file, -fd or -command")
    wanted = named_recipients(recipients, recipients_files)
    if named is not None and named.identity_file is not None and not wanted and new is None:
        raise UsageError(
            "the configuration names an identity-file for this repository, but no recipient: give "
            "--recipient, --passphrase, or recipients-file in the configuration"
        )
    if lock_for_s is not None:
        require_lock_duration(lock_for_s)
        _require_locking_bucket(place)
    config = create_repository(place, wanted, new)
    if lock_for_s is not None:
        _set_lock_policy(place, config, lock_for_s)
    output = settings.output()
    output.line(f"created repository {config.id[:12]} in {escape_path(os.fsencode(name))}")
    if config.encryption is None:
        output.line("it is not encrypted: every user who can read the folder can read the backups")
    else:
        values = [f"{recipient.kind} {recipient.value}" for recipient in wanted]
        values += ["a passphrase"] if new is not None else []
        output.line(f"it is encrypted to {', '.join(values)}")
        output.line(
            "only these can decrypt it: keep a copy of the keys or the passphrase somewhere else"
        )
    output.emit(
        "repository",
        id=config.id,
        address=name,
        format=config.format,
        encrypted=config.encryption is not None,
    )


def _require_locking_bucket(place: Place) -> None:
    """Raise UsageError or RefusedError where objects cannot be locked, before anything is created."""
    from casfs.repository.lock_policy import require_locking_bucket

    storage = place.open_storage()
    try:
        require_locking_bucket(storage)
    finally:
        storage.close()


def _set_lock_policy(place: Place, config: RepositoryConfig, lock_for_s: int) -> None:
    from casfs.repository.lock_policy import own_domain, set_policy

    storage = place.open_storage()
    try:
        set_policy(storage, config, lock_for_s, own_domain(config))
    finally:
        storage.close()
