"""The pack format: what a writer makes is read back, and what breaks a rule is refused."""

from __future__ import annotations

import struct

import pytest

from casfs.digest import Digest, PackId, digest_of
from casfs.errors import PackError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind, Codec
from casfs.format.pack import (
    BLOB_HEADER,
    DIRECTORY_KIND,
    ENTRY,
    HEADER,
    MAX_PACK_BLOBS,
    MAX_STORED_BYTES,
    RECORD_MAGIC,
    SCAN_FACTOR,
    TRAILER,
    PackEntry,
    encode_end,
    encode_header,
    encode_record_header,
    parse_directory,
    parse_header,
    parse_record_header,
    parse_trailer,
    scan_records,
)
from tests.support.stores import make_pack, noise

PACK = PackId(bytes(range(32)))
PLAINS = [b"first", b"", noise("second", 5000), b"third" * 40]


def parse(data: bytes) -> list[PackEntry]:
    """Read a whole pack as the store does, by its trailer and directory."""
    parse_header(PACK, data)
    offset, size, count, digest = parse_trailer(PACK, data[-TRAILER.size :], len(data))
    entries = parse_directory(PACK, data[offset : offset + size], digest, offset - BLOB_HEADER.size)
    assert len(entries) == count
    return entries


def found(data: bytes) -> list[bytes]:
    """Return the payloads that a walk without the directory finds."""
    return [data[at : at + size] for at, _, _, size, _ in scan_records(data, HEADER.size)]


def test_entries_come_back_with_the_offsets_of_their_payloads() -> None:
    data, entries = make_pack(PLAINS)
    assert parse(data) == entries
    assert [data[e.offset : e.offset + e.stored_bytes] for e in entries] == PLAINS


def test_an_empty_pack_is_a_pack() -> None:
    data, _ = make_pack([])
    assert len(data) == HEADER.size + BLOB_HEADER.size + TRAILER.size
    assert parse(data) == []


def test_a_longer_header_moves_no_offset_since_they_are_counted_from_the_end() -> None:
    data, entries = make_pack(PLAINS)
    longer = HEADER.pack(b"CASFSPAK", 1, HEADER.size + 8, 0) + bytes(8) + data[HEADER.size :]
    offset, size, count, digest, variant, magic = TRAILER.unpack(longer[-TRAILER.size :])
    longer = longer[: -TRAILER.size] + TRAILER.pack(offset + 8, size, count, digest, variant, magic)
    assert parse_header(PACK, longer) == HEADER.size + 8
    assert parse(longer) == [e._replace(offset=e.offset + 8) for e in entries]


class TestPackHeader:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "shorter"),
            (encode_header()[:-1], "shorter"),
            (b"casfspak" + encode_header()[8:], "wrong magic"),
            (HEADER.pack(b"CASFSPAK", 2, 16, 0), "version 2"),
            (HEADER.pack(b"CASFSPAK", 1, 15, 0), "length"),
        ],
    )
    def test_an_invalid_pack_header_is_refused(self, data: bytes, reason: str) -> None:
        with pytest.raises(PackError, match=reason) as caught:
            parse_header(PACK, data)
        assert caught.value.pack == PACK


