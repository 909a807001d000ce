"""The identities and passphrases that open an encrypted repository, as the user named them.

Secrets are never arguments or environment variables: those name the file, the descriptor or the command
that a secret is read from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.errors import CasfsError, StorageError, UsageError, WrongKeyError

if TYPE_CHECKING:
    from casfs.config.repositories import NamedRepository
    from casfs.crypto.age import AgeIdentity
    from casfs.crypto.identities import Identities
    from casfs.crypto.opening import Unlock
    from casfs.crypto.recipients import Recipient
    from casfs.crypto.trust_root import TrustRoot
    from casfs.repository.place import Place
    from casfs.storage.base import Storage

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
    from casfs.crypto.process_protection import forbid_inspection
    from casfs.repository.key_objects import fetch_key_objects
    from casfs.repository.place import LocalPlace

    storage: Storage
    if isinstance(place, LocalPlace):
        storage = place.open_storage()
    else:
        storage = fetch_key_objects(place)
    try:
        trust = place.trust_root(storage)
        if trust.config.encryption is None:
            return None
        forbid_inspection()
        return unlock(storage, trust)
    finally:
        storage.close()


def ask_passphrase(what: str) -> str | None:
    """Ask for a passphrase at the terminal; return None if standard input is no terminal."""
    import getpass

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


def _run_passphrase_command(command: str) -> bytes:
    import shlex
    import subprocess

    try:
        words = shlex.split(command)
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError, IndexError) as error:
        raise CasfsError(f"the passphrase command cannot be run: {error}") from error
    if done.returncode:
        raise CasfsError(f"the passphrase command failed with exit code {done.returncode}")
    return done.stdout[:_MAX_PASSPHRASE_BYTES]
