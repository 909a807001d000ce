"""Passphrases: an age identity encrypted with a key that Argon2id derives from a passphrase.

A repository with a passphrase is still written to with public keys, so a backup never asks for it.
"""

from __future__ import annotations

import hmac
import os

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from casfs.crypto import age
from casfs.errors import SessionError, WrongKeyError
from casfs.json_document import InvalidJsonError, parse_json

_ITERATIONS = 3
_LANES = 4
_MEMORY_KIB = 64 * 1024
"""The second recommended option of RFC 9106, section 4."""

_MOST_ITERATIONS = 64
_MOST_LANES = 64
_MOST_MEMORY_KIB = 1 << 20
"""Limits of the work that a reader does for a file that may be hostile."""

_LEAST_MEMORY_KIB = 64 * 1024
"""The least memory that a reader accepts: a hostile file must not make guesses of the passphrase cheap."""

_MAX_WRAPPED_BYTES = 128
"""Of an identity (74 bytes) with its tag: AES-GCM does not commit to its key, so a long ciphertext could
decrypt under many keys and test as many guesses at once."""

_COMMITMENT = "casfs 2026-11-28 identity commitment"

_FORM = "identity 1"


class WrappedIdentity(msgspec.Struct, frozen=True):
    """An encrypted identity as stored in the repository; `recipient` is its public half."""

    casfs: str
    recipient: str
    kdf: str
    iterations: int
    lanes: int
    memory_kib: int
    salt: bytes
    nonce: bytes
    wrapped: bytes
    commitment: bytes = b""
    """A digest of the encryption key; empty in a file of an earlier version."""


def wrap_identity(identity: str, recipient: str, passphrase: str, repository: bytes) -> bytes:
    """Return the file of an identity that the passphrase decrypts, in this repository only."""
    wrapped = WrappedIdentity(
        _FORM,
        recipient,
        "argon2id",
        _ITERATIONS,
        _LANES,
        _MEMORY_KIB,
        os.urandom(16),
        os.urandom(12),
        b"",
    )
    key = _derive(wrapped, passphrase)
    ciphertext = AESGCM(key).encrypt(wrapped.nonce, identity.encode(), _bound(wrapped, repository))
    complete = msgspec.structs.replace(wrapped, wrapped=ciphertext, commitment=_commitment(key))
    return msgspec.json.encode(complete) + b"\n"


def parse_wrapped(data: bytes, name: str) -> WrappedIdentity:
    """Parse a file of `wrap_identity`; raise SessionError for an invalid file."""
    try:
        wrapped = parse_json(data, WrappedIdentity)
    except InvalidJsonError as error:
        raise SessionError(f"{name} cannot be parsed: {error}") from error
    if wrapped.casfs != _FORM or wrapped.kdf != "argon2id":
        raise SessionError(f"{name} has an unsupported format; use a newer casfs")
    if not (
        1 <= wrapped.iterations <= _MOST_ITERATIONS
        and 1 <= wrapped.lanes <= _MOST_LANES
        and max(8 * wrapped.lanes, _LEAST_MEMORY_KIB) <= wrapped.memory_kib <= _MOST_MEMORY_KIB
        and len(wrapped.salt) == 16
        and len(wrapped.nonce) == 12
        and len(wrapped.wrapped) <= _MAX_WRAPPED_BYTES
    ):
        raise SessionError(f"{name} has parameters beyond the limits of casfs")
    return wrapped


def unwrap_identity(wrapped: WrappedIdentity, passphrase: str, repository: bytes) -> str:
    """Return the identity's secret line; raise WrongKeyError for a wrong passphrase.

    An identity whose public half is not the recorded one counts as a wrong passphrase too.
    """
    key = _derive(wrapped, passphrase)
    if wrapped.commitment and not hmac.compare_digest(wrapped.commitment, _commitment(key)):
        raise WrongKeyError("the passphrase is wrong")
    try:
        plain = AESGCM(key).decrypt(wrapped.nonce, wrapped.wrapped, _bound(wrapped, repository))
        identity = plain.decode("ascii")
        if age.public_half(identity) == wrapped.recipient:
            return identity
    except (InvalidTag, UnicodeDecodeError) as error:
        raise WrongKeyError("the passphrase is wrong") from error
    raise WrongKeyError("the passphrase is wrong")


def _commitment(key: bytes) -> bytes:
    return blake3(key, derive_key_context=_COMMITMENT).digest()


def _derive(wrapped: WrappedIdentity, passphrase: str) -> bytes:
    kdf = Argon2id(
        salt=wrapped.salt,
        length=32,
        iterations=wrapped.iterations,
        lanes=wrapped.lanes,
        memory_cost=wrapped.memory_kib,
    )
    # A terminal may return bytes that are not valid text.
    return kdf.derive(passphrase.encode("utf-8", "surrogateescape"))


def _bound(wrapped: WrappedIdentity, repository: bytes) -> bytes:
    return repository + wrapped.recipient.encode()
