"""Passphrases: an age identity encrypted with a key that Argon2id derives from a passphrase.

A repository with a passphrase is still written to with public keys, so a backup never asks for it.
"""

from __future__ import annotations

import os

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from casfs.errors import SessionError, WrongKeyError

_ITERATIONS = 3
_LANES = 4
_MEMORY_KIB = 64 * 1024
"""The second recommended option of RFC 9106, section 4."""

_MOST_ITERATIONS = 64
_MOST_LANES = 64
_MOST_MEMORY_KIB = 1 << 20
"""Limits of the work that a reader does for a file that may be hostile."""

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
    ciphertext = _aead(wrapped, passphrase).encrypt(
        wrapped.nonce, identity.encode(), _bound(wrapped, repository)
    )
    return msgspec.json.encode(msgspec.structs.replace(wrapped, wrapped=ciphertext)) + b"\n"


def parse_wrapped(data: bytes, name: str) -> WrappedIdentity:
    """Parse a file of `wrap_identity`; raise SessionError for an invalid file."""
    try:
        wrapped = msgspec.json.decode(data, type=WrappedIdentity)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SessionError(f"{name} cannot be parsed: {error}") from error
    if wrapped.casfs != _FORM or wrapped.kdf != "argon2id":
        raise SessionError(f"{name} has an unsupported format; use a newer casfs")
    if not (
        1 <= wrapped.iterations <= _MOST_ITERATIONS
        and 1 <= wrapped.lanes <= _MOST_LANES
        and 8 * wrapped.lanes <= wrapped.memory_kib <= _MOST_MEMORY_KIB
        and len(wrapped.salt) == 16
        and len(wrapped.nonce) == 12
        and len(wrapped.wrapped) <= 4096
    ):
        raise SessionError(f"{name} has parameters beyond the limits of casfs")
    return wrapped


def unwrap_identity(wrapped: WrappedIdentity, passphrase: str, repository: bytes) -> str:
    """Return the identity's secret line; raise WrongKeyError for a wrong passphrase."""
    try:
        plain = _aead(wrapped, passphrase).decrypt(
            wrapped.nonce, wrapped.wrapped, _bound(wrapped, repository)
        )
    except InvalidTag as error:
        raise WrongKeyError("the passphrase is wrong") from error
    return plain.decode("ascii")


def _aead(wrapped: WrappedIdentity, passphrase: str) -> AESGCM:
    kdf = Argon2id(
        salt=wrapped.salt,
        length=32,
        iterations=wrapped.iterations,
        lanes=wrapped.lanes,
        memory_cost=wrapped.memory_kib,
    )
    # A terminal may return bytes that are not valid text.
    return AESGCM(kdf.derive(passphrase.encode("utf-8", "surrogateescape")))


def _bound(wrapped: WrappedIdentity, repository: bytes) -> bytes:
    return repository + wrapped.recipient.encode()
