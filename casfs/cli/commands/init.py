"""The command init: create a repository."""

from __future__ import annotations

from pathlib import Path

import click

from casfs.cli.commands.key import named_recipients, recipient_options
from casfs.cli.settings import Settings, common_options, new_passphrase
from casfs.display import escape_path
from casfs.errors import UsageError


@click.command()
@click.argument("path", required=False)
@recipient_options
@common_options
@click.pass_obj
def init(
    settings: Settings,
    path: str | None,
    recipients: tuple[str, ...],
    recipients_files: tuple[Path, ...],
    passphrase: bool,
) -> None:
    """Make a repository; refuse where one is.

    With recipients or a passphrase everything in it is encrypted: it can be written to by whoever may
    write in its folder, and read by whoever has an identity or the passphrase. That is decided here for
    the repository's whole life; who the recipients are can be changed later (casfs key).
    """
    from casfs.format.config import FORMAT_VERSION
    from casfs.repository.opening import create_repository

    if path is not None and settings.repo is not None and path != settings.repo:
        raise UsageError("two repositories were named; give one")
    if path is not None:
        settings.repo = path
    root = settings.repository_path()
    named = settings.repository_place().named
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
            "the configuration names an identity-file for this repository, and nothing says to whom it "
            "is encrypted: give --recipient, --passphrase, or recipients-file in the configuration"
        )
    config = create_repository(root, wanted, new)
    output = settings.output()
    output.line(f"made repository {config.id[:12]} in {escape_path(bytes(root))}")
    if config.encryption is None:
        output.line("it is not encrypted: whoever can read the folder can read what is stored")
    else:
        values = [f"{one.kind} {one.value}" for one in wanted]
        values += ["a passphrase"] if new is not None else []
        output.line(f"it is encrypted to {', '.join(values)}")
        output.line(
            "without one of these nothing in it can ever be read again: keep them apart from it"
        )
    output.emit(
        "repository",
        id=config.id,
        path=str(root),
        format=FORMAT_VERSION,
        encrypted=config.encryption is not None,
    )
