"""Find the blobs of a pack whose directory is damaged, by a scan of its records.

A pack may be hostile. It is read in windows, so a scan takes little memory; the payloads that it tries to
decode are limited in number and in the size of their plaintext. An honest pack stays below these limits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from casfs.digest import PackId, short_id
from casfs.errors import IntegrityError
from casfs.format.codec import ENCRYPTED, BlobCodec
from casfs.format.pack import (
    BLOB_HEADER,
    BLOB_KINDS,
    HEADER,
    MAX_PACK_BLOBS,
    MAX_PACK_BYTES,
    MAX_STORED_BYTES,
    PackEntry,
    most_scanned_plain_bytes,
    scan_records,
)

if TYPE_CHECKING:
    from casfs.format.cipher import PackCipher

log = logging.getLogger(__name__)

WINDOW_BYTES = 64 * 1024 * 1024
"""The bytes of a pack that are in memory at a time, besides the largest record."""

MAX_RECORDS = 4 * MAX_PACK_BLOBS
"""The most payloads that a scan tries: user data may contain bytes that look like records."""

Read = Callable[[int, int], bytes]
"""Returns the bytes of the pack from an offset on; of the end of the pack fewer than the wanted number."""


class FoundRecord(NamedTuple):
    """A payload that a scan found; `offset` is that of the payload in the pack. Nothing is verified yet."""

    offset: int
    kind: int
    codec: int
    plain_bytes: int
    payload: bytes


def salvage_entries(
    pack: PackId,
    pack_bytes: int,
    read: Read,
    codec: BlobCodec,
    cipher: PackCipher | None = None,
) -> list[PackEntry]:
    """Return entries for the blobs of a pack that decode, in the order of their places.

    The scan ends at MAX_PACK_BYTES, before there are more than MAX_PACK_BLOBS, and where the limits of
    `most_scanned_plain_bytes` or MAX_RECORDS are reached.
    """
    entries: list[PackEntry] = []
    left_bytes, left_records = most_scanned_plain_bytes(pack_bytes), MAX_RECORDS
    for record in find_records(min(pack_bytes, MAX_PACK_BYTES), read):
        offset, kind, used, plain_bytes, payload = record
        stored_bytes, key = len(payload), None
        left_records -= 1
        try:
            if cipher is not None:
                inner = cipher.decrypt(b"", offset, payload)
                kind, used, plain_bytes = inner.kind, inner.codec, inner.plain_bytes
                payload, key = inner.payload, cipher.digest_key(inner)
            left_bytes -= plain_bytes
            if left_bytes < 0 or left_records < 0:
                log.warning(
                    "the records of pack %s claim more than a pack may hold; the rest is ignored",
                    short_id(pack),
                )
                break
            found = codec.digest_payload(used, payload, plain_bytes, key)
        except IntegrityError:
            continue
        if kind not in BLOB_KINDS:
            continue
        if len(entries) + len(found) > MAX_PACK_BLOBS:
            log.warning(
                "pack %s has more blobs than a pack may have; the rest is ignored", short_id(pack)
            )
            break
        if cipher is not None:
            used |= ENCRYPTED
        for position, (digest, size) in enumerate(found):
            entries.append(PackEntry(digest, offset, stored_bytes, size, kind, used, position))
    return entries


def find_records(
    size: int,
    read: Read,
    window_bytes: int = WINDOW_BYTES,
    record_bytes: int = BLOB_HEADER.size + MAX_STORED_BYTES,
) -> Iterator[FoundRecord]:
    """Yield the records in the first `size` bytes of a pack, read in windows.

    A record belongs to the window in which its header begins. With a window, the `record_bytes` that follow
    it are read, which is the size of the largest record.
    """
    begin = HEADER.size
    while begin < size:
        wanted = min(window_bytes + record_bytes, size - begin)
        data = read(begin, wanted)
        is_last = begin + wanted >= size
        after = begin + window_bytes
        for at, kind, codec, stored_bytes, plain_bytes in scan_records(data, 0):
            header = at - BLOB_HEADER.size
            if header >= window_bytes and not is_last:
                after = begin + header
                break
            yield FoundRecord(begin + at, kind, codec, plain_bytes, data[at : at + stored_bytes])
        if is_last:
            return
        begin = after
