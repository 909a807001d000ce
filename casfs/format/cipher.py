"""The cipher: AES-256-GCM over the payloads of one pack, each bound to its offset (FORMAT.md, "Encryption").

Every pack has its own key, so a payload's offset is a nonce that is used once. The record header is
authenticated with the payload. Kind, codec, size and domain of a blob are inside the ciphertext.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from casfs.digest import PackId
from casfs.errors import BlobError, PackError
from casfs.format.codec import ENCRYPTED, TAG_BYTES
from casfs.format.key_derivation import SALT_BYTES, WriteSession
from casfs.format.pack import (
    DIRECTORY_KIND,
    ENCRYPTED_KIND,
    encode_record_header,
)

_INNER = struct.Struct("<BBHI")
assert _INNER.size == 8

OVERHEAD_BYTES = TAG_BYTES + _INNER.size
"""The bytes that encryption adds to a payload."""


class DecryptedPayload(NamedTuple):
    """A decrypted payload with its inner header; `domain` is an index into the session's domains."""

    kind: int
    codec: int
    domain: int
    plain_bytes: int
    payload: bytes


class PackCipher:
    """Encrypts and decrypts the payloads of one pack. Threads may share it."""

    def __init__(self, session: WriteSession, salt: bytes) -> None:
        self.session = session
        self.salt = salt
        self._aead = AESGCM(session.pack_key(salt))

    @classmethod
    def new(cls, session: WriteSession) -> PackCipher:
        """Return the cipher of a new pack, with a random salt."""
        return cls(session, os.urandom(SALT_BYTES))

    def encrypt(
        self, offset: int, kind: int, codec: int, domain: int, plain_bytes: int, payload: bytes
    ) -> bytes:
        """Return the encrypted payload to store at `offset`."""
        inner = _INNER.pack(kind, codec, domain, plain_bytes) + payload
        header = _blob_header(len(inner) + TAG_BYTES)
        return self._aead.encrypt(_nonce(offset), inner, header)

    def decrypt(self, digest: bytes, offset: int, stored: bytes) -> DecryptedPayload:
        """Return the contents of a stored payload; raise BlobError for `digest`."""
        try:
            plain = self._aead.decrypt(_nonce(offset), stored, _blob_header(len(stored)))
        except (InvalidTag, ValueError) as error:
            raise BlobError(digest, "decryption failed: its bytes were changed or moved") from error
        if len(plain) < _INNER.size:
            raise BlobError(digest, "its decrypted payload is too short")
        kind, codec, domain, plain_bytes = _INNER.unpack_from(plain)
        if domain >= len(self.session.domains):
            raise BlobError(digest, "its domain is not in its session")
        return DecryptedPayload(kind, codec, domain, plain_bytes, plain[_INNER.size :])

    def digest_key(self, inner: DecryptedPayload) -> bytes:
        """Return the key of a decrypted payload's digest."""
        return self.session.domains[inner.domain].digest_key

    def encrypt_directory(self, offset: int, directory: bytes) -> bytes:
        """Return the encrypted directory payload to store at `offset`."""
        header = _directory_header(len(directory) + TAG_BYTES)
        return self._aead.encrypt(_nonce(offset), directory, header)

    def decrypt_directory(self, pack: PackId, offset: int, stored: bytes) -> bytes:
        """Return the decrypted directory; raise PackError."""
        try:
            return self._aead.decrypt(_nonce(offset), stored, _directory_header(len(stored)))
        except (InvalidTag, ValueError) as error:
            raise PackError(pack, "directory decryption failed") from error


def encrypt_snapshot(session: WriteSession, salt: bytes, plain: bytes, header: bytes) -> bytes:
    """Return a snapshot's encrypted payload; `header`, all bytes before it, is authenticated with it."""
    return AESGCM(session.snapshot_key(salt)).encrypt(_nonce(0), plain, header)


def decrypt_snapshot(session: WriteSession, salt: bytes, stored: bytes, header: bytes) -> bytes:
    """Return a snapshot's decrypted payload; raise BlobError."""
    try:
        return AESGCM(session.snapshot_key(salt)).decrypt(_nonce(0), stored, header)
    except (InvalidTag, ValueError) as error:
        raise BlobError(b"", "decryption failed: its bytes were changed") from error


def encrypt_delta(session: WriteSession, salt: bytes, plain: bytes, header: bytes) -> bytes:
    """Return an index delta's encrypted body; `header`, all bytes before it, is authenticated with it."""
    return AESGCM(session.delta_key(salt)).encrypt(_nonce(0), plain, header)


def decrypt_delta(
    session: WriteSession, salt: bytes, stored: bytes | memoryview, header: bytes
) -> bytes:
    """Return an index delta's decrypted body; raise BlobError."""
    try:
        return AESGCM(session.delta_key(salt)).decrypt(_nonce(0), stored, header)
    except (InvalidTag, ValueError) as error:
        raise BlobError(b"", "decryption failed: its bytes were changed") from error


def _nonce(offset: int) -> bytes:
    return offset.to_bytes(12, "little")


def _blob_header(stored_bytes: int) -> bytes:
    return encode_record_header(ENCRYPTED_KIND, ENCRYPTED, stored_bytes, 0)


def _directory_header(stored_bytes: int) -> bytes:
    return encode_record_header(DIRECTORY_KIND, ENCRYPTED, stored_bytes, 0)
