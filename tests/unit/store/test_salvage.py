"""Scans of packs without their directories: in bounded memory, and with bounded work for hostile ones."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest

from casfs.digest import PackId, digest_of
from casfs.format.codec import MAX_PLAIN_BYTES, BlobCodec, BlobKind, Codec
from casfs.format.pack import (
    BLOB_HEADER,
    PackEntry,
    encode_header,
    encode_record_header,
    most_scanned_plain_bytes,
)
from casfs.store import salvage
from casfs.store.salvage import find_records, salvage_entries
from tests.support.stores import make_pack, noise

CODEC = BlobCodec(3)
GIB = 1 << 30


class Pack:
    """A pack in memory, before zeros, that counts how it is read."""

    def __init__(self, data: bytes, zeros: int = 0) -> None:
        self.data = data
        self.size = len(data) + zeros
        self.largest_read = 0

    def read(self, offset: int, size: int) -> bytes:
        self.largest_read = max(self.largest_read, size)
        return self.data[offset : offset + size].ljust(min(size, self.size - offset), b"\0")

    def salvage(self) -> list[PackEntry]:
        return salvage_entries(PackId(digest_of(self.data)), self.size, self.read, CODEC)

    def payloads(self, window_bytes: int) -> list[bytes]:
        """Scan the pack, whose payloads have 1,000 bytes at most, in windows."""
        found = find_records(self.size, self.read, window_bytes, 1000 + BLOB_HEADER.size)
        return [record.payload for record in found]


@pytest.mark.parametrize("window_bytes", [1, 16, 100, 999, 4096])
def test_a_scan_in_windows_finds_what_a_scan_of_the_whole_pack_finds(window_bytes: int) -> None:
    blobs = [noise(f"blob {n}", 10 + 97 * n % 700) for n in range(60)]
    pack = Pack(make_pack(blobs)[0])
    assert pack.payloads(window_bytes) == blobs
    assert pack.largest_read == window_bytes + 1000 + BLOB_HEADER.size


@pytest.mark.parametrize("window_bytes", [1, 100, 4096])
def test_a_scan_in_windows_finds_the_records_behind_damaged_ones(window_bytes: int) -> None:
    blobs = [noise(f"blob {n}", 500) for n in range(30)]
    data, entries = make_pack(blobs)
    damaged = bytearray(data)
    for entry in entries[3::7]:
        damaged[entry.offset - BLOB_HEADER.size] ^= 255
    found = Pack(bytes(damaged)).payloads(window_bytes)
    assert found == [blob for n, blob in enumerate(blobs) if n % 7 != 3]


def test_a_scan_of_a_large_pack_takes_the_memory_of_a_window() -> None:
    data, entries = make_pack([noise(f"blob {n}", 100_000) for n in range(50)])
    pack = Pack(data, zeros=300 << 20)
    assert pack.salvage() == entries
    assert pack.largest_read < 100 << 20


def bomb_pack(records: int) -> bytes:
    """Return a pack whose records claim as much plaintext as a record may, before an honest record."""
    data = bytearray(encode_header())
    for number in range(records):
        data += encode_record_header(BlobKind.DATA, Codec.ZSTD, 4, MAX_PLAIN_BYTES)
        data += number.to_bytes(4, "little")
    data += encode_record_header(BlobKind.DATA, Codec.RAW, 6, 6) + b"honest"
    return bytes(data)


def test_a_scan_ends_where_records_claim_more_plaintext_than_zstd_can_make(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (honest,) = Pack(bomb_pack(0)).salvage()
    assert honest.digest == digest_of(b"honest")
    with caplog.at_level(logging.WARNING):
        assert Pack(bomb_pack(1000)).salvage() == []
    assert "claim more than a pack may hold; the rest is ignored" in caplog.text


def test_a_scan_ends_where_data_has_more_records_than_packs_have(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(salvage, "MAX_RECORDS", 100)
    data, entries = make_pack([noise(f"blob {n}", 100) for n in range(101)])
    with caplog.at_level(logging.WARNING):
        assert Pack(data).salvage() == entries[:100]
    assert "the rest is ignored" in caplog.text


def test_the_most_that_zstd_makes_of_a_pack_is_scanned() -> None:
    plains = [bytes([n]) * MAX_PLAIN_BYTES for n in range(3)]
    data = bytearray(encode_header())
    for codec, payload in CODEC.encode_many(plains):
        data += encode_record_header(BlobKind.DATA, codec, len(payload), MAX_PLAIN_BYTES) + payload
    found = Pack(bytes(data)).salvage()
    assert [entry.digest for entry in found] == [digest_of(plain) for plain in plains]


def test_the_work_of_a_scan_grows_with_the_pack_up_to_a_limit() -> None:
    sizes = [most_scanned_plain_bytes(size) for size in (1 << 10, 1 << 20, 1 << 21, 1 << 31)]
    assert all(one < other for one, other in pairwise(sizes[:3]))
    assert sizes[-1] == 64 * GIB