class TestPackTrailer:
    LENGTH = 1000
    COUNT = 3
    SIZE = 3 * ENTRY.size
    OFFSET = LENGTH - SIZE - TRAILER.size

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ((OFFSET, SIZE, COUNT, bytes(32), b"CASFSENd"), "trailer is missing"),
            ((OFFSET, SIZE, COUNT + 1, bytes(32), b"CASFSEND"), "invalid directory size"),
            ((OFFSET, SIZE + 1, COUNT, bytes(32), b"CASFSEND"), "invalid directory size"),
            ((OFFSET + 1, SIZE, COUNT, bytes(32), b"CASFSEND"), "contradicts"),
            ((2**64 - 1, SIZE, COUNT, bytes(32), b"CASFSEND"), "contradicts"),
            ((0, 0, 0, bytes(32), b"CASFSEND"), "contradicts"),
        ],
    )
    def test_a_pack_trailer_that_contradicts_itself_or_the_length_is_refused(
        self, fields: tuple[int, int, int, bytes, bytes], reason: str
    ) -> None:
        with pytest.raises(PackError, match=reason):
            parse_trailer(PACK, TRAILER.pack(*fields[:4], 0, fields[4]), self.LENGTH)

    def test_a_pack_trailer_with_too_many_blobs_is_refused_whatever_the_length(self) -> None:
        count = MAX_PACK_BLOBS + 1
        size = count * ENTRY.size
        data = TRAILER.pack(16, size, count, bytes(32), 0, b"CASFSEND")
        with pytest.raises(PackError, match="invalid directory size"):
            parse_trailer(PACK, data, 16 + size + TRAILER.size)

    def test_a_pack_trailer_that_is_cut_short_is_refused(self) -> None:
        with pytest.raises(PackError, match="shorter"):
            parse_trailer(PACK, bytes(TRAILER.size - 1), 1000)


class TestPackDirectory:
    def test_a_pack_directory_with_another_digest_is_refused(self) -> None:
        directory = ENTRY.pack(bytes(32), 5, 5, 1, 0, 0)
        with pytest.raises(PackError, match="digest"):
            parse_directory(PACK, directory, Digest(bytes(32)), 100)

    def test_a_pack_directory_whose_payloads_begin_before_the_pack_is_refused(self) -> None:
        directory = ENTRY.pack(bytes(32), 500, 500, 1, 0, 0)
        with pytest.raises(PackError, match="contradicts"):
            parse_directory(PACK, directory, digest_of(directory), 300)

    @pytest.mark.parametrize(
        ("stored", "plain"), [(MAX_STORED_BYTES + 1, 1), (1, MAX_PLAIN_BYTES + 1)]
    )
    def test_a_pack_directory_with_a_blob_beyond_the_bounds_is_refused(
        self, stored: int, plain: int
    ) -> None:
        directory = ENTRY.pack(bytes(32), stored, plain, 1, 0, 0)
        with pytest.raises(PackError, match="invalid blob size"):
            parse_directory(PACK, directory, digest_of(directory), 1 << 30)

    def test_a_pack_directory_with_an_unknown_kind_of_blob_is_refused(self) -> None:
        directory = ENTRY.pack(bytes(32), 5, 5, 77, 0, 0)
        with pytest.raises(PackError, match="invalid kind"):
            parse_directory(PACK, directory, digest_of(directory), 100)


class TestRecordHeader:
    def test_a_record_header_is_parsed_as_it_was_encoded(self) -> None:
        data = encode_record_header(BlobKind.TREE, Codec.ZSTD, 7, 9)
        assert parse_record_header(b"xx" + data, 2) == (BlobKind.TREE, Codec.ZSTD, 7, 9)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            encode_record_header(1, 0, 5, 5)[:-1],
            BLOB_HEADER.pack(b"cBLb", 1, 0, 0, 5, 5),
            BLOB_HEADER.pack(RECORD_MAGIC, 0, 0, 0, 5, 5),
            BLOB_HEADER.pack(RECORD_MAGIC, 4, 0, 0, 5, 5),
            BLOB_HEADER.pack(RECORD_MAGIC, 1, 0, 1, 5, 5),
            BLOB_HEADER.pack(RECORD_MAGIC, 1, 0, 0, MAX_STORED_BYTES + 1, 5),
            BLOB_HEADER.pack(RECORD_MAGIC, 1, 0, 0, 5, MAX_PLAIN_BYTES + 1),
        ],
    )
    def test_data_that_is_no_record_header_is_not_parsed_as_one(self, data: bytes) -> None:
        assert parse_record_header(data) is None


