"""The command key: list and change the recipients of an encrypted repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.key_options import PassphraseSource, new_passphrase
from casfs.cli.options import common_options, repository_options
from casfs.cli.replaced_secrets import Replacement, machine_of, print_replacement, replacements
from casfs.cli.settings import Settings
from casfs.cli.verbs import SuggestingGroup
from casfs.display import counted, escape_path
from casfs.errors import StorageError, UsageError

if TYPE_CHECKING:
    from casfs.crypto.recipients import Recipient
    from casfs.crypto.trust_root import TrustRoot
    from casfs.crypto.writers import HostKey
    from casfs.repository.key_change import KeyChange
    from casfs.repository.place import Place
    from casfs.storage.base import Storage


def recipient_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name recipients."""
    command = click.option(
        "--passphrase",
        is_flag=True,
        help="Add a passphrase, from the terminal or from --passphrase-file, -fd or -command.",
    )(command)
    command = click.option(
        "--recipients-file",
        "recipients_files",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Read recipients from this file, one per line.",
    )(command)
    return click.option(
        "--recipient",
        "recipients",
        multiple=True,
        metavar="KEY",
        help="An age public key, an SSH public key or a GPG key id; repeatable.",
    )(command)


def named_recipients(texts: tuple[str, ...], files: tuple[Path, ...]) -> list[Recipient]:
    """Return the recipients that the options name; raise WrongKeyError or StorageError."""
    if not (texts or files):
        return []
    from casfs.crypto.recipients import merged, parse_recipient

    found = [parse_recipient(text) for text in texts]
    return merged(found, [recipient for file in files for recipient in recipients_in(file)])


def recipients_in(file: Path) -> list[Recipient]:
    """Return the recipients in a file; raise WrongKeyError or StorageError."""
    from casfs.crypto.recipients import parse_recipients_file

    try:
        data = file.read_bytes()
    except OSError as error:
        raise StorageError("read the recipients in", str(file), error) from error
    return parse_recipients_file(data, str(file))


@click.group(cls=SuggestingGroup)
@common_options
def key() -> None:
    """List and change the recipients, who can decrypt backups."""


@key.command("list")
@repository_options
@click.pass_obj
def list_keys(settings: Settings) -> None:
    """List the recipients, the signing keys, and the replaced secrets.

    The keys of the recipients decrypt the repository. A machine trusts the first signing key that it sees for
    a host name. Compare the listed keys with those that the hosts list as their own. Each removal of a
    recipient replaces the repository's secret.
    """
    from casfs.crypto.writers import TrustedWriters

    with _open_encrypted(settings) as (storage, trust):
        listed = trust.recipients(storage)
        recipients = listed.recipients
        writers = TrustedWriters(trust.config).listed() if trust.config.signs_snapshots else []
        replaced = replacements(trust, listed.generations)
    output = settings.output()
    rows = []
    for recipient in recipients:
        rows.append((str(recipient.kind), recipient.line))
        output.emit("recipient", **_fields(recipient))
    output.table(("kind", "recipient"), (), rows)
    if writers:
        output.line("")
        shown = [(_host_of(one), one.key) for one in writers]
        output.table(("signing host", "key"), (), shown)
    for writer in writers:
        output.emit("writer", **writer._asdict())
    if replaced:
        output.line("")
        rows = [(str(one.generation), machine_of(one)) for one in replaced]
        output.table(("secret", "replaced by"), (), rows)
    for one in replaced:
        output.emit("secret", **one._asdict())


@key.command()
@click.argument("values", nargs=-1, metavar="[RECIPIENT]...")
@recipient_options
@common_options
@click.pass_obj
def add(
    settings: Settings,
    values: tuple[str, ...],
    recipients: tuple[str, ...],
    recipients_files: tuple[Path, ...],
    passphrase: bool,
) -> None:
    """Add recipients, which can decrypt all later backups.

    A RECIPIENT is an age public key, an SSH public key or a GPG key id. Run `casfs key rewrap` to let them
    decrypt the existing backups too.
    """
    from casfs.crypto.identities import add_passphrase
    from casfs.crypto.key_manager import change_recipients, verify_trusted, with_gpg_identities
    from casfs.crypto.recipients import merged

    new = named_recipients((*values, *recipients), recipients_files)
    if not (new or passphrase):
        raise UsageError("name a recipient to add, or give --passphrase")
    text = None
    if passphrase:
        text = new_passphrase(settings.keys.with_environment().passphrase, "--passphrase-file")
    with _open_for_change(settings, "key add") as (root, change):
        storage, trust = change.storage, change.trust
        verify_trusted(root, storage, trust)
        if text is not None:
            new.append(add_passphrase(storage, text, bytes.fromhex(trust.config.id)))
        now = trust.recipients(storage).recipients
        known = {recipient.value for recipient in now}
        added = with_gpg_identities(
            storage, [recipient for recipient in new if recipient.value not in known]
        )
        change_recipients(root, storage, trust, merged(now, added))
    if not added:
        settings.output().line("nothing was added: these are recipients already")
        return
    _print_recipients(settings, "added", added)


