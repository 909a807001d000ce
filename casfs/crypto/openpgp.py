"""OpenPGP: the fingerprint of an exported public key, recomputed from its bytes without GnuPG.

The list of recipients names a GPG key by its fingerprint and contains the exported key. Only a fingerprint
that follows from the key proves that the two belong together (RFC 9580, sections 4.2 and 5.5.4). GnuPG
itself verifies that the primary key signed its encryption subkeys.
"""

from __future__ import annotations

import hashlib

from casfs.errors import WrongKeyError

MAX_KEY_BYTES = 256 * 1024
"""The largest exported key that is accepted: a minimal export has a few kilobytes."""

_PUBLIC_KEY = 6
_ALLOWED = frozenset([2, _PUBLIC_KEY, 13, 14, 17])
"""Signature, public key, user id, public subkey and user attribute."""


def fingerprint(key: bytes) -> str:
    """Return the fingerprint of the only public key in `key`, as uppercase hexadecimal digits.

    Raise WrongKeyError for bytes that are not one binary exported public key.
    """
    if len(key) > MAX_KEY_BYTES:
        raise WrongKeyError("the OpenPGP key is too large")
    found: bytes | None = None
    offset = 0
    while offset < len(key):
        tag, begin, end = _packet(key, offset)
        if tag not in _ALLOWED or (tag == _PUBLIC_KEY) != (offset == 0):
            raise WrongKeyError("the OpenPGP data is not one exported public key")
        if tag == _PUBLIC_KEY:
            found = key[begin:end]
        offset = end
    if not found:
        raise WrongKeyError("the OpenPGP data contains no public key")
    version = found[0]
    if version == 4 and len(found) < 1 << 16:
        body = b"\x99" + len(found).to_bytes(2, "big") + found
        return hashlib.sha1(body, usedforsecurity=False).hexdigest().upper()
    if version in (5, 6):
        start = b"\x9a" if version == 5 else b"\x9b"
        body = start + len(found).to_bytes(4, "big") + found
        return hashlib.sha256(body).hexdigest().upper()
    if version == 4:
        raise WrongKeyError("the OpenPGP key is too large")
    raise WrongKeyError(f"the OpenPGP key has version {version}, which casfs does not support")


def _packet(data: bytes, offset: int) -> tuple[int, int, int]:
    """Return the tag of the packet at an offset, and where its body begins and ends.

    Raise WrongKeyError for a packet that is cut off or has no definite length.
    """
    try:
        head = data[offset]
        if head & 0xC0 == 0xC0:
            tag = head & 0x3F
            first = data[offset + 1]
            if first < 192:
                length, begin = first, offset + 2
            elif first < 224:
                length, begin = ((first - 192) << 8) + data[offset + 2] + 192, offset + 3
            elif first == 255:
                length, begin = int.from_bytes(data[offset + 2 : offset + 6], "big"), offset + 6
            else:
                raise WrongKeyError("an OpenPGP packet has no definite length")
        elif head & 0x80 and head & 3 != 3:
            tag, width = (head >> 2) & 0x0F, 1 << (head & 3)
            begin = offset + 1 + width
            length = int.from_bytes(data[offset + 1 : begin], "big")
        else:
            raise WrongKeyError("the OpenPGP data has an invalid packet")
    except IndexError as error:
        raise WrongKeyError("the OpenPGP data is cut off") from error
    if begin + length > len(data):
        raise WrongKeyError("the OpenPGP data is cut off")
    return tag, begin, begin + length
