"""The cipher: AES-256-GCM over the payloads of one pack, each bound to its place (FORMAT.md, "Encryption").

Every pack has a key of its own, so the offset of a payload is a nonce that is used once; the record's header
is authenticated with it. What a payload is (kind, codec, size, domain) is told inside.
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
"""What encryption adds to a payload."""


class DecryptedPayload(NamedTuple):
    """What a payload says of itself when it is decrypted; `domain` is a place in the session's domains."""

    kind: int
    codec: int
    domain: int
    plain_bytes: int
    payload: bytes


class PackCipher:
    """Encrypt and decrypt the payloads of one pack; safe to share between threads."""

    def __init__(self, session: WriteSession, salt: bytes) -> None:
        self.session = session
        self.salt = salt
        self._aead = AESGCM(session.pack_key(salt))

    @classmethod
    def new(cls, session: WriteSession) -> PackCipher:
        """Return the cipher of a pack that is to be written."""
        return cls(session, os.urandom(SALT_BYTES))

    def encrypt(
        self, offset: int, kind: int, codec: int, domain: int, plain_bytes: int, payload: bytes
    ) -> bytes:
        """Return the payload to store at `offset`."""
        inner = _INNER.pack(kind, codec, domain, plain_bytes) + payload
        header = _blob_header(len(inner) + TAG_BYTES)
        return self._aead.encrypt(_nonce(offset), inner, header)

    def decrypt(self, digest: bytes, offset: int, stored: bytes) -> DecryptedPayload:
        """Return what a stored payload holds; raises BlobError naming `digest`."""
        try:
            plain = self._aead.decrypt(_nonce(offset), stored, _blob_header(len(stored)))
        except (InvalidTag, ValueError) as error:
            raise BlobError(digest, "it does not decrypt: it was changed, or moved") from error
        if len(plain) < _INNER.size:
            raise BlobError(digest, "what is encrypted in it is too short")
        kind, codec, domain, plain_bytes = _INNER.unpack_from(plain)
        if domain >= len(self.session.domains):
            raise BlobError(digest, "it is of a domain that its session does not have")
        return DecryptedPayload(kind, codec, domain, plain_bytes, plain[_INNER.size :])

    def digest_key(self, inner: DecryptedPayload) -> bytes:
        """Return the key of the digest of a payload that was decrypted."""
        return self.session.domains[inner.domain].digest_key

    def encrypt_directory(self, offset: int, directory: bytes) -> bytes:
        """Return the directory's payload to store at `offset`."""
        header = _directory_header(len(directory) + TAG_BYTES)
        return self._aead.encrypt(_nonce(offset), directory, header)

    def decrypt_directory(self, pack: PackId, offset: int, stored: bytes) -> bytes:
        """Return the directory; raises PackError."""
        try:
            return self._aead.decrypt(_nonce(offset), stored, _directory_header(len(stored)))
        except (InvalidTag, ValueError) as error:
            raise PackError(pack, "its directory does not decrypt") from error


def encrypt_snapshot(session: WriteSession, salt: bytes, plain: bytes, header: bytes) -> bytes:
    """Return a snapshot's payload; all that stands before it is authenticated with it."""
    return AESGCM(session.snapshot_key(salt)).encrypt(_nonce(0), plain, header)


def decrypt_snapshot(session: WriteSession, salt: bytes, stored: bytes, header: bytes) -> bytes:
    """Return what is in a snapshot's payload; raises BlobError."""
    try:
        return AESGCM(session.snapshot_key(salt)).decrypt(_nonce(0), stored, header)
    except (InvalidTag, ValueError) as error:
        raise BlobError(b"", "it does not decrypt: it was changed") from error


def _nonce(offset: int) -> bytes:
    return offset.to_bytes(12, "little")


def _blob_header(stored_bytes: int) -> bytes:
    return encode_record_header(ENCRYPTED_KIND, ENCRYPTED, stored_bytes, 0)


def _directory_header(stored_bytes: int) -> bytes:
    return encode_record_header(DIRECTORY_KIND, ENCRYPTED, stored_bytes, 0)