@key.command()
@click.argument("values", nargs=-1, required=True, metavar="RECIPIENT...")
@common_options
@click.pass_obj
def remove(settings: Settings, values: tuple[str, ...]) -> None:
    """Remove recipients.

    Each is named by the value that `casfs key list` shows, or the beginning of that value.

    The word passphrase names the only passphrase.
    They cannot decrypt later backups. They can still decrypt the existing ones until `casfs key rewrap`,
    and after it with copies of the old key files.

    The repository's secret is replaced, so that they recognize no later content and publish no snapshot that
    counts as proven. This machine must know the secret, or be given an identity. Then compare the list and
    run `casfs key accept` with an identity on every other machine that writes; changed files are stored once
    without deduplication. In format 1 the secret stays.
    """
    from casfs.crypto.key_manager import change_recipients
    from casfs.repository.recipient_removal import knows_own_domain, remove_recipients

    removed = []
    replaced: list[Replacement] = []
    with _open_for_change(settings, "key remove") as (root, change):
        storage, trust = change.storage, change.trust
        now = trust.recipients(storage).recipients
        for value in values:
            removed.append(_named_recipient(now, value))
        left = [recipient for recipient in now if recipient not in removed]
        if trust.config.signs_snapshots:
            identities = settings.keys.unlock_given(storage, trust)
            if left and not (identities or knows_own_domain(root, storage, trust)):
                identities = settings.unlock(storage, trust)
            record = remove_recipients(root, storage, trust, left, identities)
            replaced = replacements(trust, [record])
        else:
            change_recipients(root, storage, trust, left)
    _print_recipients(settings, "removed", removed)
    print_replacement(settings.output(), replaced)


def _named_recipient(recipients: Sequence[Recipient], text: str) -> Recipient:
    """Return the recipient that a kind or the beginning of a value names; raise UsageError."""
    matches = [
        recipient
        for recipient in recipients
        if recipient.value.startswith(text) or (text == "passphrase" == str(recipient.kind))
    ]
    if not matches:
        raise UsageError(
            f"no recipient begins with {text!r}; `casfs key list` lists them; nothing was changed"
        )
    if len(matches) > 1:
        raise UsageError(
            f"{text!r} names {len(matches)} recipients; give more of the value that `casfs key list` shows; "
            "nothing was changed"
        )
    return matches[0]


@key.command()
@common_options
@click.pass_obj
def rewrap(settings: Settings) -> None:
    """Encrypt existing session keys to the current recipients."""
    from casfs.crypto.key_manager import rewrap_sessions, verify_trusted

    with _open_for_change(settings, "key rewrap") as (root, change):
        storage, trust = change.storage, change.trust
        verify_trusted(root, storage, trust)
        count = rewrap_sessions(storage, trust, settings.unlock(storage, trust), change.clock)
    output = settings.output()
    output.line(f"rewrapped the keys of {counted(count, 'session')}")
    output.emit("rewrapped", sessions=count)


@key.command()
@click.option(
    "--new-passphrase-file", metavar="FILE", help="Read the new passphrase from this file."
)
@common_options
@click.pass_obj
def passwd(settings: Settings, new_passphrase_file: str | None) -> None:
    """Change the passphrase.

    The old one opens only copies of the repository made before."""
    from casfs.cli.key_options import ask_passphrase
    from casfs.crypto.identities import change_passphrase
    from casfs.crypto.key_manager import require_trusted_recipients

    with _open_encrypted(settings):
        pass  # asks for nothing where there is no passphrase
    source = settings.keys.with_environment().passphrase
    old = source.read() if source.is_given() else ask_passphrase("the repository, the old one")
    if old is None:
        raise UsageError(
            "there is no terminal to ask for the old passphrase: give --passphrase-file"
        )
    new = new_passphrase(PassphraseSource(file=new_passphrase_file), "--new-passphrase-file")
    with _open_for_change(settings, "key passwd") as (_, change):
        storage, trust = change.storage, change.trust
        recipients = require_trusted_recipients(storage, trust)
        change_passphrase(storage, old, new, bytes.fromhex(trust.config.id), recipients)
    output = settings.output()
    output.line("the passphrase was changed")
    output.emit("passphrase", changed=True)


