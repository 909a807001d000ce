"""Signatures of snapshots: Ed25519, by the machine that made a snapshot and by the one that published it.

A recipient of an encrypted repository, also a former one, knows its secrets and could publish a snapshot in
the name of any machine. So each machine signs (FORMAT.md, "Signatures"). The *author* is the machine that
made the backup. Its signature covers everything except the tags and the replaced snapshot, and stays valid
when another machine changes the tags. The *publisher* is the machine that wrote the file; its signature
covers everything. A machine also signs that it replaced the repository's own domain (`format/generation.py`).

Values are immutable; threads may share them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from casfs.digest import digest_of
from casfs.errors import BlobError

SEED_BYTES = 32
AUTHOR_CONTEXT = b"casfs 2026-11-28 snapshot author\0"
PUBLISHER_CONTEXT = b"casfs 2026-11-28 snapshot publisher\0"
GENERATION_CONTEXT = b"casfs 2026-11-28 generation\0"

_BLOCK = struct.Struct("<32s64s32s64s")
BLOCK_BYTES = _BLOCK.size

_CHANGEABLE = ("tags", "replaces")
"""The fields that the author's signature does not cover."""


@dataclass(frozen=True, slots=True)
class Author:
    """The machine that made a backup: its public key, and its signature of the snapshot's lasting fields."""

    key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Signers:
    """The verified signatures of a snapshot: its author, and the public key of its publisher."""

    author: Author
    publisher: bytes


class SigningKey:
    """The signing key of a machine, in one repository; `seed` is SEED_BYTES of secret."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def author_of(self, repository: bytes, plain: bytes) -> Author:
        """Return this machine as the author of a snapshot, whose msgpack map is `plain`."""
        return Author(self.public, self._key.sign(_author_message(repository, plain)))

    def encode_block(self, author: Author, repository: bytes, signed: bytes) -> bytes:
        """Return the BLOCK_BYTES of both signatures; this machine publishes the bytes `signed`."""
        message = _publisher_message(repository, author, self.public, signed)
        return _BLOCK.pack(author.key, author.signature, self.public, self._key.sign(message))

    def sign_generation(self, repository: bytes, record: bytes) -> bytes:
        """Return this machine's signature of the record of a new dedup domain."""
        return self._key.sign(_generation_message(repository, record))


def verify_block(block: bytes, repository: bytes, signed: bytes, plain: bytes) -> Signers:
    """Return who signed a snapshot; raise BlobError where a signature does not match.

    `signed` are the bytes that the publisher signed, `plain` is the snapshot's msgpack map.
    """
    author_key, author_signature, publisher, signature = _BLOCK.unpack(block)
    author = Author(author_key, author_signature)
    message = _publisher_message(repository, author, publisher, signed)
    try:
        Ed25519PublicKey.from_public_bytes(publisher).verify(signature, message)
        message = _author_message(repository, plain)
        Ed25519PublicKey.from_public_bytes(author_key).verify(author_signature, message)
    except (InvalidSignature, ValueError) as error:
        raise BlobError(b"", "its signature does not match") from error
    return Signers(author, publisher)


def has_signed_generation(key: bytes, signature: bytes, repository: bytes, record: bytes) -> bool:
    """Return whether the owner of a public key signed the record of a new dedup domain."""
    try:
        verifier = Ed25519PublicKey.from_public_bytes(key)
        verifier.verify(signature, _generation_message(repository, record))
    except (InvalidSignature, ValueError):
        return False
    return True


def _generation_message(repository: bytes, record: bytes) -> bytes:
    return GENERATION_CONTEXT + repository + digest_of(record)


def _publisher_message(repository: bytes, author: Author, publisher: bytes, signed: bytes) -> bytes:
    parts = (repository, author.key, author.signature, publisher, digest_of(signed))
    return PUBLISHER_CONTEXT + b"".join(parts)


def _author_message(repository: bytes, plain: bytes) -> bytes:
    """Return the message that an author signs; raise msgspec.DecodeError."""
    fields: dict[str, Any] = msgspec.msgpack.decode(plain, type=dict[str, Any])
    for name in _CHANGEABLE:
        fields.pop(name, None)
    return AUTHOR_CONTEXT + repository + digest_of(msgspec.msgpack.encode(fields))
