"""The pack format: parsing and encoding, without I/O (FORMAT.md, "Packs").

A pack is a header, the blob records, a directory of them, and a trailer. Every record has its own small
header, so that a damaged directory costs no intact blob.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from casfs.digest import Digest, PackId, digest_of
from casfs.errors import PackError
from casfs.format.codec import ENCRYPTED, MAX_PLAIN_BYTES, BlobKind, Codec, Encoded
from casfs.format.group import MAX_GROUP_BLOBS

PACK_MAGIC = b"CASFSPAK"
PACK_VERSION = 1
HEADER = struct.Struct("<8sHHI")
assert HEADER.size == 16

_SESSION = struct.Struct("<32s32s")
SESSION_HEADER = HEADER.size + _SESSION.size
"""Size in bytes of an encrypted pack's header."""

RECORD_MAGIC = b"cBLB"
BLOB_HEADER = struct.Struct("<4sBBHII")
assert BLOB_HEADER.size == 16

DIRECTORY_KIND = 255
"""The kind in the directory's record header; no blob has it."""

ENCRYPTED_KIND = 254
"""The kind in an encrypted blob's record header; the blob's own kind is inside the ciphertext."""

ENTRY = struct.Struct("<32sIIBBH")
assert ENTRY.size == 44

TRAILER_MAGIC = b"CASFSEND"
TRAILER = struct.Struct("<QII32sQ8s")
assert TRAILER.size == 64

MAX_STORED_BYTES = MAX_PLAIN_BYTES + 1024
"""The largest payload: a plaintext that does not shrink is stored raw; the rest is room for encryption."""

DATA_PREFIX = "packs"
META_PREFIX = "meta"
PACK_PREFIXES = (DATA_PREFIX, META_PREFIX)
"""Below these prefixes are the packs; metadata packs, which format 2 has, are below the second."""

BLOB_KINDS = frozenset(BlobKind)

METADATA_KINDS = frozenset([BlobKind.TREE, BlobKind.CONTENT])
"""The kinds of blobs that a writer of format 2 stores in metadata packs."""

MAX_PACK_BLOBS = 1 << 16
MAX_PACK_BYTES = 1 << 31
"""Limits that a reader enforces; a writer stays far below the size."""


class PackRef(NamedTuple):
    """A pack in the storage: its name, and whether it is a metadata pack, which decides its prefix."""

    id: PackId
    is_meta: bool


def is_group(codec: int) -> bool:
    """Return whether a payload with this codec, encrypted or not, is a group of blobs."""
    return codec in (Codec.GROUP, Codec.GROUP | ENCRYPTED)


class PackEntry(NamedTuple):
    """A blob's directory entry; `offset` is the start of its payload, in bytes from the pack's start.

    The blobs of a group have its payload in common, each at a `position` in it.
    """

    digest: Digest
    offset: int
    stored_bytes: int
    plain_bytes: int
    kind: int
    codec: int
    position: int = 0

    def place(self) -> tuple[int, int]:
        """Return the key that sorts entries as they are in the pack."""
        return self.offset, self.position

    @property
    def is_grouped(self) -> bool:
        """Whether the payload is a group of blobs."""
        return is_group(self.codec)

    def shares_group(self, before: PackEntry) -> bool:
        """Return whether this is a blob of the group that `before` is in, which it follows."""
        return (
            self.is_grouped
            and before.position < self.position < MAX_GROUP_BLOBS
            and (self.offset, self.stored_bytes, self.kind, self.codec)
            == (before.offset, before.stored_bytes, before.kind, before.codec)
        )

    def encoded(self, payload: bytes) -> Encoded:
        """Return the payload with the fields that are needed to decode it."""
        return Encoded(
            self.digest, self.offset, self.codec, payload, self.plain_bytes, self.position
        )

    def pack(self) -> bytes:
        """Return the bytes of the entry in a directory or in an index delta."""
        sizes = self.stored_bytes, self.plain_bytes
        return ENTRY.pack(self.digest, *sizes, self.kind, self.codec, self.position)


def encode_header() -> bytes:
    """Return the header of an unencrypted pack."""
    return HEADER.pack(PACK_MAGIC, PACK_VERSION, HEADER.size, 0)


def encode_session_header(session: bytes, salt: bytes) -> bytes:
    """Return the header of an encrypted pack."""
    return HEADER.pack(PACK_MAGIC, PACK_VERSION, SESSION_HEADER, 0) + _SESSION.pack(session, salt)


def parse_session(pack: PackId, data: bytes) -> tuple[bytes, bytes]:
    """Return the session id and the salt from an encrypted pack's first bytes; raise PackError."""
    if parse_header(pack, data) < SESSION_HEADER or len(data) < SESSION_HEADER:
        raise PackError(pack, "not encrypted, although its repository is")
    session, salt = _SESSION.unpack_from(data, HEADER.size)
    return session, salt


def encode_record_header(kind: int, codec: int, stored_bytes: int, plain_bytes: int) -> bytes:
    """Return the record header that precedes a payload."""
    return BLOB_HEADER.pack(RECORD_MAGIC, kind, codec, 0, stored_bytes, plain_bytes)