@key.command()
@common_options
@click.pass_obj
def accept(settings: Settings) -> None:
    """Trust the repository and its recipients on this machine.

    This includes the lock policy of a repository in a bucket.

    With an identity, this machine also uses the repository's secret for its backups, so that it
    deduplicates with all other machines, and trusts the keys that signed the snapshots which are there now.
    After a removal of recipients on another machine, an identity is needed for that, and the machine that
    replaced the secret is printed.

    Where the list of recipients has changed, another signing key of a known host is reported and not trusted:
    a recipient that was removed may have used it. Run the command again to trust it, if the host was set up
    again.
    """
    from casfs.crypto.key_manager import KeyManager, is_list_trusted
    from casfs.crypto.key_manager import trust_current_recipients as accept_keys
    from casfs.repository.lock_policy import accept_policy
    from casfs.repository.opening import OpenOptions, open_for_reading

    place = settings.repository()
    storage = place.open_storage()
    trust = place.trust_root(storage)
    is_changed = trust.config.encryption is not None and not is_list_trusted(storage, trust)
    recipients = accept_keys(str(place), storage, trust)
    writers: list[HostKey] = []
    if trust.config.encryption is not None:
        identities = settings.keys.unlock_given(storage, trust)
        if identities:
            KeyManager.for_writing(str(place), storage, trust, identities)
            options = OpenOptions(unlock=lambda *_: identities)
            with open_for_reading(place, options) as repository:
                writers = repository.snapshots.provenance.learn_writers(is_changed)
    accept_policy(storage, trust.config)
    replaced = []
    if trust.config.encryption is not None:
        replaced = replacements(trust, trust.recipients(storage).generations)
    storage.close()
    _print_recipients(settings, "accepted", recipients)
    output = settings.output()
    for one in replaced:
        output.line(f"accepted secret {one.generation}, replaced by {machine_of(one)}")
        output.emit("secret", change="accepted", **one._asdict())
    for writer in writers:
        output.line(f"accepted the signing key {writer.key} of {_host_of(writer)}")
        output.emit("writer", change="accepted", **writer._asdict())


@contextmanager
def _open_encrypted(settings: Settings) -> Iterator[tuple[Storage, TrustRoot]]:
    """Yield the storage of the repository and its trust root; raise UsageError if it is not encrypted."""
    place = settings.repository()
    storage = place.open_storage()
    try:
        trust = place.trust_root(storage)
        _require_encryption(place, trust)
        yield storage, trust
    finally:
        storage.close()


def _require_encryption(place: Place, trust: TrustRoot) -> None:
    if trust.config.encryption is None:
        raise UsageError(
            f"the repository in {place} is not encrypted; only casfs init can make one that is"
        )


@contextmanager
def _open_for_change(settings: Settings, verb: str) -> Iterator[tuple[str, KeyChange]]:
    """Yield the name of the repository, and the repository for a change of its keys; raise LockedError."""
    from casfs.repository.key_change import open_for_key_change

    place = settings.repository()
    storage = place.open_storage()
    try:
        _require_encryption(place, place.trust_root(storage))
    finally:
        storage.close()
    with open_for_key_change(place, verb, settings.sync) as change:
        yield str(place), change


def _fields(recipient: Recipient) -> dict[str, str | None]:
    """Return a recipient as JSON fields; `age` is the key of a GPG key in age's form."""
    return {
        "kind": str(recipient.kind),
        "recipient": recipient.value,
        "age": recipient.age or None,
    }


def _host_of(writer: HostKey) -> str:
    return escape_path(writer.host.encode()) + (" (this machine)" if writer.is_own else "")


def _print_recipients(settings: Settings, what: str, recipients: Sequence[Recipient]) -> None:
    output = settings.output()
    for recipient in recipients:
        output.line(f"{what} {recipient.kind} {recipient.line}")
        output.emit("recipient", change=what, **_fields(recipient))
    if not recipients:
        output.line("nothing to do")
