"""age: encryption to public keys and decryption with identities. The only module that imports pyrage.

Recipients are X25519 (`age1…`) and SSH public keys. An identity is the private key of a recipient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NewType, cast

import pyrage
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from casfs.errors import KeyMissingError, SessionError, WrongKeyError

AgeIdentity = NewType("AgeIdentity", object)
"""An identity in memory; it is never printed."""

AskPassphrase = Callable[[str], str | None]
"""Returns the passphrase for a named file, or None if no user can be asked."""

MAX_RECIPIENTS = 100
"""The most recipients of an age file: a reader spends some 30 ms on each."""

_MAX_STANZAS = MAX_RECIPIENTS + 1
"""age adds a stanza of random data to every file."""

_MAX_HEADER_BYTES = 256 * 1024
_SSH = re.compile(r"ssh-(ed25519|rsa) +\S+")
_BINARY, _ARMOR = b"age-encryption.org/", b"-----BEGIN AGE ENCRYPTED FILE-----"
_ENCRYPTED_FILE = (_BINARY, _ARMOR)


def canonical_recipient(text: str) -> str:
    """Return a recipient without its comment; raise WrongKeyError for an invalid recipient."""
    ssh = _SSH.match(text)
    key = " ".join(ssh[0].split()) if ssh is not None else text.strip()
    _recipient(key)
    return key


def new_identity() -> tuple[str, str]:
    """Return a new X25519 identity as its secret line, and its recipient."""
    identity = pyrage.x25519.Identity.generate()
    return str(identity), str(identity.to_public())


def identity_from_line(line: str) -> AgeIdentity:
    """Return the identity of an `AGE-SECRET-KEY-1…` line; raise WrongKeyError."""
    try:
        return AgeIdentity(pyrage.x25519.Identity.from_str(line))
    except pyrage.IdentityError as error:
        raise WrongKeyError("not an age identity") from error


def public_half(line: str) -> str:
    """Return the recipient of an `AGE-SECRET-KEY-1…` line; raise WrongKeyError."""
    try:
        return str(pyrage.x25519.Identity.from_str(line).to_public())
    except pyrage.IdentityError as error:
        raise WrongKeyError("not an age identity") from error


def identities_of_file(data: bytes, name: str, ask: AskPassphrase) -> list[AgeIdentity]:
    """Return the identities in a file's bytes: age identities, encrypted or not, or a private SSH key.

    `name` is the file's name in errors and prompts. Raise WrongKeyError, and KeyMissingError where a
    passphrase is needed and no user can be asked.
    """
    if data.startswith(_ENCRYPTED_FILE):
        data = _decrypted_file(data, name, ask)
    if b"PRIVATE KEY-----" in data[:100]:
        return [_ssh_identity(data, name, ask)]
    found = []
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise WrongKeyError(f"{name} is not an identity file: it is not text") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            found.append(identity_from_line(line.strip()))
        except WrongKeyError as error:
            raise WrongKeyError(f"{name}, line {number}: {error}") from error
    if not found:
        raise WrongKeyError(f"{name} contains no identity")
    return found


def wrap(data: bytes, recipients: Sequence[str]) -> bytes:
    """Return an age file that each of the recipients can decrypt; raise WrongKeyError for too many."""
    if len(recipients) > MAX_RECIPIENTS:
        raise WrongKeyError(
            f"there are {len(recipients)} recipients; the limit is {MAX_RECIPIENTS}, since a reader tries "
            "its identities on each"
        )
    return cast(bytes, pyrage.encrypt(data, [_recipient(text) for text in recipients]))


def unwrap(data: bytes, identities: Sequence[AgeIdentity]) -> bytes:
    """Return the plaintext of an age file; raise KeyMissingError where no identity decrypts it.

    Raise SessionError for a file that is encrypted to more recipients than casfs writes: each costs work.
    """
    if data.startswith(_ARMOR):
        raise SessionError("an age file is armored, which casfs never writes")
    header, end, _ = data[:_MAX_HEADER_BYTES].partition(b"\n---")
    is_long = not end and len(data) > _MAX_HEADER_BYTES and data.startswith(_BINARY)
    if is_long or header.count(b"\n-> ") > _MAX_STANZAS:
        raise SessionError(f"an age file has more than {MAX_RECIPIENTS} recipients")
    try:
        return cast(bytes, pyrage.decrypt(data, list(identities)))
    except pyrage.DecryptError as error:
        raise KeyMissingError(str(error)) from error


def _recipient(text: str) -> object:
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return cast(object, kind.Recipient.from_str(text))
    except pyrage.RecipientError as error:
        raise WrongKeyError(f"{text[:80]!r} is not a recipient: {error}") from error


def _decrypted_file(data: bytes, name: str, ask: AskPassphrase) -> bytes:
    passphrase = _ask_passphrase(name, ask)
    if data.startswith(b"-----"):
        raise WrongKeyError(f"{name} is an armored file; decrypt it with age and pass the result")
    try:
        return cast(bytes, pyrage.passphrase.decrypt(data, passphrase))
    except (pyrage.DecryptError, UnicodeEncodeError) as error:
        raise WrongKeyError(f"the passphrase of {name} is wrong") from error


def _ssh_identity(data: bytes, name: str, ask: AskPassphrase) -> AgeIdentity:
    try:
        key = serialization.load_ssh_private_key(data, None)
    except TypeError:
        passphrase = _ask_passphrase(name, ask)
        try:
            key = serialization.load_ssh_private_key(
                data, passphrase.encode("utf-8", "surrogateescape")
            )
        except ValueError as error:
            raise WrongKeyError(f"the passphrase of {name} is wrong") from error
        except UnsupportedAlgorithm as error:
            raise WrongKeyError(f"{name} is not a usable SSH key: {error}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise WrongKeyError(f"{name} is not a usable SSH key: {error}") from error
    plain = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        return AgeIdentity(pyrage.ssh.Identity.from_buffer(plain))
    except pyrage.IdentityError as error:
        raise WrongKeyError(f"{name} is not an SSH key that age can use: {error}") from error


def _ask_passphrase(name: str, ask: AskPassphrase) -> str:
    passphrase = ask(name)
    if passphrase is None:
        raise KeyMissingError(f"{name} needs a passphrase, and there is no terminal to ask for it")
    return passphrase