def encode_end(
    entries: list[PackEntry],
    directory_offset: int,
    encrypt: Callable[[int, bytes], bytes] | None = None,
    variant: int = 0,
) -> bytes:
    """Return the directory's record, which begins at `directory_offset`, and the trailer.

    `encrypt` returns the stored directory, given its offset and its bytes. `variant` has no meaning except
    that another value gives the pack another name.
    """
    directory = b"".join(entry.pack() for entry in entries)
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
    """Check a pack's first bytes and return the offset of its first record; raise PackError."""
    if len(data) < HEADER.size:
        raise PackError(pack, "shorter than a pack header")
    magic, version, header_bytes, _ = HEADER.unpack_from(data)
    if magic != PACK_MAGIC:
        raise PackError(pack, "its header has the wrong magic")
    if version != PACK_VERSION:
        raise PackError(pack, f"pack version {version}; this casfs reads {PACK_VERSION}")
    if header_bytes < HEADER.size:
        raise PackError(pack, "its header has an invalid length")
    return int(header_bytes)


def parse_trailer(
    pack: PackId, data: bytes, pack_bytes: int, overhead_bytes: int = 0
) -> tuple[int, int, int, Digest]:
    """Return the directory's offset, size in bytes, entry count and digest; `data` is the trailer.

    `overhead_bytes` is the number of bytes that encryption adds to a directory. Raise PackError.
    """
    if len(data) != TRAILER.size:
        raise PackError(pack, "shorter than a pack trailer")
    offset, directory_bytes, count, digest, _, magic = TRAILER.unpack(data)
    if magic != TRAILER_MAGIC:
        raise PackError(pack, "its trailer is missing or damaged")
    if count > MAX_PACK_BLOBS or directory_bytes != count * ENTRY.size + overhead_bytes:
        raise PackError(pack, "its trailer has an invalid directory size")
    if offset + directory_bytes + TRAILER.size != pack_bytes:
        raise PackError(pack, "its trailer contradicts its length")
    return offset, directory_bytes, count, Digest(digest)


def parse_directory(
    pack: PackId,
    data: bytes,
    digest: Digest,
    end: int,
    decrypt: Callable[[PackId, int, bytes], bytes] | None = None,
) -> list[PackEntry]:
    """Return the entries of a directory; `digest` is the digest in the trailer. Raise PackError.

    `end` is the offset of the directory's record header, where the last payload ends. `decrypt` returns the
    directory, given the pack's name, the directory's offset and its stored bytes.
    """
    if digest_of(data) != digest:
        raise PackError(pack, "directory digest mismatch")
    if decrypt is not None:
        data = decrypt(pack, end + BLOB_HEADER.size, data)
    if len(data) % ENTRY.size:
        raise PackError(pack, "its directory has an invalid size")
    fields = list(ENTRY.iter_unpack(data))
    records = (field[1] for field in fields if not field[5])
    offset = end - sum(BLOB_HEADER.size + stored_bytes for stored_bytes in records)
    if offset < HEADER.size:
        raise PackError(pack, "its directory contradicts its length")
    entries: list[PackEntry] = []
    begin = offset
    for blob, stored_bytes, plain_bytes, kind, codec, position in fields:
        if stored_bytes > MAX_STORED_BYTES or plain_bytes > MAX_PLAIN_BYTES:
            raise PackError(pack, "its directory has an invalid blob size")
        if kind not in BLOB_KINDS:
            raise PackError(pack, "its directory has an invalid kind of blob")
        if not position:
            begin = offset + BLOB_HEADER.size
            offset = begin + stored_bytes
        entry = PackEntry(Digest(blob), begin, stored_bytes, plain_bytes, kind, codec, position)
        is_next = entries and position == entries[-1].position + 1
        if position and not (is_next and entry.shares_group(entries[-1])):
            raise PackError(pack, "its directory has an invalid group")
        entries.append(entry)
    return entries


SCAN_FACTOR = 4
"""Bounds the work of a scan; payloads of an honest pack, damaged or not, hardly overlap."""

_MOST_SCANNED_PLAIN_BYTES = 64 * 1024**3
_ZSTD_FACTOR = 32_768
"""The plaintext of a zstd frame has at most so many times its size: a block of 4 bytes stands for 128 KiB."""


def most_scanned_plain_bytes(pack_bytes: int) -> int:
    """Return how much plaintext the payloads that a scan decodes may have; a writer puts less into a pack."""
    return min(_MOST_SCANNED_PLAIN_BYTES, _ZSTD_FACTOR * pack_bytes)


def parse_record_header(data: bytes, offset: int = 0) -> tuple[int, int, int, int] | None:
    """Return kind, codec, stored and plain bytes of a record header, or None if the header is not valid."""
    if len(data) - offset < BLOB_HEADER.size:
        return None
    magic, kind, codec, reserved, stored_bytes, plain_bytes = BLOB_HEADER.unpack_from(data, offset)
    known = kind in BLOB_KINDS or kind in (DIRECTORY_KIND, ENCRYPTED_KIND)
    if magic != RECORD_MAGIC or reserved or not known:
        return None
    if kind != DIRECTORY_KIND and (
        stored_bytes > MAX_STORED_BYTES or plain_bytes > MAX_PLAIN_BYTES
    ):
        return None
    return kind, codec, stored_bytes, plain_bytes


def scan_records(data: bytes | memoryview, offset: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Scan records without the directory: yield payload offset, kind, codec, stored and plain bytes.

    After a damaged record header the scan continues at the next record magic. So the caller must verify each
    result by decoding it; therefore a record header contains no digest. Records of a hostile pack may
    overlap: the scan ends when the payloads together exceed `SCAN_FACTOR` times the data.
    """
    raw = bytes(data)
    left_bytes = SCAN_FACTOR * len(raw)
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
            left_bytes -= stored_bytes
            if left_bytes < 0:
                return
            yield begin, kind, codec, stored_bytes, plain_bytes
            if parse_record_header(raw, begin + stored_bytes) is not None:
                offset = begin + stored_bytes
                continue
        offset = begin
