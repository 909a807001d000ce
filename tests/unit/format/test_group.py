"""Groups: what is joined is separated again, and a table that contradicts the group is refused."""

from __future__ import annotations

import struct

import pytest

from casfs.digest import Digest, digest_of, keyed_digest
from casfs.errors import BlobError
from casfs.format.codec import BlobCodec, Codec, Encoded
from casfs.format.group import (
    MAX_GROUP_BLOBS,
    MAX_GROUP_BYTES,
    Group,
    group_bytes,
    join_group,
)
from tests.support.stores import noise

PLAINS = [b"one", b"", b"three " * 100, b"one"]


def compressed(plain: bytes) -> bytes:
    ((kind, payload),) = BlobCodec(3).encode_many([plain])
    assert kind == Codec.ZSTD
    return payload


def table(*sizes: int) -> bytes:
    return struct.pack(f"<{1 + len(sizes)}I", len(sizes), *sizes)


def test_a_group_returns_each_of_its_blobs_by_position() -> None:
    group = Group(join_group(PLAINS))
    found = [
        group.blob(digest_of(plain), position, len(plain)) for position, plain in enumerate(PLAINS)
    ]
    assert found == PLAINS
    assert group.digests() == [(digest_of(plain), len(plain)) for plain in PLAINS]
    assert group_bytes([len(plain) for plain in PLAINS]) == len(join_group(PLAINS))


@pytest.mark.parametrize(
    ("digest", "position", "size"),
    [
        pytest.param(digest_of(b"two"), 0, 3, id="another digest"),
        pytest.param(digest_of(b"one"), 1, 3, id="another position"),
        pytest.param(digest_of(b"one"), 4, 3, id="a position behind the last blob"),
        pytest.param(digest_of(b"one"), 0, 2, id="another size"),
    ],
)
def test_a_group_refuses_a_blob_that_does_not_match_its_index_entry(
    digest: Digest, position: int, size: int
) -> None:
    with pytest.raises(BlobError):
        Group(join_group(PLAINS)).blob(digest, position, size)


def test_blobs_of_a_group_are_verified_with_the_key_of_their_domain() -> None:
    key = bytes(range(32))
    group = Group(join_group([b"one"]), key)
    assert group.blob(keyed_digest(b"one", key), 0, 3) == b"one"
    with pytest.raises(BlobError):
        group.blob(digest_of(b"one"), 0, 3)


@pytest.mark.parametrize(
    "plain",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\1\0\0", id="half a count"),
        pytest.param(table(3, 3)[:-4], id="a table that is cut"),
        pytest.param(table(3, 3) + b"onetw", id="too few bytes"),
        pytest.param(table(3, 3) + b"onetwo!", id="too many bytes"),
        pytest.param(table(2**32 - 1, 7) + b"onetwo", id="a size that would overflow 32 bits"),
        pytest.param(struct.pack("<I", 2**32 - 1), id="a huge number of blobs"),
        pytest.param(table(*[0] * (MAX_GROUP_BLOBS + 1)), id="more blobs than allowed"),
        pytest.param(table(MAX_GROUP_BYTES) + bytes(MAX_GROUP_BYTES), id="larger than allowed"),
    ],
)
def test_a_group_with_a_contradictory_table_is_refused(plain: bytes) -> None:
    with pytest.raises(BlobError):
        Group(plain)


class TestPayload:
    def test_a_payload_opens_as_the_group_that_was_compressed(self) -> None:
        plain = join_group(PLAINS)
        group = BlobCodec(3).open_group(digest_of(b"one"), compressed(plain), len(plain))
        assert group.blob(digest_of(b"one"), 3, 3) == b"one"

    def test_a_payload_with_another_size_than_recorded_is_refused(self) -> None:
        plain = join_group(PLAINS)
        with pytest.raises(BlobError):
            BlobCodec(3).open_group(digest_of(b"one"), compressed(plain), len(plain) + 1)

    def test_a_frame_that_would_decode_to_more_than_a_group_is_refused(self) -> None:
        with pytest.raises(BlobError, match="too large"):
            BlobCodec(3).open_group(digest_of(b""), compressed(bytes(MAX_GROUP_BYTES + 1)))

    def test_a_batch_decodes_blobs_of_groups_among_others(self) -> None:
        payload = compressed(join_group(PLAINS))
        single = compressed(b"single " * 100)
        wanted = [
            Encoded(digest_of(b"one"), 100, Codec.GROUP, payload, 3, 0),
            Encoded(digest_of(PLAINS[2]), 100, Codec.GROUP, payload, 600, 2),
            Encoded(digest_of(b"single " * 100), 500, Codec.ZSTD, single, 700),
            Encoded(digest_of(b"wrong"), 100, Codec.GROUP, payload, 3, 3),
            Encoded(digest_of(b"raw"), 900, Codec.RAW, b"raw", 3),
            Encoded(digest_of(b"one"), 950, Codec.GROUP, payload[:-1], 3, 0),
            Encoded(digest_of(b"one"), 990, Codec.GROUP, b"no frame", 3, 0),
        ]
        found = BlobCodec(3).decode_many(wanted)
        assert found == [b"one", PLAINS[2], b"single " * 100, None, b"raw", None, None]

    def test_a_batch_decodes_a_bounded_number_of_bytes_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Groups may be much larger than the blobs that are wanted of them."""
        codec = BlobCodec(3)
        decoded: list[int] = []
        real = codec._decompress_many

        def watched(frames: list[tuple[bytes, int]], threads: int) -> dict[int, bytes]:
            decoded.append(sum(size for _, size in frames))
            return real(frames, threads)

        monkeypatch.setattr(codec, "_decompress_many", watched)
        blob = b"small"
        wanted = [
            Encoded(
                digest_of(blob),
                1000 * number,
                Codec.GROUP,
                compressed(join_group([blob, bytes(450_000 + number)])),
                len(blob),
            )
            for number in range(80)
        ]
        assert codec.decode_many(wanted) == [blob] * 80
        assert len(decoded) == 3 and max(decoded) <= 16 * 1024 * 1024


class TestIncompressibleContent:
    def test_large_content_that_does_not_compress_is_recognised(self) -> None:
        codec = BlobCodec(3)
        assert codec.looks_incompressible(noise("photo", 200_000))
        assert not codec.looks_incompressible(b"words and words " * 20_000)
        assert not codec.looks_incompressible(noise("small", 1000))
