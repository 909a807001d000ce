"""Digests: BLAKE3-256 of plaintext, and the readable forms of one.

A blob's digest is keyed where the repository is encrypted; the digest of a whole file is always the
plain one, so that `b3sum` agrees with it.
"""

from __future__ import annotations

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
    """Return the BLAKE3-256 of `data` with a key of 32 bytes, the plain one without."""
    return Digest(blake3(data).digest() if key is None else blake3(data, key=key).digest())


def short_id(digest: bytes) -> str:
    """Return the beginning of a digest in hexadecimal, as people are shown it."""
    return digest.hex()[:SHOWN_HEX_DIGITS]


def update_zeros(whole: blake3, length: int) -> None:
    """Digest a hole of `length` bytes as the zeros that reading it would give."""
    view = memoryview(_ZEROS)
    while length > 0:
        part = min(length, len(_ZEROS))
        whole.update(view[:part])
        length -= part
