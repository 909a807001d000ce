"""Blobs: payloads come back as they were, and nothing but what was recorded is ever accepted."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard

from casfs.digest import Digest, digest_of
from casfs.errors import BlobError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobCodec, Codec, Encoded
from tests.support.stores import noise

TEXT = b"The same words again and again. " * 400


@pytest.fixture
def codec() -> BlobCodec:
    return BlobCodec(3)


def compressed(plain: bytes, write_content_size: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(level=3, write_content_size=write_content_size)
    return compressor.compress(plain)


class TestBlobEncoding:
    def test_encoding_keeps_the_order_of_a_batch(self, codec: BlobCodec) -> None:
        plains = [b"", b"short", TEXT, noise("raw", 3000), TEXT[:-1], b"x" * 64, b"x" * 63]
        encoded = codec.encode_many(plains)
        for plain, (kind, payload) in zip(plains, encoded, strict=True):
            assert codec.decode(digest_of(plain), kind, payload, len(plain)) == plain
        kinds = [kind for kind, _ in encoded]
        assert kinds == [
            *(Codec.RAW, Codec.RAW, Codec.ZSTD, Codec.RAW, Codec.ZSTD, Codec.ZSTD, Codec.RAW)
        ]

    def test_encoding_a_large_batch_gives_the_payloads_of_single_blobs(
        self, codec: BlobCodec
    ) -> None:
        plains = [b"%d " % number + TEXT * 60 for number in range(8)]
        assert codec.encode_many(plains) == [
            pair for plain in plains for pair in codec.encode_many([plain])
        ]

    def test_a_blob_that_does_not_shrink_stays_raw(self, codec: BlobCodec) -> None:
        plain = noise("does not shrink", 100_000)
        assert codec.encode_many([plain]) == [(Codec.RAW, plain)]

    def test_an_encoded_frame_has_its_content_size_and_no_optional_fields(
        self, codec: BlobCodec
    ) -> None:
        ((kind, payload),) = codec.encode_many([TEXT])
        frame = zstandard.get_frame_parameters(payload)
        assert kind == Codec.ZSTD
        assert frame.content_size == len(TEXT)
        assert not frame.has_checksum
        assert frame.dict_id == 0

    def test_encoding_an_empty_batch_returns_nothing(self, codec: BlobCodec) -> None:
        assert codec.encode_many([]) == []


class TestBlobDecoding:
    def test_decoding_refuses_data_with_another_digest(self, codec: BlobCodec) -> None:
        with pytest.raises(BlobError, match="digest mismatch") as caught:
            codec.decode(digest_of(b"this"), Codec.RAW, b"that", 4)
        assert caught.value.digest == digest_of(b"this")

    @pytest.mark.parametrize("recorded", [3, 5])
    def test_decoding_refuses_raw_data_of_another_size(
        self, codec: BlobCodec, recorded: int
    ) -> None:
        with pytest.raises(BlobError, match="4 bytes"):
            codec.decode(digest_of(b"that"), Codec.RAW, b"that", recorded)

    @pytest.mark.parametrize("recorded", [len(TEXT) - 1, len(TEXT) + 1, 0])
    def test_decoding_refuses_a_frame_that_declares_another_size(
        self, codec: BlobCodec, recorded: int
    ) -> None:
        with pytest.raises(BlobError, match="another size"):
            codec.decode(digest_of(TEXT), Codec.ZSTD, compressed(TEXT), recorded)

    def test_decoding_refuses_an_unknown_codec(self, codec: BlobCodec) -> None:
        with pytest.raises(BlobError, match="codec 16"):
            codec.decode(digest_of(b"x"), 16, b"x", 1)

    def test_decoding_refuses_a_size_beyond_the_bound_before_it_reads_the_payload(
        self, codec: BlobCodec
    ) -> None:
        for kind in (Codec.RAW, Codec.ZSTD, 99):
            with pytest.raises(BlobError, match="above the limit"):
                codec.decode(digest_of(b""), kind, b"", MAX_PLAIN_BYTES + 1)

    def test_decoding_accepts_a_blob_of_the_greatest_size(self, codec: BlobCodec) -> None:
        plain = bytes(MAX_PLAIN_BYTES)
        ((kind, payload),) = codec.encode_many([plain])
        assert len(payload) < 2000
        assert codec.decode(digest_of(plain), kind, payload, len(plain)) == plain

    def test_decoding_refuses_a_bomb_that_claims_to_be_small(self, codec: BlobCodec) -> None:
        plain = bytes(60_000)
        frame = bytearray(compressed(plain))
        place = frame.index(struct.pack("<H", len(plain) - 256))
        frame[place : place + 2] = struct.pack("<H", 300 - 256)
        assert zstandard.get_frame_parameters(bytes(frame)).content_size == 300
        with pytest.raises(BlobError):
            codec.decode(digest_of(plain), Codec.ZSTD, bytes(frame), 300)
        with pytest.raises(BlobError, match="another size"):
            codec.decode(digest_of(plain), Codec.ZSTD, bytes(frame), len(plain))

    def test_decoding_refuses_a_frame_that_declares_more_than_it_holds(
        self, codec: BlobCodec
    ) -> None:
        plain = bytes(60_000)
        frame = bytearray(compressed(plain))
        place = frame.index(struct.pack("<H", len(plain) - 256))
        frame[place : place + 2] = struct.pack("<H", 61_000 - 256)
        with pytest.raises(BlobError):
            codec.decode(digest_of(plain), Codec.ZSTD, bytes(frame), 61_000)

    def test_decoding_refuses_a_frame_without_its_content_size(self, codec: BlobCodec) -> None:
        frame = compressed(TEXT, write_content_size=False)
        with pytest.raises(BlobError, match="another size"):
            codec.decode(digest_of(TEXT), Codec.ZSTD, frame, len(TEXT))

    @pytest.mark.parametrize("behind", [b"\0", b"junk", compressed(b"x" * 100)])
    def test_decoding_refuses_bytes_after_the_frame(self, codec: BlobCodec, behind: bytes) -> None:
        with pytest.raises(BlobError):
            codec.decode(digest_of(TEXT), Codec.ZSTD, compressed(TEXT) + behind, len(TEXT))
        with pytest.raises(BlobError):
            codec.decode(digest_of(b""), Codec.ZSTD, compressed(b"") + behind, 0)

    def test_decoding_refuses_a_skippable_frame(self, codec: BlobCodec) -> None:
        frame = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"hello"
        with pytest.raises(BlobError):
            codec.decode(digest_of(b"hello"), Codec.ZSTD, frame, 5)

    @pytest.mark.parametrize("payload", [b"", b"\x28", b"(\xb5/\xfd", TEXT])
    def test_decoding_refuses_data_that_is_no_frame(self, codec: BlobCodec, payload: bytes) -> None:
        with pytest.raises(BlobError):
            codec.decode(digest_of(TEXT), Codec.ZSTD, payload, len(TEXT))

    def test_decoding_refuses_a_frame_that_is_cut_at_any_place(self, codec: BlobCodec) -> None:
        frame = compressed(TEXT)
        for end in range(len(frame)):
            with pytest.raises(BlobError):
                codec.decode(digest_of(TEXT), Codec.ZSTD, frame[:end], len(TEXT))


def test_a_payload_without_a_digest_is_identified_by_its_decoded_bytes(codec: BlobCodec) -> None:
    found = codec.digest_payload(Codec.ZSTD, compressed(TEXT), len(TEXT))
    assert found == [(digest_of(TEXT), len(TEXT))]
    assert codec.decompress(Codec.RAW, b"plain", 5) == b"plain"
    with pytest.raises(BlobError):
        codec.digest_payload(Codec.RAW, b"plain", 6)


def test_threads_share_a_codec(codec: BlobCodec) -> None:
    def both_ways(number: int) -> bool:
        plain = b"%d" % number + TEXT
        ((kind, payload),) = codec.encode_many([plain])
        return codec.decode(codec.digest(plain), kind, payload, len(plain)) == plain

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both_ways, range(200)))


def test_a_digest_is_that_of_any_buffer(codec: BlobCodec) -> None:
    assert (
        codec.digest(bytearray(TEXT)) == codec.digest(memoryview(TEXT)) == Digest(digest_of(TEXT))
    )


class TestBatchDecoding:
    def test_batch_decoding_returns_intact_blobs_and_no_damaged_ones(
        self, codec: BlobCodec
    ) -> None:
        large = bytes(range(250)) * 5000 + bytes(1 << 20)
        plains = [TEXT, b"raw", noise("raw too", 500), TEXT * 3, b"x" * 70, large]
        payloads = codec.encode_many(plains)
        intact = [
            Encoded(digest_of(plain), 0, kind, payload, len(plain))
            for plain, (kind, payload) in zip(plains, payloads, strict=True)
        ]
        flipped = bytearray(intact[0].payload)
        flipped[len(flipped) // 2] ^= 1
        damaged = [
            intact[0]._replace(payload=bytes(flipped)),
            intact[0]._replace(plain_bytes=len(TEXT) + 1),
            intact[0]._replace(digest=digest_of(b"another")),
            intact[0]._replace(payload=b"no frame"),
            intact[0]._replace(payload=intact[0].payload + b"more"),
            intact[0]._replace(payload=intact[0].payload * 2),
            intact[0]._replace(payload=intact[0].payload[:-1]),
            intact[1]._replace(payload=b"war"),
            intact[1]._replace(plain_bytes=2),
            intact[1]._replace(codec=9),
        ]
        assert codec.decode_many(intact) == plains
        for one in damaged:
            with pytest.raises(BlobError):
                codec.decode(one.digest, one.codec, one.payload, one.plain_bytes)
            assert codec.decode_many([one]) == [None]
            assert codec.decode_many([*intact[:2], one, *intact[2:]]) == [
                *plains[:2],
                None,
                *plains[2:],
            ]
        assert codec.decode_many([]) == []