class TestRecordScan:
    """The walk record by record, which needs no directory."""

    def test_a_record_scan_finds_exactly_the_blobs_of_an_intact_pack(self) -> None:
        data, entries = make_pack(PLAINS)
        assert found(data) == PLAINS
        assert [at for at, *_ in scan_records(data, HEADER.size)] == [e.offset for e in entries]

    def test_a_record_scan_continues_after_a_damaged_record_header(self) -> None:
        data, entries = make_pack(PLAINS)
        for number, entry in enumerate(entries):
            for byte in range(BLOB_HEADER.size):
                broken = bytearray(data)
                broken[entry.offset - BLOB_HEADER.size + byte] ^= 0xFF
                rest = PLAINS[:number] + PLAINS[number + 1 :]
                assert [plain for plain in found(bytes(broken)) if plain in rest] == rest

    def test_a_record_scan_of_a_cut_pack_finds_every_whole_blob(self) -> None:
        data, entries = make_pack(PLAINS)
        for end in range(HEADER.size, len(data), 97):
            whole = [p for p, e in zip(PLAINS, entries, strict=True) if e.offset + len(p) <= end]
            assert found(data[:end])[: len(whole)] == whole

    def test_a_record_scan_does_not_look_into_a_record_that_holds_a_pack(self) -> None:
        inner, _ = make_pack([b"inner one", b"inner two"])
        outer, _ = make_pack([b"before", inner, b"behind"])
        assert found(outer) == [b"before", inner, b"behind"]

    def test_a_record_scan_of_data_full_of_magics_ends(self) -> None:
        data = encode_header() + RECORD_MAGIC * 5000
        assert found(data) == []
        overlapping = encode_record_header(1, 0, 64, 64) * 2000
        assert len(found(encode_header() + overlapping)) < 2000

    def test_a_record_scan_skips_the_directory_and_everything_after_it(self) -> None:
        head = encode_header()
        name = BLOB_HEADER.pack(RECORD_MAGIC, 1, 0, 0, 4, 4) + bytes(16)
        entry = PackEntry(Digest(name), 16, 4, 4, 1, 0)
        data = head + encode_record_header(1, 0, 4, 4) + b"blob" + encode_end([entry], 36)
        payloads = found(data)
        assert payloads[0] == b"blob"
        # The bytes of a digest may look like a record; what is found there decodes to another blob.
        assert all(digest_of(payload) != name for payload in payloads)


def test_the_structs_have_the_sizes_of_the_format() -> None:
    assert (HEADER.size, BLOB_HEADER.size, ENTRY.size, TRAILER.size) == (16, 16, 44, 64)
    assert DIRECTORY_KIND not in set(BlobKind)
    directory = encode_end([PackEntry(Digest(b"\xaa" * 32), 32, 5, 6, 2, 1)], 37)
    assert directory[:16] == b"cBLB\xff\x00\x00\x00" + struct.pack("<II", 44, 44)
    assert directory[16:60] == b"\xaa" * 32 + struct.pack("<IIBBH", 5, 6, 2, 1, 0)
    assert directory[60:76] == struct.pack("<QII", 37 + 16, 44, 1)
    assert directory[76:108] == digest_of(directory[16:60])
    assert directory[108:] == bytes(8) + b"CASFSEND"


def test_a_scan_of_overlapping_records_does_linear_work() -> None:
    count = 4000
    size = (count + 1) * BLOB_HEADER.size
    # Each record claims everything behind it, and no record header follows its payload.
    records = b"".join(
        encode_record_header(BlobKind.DATA, 0, size - (number + 1) * BLOB_HEADER.size, 100)
        for number in range(count)
    )
    data = records + bytes(BLOB_HEADER.size)
    payloads = [stored for _, _, _, stored, _ in scan_records(data, 0)]
    assert payloads
    assert sum(payloads) <= SCAN_FACTOR * len(data)
