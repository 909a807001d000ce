"""The pack format: parsing and building, apart from any I/O (see FORMAT.md, "Packs").

A pack is a header, then blob records one after another, then a directory of them, then a trailer.
Every record carries its own small header, so that a damaged directory costs no intact blob.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from casfs.digest import Digest, PackId, digest_of
from casfs.errors import PackError
from casfs.format.codec import ENCRYPTED, MAX_PLAIN_BYTES, BlobKind, Codec

PACK_MAGIC = b"CASFSPAK"
PACK_VERSION = 1
HEADER = struct.Struct("<8sHHI")
assert HEADER.size == 16

_SESSION = struct.Struct("<32s32s")
SESSION_HEADER = HEADER.size + _SESSION.size
"""Size in bytes of the header of an encrypted pack."""

RECORD_MAGIC = b"cBLB"
BLOB_HEADER = struct.Struct("<4sBBHII")
assert BLOB_HEADER.size == 16

DIRECTORY_KIND = 255
"""The kind in the record header in front of the directory; no blob has it."""

ENCRYPTED_KIND = 254
"""The kind in the record header of an encrypted blob, whose own kind is told inside."""

ENTRY = struct.Struct("<32sIIBBH")
assert ENTRY.size == 44

TRAILER_MAGIC = b"CASFSEND"
TRAILER = struct.Struct("<QII32sQ8s")
assert TRAILER.size == 64

MAX_STORED_BYTES = MAX_PLAIN_BYTES + 1024
"""No payload is larger: one that does not shrink is stored raw; the rest is room for encryption."""

MAX_PACK_BLOBS = 1 << 16
MAX_PACK_BYTES = 1 << 31
"""Bounds on what a reader accepts; a writer stays far below the size."""


class PackEntry(NamedTuple):
    """One blob of a pack: `offset` is where its payload begins, in bytes from the pack's start."""

    digest: Digest
    offset: int
    stored_bytes: int
    plain_bytes: int
    kind: int
    codec: int


def encode_header() -> bytes:
    """Return the bytes that every pack begins with."""
    return HEADER.pack(PACK_MAGIC, PACK_VERSION, HEADER.size, 0)


def encode_session_header(session: bytes, salt: bytes) -> bytes:
    """Return the bytes that an encrypted pack begins with."""
    return HEADER.pack(PACK_MAGIC, PACK_VERSION, SESSION_HEADER, 0) + _SESSION.pack(session, salt)


def parse_session(pack: PackId, data: bytes) -> tuple[bytes, bytes]:
    """Return the session and the salt of an encrypted pack from its first bytes; raises PackError."""
    if parse_header(pack, data) < SESSION_HEADER or len(data) < SESSION_HEADER:
        raise PackError(pack, "it is not encrypted, as all of this repository is")
    session, salt = _SESSION.unpack_from(data, HEADER.size)
    return session, salt


def encode_record_header(kind: int, codec: int, stored_bytes: int, plain_bytes: int) -> bytes:
    """Return the header that goes before a payload."""
    return BLOB_HEADER.pack(RECORD_MAGIC, kind, codec, 0, stored_bytes, plain_bytes)


def encode_end(
    entries: list[PackEntry],
    directory_offset: int,
    encrypt: Callable[[int, bytes], bytes] | None = None,
    variant: int = 0,
) -> bytes:
    """Return the directory's record, which begins at `directory_offset`, and the trailer.

    `encrypt` makes the stored directory of its offset and its bytes; `variant` means nothing, and gives
    the pack another name.
    """
    directory = b"".join(
        ENTRY.pack(e.digest, e.stored_bytes, e.plain_bytes, e.kind, e.codec, 0) for e in entries
    )
    offset = directory_offset + BLOB_HEADER.size
    if encrypt is None:
        header = encode_record_header(DIRECTORY_KIND, Codec.RAW, len(directory), len(directory))
    else:
        directory = encrypt(offset, directory)
        header = encode_record_header(DIRECTORY_KIND, ENCRYPTED, len(directory), 0)
    trailer = TRAILER.pack(
        offset, len(directory), len(entries), digest_of(directory), variant, TRAILER_MAGIC
    )
    return header + directory + trailer


