"""Identities that decrypt write sessions: from files, from a passphrase, and from GPG's agent."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from casfs.crypto import age, gpg
from casfs.crypto.age import AgeIdentity, AskPassphrase
from casfs.crypto.passphrase import WrappedIdentity, parse_wrapped, unwrap_identity, wrap_identity
from casfs.crypto.recipients import Recipient, RecipientKind
from casfs.digest import digest_of
from casfs.display import escape_path
from casfs.errors import KeyMissingError, NotFoundError, SessionError, StorageError, WrongKeyError
from casfs.storage.base import Storage

log = logging.getLogger(__name__)

IDENTITIES = "identities"
MAX_TRIES = 16
"""The most identities that one passphrase is tried on: each costs some 0.1 s and 64 MiB."""

_MAX_FILE_BYTES = 1 << 20
MAX_FILES = 1000
MAX_FILES_BYTES = 16 << 20
"""Limits of the identities in the storage: a writer with create-only credentials could add any number."""


@dataclass(slots=True)
class Identities:
    """Unlocked identities: age identities, and whether GPG may be called for each session."""

    ages: list[AgeIdentity] = field(default_factory=list)
    use_gpg: bool = False

    def __bool__(self) -> bool:
        return bool(self.ages) or self.use_gpg

    def __repr__(self) -> str:
        return f"Identities({len(self.ages)}, use_gpg={self.use_gpg})"


def read_identity_file(path: Path, ask: AskPassphrase) -> list[AgeIdentity]:
    """Return the identities in a file; raise WrongKeyError, KeyMissingError and StorageError.

    Warn where other users can read it, but use it: not every file system has modes that can be changed.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES)
            st = os.fstat(file.fileno())
    except OSError as error:
        raise StorageError("read the identity file", str(path), error) from error
    found = age.identities_of_file(data, str(path), ask)
    if stat.S_ISREG(st.st_mode) and st.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning(
            "other users can read the identity file %s, and with it the repository: chmod 600 it",
            escape_path(os.fsencode(path)),
        )
    return found


def unlock_by_passphrase(
    storage: Storage, repository: bytes, passphrase: str, recipients: Sequence[Recipient]
) -> list[AgeIdentity]:
    """Return the identities of the recipients that a passphrase decrypts.

    Other files in the storage are not tried: each try would reveal to the storage something about the
    passphrase. Raise WrongKeyError if there are none.
    """
    found = []
    wrapped = wrapped_identities(storage, recipients)
    for _, one in wrapped:
        try:
            line = unwrap_identity(one, passphrase, repository)
        except WrongKeyError:
            continue
        found.append(age.identity_from_line(line))
    if not wrapped:
        raise WrongKeyError("the repository has no passphrase; give --identity FILE")
    if not found:
        raise WrongKeyError("the passphrase is wrong")
    return found


def unlock_by_gpg(storage: Storage, recipients: Sequence[Recipient]) -> Identities:
    """Return the identities that the user's GPG keys decrypt.

    One GPG operation if the repository has such recipients.
    """
    own = [
        one for one in recipients if one.kind == RecipientKind.GPG and gpg.has_secret_key(one.value)
    ]
    if not own:
        return Identities()
    for name, data in _files(storage, "gpg"):
        try:
            return Identities([age.identity_from_line(gpg.unwrap(data).decode("ascii").strip())])
        except (KeyMissingError, WrongKeyError, UnicodeDecodeError) as error:
            log.info("%s: %s", name, error)
    return Identities(use_gpg=True)


def wrapped_identities(
    storage: Storage, recipients: Sequence[Recipient]
) -> list[tuple[str, WrappedIdentity]]:
    """Return the identities of recipients that are encrypted with a passphrase, with their files' names.

    Raise WrongKeyError where there are more than a reader tries.
    """
    listed = {one.value for one in recipients if one.kind == RecipientKind.PASSPHRASE}
    found = []
    for name, data in _files(storage, "json"):
        try:
            wrapped = parse_wrapped(data, name)
        except SessionError as error:
            log.warning("%s", error)
            continue
        if wrapped.recipient in listed:
            found.append((name, wrapped))
        else:
            log.warning("%s belongs to no recipient of the repository; it is not tried", name)
    if len(found) > MAX_TRIES:
        raise WrongKeyError(
            f"the repository has {len(found)} identities with a passphrase, more than the {MAX_TRIES} that "
            "are tried; give --identity FILE"
        )
    return found


def add_passphrase(storage: Storage, passphrase: str, repository: bytes) -> Recipient:
    """Create an identity encrypted with a passphrase, store it durably, and return its recipient."""
    secret, public = age.new_identity()
    write_identity(storage, wrap_identity(secret, public, passphrase, repository), "json")
    return Recipient(RecipientKind.PASSPHRASE, public)


def add_gpg(storage: Storage, recipient: Recipient) -> Recipient:
    """Create an identity encrypted with a GPG key, store it durably, and return the completed recipient.

    With this identity a reader calls GPG once instead of once a session.
    """
    secret, public = age.new_identity()
    write_identity(storage, gpg.wrap(secret.encode() + b"\n", [recipient.key]), "gpg")
    return Recipient(recipient.kind, recipient.value, public, recipient.key)


def change_passphrase(
    storage: Storage, old: str, new: str, repository: bytes, recipients: Sequence[Recipient]
) -> int:
    """Encrypt the identities of the old passphrase with the new one; return their number.

    The new files are durable before the old ones are deleted. Raise WrongKeyError where the old passphrase
    decrypts none.
    """
    changed = 0
    for name, one in wrapped_identities(storage, recipients):
        try:
            secret = unwrap_identity(one, old, repository)
        except WrongKeyError:
            continue
        write_identity(storage, wrap_identity(secret, one.recipient, new, repository), "json")
        storage.delete(name)
        changed += 1
    if not changed:
        raise WrongKeyError("the old passphrase is wrong; nothing was changed")
    return changed


def write_identity(storage: Storage, data: bytes, suffix: str) -> None:
    """Store an encrypted identity durably under the digest of its bytes."""
    storage.write(f"{IDENTITIES}/{digest_of(data).hex()}.{suffix}", data)


def _files(storage: Storage, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield the intact files with a suffix; raise WrongKeyError where there are more than are read."""
    total_bytes = 0
    for number, (name, size, _) in enumerate(storage.list(IDENTITIES)):
        total_bytes += min(size, _MAX_FILE_BYTES)
        if number >= MAX_FILES or total_bytes > MAX_FILES_BYTES:
            raise WrongKeyError(
                f"the repository has more than {MAX_FILES} identities, or more than {MAX_FILES_BYTES >> 20} "
                f"MiB of them; remove those below {IDENTITIES}/ that no machine of yours has written, or "
                "give --identity FILE"
            )
        if not name.endswith(f".{suffix}"):
            continue
        try:
            data = storage.read(name, 0, _MAX_FILE_BYTES)
        except NotFoundError:
            continue
        if digest_of(data).hex() != name.rpartition("/")[2].partition(".")[0]:
            log.warning("%s is damaged: digest mismatch", name)
            continue
        yield name, data
