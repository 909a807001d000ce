"""Compute BLAKE3-256 digests of plaintext, and format them for display.

The digest of a blob is keyed in an encrypted repository. The digest of a whole file is always plain, so that
`b3sum` computes the same.
"""

from __future__ import annotations

import os
from typing import NewType

from blake3 import blake3

Digest = NewType("Digest", bytes)
PackId = NewType("PackId", bytes)
SnapshotId = NewType("SnapshotId", bytes)

DIGEST_BYTES = 32
SHOWN_HEX_DIGITS = 12

EMPTY_DIGEST = Digest(blake3(b"").digest())

_ZEROS = bytes(1 << 20)


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """Return the plain BLAKE3-256 of `data`."""
    return Digest(blake3(data).digest())


def keyed_digest(data: bytes | bytearray | memoryview, key: bytes | None) -> Digest:
    """Return the BLAKE3-256 of `data`, keyed with a key of 32 bytes, or plain without a key."""
    return Digest(blake3(data).digest() if key is None else blake3(data, key=key).digest())


def codes_equal(code: str, expected: str) -> bool:
    """Return whether two authentication codes are equal; the time that it takes reveals nothing of them.

    Their digests under a random key are compared. `hmac.compare_digest` would load OpenSSL, which most
    commands do not need.
    """
    key = os.urandom(DIGEST_BYTES)
    first, second = (keyed_digest(text.encode(), key) for text in (code, expected))
    return first == second


def short_id(digest: bytes) -> str:
    """Return the first 12 hexadecimal digits of a digest, for display."""
    return digest.hex()[:SHOWN_HEX_DIGITS]


def update_zeros(whole: blake3, length: int) -> None:
    """Update a digest with `length` zero bytes, as a hole reads."""
    view = memoryview(_ZEROS)
    while length > 0:
        part = min(length, len(_ZEROS))
        whole.update(view[:part])
        length -= part