def parse_header(pack: PackId, data: bytes) -> int:
    """Check a pack's first bytes and return where its records begin."""
    if len(data) < HEADER.size:
        raise PackError(pack, "it is shorter than a pack's header")
    magic, version, header_bytes, _ = HEADER.unpack_from(data)
    if magic != PACK_MAGIC:
        raise PackError(pack, "it does not begin as a pack does")
    if version != PACK_VERSION:
        raise PackError(pack, f"it has pack version {version}; this casfs reads {PACK_VERSION}")
    if header_bytes < HEADER.size:
        raise PackError(pack, "its header tells an impossible length")
    return int(header_bytes)


def parse_trailer(
    pack: PackId, data: bytes, pack_bytes: int, overhead_bytes: int = 0
) -> tuple[int, int, int, Digest]:
    """Return the directory's offset, length in bytes, entry count and digest; `data` is the tail.

    `overhead_bytes` is what encryption adds to a directory.
    """
    if len(data) != TRAILER.size:
        raise PackError(pack, "it is shorter than a pack's trailer")
    offset, directory_bytes, count, digest, _, magic = TRAILER.unpack(data)
    if magic != TRAILER_MAGIC:
        raise PackError(pack, "its end is missing or damaged")
    if count > MAX_PACK_BLOBS or directory_bytes != count * ENTRY.size + overhead_bytes:
        raise PackError(pack, "its trailer tells an impossible directory")
    if offset + directory_bytes + TRAILER.size != pack_bytes:
        raise PackError(pack, "its trailer does not fit its length")
    return offset, directory_bytes, count, Digest(digest)


def parse_directory(
    pack: PackId,
    data: bytes,
    digest: Digest,
    end: int,
    decrypt: Callable[[PackId, int, bytes], bytes] | None = None,
) -> list[PackEntry]:
    """Return the entries of a directory whose digest was told by the trailer.

    `end` is the offset of the directory's own record header: the last payload ends there. `decrypt` makes
    the directory of the pack's name, its own offset and its bytes as stored.
    """
    if digest_of(data) != digest:
        raise PackError(pack, "directory digest mismatch")
    if decrypt is not None:
        data = decrypt(pack, end + BLOB_HEADER.size, data)
    if len(data) % ENTRY.size:
        raise PackError(pack, "its directory has an impossible size")
    fields = list(ENTRY.iter_unpack(data))
    offset = end - sum(BLOB_HEADER.size + stored_bytes for _, stored_bytes, *_ in fields)
    if offset < HEADER.size:
        raise PackError(pack, "its directory does not fit its length")
    entries: list[PackEntry] = []
    for blob, stored_bytes, plain_bytes, kind, codec, _ in fields:
        if stored_bytes > MAX_STORED_BYTES or plain_bytes > MAX_PLAIN_BYTES:
            raise PackError(pack, "its directory tells an impossible blob size")
        offset += BLOB_HEADER.size
        entries.append(PackEntry(Digest(blob), offset, stored_bytes, plain_bytes, kind, codec))
        offset += stored_bytes
    return entries


def parse_record_header(data: bytes, offset: int = 0) -> tuple[int, int, int, int] | None:
    """Return kind, codec, stored and plain bytes, or None where no sound record header stands."""
    if len(data) - offset < BLOB_HEADER.size:
        return None
    magic, kind, codec, reserved, stored_bytes, plain_bytes = BLOB_HEADER.unpack_from(data, offset)
    known = kind in BlobKind.__members__.values() or kind in (DIRECTORY_KIND, ENCRYPTED_KIND)
    if magic != RECORD_MAGIC or reserved or not known:
        return None
    if kind != DIRECTORY_KIND and (
        stored_bytes > MAX_STORED_BYTES or plain_bytes > MAX_PLAIN_BYTES
    ):
        return None
    return kind, codec, stored_bytes, plain_bytes


def scan_records(data: bytes | memoryview, offset: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Walk the records without a directory: yield offset of payload, kind, codec, stored, plain bytes.

    Where a record header is damaged the walk goes on at the next place that looks like one, so what it
    yields must be verified by decoding; that is why no digest is stored in a record header.
    """
    raw = bytes(data)
    while offset < len(raw):
        found = parse_record_header(raw, offset)
        if found is None:
            offset = raw.find(RECORD_MAGIC, offset + 1)
            if offset < 0:
                return
            continue
        kind, codec, stored_bytes, plain_bytes = found
        begin = offset + BLOB_HEADER.size
        if kind == DIRECTORY_KIND:
            offset = begin
            continue
        if begin + stored_bytes <= len(raw):
            yield begin, kind, codec, stored_bytes, plain_bytes
            if parse_record_header(raw, begin + stored_bytes) is not None:
                offset = begin + stored_bytes
                continue
        offset = begin
